"""A model's weights in the format that each was given: a `WeightSource` over the checkpoint's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.errors import ModelFileError
from quire.models.parameters import Concatenated, Parameter
from quire.ops.types import FORMATS, Provider, QuantizedWeight, QuantSpec
from quire.outputs import Decision
from quire.weights.load import WeightPlan
from quire.weights.source import StoredMatrix, TensorInfo

Floats = NDArray[np.float32]
PARTS = ("values", "scales", "minima")
"""Of a `QuantizedWeight`; the last where its format has it."""


@dataclass(slots=True)
class MatrixPlan:
    """What becomes of one matrix."""

    quant: QuantSpec | None
    reason: str
    input_scales: Floats | None = None
    """Its columns are multiplied by them, `[in]`."""
    output_scales: Floats | None = None
    """Its rows and its bias are divided by them, `[out]`: the inputs of the layer that reads it."""
    is_calibrated: bool = False
    """Its numbers are in the folder."""


@dataclass(slots=True)
class ChosenWeights:
    """The checkpoint of `plan` with a treatment of each matrix. What calibration made lies in `folder` until it is
    read, so that memory holds one matrix. Closing it is the checkpoint's."""

    plan: WeightPlan
    provider: Provider
    folder: Path
    matrices: dict[str, MatrixPlan]
    norm_scales: dict[str, Floats] = field(default_factory=dict)
    """What the factors and the bias of a norm are divided by."""
    remarks: list[Decision] = field(default_factory=list)
    """About all of them."""

    @property
    def unused(self) -> tuple[str, ...]:
        """What is left over was left out when the checkpoint was planned."""
        return ()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The checkpoint's."""
        return self.plan.source.tensors

    def size_bytes(self, parameter: Parameter) -> int:
        """In the checkpoint."""
        return self.plan.source.size_bytes(parameter)

    def packed(self, name: str) -> None:
        """Nothing is."""

    def keep(self, name: str, weight: QuantizedWeight) -> None:
        """Put what calibration made of a matrix into the folder."""
        for part in PARTS:
            array = getattr(weight, part)
            if array is not None:
                np.save(self.folder / f"{name}.{part}.npy", array, allow_pickle=False)
        self.matrices[name].is_calibrated = True

    def matrix(self, array: Concatenated) -> StoredMatrix:
        """`WeightSource.matrix`: quantised as it was decided, or as the checkpoint has it."""
        name = self._name(array)
        treatment = self.matrices.get(name)
        if treatment is None:
            return self.plan.source.matrix(array)
        quant, inputs, outputs = treatment.quant, treatment.input_scales, treatment.output_scales
        if treatment.is_calibrated and quant is not None:
            kept = {
                part: self._kept(name, part) for part in PARTS if part != "minima" or FORMATS[quant.format].has_minima
            }
            values = kept.pop("values")
            if outputs is not None:
                kept = {part: (one / outputs[:, None]).astype(one.dtype) for part, one in kept.items()}
                if not all(np.isfinite(one).all() for one in kept.values()):
                    raise ModelFileError(
                        f"{array.tensors[0][0]}: a scale that was folded is larger than float16 can be"
                    )
            return QuantizedWeight(quant.format, values, group_size=quant.group_size or values.shape[1], **kept)
        weight: Any = self.plan.source.matrix(array)
        if inputs is not None or outputs is not None:
            weight = np.asarray(weight)
            scaled = weight.astype(np.float32) if inputs is None else weight.astype(np.float32) * inputs
            weight = (scaled if outputs is None else scaled / outputs[:, None]).astype(weight.dtype)
        return weight if quant is None else self.provider.quantize(weight, quant)

    def _kept(self, name: str, part: str) -> NDArray[Any]:
        array: NDArray[Any] = np.load(self.folder / f"{name}.{part}.npy", allow_pickle=False)
        return array

    def vector(self, array: Concatenated) -> NDArray[Any]:
        """`WeightSource.vector`: a norm or a bias, divided by what went into the weights that read it."""
        vector = self.plan.source.vector(array)
        name = self._name(array)
        parameter = self.plan.parameters[name]
        if name in self.norm_scales:
            offset = np.float32(self.plan.packer.norm_offset if parameter.kind == "rms_norm" else 0)
            return (vector.astype(np.float32) + offset) / self.norm_scales[name] - offset
        outputs = None if name not in self.matrices else self.matrices[name].output_scales
        return vector if outputs is None else vector.astype(np.float32) / outputs

    def differ(self, one: str, other: str) -> bool:
        """`WeightSource.differ`."""
        return self.plan.source.differ(one, other)

    def close(self) -> None:
        """`WeightSource.close`."""
        self.plan.source.close()

    def quantized(self, parameter: Parameter) -> QuantSpec | None:
        """The format of a matrix; None where it stays as it is."""
        treatment = self.matrices.get(self._name(parameter.weight))
        return None if treatment is None else treatment.quant

    def decisions(self) -> list[Decision]:
        """On all together, then on each linear layer."""
        dtype = self.plan.packer.dtype
        each = [Decision(name, format_name(one.quant, dtype), one.reason) for name, one in self.matrices.items()]
        return [*self.remarks, *each]

    def _name(self, array: Concatenated) -> str:
        return next(name for name, parameter in self.plan.parameters.items() if array in parameter.arrays)


def format_name(quant: QuantSpec | None, dtype: str) -> str:
    """For display."""
    if quant is None:
        return dtype
    return quant.format if quant.group_size is None else f"{quant.format}, groups of {quant.group_size}"
