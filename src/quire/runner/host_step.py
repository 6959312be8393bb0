"""What a step takes of the host's memory, from the architecture alone: its program, traced without weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np

from quire.models.decoder import Decoder
from quire.models.parameters import NameMap, Parameter, decoder_parameters
from quire.models.spec import DecoderSpec
from quire.ops.cpu import CpuOps
from quire.ops.cpu_program import tokens_in_work
from quire.ops.graph.fuse import fuse
from quire.ops.graph.operations import trace
from quire.ops.graph.plan import BufferPlan, plan_memory
from quire.ops.types import WeightDtype

TRACED_LAYERS = 3
"""Buffers of later layers lie where those of the first, the middle and the last do."""
FLOAT_BYTES, ROUNDED_BYTES = 4, 2
"""Of what operations hand on, and of a GEMM's activations as its kernel reads them (bfloat16; integers are smaller)."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """Stands for a packed weight."""

    out_features: int
    in_features: int
    out_width: int
    reads_amx_bf16: bool


class Host(NamedTuple):
    """The processor that computes a step, as far as buffers depend on it."""

    threads: int
    isa: str
    """An instruction set; empty where operations are composed."""

    @classmethod
    def of(cls, ops: object, threads: int | None = None) -> "Host":
        """That of a provider, perhaps with another number of threads."""
        return cls(threads or ops.threads, ops.isa) if isinstance(ops, CpuOps) else cls(1, "")


def host_step_bytes(spec: DecoderSpec, weight_bytes: int, dtype: WeightDtype, num_tokens: int, host: Host) -> int:
    """Buffers of a step of so many tokens; its logits are not among them.

    Args:
        weight_bytes: of all weights; those of a layer take their share.
        dtype: of weights that are not quantised.
    """
    few = replace(spec, layers=spec.layers[:TRACED_LAYERS])
    parameters = decoder_parameters(few, NameMap())
    of_layer = sum(one.size for name, one in parameters.items() if name.startswith("0."))
    num_weights = sum(one.size for one in parameters.values()) + of_layer * (spec.num_layers - few.num_layers)
    layer_bytes = weight_bytes * of_layer // num_weights
    # AMX multiplies them as they are: then nothing but what attention gives is rounded on its way into a GEMM.
    is_amx_bf16 = host.isa == "amx" and dtype == "bfloat16" and round(weight_bytes / num_weights) == 2
    plan, rounded = _plan(few, parameters, is_amx_bf16), [spec.num_heads * spec.head_dim]
    if not is_amx_bf16:
        rounded += spec.hidden_size, spec.intermediate_size
    local = FLOAT_BYTES * plan.local_floats + ROUNDED_BYTES * max(rounded)
    whole = FLOAT_BYTES * plan.persistent_floats * num_tokens
    return whole + local * tokens_in_work(num_tokens, host.threads, layer_bytes)


def _plan(spec: DecoderSpec, parameters: Mapping[str, Parameter], reads_amx_bf16: bool) -> BufferPlan:
    """Of the whole step, as it is compiled for the CPU."""
    weights = {name: _stand_in(one, reads_amx_bf16) for name, one in parameters.items()}
    plans: list[BufferPlan] = []
    ops = SimpleNamespace(
        memory=lambda: None,
        array=lambda values, dtype: np.asarray(values, dtype),
        compile=lambda forward: plans.append(plan_memory(fuse(trace(forward)))),
    )
    Decoder(spec, cast(Mapping[str, Any], weights), cast(Any, ops), "float32", 1, 0)
    return plans[-1]


def _stand_in(parameter: Parameter, reads_amx_bf16: bool) -> Any:
    shape = parameter.weight.shape
    if len(shape) == 1:
        return (np.zeros(shape, np.float32),) * 2
    out, inputs = shape
    return _Shape(out, inputs, out // 2 if parameter.kind == "gated_linear" else out, reads_amx_bf16)
