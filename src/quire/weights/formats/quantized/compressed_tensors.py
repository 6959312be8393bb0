"""The config of compressed-tensors (llm-compressor): groups of modules, each with a scheme of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from quire.errors import ModelFileError
from quire.models.hf_config import ConfigReader
from quire.weights.formats.quantized.patterns import ModulePatterns
from quire.weights.formats.quantized.scheme import (
    AS_FLOAT,
    FP8_PER_TOKEN,
    INT8_PER_TOKEN,
    Layout,
    Quantization,
    Strategy,
    TensorScheme,
)
from quire.weights.json_file import printable

_LAYOUTS: dict[str, Layout] = {
    "pack-quantized": "packed",
    "int-quantized": "plain",
    "float-quantized": "plain",
    "naive-quantized": "plain",
}
MAX_GROUPS = 64
"""Of modules in one config; a model in use has one to four."""
_KNOWN = frozenset(
    """quant_method config_groups format ignore kv_cache_scheme quantization_status global_compression_ratio version
    sparsity_config transform_config moe_sparsity_config""".split()
)
_KNOWN_OF_GROUP = frozenset("targets weights input_activations output_activations format".split())
_KNOWN_OF_NUMBERS = frozenset(
    """num_bits type symmetric group_size strategy block_structure dynamic actorder scale_dtype zp_dtype observer
    observer_kwargs""".split()
)


@dataclass(frozen=True, slots=True)
class _Group:
    targets: ModulePatterns
    scheme: TensorScheme


def compressed_tensors(reader: ConfigReader, values: Mapping[str, Any], file: str) -> Quantization:
    """Read the config. Raises UnsupportedModelError and ModelFileError, which name the key."""
    reader.refuse_keys_outside(_KNOWN)
    for name in ("transform_config", "sparsity_config", "moe_sparsity_config"):
        inner = reader.nested(name)
        if inner is not None and inner.text("format", "") != "dense":
            raise reader.unsupported(name, "only weights that are quantised and nothing else are held")
    default = reader.text("format", "")
    groups_of = reader.nested("config_groups")
    if groups_of is None:
        raise reader.unsupported("config_groups", "it must name the modules that are quantised")
    names = list(values["config_groups"])
    if len(names) > MAX_GROUPS:
        raise ModelFileError(f"{file}: config_groups has {len(names)} groups; at most {MAX_GROUPS} are read")
    groups = [_group(groups_of, name, default, file) for name in names]
    ignored = ModulePatterns(reader.texts("ignore") or (), file)

    def scheme_of(module: str) -> TensorScheme | None:
        if ignored.match(module):
            return None
        found = [group for group in groups if group.targets.match(module)]
        found = found or [group for group in groups if group.targets.matches_class()]
        if len({group.scheme for group in found}) > 1:
            raise ModelFileError(f"{file}: {printable(module)} is a target of groups with different schemes")
        return found[0].scheme if found else None

    return Quantization("compressed-tensors", file, scheme_of, values.get("kv_cache_scheme") is not None)


def _group(groups: ConfigReader, name: str, default: str, file: str) -> _Group:
    group = groups.nested(name)
    if group is None:
        raise groups.unsupported(name, "it must be an object with targets and weights")
    group.refuse_keys_outside(_KNOWN_OF_GROUP)
    format = group.text("format", default)
    weights, outputs = group.nested("weights"), group.nested("output_activations")
    if format not in _LAYOUTS:
        raise (group if group.has("format") else groups).unsupported(
            "format" if group.has("format") else name, f"its format {format!r} is none of {', '.join(_LAYOUTS)}"
        )
    if weights is None:
        raise group.unsupported("weights", "a group without quantised weights is not held")
    if outputs is not None:
        raise group.unsupported("output_activations", "outputs are not quantised here")
    targets = group.texts("targets")
    if not targets:
        raise group.unsupported("targets", "it must name modules")
    return _Group(ModulePatterns(targets, file), _scheme(weights, _LAYOUTS[format], _activations(group)))


def _scheme(weights: ConfigReader, layout: Layout, activations: str) -> TensorScheme:
    weights.refuse_keys_outside(_KNOWN_OF_NUMBERS)
    kind, bits = weights.text("type", "int").lower(), weights.integer("num_bits", 8)
    if kind not in ("int", "float") or (kind == "float" and layout == "packed"):
        raise weights.unsupported("type", "known are int, and float where the format is not pack-quantized")
    # From 5 bits to 7 a number crosses words, and versions of the library have packed that in two ways.
    known = (2, 4, 8) if layout == "packed" else (8,) if kind == "float" else (4, 8)
    if bits not in known:
        raise weights.unsupported("num_bits", f"with this type and format known are {', '.join(map(str, known))}")
    group = weights.integer("group_size", -1, at_least=-1)
    stated = weights.text("strategy", "group" if group > 0 else "channel" if weights.has("group_size") else "tensor")
    block = weights.sizes("block_structure") if weights.has("block_structure") else None
    if stated not in get_args(Strategy):
        raise weights.unsupported("strategy", "known are tensor, channel, group and block")
    if (stated == "group") != (group > 0):
        raise weights.unsupported("group_size", f"the strategy is {stated}")
    if (stated == "block") != (block is not None):
        raise weights.unsupported("block_structure", f"the strategy is {stated}")
    return TensorScheme(
        layout,
        "float" if kind == "float" else "int",
        bits,
        cast(Strategy, stated),
        group if group > 0 else None,
        None if block is None else (block[0], block[1]),
        weights.boolean("symmetric", True),
        activations=activations,
    )


def _activations(group: ConfigReader) -> str:
    inputs = group.nested("input_activations")
    if inputs is None:
        return AS_FLOAT
    inputs.refuse_keys_outside(_KNOWN_OF_NUMBERS)
    kind, bits = inputs.text("type", "int").lower(), inputs.integer("num_bits", 8)
    shared, is_dynamic = inputs.text("strategy", "tensor"), inputs.boolean("dynamic", False)
    if bits == 8 and is_dynamic and shared == "token" and inputs.boolean("symmetric", True):
        return {"int": INT8_PER_TOKEN, "float": FP8_PER_TOKEN}.get(kind, kind)
    return f"{kind}{bits}, {'a scale for each' if is_dynamic else 'a scale that the files state for each'} {shared}"
