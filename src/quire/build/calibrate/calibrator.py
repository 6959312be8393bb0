"""The walk that quantises: each matrix by GPTQ, on the inputs that the quantised layers before it give it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.build.calibrate.chosen import ChosenWeights
from quire.build.calibrate.links import Link, input_link
from quire.build.calibrate.walk import LINEAR, WalkOps, walk
from quire.errors import ModelFileError
from quire.ops.types import Activation, Array, Provider, QuantizedWeight, QuantSpec
from quire.quant.calibrate.gptq import gptq
from quire.quant.calibrate.smooth import HALF_LIMIT, LIMIT, channel_scales
from quire.weights.load import Progress

CHUNK, PANEL = 2048, 256
"""Tokens and inputs that are multiplied at once for a Hessian."""
SAMPLE = 512
"""Tokens on which candidates are compared."""
WORTH = 0.5
"""Scales of channels are taken where they leave at most this much of the error: what they gain beyond that, GPTQ
gains too, and more (docs/design/formats.md)."""

Floats = NDArray[np.float32]


class Calibrator:
    """Quantises the matrices of `chosen` that have a format, in the order in which the model computes them."""

    def __init__(self, chosen: ChosenWeights, provider: Provider, progress: Progress | None) -> None:
        self._chosen, self._provider, self._progress = chosen, provider, progress
        self._plan = chosen.plan
        self._done_bytes = 0
        self._all_bytes = sum(
            self._plan.source.size_bytes(one) for one in self._plan.parameters.values() if one.kind in LINEAR
        )

    def run(self, contexts: Sequence[Sequence[int]]) -> None:
        """Walk once over the contexts.

        Raises:
            ModelFileError: a weight or an activation is not finite; it names the tensors.
        """
        plan = self._plan
        weights = {
            name: name if one.kind in LINEAR else plan.packer.pack(one, plan.source)
            for name, one in plan.parameters.items()
        }
        walk(plan, weights, WalkOps(self._provider, lambda name, x: self._meet(name, x, None), self._meet), contexts)

    def _meet(self, name: str, x: Array, kind: Activation | None) -> Array:
        plan, provider, treatment = self._plan, self._provider, self._chosen.matrices[name]
        parameter = plan.parameters[name]
        bias = None if parameter.bias is None else plan.source.vector(parameter.bias)
        weight: Any = np.asarray(plan.source.matrix(parameter.weight))
        if treatment.quant is not None:
            weight = weight.astype(np.float32)
            try:
                x, weight = self._calibrated(name, x, weight, treatment.quant)
            except ValueError as error:
                tensors = ", ".join(tensor for tensor, _ in parameter.weight.tensors)
                raise ModelFileError(f"{tensors} cannot be calibrated: {error}") from error
        self._done_bytes += plan.source.size_bytes(parameter)
        if self._progress is not None:
            self._progress(self._done_bytes, self._all_bytes)
        if kind is None:
            return provider.linear(x, provider.pack_linear(weight, bias, plan.packer.dtype))
        return provider.gated_linear(x, provider.pack_gated(weight, bias, plan.packer.dtype), kind)

    def _calibrated(self, name: str, x: Floats, weight: Floats, quant: QuantSpec) -> tuple[Floats, QuantizedWeight]:
        scales = self._scale_channels(name, x, weight, quant)
        if scales is not None:
            x, weight = x / scales, weight * scales
        return x, self._quantized(name, x, weight, quant)

    def _scale_channels(self, name: str, x: Floats, weight: Floats, quant: QuantSpec) -> Floats | None:
        """The scales of the inputs that leave the least error, noted where they come from and where they go; None
        without."""
        link = input_link(self._plan.spec, name)
        if link is None:
            return None
        sample = x[:: max(1, len(x) // SAMPLE)]
        exact = self._product(sample, weight)
        best, reason = WORTH * self._error(exact, self._product(sample, self._provider.quantize(weight, quant))), ""
        found: Floats | None = None
        of_inputs, of_weights = (_shared(np.abs(one).max(axis=0), link) for one in (x, weight))
        limit = HALF_LIMIT if quant.half_scales else LIMIT
        for alpha, scales in channel_scales(of_inputs, of_weights, limit):
            rounded = self._provider.quantize(weight * scales, quant)
            error = self._error(exact, self._product(sample / scales, rounded))
            if error < best:
                best, found, reason = error, scales, f"; channels scaled by 2^{np.log2(scales.min()):.0f} to "
                reason += f"2^{np.log2(scales.max()):.0f} (alpha {alpha}), folded into {link.source}"
        if found is not None:
            self._fold(name, link, found)
            self._chosen.matrices[name].reason += reason
        return found

    def _fold(self, name: str, link: Link, scales: Floats) -> None:
        self._chosen.matrices[name].input_scales = scales
        if link.outputs is None:
            self._chosen.norm_scales[link.source] = scales
            return
        outputs = np.ones(self._plan.parameters[link.source].weight.shape[0], np.float32)
        outputs[link.outputs] = scales
        self._chosen.matrices[link.source].output_scales = outputs

    def _quantized(self, name: str, x: Floats, weight: Floats, quant: QuantSpec) -> QuantizedWeight:
        found = gptq(weight, self._hessian(x), quant, self._product)
        nearest = self._provider.quantize(weight, quant)
        self._chosen.keep(name, found)
        sample = x[:: max(1, len(x) // SAMPLE)]
        exact = self._product(sample, weight)
        size = float(np.square(exact.astype(np.float64)).mean()) or 1.0
        ours, plain = (self._error(exact, self._product(sample, one)) / size for one in (found, nearest))
        treatment = self._chosen.matrices[name]
        treatment.reason = f"GPTQ loses {ours:.1e} of its outputs, rounding to nearest {plain:.1e}{treatment.reason}"
        return found

    def _hessian(self, x: Floats) -> NDArray[np.float64]:
        """`x^T x / tokens`, by panels of its lower half."""
        inputs = x.shape[1]
        found = np.zeros((inputs, inputs))
        for start in range(0, len(x), CHUNK):
            columns = np.ascontiguousarray(x[start : start + CHUNK].T)
            for first in range(0, inputs, PANEL):
                panel = slice(first, min(first + PANEL, inputs))
                found[first:, panel] += self._product(columns[first:], columns[panel])
        lower = np.tril(found)
        full: NDArray[np.float64] = (lower + np.tril(lower, -1).T) / len(x)
        return full

    def _product(self, x: Floats, weight: Any) -> Floats:
        product: Floats = self._provider.linear(
            np.ascontiguousarray(x), self._provider.pack_linear(weight, None, "float32")
        )
        return product

    @staticmethod
    def _error(exact: Floats, other: Floats) -> float:
        return float(np.square(exact.astype(np.float64) - other).mean())


def _shared(sizes: Floats, link: Link) -> Floats:
    """The largest of the channels that come from one output: they have one scale."""
    if link.outputs is None:
        return sizes
    largest = np.zeros(int(link.outputs.max()) + 1, np.float32)
    np.maximum.at(largest, link.outputs, sizes)
    return largest[link.outputs]
