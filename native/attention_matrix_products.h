// The products of attention on matrix units (see attention_matrix.h), sixteen queries and 64 positions at a time.
#pragma once

#include "attention_matrix_keys.h"

namespace quire::QUIRE_ISA {

// The intrinsics of gcc 12 do not say that they read memory: what was stored before must be there.
inline void stores_are_done() { asm volatile("" : : : "memory"); }

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
    stores_are_done();
    _tile_loadconfig(&shapes);
}

// scores [4][16][16] = queries [steps][16][32] . keys, in small parts
struct ScoreWork {
    const uint16_t* queries;
    const MatrixChunk* chunk;
    int64_t head_dim, step;
    float* scores;
    int64_t d = 0;
    int part = 0;

    bool done() const { return part == kParts; }

    void advance() {
        const int64_t at = d * kTile;
        switch (part++) {
            case 0:
                if (d == 0) clear();
                _tile_loadd(4, queries + d / step * 512, 64);
                _tile_loadd(5, chunk->keys[0] + at, 64);
                _tile_dpbf16ps(0, 4, 5);
                _tile_loadd(5, chunk->keys[1] + at, 64);
                _tile_dpbf16ps(1, 4, 5);
                return;
            case 1:
                _tile_loadd(5, chunk->keys[2] + at, 64);
                _tile_dpbf16ps(2, 4, 5);
                _tile_loadd(5, chunk->keys[3] + at, 64);
                _tile_dpbf16ps(3, 4, 5);
                d += step;
                if (d < head_dim) part = 0;
                return;
            case 2:
                _tile_stored(0, scores, 64);
                _tile_stored(1, scores + 256, 64);
                return;
            default:
                _tile_stored(2, scores + 512, 64);
                _tile_stored(3, scores + 768, 64);
                return;
        }
    }

private:
    static constexpr int kParts = 4;

    static void clear() {
        stores_are_done();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
};

// to [value_dim / 16][16][16] = from + weights [2][16][32] . values, in small parts
struct MixWork {
    const uint16_t* weights;
    const MatrixChunk* chunk;
    int64_t value_dim;
    const float* from;
    float* to;
    int64_t d = 0;
    int part = 0;

    bool done() const { return d == value_dim; }

    void advance() {
        const int64_t stride = chunk->value_stride;
        const uint16_t* values = chunk->values[part >= 3] + d / 16 * stride;
        if (part == 0 && value_dim - d < 64) return narrow();
        switch (part++) {
            case 0:
                stores_are_done();
                _tile_loadd(0, from + d * 16, 64);
                _tile_loadd(1, from + d * 16 + 256, 64);
                _tile_loadd(2, from + d * 16 + 512, 64);
                _tile_loadd(3, from + d * 16 + 768, 64);
                return;
            case 1:
            case 3:
                _tile_loadd(6, weights + (part > 3 ? 512 : 0), 64);
                _tile_loadd(7, values, 64);
                _tile_dpbf16ps(0, 6, 7);
                _tile_loadd(7, values + stride, 64);
                _tile_dpbf16ps(1, 6, 7);
                return;
            case 2:
            case 4:
                _tile_loadd(7, values + 2 * stride, 64);
                _tile_dpbf16ps(2, 6, 7);
                _tile_loadd(7, values + 3 * stride, 64);
                _tile_dpbf16ps(3, 6, 7);
                return;
            case 5:
                _tile_stored(0, to + d * 16, 64);
                _tile_stored(1, to + d * 16 + 256, 64);
                return;
            default:
                _tile_stored(2, to + d * 16 + 512, 64);
                _tile_stored(3, to + d * 16 + 768, 64);
                part = 0;
                d += 64;
                return;
        }
    }

private:
    // The last 16 dimensions of a width that is no multiple of 64.
    void narrow() {
        stores_are_done();
        _tile_loadd(0, from + d * 16, 64);
        for (int half = 0; half < 2; ++half) {
            _tile_loadd(6, weights + half * 512, 64);
            _tile_loadd(7, chunk->values[half] + d / 16 * chunk->value_stride, 64);
            _tile_dpbf16ps(0, 6, 7);
        }
        _tile_stored(0, to + d * 16, 64);
        d += 16;
    }
};

}  // namespace quire::QUIRE_ISA
