"""Engine directories: the bits of the checkpoint they were built from, mapped; and all that is wrong with one."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from quire import LLM, SamplingParams
from quire.build import builder
from quire.cli.main import main
from quire.config import QUANTIZATIONS
from quire.errors import ConfigurationError, ModelFileError
from quire.ops.select import instruction_sets
from quire.weights.formats.engine_dir import Manifest
from quire.weights.formats.engine_names import MANIFEST, WEIGHTS, is_engine
from tests.conftest import PATIENCE_S
from tests.tiny.checkpoints import make_tiny

PARAMS = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2, detokenize=False)
PROMPTS = [[1, 2, 3, 4], [7, 8, 9, 10, 11, 12, 13]]


def answers(**arguments: Any) -> list[Any]:
    with LLM(max_num_seqs=2, max_model_len=64, **arguments) as llm:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], PARAMS, use_tqdm=False)
        return [(list(one.outputs[0].token_ids), one.outputs[0].logprobs) for one in outputs]


def build(model: Path, output: Path, *flags: str) -> Path:
    assert main(["build", str(model), "-o", str(output), "--quiet", *flags]) == 0
    return output


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model"), tokenizer=True)


@pytest.fixture(scope="module")
def built(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tiny, tmp_path_factory.mktemp("engine") / "int4", "--quantization", "int4")


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    """One of its own, to damage."""
    return Path(shutil.copytree(built, tmp_path / "engine"))


@pytest.mark.parametrize("quantization", [None, *QUANTIZATIONS])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "olmo2"])
def test_an_engine_gives_the_bits_of_its_checkpoint(tmp_path: Path, family: str, quantization: str | None) -> None:
    """Norms with an offset, learned positions, biases, tied and own heads among them."""
    model = make_tiny(family, tmp_path / "model")
    flags = [] if quantization is None else ["--quantization", quantization]
    engine = build(model, tmp_path / "engine", *flags)
    assert answers(model=str(engine)) == answers(model=str(model), quantization=quantization)


def test_a_head_that_differs_though_tied_stays(tmp_path: Path) -> None:
    model = make_tiny("llama", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert answers(model=str(build(model, tmp_path / "engine"))) == answers(model=str(model))


def test_a_core_in_a_process_of_its_own_maps_it_too(built: Path) -> None:
    assert answers(model=str(built), core_process=True) == answers(model=str(built))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc")
def test_weights_are_mapped_and_never_copied_or_written(built: Path) -> None:
    with LLM(model=str(built), max_num_seqs=1, max_model_len=64) as llm:
        llm.generate([{"prompt_token_ids": PROMPTS[0]}], PARAMS, use_tqdm=False)
        text = Path("/proc/self/smaps").read_text()
    mapped = text[text.index(str(built / WEIGHTS)) :].split("VmFlags")[0]
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in mapped.splitlines()[1:] if line.endswith("kB")}
    assert kilobytes["Rss"] > 0 and kilobytes["Private_Dirty"] == kilobytes["Shared_Dirty"] == 0


def test_what_was_built_decides_and_says_so(built: Path) -> None:
    with LLM(model=str(built), max_num_seqs=1, max_model_len=64) as llm:
        found = {one.name: one for one in llm.decisions}
    assert "mapped" in found["engine"].reason and found["quantization"].value == "int4"
    assert found["dtype"].reason == "as built"
    for name, value in {"quantization": "int8", "dtype": "bfloat16", "quantization_group_size": 32}.items():
        more = {"quantization": "int4"} if name == "quantization_group_size" else {}
        with pytest.raises(ConfigurationError, match=f"{name} is {value}; this engine was built with") as raised:
            LLM(model=str(built), **{name: value}, **more)
        assert raised.value.field == name


@pytest.mark.parametrize(("quantization", "size"), [("int4_min", 32), ("int8", 64), ("int8", None), ("fp8", None)])
def test_the_size_of_groups_is_as_built(tiny: Path, tmp_path: Path, quantization: str, size: int | None) -> None:
    flags = [] if size is None else ["--quantization-group-size", str(size)]
    engine = build(tiny, tmp_path / "engine", "--quantization", quantization, *flags)
    with LLM(model=str(engine), max_model_len=64) as llm:
        said = next(one.reason for one in llm.decisions if one.name == "quantization")
    groups = f"groups of {128 if quantization == 'fp8' else size}"
    assert groups in said if groups != "groups of None" else "groups" not in said
    with pytest.raises(ConfigurationError) as raised:
        LLM(model=str(engine), quantization=quantization, quantization_group_size=128)
    assert raised.value.field == "quantization_group_size"


def test_verify_asks_again_and_sees_every_changed_byte(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(engine)]) == 0
    assert "the answers to 4 golden prompts" in capsys.readouterr().out
    for name in (WEIGHTS, "tokenizer.json", "config.json"):
        data = (engine / name).read_bytes()
        changed = bytearray(data)
        changed[len(data) // 2] ^= 1
        (engine / name).write_bytes(changed)
        assert main(["verify", str(engine)]) == 1
        assert f"differs   {name}" in capsys.readouterr().out
        (engine / name).write_bytes(data)
    assert main(["verify", str(engine)]) == 0


def test_verify_sees_another_answer(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read(engine)
    golden = manifest.golden[0]
    other = msgspec.structs.replace(golden, token_ids=[golden.token_ids[0] ^ 1, *golden.token_ids[1:]])
    builder.write_manifest(msgspec.structs.replace(manifest, golden=[other, *manifest.golden[1:]]), engine)
    assert main(["verify", str(engine)]) == 1
    assert f"the golden prompt {golden.prompt_token_ids[:12]}" in capsys.readouterr().out


def read(engine: Path) -> Manifest:
    return msgspec.json.decode((engine / MANIFEST).read_bytes(), type=Manifest)


def edit(**changes: Any) -> Callable[[Path], None]:
    """The manifest by hand, digest and all."""

    def damage(engine: Path) -> None:
        builder.write_manifest(msgspec.structs.replace(read(engine), **changes), engine)

    return damage


def raw(**changes: Any) -> Callable[[Path], None]:
    """The manifest by hand, without its digest."""

    def damage(engine: Path) -> None:
        content = json.loads((engine / MANIFEST).read_text())
        (engine / MANIFEST).write_text(json.dumps({**content, **changes}))

    return damage


def link_out(engine: Path) -> None:
    moved = engine.parent / "tokenizer.json"
    (engine / "tokenizer.json").rename(moved)
    (engine / "tokenizer.json").symlink_to(moved)


def outside(engine: Path) -> None:
    manifest = read(engine)
    stored = msgspec.structs.replace(manifest.parameters["0.o"], buffers=[(64, 2**40)])
    edit(parameters={**manifest.parameters, "0.o": stored})(engine)


def lacking(engine: Path) -> None:
    parameters = read(engine).parameters
    edit(parameters={name: stored for name, stored in parameters.items() if name != "1.down"})(engine)


def swapped(engine: Path) -> None:
    parameters = read(engine).parameters
    edit(parameters={**parameters, "0.o": parameters["0.down"]})(engine)


def gated(engine: Path) -> None:
    parameters = read(engine).parameters
    header = msgspec.to_builtins(parameters["0.o"].header)
    stored = msgspec.structs.replace(
        parameters["0.o"], header=msgspec.convert({**header, "gated": True}, type(parameters["0.o"].header))
    )
    edit(parameters={**parameters, "0.o": stored})(engine)


def hollow(engine: Path) -> None:
    (engine / WEIGHTS).write_bytes(b"")
    files = read(engine).files
    edit(files={**files, WEIGHTS: msgspec.structs.replace(files[WEIGHTS], size=0)}, parameters={})(engine)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated weights": (lambda engine: os.truncate(engine / WEIGHTS, 1000), "weights.quire has 1,000 bytes"),
    "no weights": (lambda engine: (engine / WEIGHTS).unlink(), "weights.quire: no such file"),
    "no tokenizer": (lambda engine: (engine / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
    "a link out of it": (link_out, "tokenizer.json is not a file of the engine's own directory"),
    "a newer schema": (raw(schema=2), "schema is 2; this version of Quire reads 1"),
    "edited": (raw(model="another"), "digest is not that of its content"),
    "another type": (raw(quantization=4), "engine.json: .*quantization"),
    "an unknown field": (raw(more=1), "engine.json: .*more"),
    "no JSON": (lambda engine: (engine / MANIFEST).write_text("{"), "engine.json"),
    "empty": (lambda engine: (engine / MANIFEST).write_text(""), "engine.json"),
    "a buffer outside": (outside, "0.o: buffer 64, 1099511627776 lies outside"),
    "a parameter is missing": (lacking, "layers.1.mlp.down_proj.weight is not packed"),
    "another parameter's": (swapped, "layers.0.self_attn.o_proj.weight cannot be mapped: .*out_features, in_features"),
    "gated, and it is not": (gated, "layers.0.self_attn.o_proj.weight cannot be mapped: .*gated"),
    "nothing in it": (hollow, "weights.quire is empty"),
    "never finished, and no text": (
        lambda engine: (engine / ".building").write_bytes(b"\xff"),
        "whose building never ended",
    ),
    "never finished": (lambda engine: (engine / ".building").write_text("1"), "whose building never ended"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_engine_is_refused_by_what_is_wrong(engine: Path, name: str) -> None:
    damage, text = DAMAGES[name]
    damage(engine)
    with pytest.raises(ModelFileError, match=text):
        LLM(model=str(engine), max_num_seqs=1, max_model_len=64)


def test_another_layout_is_refused_and_a_shared_one_runs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All instruction sets have one layout for quantised weights; their answers are their own."""
    engine = build(tiny, tmp_path / "baseline", "--quantization", "int8", "--target", "cpu-baseline")
    assert read(engine).instruction_set == "baseline"
    monkeypatch.setenv("QUIRE_ISA", "baseline")
    expected = answers(model=str(tiny), quantization="int8")
    assert answers(model=str(engine)) == expected and main(["verify", str(engine)]) == 0
    assert "4 golden prompts (baseline)" in capsys.readouterr().out
    best = instruction_sets()[-1]
    monkeypatch.setenv("QUIRE_ISA", best)
    assert answers(model=str(engine)) == answers(model=str(tiny), quantization="int8")
    assert main(["verify", str(engine)]) == 0
    assert f"recorded on baseline, this is {best}" in capsys.readouterr().out
    manifest = read(engine)
    stored = manifest.parameters["0.o"]
    assert stored.header is not None
    header = type(stored.header)(**{**msgspec.to_builtins(stored.header), "layout": "amx_bf16"})
    other = {**manifest.parameters, "0.o": msgspec.structs.replace(stored, header=header)}
    edit(parameters=other)(engine)
    with pytest.raises(ModelFileError, match=r"o_proj.weight cannot be mapped: .*layout"):
        LLM(model=str(engine), max_num_seqs=1, max_model_len=64)


BAD = [
    (["--target", "cpu-z80"], "target must be auto or one of cpu-baseline"),
    (["--quantization-group-size", "32"], "quantization_group_size is for quantization 'int4'"),
    (["--quantization", "fp8", "--quantization-group-size", "32"], "quantization_group_size is for"),
    (["--kv-cache-dtype", "int8"], "kv_cache_dtype is no part of an engine: quire serve"),
    (["--tensor-parallel-size", "2"], "tensor_parallel_size must be 1 in this version, got 2"),
]


@pytest.mark.parametrize(("flags", "text"), BAD)
def test_bad_flags_are_refused_before_anything_is_written(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], text: str
) -> None:
    assert main(["build", str(tiny), "-o", str(tmp_path / "engine"), *flags]) == 2
    assert text in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_place_that_is_taken(tiny: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "engine"
    output.write_text("mine")
    assert main(["build", str(tiny), "-o", str(output)]) == 2
    assert (
        "output: engine is there already: remove it, or name another place" in capsys.readouterr().err
        and output.read_text() == "mine"
    )
    assert main(["build", str(built), "-o", str(tmp_path / "again")]) == 2
    assert "model is an engine already: --repack packs it" in capsys.readouterr().err
    place = tmp_path / ".busy.building"
    place.mkdir()
    lock = os.open(place, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert main(["build", str(tiny), "-o", str(tmp_path / "busy")]) == 2
    assert "another build is writing busy" in capsys.readouterr().err
    os.close(lock)
    assert main(["build", str(tiny), "-o", str(tmp_path / "busy"), "--quiet"]) == 0


def test_a_full_disk_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(builder._Writer, "_write", full)
        assert main(["build", str(tiny), "-o", str(tmp_path / "engine")]) == 2
    assert "output: the engine cannot be written: no space left on device" in capsys.readouterr().err
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert main(["build", str(tiny), "-o", str(tmp_path / "engine")]) == 2
    assert "MiB are free there" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("sign", [".building", WEIGHTS, "tokenizer.json", MANIFEST])
def test_killed_at_any_moment_it_leaves_nothing_that_is_taken_for_an_engine(
    tiny: Path, tmp_path: Path, sign: str, delay_s: float
) -> None:
    """So long after a file is there."""
    output, place = tmp_path / "engine", tmp_path / ".engine.building"
    command = [sys.executable, "-m", "quire", "build", str(tiny), "-o", str(output), "--quiet"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        until(lambda: (place / sign).exists() or process.poll() is not None)
        time.sleep(delay_s)
        process.kill()
    if output.exists():
        assert main(["verify", str(output)]) == 0
        shutil.rmtree(output)
    if place.exists():
        with pytest.raises(ModelFileError):
            LLM(model=str(place), max_num_seqs=1, max_model_len=64)
    build(tiny, output)
    assert not place.exists() and main(["verify", str(output)]) == 0


def until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


PEAK = """
import resource, sys
from pathlib import Path
from quire.build.builder import Recipe, Target, build_engine
from quire.ops.select import select_ops
from quire.quant.select import select_scheme
ops, decisions = select_ops("cpu", 2)
directory, output = map(Path, sys.argv[1:])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
recipe = Recipe("large", directory, output, "0", quantization="int4", scheme=select_scheme("int4", None))
build_engine(recipe, Target(ops, "here", decisions), lambda _: [])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    """A checkpoint of 190 MB, whose largest parameter has 8: three times that, and 32 MB for all else."""
    hidden, inner, layers, vocabulary = 512, 2048, 24, 1024
    model = tmp_path / "model"
    model.mkdir()
    dice = np.random.default_rng(0)

    def values(*shape: int) -> Any:
        return dice.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    tensors = {"model.embed_tokens.weight": values(vocabulary, hidden), "model.norm.weight": values(hidden)}
    for i in range(layers):
        shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, hidden),
                  "self_attn.v_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden),
                  "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
                  "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}  # fmt: skip
        tensors |= {f"model.layers.{i}.{name}.weight": values(*shape) for name, shape in shapes.items()}
    save_file(tensors, model / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "num_hidden_layers": layers, "intermediate_size": inner, "num_attention_heads": 8, "num_key_value_heads": 8,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "rope_theta": 10000.0,
        "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", PEAK, str(model), str(tmp_path / "engine")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    largest = 2 * inner * hidden * 4
    assert sum(tensor.nbytes for tensor in tensors.values()) > 20 * largest
    assert int(done.stdout) < 3 * largest + 2**25


def test_every_buffer_begins_where_a_register_may_read(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        writer = builder._Writer(file)
        spans = [writer.add(np.frombuffer(data, np.uint8)) for data in (b"abc", b"", b"d" * 65, b"e")]
    assert spans == [(0, 3), (64, 0), (64, 65), (192, 1)]
    content = (tmp_path / "file").read_bytes()
    assert content == b"abc" + bytes(61) + b"d" * 65 + bytes(63) + b"e"
    assert writer.size == len(content) and writer.sha256 == hashlib.sha256(content).hexdigest()


def test_inspect_says_what_is_inside(tiny: Path, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(built), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quantization"] == "int4, groups of 64" and found["layers"] == 3
    formats = {one["name"]: one["format"] for one in found["parameters"]}
    assert formats["0.qkv"].startswith("int4 integers g") and formats["0.mlp_norm"] == "F32"
    weights = (built / WEIGHTS).stat().st_size
    assert 0.9 * weights < sum(one["num_bytes"] for one in found["parameters"]) <= weights
    assert main(["inspect", "quire-demo"]) == 0, "the embedded model by its name, as for build and plan"
    assert main(["inspect", str(tiny)]) == 0
    text = capsys.readouterr().out
    assert "0.gate_up" in text and "F32" in text
    assert main(["inspect", str(tiny / "nothing")]) == 1


def test_what_is_no_engine(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny)]) == 2
    assert "it has no engine.json" in capsys.readouterr().err
    assert not is_engine(tiny)
