// Attention on vectors: float32 arithmetic over keys and values of any storage.
//
// A head block of the cache (one block for one head) is
//
//   | keys: tiles of 16 positions, each [head_dim][16] | values: [slots][value_dim] | scales of keys, of values: [slots] |
//
// (scales where they are 8 bits: a key is its numbers times its scale, and so is a value; the sums are of the numbers)
// Keys lie transposed so that one vector holds one dimension of several positions and scores need no sum across lanes.
#pragma once

#include "attention/vector/softmax.h"
#include "elementwise/rotate.h"
#include "gemm/integers.h"

namespace quire::QUIRE_ISA {

constexpr int64_t kVectorQueries = 48;  // query vectors (tokens x heads of a group) of a work item, about
constexpr int64_t kConvertQueries = 9;  // from here on keys and values of a chunk are converted to float32 once

struct NaturalExponential {
    static constexpr float kUnit = 1.0f;  // a logit, in scores
    static Floats of(Floats x) { return exp(x); }
};

// x [dims] into numbers `stride` apart; where they are 8 bits, by x's own largest magnitude (`quantize_activations` in
// src/quire/ops/reference.py). An infinity or NaN makes the scale NaN.
template <class T>
void write_vector(const float* x, int64_t dims, T* numbers, int64_t stride, float*) {
    for (int64_t d = 0; d < dims; ++d) round_to(x[d], numbers + d * stride);
}

template <class T>
void write_numbers(const float* x, int64_t dims, int32_t qmax, float unit, T* numbers, int64_t stride, float* scale) {
    const QuantizedRow row = measure_row(x, dims, qmax);
    *scale = row.scale * unit;
    for (int64_t d = 0; d < dims; ++d) round_to(row.inverse == 0.0f ? 0.0f : x[d] * row.inverse, numbers + d * stride);
}

inline void write_vector(const float* x, int64_t dims, int8_t* numbers, int64_t stride, float* scale) {
    write_numbers(x, dims, 127, 1.0f, numbers, stride, scale);
}

// `load` gives such a number over 2^8.
inline void write_vector(const float* x, int64_t dims, E4M3* numbers, int64_t stride, float* scale) {
    write_numbers(x, dims, 448, 0x1p8f, numbers, stride, scale);
}

// Where a head block's scales of keys begin; those of values follow.
inline float* scales_of(const CacheLayout& cache, uint8_t* head_block) {
    return reinterpret_cast<float*>(head_block + cache.slots() * (cache.head_dim + cache.value_dim()) * bytes_of(cache.storage));
}

template <class T>
void write_token(const AttentionArgs& args, int64_t row, int64_t token, int64_t head, float* room) {
    const CacheLayout& cache = args.cache;
    const int64_t position = args.starts[row] + token - args.query_starts[row];
    const int64_t block = args.tables[row * args.table_stride + position / cache.block_size];
    const int64_t slot = position % cache.block_size;
    uint8_t* const head_block = cache.head_block(args.layer, block, head);
    float* const scales = scales_of(cache, head_block) + slot;
    T* keys = reinterpret_cast<T*>(head_block);
    T* values = keys + cache.slots() * cache.head_dim + slot * cache.value_dim();
    keys += slot / kTile * kTile * cache.head_dim + slot % kTile;
    const float* k = args.k + token * args.k_stride + head * cache.head_dim;
    const float* v = args.v + token * args.v_stride + head * cache.head_dim;
    k = rotated(args.rope, position, k, cache.head_dim, room);
    write_vector(k, cache.head_dim, keys, kTile, scales);
    write_vector(v, cache.head_dim, values, 1, scales + cache.slots());
    for (int64_t d = cache.head_dim; d < cache.value_dim(); ++d) round_to(0.0f, values + d);
}

// The 16 positions from `position` on (a multiple of 16), of which those before `end` exist. Where blocks are whole
// tiles they lie in one block; otherwise they are gathered into `room` [16 * (head_dim + value_dim)] and, with 8 bits, 32
// floats for scales.
template <class T>
void find_tile(const AttentionArgs& args, const WorkItem& item, int64_t position, int64_t end, T* room, int64_t tile,
               Chunk<T>& chunk) {
    const CacheLayout& cache = args.cache;
    const int32_t* table = args.tables + item.row * args.table_stride;
    const int64_t size = cache.block_size;
    const int64_t key_items = cache.slots() * cache.head_dim;
    const bool scaled = has_scales(cache.storage);
    if (size % kTile == 0) {
        uint8_t* const head_block = cache.head_block(args.layer, table[position / size], item.head);
        const T* block = reinterpret_cast<const T*>(head_block);
        chunk.keys[tile] = block + position % size * cache.head_dim;
        chunk.values[tile] = block + key_items + position % size * cache.value_dim();
        chunk.key_scales[tile] = scaled ? scales_of(cache, head_block) + position % size : nullptr;
        chunk.value_scales[tile] = scaled ? chunk.key_scales[tile] + cache.slots() : nullptr;
        return;
    }
    T* const room_values = room + kTile * cache.head_dim;
    float* const room_scales = scaled ? reinterpret_cast<float*>(room_values + kTile * cache.value_dim()) : nullptr;
    for (int64_t j = 0; j < smaller(kTile, end - position); ++j) {
        const int64_t slot = (position + j) % size;
        uint8_t* const head_block = cache.head_block(args.layer, table[(position + j) / size], item.head);
        const T* block = reinterpret_cast<const T*>(head_block);
        const T* from = block + slot / kTile * kTile * cache.head_dim + slot % kTile;
        for (int64_t d = 0; d < cache.head_dim; ++d) room[d * kTile + j] = from[d * kTile];
        __builtin_memcpy(room_values + j * cache.value_dim(), block + key_items + slot * cache.value_dim(),
                         cache.value_dim() * sizeof(T));
        if (!scaled) continue;
        room_scales[j] = scales_of(cache, head_block)[slot];
        room_scales[kTile + j] = scales_of(cache, head_block)[cache.slots() + slot];
    }
    chunk.keys[tile] = room;
    chunk.values[tile] = room_values;
    chunk.key_scales[tile] = room_scales;
    chunk.value_scales[tile] = scaled ? room_scales + kTile : nullptr;
}

// A worker's memory for one item.
struct Scratch {
    SoftmaxState* splits;  // [queries]: the softmax of the current KV split
    SoftmaxState* merged;  // [queries]: of the splits before
    const float** queries;  // [queries]: as they are, or rotated
    float* converted;
    float* gathered;

    static size_t bytes(const AttentionArgs& args, int64_t queries) {
        const int64_t chunk = kChunk * (args.cache.head_dim + args.cache.value_dim());
        const int64_t states = queries * 2 * (args.cache.value_dim() + int64_t(sizeof(SoftmaxState) / 4));
        return (states + 2 * chunk + queries * (args.cache.head_dim + 2) + 64) * sizeof(float);
    }

    Scratch(const AttentionArgs& args, const WorkItem& item, void* memory) {
        const int64_t dims = args.cache.value_dim(), queries = item.tokens * group_of(args);
        float* next = static_cast<float*>(memory);
        converted = next;
        next += kChunk * (args.cache.head_dim + dims);
        gathered = next;
        next += kChunk * (args.cache.head_dim + dims);
        float* acc = next;
        splits = reinterpret_cast<SoftmaxState*>(next + 2 * queries * dims);
        merged = splits + queries;
        this->queries = reinterpret_cast<const float**>(merged + queries);
        find_queries(args, item, reinterpret_cast<float*>(this->queries + queries));
        for (int64_t i = 0; i < queries; ++i) {
            splits[i].acc = acc + i * dims;
            merged[i] = {-__builtin_inff(), 0.0f, acc + (queries + i) * dims};
            __builtin_memset(merged[i].acc, 0, dims * sizeof(float));
        }
    }

private:
    void find_queries(const AttentionArgs& args, const WorkItem& item, float* room) {
        const int64_t group = group_of(args), head_dim = args.cache.head_dim;
        for (int64_t i = 0; i < item.tokens * group; ++i, room += head_dim) {
            const int64_t token = item.first_token + i / group, head = item.head * group + i % group;
            const float* q = args.q + token * args.q_stride + head * head_dim;
            queries[i] = rotated(args.rope, token_position(args, item, i / group), q, head_dim, room);
        }
    }
};

template <class T>
Chunk<float> convert_chunk(const AttentionArgs& args, const Chunk<T>& chunk, float* room) {
    Chunk<float> result;
    const int64_t key_items = kTile * args.cache.head_dim;
    const int64_t value_items = kTile * args.cache.value_dim();
    for (int64_t tile = 0; tile < kTiles; ++tile) {
        result.keys[tile] = room;
        for (int64_t i = 0; i < key_items; i += kLanes) store(room + i, load(chunk.keys[tile] + i));
        room += key_items;
        result.values[tile] = room;
        for (int64_t i = 0; i < value_items; i += kLanes) store(room + i, load(chunk.values[tile] + i));
        room += value_items;
        result.key_scales[tile] = chunk.key_scales[tile];
        result.value_scales[tile] = chunk.value_scales[tile];
    }
    return result;
}

// All queries of the item, in groups of up to four, against the chunk whose first position is `base`.
template <class T>
void attend_queries(const AttentionArgs& args, const WorkItem& item, const Chunk<T>& chunk, const Chunk<T>& next,
                    int64_t base, const Scratch& scratch) {
    const int64_t group = group_of(args);
    const int64_t queries = item.tokens * group;
    const float* vectors[kQueries];
    SoftmaxState* running[kQueries];
    int64_t low[kQueries], high[kQueries];
    int count = 0;
    for (int64_t i = 0; i < queries; ++i) {
        const int64_t position = item.first_position + i / group;
        low[count] = larger(0, begin_of(args, position) - base);
        high[count] = smaller(kChunk, position + 1 - base);
        if (low[count] < high[count]) {
            vectors[count] = scratch.queries[i];
            running[count++] = scratch.splits + i;
        }
        if (count < kQueries && i + 1 < queries) continue;
        switch (count) {
            case 0: break;
            case 1: attend_chunk<1, T>(args, vectors, chunk, next, low, high, running); break;
            case 2: attend_chunk<2, T>(args, vectors, chunk, next, low, high, running); break;
            case 3: attend_chunk<3, T>(args, vectors, chunk, next, low, high, running); break;
            default: attend_chunk<4, T>(args, vectors, chunk, next, low, high, running); break;
        }
        count = 0;
    }
}

// The chunk whose first position is `base`; a tile past the end is the last one again, whose scores are never looked at.
template <class T>
Chunk<T> find_chunk(const AttentionArgs& args, const WorkItem& item, int64_t base, int64_t end, float* gathered) {
    const CacheLayout& cache = args.cache;
    Chunk<T> chunk;
    for (int64_t tile = 0; tile < kTiles; ++tile) {
        const int64_t position = smaller(base + tile * kTile, (end - 1) / kTile * kTile);
        // (as large as of floats: there is room for scales)
        float* const room = gathered + tile * kTile * (cache.head_dim + cache.value_dim());
        find_tile(args, item, position, end, reinterpret_cast<T*>(room), tile, chunk);
    }
    return chunk;
}

// Prefetches all of a chunk at once, before it is converted.
template <class T>
void prefetch(const CacheLayout& cache, const Chunk<T>& chunk) {
    for (int64_t tile = 0; tile < kTiles; ++tile) {
        for (int64_t i = 0; i < kTile * cache.head_dim; i += 64 / int64_t(sizeof(T))) {
            __builtin_prefetch(chunk.keys[tile] + i, 0, 2);
        }
        for (int64_t i = 0; i < kTile * cache.value_dim(); i += 64 / int64_t(sizeof(T))) {
            __builtin_prefetch(chunk.values[tile] + i, 0, 2);
        }
    }
}

template <class T>
void attend_split(const AttentionArgs& args, const WorkItem& item, int64_t split, Scratch& scratch) {
    const CacheLayout& cache = args.cache;
    const int64_t queries = item.tokens * group_of(args);
    const int64_t begin = begin_of(args, item.first_position);
    const int64_t end = item.first_position + item.tokens;
    for (int64_t i = 0; i < queries; ++i) {
        scratch.splits[i].m = -__builtin_inff();
        scratch.splits[i].l = 0.0f;
        __builtin_memset(scratch.splits[i].acc, 0, cache.value_dim() * sizeof(float));
    }
    const int64_t stop = smaller(end, (split + 1) * kKvSplit);
    for (int64_t base = larger(split * kKvSplit, begin / kChunk * kChunk); base < stop; base += kChunk) {
        const Chunk<T> chunk = find_chunk<T>(args, item, base, end, scratch.gathered);
        const bool last = base + kChunk >= stop || cache.block_size % kTile != 0;
        const Chunk<T> next = last ? chunk : find_chunk<T>(args, item, base + kChunk, end, scratch.gathered);
        if (queries < kConvertQueries) {
            attend_queries(args, item, chunk, next, base, scratch);
        } else {
            if (!last) prefetch(cache, next);
            const Chunk<float> converted = convert_chunk(args, chunk, scratch.converted);
            attend_queries(args, item, converted, converted, base, scratch);
        }
    }
}

// The kernel of a work item; the counterpart of `AmxAttention`.
template <class T>
struct VectorAttention {
    using Exponential = NaturalExponential;
    struct TileState {};  // it configures no tiles

    static int64_t tile_tokens(int64_t group) { return larger(1, kVectorQueries / group); }
    // Of a worker, for an item of so many queries.
    static size_t scratch_bytes(const AttentionArgs& args, int64_t queries) { return Scratch::bytes(args, queries); }

    static void write(const AttentionArgs& args, int64_t row, int64_t token, int64_t count, int64_t head, float* room) {
        for (const int64_t end = token + count; token < end; ++token) write_token<T>(args, row, token, head, room);
    }

    static void attend(const LaunchArgs& launch, const WorkItem& item, TileState&, int worker) {
        const AttentionArgs& args = *launch.args;
        const int64_t group = group_of(args), dims = args.cache.value_dim();
        const int64_t queries = item.tokens * group;
        Scratch scratch(args, item, launch.pool->scratch(worker, Scratch::bytes(args, queries)));
        if (item.is_split) {
            attend_split<T>(args, item, item.split, scratch);
            for (int64_t i = 0; i < queries; ++i) {
                float* partial = partial_of(launch, item, i);
                partial[0] = scratch.splits[i].m;
                partial[1] = scratch.splits[i].l;
                __builtin_memcpy(partial + 2, scratch.splits[i].acc, dims * sizeof(float));
            }
            return;
        }
        const int64_t end = item.first_position + item.tokens;
        for (int64_t split = begin_of(args, item.first_position) / kKvSplit; split * kKvSplit < end; ++split) {
            attend_split<T>(args, item, split, scratch);
            for (int64_t i = 0; i < queries; ++i) {
                merge<Exponential>(scratch.merged[i], scratch.splits[i], dims);
            }
        }
        for (int64_t i = 0; i < queries; ++i) {
            finish<Exponential>(args, item.first_token + i / group, item.head * group + i % group, scratch.merged[i],
                                1);
        }
    }
};

}  // namespace quire::QUIRE_ISA
