"""From one parameter of a source to what the decoder computes with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from quire.errors import ModelFileError
from quire.models.parameters import Parameter
from quire.ops.packed import PackedState, require_field
from quire.ops.types import Array, Provider, QuantizedWeight, QuantSpec, WeightDtype
from quire.quant.types import Scheme, quantized_bytes
from quire.weights.source import WeightSource


@dataclass(frozen=True, slots=True)
class WeightPacker:
    """Packs the parameters of one model for one provider, and knows what they weigh then."""

    ops: Provider
    dtype: WeightDtype
    """Of matrices that are not quantised."""
    scheme: Scheme | None
    norm_offset: float
    """Added to the weight of an RMS norm once, here (Gemma multiplies by `1 + weight`)."""
    foreseen: Callable[[Parameter], QuantSpec | None] | None = None
    """For sizes before anything is read: what a quantised checkpoint's matrix will stay."""

    def pack(self, parameter: Parameter, source: WeightSource) -> Any:
        """Read and pack: a matrix as the provider has it, or `(weight, bias or None)` of a norm, float32 `[size]` each.

        Raises:
            ModelFileError: a file is damaged, or the weight cannot be packed; it names the tensors.
        """
        if parameter.kind in ("rms_norm", "layer_norm"):
            return self._norm(parameter, source)
        # The bias first: a matrix is good only until the next read.
        bias = None if parameter.bias is None else source.vector(parameter.bias)
        weight: Any = source.matrix(parameter.weight)
        try:
            return self._pack_matrix(parameter, weight, bias)
        except ValueError as error:
            tensors = ", ".join(tensor for tensor, _ in parameter.weight.tensors)
            raise ModelFileError(f"{tensors} cannot be packed: {error}") from error

    def map(self, parameter: Parameter, state: PackedState) -> Any:
        """A matrix over memory in which a provider packed it before.

        Raises:
            ModelFileError: it is not this parameter, or it was packed for another provider; it names the field.
        """
        header = state.header
        try:
            shape = header.out_features, header.in_features
            require_field("out_features, in_features", shape, parameter.weight.shape)
            require_field("has_bias", header.has_bias, parameter.bias is not None)
            if header.provider == "cpu":  # the others pack a gate as any rows
                require_field("gated", header.gated, parameter.kind == "gated_linear")
            return self.ops.map_packed(header, state.buffers)
        except ValueError as error:
            text = f"{parameter.weight.tensors[0][0]} cannot be mapped: {error}"
            if "layout is" in str(error):
                text += "; quire build ENGINE --repack -o DIR makes an engine of it for this machine"
            raise ModelFileError(text) from error

    def num_bytes(self, parameter: Parameter, given: QuantSpec | None = None) -> int:
        """Bytes of a parameter once packed: a matrix as stored, vectors in float32. Padding is not counted.

        Args:
            given: what the source had quantised the matrix to.
        """
        vectors = 4 * sum(array.shape[0] for array in parameter.arrays if len(array.shape) == 1)
        if len(parameter.weight.shape) == 1:
            return vectors
        rows, inputs = parameter.weight.shape
        quant = self.quant(parameter, given)
        if quant is None:
            return vectors + rows * inputs * (4 if self.dtype == "float32" else 2)
        return vectors + quantized_bytes(quant, rows, inputs)

    def quant(self, parameter: Parameter, given: QuantSpec | None = None) -> QuantSpec | None:
        """The format of a matrix once packed; None: a plain type. Args as for `num_bytes`."""
        return given or self._quant(parameter) or (self.foreseen and self.foreseen(parameter)) or None

    def _quant(self, parameter: Parameter) -> QuantSpec | None:
        if self.scheme is None or parameter.kind == "positions":
            return None
        return self.scheme.embedding if parameter.kind == "embedding" else self.scheme.linear

    def _pack_matrix(self, parameter: Parameter, weight: Any, bias: Any | None) -> Any:
        quant = self._quant(parameter)
        if quant is not None and not isinstance(weight, QuantizedWeight):
            weight = self.ops.quantize(weight, quant)
        if parameter.kind == "linear":
            return self.ops.pack_linear(weight, bias, self.dtype)
        if parameter.kind == "gated_linear":
            return self.ops.pack_gated(weight, bias, self.dtype)
        return self.ops.pack_embedding(weight, self.dtype)

    def _norm(self, parameter: Parameter, source: WeightSource) -> tuple[Array, Array | None]:
        weight = source.vector(parameter.weight).astype(np.float32)
        if parameter.kind == "rms_norm":
            weight = weight + np.float32(self.norm_offset)
        bias = None if parameter.bias is None else source.vector(parameter.bias).astype(np.float32)
        return self.ops.array(weight, "float32"), None if bias is None else self.ops.array(bias, "float32")
