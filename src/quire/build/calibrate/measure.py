"""What rounding one matrix costs the whole model: the KL divergence of the next token with that matrix alone quantised.

One walk measures many: the batch holds the same contexts again and again, and in the v-th copy the v-th matrix is
quantised. Until the walk comes to it a copy equals the first one and is not computed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.build.calibrate.walk import LINEAR, WalkOps, walk
from quire.models.parameters import Parameter
from quire.ops.types import Activation, Array, Provider, QuantSpec
from quire.quant.calibrate.budget import Choice, format_bytes
from quire.weights.load import Progress, WeightPlan

CONTEXT, NUM_CONTEXTS = 64, 4
MAX_VALUES = 2**28
"""Most numbers in the widest activations of one walk: more matrices than that allows take another walk."""

Rows = NDArray[np.float32]


def measured_choices(
    plan: WeightPlan,
    provider: Provider,
    contexts: Sequence[Sequence[int]],
    names: Sequence[str],
    base: QuantSpec,
    formats: Sequence[QuantSpec],
    progress: Progress | None = None,
) -> dict[str, list[Choice]]:
    """For each of `names` what each of `formats` takes and loses; staying as it is loses nothing.

    Args:
        base: the format whose loss is measured through the whole model. That of another is in proportion to the
            squared error of the matrix's own outputs.
        progress: matrices that the walks have met, and all of them.
    """
    step = max(1, len(contexts) // NUM_CONTEXTS)
    texts = [list(context[:CONTEXT]) for context in contexts[::step][:NUM_CONTEXTS]]
    widest = 2 * max(plan.spec.intermediate_size, plan.spec.hidden_size)
    size = max(1, MAX_VALUES // (sum(map(len, texts)) * widest) - 1)
    found: dict[str, list[Choice]] = {}
    for first in range(0, len(names), size):
        copies = _Copies(plan, provider, texts, names[first : first + size], base, formats)
        losses = copies.losses(lambda met, all_met: progress and progress(len(names) * met // all_met, len(names)))
        for name, loss in losses.items():
            found[name] = _choices(plan.parameters[name], loss, copies.errors[name], base)
    return found


def _choices(parameter: Parameter, loss: float, errors: dict[QuantSpec, float], base: QuantSpec) -> list[Choice]:
    shape = parameter.weight.shape
    scale = loss / errors[base] if errors[base] else 0.0
    quantized = [Choice(quant, format_bytes(quant, *shape), error * scale) for quant, error in errors.items()]
    return [*quantized, Choice(None, format_bytes(None, *shape), 0.0)]


class _Copies:
    def __init__(
        self,
        plan: WeightPlan,
        provider: Provider,
        texts: Sequence[Sequence[int]],
        names: Sequence[str],
        base: QuantSpec,
        formats: Sequence[QuantSpec],
    ) -> None:
        self._plan, self._provider, self._texts, self._names = plan, provider, texts, names
        self._base, self._formats = base, dict.fromkeys((base, *formats))
        self._size = sum(map(len, texts))
        self._met: list[str] = []
        self._progress: Any = None
        self.errors: dict[str, dict[QuantSpec, float]] = {}

    def losses(self, progress: Progress) -> dict[str, float]:
        plan, self._progress = self._plan, progress
        weights = {
            name: name if one.kind in LINEAR else plan.packer.pack(one, plan.source)
            for name, one in plan.parameters.items()
        }
        ops = WalkOps(self._provider, lambda name, x: self._meet(name, x, None), self._meet)
        hidden = walk(plan, weights, ops, [*self._texts] * (1 + len(self._names)))
        head, spec = weights["embedding" if plan.spec.tied_head else "head"], plan.spec
        copies = (
            self._provider.to_numpy(self._provider.logits(rows, head, spec.logits_scale, spec.logits_softcap))
            for rows in hidden.reshape(1 + len(self._names), self._size, -1)
        )
        exact = _log_probs(next(copies))
        return {name: _mean_kl(exact, _log_probs(logits)) for name, logits in zip(self._met, copies, strict=True)}

    def _meet(self, name: str, x: Array, kind: Activation | None) -> Array:
        plan, provider, size = self._plan, self._provider, self._size
        parameter = plan.parameters[name]
        bias = None if parameter.bias is None else plan.source.vector(parameter.bias)
        weight = np.asarray(plan.source.matrix(parameter.weight))

        def product(rows: Array, matrix: Any) -> Array:
            if kind is None:
                return provider.linear(rows, provider.pack_linear(matrix, bias, plan.packer.dtype))
            return provider.gated_linear(rows, provider.pack_gated(matrix, bias, plan.packer.dtype), kind)

        last = (1 + len(self._met)) * size
        exact = product(x[:last], weight)
        y = np.concatenate([exact, np.tile(exact[:size], (len(x) // size - len(self._met) - 1, 1))])
        if name in self._names:
            quantized = {quant: provider.quantize(weight, quant) for quant in self._formats}
            y[last : last + size] = product(x[last : last + size], quantized[self._base])
            self.errors[name] = {
                quant: _error(exact[:size], product(x[:size], one)) for quant, one in quantized.items()
            }
            self._met.append(name)
        self._progress(len(self._met), len(self._names))
        return y


def _error(exact: Rows, other: Rows) -> float:
    return float(np.square(exact.astype(np.float64) - other).mean())


def _log_probs(logits: Rows) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def _mean_kl(exact: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float((np.exp(exact) * (exact - other)).sum(axis=-1).mean())
