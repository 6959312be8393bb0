"""Packed weights are written, mapped by another process and compute the same bits; what does not fit is refused."""

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quire.ops.packed import ALIGNMENT, PackedHeader
from quire.ops.select import instruction_sets
from tests.conftest import PATIENCE_S
from tests.ops.packed_files import aligned_copy, host_bytes, make_ops, packed_weights, results, write

PROVIDERS = [*instruction_sets(), "reference", "cuda"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_another_process_maps_the_file_and_computes_the_same_bits(provider: str, tmp_path: Path) -> None:
    ops = make_ops(provider)
    weights = dict(packed_weights(ops))
    states = {name: ops.packed_state(packed) for name, packed in weights.items()}
    write(tmp_path, states)
    command = [sys.executable, "-m", "tests.ops.packed_files", provider, str(tmp_path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    for name, packed in weights.items():
        assert (tmp_path / name).read_bytes() == results(ops, name, packed), name
    formats = {state.header.format for state in states.values()}
    assert {"float32", *ops.formats} <= formats


@pytest.mark.parametrize("provider", [*instruction_sets(), "reference"])
def test_mapped_memory_is_not_copied_and_lives_as_long_as_the_weight(provider: str, tmp_path: Path) -> None:
    ops = make_ops(provider)
    packed = ops.pack_linear(np.ones((5, 7), np.float32), np.ones(5, np.float32), "float32")
    state = ops.packed_state(packed)
    write(tmp_path, {"weight": state})
    with (tmp_path / "weights.bin").open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    size = len(host_bytes(state.buffers[0]))
    second = -(-size // ALIGNMENT) * ALIGNMENT
    views = [memoryview(memory)[:size], memoryview(memory)[second : second + len(host_bytes(state.buffers[1]))]]
    mapped = ops.map_packed(state.header, views)
    address = np.frombuffer(views[0], np.uint8).ctypes.data
    assert np.frombuffer(ops.packed_state(mapped).buffers[0], np.uint8).ctypes.data == address
    del views
    with pytest.raises(BufferError):
        memory.close()  # the weight holds it
    x = np.ones((2, 7), np.float32)
    assert np.array_equal(ops.linear(x, mapped), np.full((2, 5), 8, np.float32))
    del mapped
    memory.close()


def before_a_forbidden_page(buffer: Any) -> Any:
    """A copy of a buffer that ends where reading on is a fault."""
    data = np.frombuffer(buffer, np.uint8)
    end = -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, end + mmap.PAGESIZE), np.uint8)
    memory[end - len(data) : end] = data
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(memory.ctypes.data + end), mmap.PAGESIZE, 0) == 0
    return memory[end - len(data) : end]


@pytest.mark.parametrize("provider", instruction_sets())
def test_no_kernel_reads_past_mapped_memory(provider: str) -> None:
    """A mapped file may end where its last weight does."""
    ops = make_ops(provider)
    for name, packed in packed_weights(ops):
        state = ops.packed_state(packed)
        mapped = ops.map_packed(state.header, [before_a_forbidden_page(buffer) for buffer in state.buffers])
        assert results(ops, name, mapped) == results(ops, name, packed), name


def test_tensors_of_the_device_are_mapped_as_they_are() -> None:
    """bfloat16 too, with which Triton's interpreter does not compute."""
    ops = make_ops("cuda")
    weight = np.arange(35, dtype=np.float32).reshape(5, 7).astype(ml_dtypes.bfloat16)
    for _, packed in [*packed_weights(ops), ("bfloat16", ops.pack_linear(weight, None, "bfloat16"))]:
        state = ops.packed_state(packed)
        mapped = ops.map_packed(state.header, state.buffers)
        assert mapped.weight.data_ptr() == packed.weight.data_ptr() and mapped.dtype == packed.dtype
        assert ops.packed_state(mapped).header == state.header
    copied = ops.map_packed(state.header, [aligned_copy(buffer) for buffer in state.buffers])
    assert (state.header.format, copied.weight.tolist()) == ("bfloat16", packed.weight.tolist())


def test_a_state_is_a_view_that_outlives_its_weight() -> None:
    ops = make_ops(instruction_sets()[0])
    state = ops.packed_state(ops.pack_linear(np.ones((40, 64), np.float32), None, "float32"))
    assert state.buffers[0].readonly and state.buffers[0].tobytes().count(b"\0\0\x80?") == 40 * 64


PAIRED = ("avx512_bf16", "amx")
"""They have pairs of bfloat16 in one order, the others in another."""


@pytest.mark.parametrize(
    ("writer", "reader"),
    [(a, b) for a in instruction_sets() for b in instruction_sets() if (a in PAIRED) != (b in PAIRED)],
)
def test_a_layout_of_another_instruction_set_is_refused_and_a_shared_one_is_not(writer: str, reader: str) -> None:
    one, other = make_ops(writer), make_ops(reader)
    for name, packed in packed_weights(one):
        state = one.packed_state(packed)
        if state.header.format == "bfloat16":
            with pytest.raises(ValueError, match=r"packed weight: layout is (panels|amx_bf16), not .*" + reader):
                other.map_packed(state.header, state.buffers)
        else:
            assert other.packed_state(other.map_packed(state.header, state.buffers)).header == state.header, name


Change = Callable[[PackedHeader], PackedHeader]
SIZE = "packed weight: size of|group_size is|out of range|more bytes than|more inputs than"
WRONG: dict[str, tuple[Change, str]] = {
    "version": (lambda h: replace(h, version=h.version + 1), "version is"),
    "provider": (lambda h: replace(h, provider="disk"), "provider is"),  # type: ignore[arg-type]
    "layout": (lambda h: replace(h, layout="columns"), "layout is"),
    "format": (lambda h: replace(h, format="int3"), "format is"),
    "out_features": (lambda h: replace(h, out_features=h.out_features + 64), SIZE),
    "out_features of 2^40": (lambda h: replace(h, out_features=2**40), SIZE),
    "out_features of 2^64": (lambda h: replace(h, out_features=2**64), SIZE),
    "out_features below zero": (lambda h: replace(h, out_features=-1), SIZE),
    "in_features": (lambda h: replace(h, in_features=h.in_features + 128), SIZE),
    "in_features of 2^31 - 1": (lambda h: replace(h, in_features=2**31 - 1), SIZE),
    "both of 2^31 - 2": (lambda h: replace(h, in_features=2**31 - 2, out_features=2**31 - 2), SIZE),
    "group_size": (lambda h: replace(h, group_size=48), "group_size is"),
    "dtype": (lambda h: replace(h, dtype="int3"), "dtype is"),
    "another dtype": (
        lambda h: replace(h, dtype="float16" if h.provider != "cuda" and h.dtype == "float32" else "int3"),
        "dtype is|format is",
    ),
    "out_features of another type": (lambda h: replace(h, out_features=70.0), "out_features is"),  # type: ignore[arg-type]
    "gated of another type": (lambda h: replace(h, gated=0), "gated is"),  # type: ignore[arg-type]
    "format of another type": (lambda h: replace(h, format=[]), "format is"),  # type: ignore[arg-type]
    "scale_dtype": (lambda h: replace(h, scale_dtype="bfloat16"), "scale_dtype is"),
    "another scale_dtype": (
        lambda h: replace(h, scale_dtype="float16" if h.scale_dtype == "float32" else "float32"),
        "scale_dtype is|size of",
    ),
    "has_bias": (lambda h: replace(h, has_bias=not h.has_bias), "number of buffers is"),
}


@pytest.mark.parametrize("provider", [instruction_sets()[0], instruction_sets()[-1], "reference", "cuda"])
@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_header_is_refused_by_its_field(field: str, provider: str) -> None:
    ops = make_ops(provider)
    change, message = WRONG[field]
    for _, packed in packed_weights(ops):
        state = ops.packed_state(packed)
        with pytest.raises(ValueError, match=message):
            ops.map_packed(change(state.header), [aligned_copy(buffer) for buffer in state.buffers])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_wrong_buffers_are_refused(provider: str) -> None:
    ops = make_ops(provider)
    for _, packed in packed_weights(ops):
        state = ops.packed_state(packed)
        good = [aligned_copy(buffer) for buffer in state.buffers]
        ops.map_packed(state.header, good)
        for i, buffer in enumerate(good):
            for wrong, message in [
                (buffer[:-1], "size of"),
                (np.append(buffer, np.uint8(0)), "size of"),
                (aligned_copy(buffer, 4), "alignment of"),
                (np.repeat(buffer, 2)[::2], "a buffer is not"),
                ("text", "a buffer is not"),
                (None, "a buffer is not"),
            ]:
                with pytest.raises(ValueError, match=message):
                    ops.map_packed(state.header, [*good[:i], wrong, *good[i + 1 :]])
        for buffers in ([], good[:-1], [*good, good[0]]):
            with pytest.raises(ValueError, match="number of buffers"):
                ops.map_packed(state.header, buffers)
