// Writing rows of bfloat16 in the order of AMX tiles (TileRows). The rounding here is the only one: what a producer rounds
// has the bits that a GEMM would have made of the same floats.
#pragma once

#include "runtime/simd.h"

namespace quire::QUIRE_ISA {

// 32 floats, of which the first `count` exist; the rest become zero.
static inline void round_chunk(const float* from, int64_t count, uint16_t* to) {
#if defined(__AVX512BF16__)
    const uint32_t mask = count >= kTileDepth ? ~0u : (1u << count) - 1;
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from);
    const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + 16);
    const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    __builtin_memcpy(to, &rounded, 64);
#else
    for (int64_t i = 0; i < kTileDepth; ++i) {
        BFloat16 rounded{0};
        if (i < count) round_to(from[i], &rounded);
        to[i] = rounded.bits;
    }
#endif
}

// 16 floats to half a chunk.
static inline void round_half(const float* from, uint16_t* to) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from));
    __builtin_memcpy(to, &rounded, 32);
#else
    for (int64_t i = 0; i < kTileDepth / 2; ++i) {
        BFloat16 rounded;
        round_to(from[i], &rounded);
        to[i] = rounded.bits;
    }
#endif
}

// Inputs [first, first + count) of one row. A caller that writes a row in pieces leaves the padding of its last chunk to
// the piece that ends the row.
static inline void store_rounded(const TileRows& to, int64_t row, int64_t first, const float* values, int64_t count) {
    if (count == kTileDepth && first % kTileDepth == 0) {
        return round_chunk(values, kTileDepth, to.at(row, first / kTileDepth));
    }
    if (count == kTileDepth / 2 && first % kTileDepth == 0 && first + count < to.width) {
        return round_half(values, to.at(row, first / kTileDepth));
    }
    if (count == kTileDepth / 2 && first % kTileDepth == count) {
        return round_half(values, to.at(row, first / kTileDepth) + count);
    }
    for (int64_t i = 0; i < count;) {
        const int64_t chunk = (first + i) / kTileDepth, at = (first + i) % kTileDepth;
        const int64_t now = smaller(count - i, kTileDepth - at);
        const bool ends = first + i + now == to.width;
        uint16_t rounded[kTileDepth];
        round_chunk(values + i, now, rounded);
        __builtin_memcpy(to.at(row, chunk) + at, rounded, (ends ? kTileDepth - at : now) * 2);
        i += now;
    }
}

}  // namespace quire::QUIRE_ISA
