"""Quantised checkpoints: the bits of what they stand for, whether they are unpacked or kept; and what is said of it."""

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.cli.main import main
from quire.compose.core import compose_core
from quire.config import EngineArgs
from quire.errors import ModelFileError
from quire.models.parameters import Concatenated, decoder_parameters
from quire.ops.cpu import CpuOps
from quire.ops.reference import ReferenceOps
from quire.ops.select import instruction_sets
from quire.ops.types import BLOCK_FORMATS, QuantizedWeight
from quire.outputs import Decision
from quire.quant.select import select_scheme
from quire.quant.types import quantized_bytes
from quire.weights.formats.quantized import layouts
from quire.weights.formats.quantized.config import read_quantization
from quire.weights.formats.quantized.source import QuantizedWeights, foreseen
from quire.weights.formats.safetensors import CheckpointWeights
from quire.weights.load import load_model, read_model_config
from quire.weights.source import Target
from tests.models.paged import PagedModel, Row
from tests.weights.quantized_files import (
    STATIC_INT8,
    TOKEN_FP8,
    TOKEN_INT8,
    Awq,
    Compressed,
    Format,
    Fp8,
    Gptq,
    make_quantized,
)

TOKENS = [7, 100, 31, 250, 3, 77, 12, 9]

INT8 = Compressed("int-quantized", 8, "channel", None)
FORMATS: dict[str, Format] = {
    "gptq": Gptq(),
    "gptq v2, asymmetric": Gptq(symmetric=False, version=2),
    "gptq v1, asymmetric": Gptq(symmetric=False, group_size=16),
    "gptq act-order": Gptq(act_order=True),
    "gptq rows": Gptq(group_size=-1),
    "gptq 8 bits": Gptq(8, -1),
    "gptq 8 bits in groups": Gptq(8, 32, symmetric=False),
    "gptq 3 bits": Gptq(3, 32, symmetric=False),
    "gptq 2 bits": Gptq(2, 32),
    "awq": Awq(),
    "awq symmetric": Awq(64, symmetric=True),
    "W4A16": Compressed(),
    "W4A16 asymmetric": Compressed(symmetric=False),
    "W4A16 rows": Compressed(strategy="channel", group_size=None, symmetric=False),
    "W8A16": Compressed(bits=8, strategy="channel", group_size=None),
    "W8A8": Compressed(**{**INT8.__dict__, "activations": TOKEN_INT8}),
    "W8A8 static": Compressed(**{**INT8.__dict__, "activations": STATIC_INT8, "strategy": "tensor"}),
    "W8A8 asymmetric": Compressed("int-quantized", 8, "channel", None, symmetric=False),
    "naive 4 bits": Compressed("naive-quantized", 4, "group", 32),
    "fp8 compressed": Compressed("float-quantized", 8, "channel", None, kind="float", activations=TOKEN_FP8),
    "fp8 compressed blocks": Compressed("float-quantized", 8, "block", None, kind="float", block=(32, 64)),
    "fp8 blocks": Fp8(),
    "fp8 static": Fp8(block=None, static=True),
    "fp8 rows": Fp8("fbgemm_fp8", None),
    "fp8 modelopt": Fp8("modelopt", None),
}


class WithoutBlocks(ReferenceOps):
    """What a device has that lacks the formats of blocks."""

    formats = tuple(name for name in ReferenceOps.formats if name not in BLOCK_FORMATS)


KEPT = {
    "gptq": "int4",
    "gptq rows": "int4",
    "gptq 2 bits": "int4",
    "gptq 8 bits": "int8",
    "gptq v2, asymmetric": "int4_min",
    "gptq v1, asymmetric": "int4_min",
    "gptq 8 bits in groups": "int8_min",
    "gptq 3 bits": "int4_min",
    "awq": "int4_min",
    "W4A16 asymmetric": "int4_min",
    "W4A16 rows": "int4_min",
    "W8A8 asymmetric": "int8_min",
    "awq symmetric": "int4",
    "W4A16": "int4",
    "W8A16": "int8",
    "W8A8": "int8_w8a8",
    "W8A8 static": "int8",
    "naive 4 bits": "int4",
    "fp8 compressed": "fp8",
    "fp8 rows": "fp8",
    "fp8 compressed blocks": "fp8_groups",
    "fp8 blocks": "fp8_groups",
    "fp8 static": "fp8_groups",
    "fp8 modelopt": "fp8_groups",
}
"""The format of the engine that holds them exactly. All others are unpacked."""


def logits_of(directory: Path, ops: Any, dtype: str = "float32") -> Any:
    model = load_model(directory, ops, dtype)
    return PagedModel(model, ops, num_blocks=4, block_size=16).step([Row(list(TOKENS))], [len(TOKENS)])[0]


@pytest.mark.parametrize("name", FORMATS)
def test_the_logits_are_those_of_the_unpacked_weights(name: str, tmp_path: Path) -> None:
    quantized, plain = make_quantized("llama", FORMATS[name], tmp_path)
    ops = CpuOps(2, instruction_sets()[-1])
    expected = logits_of(plain, ops)
    assert np.array_equal(logits_of(quantized, ops), expected)
    assert np.isfinite(expected).all() and np.ptp(expected) > 1


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3", "gemma2", "gemma3-vision", "olmo2", "starcoder2", "gpt2"])
@pytest.mark.parametrize("format", [Gptq(act_order=True), Awq(), Fp8()], ids=["gptq", "awq", "fp8"])
def test_every_family_has_fused_parameters_in_its_order(format: Format, family: str, tmp_path: Path) -> None:
    if family == "gpt2" and isinstance(format, Fp8):
        pytest.skip("no tool writes it")
    quantized, plain = make_quantized(family, format, tmp_path)
    ops = ReferenceOps(np)
    assert np.array_equal(logits_of(quantized, ops), logits_of(plain, ops))


def parameter(*names: str, shape: tuple[int, int] = (64, 64)) -> Concatenated:
    return Concatenated(tuple((f"model.layers.0.{name}.weight", shape) for name in names))


GATE_UP = parameter("mlp.gate_proj", "mlp.up_proj", shape=(96, 64))
DOWN = parameter("mlp.down_proj", shape=(64, 96))


def source_of(checkpoint: CheckpointWeights, directory: Path, **target: Any) -> QuantizedWeights:
    quantization = read_model_config(directory).quantization
    assert quantization is not None
    defaults = {"dtype": "bfloat16", "formats": ReferenceOps.formats, "unpack": None}
    return QuantizedWeights(checkpoint, quantization, Target(**(defaults | target)))


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_holds_exactly_stays_and_all_else_is_unpacked(name: str, tmp_path: Path) -> None:
    quantized, plain = make_quantized("llama", FORMATS[name], tmp_path)
    with CheckpointWeights(quantized) as checkpoint, CheckpointWeights(plain) as unpacked:
        source = source_of(checkpoint, quantized)
        for array in (GATE_UP, DOWN):
            found: Any = source.matrix(array)
            expected = unpacked.read(array)
            if name in KEPT:
                assert isinstance(found, QuantizedWeight) and found.format == KEPT[name]
                scales, minima = (
                    0 if one is None else np.repeat(one, found.group_size, axis=1)[:, : expected.shape[1]]
                    for one in (found.scales, found.minima)
                )
                assert np.array_equal(found.values.astype(np.float32) * scales + minima, expected)
            else:
                assert np.array_equal(found.astype(np.float32), expected.astype(found.dtype).astype(np.float32))


def decisions_of(directory: Path, ops: Any, dtype: str = "bfloat16", quantization: str | None = None) -> Any:
    seen: list[Decision] = []
    scheme = select_scheme(quantization, None)
    model = load_model(directory, ops, dtype, scheme=scheme, report=seen.extend)
    return model, {decision.name: decision for decision in seen}


def test_what_stays_is_small_and_said(tmp_path: Path) -> None:
    """21 linear layers of 3 layers; the tables and norms stay as they are."""
    quantized, plain = make_quantized("llama", FORMATS["W4A16"], tmp_path)
    ops = CpuOps(2, instruction_sets()[-1])
    model, said = decisions_of(quantized, ops)
    whole = load_model(plain, ops, "bfloat16")
    elements = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert whole.weight_bytes - model.weight_bytes == 2 * elements - elements * 5 // 8
    assert said["checkpoint"].value == "compressed-tensors"
    assert "int4, groups of 32: of 21 matrices 21 stay int4 exactly" in said["checkpoint"].reason
    assert "activations" not in said


def test_what_is_unpacked_is_said_with_its_reason(tmp_path: Path) -> None:
    _, said = decisions_of(make_quantized("llama", FORMATS["awq"], tmp_path)[0], WithoutBlocks(np))
    assert "of 21 matrices 21 are unpacked to bfloat16 (zero points: 21)" in said["checkpoint"].reason


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("fp8 compressed", 128),
        ("fp8 compressed blocks", 64),
        ("fp8 blocks", 32),
        ("fp8 static", 128),
        ("fp8 rows", 128),
    ],
)
def test_fp8_stays_fp8_on_the_cpu(name: str, group: int, tmp_path: Path) -> None:
    """A byte a weight and a float32 scale for each group of its inputs; `quire plan` foresees it."""
    quantized, plain = make_quantized("llama", FORMATS[name], tmp_path)
    ops = CpuOps(2, instruction_sets()[-1])
    model, said = decisions_of(quantized, ops)
    groups = {64: -(-64 // group), 96: -(-96 // group)}
    weights = [(64, 64)] * 2 + [(32, 64)] * 2 + [(96, 64)] * 2 + [(64, 96)]
    taken = 3 * sum(out * (inputs + 4 * groups[inputs]) for out, inputs in weights)
    elements = 3 * sum(out * inputs for out, inputs in weights)
    assert load_model(plain, ops, "bfloat16").weight_bytes - model.weight_bytes == 2 * elements - taken
    assert "of 21 matrices 21 stay fp8_groups exactly" in said["checkpoint"].reason
    stated = read_model_config(quantized)
    assert stated.quantization is not None
    seen = 0
    for one in decoder_parameters(stated.spec, stated.names).values():
        spec = foreseen(stated.quantization, ops.formats, one)
        seen += 0 if spec is None else quantized_bytes(spec, *one.weight.shape)
    assert seen == taken
    assert np.abs(logits_of(quantized, ops, "auto") - logits_of(plain, ops)).max() < 1e-3


def test_zero_points_stay_in_memory_of_their_size(tmp_path: Path) -> None:
    """4 bits a weight, and a scale and a minimum in float32 for each 32."""
    quantized, plain = make_quantized("llama", FORMATS["awq"], tmp_path)
    ops = CpuOps(2, instruction_sets()[-1])
    model, said = decisions_of(quantized, ops)
    elements = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert load_model(plain, ops, "bfloat16").weight_bytes - model.weight_bytes == 2 * elements - elements * 6 // 8
    assert "21 stay int4_min exactly" in said["checkpoint"].reason


def test_a_minimum_that_float32_does_not_hold_unpacks_its_matrix(tmp_path: Path) -> None:
    """A scale of 24 bits times a zero point of 3 takes 27."""

    def fine(config: Any, tensors: Any) -> None:
        name = "model.layers.1.self_attn.k_proj.weight_scale"
        tensors[name] = tensors[name].to(torch.float32)
        tensors[name][3, 1] = 1.0000001
        zeros = tensors[name.replace("scale", "zero_point")]
        zeros[...] = 0x77777777  # 7 in every number: the minimum is -7 times the scale

    _, said = decisions_of(make_quantized("llama", FORMATS["W4A16 asymmetric"], tmp_path, fine)[0], ReferenceOps(np))
    assert "18 stay int4_min exactly" in said["checkpoint"].reason
    assert "a zero point times a scale that float32 does not hold: 3" in said["checkpoint"].reason


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("W8A8", "int8, a scale for each token", "as the checkpoint asks"),
        ("W8A8 static", "finer than asked", "int8, a scale that the files state for each tensor; 0 of 21 matrices"),
        ("fp8 compressed", "finer than asked", "fp8, a scale for each token; 0 of 21"),
        ("fp8 blocks", "finer than asked", "fp8, a scale for each 32 inputs of a token; 0 of 21"),
    ],
)
def test_how_activations_are_taken_is_said(name: str, value: str, reason: str, tmp_path: Path) -> None:
    _, said = decisions_of(make_quantized("llama", FORMATS[name], tmp_path)[0], CpuOps(2, instruction_sets()[-1]))
    assert said["activations"].value == value and reason in said["activations"].reason


def test_a_row_with_the_number_that_int8_lacks_is_kept_in_groups(tmp_path: Path) -> None:
    """Or unpacked, where there are none."""

    def lowest(config: Any, tensors: Any) -> None:
        tensors["model.layers.1.self_attn.k_proj.weight"][5, 7] = -128

    quantized, _ = make_quantized("llama", INT8, tmp_path, lowest)
    _, said = decisions_of(quantized, ReferenceOps(np))
    assert "of 21 matrices 18 stay int8 exactly, 3 stay int8_groups exactly" in said["checkpoint"].reason
    _, said = decisions_of(quantized, WithoutBlocks(np))
    assert "18 stay int8 exactly, 3 are unpacked to bfloat16 (a number of -128: 3)" in said["checkpoint"].reason


def test_another_quantisation_is_made_of_the_unpacked_weights(tmp_path: Path) -> None:
    quantized, plain = make_quantized("llama", FORMATS["gptq"], tmp_path)
    ops = CpuOps(2, instruction_sets()[-1])
    model, said = decisions_of(quantized, ops, quantization="int8")
    assert "(quantization int8: 21)" in said["checkpoint"].reason
    assert model.weight_bytes == load_model(plain, ops, "bfloat16", scheme=select_scheme("int8", None)).weight_bytes


def test_kept_weights_compute_what_their_values_do(tmp_path: Path) -> None:
    """16-bit activations: the logits are near those of the unpacked weights."""
    quantized, plain = make_quantized("llama", FORMATS["gptq"], tmp_path)
    ops = CpuOps(2, instruction_sets()[-1])
    expected = logits_of(plain, ops)
    found = logits_of(quantized, ops, "auto")
    assert not np.array_equal(found, expected)
    assert np.abs(found - expected).max() < 2e-3 * np.ptp(expected)


@pytest.mark.parametrize("has_blocks", [False, True])
def test_a_head_in_groups_unties(has_blocks: bool, tmp_path: Path) -> None:
    """A table that is quantised is one of its own, whatever `tie_word_embeddings` says; it stays so where tables may
    have groups."""
    rng = np.random.default_rng(1)
    parts, weight = Gptq().write((320, 64), rng, 0.3)

    def add(config: Any, tensors: Any) -> None:
        config["tie_word_embeddings"] = True
        tensors.pop("lm_head.weight", None)
        tensors.update({f"lm_head.{name}": part for name, part in parts.items()})

    ops = ReferenceOps(np) if has_blocks else WithoutBlocks(np)
    model, said = decisions_of(make_quantized("llama", Gptq(), tmp_path, add)[0], ops)
    assert not model.spec.tied_head
    words = "of 22 matrices 22 stay int4 exactly" if has_blocks else "bfloat16 (a table has no groups: 1)"
    assert words in said["checkpoint"].reason
    hidden = np.ones((1, 64), np.float32)
    assert np.allclose(model.logits(hidden)[0], weight.sum(axis=1), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["gptq act-order", "gptq 3 bits", "awq", "W4A16 asymmetric", "fp8 blocks"])
def test_blocks_of_any_size_give_the_same_values(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, plain = make_quantized("llama", FORMATS[name], tmp_path)
    monkeypatch.setattr(layouts, "BLOCK_ELEMENTS", 200)
    with CheckpointWeights(quantized) as checkpoint, CheckpointWeights(plain) as unpacked:
        source = source_of(checkpoint, quantized, dtype="float32", unpack="for the test")
        for array in (GATE_UP, DOWN):
            assert np.array_equal(source.matrix(array), unpacked.read(array))  # type: ignore[arg-type]


@pytest.mark.parametrize("format", [Gptq(act_order=True), Awq(), Compressed(symmetric=False), Fp8()], ids=repr)
def test_unpacking_takes_the_matrix_and_a_few_blocks(
    format: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, _ = format.write((512, 1024), np.random.default_rng(0), 0.1)
    save_file({f"a.{name}": one.contiguous() for name, one in parts.items()}, tmp_path / "model.safetensors")
    quantization = read_quantization(tmp_path, {"quantization_config": format.config()})
    assert quantization is not None
    monkeypatch.setattr(layouts, "BLOCK_ELEMENTS", 2**14)
    with CheckpointWeights(tmp_path) as checkpoint:
        source = QuantizedWeights(checkpoint, quantization, Target("bfloat16", (), None))
        tracemalloc.start()
        found: Any = source.matrix(Concatenated((("a.weight", (512, 1024)),)))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # Scales and zero points in float32 and int64 on their way, and per block its words, numbers, scales and products.
    assert peak - found.nbytes < 700_000 < 4 * found.size / 2


def test_the_engine_says_what_it_found(tmp_path: Path) -> None:
    quantized, _ = make_quantized("llama", Gptq(), tmp_path)
    args = EngineArgs(model=str(quantized), device="cpu", max_num_seqs=2, max_model_len=64, num_gpu_blocks_override=16)
    decided = {decision.name: decision for decision in compose_core(args, quantized).info.decisions}
    assert decided["checkpoint"].value == "gptq" and "21 stay int4 exactly" in decided["checkpoint"].reason


def test_groups_of_modules_have_schemes_of_their_own(tmp_path: Path) -> None:
    """A pattern goes before the class `Linear`."""
    rows = Compressed(bits=8, strategy="channel", group_size=None)
    rng, expected = np.random.default_rng(2), {}

    def another_group(config: Any, tensors: Any) -> None:
        groups = config["quantization_config"]["config_groups"]
        groups["group_1"] = rows.config()["config_groups"]["group_0"] | {"targets": ["re:.*down_proj$"]}
        for i in range(3):
            at = f"model.layers.{i}.mlp.down_proj."
            for name in [name for name in tensors if name.startswith(at)]:
                del tensors[name]
            parts, expected[i] = rows.write((64, 96), rng, 0.1)
            tensors.update({at + name: part for name, part in parts.items()})

    quantized, _ = make_quantized("llama", Compressed(), tmp_path, another_group)
    _, said = decisions_of(quantized, ReferenceOps(np))
    assert "18 stay int4 exactly, 3 stay int8 exactly" in said["checkpoint"].reason
    with CheckpointWeights(quantized) as checkpoint:
        found: Any = source_of(checkpoint, quantized, dtype="float32", unpack="for the test").matrix(DOWN)
    assert np.array_equal(found, expected[0])


def test_scales_for_a_quantised_cache_are_passed_over_and_that_is_said(tmp_path: Path) -> None:
    def with_cache(config: Any, tensors: Any) -> None:
        config["quantization_config"]["kv_cache_scheme"] = STATIC_INT8 | {"type": "float"}
        for name in ("k_scale", "v_scale"):
            tensors[f"model.layers.0.self_attn.{name}"] = torch.tensor([0.1])

    _, said = decisions_of(make_quantized("llama", Compressed(), tmp_path, with_cache)[0], ReferenceOps(np))
    assert said["kv_cache_scheme"].value == "not used" and "kv_cache_dtype" in said["kv_cache_scheme"].reason


def test_the_parts_of_a_matrix_may_lie_in_several_files(tmp_path: Path) -> None:
    quantized, plain = make_quantized("llama", Gptq(), tmp_path)
    tensors = load_file(quantized / "model.safetensors")
    (quantized / "model.safetensors").unlink()
    index = {}
    for i in range(2):
        some = {name: one for name, one in tensors.items() if name.endswith(("scales", "g_idx")) == (i == 0)}
        save_file(some, quantized / f"{i}.safetensors")
        index |= dict.fromkeys(some, f"{i}.safetensors")
    (quantized / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    ops = ReferenceOps(np)
    assert np.array_equal(logits_of(quantized, ops), logits_of(plain, ops))


@pytest.mark.parametrize("name", ["gptq", "awq", "W8A16"])
def test_an_engine_built_of_it_has_its_bits_and_bytes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantized, _ = make_quantized("llama", FORMATS[name], tmp_path)
    engine, ops = tmp_path / "engine", CpuOps(2, instruction_sets()[-1])
    assert main(["build", str(quantized), "-o", str(engine), "--quiet"]) == 0
    assert main(["inspect", str(engine)]) == 0
    assert re.search(rf"checkpoint +{FORMATS[name].config()['quant_method']} ", capsys.readouterr().out)
    assert np.array_equal(logits_of(engine, ops, "auto"), logits_of(quantized, ops, "auto"))
    assert load_model(engine, ops).weight_bytes == load_model(quantized, ops).weight_bytes


@pytest.mark.parametrize("name", ["gptq", "awq", "W8A16", "fp8 blocks"])
def test_quire_plan_foresees_the_bytes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantized, _ = make_quantized("llama", FORMATS[name], tmp_path)
    assert main(["plan", str(quantized), "--device", "h100", "--context", "64", "--json"]) == 0
    said = float(json.loads(capsys.readouterr().out)["weights"].split(" GB")[0])
    ops = WithoutBlocks(np) if name == "fp8 blocks" else CpuOps(2, instruction_sets()[-1])
    found = load_model(quantized, ops).weight_bytes / 1e9
    assert said == pytest.approx(found, abs=0.00051)


def test_biases_of_zero_that_the_model_has_not_are_passed_over_and_others_refused(tmp_path: Path) -> None:
    bias = torch.zeros(64)
    name = "model.layers.0.self_attn.q_proj.bias"
    quantized, _ = make_quantized("llama", Gptq(), tmp_path / "0", lambda _, tensors: tensors.update({name: bias}))
    load_model(quantized, ReferenceOps(np))
    quantized, _ = make_quantized("llama", Gptq(), tmp_path / "1", lambda _, tensors: tensors.update({name: bias + 1}))
    with pytest.raises(ModelFileError, match=r"does not: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_model(quantized, ReferenceOps(np))
