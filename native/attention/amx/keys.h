// Where attention on AMX finds the keys and values of a chunk of 64 positions (see attention.h).
#pragma once

#include "attention/partition.h"

namespace quire::QUIRE_ISA {

constexpr int64_t kAmxChunk = 64;  // positions for which the running softmax is updated at once
constexpr int64_t kPairs = kAmxChunk / 2;

struct AmxChunk {
    const uint16_t* keys[4];    // of 16 positions each
    const uint16_t* values[4];  // the same; where they are `paired`, the second follows the first, the fourth the third
    int64_t value_stride;       // items from 16 dimensions to the next 16
};

// The items of pair `pair` of a chunk's values, of 16 dimensions [16][2], that lie outside positions [low, high).
inline __mmask32 hidden_items(int64_t pair, int64_t low, int64_t high) {
    const auto hidden = [&](int64_t position) { return position < low || position >= high; };
    return (hidden(2 * pair) ? 0x55555555u : 0u) | (hidden(2 * pair + 1) ? 0xaaaaaaaau : 0u);
}

inline const uint16_t* pair_of(const AmxChunk& chunk, int64_t pair) {
    return chunk.values[pair / 8] + pair % 8 * 32;
}

// Whether all values outside [low, high) are finite.
inline bool hidden_are_finite(const AmxChunk& chunk, int64_t value_dim, int64_t low, int64_t high) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    for (int64_t pair = 0; pair < kPairs; ++pair) {
        const __mmask32 hidden = hidden_items(pair, low, high);
        if (hidden == 0) continue;
        const uint16_t* value = pair_of(chunk, pair);
        __mmask32 found = 0;
        for (int64_t d = 0; d < value_dim; d += 16, value += chunk.value_stride) {
            found |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_loadu_si512(value), exponent), exponent);
        }
        if ((found & hidden) != 0) return false;
    }
    return true;
}

// A copy whose values outside [low, high) are 0. `room`: [value_dim / 16][32][16][2]
inline AmxChunk without_hidden(const AmxChunk& chunk, int64_t value_dim, int64_t low, int64_t high,
                                  uint16_t* room) {
    AmxChunk clean = chunk;
    clean.value_stride = kPairs * 32;
    for (int64_t quarter = 0; quarter < 4; ++quarter) clean.values[quarter] = room + quarter * 8 * 32;
    for (int64_t pair = 0; pair < kPairs; ++pair) {
        const __mmask32 seen = ~hidden_items(pair, low, high);
        for (int64_t d = 0; d < value_dim / 16; ++d) {
            const __m512i value = _mm512_loadu_si512(pair_of(chunk, pair) + d * chunk.value_stride);
            _mm512_storeu_si512(room + (d * kPairs + pair) * 32, _mm512_maskz_mov_epi16(seen, value));
        }
    }
    return clean;
}

// Where the keys and values of one row and head are.
class AmxKeys {
public:
    // `few`: so few queries use the values that gathering them does not pay.
    AmxKeys(const AttentionArgs& args, const WorkItem& item, bool few, uint16_t* room)
        : cache_(args.cache), layer_(args.layer), head_(item.head), room_(room),
          paired_(whole_values(cache_) || !whole_keys(cache_) || !few),
          table_(args.tables + item.row * args.table_stride) {}

    // What a chunk needs whose keys and values are not where they can be used.
    static int64_t room_items(const CacheLayout& cache) {
        const int64_t keys = whole_keys(cache) ? 0 : cache.head_dim;
        return kAmxChunk * (keys + (whole_values(cache) ? 0 : cache.value_dim()));
    }

    // Whether the values of 32 positions follow each other, by 16 dimensions.
    bool paired() const { return paired_; }

    // The chunk from position `base` on, gathered in place `place` of the room. Positions from `end` on hold anything
    // that may be read.
    AmxChunk find(int64_t base, int64_t end, int64_t place) const {
        AmxChunk chunk;
        uint16_t* room = room_ + place * room_items(cache_);
        for (int64_t tile = 0; tile < 4; ++tile) {
            // A tile past the end is the last one again; P is 0 there.
            const int64_t position = smaller(base + tile * 16, (end - 1) / 16 * 16);
            if (whole_keys(cache_)) {
                chunk.keys[tile] = keys_at(position);
                continue;
            }
            gather_keys(position, end, room);
            chunk.keys[tile] = room;
            room += kTile * cache_.head_dim;
        }
        const bool gathered = paired_ && !whole_values(cache_);
        chunk.value_stride = gathered ? kPairs * 32 : cache_.slots() * 16;
        const int64_t step = paired_ ? 2 : 1, last = (end - 1) / (step * 16) * (step * 16);
        for (int64_t quarter = 0; quarter < 4; quarter += step) {
            const int64_t position = smaller(base + quarter * 16, last);
            if (gathered) gather_values(position, end, room);
            chunk.values[quarter] = gathered ? room : values_at(position);
            if (paired_) chunk.values[quarter + 1] = chunk.values[quarter] + 8 * 32;
            room += 16 * 32;
        }
        return chunk;
    }

    // Prefetches the keys, or values, of a chunk.
    void prefetch_keys(const AmxChunk& chunk) const {
        for (const uint16_t* keys : chunk.keys) {
            for (int64_t at = 0; at < 16 * cache_.head_dim; at += 32) __builtin_prefetch(keys + at, 0, 2);
        }
    }
    void prefetch_values(const AmxChunk& chunk, int64_t value_dim) const {
        for (const uint16_t* values : chunk.values) {
            for (int64_t d = 0; d < value_dim; d += 16, values += chunk.value_stride) {
                for (int64_t at = 0; at < 8 * 32; at += 32) __builtin_prefetch(values + at, 0, 2);
            }
        }
    }

private:
    static bool whole_keys(const CacheLayout& cache) { return cache.block_size % 16 == 0; }
    static bool whole_values(const CacheLayout& cache) { return cache.block_size % 32 == 0; }

    const uint16_t* head_block_at(int64_t position) const {
        const int64_t block = table_[position / cache_.block_size];
        return reinterpret_cast<const uint16_t*>(cache_.head_block(layer_, block, head_));
    }
    const uint16_t* keys_at(int64_t position) const {
        const int64_t slot = position % cache_.block_size;
        return head_block_at(position) + slot / 16 * 16 * cache_.head_dim + slot % 16 * 2;
    }
    const uint16_t* values_at(int64_t position) const {
        const int64_t slot = position % cache_.block_size;
        return head_block_at(position) + cache_.slots() * cache_.head_dim + slot / 2 * 32 + slot % 2;
    }

    void gather_keys(int64_t position, int64_t end, uint16_t* room) const {
        for (int64_t j = 0; j < smaller(16, end - position); ++j) {
            const uint16_t* from = keys_at(position + j);
            for (int64_t d = 0; d < cache_.head_dim; d += 2) __builtin_memcpy(room + d * 16 + j * 2, from + d * 16, 4);
        }
    }

    // 32 positions: two halves of 16, or one by one where blocks are no whole tiles.
    void gather_values(int64_t position, int64_t end, uint16_t* room) const {
        if (cache_.block_size % 16 == 0) {
            copy_half(position, end, room);
            copy_half(position + 16, end, room + 8 * 32);
            return;
        }
        for (int64_t j = 0; j < 32; ++j) {
            uint16_t* to = room + j / 2 * 32 + j % 2;
            const uint16_t* from = position + j < end ? values_at(position + j) : nullptr;
            for (int64_t d = 0; d < cache_.value_dim(); d += 16, to += kPairs * 32) {
                for (int64_t i = 0; i < 32; i += 2) to[i] = from == nullptr ? 0 : from[d * cache_.slots() + i];
            }
        }
    }

    void copy_half(int64_t position, int64_t end, uint16_t* to) const {
        const bool exists = position < end;
        const uint16_t* from = exists ? values_at(position) : to;
        for (int64_t d = 0; d < cache_.value_dim(); d += 16, to += kPairs * 32) {
            for (int64_t i = 0; i < 8 * 32; i += 32) {
                _mm512_storeu_si512(to + i, exists ? _mm512_loadu_si512(from + i) : _mm512_setzero_si512());
            }
            if (exists) from += cache_.slots() * 16;
        }
    }

    const CacheLayout& cache_;
    const int64_t layer_, head_;
    uint16_t* const room_;
    const bool paired_;
    const int32_t* const table_;
};

}  // namespace quire::QUIRE_ISA
