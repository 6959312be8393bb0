"""The operations on an NVIDIA GPU.

Activations that go into products have the type of the weights; residuals, logits and sums are float32. No operation
waits for the device, except `to_numpy`. Tested without a GPU under Triton's interpreter (`TRITON_INTERPRET=1`) with
`device="cpu"`, in float32 and float16.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import array_api_compat.torch
import numpy as np
import torch

from quire.ops import quantize_reference
from quire.ops.composed import ComposedOps
from quire.ops.cuda import attention, packed_weights, products, rows, sampling
from quire.ops.cuda.kernel_cache import kernel_cache
from quire.ops.packed import Buffer, PackedHeader, PackedState
from quire.ops.types import (
    INPUT_LEVELS,
    Activation,
    Array,
    AttentionBatch,
    AttentionSpec,
    CacheShape,
    DeviceMemory,
    Logprobs,
    QuantizedWeight,
    RopeTables,
    Rounding,
    SampleBatch,
    StorageType,
)
from quire.outputs import Decision

ROUNDED_ELEMENTS = 2**24
"""Weights that are rounded at one time: some ten arrays of 64 MiB."""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class CudaOps(ComposedOps):
    """`device` as torch names it: "cuda", "cuda:1"; "cpu" under the interpreter alone. Without `batch_invariant`
    weights that are not quantised are multiplied by torch's library, whose sums depend on the number of rows."""

    def __init__(self, device: str, batch_invariant: bool = True) -> None:
        self.device = torch.device(device)
        self._batch_invariant = batch_invariant
        self.name = f"cuda ({torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else 'interpreted'})"
        self.xp: Any = array_api_compat.torch
        # Before compute capability 8.9 there is no product of e4m3.
        with_fp8 = self.device.type == "cpu" or torch.cuda.get_device_capability(self.device) >= (8, 9)
        self.formats = tuple(kind for kind in INPUT_LEVELS if with_fp8 or kind != "fp8")
        self._recorder: tuple[Any, Any] | None = None
        """A stream to record on, and the memory that all recordings share: they are replayed one after another."""

    def memory(self) -> DeviceMemory | None:
        if self.device.type == "cpu":
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_allocated(self.device)
        kept = torch.cuda.memory_reserved(self.device) - held
        return DeviceMemory(total, free + kept, held, kept)

    def decisions(self) -> list[Decision]:
        if self.device.type == "cpu":
            return []
        cache = kernel_cache()
        products_by = (
            "every number of rows has the same sums" if self._batch_invariant else "torch's library multiplies"
        )
        return [
            Decision("batch_invariant", str(self._batch_invariant).lower(), products_by),
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

    def array(self, values: Any, dtype: str) -> Array:
        """From pageable memory through a pinned buffer where there is a device: the copy does not wait."""
        host = np.array(values, dtype=dtype)
        if host.dtype == np.uint64:
            host = host.view(np.int64)  # torch computes little with uint64; kernels read the bits
        tensor = torch.from_numpy(host)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def to_numpy(self, x: Array) -> Any:
        return x.detach().cpu().numpy()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph. Not by `torch.cuda.graph`, which collects garbage and empties the allocator each time."""
        if self.device.type == "cpu":
            return super().record(work)
        if self._recorder is None:
            self._recorder = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        stream, pool = self._recorder
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

    def fetch(self, arrays: Sequence[Array]) -> Callable[[], list[Any]]:
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

    def quantize(self, weight: Any, rounding: Rounding) -> QuantizedWeight:
        """On the device, some rows at a time: what it takes besides the weight has a bound."""
        host = np.asarray(weight)
        inputs = host.shape[1]
        count = max(1, ROUNDED_ELEMENTS // max(1, inputs))
        kind = torch.float8_e4m3fn if rounding.format == "fp8" else torch.int8
        values, scales = [], []
        with _room():
            for first in range(0, max(1, len(host)), count):
                rows = products.to_tensor(np.ascontiguousarray(host[first : first + count])).to(self.device)
                part, part_scales = quantize_reference.rounded(self.xp, rows.to(torch.float32), rounding)
                values.append(part.to(kind))
                scales.append(part_scales)
            size = rounding.group_size or inputs
            return QuantizedWeight(rounding.format, torch.cat(values), torch.cat(scales), size)

    def pack_linear(self, weight: Any, bias: Any | None, storage: StorageType) -> products.CudaLinear:
        with _room():
            return products.pack(weight, bias, _DTYPES[storage], self.device)

    def pack_embedding(self, table: Any, storage: StorageType) -> products.CudaLinear:
        if isinstance(table, QuantizedWeight) and table.group_size != table.values.shape[1]:
            raise ValueError("a table is quantised by rows, not by groups")
        return self.pack_linear(table, None, storage)

    def packed_state(self, packed: products.CudaLinear) -> PackedState:
        """The tensors as they lie on the device."""
        return packed_weights.packed_state(packed)

    def map_packed(self, header: PackedHeader, buffers: Sequence[Buffer]) -> products.CudaLinear:
        with _room():
            return packed_weights.map_packed(header, buffers, self.device, self.formats)

    # products

    def linear(self, x: Array, packed: products.CudaLinear) -> Array:
        if self._batch_invariant or packed.format != "plain":
            return products.linear(x, packed, packed.dtype)
        return products.cublas_linear(x, packed)

    def embed(self, token_ids: Array, packed: products.CudaLinear, scale: float = 1.0) -> Array:
        return rows.embed(packed.weight, packed.scales, token_ids, scale)

    def logits(self, x: Array, packed: products.CudaLinear, scale: float = 1.0, softcap: float | None = None) -> Array:
        return products.linear(x, packed, torch.float32, scale, softcap)

    # norms: what goes into a product has the type of `x`, unless that is a residual

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return rows.norm(x, None, weight, None, eps, False, x.dtype)

    def add_rms_norm(self, x: Array, residual: Array, weight: Array, eps: float) -> Array:
        return rows.norm(x, residual, weight, None, eps, False, x.dtype)

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
        return rows.norm(x, None, weight, bias, eps, True, x.dtype)

    # positions and attention

    def rope(self, x: Array, positions: Array, cos: Array, sin: Array) -> None:
        rows.rope(x, positions, cos, sin)

    def make_cache(self, shape: CacheShape) -> Array:
        dims = (shape.num_layers, 2, shape.num_blocks, shape.num_kv_heads, shape.block_size, shape.head_dim)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of what loading left: the cache is to have it
        with _room():
            return torch.zeros(dims, dtype=_DTYPES[shape.storage], device=self.device)

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: Array,
        layer: int,
        batch: AttentionBatch,
        spec: AttentionSpec,
        rope: RopeTables | None = None,
    ) -> Array:
        return attention.attention(q, k, v, cache, layer, batch, spec, rope)

    def copy_blocks(self, cache: Array, source_ids: Array, target_ids: Array) -> None:
        rows.copy_blocks(cache, source_ids, target_ids)

    def block_bytes(self, cache: Array, block: int, layer: int) -> bytes:
        return bytes(cache[layer, :, block].contiguous().view(torch.uint8).cpu().numpy().tobytes())

    # element by element

    def activation(self, x: Array, kind: Activation) -> Array:
        return rows.activation(x, kind, multiply=False)

    def activation_multiply(self, gate_up: Array, kind: Activation) -> Array:
        return rows.activation(gate_up, kind, multiply=True)

    # choosing tokens

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        return sampling.sample(logits, batch)

    def logprobs(self, logits: Array, token_ids: Array, num_top: int) -> Logprobs:
        return sampling.logprobs(logits, token_ids, num_top)

    def rows_finite(self, logits: Array) -> Array:
        broken = (torch.isnan(logits) | (logits == torch.inf)).any(-1)
        return (logits > -torch.inf).any(-1) & ~broken

    def clear_broken(self, logits: Array) -> Array:
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
