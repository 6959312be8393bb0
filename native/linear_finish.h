// What follows the sums of a product: bias, scale, soft-cap.
#pragma once

#include "functions.h"

namespace quire::QUIRE_ISA {

// y[row][first ...] from the sums of one panel, for the outputs of that panel that exist.
template <int64_t Width>
static inline void finish_row(const LinearArgs& args, int64_t first, int64_t row, const float* sums) {
    const int64_t width = smaller(Width, args.weight.out - first);
    const float* const bias = args.weight.bias == nullptr ? nullptr : args.weight.bias + first;
    float* const to = args.y + row * args.weight.out + first;
    float values[Width] = {}, biases[Width] = {};
    const bool whole = width == Width;
    if (bias != nullptr && !whole) __builtin_memcpy(biases, bias, width * 4);
    for (int64_t i = 0; i < Width; i += kLanes) {
        Floats y = load(sums + i);
        if (bias != nullptr) y = y + load((whole ? bias : biases) + i);
        if (args.scale != 1.0f) y = y * args.scale;
        if (args.softcap != 0.0f) y = args.softcap * tanh(y / args.softcap);
        store((whole ? to : values) + i, y);
    }
    if (!whole) __builtin_memcpy(to, values, width * 4);
}

template <int64_t Width>
static inline void finish_rows(const LinearArgs& args, int64_t first, int64_t first_row, int64_t rows,
                               const float* sums) {
    for (int64_t r = 0; r < rows; ++r) finish_row<Width>(args, first, first_row + r, sums + r * Width);
}

}  // namespace quire::QUIRE_ISA
