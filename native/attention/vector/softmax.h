// The inner loops of attention: up to four query vectors against one chunk of 64 positions.
//
// For each query, S, its row max m, P, its row sum l and acc are computed in an order that depends on positions alone.
// How queries are grouped, and where blocks begin, changes nothing.
#pragma once

#include "attention/partition.h"

namespace quire::QUIRE_ISA {

constexpr int64_t kChunk = 64;   // positions for which the running softmax is updated at once
constexpr int kQueries = 4;      // query vectors that share each load of a key or value
constexpr int64_t kTiles = kChunk / kTile;

// The keys and values of a chunk: four tiles of [head_dim][16] and of [16][value_dim]. Where they are 8 bits, a key and a
// value of position j are so many numbers times key_scales[j / 16][j % 16] and value_scales: null where they are not.
template <class T>
struct Chunk {
    const T* keys[kTiles];
    const T* values[kTiles];
    const float* key_scales[kTiles];
    const float* value_scales[kTiles];
};

// Each score or probability times the scale of its position. A position that a query does not see may have any scale.
template <int Q>
void scale_positions(const float* const* scales, float (*scores)[kChunk]) {
    if (scales[0] == nullptr) return;
    for (int64_t j = 0; j < kChunk; j += kLanes) {
        const Floats scale = load(scales[j / kTile] + j % kTile);
        for (int i = 0; i < Q; ++i) store(scores[i] + j, load(scores[i] + j) * scale);
    }
}

// S = Q K^T: scores[i][j] = queries[i] . key j
//
// Meanwhile the keys of `next` are prefetched, a few lines with each dimension: all at once they would fill the buffers of
// the loads that these scores wait for.
template <int Q, class T>
void score(const float* const* queries, const Chunk<T>& chunk, const Chunk<T>& next, int64_t head_dim,
           float (*scores)[kChunk]) {
#if defined(__AVX512F__) || defined(__aarch64__)
    constexpr int V = 4;
#else
    constexpr int V = 2;
#endif
    for (int64_t first = 0; first < kChunk; first += V * kLanes) {
        const T* keys[V];
        for (int v = 0; v < V; ++v) {
            const int64_t position = first + v * kLanes;
            keys[v] = chunk.keys[position / kTile] + position % kTile;
        }
        Floats acc[Q][V] = {};
        for (int64_t d = 0; d < head_dim; ++d) {
            const char* const lines = reinterpret_cast<const char*>(next.keys[d % kTiles]) + d / kTiles * int64_t(sizeof(T)) * 64;
            for (int64_t i = 0; first == 0 && i < int64_t(sizeof(T)); ++i) __builtin_prefetch(lines + i * 64, 0, 2);
            Floats key[V];
            for (int v = 0; v < V; ++v) key[v] = load(keys[v] + d * kTile);
            for (int i = 0; i < Q; ++i) {
                const Floats query = splat(queries[i][d]);
                for (int v = 0; v < V; ++v) acc[i][v] = fma(query, key[v], acc[i][v]);
            }
        }
        for (int i = 0; i < Q; ++i) {
            for (int v = 0; v < V; ++v) store(scores[i] + first + v * kLanes, acc[i][v]);
        }
    }
}

// P = exp(S - m) in place of S at the visible positions [low[i], high[i]) of the chunk, 0 at the others; m and l follow,
// and acc is rescaled where m grows. Each stage runs for all queries before the next one begins: their chains of
// dependent instructions overlap.
template <int Q>
void softmax_chunk(const AttentionArgs& args, const int64_t* low, const int64_t* high, float (*scores)[kChunk],
                   SoftmaxState* const* states) {
    const float lowest = -__builtin_inff();
    float m[Q];
    for (int i = 0; i < Q; ++i) {
        for (int64_t j = 0; j < kChunk; j += kLanes) {
            Floats s = load(scores[i] + j) * args.scale;
            if (args.softcap != 0.0f) s = args.softcap * tanh(s / args.softcap);
            store(scores[i] + j, s);
        }
        for (int64_t j = 0; j < low[i]; ++j) scores[i][j] = lowest;
        for (int64_t j = high[i]; j < kChunk; ++j) scores[i][j] = lowest;
    }
    for (int i = 0; i < Q; ++i) {
        Floats best = splat(lowest);
        for (int64_t j = 0; j < kChunk; j += kLanes) best = max(best, load(scores[i] + j));
        const float chunk_max = max_lanes(best);
        m[i] = states[i]->m > chunk_max ? states[i]->m : chunk_max;
    }
    for (int i = 0; i < Q; ++i) {
        Floats sum{};
        for (int64_t j = 0; j < kChunk; j += kLanes) {
            const Floats p = exp(load(scores[i] + j) - m[i]);
            store(scores[i] + j, p);
            sum = sum + p;
        }
        SoftmaxState& state = *states[i];
        if (state.m == m[i]) {
            state.l += sum_lanes(sum);
            continue;
        }
        const float rescale = exp(splat(state.m - m[i]))[0];
        state.m = m[i];
        state.l = state.l * rescale + sum_lanes(sum);
        const int64_t dims = (args.cache.head_dim + 15) / 16 * 16;
        for (int64_t d = 0; d < dims; ++d) state.acc[d] *= rescale;
    }
}

// acc[i] += P V: the sum over j in [low, high) of probabilities[i][j] * value j; meanwhile those of `next` are prefetched.
template <int Q, class T>
void accumulate_values(const float (*probabilities)[kChunk], const Chunk<T>& chunk, const Chunk<T>& next, int64_t low,
                       int64_t high, int64_t dims, SoftmaxState* const* states) {
#if defined(__AVX512F__) || defined(__aarch64__)
    constexpr int V = 4;
#else
    constexpr int V = 2;
#endif
    for (int64_t d = 0; d < dims; d += V * kLanes) {
        // The last vectors of a narrow head repeat an earlier one: right values, written twice.
        int64_t at[V];
        for (int v = 0; v < V; ++v) at[v] = smaller(d + v * kLanes, dims - kLanes);
        Floats acc[Q][V];
        for (int i = 0; i < Q; ++i) {
            for (int v = 0; v < V; ++v) acc[i][v] = load(states[i]->acc + at[v]);
        }
        for (int64_t j = low; j < high; ++j) {
            const int64_t at_row = j % kTile * dims;
            const T* row = chunk.values[j / kTile] + at_row;
            const char* const lines = reinterpret_cast<const char*>(next.values[j / kTile] + at_row + d);
            for (int64_t i = 0; i < V * kLanes * int64_t(sizeof(T)); i += 64) __builtin_prefetch(lines + i, 0, 2);
            Floats value[V];
            for (int v = 0; v < V; ++v) value[v] = load(row + at[v]);
            for (int i = 0; i < Q; ++i) {
                const Floats p = splat(probabilities[i][j]);
                for (int v = 0; v < V; ++v) acc[i][v] = fma(p, value[v], acc[i][v]);
            }
        }
        for (int i = 0; i < Q; ++i) {
            for (int v = 0; v < V; ++v) store(states[i]->acc + at[v], acc[i][v]);
        }
    }
}

// One chunk for Q queries; query i sees positions [low[i], high[i]) of it, counted from the chunk's first. `next` comes after
// it, or is it again.
template <int Q, class T>
void attend_chunk(const AttentionArgs& args, const float* const* queries, const Chunk<T>& chunk,
                  const Chunk<T>& next, const int64_t* low, const int64_t* high, SoftmaxState* const* states) {
    float scores[Q][kChunk];
    score<Q, T>(queries, chunk, next, args.cache.head_dim, scores);
    scale_positions<Q>(chunk.key_scales, scores);
    softmax_chunk<Q>(args, low, high, scores, states);
    scale_positions<Q>(chunk.value_scales, scores);
    int64_t shared_low = 0, shared_high = kChunk;
    for (int i = 0; i < Q; ++i) {
        shared_low = larger(shared_low, low[i]);
        shared_high = smaller(shared_high, high[i]);
    }
    // Never a position the query may not see, not even with p = 0: it may hold another request's NaN.
    const int64_t dims = (args.cache.head_dim + 15) / 16 * 16;
    const bool share = shared_low < shared_high;
    for (int i = 0; i < Q; ++i) {
        const int64_t end = share ? shared_low : high[i];
        if (low[i] < end) accumulate_values<1, T>(&scores[i], chunk, next, low[i], end, dims, &states[i]);
    }
    if (!share) return;
    accumulate_values<Q, T>(scores, chunk, next, shared_low, shared_high, dims, states);
    for (int i = 0; i < Q; ++i) {
        if (shared_high < high[i]) accumulate_values<1, T>(&scores[i], chunk, next, shared_high, high[i], dims, &states[i]);
    }
}

}  // namespace quire::QUIRE_ISA
