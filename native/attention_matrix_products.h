// The products of attention on matrix units (see attention_matrix.h), sixteen queries and 64 positions at a time.
#pragma once

#include "attention_matrix_keys.h"

namespace quire::QUIRE_ISA {

// The widest part of a key that one product takes: an even divisor of head_dim up to 32.
inline int64_t key_step(int64_t head_dim) {
    int64_t step = smaller(head_dim, 32);
    while (head_dim % step != 0 || step % 2 != 0) --step;
    return step;
}

// Tiles 0 to 3 are sums of `rows` rows, 4 queries, 5 keys, 6 weights, 7 values.
inline void configure(int64_t rows, int64_t step) {
    struct alignas(64) {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes = {};
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) {
        shapes.row_bytes[i] = 64;
        shapes.rows[i] = static_cast<uint8_t>(rows);
    }
    shapes.row_bytes[4] = static_cast<uint16_t>(2 * step);
    shapes.rows[5] = static_cast<uint8_t>(step / 2);
    shapes.rows[7] = 16;
    _tile_loadconfig(&shapes);
}

// scores [4][16][16] of one tile of queries [steps][16][32]
inline void score_tile(const uint16_t* queries, const MatrixChunk& chunk, int64_t head_dim, int64_t step,
                       float* scores) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < head_dim; d += step) {
        _tile_loadd(4, queries, 64);
        queries += 512;
        _tile_loadd(5, chunk.keys[0] + d * kTile, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(5, chunk.keys[1] + d * kTile, 64);
        _tile_dpbf16ps(1, 4, 5);
        _tile_loadd(5, chunk.keys[2] + d * kTile, 64);
        _tile_dpbf16ps(2, 4, 5);
        _tile_loadd(5, chunk.keys[3] + d * kTile, 64);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, scores, 64);
    _tile_stored(1, scores + 256, 64);
    _tile_stored(2, scores + 512, 64);
    _tile_stored(3, scores + 768, 64);
}

// to [N][16][16] = from + weights [2][16][32] . values of N times 16 dimensions
template <int N>
inline void mix_dims(const uint16_t* weights, const uint16_t* const* values, int64_t stride, const float* from,
                     float* to) {
    _tile_loadd(0, from, 64);
    if constexpr (N > 1) _tile_loadd(1, from + 256, 64);
    if constexpr (N > 2) _tile_loadd(2, from + 512, 64);
    if constexpr (N > 3) _tile_loadd(3, from + 768, 64);
    for (int half = 0; half < 2; ++half) {
        const uint16_t* value = values[half];
        _tile_loadd(6, weights + half * 512, 64);
        _tile_loadd(7, value, 64);
        _tile_dpbf16ps(0, 6, 7);
        if constexpr (N > 1) _tile_loadd(7, value + stride, 64);
        if constexpr (N > 1) _tile_dpbf16ps(1, 6, 7);
        if constexpr (N > 2) _tile_loadd(7, value + 2 * stride, 64);
        if constexpr (N > 2) _tile_dpbf16ps(2, 6, 7);
        if constexpr (N > 3) _tile_loadd(7, value + 3 * stride, 64);
        if constexpr (N > 3) _tile_dpbf16ps(3, 6, 7);
    }
    _tile_stored(0, to, 64);
    if constexpr (N > 1) _tile_stored(1, to + 256, 64);
    if constexpr (N > 2) _tile_stored(2, to + 512, 64);
    if constexpr (N > 3) _tile_stored(3, to + 768, 64);
}

// to [value_dim / 16][16][16] = from + weights . values
inline void mix_tile(const uint16_t* weights, const MatrixChunk& chunk, int64_t value_dim, const float* from,
                     float* to) {
    for (int64_t d = 0; d < value_dim; d += 64) {
        const int64_t at = d / 16 * chunk.value_stride;
        const uint16_t* const values[2] = {chunk.values[0] + at, chunk.values[1] + at};
        switch (smaller(4, (value_dim - d) / 16)) {
            case 1: mix_dims<1>(weights, values, chunk.value_stride, from + d * 16, to + d * 16); break;
            case 2: mix_dims<2>(weights, values, chunk.value_stride, from + d * 16, to + d * 16); break;
            case 3: mix_dims<3>(weights, values, chunk.value_stride, from + d * 16, to + d * 16); break;
            default: mix_dims<4>(weights, values, chunk.value_stride, from + d * 16, to + d * 16); break;
        }
    }
}

}  // namespace quire::QUIRE_ISA
