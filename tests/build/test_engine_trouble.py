"""Builds that meet each other, a full disk or a bad tensor: one line each, and nothing half-made."""

import json
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quire.build import builder
from quire.build.builder import Recipe, Target, build_engine
from quire.cli.main import main
from quire.errors import ConfigurationError
from quire.ops.reference import ReferenceOps
from scripts import build_kill_trials
from tests.build.test_engine_directory import build
from tests.conftest import PATIENCE_S
from tests.tiny.checkpoints import make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model"), tokenizer=True)


def command(model: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "quire", "build", str(model), "-o", str(output), "--quiet"]


def test_of_builds_into_one_place_one_makes_the_engine(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    builds = [subprocess.Popen(command(tiny, output), stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [one.communicate(timeout=PATIENCE_S)[1].strip() for one in builds]
    codes = Counter(one.returncode for one in builds)
    assert codes == {0: 1, 2: 2}, said
    lines = [text for one, text in zip(builds, said, strict=True) if one.returncode]
    assert all(re.search("another build is writing engine|engine is there already", text) for text in lines), said
    assert [path.name for path in tmp_path.iterdir()] == ["engine"] and main(["verify", str(output)]) == 0


def test_a_folder_that_another_build_finished_meanwhile_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    """Opened before it was renamed, locked after: the lock is on an engine then."""
    engine = build(tiny, tmp_path / "engine")
    place, flock = tmp_path / ".other.building", builder.fcntl.flock

    def renamed_meanwhile(*arguments: Any) -> None:
        place.rename(tmp_path / "finished")
        flock(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder.fcntl, "flock", renamed_meanwhile)
        place.mkdir()
        (place / "weights.quire").write_text("theirs")
        target = Target(ReferenceOps(np), "reference", [])
        with pytest.raises(ConfigurationError, match="another build is writing other"):
            build_engine(Recipe("m", tiny, tmp_path / "other", "0"), target, lambda _: [])
    assert (tmp_path / "finished" / "weights.quire").read_text() == "theirs" and engine.exists()


@pytest.mark.parametrize("limit", [0, 2**10, 2**16])
def test_a_disk_that_fills_up_leaves_nothing(tiny: Path, tmp_path: Path, limit: int) -> None:
    """A real error of the system at the file's size that a process may write: at the first byte, and among weights."""

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        command(tiny, tmp_path / "engine"), preexec_fn=bounded, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 2 and "output: the engine cannot be written: file too large" in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["build", str(tiny), "-o", str(tmp_path / "file" / "engine")]) == 2
    assert "output: the engine cannot be written: " in capsys.readouterr().err


def test_a_bad_tensor_is_named_and_leaves_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny.iterdir():
        if path.suffix != ".safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tiny / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = np.nan
    save_file(tensors, model / "model.safetensors")
    (tmp_path / "place").mkdir()
    flags = ["-o", str(tmp_path / "place" / "engine"), "--quantization", "int4"]
    assert main(["build", str(model), *flags]) == 1
    assert f"{name} cannot be packed: a weight is not finite" in capsys.readouterr().err
    assert not list((tmp_path / "place").iterdir())


def test_killed_at_random_moments(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A few of the fifty of `python -m scripts.build_kill_trials`."""
    found = build_kill_trials.run(3, 2, str(tiny), [], seed=1)
    assert found.total() == 3 and not [text for text in found if text.startswith("WRONG")], found
    capfd.readouterr()


def test_what_the_trials_call_wrong(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = build(tiny, tmp_path / "engine")
    data = json.loads((output / "engine.json").read_text())
    place = build_kill_trials.place_of(output)
    output.rename(place)
    assert build_kill_trials.outcome(output) == "whole, not yet in its place"
    (place / "tokenizer.json").write_bytes(b"x" * data["files"]["tokenizer.json"]["size"])
    assert build_kill_trials.outcome(output) == "WRONG: half an engine is taken for one"
    place.rename(output)
    assert build_kill_trials.outcome(output).startswith("WRONG: an engine") and not output.exists()
    capsys.readouterr()
