// Vectors of the instruction set this file is compiled for: QUIRE_ISA is `baseline`, `avx2` or `avx512`.
//
// Everything is in the namespace of that instruction set and nothing from the C++ library is used: an inline
// function shared with code for another processor could be kept by the linker in the wrong version.
//
// The compiler may not fuse a multiplication and an addition by itself (-ffp-contract=off): the same sum must
// have the same bits wherever it is inlined. `fma` says where fusing is meant.
#pragma once

#include <cstdint>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace quire::QUIRE_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };
struct E4M3 { uint8_t bits; };

// (subtracting +0 changes no value, not even -0, and so costs nothing)
static inline Floats splat(float value) { return value - Floats{}; }

static inline Floats load(const float* p) {
    Floats v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

static inline void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

static inline Floats as_floats(Words v) { return (Floats)v; }
static inline Words as_words(Floats v) { return (Words)v; }

// a * b + c, rounded once where the processor can
static inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

static inline Floats max(Floats a, Floats b) { return a > b ? a : b; }
static inline Floats min(Floats a, Floats b) { return a < b ? a : b; }

static inline Halves load_halves(const void* p) {
    Halves v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

static inline Floats load(const BFloat16* p) {
    // gcc widens a generic vector in halves; the intrinsics are one instruction
#if defined(__AVX512F__)
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#elif defined(__AVX2__)
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
#else
    return as_floats(__builtin_convertvector(load_halves(p), Words) << 16);
#endif
}

static inline Floats load(const Float16* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    // Move exponent and fraction into place; the product puts the exponent right and normalises subnormals.
    const Words bits = __builtin_convertvector(load_halves(p), Words);
    const Words magnitude = (bits & 0x7fffu) << 13;
    const Words scaled = as_words(as_floats(magnitude) * 0x1p112f);
    const Words special = magnitude | 0x7f800000u;
    return as_floats(((bits & 0x7c00u) == 0x7c00u ? special : scaled) | (bits & 0x8000u) << 16);
#endif
}

static inline Floats load(const int8_t* p) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    typedef int8_t Small __attribute__((vector_size(kLanes)));
    Small v;
    __builtin_memcpy(&v, p, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, Ints), Floats);
#endif
}

// An e4m3 number over 2^8, which float16 with the same bits is (no NaN): their exponents' biases differ by 8.
static inline Floats load(const E4M3* p) {
#if defined(__AVX512F__)
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(int16_t(0xbfff))));
#elif defined(__AVX2__)
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(int16_t(0xbfff))));
#else
    typedef uint8_t Small __attribute__((vector_size(kLanes)));
    Small v;
    __builtin_memcpy(&v, p, sizeof v);
    const Words bits = __builtin_convertvector(v, Words);
    const Floats magnitude = as_floats((bits & 0x7fu) << 20) * 0x1p112f;
    return as_floats(as_words(magnitude) | (bits & 0x80u) << 24);
#endif
}

static inline float to_float(float x) { return x; }

static inline float to_float(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    __builtin_memcpy(&y, &bits, 4);
    return y;
}

static inline float to_float(Float16 x) {
    const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
    float y;
    __builtin_memcpy(&y, &magnitude, 4);
    y *= 0x1p112f;
    uint32_t bits;
    __builtin_memcpy(&bits, &y, 4);
    if ((x.bits & 0x7c00u) == 0x7c00u) bits = magnitude | 0x7f800000u;
    bits |= (x.bits & 0x8000u) << 16;
    __builtin_memcpy(&y, &bits, 4);
    return y;
}

static inline float to_float(E4M3 x) {
    return to_float(Float16{static_cast<uint16_t>((x.bits & 0x80u) << 8 | (x.bits & 0x7fu) << 7)}) * 0x1p8f;
}

static inline void round_to(float x, float* y) { *y = x; }

// to nearest, ties to even; a NaN stays a NaN
static inline void round_to(float x, BFloat16* y) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    y->bits = static_cast<uint16_t>((x != x ? bits | 0x400000u : rounded) >> 16);
}

static inline void round_to(float x, Float16* y) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    uint32_t half;
    if (bits > 0x7f800000u) {
        half = 0x7e00u;
    } else if (bits >= 0x477ff000u) {  // rounds to 2^16 or more
        half = 0x7c00u;
    } else if (bits < 0x38800000u) {  // subnormal: adding 1/2 leaves the rounded count of 2^-24 in the low bits
        float magnitude;
        __builtin_memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        __builtin_memcpy(&half, &magnitude, 4);
        half -= 0x3f000000u;
    } else {
        half = (bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13;
    }
    y->bits = static_cast<uint16_t>(sign | half);
}

// A whole number of at most 2^22, or near one: to nearest, ties to even
static inline void round_to(float x, int8_t* y) {
    const float shifted = x + 0x1.8p23f;
    int32_t bits;
    __builtin_memcpy(&bits, &shifted, 4);
    *y = static_cast<int8_t>(bits - 0x4b400000);
}

// Of at most 464, which is what rounds to the largest: to nearest, ties to even
static inline void round_to(float x, E4M3* y) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 24 & 0x80u;
    bits &= 0x7fffffffu;
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0x1p14f;  // leaves the rounded count of 2^-9, a subnormal, in the low bits
    uint32_t small;
    __builtin_memcpy(&small, &magnitude, 4);
    const uint32_t normal = (bits + 0x7ffffu + (bits >> 20 & 1u) - 0x3c000000u) >> 20;
    y->bits = static_cast<uint8_t>(sign | (bits < 0x3c800000u ? small - 0x46800000u : normal));
}

// Sums and maxima across lanes: the upper half onto the lower, until one is left.
struct Sum {
    template <class V>
    static inline V of(V a, V b) { return a + b; }
};

struct Max {
    template <class V>
    static inline V of(V a, V b) { return a > b ? a : b; }
};

template <class Operation>
static inline float across_lanes(Floats v) {
#if defined(__AVX512F__) || defined(__AVX2__)
#if defined(__AVX512F__)
    const __m256 eight = Operation::of(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#else
    const __m256 eight = v;
#endif
    const __m128 four = Operation::of(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = Operation::of(four, _mm_movehl_ps(four, four));
    return Operation::of(two[0], two[1]);
#else
    float lanes[kLanes];
    store(lanes, v);
    for (int width = kLanes / 2; width >= 1; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] = Operation::of(lanes[i], lanes[i + width]);
    }
    return lanes[0];
#endif
}

static inline float sum_lanes(Floats v) { return across_lanes<Sum>(v); }
static inline float max_lanes(Floats v) { return across_lanes<Max>(v); }

// NaN counts as -inf.
static inline float largest(const float* x, int64_t size) {
    Floats best = splat(-__builtin_inff());
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) best = max(load(x + i), best);
    float result = max_lanes(best);
    for (; i < size; ++i) result = x[i] > result ? x[i] : result;
    return result;
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows that one work item should take so that an item is worth a thread's attention.
static inline int64_t rows_per_item(int64_t rows, int64_t values_per_row) {
    const int64_t wanted = 16384 / (values_per_row > 0 ? values_per_row : 1);
    return wanted < 1 ? 1 : smaller(wanted, larger(rows, 1));
}

}  // namespace quire::QUIRE_ISA
