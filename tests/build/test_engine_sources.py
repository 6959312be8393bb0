"""Engines of GGUF files, of other engines, and for other instruction sets: the bits of what they were built from."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from gguf import GGUFReader

from quire import LLM, SamplingParams
from quire.cli.main import main
from quire.errors import ModelFileError
from quire.ops.cpu import CpuOps
from quire.ops.cpu_layouts import relayout
from quire.ops.select import instruction_sets
from quire.weights.formats import engine_dir, gguf_file
from quire.weights.formats.engine_dir import Manifest
from quire.weights.formats.engine_names import MANIFEST, WEIGHTS
from quire.weights.formats.gguf_names import HEADER
from quire.weights.formats.gguf_parts import GgufParts
from tests.build.test_engine_directory import answers, build, read
from tests.cli.test_gguf import tokenizer_keys
from tests.tiny.checkpoints import make_tiny
from tests.tiny.gguf_files import plain, write_gguf

CHAT = [{"role": "user", "content": "What is TTFT?"}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("sources") / "model", dtype="bfloat16", tokenizer=True)


@pytest.fixture(scope="module")
def file(tiny: Path) -> Path:
    """In blocks, with a tokenizer, a template and sampling defaults in its header."""
    return write_gguf(tiny, tiny.parent / "tiny.gguf", "llama", plain("Q8_0"), **tokenizer_keys(tiny))


@pytest.fixture(scope="module")
def of_file(file: Path) -> Path:
    return build(file, file.parent / "of-file")


@pytest.mark.parametrize(
    ("family", "kind"), [("llama-3.1", "F32"), ("gemma2", "F16"), ("phi3", "Q4_0"), ("gpt2", "F32")]
)
def test_an_engine_gives_the_bits_of_its_gguf_file(tmp_path: Path, family: str, kind: str) -> None:
    """Factors of positions (which the header's configuration reads), rows in turns, windows, norms with their 1."""
    model = make_tiny(family, tmp_path / "model")
    file = write_gguf(model, tmp_path / "x.gguf", family.partition("-")[0], plain(kind))
    engine = build(file, tmp_path / "engine")
    shutil.rmtree(model)
    expected = answers(model=str(file))
    file.unlink()
    assert answers(model=str(engine)) == expected


def test_quantised_while_it_is_built(file: Path, tmp_path: Path) -> None:
    engine = build(file, tmp_path / "engine", "--quantization", "int4", "--quantization-group-size", "32")
    assert answers(model=str(engine)) == answers(model=str(file), quantization="int4", quantization_group_size=32)


def test_tokenizer_template_and_defaults_are_the_files(file: Path, of_file: Path) -> None:
    def said(model: Path) -> Any:
        with LLM(str(model), max_num_seqs=1, max_model_len=96) as llm:
            params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
            (chat,), (text,) = (
                llm.chat([CHAT], params, use_tqdm=False),
                llm.generate(["分頁 is"], params, use_tqdm=False),
            )
            defaults = llm.get_default_sampling_params()
            tokens = [one.prompt_token_ids for one in (chat, text)] + [one.outputs[0].text for one in (chat, text)]
            return tokens, defaults.temperature, defaults.top_k, defaults.repetition_penalty

    assert said(of_file) == said(file)
    with LLM(str(of_file), max_num_seqs=1, max_model_len=96, core_process=True) as llm:
        assert llm.get_default_sampling_params().temperature == 0.5


def test_it_is_verified_and_inspected(of_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(of_file)]) == 0
    assert "the answers to 4 golden prompts" in capsys.readouterr().out
    assert main(["inspect", str(of_file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["name"]: one["format"] for one in found["parameters"]}["0.qkv"].endswith(", was Q8_0")
    assert "Q8_0" in found["dtype"] and sorted(read(of_file).files) == [HEADER, WEIGHTS]
    engine = Path(shutil.copytree(of_file, tmp_path / "engine"))
    data = bytearray((engine / HEADER).read_bytes())
    data[len(data) // 2] ^= 1
    (engine / HEADER).write_bytes(data)
    assert main(["verify", str(engine)]) == 1
    assert f"differs   {HEADER}" in capsys.readouterr().out


def test_another_reader_reads_the_header(file: Path, of_file: Path) -> None:
    """ggml's own package: the same keys, values, names, shapes and types; data are where the file says, and not
    there."""
    padded = of_file.parent / "padded.gguf"
    with GgufParts(of_file / HEADER) as parts:
        size = max(tensor.end for tensor in parts.tensors.values())
    data = (of_file / HEADER).read_bytes()
    padded.write_bytes(data + bytes(size - len(data)))
    ours, theirs = GGUFReader(padded), GGUFReader(file)
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.fields[name].contents() == field.contents(), name
    assert {t.name: (list(t.shape), t.tensor_type) for t in ours.tensors} == {
        t.name: (list(t.shape), t.tensor_type) for t in theirs.tensors
    }
    with pytest.raises(ModelFileError, match="the header of an engine, without its data"):
        LLM(str(of_file / HEADER), max_num_seqs=1, max_model_len=96)


def test_the_values_of_a_set_of_files_go_into_one_header(file: Path, tmp_path: Path) -> None:
    first = tmp_path / "m-00001-of-00001.gguf"
    shutil.copy(file, first)
    engine = build(first, tmp_path / "engine")
    assert [*read(engine).source] == [first.name] and answers(model=str(engine)) == answers(model=str(file))


def test_a_stray_header_decides_nothing(tiny: Path, of_file: Path, tmp_path: Path) -> None:
    engine = build(tiny, tmp_path / "engine")
    shutil.copy(of_file / HEADER, engine / HEADER)
    with pytest.raises(ModelFileError, match=r"files has no model\.header, which lies in the directory"):
        LLM(str(engine), max_num_seqs=1, max_model_len=64)


@pytest.mark.parametrize("core_process", [False, True])
def test_headers_and_manifests_are_read_once(
    file: Path, of_file: Path, monkeypatch: pytest.MonkeyPatch, core_process: bool
) -> None:
    """By each process, of which the monkey sees the one that knows text."""
    seen: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (seen.append(name), function(*args))[1]

    monkeypatch.setattr(gguf_file, "_counts", counted("header", gguf_file._counts))
    monkeypatch.setattr(engine_dir, "digest_of", counted("manifest", engine_dir.digest_of))
    for model, expected in ((file, ["header"]), (of_file, ["header"] if core_process else ["manifest", "header"])):
        seen.clear()
        with LLM(str(model), max_num_seqs=1, max_model_len=96, core_process=core_process):
            assert seen == expected


def test_a_header_that_changed_meanwhile_is_read_again(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    shutil.copy(file, path)
    with GgufParts(path) as known:
        pass
    raw = path.read_bytes()
    old = b"general.sampling.top_k" + struct.pack("<I", 5)
    assert raw.count(old) == 1 or raw.count(b"general.sampling.top_k") == 1
    at = raw.index(b"general.sampling.top_k") + len(b"general.sampling.top_k") + 4
    path.unlink()
    path.write_bytes(raw[:at] + bytes([9]) + raw[at + 1 :])
    with GgufParts(path, known) as again:
        assert (known.values["general.sampling.top_k"], again.values["general.sampling.top_k"]) == (7, 9)


# other instruction sets


def tiled(weight: Any, gated: bool) -> tuple[Any, list[int]]:
    """`[ceil(out / 32)][ceil(in / 32)][2 tiles][16 pairs of inputs][16 outputs][2 inputs]`, value by value, as the
    drawing in native/kernels.h has it; and the row in each column."""
    out, inputs = weight.shape
    width, outputs = (16, out // 2) if gated else (32, out)
    panels, chunks = -(-outputs // width), -(-inputs // 32)
    found, rows = np.zeros((panels, chunks, 2, 16, 16, 2), weight.dtype), []
    for panel in range(panels):
        for column in range(32):
            output = panel * width + column % width
            row = -1 if output >= outputs else output + (outputs if column >= width else 0)
            rows.append(row)
            for k in range(inputs if row >= 0 else 0):
                found[panel, k // 32, column // 16, k % 32 // 2, column % 16, k % 2] = weight[row, k]
    return found.reshape(-1), rows


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("out", "inputs"), [(64, 64), (70, 33), (130, 31), (2, 1), (96, 100)])
def test_a_weight_moves_between_the_layouts(out: int, inputs: int, gated: bool) -> None:
    dice = np.random.default_rng(out)
    weight = dice.standard_normal((out, inputs), np.float32).astype(ml_dtypes.bfloat16)
    bias = dice.standard_normal(out, np.float32)
    ops = CpuOps(1, next(name for name in reversed(instruction_sets()) if name != "amx"))
    state = ops.packed_state((ops.pack_gated if gated else ops.pack_linear)(weight, bias, "bfloat16"))
    moved = relayout(state, "amx_bf16")
    expected, rows = tiled(weight.view(np.uint16), gated)
    assert moved.header.layout == "amx_bf16" and np.array_equal(moved.buffers[0], expected)
    assert list(moved.buffers[1]) == [bias[row] if row >= 0 else 0 for row in rows]
    if "amx" in instruction_sets():
        own = CpuOps(1, "amx")
        packed = own.packed_state((own.pack_gated if gated else own.pack_linear)(weight, bias, "bfloat16"))
        assert bytes(packed.buffers[0]) == bytes(moved.buffers[0]) and bytes(packed.buffers[1]) == bytes(
            moved.buffers[1]
        )
    back = relayout(aligned(moved), "panels")
    assert back.header == state.header
    assert all(bytes(one) == bytes(other) for one, other in zip(back.buffers, state.buffers, strict=True))


def aligned(state: Any) -> Any:
    """The buffers at addresses that a file's have."""
    buffers = []
    for buffer in state.buffers:
        memory = np.zeros(buffer.nbytes + 64, np.uint8)
        start = -memory.ctypes.data % 64
        memory[start : start + buffer.nbytes] = buffer.view(np.uint8)
        buffers.append(memory[start : start + buffer.nbytes])
    return type(state)(state.header, tuple(buffers))


def test_what_has_one_layout_stays_as_it_is() -> None:
    ops = CpuOps(1, "baseline")
    for dtype, quantized in (("float32", False), ("float16", False), ("bfloat16", True)):
        weight: Any = np.eye(64, dtype=np.float32)
        weight = ops.quantize(weight, ops_quant()) if quantized else weight
        state = ops.packed_state(ops.pack_linear(weight, None, dtype))  # type: ignore[arg-type]
        assert relayout(state, "amx_bf16") is state
    header = type(state.header)(**{**msgspec.to_builtins(state.header), "provider": "cuda"})
    with pytest.raises(ValueError, match="provider is 'cuda'"):
        relayout(type(state)(header, state.buffers), "panels")


def ops_quant() -> Any:
    from quire.quant.formats import INT8

    return INT8.linear


@pytest.mark.skipif("amx" in instruction_sets(), reason="this machine runs what another should have built")
def test_an_engine_of_another_machine_is_refused_then_repacked(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There and back through the layout that this machine has not: the bits of the checkpoint."""
    elsewhere = build(tiny, tmp_path / "elsewhere", "--target", "cpu-amx")
    manifest = read(elsewhere)
    assert manifest.instruction_set == "amx" and manifest.golden == []
    assert "golden prompts were not asked" in {one.name: one.reason for one in manifest.decisions}["instruction_set"]
    with pytest.raises(ModelFileError, match=r"layout is amx_bf16, not panels.*quire build ENGINE --repack -o DIR"):
        LLM(str(elsewhere), max_num_seqs=1, max_model_len=64)
    here = build(elsewhere, tmp_path / "here", "--repack")
    assert answers(model=str(here)) == answers(model=str(tiny))
    assert (here / WEIGHTS).read_bytes() == (build(tiny, tmp_path / "direct") / WEIGHTS).read_bytes()
    moved = read(here)
    assert (
        moved.instruction_set == instruction_sets()[-1] and len(moved.golden) == 4 and moved.source == manifest.source
    )
    assert {one.name: one.value for one in moved.decisions}["repacked"] == "cpu amx"
    capsys.readouterr()
    assert main(["verify", str(here)]) == 0 and "4 golden prompts" in capsys.readouterr().out


def test_golden_prompts_of_other_instruction_sets_stay(tiny: Path, tmp_path: Path) -> None:
    portable = build(tiny, tmp_path / "portable", "--quantization", "int8", "--target", "cpu-portable")
    assert read(portable).instruction_set == "baseline"
    both = read(build(portable, tmp_path / "both", "--repack"))
    best = instruction_sets()[-1]
    assert [one.instruction_set for one in both.golden] == ["baseline"] * 4 + [best] * 4
    assert both.quantization == "int8" and both.parameters == read(portable).parameters


BAD: dict[str, tuple[list[str], str]] = {
    "a GPU": (["--target", "cuda-sm90"], "target 'cuda-sm90': kernels for a GPU are compiled and timed on the device"),
    "no target": (["--target", "portable"], "target must be auto or one of cpu-baseline"),
    "no engine": (["--repack"], "repack is for an engine directory; this is none"),
    "another format": (["--repack", "--quantization", "int8"], "quantization goes with a checkpoint: --repack keeps"),
    "another type": (["--repack", "--dtype", "float32"], "dtype goes with a checkpoint: --repack keeps"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_built_is_one_line(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    flags, text = BAD[name]
    assert main(["build", str(tiny), "-o", str(tmp_path / "engine"), *flags]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_stray_file_of_an_engine_is_not_carried_on(of_file: Path, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(of_file, tmp_path / "engine"))
    (engine / "notes.json").write_text("{}")
    again = build(engine, tmp_path / "again", "--repack")
    assert sorted(path.name for path in again.iterdir()) == sorted([MANIFEST, HEADER, WEIGHTS])
    assert isinstance(read(again), Manifest)
