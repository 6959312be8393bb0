// GEMM of integers: weights of 8 or 4 bits, activations quantized dynamically per token (each row by its absmax).
//
// Integer sums are exact, so they have the same bits in any order: few rows and many, vectors and AMX may each do as suits
// them. What follows has one order: for each group of inputs, first to last, y = fma(float(sum), scale, y) and, where there are
// minima, y = fma(float(sum of the inputs), minimum, y); and at the end y * activation scale of the row.
#pragma once

#include "gemm/frame.h"

namespace quire::QUIRE_ISA {

constexpr int64_t kQuad = 4;                                // inputs whose weights of one output lie together
constexpr int64_t kIntegerBytes = kTilePanel * kQuad;       // 8-bit weights of a panel for one quad of inputs
constexpr int64_t kScaleBytes = kTilePanel * sizeof(float);  // in front of each group of what AMX reads

typedef int16_t Shorts __attribute__((vector_size(kLanes * 4)));
typedef uint8_t Bytes __attribute__((vector_size(kLanes * 4)));

static inline Ints load_ints(const void* p) {
    Ints v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

static inline Shorts load_shorts(const void* p) {
    Shorts v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(void* p, Ints v) { __builtin_memcpy(p, &v, sizeof v); }
static inline void store(void* p, Shorts v) { __builtin_memcpy(p, &v, sizeof v); }

static inline Floats to_floats(Ints v) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps((__m512i)v);
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps((__m256i)v);
#else
    return __builtin_convertvector(v, Floats);
#endif
}

// Whether every lane of `v` lies in [-limit, limit).
static inline bool within(Ints v, int32_t limit) {
    const Words shifted = (Words)v + static_cast<uint32_t>(limit);
#if defined(__AVX512F__)
    return _mm512_cmpge_epu32_mask((__m512i)shifted, _mm512_set1_epi32(2 * limit)) == 0;
#else
    const Ints outside = (Ints)(shifted >= static_cast<uint32_t>(2 * limit));
    int32_t any = 0;
    for (int i = 0; i < kLanes; ++i) any |= outside[i];
    return any == 0;
#endif
}

// float(high * 2^shift + low), rounded once.
static inline Floats join(Ints high, Ints low, int shift) {
    if (within(high, 1 << (29 - shift)) && within(low, 1 << 29)) return to_floats((high << shift) + low);
    Floats y = {};
    for (int i = 0; i < kLanes; ++i) {
        y[i] = static_cast<float>(int64_t{high[i]} * (int64_t{1} << shift) + low[i]);
    }
    return y;
}

// rint(x * inverse): the sum with 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
static inline Ints quantize_to_ints(Floats x, float inverse) {
    return (Ints)(as_words(x * inverse + 0x1.8p23f) - 0x4b400000u);
}

// The first `count` of kLanes floats; the others are zero.
static inline Floats load_some(const float* p, int64_t count) {
    if (count >= kLanes) return load(p);
    float values[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = p[i];
    return load(values);
}

// How the activations of a row are quantized: x = q * scale. Everything is as the definition says
// (`quantize_activations` in src/quire/ops/reference.py).
struct QuantizedRow {
    float inverse;  // 0: all zero
    float scale;    // NaN where an input is infinite or NaN

    // The integers of kLanes inputs from `i` on; 0 from `in` on.
    Ints at(const float* x, int64_t i, int64_t in) const {
        if (inverse == 0.0f || i >= in) return Ints{};
        return quantize_to_ints(load_some(x + i, in - i), inverse);
    }
};

static inline QuantizedRow measure_row(const float* x, int64_t in, int32_t qmax) {
    constexpr uint32_t magnitude = 0x7fffffffu, infinity = 0x7f800000u;
    Words top = {};  // of bits without sign: an order in which infinity and NaN are the largest
    int64_t i = 0;
    for (; i + kLanes <= in; i += kLanes) {
        const Words bits = as_words(load(x + i)) & magnitude;
        top = (Ints)bits > (Ints)top ? bits : top;
    }
    uint32_t largest = 0;
    for (int lane = 0; lane < kLanes; ++lane) largest = top[lane] > largest ? top[lane] : largest;
    for (; i < in; ++i) {
        uint32_t bits;
        __builtin_memcpy(&bits, x + i, 4);
        bits &= magnitude;
        largest = bits > largest ? bits : largest;
    }
    float absmax;
    __builtin_memcpy(&absmax, &largest, 4);
    if (largest >= infinity) return {0.0f, __builtin_nanf("")};
    const float limit = static_cast<float>(qmax);
    return {absmax < 0x1p-100f ? 0.0f : limit / absmax, absmax / limit};
}

// One group's sums of a row, for the 32 outputs of a panel, scaled and added to what the groups before left; `head` are its
// scales and minima, `x_sum` the exact sum of its inputs (at most 128 of 16 bits).
template <class Item>
static inline void add_group_of(const Item* head, bool minima, const Floats* sums, float x_sum, float* y) {
    for (int64_t v = 0; v < kTilePanel / kLanes; ++v) {
        float* const at = y + v * kLanes;
        Floats result = fma(sums[v], load(head + v * kLanes), load(at));
        if (minima) result = fma(splat(x_sum), load(head + kTilePanel + v * kLanes), result);
        store(at, result);
    }
}

static inline void add_group(const Panels& weight, const uint8_t* head, const Floats* sums, float x_sum, float* y) {
    if (weight.half_scales) {
        return add_group_of(reinterpret_cast<const Float16*>(head), weight.minima, sums, x_sum, y);
    }
    add_group_of(reinterpret_cast<const float*>(head), weight.minima, sums, x_sum, y);
}

#if defined(__AVX512F__)
// 16 integers as bytes in the order of weights: of two byte planes 256 high + low the high one, and the low one `apart` on.
static inline void store_planes(Ints q, int64_t planes, int8_t* to, int64_t apart) {
    const __m128i order = _mm_set_epi8(15, 13, 14, 12, 11, 9, 10, 8, 7, 5, 6, 4, 3, 1, 2, 0);
    const Ints high = planes == 1 ? q : (q + 128) >> 8;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(_mm512_cvtepi32_epi8((__m512i)high), order));
    if (planes == 1) return;
    const __m128i low = _mm512_cvtepi32_epi8((__m512i)(q - (high << 8)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + apart), _mm_shuffle_epi8(low, order));
}
#endif

// Scales a row's sums by its activation scale, then the epilogue.
static inline void finish_quantized_row(const GemmLaunch& launch, int64_t panel, int64_t row, float* y) {
    for (int64_t i = 0; i < kTilePanel; i += kLanes) store(y + i, load(y + i) * launch.x_scales[row]);
    finish_row<kTilePanel>(*launch.args, panel, row, y);
}

}  // namespace quire::QUIRE_ISA
