"""The benchmarks of the GPU on this machine's processor at tiny sizes: every line works, and times mean nothing."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("triton")
from quire.ops.cuda import tiles
from quire.ops.cuda.tiles import GemmShape, Tiles, default_tiles, described, keeps_sums, picked, tiles_for

ROOT = Path(__file__).parents[2]
SHAPES = [
    GemmShape(kind, group, outputs, inputs)
    for kind, group in (("16 bits", 0), ("float32", 0), ("int8", 64), ("int8_w8a8", 64), ("fp8", 64), ("int4", 32))
    for outputs, inputs in ((4096, 4096), (576, 1536))
]


def run(name: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": "src", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", f"benchmarks/{name}.py", *arguments]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_kernels_and_the_cost_of_row_independence() -> None:
    lines = run("cuda_kernels", "--interpret").splitlines()
    kinds = {line.split()[0] for line in lines[1:]}
    assert kinds == {"linear", "cuBLAS", "attention", "add_rms_norm", "activation_multiply", "row"}
    assert any(line.startswith("linear fp8") for line in lines)


def test_a_tuned_table_is_one_that_is_read() -> None:
    text = run("cuda_tune", "--interpret", "--formats", "plain", "int4")
    table = tomllib.loads(text[text.index("[") :])
    assert len(table["cpu"]) == 8
    for name, picks in table["cpu"].items():
        assert [pick[0] for pick in picks] == [16, 64, tiles.LARGEST_ROWS], name
    assert tomllib.loads(described(table)) == table


def test_a_model_and_its_peer_and_what_is_continued(tmp_path: Path) -> None:
    names = ["bfloat16", "transformers, static"]
    results = tmp_path / "results.json"
    arguments = ["--shape", "tiny", "--device", "cpu", "--scale", "64", "--results", str(results), "--only", *names]
    text = run("cuda_table", *arguments)
    assert "times the throughput" in text and "ttft 128 " in text
    stored = json.loads(results.read_text())
    assert list(stored) == names and "error" not in stored["bfloat16"]
    stored["bfloat16"]["start_s"] = 77.0
    results.write_text(json.dumps(stored))
    assert "start 77.0 s" in run("cuda_table", *arguments)  # nothing is run again


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_defaults_keep_the_sums_and_serve_any_number_of_rows(shape: GemmShape) -> None:
    picks = tiles_for("no such device", shape)
    assert picks == default_tiles(shape) and all(keeps_sums(shape, one) for one in picks)
    for rows in (1, 16, 17, 64, 65, 100_000):
        chosen = picked(picks, rows)
        assert rows <= chosen.most_rows and (rows <= 64 or chosen.rows >= 32)


def test_an_entry_that_would_change_sums_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = GemmShape("fp8", 64, 4000, 4096)
    tiles.tiles_for.cache_clear()
    for depth, taken in ((128, True), (64, False)):
        entry = [tiles.LARGEST_ROWS, 128, 64, depth, 4, 3]
        monkeypatch.setattr(tiles, "_table", lambda entry=entry: {"some GPU": {"fp8 4096x4096": [entry]}})
        tiles.tiles_for.cache_clear()
        assert tiles_for("some GPU", shape) == ((Tiles(*entry),) if taken else default_tiles(shape))
    tiles.tiles_for.cache_clear()


def test_the_table_of_this_tree_is_sound() -> None:
    table = tomllib.loads(Path(tiles.__file__).with_name("tiles.toml").read_text())
    for device, shapes in table.items():
        for name, entries in shapes.items():
            picks = [Tiles(*entry) for entry in entries]
            assert picks[-1].most_rows == tiles.LARGEST_ROWS, (device, name)
            assert [one.most_rows for one in picks] == sorted(one.most_rows for one in picks), (device, name)
