// What follows the sums of a product: bias, scale, soft-cap.
#pragma once

#include "functions.h"

namespace quire::QUIRE_ISA {

static inline bool is_plain(const LinearArgs& args) {
    return args.weight.bias == nullptr && args.scale == 1.0f && args.softcap == 0.0f;
}

// y[first_row + r][first ...] from sums [rows][Width], for the outputs of that panel that exist.
template <int64_t Width>
static inline void finish_rows(const LinearArgs& args, int64_t first, int64_t first_row, int64_t rows,
                               const float* sums) {
    const int64_t width = smaller(Width, args.weight.out - first);
    alignas(64) float bias[Width] = {};
    if (args.weight.bias != nullptr) __builtin_memcpy(bias, args.weight.bias + first, width * 4);
    for (int64_t r = 0; r < rows; ++r) {
        float values[Width];
        for (int64_t i = 0; i < Width; i += kLanes) {
            Floats y = load(sums + r * Width + i);
            if (args.weight.bias != nullptr) y = y + load(bias + i);
            if (args.scale != 1.0f) y = y * args.scale;
            if (args.softcap != 0.0f) y = args.softcap * tanh(y / args.softcap);
            store(values + i, y);
        }
        float* to = args.y + (first_row + r) * args.weight.out + first;
        if (width == Width) {
            __builtin_memcpy(to, values, Width * 4);
        } else {
            __builtin_memcpy(to, values, width * 4);
        }
    }
}

}  // namespace quire::QUIRE_ISA
