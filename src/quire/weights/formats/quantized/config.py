"""`quantization_config` of a checkpoint: one reader for each tool. What is not held is refused by name and value."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quire.errors import ModelFileError
from quire.models.hf_config import ConfigReader
from quire.weights.formats.quantized import FILES, KEYS
from quire.weights.formats.quantized.compressed_tensors import compressed_tensors
from quire.weights.formats.quantized.patterns import ModulePatterns
from quire.weights.formats.quantized.scheme import FP8_PER_TOKEN, Quantization, TensorScheme
from quire.weights.json_file import read_json_object

MAX_BYTES = 2**20
_MAX_GROUP = 2**20

_WITHOUT_EFFECT = frozenset(
    """act_group_aware adapter auto_mixed_precision backend batch_size block_name_to_quantize cache_block_outputs damp
    damp_auto_increment damp_percent dataset desc_act device disable_exllama do_fuse duo_scaling exllama_config
    exllama_version export_compatible fuse_max_seq_len fused_modules hyb_act max_input_length meta model_file_base_name
    model_name_or_path model_seqlen module_name_preceding_first_block modules_in_block_to_quantize modules_to_fuse mse
    n_parallel_calib_samples max_calib_samples max_calib_seq_len apply_clip offload_to_disk offload_to_disk_path
    pad_token_id parallel_packing quantizer static_groups tokenizer true_sequential use_cuda_fp16 use_exllama v2
    v2_alpha v2_memory_device lm_head modules_to_not_convert ignored_layers modules_to_convert producer
    is_checkpoint_fp8_serialized exclude_modules ignore kv_cache_quant_algo kv_cache_scheme config_groups""".split()
)
"""How a checkpoint came about or is to be run elsewhere; or which modules are quantised, which the tensors tell."""


def read_quantization(directory: Path, config: Mapping[str, Any]) -> Quantization | None:
    """What `config` (a parsed `config.json`), or else a file beside it, says of the quantised tensors; None: nothing.

    Raises:
        UnsupportedModelError: a method or a setting that is not held, by name and value.
        ModelFileError: a value that is missing, of a wrong type or out of range; or a file is damaged.
    """
    for key in KEYS:
        if config.get(key) is not None:
            values = config[key]
            if not isinstance(values, dict):
                raise ModelFileError(f"config.json: {key} must be an object")
            default = "compressed-tensors" if key == "compression_config" else ""
            return _read(values, default, f"{key}.", "config.json")
    for name, method in FILES.items():
        if (directory / name).exists():
            values = read_json_object(directory / name, MAX_BYTES)
            where = "quantization." if isinstance(values.get("quantization"), dict) else ""
            return _read(values["quantization"] if where else values, method, where, name)
    return None


def _read(values: Mapping[str, Any], default: str, where: str, file: str) -> Quantization:
    reader = ConfigReader(values, where, file)
    method = reader.text("quant_method", default or ("modelopt" if "quant_algo" in values else ""))
    if method not in _METHODS:
        raise reader.unsupported("quant_method", f"known are {', '.join(_METHODS)}")
    return _METHODS[method](reader, values, file)


def _gptq(reader: ConfigReader, values: Mapping[str, Any], file: str) -> Quantization:
    bits, group = reader.integer("bits"), reader.integer("group_size", -1, at_least=-1, at_most=_MAX_GROUP)
    if bits not in (2, 3, 4, 8):
        raise reader.unsupported("bits", "known are 2, 3, 4 and 8")
    name = "checkpoint_format" if reader.has("checkpoint_format") else "format"
    version = reader.text(name, "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise reader.unsupported(name, "known are gptq and gptq_v2")
    symmetric = reader.boolean("sym", True)
    for other in ("is_marlin_format", "mixed_precision"):
        _require(reader, values, other, (None, False))
    _require(reader, values, "pack_dtype", (None, "int32"))
    _require(reader, values, "rotation", (None, ""))
    dynamic = reader.nested("dynamic")
    rules = values.get("dynamic") or {}
    if dynamic is not None and any(not rule.startswith("-:") for rule in rules):
        raise reader.unsupported("dynamic", "one scheme for all quantised modules is held; `-:` rules leave some out")
    known = "bits group_size sym checkpoint_format format is_marlin_format mixed_precision pack_dtype rotation dynamic"
    _no_others(reader, f"{known} method")
    scheme = TensorScheme(
        "gptq", "int", bits, *_strategy(reader, group), symmetric=symmetric, zero_offset=1 if version == "gptq" else 0
    )
    return _same_for_all("gptq", file, reader, values, scheme, ())


def _awq(reader: ConfigReader, values: Mapping[str, Any], file: str) -> Quantization:
    names = {"bits": "w_bit", "group_size": "q_group_size"}
    bits_name, group_name = (old if reader.has(old) else new for new, old in names.items())
    bits, group = reader.integer(bits_name), reader.integer(group_name, -1, at_least=-1, at_most=_MAX_GROUP)
    if bits != 4:
        raise reader.unsupported(bits_name, "AWQ's layout has 4")
    for name in ("version", "format"):
        if reader.text(name, "gemm").lower() != "gemm":
            raise reader.unsupported(name, "known is gemm")
    symmetric = not reader.boolean("zero_point", True)
    _no_others(reader, "bits w_bit group_size q_group_size version format zero_point")
    scheme = TensorScheme("awq", "int", bits, *_strategy(reader, group), symmetric=symmetric)
    return _same_for_all("awq", file, reader, values, scheme, ("modules_to_not_convert",))


def _fp8(reader: ConfigReader, values: Mapping[str, Any], file: str) -> Quantization:
    block = reader.sizes("weight_block_size")
    activations = reader.text("activation_scheme", "dynamic")
    if activations not in ("dynamic", "static"):
        raise reader.unsupported("activation_scheme", "known are dynamic and static")
    known = {"fmt": (None, "e4m3"), "scale_fmt": (None, "float", "ue8m0"), "expert_dtype": (None, "fp8")}
    for name, held in (known | {"dequantize": (None, False)}).items():
        _require(reader, values, name, held)
    _no_others(reader, "weight_block_size activation_scheme dequantize " + " ".join(known))
    dynamic = f"fp8, a scale for each {block[1]} inputs of a token" if block else FP8_PER_TOKEN
    words = dynamic if activations == "dynamic" else "fp8, a scale that the files state"
    pair = (block[0], block[1]) if block else None
    scheme = TensorScheme("plain", "float", 8, "block" if block else "tensor", block=pair, activations=words)
    return _same_for_all("fp8", file, reader, values, scheme, ("modules_to_not_convert", "ignored_layers"))


def _fbgemm(reader: ConfigReader, values: Mapping[str, Any], file: str) -> Quantization:
    bound = reader.optional_number("activation_scale_ub")
    _no_others(reader, "activation_scale_ub")
    words = FP8_PER_TOKEN if bound is None else f"{FP8_PER_TOKEN} of at most {bound:g}"
    scheme = TensorScheme("plain", "float", 8, "channel", activations=words)
    return _same_for_all("fbgemm_fp8", file, reader, values, scheme, ("modules_to_not_convert",))


def _modelopt(reader: ConfigReader, values: Mapping[str, Any], file: str) -> Quantization:
    if reader.text("quant_algo", "") != "FP8":
        raise reader.unsupported("quant_algo", "known is FP8")
    _no_others(reader, "quant_algo")
    scheme = TensorScheme("plain", "float", 8, "tensor", activations="fp8, a scale that the files state")
    return _same_for_all("modelopt", file, reader, values, scheme, ("exclude_modules", "ignore"))


def _strategy(reader: ConfigReader, group: int) -> tuple[Any, int | None]:
    if group == 0:
        raise reader.unsupported("group_size", "it must be -1, for whole rows, or more than 0")
    return ("channel", None) if group == -1 else ("group", group)


def _same_for_all(
    method: str,
    file: str,
    reader: ConfigReader,
    values: Mapping[str, Any],
    scheme: TensorScheme,
    lists: tuple[str, ...],
) -> Quantization:
    """Tensors say which modules are quantised: a list of others only must not name one that is."""
    left_out = [entry for name in lists for entry in (reader.texts(name) or ())]
    patterns = ModulePatterns((entry for entry in left_out if not entry.startswith("re:")), file)

    def scheme_of(module: str) -> TensorScheme | None:
        return None if patterns.match(module) else scheme

    has_cache = any(values.get(name) is not None for name in ("kv_cache_scheme", "kv_cache_quant_algo"))
    return Quantization(method, file, scheme_of, has_cache)


def _require(reader: ConfigReader, values: Mapping[str, Any], name: str, held: tuple[Any, ...]) -> None:
    value = values.get(name)
    if not any(value is one or (type(value) is type(one) and value == one) for one in held):
        raise reader.unsupported(name, "known are " + ", ".join(str(one) for one in held if one is not None))


def _no_others(reader: ConfigReader, known: str) -> None:
    reader.refuse_keys_outside(frozenset(known.split()) | _WITHOUT_EFFECT | {"quant_method"})


_METHODS: dict[str, Callable[[ConfigReader, Mapping[str, Any], str], Quantization]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "modelopt": _modelopt,
}
