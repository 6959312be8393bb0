"""Calibrated engines: what is lost, what is folded, the budget, the same bits again, and all that is wrong with a
text."""

import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quire.bench.eval_text import PACKAGED, read_text
from quire.build.calibrate import text
from quire.build.calibrate.chosen import ChosenWeights, MatrixPlan
from quire.build.calibrate.links import input_link
from quire.build.calibrate.text import Contexts, read_contexts
from quire.build.calibrate.treat import Treatment, treated_plan
from quire.cli.main import main
from quire.models.decoder import Decoder
from quire.ops.cpu import CpuOps
from quire.ops.select import instruction_sets
from quire.quant.select import select_scheme
from quire.text.tokenizer import Tokenizer
from quire.weights.formats.engine_dir import Manifest
from quire.weights.formats.engine_names import MANIFEST
from quire.weights.load import WeightPlan, load_model, load_weights, open_source, plan_weights, read_model_config
from tests.conftest import PATIENCE_S
from tests.models.paged import PagedModel
from tests.models.test_quantized import mean_kl
from tests.tiny.checkpoints import make_tiny

OPS = CpuOps(2, instruction_sets()[-1])
FACTOR = 50
READERS = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for models this small."""
    monkeypatch.setattr(text, "MAX_TOKENS", 4096)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model"), tokenizer=True)


@pytest.fixture(scope="module")
def outliers(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its inputs have channels that are 50 times the rest, after the norms and in the values; in float32 it is one
    model."""
    directory = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("outliers") / "model"))
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
            tensor[[3, 30]] *= FACTOR
        elif name.endswith(READERS):
            tensor[:, [3, 30]] /= FACTOR
        if name.endswith("up_proj.weight"):
            tensor[[5, 60]] *= FACTOR
        elif name.endswith("down_proj.weight"):
            tensor[:, [5, 60]] /= FACTOR
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def build(model: Path, output: Path, *flags: str) -> Path:
    assert main(["build", str(model), "-o", str(output), "--quiet", *flags]) == 0
    return output


def manifest_of(engine: Path) -> Manifest:
    return msgspec.json.decode((engine / MANIFEST).read_bytes(), type=Manifest)


def logits(directory: Path, quantization: str | None = None) -> Any:
    """After each token of a text that no calibration has seen."""
    tokens = Tokenizer.from_directory(directory).encode(read_text(PACKAGED))[:400]
    model = load_model(directory, OPS, "float32", 512, scheme=select_scheme(quantization, None))
    return PagedModel(model, OPS, num_blocks=40, block_size=16).all_logits(tokens, [400])


@pytest.mark.parametrize(
    ("quantization", "most"), [("int4", 0.6), ("int4_min", 0.6), ("int8", 0.6), ("int8_w8a8", 0.1)]
)
def test_calibrated_loses_less_than_rounding_to_nearest(
    outliers: Path, tmp_path: Path, quantization: str, most: float
) -> None:
    exact = logits(outliers)
    nearest = mean_kl(exact, logits(outliers, quantization))
    engine = build(outliers, tmp_path / "engine", "--quantization", quantization, "--calibrate")
    ours = mean_kl(exact, logits(engine, quantization))
    assert 0 < ours < most * nearest, (ours, nearest)
    reasons = {one.name: one.reason for one in manifest_of(engine).decisions}
    assert "GPTQ loses" in reasons["1.down"] and "rounding to nearest" in reasons["1.down"]
    if quantization == "int8_w8a8":
        assert "folded into 0.mlp_norm" in reasons["0.gate_up"] and "folded into 2.gate_up" in reasons["2.down"]


def planned(directory: Path, quantization: str | None, ops: Any = OPS) -> WeightPlan:
    config = read_model_config(directory)
    return plan_weights(config, open_source(directory, config), ops, "float32", select_scheme(quantization, None))


def computed(plan: WeightPlan, tokens: list[int]) -> Any:
    weights = load_weights(plan.parameters, plan.source, plan.packer)
    model = Decoder(plan.spec, weights, OPS, "float32", 512, 0)
    return PagedModel(model, OPS, num_blocks=40, block_size=16).all_logits(tokens, [len(tokens)])


LINKED = {"llama": 4, "qwen3": 4, "gemma2": 4, "gpt2": 3, "olmo2": 2, "starcoder2": 3}
"""Linear layers of a layer whose inputs' channels can be scaled: not after a norm of the residual alone, nor after
GELU."""


@pytest.mark.parametrize("family", LINKED)
def test_folding_leaves_the_float_function_as_it_is(family: str, tmp_path: Path) -> None:
    """Norms with an offset and with a bias, biases, shared key-value heads among them; scales are powers of two."""
    plan = planned(make_tiny(family, tmp_path / "model"), None)
    generator, matrices = np.random.default_rng(0), {}
    chosen = ChosenWeights(plan, OPS, tmp_path, matrices)
    linear = [name for name, one in plan.parameters.items() if one.kind in ("linear", "gated_linear")]
    matrices |= {name: MatrixPlan(None, "") for name in linear}
    count = 0
    for name in linear:
        link = input_link(plan.spec, name)
        if link is None:
            continue
        count += 1
        inputs = plan.parameters[name].weight.shape[1]
        if link.outputs is None:
            scales = chosen.norm_scales[link.source] = np.exp2(generator.integers(-5, 6, inputs)).astype(np.float32)
        else:
            outputs = np.exp2(generator.integers(-5, 6, plan.parameters[link.source].weight.shape[0])).astype(
                np.float32
            )
            scales = outputs[link.outputs]
            own = np.ones_like(outputs)
            own[link.outputs] = scales
            matrices[link.source].output_scales = own
        matrices[name].input_scales = scales
    assert count == LINKED[family] * plan.spec.num_layers
    tokens = generator.integers(0, 320, 60).tolist()
    exact, folded = computed(plan, tokens), computed(replace(plan, source=chosen), tokens)
    assert np.abs(folded - exact).max() <= 2e-5 * np.abs(exact).max()


@pytest.mark.parametrize("bits", [4.75, 5.25, 7.0])
def test_the_budget_is_kept_and_spent_where_it_helps(tiny: Path, tmp_path: Path, bits: float) -> None:
    flags = ["--quantization", "int4", "--calibrate", "--bits", str(bits)]
    engine = build(tiny, tmp_path / "engine", *flags)
    manifest = manifest_of(engine)
    headers = {name: one.header for name, one in manifest.parameters.items() if one.header and name[0].isdigit()}
    used = weights = 0.0
    for header in headers.values():
        assert header is not None
        number, size = header.out_features * header.in_features, header.group_size
        groups = header.out_features * math.ceil(header.in_features / size)
        used += groups * (size / 2 + 4) if header.format == "int4" else number + 4 * header.out_features
        weights += number
    assert bits - 0.4 < 8 * used / weights <= bits
    assert float(next(one.value for one in manifest.decisions if one.name == "bits")) == pytest.approx(
        8 * used / weights, abs=1e-3
    )
    assert "KL of" in next(one.reason for one in manifest.decisions if one.name == "2.down")
    assert main(["verify", str(engine)]) == 0


def test_more_bits_lose_less(tiny: Path, tmp_path: Path) -> None:
    exact, found = logits(tiny), []
    for bits in ("4.75", "5.5", "7.5"):
        engine = build(tiny, tmp_path / bits, "--quantization", "int4", "--calibrate", "--bits", bits)
        found.append(mean_kl(exact, logits(engine, "int4")))
    assert found[0] > found[1] > found[2] > 0, found


def contexts(directory: Path, count: int = 8) -> Contexts:
    found = read_contexts(text.PACKAGED, Tokenizer.from_directory(directory).encode, 512)
    return Contexts(found.token_ids[:count], found.name)


def test_the_bits_are_the_same_again_whatever_the_threads(outliers: Path, tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    for threads in (1, 2, 5):
        ops = CpuOps(threads, instruction_sets()[-1])
        plan = planned(outliers, "int4", ops)
        treatment = Treatment(contexts(outliers), bits=5.0)
        treated = treated_plan(plan, ops, treatment, tmp_path / str(threads))
        matrices: dict[str, Any] = {}
        for name, one in treated.parameters.items():
            weight = (
                treated.source.vector(one.weight) if len(one.weight.shape) == 1 else treated.source.matrix(one.weight)
            )
            parts = (weight.values, weight.scales) if hasattr(weight, "scales") else (np.asarray(weight),)
            matrices[name] = [part.tobytes() for part in parts]
        found.append({**matrices, "decisions": treated.decisions})
    assert found[0] == found[1] == found[2]


def test_what_is_kept_stays_and_is_as_the_checkpoint_has_it(tiny: Path, tmp_path: Path) -> None:
    for number, more in enumerate(([], ["--calibrate"])):
        flags = [
            "--quantization",
            "int4",
            "--dtype",
            "bfloat16",
            "--keep",
            "*.o_proj",
            "model.layers.1.mlp.up_proj.weight",
        ]
        engine = build(tiny, tmp_path / str(number), *flags, *more)
        manifest = manifest_of(engine)
        formats = {name: one.header.format for name, one in manifest.parameters.items() if one.header}
        kept = {name for name, format in formats.items() if format == "bfloat16"}
        assert kept == {"0.o", "1.o", "2.o", "1.gate_up"} and set(formats.values()) == {"bfloat16", "int4", "int8"}
        reasons = {one.name: one.reason for one in manifest.decisions}
        assert reasons["0.o"] == "kept: *.o_proj" and reasons["1.gate_up"] == "kept: model.layers.1.mlp.up_proj.weight"
        assert main(["verify", str(engine)]) == 0
    engine = build(tiny, tmp_path / "all", "--quantization", "int4", "--dtype", "bfloat16", "--keep", "*")
    plain = build(tiny, tmp_path / "plain", "--dtype", "bfloat16")
    assert (engine / "weights.quire").read_bytes() == (plain / "weights.quire").read_bytes()
    sizes = [load_model(one, OPS, "bfloat16", 64, scheme=scheme).weight_bytes
             for one, scheme in ((engine, select_scheme("int4", None)), (plain, None))]  # fmt: skip
    assert sizes[0] == sizes[1]


BAD_FLAGS = [
    (["--calibrate"], "calibrate is for weights that are quantised"),
    (["--keep", "*"], "keep is for weights that are quantised"),
    (["--bits", "5"], "bits is for weights that are quantised"),
    (["--quantization", "int4", "--bits", "5"], "bits are shared by measured loss"),
    (["--quantization", "int8", "--bits", "5", "--calibrate"], "bits are shared by measured loss"),
    (["--quantization", "int4", "--bits", "nan", "--calibrate"], "bits must be above 0 and at most 16, got nan"),
    (["--quantization", "int4", "--bits", "0", "--calibrate"], "bits must be above 0 and at most 16, got 0"),
    (["--quantization", "int4", "--bits", "3", "--calibrate"], "bits is 3; the smallest formats take 4.6"),
    (["--quantization", "int4", "--keep", "lm_haed"], "keep: no matrix of the model matches 'lm_haed'"),
]


@pytest.mark.parametrize(("flags", "words"), BAD_FLAGS)
def test_flags_that_cannot_be(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(["build", str(tiny), "-o", str(tmp_path / "engine"), *flags]) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


BAD_TEXTS: dict[str, tuple[bytes | None, str]] = {
    "none": (None, "calibrate: none: no such file"),
    "empty": (b"", "calibrate: empty has 0 tokens; at least 1,024 are needed"),
    "short": (b"a few words", "calibrate: short has "),
    "latin": (b"abc\xe9 " * 5000, "calibrate: latin is not UTF-8 at byte 3"),
    "binary": (bytes(range(256)) * 40, "calibrate: binary is not UTF-8 at byte 128"),
    "large": (b"x" * (text.MAX_TEXT_BYTES + 1), "calibrate: large has more than 8,388,608 bytes"),
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_a_text_that_cannot_be_used_is_refused_by_name(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    data, words = BAD_TEXTS[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    begun_s, flags = time.monotonic(), ["--quantization", "int4", "--calibrate", str(tmp_path / name)]
    assert main(["build", str(tiny), "-o", str(tmp_path / "engine"), *flags]) == 2
    printed = capsys.readouterr().err
    assert words in printed and str(tmp_path) not in printed and time.monotonic() - begun_s < PATIENCE_S
    assert not (tmp_path / "engine").exists() and not (tmp_path / ".engine.building").exists()


def test_a_model_without_a_tokenizer(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = Path(shutil.copytree(tiny, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    assert main(["build", str(bare), "-o", str(tmp_path / "engine"), "--quantization", "int4", "--calibrate"]) == 2
    assert "calibrate: the model has no tokenizer to read a text with" in capsys.readouterr().err


def test_a_weight_that_is_not_finite_is_named(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = np.inf
    save_file(tensors, model / "model.safetensors")
    assert main(["build", str(model), "-o", str(tmp_path / "engine"), "--quantization", "int4", "--calibrate"]) == 1
    assert "layers.1.mlp.down_proj.weight cannot be calibrated" in capsys.readouterr().err
    assert not (tmp_path / "engine").exists() and not (tmp_path / ".engine.building").exists()


SLOW = """
import sys, time
import numpy
from quire.cli.main import main

save = numpy.save

def save_and_wait(*args, **settings):
    save(*args, **settings)
    time.sleep(3600)  # the signal comes in it, however busy the machine

numpy.save = save_and_wait
sys.exit(main(sys.argv[1:]))
"""
"""`quire` that is never done with its first matrix."""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interruption_leaves_nothing_half_made(tiny: Path, tmp_path: Path, how: signal.Signals) -> None:
    output, place = tmp_path / "engine", tmp_path / ".engine.building"
    command = [sys.executable, "-c", SLOW, "build", str(tiny), "-o", str(output), "--quiet"]
    with subprocess.Popen([*command, "--quantization", "int4", "--calibrate"], stderr=subprocess.DEVNULL) as process:
        deadline_s = time.monotonic() + PATIENCE_S
        while not list(place.glob("calibrated/*.npy")) and process.poll() is None:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        process.send_signal(how)
        process.wait()
    assert process.returncode != 0 and not output.exists() and place.exists() == (how == signal.SIGKILL)
    build(tiny, output, "--quantization", "int4", "--calibrate")
    assert not place.exists() and not (output / "calibrated").exists() and main(["verify", str(output)]) == 0


def test_contexts_are_spread_over_a_long_text(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("x" * 200_000)
    found = read_contexts(path, lambda text: list(range(len(text))), 512)
    starts = [context[0] for context in found.token_ids]
    assert len(starts) == 8 and starts[0] == 0 and starts[-1] > 170_000 and len(set(np.diff(starts))) <= 2
    assert {len(context) for context in found.token_ids} == {512} and found.num_tokens == text.MAX_TOKENS
    assert [len(one) for one in read_contexts(path, lambda _: [0] * 1100, 64).token_ids] == [64] * 17


def test_the_packaged_text_is_not_the_one_that_loss_is_measured_on() -> None:
    def runs(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[at : at + 8]) for at in range(len(words) - 7)}

    packaged = runs(text.PACKAGED.read_text(encoding="utf-8").split())
    assert packaged and not packaged & runs(read_text(PACKAGED).split())
