"""Where the inputs of a linear layer come from, if a factor of each channel can be moved there: by the decoder's
description, whatever family filled it in."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.models.spec import DecoderSpec


@dataclass(frozen=True, slots=True)
class Link:
    """What gives a layer its inputs."""

    source: str
    """A norm, or a linear layer some of whose outputs they are but for factors that their own channel does not
    change."""
    outputs: NDArray[np.int64] | None = None
    """Of a linear layer: for each input of the reader the output that it comes from. None: a norm, channel by
    channel."""


def input_link(spec: DecoderSpec, name: str) -> Link | None:
    """Of the parameter `name`; None where its inputs are the residual, or go through what is not linear."""
    layer, _, kind = name.partition(".")
    if kind in ("qkv", "gate_up", "up"):
        norm = "attention_norm" if kind == "qkv" else "mlp_norm"
        return None if spec.norm_places == "post" else Link(f"{layer}.{norm}")
    if kind == "o":  # attention averages values: each of its outputs is linear in the value of its dimension
        size, heads = spec.head_dim, np.arange(spec.num_heads)
        shared = heads // (spec.num_heads // spec.num_kv_heads)
        first = (spec.num_heads + spec.num_kv_heads + shared) * size
        return Link(f"{layer}.qkv", (first[:, None] + np.arange(size)).reshape(-1))
    if kind == "down" and spec.gated_mlp:  # activation(gate) * up
        return Link(f"{layer}.gate_up", np.arange(spec.intermediate_size, 2 * spec.intermediate_size))
    if kind == "down" and spec.activation == "relu":  # max(0, x) f = max(0, x f)
        return Link(f"{layer}.up", np.arange(spec.intermediate_size))
    return None
