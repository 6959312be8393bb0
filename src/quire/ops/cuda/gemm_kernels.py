"""The kernels of GEMMs: weights of 16 and 32 bits, int8, int4 and fp8, and the quantisation of activations.

A tile is computed on its side, `y^T = W x^T`: the weight is the left operand, which tensor cores take from registers,
where integers become floats; rows are the right one, which may be as narrow as 16. So one row and eight thousand go
through the same matrix instruction, in which an output is one chain of sums over the inputs, from first to last.
"""

import triton
import triton.language as tl


@triton.jit
def _part(x_rows, columns, at, inputs, row_exists, output_exists, EVEN: tl.constexpr):
    """The inputs `at [BLOCK_K]` of weights `[outputs, BLOCK_K]` and of rows `[BLOCK_K, rows]`."""
    if EVEN:
        x = tl.load(x_rows + at[None, :], mask=row_exists, other=0.0)
        w = tl.load(columns + at[None, :], mask=output_exists, other=0.0)
    else:
        x = tl.load(x_rows + at[None, :], mask=row_exists & (at[None, :] < inputs), other=0.0)
        w = tl.load(columns + at[None, :], mask=output_exists & (at[None, :] < inputs), other=0.0)
    return w, tl.trans(x)


@triton.jit
def _nibbles(x_rows, columns, pair, inputs, row_exists, output_exists, GROUP: tl.constexpr):
    """Two groups of inputs: the weights in the low and those in the high halves of bytes, each with its rows."""
    at = tl.arange(0, GROUP)
    low_at, high_at = 2 * pair * GROUP + at[None, :], (2 * pair + 1) * GROUP + at[None, :]
    low_x = tl.load(x_rows + low_at, mask=row_exists & (low_at < inputs), other=0.0)
    high_x = tl.load(x_rows + high_at, mask=row_exists & (high_at < inputs), other=0.0)
    both = tl.load(columns + pair * GROUP + at[None, :], mask=output_exists, other=0)
    return ((both & 15).to(tl.int8) - 8), ((both >> 4).to(tl.int8) - 8), tl.trans(low_x), tl.trans(high_x)


@triton.jit
def _sum_of_groups(
    total, x_rows, columns, scales, output, outputs, inputs, row_exists, output_exists, GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """int4: weights scaled and rounded to the type of the rows, one chain; WHOLE: whole numbers, scaled by groups."""
    for pair in range(0, tl.cdiv(inputs, 2 * GROUP)):
        low, high, low_x, high_x = _nibbles(x_rows, columns, pair, inputs, row_exists, output_exists, GROUP)
        at = scales + 2 * pair * outputs + output
        low_scale = tl.load(at, mask=output < outputs, other=0.0)[:, None]
        high_scale = tl.load(at + outputs, mask=output < outputs, other=0.0)[:, None]
        if WHOLE:
            total += tl.dot(low, low_x).to(tl.float32) * low_scale
            total += tl.dot(high, high_x).to(tl.float32) * high_scale
        else:
            low_w, high_w = low.to(tl.float32) * low_scale, high.to(tl.float32) * high_scale
            total = tl.dot(low_w.to(low_x.dtype), low_x, total, input_precision="ieee")
            total = tl.dot(high_w.to(high_x.dtype), high_x, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["rows", "programs"])
def linear_kernel(
    x, weight, scales, x_scales, bias, y, rows, outputs, inputs, x_stride, w_stride, y_stride, programs, scale, softcap,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Tiles of `BLOCK_M` rows and `BLOCK_N` outputs, every `programs`-th one; `GROUP_M` tiles of rows share the weights
    that lie in the cache."""
    row_tiles, output_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    for tile in range(tl.program_id(0), row_tiles * output_tiles, programs):
        first_tile = tile // (GROUP_M * output_tiles) * GROUP_M
        in_group = tl.minimum(row_tiles - first_tile, GROUP_M)
        place = tile % (GROUP_M * output_tiles)
        row = (first_tile + place % in_group) * BLOCK_M + tl.arange(0, BLOCK_M)
        output = place // in_group * BLOCK_N + tl.arange(0, BLOCK_N)
        row_exists, output_exists = (row < rows)[:, None], (output < outputs)[:, None]
        x_rows = x + row.to(tl.int64)[:, None] * x_stride
        columns = weight + output.to(tl.int64)[:, None] * w_stride
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if (FORMAT == "int4") | (FORMAT == "int4_w4a8"):
            total = _sum_of_groups(
                total, x_rows, columns, scales, output, outputs, inputs, row_exists, output_exists, GROUP,
                FORMAT == "int4_w4a8",
            )  # fmt: skip
        elif FORMAT == "int8_w8a8":
            sums = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
            for first in range(0, inputs, BLOCK_K):
                at = first + tl.arange(0, BLOCK_K)
                part_w, part_x = _part(x_rows, columns, at, inputs, row_exists, output_exists, EVEN)
                sums = tl.dot(part_w, part_x, sums, out_dtype=tl.int32)
            total = sums.to(tl.float32)
        elif FORMAT == "fp8":
            for first in range(0, inputs, BLOCK_K):
                at = first + tl.arange(0, BLOCK_K)
                part_w, part_x = _part(x_rows, columns, at, inputs, row_exists, output_exists, EVEN)
                # Hopper's own sums of fp8 keep 14 bits: after each tile they go into a float32.
                total = tl.dot(part_w, part_x, total, max_num_imprecise_acc=BLOCK_K)
        else:
            for first in range(0, inputs, BLOCK_K):
                at = first + tl.arange(0, BLOCK_K)
                part_w, part_x = _part(x_rows, columns, at, inputs, row_exists, output_exists, EVEN)
                total = tl.dot(part_w.to(part_x.dtype), part_x, total, input_precision="ieee")
        if (FORMAT == "int8_w8a8") | (FORMAT == "int4_w4a8") | (FORMAT == "fp8"):
            total *= tl.load(x_scales + row, mask=row < rows, other=0.0)[None, :]
        if (FORMAT == "int8_w8a8") | (FORMAT == "int8") | (FORMAT == "fp8"):
            total *= tl.load(scales + output, mask=output < outputs, other=0.0)[:, None]
        if BIAS:
            total += tl.load(bias + output, mask=output < outputs, other=0.0)[:, None]
        total *= scale
        if SOFTCAP:
            total = softcap * (1.0 - 2.0 / (tl.exp(2.0 * total / softcap) + 1.0))
        at = y + row.to(tl.int64)[None, :] * y_stride + output[:, None]
        tl.store(at, total.to(y.dtype.element_ty), mask=(row < rows)[None, :] & output_exists)


@triton.jit
def quantize_rows_kernel(x, values, scales, x_stride, size, QMAX: tl.constexpr, TILE: tl.constexpr):
    """One row to signed bytes (`QMAX` 127) or to e4m3 (448): the reference's
    `quantize_activations`."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, TILE)
    mask = at < size
    row_x = tl.load(x + row * x_stride + at, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(row_x), 0)
    nonfinite = (tl.sum((row_x != row_x).to(tl.int32), 0) > 0) | (largest == float("inf"))
    some = (largest >= 7.888609052210118e-31) & ~nonfinite  # 2^-100
    inverse = tl.where(some, QMAX / tl.where(some, largest, 1.0), 0.0)
    scaled = tl.where(some, row_x, 0.0) * inverse
    # Adding 1.5 * 2^23 spacings rounds to the nearest multiple of the spacing, halves to even. That of integers is 1;
    # that of e4m3 an eighth of the power of two in the number, at least 2^-9.
    shift = tl.full([TILE], 12582912.0, tl.float32)
    if QMAX == 448:
        scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)  # the product may have rounded past the largest
        power = (scaled.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        shift = 1572864.0 * tl.maximum(power, 0.015625)
    scaled = (scaled + shift) - shift
    tl.store(values + row * size + at, scaled.to(values.dtype.element_ty), mask=mask)
    tl.store(scales + row, tl.where(nonfinite, float("nan"), largest / QMAX))
