// The epilogue of a GEMM: bias, scale, soft-cap, activation; and where the results go.
#pragma once

#include "elementwise/activate.h"
#include "gemm/tile_rows.h"

namespace quire::QUIRE_ISA {

// The lowest index of `value`, which is there.
static inline int64_t index_of(const float* values, float value) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (;; i += kLanes) {
        const __mmask16 equal = _mm512_cmp_ps_mask(load(values + i), splat(value), _CMP_EQ_OQ);
        if (equal != 0) return i + __builtin_ctz(equal);
    }
#else
    while (values[i] != value) ++i;
    return i;
#endif
}

// The best of the first `width` of a panel's results.
template <int64_t Vectors>
static inline Best best_of(const Floats* results, int64_t first, int64_t width) {
    constexpr float inf = __builtin_inff();
    float values[Vectors * kLanes];
    for (int64_t i = 0; i < Vectors; ++i) {
        store(values + i * kLanes, results[i] != results[i] ? splat(inf) : results[i]);
    }
    for (int64_t i = width; i < Vectors * kLanes; ++i) values[i] = -inf;
    Floats top = load(values);
    for (int64_t i = 1; i < Vectors; ++i) top = max(top, load(values + i * kLanes));
    const float value = max_lanes(top);
    return {value, static_cast<int32_t>(first + index_of(values, value))};
}

// Outputs [first, first + vectors * kLanes) of a row, as many as exist.
template <int64_t Vectors>
static inline void write_results(const LinearArgs& args, int64_t first, int64_t row, const Floats* results) {
    constexpr int64_t span = Vectors * kLanes;
    const int64_t width = smaller(span, args.weight.out_width() - first);
    if (args.best != nullptr) {
        args.best[row * args.weight.panels() + first / span] = best_of<Vectors>(results, first, width);
        return;
    }
    float values[span];
    for (int64_t i = 0; i < Vectors; ++i) store(values + i * kLanes, results[i]);
    if (args.y_tiles.data != nullptr) {
        store_rounded(args.y_tiles, row, first, values, width);
        return;
    }
    float* const to = args.y + row * args.weight.out_width() + first;
    if (width < span) {
        for (int64_t i = 0; i < width; ++i) to[i] = args.add ? to[i] + values[i] : values[i];
    } else if (args.add) {
        for (int64_t i = 0; i < Vectors; ++i) store(to + i * kLanes, load(to + i * kLanes) + results[i]);
    } else {
        for (int64_t i = 0; i < Vectors; ++i) store(to + i * kLanes, results[i]);
    }
}

// Writes one row of a panel, as much of it as exists, from its sums. A gated panel has Width / 2 results.
template <int64_t Width>
static inline void finish_row(const LinearArgs& args, int64_t panel, int64_t row, const float* sums) {
    constexpr int64_t vectors = Width / kLanes;
    const float* const bias = args.weight.bias == nullptr ? nullptr : args.weight.bias + panel * Width;
    Floats results[vectors];
    for (int64_t i = 0; i < vectors; ++i) {
        Floats y = load(sums + i * kLanes);
        if (bias != nullptr) y = y + load(bias + i * kLanes);
        if (args.scale != 1.0f) y = y * args.scale;
        if (args.softcap != 0.0f) y = args.softcap * tanh(y / args.softcap);
        results[i] = y;
    }
    if (!args.weight.gated) return write_results<vectors>(args, panel * Width, row, results);
    for (int64_t i = 0; i < vectors / 2; ++i) {
        results[i] = activate(args.activation, results[i]) * results[vectors / 2 + i];
    }
    write_results<vectors / 2>(args, panel * Width / 2, row, results);
}

}  // namespace quire::QUIRE_ISA
