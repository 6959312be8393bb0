"""The architecture of a decoder-only transformer as data: `families/` fill it in, `decoder.py` computes."""

from dataclasses import dataclass
from typing import Literal

from quire.ops.types import Activation


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation (arXiv 2306.15595): every frequency is divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1 (arXiv 2407.21783): frequencies that turn less than `low_freq_factor` times within
    `original_max_positions` are divided by `factor`, those that turn more than `high_freq_factor` times are kept, those
    between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): `beta_fast` and `beta_slow` are turns within `original_max_positions`, between which
    the frequencies go over from kept to divided by `factor`; `attention_factor` multiplies cos and sin. `truncate`
    rounds the borders to whole dimensions."""

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753): a divisor for each of the `rotary_dim / 2` frequencies, a short and a long set.

    The long set is used when the engine's `max_model_len` exceeds `original_max_positions`, for sequences of
    every length: a choice by the length of each sequence would change the keys that are already in the cache.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_positions: int
    attention_factor: float


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions (arXiv 2104.09864) over the first `rotary_dim` dimensions of each head."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer."""

    attention_scale: float
    """Multiplies the scores q . k."""
    window: int | None = None
    """A query sees this many keys, its own included; None sees all."""
    rope: RopeSpec | None = None
    """None: the layer has no rotary positions."""


@dataclass(frozen=True, slots=True)
class NormSpec:
    """`rms` (arXiv 1910.07467) multiplies by `weight_offset + weight`; `layer` (arXiv 1607.06450) has a bias too."""

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    weight_offset: float = 0.0


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A whole decoder, in the terms of a paper's table of hyperparameters. `norm_places`: `pre` norms the input of
    attention and MLP, `post` norms their output before it is added to the residual (OLMo 2), `sandwich` does both
    (Gemma 2)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    norm_places: Literal["pre", "post", "sandwich"] = "pre"
    activation: Activation = "silu"
    gated_mlp: bool = True
    """`down(activation(gate(x)) * up(x))`, else `down(activation(up(x)))`."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "projection"] = "none"
    """RMS norm of queries and keys: each head by itself (Qwen 3), or the whole projection (OLMo 2)."""
    attention_softcap: float | None = None
    """Scores become `cap * tanh(score / cap)`."""
    logits_softcap: float | None = None
    embedding_scale: float = 1.0
    logits_scale: float = 1.0
    tied_head: bool = False
    """The head is the embedding."""
    learned_positions: bool = False
    """A table of positions is added to the embeddings (GPT-2)."""

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)
