"""The operations on an NVIDIA GPU.

Activations that go into GEMMs have the type of the weights; residuals, logits and sums are float32. No operation
waits for the device, except `to_numpy`. Tested without a GPU under Triton's interpreter (`TRITON_INTERPRET=1`) with
`device="cpu"`, in float32 and float16.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import array_api_compat.torch
import numpy as np
import torch

from quire.ops import quantize_reference
from quire.ops.composed import ComposedOps
from quire.ops.cuda import attention, gemm, packed_weights, rows, sampling
from quire.ops.cuda.kernel_cache import kernel_cache
from quire.ops.packed import Buffer, PackedHeader, PackedState
from quire.ops.types import (
    BLOCK_FORMATS,
    FORMATS,
    Activation,
    AttentionBatch,
    AttentionSpec,
    CacheDtype,
    CacheShape,
    DeviceMemory,
    Logprobs,
    QuantizedWeight,
    QuantSpec,
    RopeTables,
    SampleBatch,
    WeightDtype,
)
from quire.outputs import Decision

ROUNDED_ELEMENTS = 2**24
"""Weights that are rounded at one time: some ten arrays of 64 MiB."""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class CudaOps(ComposedOps):
    """`device` as torch names it: "cuda", "cuda:1"; "cpu" under the interpreter alone. Without `batch_invariant`
    weights that are not quantised are multiplied by torch's library, whose sums depend on the number of rows."""

    cache_dtypes: tuple[CacheDtype, ...] = get_args(WeightDtype)  # no scales in its kernels

    def __init__(self, device: str, batch_invariant: bool = True) -> None:
        self.device = torch.device(device)
        self._batch_invariant = batch_invariant
        self.name = f"cuda ({torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else 'interpreted'})"
        self.xp: Any = array_api_compat.torch
        # Before compute capability 8.9 there is no GEMM of e4m3.
        with_fp8 = self.device.type == "cpu" or torch.cuda.get_device_capability(self.device) >= (8, 9)
        self.formats = tuple(kind for kind in FORMATS if kind not in BLOCK_FORMATS and (with_fp8 or kind != "fp8"))
        self._capture: tuple[Any, Any] | None = None
        """A stream to capture on, and the memory that all CUDA graphs share: they are replayed one after another."""

    def memory(self) -> DeviceMemory | None:
        if self.device.type == "cpu":
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        allocated = torch.cuda.memory_allocated(self.device)
        cached = torch.cuda.memory_reserved(self.device) - allocated
        return DeviceMemory(total, free + cached, allocated, cached)

    def decisions(self) -> list[Decision]:
        if self.device.type == "cpu":
            return []
        cache = kernel_cache()
        sums_by = "every number of rows has the same sums" if self._batch_invariant else "torch's library multiplies"
        return [
            Decision("batch_invariant", str(self._batch_invariant).lower(), sums_by),
            Decision("kernels", f"{cache.num_compiled} compiled, {cache.num_found} found", f"in {cache.folder}"),
        ]

    def peak_bytes(self, work: Callable[[], object]) -> int:
        if self.device.type == "cpu":
            return super().peak_bytes(work)
        before = int(torch.cuda.memory_allocated(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)
        with _room():
            work()
        torch.cuda.synchronize(self.device)
        return int(torch.cuda.max_memory_allocated(self.device)) - before

    # arrays and weights

    def array(self, values: Any, dtype: str) -> torch.Tensor:
        """From pageable memory through a pinned buffer where there is a device: the copy does not wait."""
        host = np.array(values, dtype=dtype)
        if host.dtype == np.uint64:
            host = host.view(np.int64)  # torch computes little with uint64; kernels read the bits
        tensor = torch.from_numpy(host)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def to_numpy(self, x: torch.Tensor) -> Any:
        return x.detach().cpu().numpy()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph. Not by `torch.cuda.graph`, which collects garbage and empties the allocator each time."""
        if self.device.type == "cpu":
            return super().capture(work)
        if self._capture is None:
            self._capture = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        stream, pool = self._capture
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        replay: Callable[[], None] = graph.replay
        return replay

    def fetch(self, arrays: Sequence[torch.Tensor]) -> Callable[[], list[Any]]:
        """Into pinned memory, behind what was launched so far."""
        if self.device.type == "cpu":
            return super().fetch(arrays)
        pinned = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in arrays]
        for target, x in zip(pinned, arrays, strict=True):
            target.copy_(x, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))

        def wait() -> list[Any]:
            done.synchronize()
            return [target.numpy() for target in pinned]

        return wait

    def quantize(self, weight: Any, quant: QuantSpec) -> QuantizedWeight:
        """On the device, some rows at a time: what it takes besides the weight has a bound. ValueError as in
        `Ops.quantize`, and for a format that is not multiplied here."""
        if quant.format not in self.formats:
            raise ValueError(f"{self.name} does not multiply {quant.format!r}")
        host = np.asarray(weight)
        inputs = host.shape[1]
        count = max(1, ROUNDED_ELEMENTS // max(1, inputs))
        kind = torch.float8_e4m3fn if quant.format == "fp8" else torch.int8
        values, scales = [], []
        some: torch.Tensor
        with _room():
            for first in range(0, max(1, len(host)), count):
                rows = gemm.to_tensor(np.ascontiguousarray(host[first : first + count])).to(self.device)
                some, some_scales, _ = quantize_reference.rounded(self.xp, rows.to(torch.float32), quant)
                values.append(some.to(kind))
                scales.append(some_scales)
            size = quant.group_size or inputs
            return QuantizedWeight(quant.format, torch.cat(values), torch.cat(scales), size)

    def pack_linear(self, weight: Any, bias: Any | None, dtype: WeightDtype) -> gemm.CudaLinear:
        with _room():
            return gemm.pack(weight, bias, _DTYPES[dtype], self.device)

    def pack_embedding(self, table: Any, dtype: WeightDtype) -> gemm.CudaLinear:
        """See `Ops.pack_embedding`. ValueError for a table that is quantised by groups."""
        if isinstance(table, QuantizedWeight) and table.group_size != table.values.shape[1]:
            raise ValueError("a table is quantised by rows, not by groups")
        return self.pack_linear(table, None, dtype)

    def packed_state(self, packed: gemm.CudaLinear) -> PackedState:
        """The tensors as they lie on the device."""
        return packed_weights.packed_state(packed)

    def map_packed(self, header: PackedHeader, buffers: Sequence[Buffer]) -> gemm.CudaLinear:
        with _room():
            return packed_weights.map_packed(header, buffers, self.device, self.formats)

    # GEMMs

    def linear(self, x: torch.Tensor, packed: gemm.CudaLinear) -> torch.Tensor:
        if self._batch_invariant or packed.format != "plain":
            return gemm.linear(x, packed, packed.dtype)
        return gemm.cublas_linear(x, packed)

    def embed(self, token_ids: torch.Tensor, packed: gemm.CudaLinear, scale: float = 1.0) -> torch.Tensor:
        return rows.embed(packed.weight, packed.scales, token_ids, scale)

    def logits(
        self, x: torch.Tensor, packed: gemm.CudaLinear, scale: float = 1.0, softcap: float | None = None
    ) -> torch.Tensor:
        return gemm.linear(x, packed, torch.float32, scale, softcap)

    # norms: what goes into a GEMM has the type of `x`, unless that is a residual

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return rows.norm(x, None, weight, None, eps, False, x.dtype)

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return rows.norm(x, residual, weight, None, eps, False, x.dtype)

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        return rows.norm(x, None, weight, bias, eps, True, x.dtype)

    # positions and attention

    def make_cache(self, shape: CacheShape) -> torch.Tensor:
        dims = (shape.num_layers, 2, shape.num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of what loading left: the cache is to have it
        with _room():
            return torch.zeros(dims, dtype=_DTYPES[shape.dtype], device=self.device)

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: torch.Tensor,
        layer: int,
        batch: AttentionBatch,
        spec: AttentionSpec,
        rope: RopeTables | None = None,
    ) -> torch.Tensor:
        return attention.attention(q, k, v, cache, layer, batch, spec, rope)

    def block_bytes(self, cache: torch.Tensor, block: int, layer: int) -> bytes:
        return bytes(cache[layer, :, block].contiguous().view(torch.uint8).cpu().numpy().tobytes())

    def release_blocks(self, cache: torch.Tensor, first: int, number: int) -> None:
        """The device's memory is reserved as a whole."""

    # element by element

    def activation(self, x: torch.Tensor, kind: Activation) -> torch.Tensor:
        return rows.activation(x, kind, multiply=False)

    def activation_multiply(self, gate_up: torch.Tensor, kind: Activation) -> torch.Tensor:
        return rows.activation(gate_up, kind, multiply=True)

    # choosing tokens

    def sample(self, logits: torch.Tensor, batch: SampleBatch) -> torch.Tensor:
        return sampling.sample(logits, batch)

    def logprobs(self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Logprobs:
        return sampling.logprobs(logits, token_ids, num_top)

    def rows_finite(self, logits: torch.Tensor) -> torch.Tensor:
        bad = (torch.isnan(logits) | (logits == torch.inf)).any(-1)
        return (logits > -torch.inf).any(-1) & ~bad

    def zero_nonfinite_rows(self, logits: torch.Tensor) -> torch.Tensor:
        finite = self.rows_finite(logits)
        logits.masked_fill_(~finite[:, None], 0.0)  # without asking whether there is any
        return finite


@contextmanager
def _room() -> Iterator[None]:
    """The device has no room: said as Python says it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error).partition("\n")[0]) from error
