// The rotation of one head by its position (RoFormer, arXiv 2104.09864): used by attention, for q and for k.
#pragma once

#include "runtime/simd.h"

namespace quire::QUIRE_ISA {

// The first 2 * half dimensions of x, by halves: (a, b) -> (a cos - b sin, b cos + a sin). 
inline void rotate_head(const float* x, float* y, const float* cos, const float* sin, int64_t half) {
    const float* b = x + half;
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const Floats c = load(cos + i), s = load(sin + i);
        const Floats first = load(x + i), second = load(b + i);
        store(y + i, first * c - second * s);
        store(y + half + i, second * c + first * s);
    }
    for (; i < half; ++i) {
        const float first = x[i], second = b[i];
        y[i] = first * cos[i] - second * sin[i];
        y[half + i] = second * cos[i] + first * sin[i];
    }
}

// A head of a query or key as attention uses it: x itself, or rotated in `room` [head_dim].
inline const float* rotated(const RopeTables& rope, int64_t position, const float* x, int64_t head_dim, float* room) {
    if (rope.cos == nullptr) return x;
    const int64_t row = position * rope.half;
    rotate_head(x, room, rope.cos + row, rope.sin + row, rope.half);
    __builtin_memcpy(room + 2 * rope.half, x + 2 * rope.half, (head_dim - 2 * rope.half) * sizeof(float));
    return room;
}

}  // namespace quire::QUIRE_ISA
