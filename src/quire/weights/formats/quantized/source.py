"""A quantised checkpoint as a `WeightSource`: matrices are unpacked while they are read, or given as they are where one
of the engine's formats holds them exactly."""

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quire.models.parameters import Concatenated, Parameter
from quire.ops.types import E4M3_FORMATS, FORMATS, QuantizedFormat, QuantizedWeight, QuantSpec, WeightDtype
from quire.outputs import Decision
from quire.quant.types import joined, quantized_bytes
from quire.weights.formats.quantized.layouts import find_quantized
from quire.weights.formats.quantized.scheme import AS_FLOAT, Quantization
from quire.weights.formats.quantized.tensors import E4M3, Grid, QuantizedTensor, fitting
from quire.weights.formats.safetensors import CheckpointWeights
from quire.weights.source import StoredMatrix, Target, TensorInfo

_DTYPES: dict[WeightDtype, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
_CACHE_SCALES = (".k_scale", ".v_scale", ".kv_scale", ".k_proj.output_scale", ".v_proj.output_scale")


class QuantizedWeights:
    """The tensors of a quantised checkpoint under the names that they had before. Closing it is its checkpoint's."""

    def __init__(self, checkpoint: CheckpointWeights, quantization: Quantization, target: Target) -> None:
        """
        Raises:
            ModelFileError: the config and the tensors disagree, or a part of a matrix is missing or does not fit.
        """
        self._checkpoint, self._quantization, self._target = checkpoint, quantization, target
        self._found = find_quantized(checkpoint, quantization)
        self._kept: dict[Concatenated, QuantSpec] = {}
        self._kept_as: Counter[str] = Counter()
        self._unpacked: Counter[str] = Counter()
        self._honoured = 0
        self._bytes: Counter[str] = Counter()
        self._named = self._names()

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors of the model; those of which a quantised one is made are hidden."""
        return self._named

    @property
    def unused(self) -> tuple[str, ...]:
        """Biases of quantised modules that are zero: some tools write one for every module."""
        names = (f"{name.removesuffix('weight')}bias" for name in self._found)
        there = (name for name in names if name in self._checkpoint.tensors)
        return tuple(name for name in there if not np.any(self._checkpoint.file_of(name).read(name)))

    def size_bytes(self, parameter: Parameter) -> int:
        """Bytes of a parameter's tensors in their files."""
        names = [name for array in parameter.arrays for name, _ in array.tensors]
        plain = (self._checkpoint.tensors[name] for name in names if name not in self._found)
        packed = sum(self._found[name].num_bytes for name in names if name in self._found)
        return packed + sum(info.end - info.start for info in plain)

    def packed(self, name: str) -> None:
        """A checkpoint holds tensors."""

    def quantized(self, parameter: Parameter) -> QuantSpec | None:
        """The format of the `QuantizedWeight` that a matrix was, once it has been read; None where it was unpacked."""
        return self._kept.get(parameter.weight)

    def vector(self, array: Concatenated) -> NDArray[Any]:
        """`WeightSource.vector`."""
        return self._checkpoint.vector(array)

    def matrix(self, array: Concatenated) -> StoredMatrix:
        """`WeightSource.matrix`. Tensors of which one is no quantised tensor are unpacked together."""
        parts = [self._found.get(name) for name, _ in array.tensors]
        if not any(parts):
            return self._checkpoint.matrix(array)
        grids = [None if part is None else part.grid() for part in parts]
        spec = self._spec(array, parts, grids)
        if isinstance(spec, QuantSpec):
            kept = self._exactly(array, parts, grids, spec)
            if isinstance(kept, str) and spec.format == "int8" and "int8_groups" in self._target.formats:
                kept = self._exactly(array, parts, grids, QuantSpec("int8_groups", 128))  # which has a -128
            if isinstance(kept, QuantizedWeight):
                return kept
            spec = kept
        return self._as_values(array, parts, grids, spec)

    def differ(self, one: str, other: str) -> bool:
        """Whether both tensors are there and have different values. One that is quantised is one of its own."""
        if one in self._found or other in self._found:
            return one in self.tensors and other in self.tensors
        return self._checkpoint.differ(one, other)

    def close(self) -> None:
        """`WeightSource.close`."""
        self._checkpoint.close()

    def decisions(self) -> list[Decision]:
        """What became of the quantised matrices, once all have been read."""
        target, held = self._target, sum(self._kept_as.values())
        schemes = sorted({str(tensor.scheme) for tensor in self._found.values()})
        reasons = [f"{count} stay {name} exactly" for name, count in sorted(self._kept_as.items())]
        if self._unpacked:
            why = ", ".join(f"{reason}: {count}" for reason, count in self._unpacked.most_common())
            reasons.append(f"{self._unpacked.total()} are unpacked to {target.dtype} ({why})")
        sizes = f"{self._bytes['memory'] / 2**20:,.1f} MiB in memory, {self._bytes['files'] / 2**20:,.1f} in the files"
        words = f"{'; '.join(schemes)}: of {held + self._unpacked.total()} matrices {', '.join(reasons)}; {sizes}"
        found = [Decision("checkpoint", self._quantization.method, words)]
        asks = [tensor.scheme.activations for tensor in self._found.values() if tensor.scheme.activations != AS_FLOAT]
        if asks:
            words, is_done = " and ".join(sorted(set(asks))), self._honoured == len(asks)
            less = f"{self._honoured} of {len(asks)} matrices have it, the others take inputs of 16 bits or more"
            why = "as the checkpoint asks" if is_done else f"the checkpoint asks for {words}; {less}"
            found.append(Decision("activations", words if is_done else "finer than asked", why))
        if self._quantization.cache_is_quantized:
            found.append(
                Decision("kv_cache_scheme", "not used", "kv_cache_dtype says what the cache is, with scales of its own")
            )
        return found

    def _names(self) -> Mapping[str, TensorInfo]:
        hidden = {part for tensor in self._found.values() for part in tensor.parts}
        if self._quantization.cache_is_quantized:
            hidden |= {name for name in self._checkpoint.tensors if name.endswith(_CACHE_SCALES)}
        named: dict[str, TensorInfo] = {n: info for n, info in self._checkpoint.tensors.items() if n not in hidden}
        for name, tensor in self._found.items():
            turned = self._target.transposed and tensor.scheme.layout in ("gptq", "awq")
            named[name] = TensorInfo(tensor.shape[::-1] if turned else tensor.shape, str(tensor.scheme))
        return MappingProxyType(named)

    def _spec(
        self, array: Concatenated, parts: list[QuantizedTensor | None], grids: list[Grid | None]
    ) -> QuantSpec | str:
        """The one format that may hold all parts, or why there is none."""
        if self._target.unpack is not None:
            return self._target.unpack
        specs = []
        for part, grid in zip(parts, grids, strict=True):
            if part is None or grid is None:
                return "fused with a matrix that is not quantised"
            if array.transposed and part.scheme.layout in ("packed", "plain"):
                return "rows are inputs"
            specs.append(part.spec(grid, self._target.formats))
        reasons = [spec for spec in specs if isinstance(spec, str)]
        if reasons:
            return reasons[0]
        found = joined([spec for spec in specs if isinstance(spec, QuantSpec)])
        if found is None or found.format not in self._target.formats:
            return "fused with a matrix of another format"
        is_table = any(name in self._target.tables for name, _ in array.tensors)
        if found.group_size is not None and is_table and not self._target.has_blocks:
            return "a table has no groups"
        return found

    def _exactly(
        self, array: Concatenated, parts: list[QuantizedTensor | None], grids: list[Grid | None], spec: QuantSpec
    ) -> QuantizedWeight | str:
        rows, inputs = array.shape
        values = np.empty((rows, inputs), E4M3 if spec.format in E4M3_FORMATS else np.int8)
        size = spec.group_size or inputs
        scales = np.empty((rows, -(-inputs // size)), np.float32)
        minima = np.empty_like(scales) if FORMATS[spec.format].has_minima else None
        first = 0
        for part, grid in zip(parts, grids, strict=True):
            assert part is not None and grid is not None
            last = first + part.shape[0]
            of_part = None if minima is None else minima[first:last]
            reason = part.keep(grid, spec, values[first:last], scales[first:last], of_part)
            if reason is not None:
                return reason
            first = last
        self._kept[array] = spec
        self._kept_as[spec.format] += len(parts)
        self._honoured += len(parts) if spec.format in ("int8_w8a8", "int4_w4a8", "fp8") else 0
        self._count(parts, quantized_bytes(spec, rows, inputs))
        return QuantizedWeight(spec.format, values, scales, size, minima)

    def _as_values(
        self, array: Concatenated, parts: list[QuantizedTensor | None], grids: list[Grid | None], reason: str
    ) -> NDArray[Any]:
        out: NDArray[Any] = np.empty(array.shape, _DTYPES[self._target.dtype])
        first = 0
        for (name, stated), part, grid in zip(array.tensors, parts, grids, strict=True):
            last = first + (stated[1] if array.transposed else stated[0])
            rows = out[first:last]
            if part is None or grid is None:
                rows[...] = self._checkpoint.read(Concatenated(((name, stated),), array.transposed))
            elif part.shape == rows.shape and not (array.transposed and part.scheme.layout in ("packed", "plain")):
                part.unpack(grid, rows)
            else:
                turned = np.empty(part.shape, out.dtype)
                part.unpack(grid, turned)
                rows[...] = turned.T
            first = last
        self._unpacked[reason] += sum(part is not None for part in parts)
        self._count(parts, sum(part.shape[0] * part.shape[1] for part in parts if part is not None) * out.itemsize)
        return out

    def _count(self, parts: list[QuantizedTensor | None], memory: int) -> None:
        self._bytes["memory"] += memory
        self._bytes["files"] += sum(part.num_bytes for part in parts if part is not None)


def foreseen(
    quantization: Quantization, formats: tuple[QuantizedFormat, ...], parameter: Parameter
) -> QuantSpec | None:
    """What a matrix will stay, as far as the config tells; None where it is unpacked, or is no linear layer."""
    if parameter.kind not in ("linear", "gated_linear"):
        return None
    inputs, specs = parameter.weight.shape[1], []
    for name, _ in parameter.weight.tensors:
        scheme = quantization.scheme_of(name.removesuffix(".weight"))
        if scheme is None:
            return None
        size = min(scheme.block[1] if scheme.block else scheme.group_size or inputs, inputs)
        specs.append(fitting(scheme, size, inputs, not scheme.symmetric, formats))
    kept = [spec for spec in specs if isinstance(spec, QuantSpec)]
    found = joined(kept) if len(kept) == len(specs) else None
    return found if found is not None and found.format in formats else None
