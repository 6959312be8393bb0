// The GEMMs of attention on AMX (see attention.h), sixteen queries and 64 positions at a time: S = Q K^T and P V.
#pragma once

#include "attention/amx/keys.h"
#include "gemm/amx/tile_config.h"

namespace quire::QUIRE_ISA {

// The intrinsics of gcc 12 do not say that they read memory: what was stored before must be there.
inline void stores_are_done() { asm volatile("" : : : "memory"); }

// The widest part of a key that one tile instruction takes: an even divisor of head_dim up to 32.
inline int64_t key_step(int64_t head_dim) {
    int64_t step = smaller(head_dim, 32);
    while (head_dim % step != 0 || step % 2 != 0) --step;
    return step;
}

// The tile configuration of a worker while it attends. Loading one takes as long as 20 tile instructions: the same one is
// loaded once.
class AmxTileConfig {
public:
    AmxTileConfig() = default;
    ~AmxTileConfig() { _tile_release(); }
    AmxTileConfig(const AmxTileConfig&) = delete;
    AmxTileConfig& operator=(const AmxTileConfig&) = delete;

    void configure(const TileConfig& config) {
        if (__builtin_memcmp(&config, &loaded_, sizeof config) == 0) return;
        loaded_ = config;
        load_config(loaded_);
    }

private:
    TileConfig loaded_{0};  // palette 0: none
};

// Up to two tiles of queries (32) by the keys of a chunk, and their probabilities by its values.
//
// Keys and values are loaded past the L1, where they would push out what is used again.
//
// A tile is zeroed after its last use: a zero tile takes none of the core's tile registers, and while another
// thread of the core uses its eight there is none left to rename to (docs/design/amx.md).
class AmxGemm {
public:
    // `paired`: the values of 32 positions follow each other. Else they are put together for each GEMM: two of
    // 16 positions would not have the bits of one of 32.
    AmxGemm(AmxTileConfig& tiles, int64_t rows, int64_t head_dim, int64_t value_dim, bool paired)
        : tiles_(tiles), rows_(rows), step_(key_step(head_dim)), steps_(head_dim / step_), value_dim_(value_dim),
          paired_(paired) {}

    int64_t query_items() const { return steps_ * 512; }  // of one tile: [steps][16][32]

    // Before the scores of a group of `tiles` tiles of queries.
    void begin_scores(const uint16_t* queries, int64_t tiles) {
        queries_ = queries;
        two_ = tiles == 2;
        configure(true);
        zero_sums();
        if (!resident()) return;
        _tile_loadd(4, queries, 64);
        if (steps_ == 2) _tile_loadd(5, queries + 512, 64);
        if (!two_) return;
        _tile_loadd(6, queries + query_items(), 64);
        if (steps_ == 2) _tile_loadd(7, queries + query_items() + 512, 64);
    }

    // S = Q K^T: scores [tiles][4][16][16]
    void score(const AmxChunk& chunk, float* scores) const {
        for (int quarter = 0; quarter < 4; quarter += 2) {
            float* const to = scores + quarter * 256;
            if (resident()) {
                score_quarter(chunk.keys[quarter], to);
                score_quarter(chunk.keys[quarter + 1], to + 256);
            } else {
                score_half(chunk.keys[quarter], chunk.keys[quarter + 1], to);
            }
        }
    }

    // acc [tiles][value_dim / 16][16][16] = P [tiles][chunks][2][16][32] V, over `count` chunks; that of tile t and chunk c
    // is at probabilities + t * tile_stride + c * 1024
    void accumulate_values(const uint16_t* probabilities, int64_t tile_stride, const AmxChunk* chunks, int64_t count,
                           float* acc) {
        configure(false);
        const int64_t width = two_ ? 32 : 64;
        for (int64_t d = 0; d < value_dim_; d += width) {
            const int64_t left = value_dim_ - d;
            if (two_) {
                accumulate_two(probabilities, tile_stride, chunks, count, acc + d * 16, d, left >= 32);
            } else {
                accumulate_one(probabilities, chunks, count, acc + d * 16, d, smaller(left / 16, 4));
            }
        }
    }

private:
    bool resident() const { return steps_ <= 2; }

    static void zero_sums() {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }

    // The tile registers. Two tiles of queries: sums 0 and 1, keys 2, queries 4 to 7; then sums 0 to 3, left sides 4 and 5,
    // right ones 6 and 7. One tile, of fewer rows perhaps: keys and values in 2, 6 and 7, all the rest in the others, so
    // that both GEMMs have the same shapes where head_dim is a multiple of 32.
    void configure(bool scores) {
        TileConfig config;
        for (int i = 0; i < 8; ++i) config.rows[i] = static_cast<uint8_t>(rows_);
        if (scores) {
            for (const int i : {4, 5, 6, 7}) config.row_bytes[i] = static_cast<uint16_t>(2 * step_);
        }
        const int64_t depth = scores ? step_ : 32;
        const auto right = [&](int i) {
            config.row_bytes[i] = 64;
            config.rows[i] = static_cast<uint8_t>(depth / 2);
        };
        if (!two_ || (scores && resident())) right(2);
        if (!two_ || !scores || !resident()) {
            right(6);
            right(7);
        }
        tiles_.configure(config);
    }

    // The scores of 16 positions, with all queries in registers.
    void score_quarter(const uint16_t* keys, float* scores) const {
        _tile_stream_loadd(2, keys, 64);
        _tile_dpbf16ps(0, 4, 2);
        if (two_) _tile_dpbf16ps(1, 6, 2);
        _tile_zero(2);
        if (steps_ == 2) {
            _tile_stream_loadd(2, keys + step_ * 16, 64);
            _tile_dpbf16ps(0, 5, 2);
            if (two_) _tile_dpbf16ps(1, 7, 2);
            _tile_zero(2);
        }
        _tile_stored(0, scores, 64);
        _tile_zero(0);
        if (!two_) return;
        _tile_stored(1, scores + 1024, 64);
        _tile_zero(1);
    }

    // The scores of 32 positions.
    void score_half(const uint16_t* first, const uint16_t* second, float* scores) const {
        for (int64_t s = 0; s < steps_; ++s) {
            const uint16_t* const query = queries_ + s * 512;
            const int64_t at = s * step_ * 16;
            _tile_stream_loadd(6, first + at, 64);
            _tile_loadd(4, query, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_stream_loadd(7, second + at, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_zero(4);
            if (two_) {
                _tile_loadd(5, query + query_items(), 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_zero(6);
                _tile_dpbf16ps(3, 5, 7);
                _tile_zero(5);
            } else {
                _tile_zero(6);
            }
            _tile_zero(7);
        }
        _tile_stored(0, scores, 64);
        _tile_zero(0);
        _tile_stored(1, scores + 256, 64);
        _tile_zero(1);
        if (!two_) return;
        _tile_stored(2, scores + 1024, 64);
        _tile_zero(2);
        _tile_stored(3, scores + 1280, 64);
        _tile_zero(3);
    }

    // 32 dimensions, or the last 16, of two tiles of queries
    void accumulate_two(const uint16_t* probabilities, int64_t tile_stride, const AmxChunk* chunks, int64_t count, float* acc,
                 int64_t d, bool wide) {
        zero_sums();
        for (int64_t c = 0; c < count; ++c) {
            for (int half = 0; half < 2; ++half) {
                const uint16_t* p = probabilities + c * 1024 + half * 512;
                const uint16_t* const value = values_of(chunks[c], half, d);
                const uint16_t* const next = wide ? values_of(chunks[c], half, d + 16) : value;
                _tile_stream_loadd(6, value, 64);
                if (wide) _tile_stream_loadd(7, next, 64);
                _tile_loadd(4, p, 64);
                _tile_dpbf16ps(0, 4, 6);
                if (wide) _tile_dpbf16ps(1, 4, 7);
                _tile_zero(4);
                _tile_loadd(5, p + tile_stride, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_zero(6);
                if (wide) _tile_dpbf16ps(3, 5, 7);
                _tile_zero(5);
                _tile_zero(7);
            }
        }
        float* const second = acc + value_dim_ * 16;
        _tile_stored(0, acc, 64);
        _tile_stored(2, second, 64);
        if (!wide) return;
        _tile_stored(1, acc + 256, 64);
        _tile_stored(3, second + 256, 64);
    }

    // `blocks` times 16 dimensions of one tile of queries
    void accumulate_one(const uint16_t* probabilities, const AmxChunk* chunks, int64_t count, float* acc, int64_t d,
                 int64_t blocks) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(3);
        _tile_zero(4);
        for (int64_t c = 0; c < count; ++c) {
            for (int half = 0; half < 2; ++half) {
                _tile_loadd(5, probabilities + c * 1024 + half * 512, 64);
                _tile_loadd(2, values_of(chunks[c], half, d), 64);
                _tile_dpbf16ps(0, 5, 2);
                _tile_zero(2);
                if (blocks > 1) {
                    _tile_loadd(6, values_of(chunks[c], half, d + 16), 64);
                    _tile_dpbf16ps(1, 5, 6);
                    _tile_zero(6);
                }
                if (blocks > 2) {
                    _tile_loadd(7, values_of(chunks[c], half, d + 32), 64);
                    _tile_dpbf16ps(3, 5, 7);
                    _tile_zero(7);
                }
                if (blocks > 3) {
                    _tile_loadd(2, values_of(chunks[c], half, d + 48), 64);
                    _tile_dpbf16ps(4, 5, 2);
                    _tile_zero(2);
                }
                _tile_zero(5);
            }
        }
        _tile_stored(0, acc, 64);
        if (blocks > 1) _tile_stored(1, acc + 256, 64);
        if (blocks > 2) _tile_stored(3, acc + 512, 64);
        if (blocks > 3) _tile_stored(4, acc + 768, 64);
    }

    // Sixteen dimensions of half a chunk, as one tile.
    const uint16_t* values_of(const AmxChunk& chunk, int half, int64_t d) {
        const uint16_t* first = chunk.values[2 * half] + d / 16 * chunk.value_stride;
        if (paired_) return first;
        const uint16_t* second = chunk.values[2 * half + 1] + d / 16 * chunk.value_stride;
        uint16_t* const tile = joined_ + d / 16 % 4 * 512;
        for (int64_t at = 0; at < 8 * 32; at += 32) {
            _mm512_store_si512(tile + at, _mm512_loadu_si512(first + at));
            _mm512_store_si512(tile + 8 * 32 + at, _mm512_loadu_si512(second + at));
        }
        stores_are_done();
        return tile;
    }

    AmxTileConfig& tiles_;
    alignas(64) uint16_t joined_[4 * 512];
    const int64_t rows_, step_, steps_, value_dim_;
    const bool paired_;
    const uint16_t* queries_ = nullptr;
    bool two_ = false;
};

}  // namespace quire::QUIRE_ISA
