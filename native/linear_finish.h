// What follows the sums of a product: bias, scale, soft-cap, activation; and where the results go.
#pragma once

#include "activate.h"
#include "tiles.h"

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
    const int64_t width = smaller(span, args.weight.products() - first);
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
    float* const to = args.y + row * args.weight.products() + first;
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

// Rows [row, end) of a panel, from sums [end - row][Width].
using Finish = void (*)(const LinearArgs& args, int64_t panel, int64_t row, int64_t end, const float* sums);

template <int64_t Width>
static void finish_rows(const LinearArgs& args, int64_t panel, int64_t row, int64_t end, const float* sums) {
    for (; row < end; ++row, sums += Width) finish_row<Width>(args, panel, row, sums);
}

// The same where sums need no more than to be written (or added), and their panel exists wholly.
template <int64_t Width, bool Add>
static void finish_plain_rows(const LinearArgs& args, int64_t panel, int64_t row, int64_t end, const float* sums) {
    if ((panel + 1) * Width > args.weight.products()) return finish_rows<Width>(args, panel, row, end, sums);
    float* to = args.y + row * args.weight.products() + panel * Width;
    for (; row < end; ++row, sums += Width, to += args.weight.products()) {
        for (int64_t i = 0; i < Width; i += kLanes) store(to + i, Add ? load(to + i) + load(sums + i) : load(sums + i));
    }
}

// The same for gate and up in a panel of tiles, to rows of bfloat16.
template <Activation Kind>
static void finish_gated_rows(const LinearArgs& args, int64_t panel, int64_t row, int64_t end, const float* sums) {
    constexpr int64_t half = kTilePanel / 2;
    if ((panel + 1) * half >= args.y_tiles.width) return finish_rows<kTilePanel>(args, panel, row, end, sums);
    for (; row < end; ++row, sums += kTilePanel) {
        float values[half];
        for (int64_t i = 0; i < half; i += kLanes) {
            store(values + i, activate(Kind, load(sums + i)) * load(sums + half + i));
        }
        round_half(values, args.y_tiles.at(row, panel / 2) + panel % 2 * half);
    }
}

template <int64_t Width>
static Finish finish_of(const LinearArgs& args) {
    if (args.weight.bias != nullptr || args.scale != 1.0f || args.softcap != 0.0f) return finish_rows<Width>;
    if (args.best != nullptr) return finish_rows<Width>;
    if (!args.weight.gated && args.y != nullptr) {
        return args.add ? finish_plain_rows<Width, true> : finish_plain_rows<Width, false>;
    }
    if (Width != kTilePanel || !args.weight.gated || args.y != nullptr) return finish_rows<Width>;
    switch (args.activation) {
        case Activation::silu: return finish_gated_rows<Activation::silu>;
        case Activation::gelu_tanh: return finish_gated_rows<Activation::gelu_tanh>;
        default: return finish_rows<Width>;
    }
}

}  // namespace quire::QUIRE_ISA
