// New keys and values on their way into a cache for AMX (its layout: attention.h).
#pragma once

#include "attention/amx/keys.h"
#include "elementwise/rotate.h"

namespace quire::QUIRE_ISA {

// The first `count` of sixteen.
inline __mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>((1u << larger(0, smaller(16, count))) - 1);
}

// A head of a query or key as attention uses it, sixteen dimensions at a time.
class HeadVectors {
public:
    // `room`: [head_dim]
    HeadVectors(const RopeTables& rope, int64_t position, const float* x, int64_t head_dim, float* room) : x_(x) {
        if (rope.cos == nullptr) return;
        if (rope.half % 16 != 0 || head_dim % 32 != 0) {
            x_ = rotated(rope, position, x, head_dim, room);
            return;
        }
        half_ = rope.half;
        cos_ = rope.cos + position * half_;
        sin_ = rope.sin + position * half_;
    }

    // The arithmetic of `rotate_head`.
    __m512 at(int64_t d, __mmask16 present) const {
        if (d < half_) {
            return _mm512_sub_ps(product(x_ + d, cos_ + d), product(x_ + half_ + d, sin_ + d));
        }
        if (d < 2 * half_) {
            return _mm512_add_ps(product(x_ + d, cos_ + d - half_), product(x_ + d - half_, sin_ + d - half_));
        }
        return _mm512_maskz_loadu_ps(present, x_ + d);
    }

private:
    static __m512 product(const float* a, const float* b) {
        return _mm512_mul_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b));
    }

    const float* x_;
    int64_t half_ = 0;  // 0: as it is
    const float* cos_ = nullptr;
    const float* sin_ = nullptr;
};

// rows[i] lane j = rows[j] lane i, as it was.
inline void transpose(__m512i* rows) {
    __m512i pairs[16];
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
        }
    }
    for (int j = 0; j < 4; ++j) {  // now 128 bits of rows[4 i + j] are lane 4 k + j of rows 4 i to 4 i + 3
        const __m512i a = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0xdd);
        pairs[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        pairs[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        pairs[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        pairs[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) rows[i] = pairs[i];
}

// Consecutive tokens of a row whose places lie in one tile of sixteen. Only their own halves of a pair of values are
// written: another thread may be writing the other.
struct NewTokens {
    const AttentionArgs& args;
    int64_t token, count, head;
    int64_t position, slot;  // of the first
    uint16_t* keys;          // of the block
    uint16_t* values;
    float* room;  // [head_dim]

    NewTokens(const AttentionArgs& arguments, int64_t row, int64_t first, int64_t most, int64_t of_head, float* memory)
        : args(arguments), token(first), head(of_head), room(memory) {
        const CacheLayout& cache = args.cache;
        position = args.starts[row] + token - args.query_starts[row];
        slot = position % cache.block_size;
        count = smaller(most, smaller(16 - slot % 16, cache.block_size - slot));
        const int64_t block = args.tables[row * args.table_stride + position / cache.block_size];
        keys = reinterpret_cast<uint16_t*>(cache.head_block(args.layer, block, head));
        values = keys + cache.slots() * cache.head_dim;
    }

    HeadVectors key(int64_t i) const {
        const int64_t dims = args.cache.head_dim;
        return {args.rope, position + i, args.k + (token + i) * args.k_stride + head * dims, dims, room};
    }

    // Sixteen dimensions of a value from `d` on; 0 where there is none.
    __m512 value(int64_t i, int64_t d) const {
        if (i < 0 || i >= count) return _mm512_setzero_ps();
        const int64_t dims = args.cache.head_dim;
        return _mm512_maskz_loadu_ps(first_lanes(dims - d), args.v + (token + i) * args.v_stride + head * dims + d);
    }

    // One by one: pairs of dimensions, 4 bytes each.
    void write_key() const {
        const int64_t dims = args.cache.head_dim;
        uint16_t* const to = keys + slot / 16 * 16 * dims + slot % 16 * 2;
        const HeadVectors head_vectors = key(0);
        for (int64_t d = 0; d < dims; d += 16) {
            alignas(32) uint32_t pairs[8];
            const __m256bh rounded = _mm512_cvtneps_pbh(head_vectors.at(d, first_lanes(dims - d)));
            _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), (__m256i)rounded);
            const int64_t count = smaller(16, dims - d) / 2;
            for (int64_t i = 0; i < count; ++i) __builtin_memcpy(to + (d / 2 + i) * 32, pairs + i, 4);
        }
    }

    // Together: a pair of dimensions of all, 64 bytes at most.
    void write_keys() const {
        const int64_t dims = args.cache.head_dim, lane = slot % 16;
        const auto written = static_cast<__mmask16>(((1u << count) - 1) << lane);
        uint16_t* to = keys + slot / 16 * 16 * dims;
        for (int64_t d = 0; d < dims; d += 32) {
            __m512i rows[16];
            for (__m512i& row : rows) row = _mm512_setzero_si512();
            for (int64_t i = 0; i < count; ++i) {
                const HeadVectors head_vectors = key(i);
                const __m512 low = head_vectors.at(d, first_lanes(dims - d));
                const __m512 high = dims - d > 16 ? head_vectors.at(d + 16, first_lanes(dims - d - 16)) : low;
                rows[lane + i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            }
            transpose(rows);
            for (int64_t pair = 0; pair < smaller(32, dims - d) / 2; ++pair, to += 32) {
                _mm512_mask_storeu_epi32(to, written, rows[pair]);
            }
        }
    }

    // By pairs of places.
    void write_values() const {
        const __m512i alternate = _mm512_add_epi16(_mm512_set1_epi32(16 << 16), _mm512_set_epi32(
            0xf000f, 0xe000e, 0xd000d, 0xc000c, 0xb000b, 0xa000a, 0x90009, 0x80008,
            0x70007, 0x60006, 0x50005, 0x40004, 0x30003, 0x20002, 0x10001, 0));
        for (int64_t i = -(slot % 2); i < count; i += 2) {
            const __mmask32 written = (i >= 0 ? 0x55555555u : 0u) | (i + 1 < count ? 0xaaaaaaaau : 0u);
            uint16_t* to = values + (slot + i) / 2 * 32;
            for (int64_t d = 0; d < args.cache.value_dim(); d += 16, to += args.cache.slots() * 16) {
                const __m512bh both = _mm512_cvtne2ps_pbh(value(i + 1, d), value(i, d));
                _mm512_mask_storeu_epi16(to, written, _mm512_permutexvar_epi16(alternate, (__m512i)both));
            }
        }
    }
};

// `count` consecutive tokens of a row. room: [head_dim]
inline void write_amx_tokens(const AttentionArgs& args, int64_t row, int64_t token, int64_t count, int64_t head,
                                float* room) {
    for (const int64_t end = token + count; token < end;) {
        const NewTokens tokens(args, row, token, end - token, head, room);
        if (tokens.count == 1) {
            tokens.write_key();
        } else {
            tokens.write_keys();
        }
        tokens.write_values();
        token += tokens.count;
    }
}

}  // namespace quire::QUIRE_ISA
