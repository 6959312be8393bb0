"""Quantised checkpoints that are damaged or lie: an error that names file, tensor and value, never another one."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quire.errors import ModelFileError, QuireError, UnsupportedModelError
from quire.models.parameters import Concatenated
from quire.ops.reference import ReferenceOps
from quire.weights.formats.quantized.config import read_quantization
from quire.weights.formats.quantized.patterns import ModulePatterns
from quire.weights.formats.quantized.source import QuantizedWeights
from quire.weights.formats.safetensors import CheckpointWeights
from quire.weights.load import load_model
from quire.weights.source import Target
from tests.weights.quantized_files import TOKEN_INT8, Awq, Compressed, Format, Fp8, Gptq, make_quantized

DOWN = "model.layers.0.mlp.down_proj."
Change = Callable[[Any, Any], None]


def part(name: str, change: Callable[[torch.Tensor], Any]) -> Change:
    def apply(_: Any, tensors: Any) -> None:
        tensors[DOWN + name] = change(tensors[DOWN + name])

    return apply


def put(index: Any, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def apply(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return apply


def setting(**values: Any) -> Change:
    return lambda config, _: config["quantization_config"].update(values)


def weights(**values: Any) -> Change:
    return lambda config, _: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(values)


def drop(name: str) -> Change:
    return lambda _, tensors: tensors.pop(DOWN + name)


NAIVE = Compressed("naive-quantized", 4, "group", 32, symmetric=False)
FP8 = Compressed("float-quantized", 8, "channel", None, kind="float")


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        (Gptq(), setting(bits=8), r"model\.safetensors: \S+\.scales has the shape \[\d, \d+\]; int8, groups of 32"),
        (
            Gptq(8, 32),
            setting(bits=4),
            r"\.scales has the shape \[3, 64\]; int4, groups of 32 \(config\.json\) asks for \[6",
        ),
        (Gptq(), setting(group_size=64), r"scales has the shape \[3, 64\]; int4, groups of 64 .* asks for \[2, 64\]"),
        (Gptq(group_size=-1), setting(bits=8), "qzeros has the shape|scales has the shape|g_idx has the shape"),
        (Gptq(), drop("scales"), r"model\.safetensors: model\.layers\.0\.mlp\.down_proj\.scales is missing"),
        (Gptq(), drop("qzeros"), r"down_proj\.qzeros is missing"),
        (Gptq(), drop("qweight"), r"down_proj\.g_idx: config\.json asks for \S+\.qweight"),
        (Gptq(), part("g_idx", put(5, 3)), r"down_proj\.g_idx has the group 3 at 5; there are 3"),
        (Gptq(), part("g_idx", put(95, -1)), r"down_proj\.g_idx has the group -1 at 95"),
        (Gptq(), part("g_idx", lambda x: x[:-1]), r"g_idx has the shape \[95\]"),
        (Gptq(), part("scales", put((1, 2), float("nan"))), r"down_proj\.scales has the scale nan at \[1, 2\]"),
        (Gptq(), part("scales", lambda x: x.to(torch.int32)), r"down_proj\.scales is I32, not F32 or F16 or BF16"),
        (Gptq(), part("qweight", lambda x: x.to(torch.int64)), r"down_proj\.qweight is I64, not I32"),
        (Gptq(), part("qzeros", lambda x: x[:, :-1]), r"qzeros has the shape \[3, 7\]; .* asks for \[3, 8\]"),
        (Awq(), setting(group_size=128), r"scales has the shape \[3, 64\]; int4, groups of 128"),
        (Awq(), part("qweight", lambda x: x[:32]), r"down_proj\.scales has the shape \[3, 64\]"),
        (Awq(), drop("qzeros"), r"down_proj\.qzeros is missing"),
        (
            Compressed(),
            weights(num_bits=8),
            r"weight_packed has the shape \[64, 12\]; weight_shape \[64, 96\] and int8",
        ),
        (Compressed(), weights(group_size=128), r"weight_scale has the shape \[64, 3\]; int4, groups of 128"),
        (Compressed(), weights(symmetric=False), r"weight_zero_point is missing"),
        (Compressed(), drop("weight_shape"), r"down_proj\.weight_shape is missing"),
        (Compressed(), drop("weight_scale"), r"down_proj\.weight_scale is missing"),
        (Compressed(), part("weight_shape", put(1, 2**62)), r"weight_shape \[64, 4611686018427387904\]"),
        (Compressed(), part("weight_shape", put(0, -64)), r"weight_shape \[-64, 96\]"),
        (Compressed(), part("weight_scale", put((3, 1), float("inf"))), r"weight_scale has the scale inf at \[3, 1\]"),
        (
            Compressed(),
            lambda config, _: config["quantization_config"].update(ignore=["re:.*down_proj"]),
            r"down_proj\.weight_packed is quantised; config\.json says that \S+down_proj is not",
        ),
        (NAIVE, part("weight", put((2, 3), 9)), r"down_proj\.weight has the number 9, outside 4 bits"),
        (NAIVE, part("weight_zero_point", put((2, 1), -9)), r"weight_zero_point has the zero point -9, outside 4 bits"),
        (FP8, part("weight", lambda x: x.view(torch.uint8).index_fill(0, torch.tensor([4]), 127).view(x.dtype)), "NaN"),
        (FP8, part("weight", lambda x: x.view(torch.int8)), r"down_proj\.weight is I8, not F8_E4M3"),
        (FP8, drop("weight_scale"), r"down_proj\.weight_scale is missing"),
        (Fp8(), setting(weight_block_size=[64, 32]), r"weight_scale_inv has the shape"),
        (Fp8(), drop("weight_scale_inv"), r"down_proj\.weight_scale is missing, of fp8, blocks of 32x32"),
        (Fp8(), setting(modules_to_not_convert=[DOWN[:-1]]), r"down_proj\.weight is quantised; config\.json says"),
    ],
)
def test_tensors_that_do_not_fit_what_is_said_are_named(
    format: Format, change: Change, message: str, tmp_path: Path
) -> None:
    quantized, _ = make_quantized("llama", format, tmp_path, change)
    with pytest.raises(ModelFileError, match=message):
        load_model(quantized, ReferenceOps(np), "float32")


def test_a_checkpoint_in_which_nothing_is_quantised_is_refused(tmp_path: Path) -> None:
    quantized, plain = make_quantized("llama", Gptq(), tmp_path)
    (plain / "config.json").write_text((quantized / "config.json").read_text())
    with pytest.raises(ModelFileError, match=r"config\.json says 'gptq', and no tensor is quantised"):
        load_model(plain, ReferenceOps(np))


def test_quantised_tensors_of_which_the_config_says_nothing_are_left_over(tmp_path: Path) -> None:
    quantized, _ = make_quantized("llama", Gptq(), tmp_path, lambda config, _: config.pop("quantization_config"))
    with pytest.raises(ModelFileError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.weight"):
        load_model(quantized, ReferenceOps(np))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("quantize_config.json", Gptq().config()),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True}),
        ("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}),
    ],
)
def test_files_beside_the_config_are_read_where_it_says_nothing(
    name: str, values: dict[str, Any], tmp_path: Path
) -> None:
    format: Format = {"qu": Gptq() if name[5] == "i" else Awq(), "hf": Fp8("modelopt", None)}[name[:2]]
    quantized, _ = make_quantized("llama", format, tmp_path, lambda config, _: config.pop("quantization_config"))
    values = {key: value for key, value in values.items() if key != "quant_method"}
    (quantized / name).write_text(json.dumps(values))
    load_model(quantized, ReferenceOps(np))
    broken = values | ({"quantization": {"quant_algo": "NVFP4"}} if name[0] == "h" else {"bits": 5, "w_bit": 5})
    (quantized / name).write_text(json.dumps(broken))
    with pytest.raises(UnsupportedModelError, match=rf"^{name}: \S+ = ('NVFP4'|5) is not supported"):
        load_model(quantized, ReferenceOps(np))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "mxfp4"}, "quantization_config.quant_method = 'mxfp4' is not supported: known are gptq, awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes' is not supported"),
        ({}, "quant_method = None is not supported"),
        (Gptq().config() | {"bits": 5}, "bits = 5 is not supported"),
        (Gptq().config() | {"group_size": 0}, "group_size = 0 is not supported"),
        (Gptq().config() | {"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin' is not supported"),
        (Gptq().config() | {"is_marlin_format": True}, "is_marlin_format = True is not supported"),
        (Gptq().config() | {"dynamic": {"+:.*up.*": {"bits": 8}}}, "dynamic = .* is not supported"),
        (Gptq().config() | {"rotation": "hadamard"}, "rotation = 'hadamard' is not supported"),
        (Gptq().config() | {"pack_dtype": "int64"}, "pack_dtype = 'int64' is not supported"),
        (Gptq().config() | {"codebook": 1}, "codebook = 1 is not supported: the key is not known"),
        (Awq().config() | {"version": "gemv"}, "version = 'gemv' is not supported"),
        (Awq().config() | {"bits": 8}, "bits = 8 is not supported"),
        (Fp8().config() | {"activation_scheme": "none"}, "activation_scheme = 'none' is not supported"),
        (Fp8().config() | {"fmt": "e5m2"}, "fmt = 'e5m2' is not supported"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo = 'NVFP4' is not supported"),
        (Compressed("nvfp4-pack-quantized").config(), "its format 'nvfp4-pack-quantized' is none of"),
        (Compressed("marlin-24").config(), "its format 'marlin-24' is none of"),
        (Compressed().config() | {"transform_config": {"config_groups": {}}}, "transform_config = .* is not supported"),
        (Compressed().config() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (Compressed(bits=3).config(), "weights.num_bits = 3 is not supported"),
        (Compressed(strategy="tensor_group").config(), "weights.strategy = 'tensor_group' is not supported"),
        (Compressed(ignore=("re:(a+)+$",)).config(), r"the pattern \(a\+\)\+\$ is not supported"),
    ],
)
def test_what_is_not_held_is_refused_by_name_and_value(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_quantization(tmp_path, {"quantization_config": config})


def test_patterns_match_from_the_beginning_and_cost_no_more_than_their_bound() -> None:
    patterns = ModulePatterns(
        ["lm_head", "re:.*mlp\\.(gate|up)_proj$", "re:visual.*", "re:model\\.layers\\.[0-9]+\\.a"], "f"
    )
    names = ["lm_head", "model.layers.11.mlp.up_proj", "visual.x", "model.layers.3.abc"]
    assert all(patterns.match(name) for name in names)
    assert not any(patterns.match(name) for name in ["lm_head.x", "a.visual", "model.layers.x.a", "b.mlp.up_proj.q"])
    slow = ModulePatterns(["re:.*a.*b.*c.*d.*e$"], "config.json")
    with pytest.raises(ModelFileError, match=r"config\.json: the pattern \.\*a.* takes too long"):
        slow.match("abcd" * 50)
    for text in (".?" * 32 + "X", "(?:ab|.)" * 32 + "X"):
        with pytest.raises(ModelFileError, match="takes too long"):
            ModulePatterns([f"re:{text}"], "f").match("model.layers.0.mlp.gate_proj")
    assert ModulePatterns(["re:.*(" + "|".join(map("n{}".format, range(300))) + ")$"], "f").match("a.n299")
    for text in ("(a|b)*c", "(a)\\1", "(?=a)b", "a**"):
        with pytest.raises(QuireError):
            ModulePatterns([f"re:{text}"], "f")


HOSTILE = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**70,
    1e308,
    "",
    "x" * 500,
    "gptq",
    [],
    [1],
    [2**40, 1],
    ["re:["],
    {},
    {"a": {}},
]


def mutated(values: Any, random_: random.Random) -> Any:
    """A copy with one value of it, however deep, replaced, left out or joined by another."""
    values = copy.deepcopy(values)
    at = values
    while True:
        key = random_.choice(list(at) if isinstance(at, dict) else range(len(at)))
        inner = at[key]
        if not isinstance(inner, dict | list) or not inner or random_.random() < 0.3:
            break
        at = inner
    choice = random_.random()
    if choice < 0.2:
        del at[key]
    elif choice < 0.3 and isinstance(at, dict):
        at["k" + str(random_.randrange(9))] = random_.choice(HOSTILE)
    else:
        at[key] = random_.choice(HOSTILE)
    return values


FUZZED: dict[str, Format] = {
    "gptq": Gptq(symmetric=False),
    "awq": Awq(),
    "packed": Compressed(symmetric=False, activations=TOKEN_INT8),
    "fp8": Fp8(),
}


def is_readable(directory: Path, config: dict[str, Any], matrices: tuple[str, ...] = ()) -> bool:
    """False where it is refused as it should be; any other exception is raised."""
    try:
        quantization = read_quantization(directory, {"quantization_config": config})
        assert quantization is not None
        with CheckpointWeights(directory) as checkpoint:
            source = QuantizedWeights(checkpoint, quantization, Target("bfloat16", ("int8", "int4"), None))
            for name in matrices:
                source.matrix(Concatenated(((name, source.tensors[name].shape),)))
    except (ModelFileError, UnsupportedModelError) as error:
        assert len(str(error)) < 1000
        return False
    return True


@pytest.mark.parametrize("name", FUZZED)
def test_a_mutated_config_is_read_or_refused(name: str, tmp_path: Path) -> None:
    quantized, _ = make_quantized("llama", FUZZED[name], tmp_path)
    tensors = load_file(quantized / "model.safetensors")
    few = {key: value for key, value in tensors.items() if DOWN in key or "lm_head" in key}
    save_file(few, quantized / "model.safetensors")
    base, random_ = FUZZED[name].config(), random.Random(name)
    assert is_readable(quantized, base, (f"{DOWN}weight",))
    outcomes = [is_readable(quantized, mutated(base, random_), (f"{DOWN}weight",)) for _ in range(1500)]
    assert 0.05 < sum(outcomes) / len(outcomes) < 0.95


@pytest.mark.parametrize("name", FUZZED)
def test_mutated_tensors_are_read_or_refused(name: str, tmp_path: Path) -> None:
    quantized, _ = make_quantized("llama", FUZZED[name], tmp_path)
    tensors = load_file(quantized / "model.safetensors")
    few = {key: value for key, value in tensors.items() if DOWN in key}
    random_ = random.Random(name)
    kinds = [torch.int8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8]
    refused = 0
    for _ in range(300):
        changed = dict(few)
        key = random_.choice(list(few))
        tensor = few[key]
        choice = random_.randrange(5)
        if choice == 0:
            del changed[key]
        elif choice == 1:
            changed[key] = tensor.to(torch.float32).to(random_.choice(kinds))
        elif choice == 2 and tensor.ndim:
            changed[key] = tensor[: random_.randrange(len(tensor) + 1)].clone()
        elif choice == 3:
            changed[key] = tensor.reshape(-1).clone()
        else:
            noise = torch.tensor([random_.randrange(256) for _ in range(tensor.nbytes)], dtype=torch.uint8)
            changed[key] = noise.view(tensor.dtype).reshape(tensor.shape)
        save_file(changed, quantized / "model.safetensors")
        refused += not is_readable(quantized, FUZZED[name].config(), (f"{DOWN}weight",) if changed else ())
    assert 20 < refused < 300
