// What follows the sums of a product: bias, scale, soft-cap, activation; and where the results go.
#pragma once

#include "activate.h"
#include "tiles.h"

namespace quire::QUIRE_ISA {

// The results of one row of a panel, from its sums. A gated panel leaves Width / 2 of them.
template <int64_t Width>
static inline void panel_results(const LinearArgs& args, int64_t panel, const float* sums, float* results) {
    const float* const bias = args.weight.bias == nullptr ? nullptr : args.weight.bias + panel * Width;
    for (int64_t i = 0; i < Width; i += kLanes) {
        Floats y = load(sums + i);
        if (bias != nullptr) y = y + load(bias + i);
        if (args.scale != 1.0f) y = y * args.scale;
        if (args.softcap != 0.0f) y = args.softcap * tanh(y / args.softcap);
        store(results + i, y);
    }
    if (!args.weight.gated) return;
    for (int64_t i = 0; i < Width / 2; i += kLanes) {
        store(results + i, activate(args.activation, load(results + i)) * load(results + Width / 2 + i));
    }
}

// Writes one row of a panel, as much of it as exists.
template <int64_t Width>
static inline void finish_row(const LinearArgs& args, int64_t panel, int64_t row, const float* sums) {
    const int64_t span = args.weight.gated ? Width / 2 : Width, first = panel * span;
    const int64_t width = smaller(span, args.weight.products() - first);
    float results[Width];
    panel_results<Width>(args, panel, sums, results);
    if (args.y_tiles.data != nullptr) {
        store_rounded(args.y_tiles, row, first, results, width);
        return;
    }
    float* const to = args.y + row * args.weight.products() + first;
    if (width == span) {
        for (int64_t i = 0; i < span; i += kLanes) {
            store(to + i, args.add ? load(to + i) + load(results + i) : load(results + i));
        }
    } else {
        for (int64_t i = 0; i < width; ++i) to[i] = args.add ? to[i] + results[i] : results[i];
    }
}

template <int64_t Width>
static inline void finish_rows(const LinearArgs& args, int64_t panel, int64_t first_row, int64_t rows,
                               const float* sums) {
    for (int64_t r = 0; r < rows; ++r) finish_row<Width>(args, panel, first_row + r, sums + r * Width);
}

}  // namespace quire::QUIRE_ISA
