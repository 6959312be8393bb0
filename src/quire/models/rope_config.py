"""Rotary positions in a Hugging Face config: transformers v4 (`rope_theta`, `rope_scaling`) and v5
(`rope_parameters`)."""

import math
from dataclasses import dataclass, replace

from quire.errors import ModelFileError
from quire.models.hf_config import LARGEST, ConfigReader
from quire.models.spec import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)

_KNOWN = frozenset(
    "rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings "
    "attention_factor beta_fast beta_slow short_factor long_factor low_freq_factor high_freq_factor "
    "mscale mscale_all_dim truncate finetuned".split()
)


@dataclass(frozen=True, slots=True)
class RopeDefaults:
    """What a key means to a family when its config lacks it, and what only some families have."""

    theta: float = 10_000.0
    can_be_partial: bool = False
    """Whether part of a head may be rotated."""
    longrope_names: tuple[str, ...] = ("longrope",)
    original_positions: int | None = None
    """A family with such a number takes it before that of the rope object."""


def read_rope(config: ConfigReader, head_dim: int, defaults: RopeDefaults) -> RopeSpec:
    """The rotary positions of a model whose layers all have the same.

    Raises:
        UnsupportedModelError: a kind or a key that Quire does not have.
        ModelFileError: a value of a wrong type or out of range.
    """
    # transformers gives `rope_scaling` precedence over `rope_parameters`; each name must count as read.
    rope = [config.nested("rope_scaling"), config.nested("rope_parameters")]
    theta = config.number("rope_theta", defaults.theta)
    partial = config.number("partial_rotary_factor", 1.0)
    found = rope[0] or rope[1] or ConfigReader({}, "rope_parameters.")
    return parse_rope(config, found, head_dim, replace(defaults, theta=theta), partial)


def parse_rope(
    config: ConfigReader, rope: ConfigReader, head_dim: int, defaults: RopeDefaults, partial: float = 1.0
) -> RopeSpec:
    """One rope object; `config` gives the lengths that it may leave out. Raises as `read_rope`."""
    rope.refuse_keys_outside(_KNOWN)
    partial = rope.number("partial_rotary_factor", partial)
    stated = rope if rope.has("partial_rotary_factor") else config
    if partial > 1.0 or (partial < 1.0 and not defaults.can_be_partial):
        raise stated.unsupported("partial_rotary_factor", "this family rotates whole heads")
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise stated.unsupported("partial_rotary_factor", f"{rotary_dim} rotated dimensions are not a number of pairs")
    theta = rope.number("rope_theta", defaults.theta)
    if theta <= 1.0:
        raise (rope if rope.has("rope_theta") else config).unsupported("rope_theta", "it must be above 1")
    return RopeSpec(theta, rotary_dim, _scaling(config, rope, rotary_dim, defaults))


def extended_positions(rope: RopeSpec, max_positions: int) -> int:
    """The model's longest sequence: YaRN configs often state the length before it was stretched.

    Raises:
        ModelFileError: it is beyond what any length may be.
    """
    if not isinstance(rope.scaling, YarnScaling):
        return max_positions
    stretched = rope.scaling.factor * rope.scaling.original_max_positions
    if stretched > LARGEST:
        raise ModelFileError(
            f"config.json: YaRN's factor = {rope.scaling.factor:g} makes {stretched:g} positions of "
            f"{rope.scaling.original_max_positions}; at most {LARGEST} are supported"
        )
    return max(max_positions, int(stretched))


def _scaling(config: ConfigReader, rope: ConfigReader, rotary_dim: int, defaults: RopeDefaults) -> RopeScaling | None:
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(rope.number("factor"))
    max_positions = config.integer("max_position_embeddings")
    original = config.optional_integer("original_max_position_embeddings", if_absent=defaults.original_positions)
    if original is None:
        original = rope.integer("original_max_position_embeddings", max_positions)
    if original < 2:
        raise ModelFileError(f"config.json: original_max_position_embeddings must be above 1, got {original}")
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.unsupported("low_freq_factor", "it must be below high_freq_factor")
        return Llama3Scaling(rope.number("factor"), low, high, original)
    if kind in defaults.longrope_names:
        return _longrope(rope, max_positions, original, rotary_dim)
    if kind == "yarn":
        return _yarn(rope, max_positions, original)
    raise rope.unsupported(
        "rope_type" if rope.has("rope_type") else "type", "known are default, linear, llama3, yarn, longrope"
    )


def _yarn(rope: ConfigReader, max_positions: int, original: int) -> YarnScaling:
    factor = rope.number("factor", max_positions / original)
    mscale, mscale_all = rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")

    def temperature(scale: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0

    inferred = temperature(1.0)
    if mscale is not None and mscale_all is not None:
        inferred = temperature(mscale) / temperature(mscale_all)
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        attention_factor=rope.number("attention_factor", inferred),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.boolean("truncate", True),
    )


def _longrope(rope: ConfigReader, max_positions: int, original: int, rotary_dim: int) -> LongRopeScaling:
    factor = rope.number("factor", max_positions / original)
    inferred = 1.0 if factor <= 1.0 else math.sqrt(1.0 + math.log(factor) / math.log(original))
    short, long = rope.numbers("short_factor"), rope.numbers("long_factor")
    for name, factors in (("short_factor", short), ("long_factor", long)):
        if len(factors) != rotary_dim // 2:
            raise rope.unsupported(name, f"it must have {rotary_dim // 2} numbers")
    return LongRopeScaling(short, long, original, rope.number("attention_factor", inferred))
