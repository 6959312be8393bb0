// Attention on AMX: Q, K, P and V in bfloat16, sums and softmax in float32. Why it is done so: docs/design/attention.md.
//
// A head block of the cache (one block for one head) is in the order of AMX tiles, which read it without a copy:
//
//   | keys: tiles of 16 positions, each [head_dim / 2][16][2] | values: [value_dim / 16][slots / 2][16][2] |
//
// A group of two tiles of sixteen queries goes through the chunks of a KV split, 64 positions each from a multiple of 64:
//
//   S [32][64] = Q [32][head_dim] K^T         P = 2^(S - m), rounded to bfloat16
//   acc [32][value_dim] = P [32][512] V, once for all chunks of a split
//
// `m` is the row max of the first chunk that the query sees of a split: any number of about that size will do, as floats
// of either kind have exponents enough. Where later scores are larger by so much that the row sum of P exceeds 2^40, the
// row max of all chunks takes its place and the softmax of the split is computed again.
//
// A row of a GEMM depends on that row alone, so a query has the same bits alone and among others; P is 0 where the query
// must not look, and a chunk of which it sees nothing leaves it as it was. 0 times a value that is not finite is NaN:
// where hidden values are such, each query gets a copy of the values without them.
//
// Rounding queries and probabilities to bfloat16 moves a result by up to 2^-8 of the largest value, usually far less.
#pragma once

#include "attention/amx/gemm.h"
#include "attention/amx/softmax.h"
#include "attention/amx/write.h"

namespace quire::QUIRE_ISA {

constexpr int64_t kAmxQueries = 768;  // query vectors of a work item, about
constexpr int64_t kFewQueries = 64;   // up to which values are put together where they are used

constexpr int64_t kKvSplitChunks = kKvSplit / kAmxChunk;
constexpr float kMaxRowSum = 0x1p40f;

// A worker's memory for one item.
struct AmxScratch {
    float* rotated;             // [head_dim]
    uint16_t* queries;          // [tiles][steps][16][32]
    float* scores;              // [2 tiles][4][16][16]
    uint16_t* probabilities;    // [2 tiles][chunks][2][16][32]
    float* acc;                 // [2 tiles][value_dim / 16][16][16]
    float* apart;               // the same, of which only one row is wanted
    uint16_t* gathered;         // [chunks] what AmxKeys needs for each
    uint16_t* clean;            // [2 chunks][value_dim / 16][32][16][2]
    AmxRunningSoftmax* merged;  // [tiles]
    uintptr_t end;

    AmxScratch(const CacheLayout& cache, int64_t tiles, ThreadPool& pool, int worker)
        : AmxScratch(cache, tiles, pool.scratch(worker, bytes(cache, tiles))) {
        const int64_t acc_items = cache.value_dim() * 16;
        float* const first = reinterpret_cast<float*>(end) - tiles * acc_items;
        for (int64_t t = 0; t < tiles; ++t) merged[t].acc = first + t * acc_items;
    }
    static size_t bytes(const CacheLayout& cache, int64_t tiles) { return AmxScratch(cache, tiles, nullptr).end; }

private:
    // What lies where from `memory` on.
    AmxScratch(const CacheLayout& cache, int64_t tiles, void* memory) : end(reinterpret_cast<uintptr_t>(memory)) {
        const int64_t dims = cache.value_dim(), acc_bytes = dims * 64;
        take(scores, 2 * 4096);
        take(probabilities, 2 * kKvSplitChunks * 2048);
        take(acc, 2 * acc_bytes);
        take(apart, 2 * acc_bytes);
        take(rotated, cache.head_dim * int64_t(sizeof(float)));
        take(queries, tiles * (cache.head_dim / key_step(cache.head_dim)) * 1024);
        take(gathered, kKvSplitChunks * AmxKeys::room_items(cache) * 2);
        take(clean, 2 * dims * kAmxChunk * 2);
        take(merged, tiles * int64_t(sizeof(AmxRunningSoftmax)));
        end += tiles * acc_bytes;  // acc of `merged`
    }
    template <class T>
    void take(T*& part, int64_t bytes) {
        part = reinterpret_cast<T*>(end);
        end += (bytes + 63) / 64 * 64;
    }
};

// One item: queries in the order token, head of the group; sixteen of them are a tile.
class AmxWorkItem {
public:
    AmxWorkItem(const LaunchArgs& launch, const WorkItem& item, AmxTileConfig& tiles_config, int worker)
        : args_(*launch.args), item_(item), group_(group_of(args_)), queries_(item.tokens * group_),
          prefetch_chunks_(queries_ <= 16 ? 1 : kKvSplitChunks), head_dim_(args_.cache.head_dim),
          value_dim_(args_.cache.value_dim()),
          scale_log2_(args_.softcap != 0.0f ? kLog2e : magnitude(args_.scale) * kLog2e),
          scratch_(args_.cache, tiles(), *launch.pool, worker),
          keys_(args_, item, queries_ <= kFewQueries, scratch_.gathered),
          gemm_(tiles_config, smaller(queries_, 16), head_dim_, value_dim_, keys_.paired()) {
        for (int t = 0; t < 2; ++t) states_[t].acc = scratch_.acc + t * value_dim_ * 16;
        pack_queries();
    }
    AmxWorkItem(const AmxWorkItem&) = delete;
    AmxWorkItem& operator=(const AmxWorkItem&) = delete;

    // Writes the partial results of a KV split.
    void store_partial(const LaunchArgs& launch, int64_t split) {
        attend_split(split, [&](int64_t tile, const AmxSoftmaxState& state) {
            for (int64_t row = 0; row < rows_of(tile); ++row) {
                float* partial = partial_of(launch, item_, tile * 16 + row);
                partial[0] = state.m[row];
                partial[1] = state.l[row];
                for (int64_t d = 0; d < value_dim_; d += 16) {
                    store(partial + 2 + d, load(state.acc + d * 16 + row * 16));
                }
            }
        });
    }

    // All splits, one after the other.
    void attend_all() {
        for (int64_t tile = 0; tile < tiles(); ++tile) scratch_.merged[tile].empty = true;
        const int64_t end = item_.first_position + item_.tokens;
        for (int64_t split = begin_of(args_, item_.first_position) / kKvSplit; split * kKvSplit < end; ++split) {
            attend_split(split, [&](int64_t tile, const AmxSoftmaxState& state) {
                scratch_.merged[tile].add(state, value_dim_);
            });
        }
        Place place(0, group_);
        for (int64_t query = 0; query < queries_; ++query, place.advance()) {
            const AmxRunningSoftmax& state = scratch_.merged[query / 16];
            const int64_t row = query % 16;
            prefetch_output(place);
            finish<BinaryExponential>(args_, item_.first_token + place.token, item_.head * group_ + place.head,
                                      {state.m[row], state.l[row], state.acc + row * 16}, 16);
        }
    }

private:
    static float magnitude(float x) { return x < 0.0f ? -x : x; }
    int64_t tiles() const { return (queries_ + 15) / 16; }
    int64_t position_of(int64_t query) const { return item_.first_position + query / group_; }
    int64_t rows_of(int64_t tile) const { return smaller(16, queries_ - tile * 16); }

    // Token and head of the group of consecutive queries, without a division for each.
    struct Place {
        int64_t token, head, group;

        Place(int64_t query, int64_t heads) : token(query / heads), head(query % heads), group(heads) {}
        void advance() {
            if (++head < group) return;
            head = 0;
            ++token;
        }
    };

    const float* query_at(const Place& place) const {
        return args_.q + (item_.first_token + place.token) * args_.q_stride +
               (item_.head * group_ + place.head) * head_dim_;
    }

    // Queries and outputs of one token are close together, those of the next one are not: they are prefetched here.
    void prefetch_query(const Place& place) const {
        if (place.token + kPrefetchTokens >= item_.tokens) return;
        const float* q = query_at(place) + kPrefetchTokens * args_.q_stride;
        for (int64_t d = 0; d < head_dim_; d += 16) __builtin_prefetch(q + d, 0, 3);
    }
    void prefetch_output(const Place& place) const {
        if (place.token + kPrefetchTokens >= item_.tokens) return;
        const int64_t token = item_.first_token + place.token + kPrefetchTokens;
        const float* out = args_.out + (token * args_.heads + item_.head * group_ + place.head) * head_dim_;
        for (int64_t d = 0; d < head_dim_; d += 16) __builtin_prefetch(out + d, 1, 3);
    }

    // Tiles are whole, with zeros past the last query, unless there is but one. The sign of the scale goes to the queries:
    // the largest score is the row max.
    void pack_queries() {
        const int64_t step = key_step(head_dim_), steps = head_dim_ / step;
        const __m512i sign = _mm512_set1_epi32(args_.scale < 0.0f && args_.softcap == 0.0f ? INT32_MIN : 0);
        const __mmask16 low = first_lanes(step), high = first_lanes(step - 16);
        Place place(0, group_);
        for (int64_t row = 0; row < queries_; ++row, place.advance()) {
            prefetch_query(place);
            const HeadVectors q(args_.rope, token_position(args_, item_, place.token), query_at(place), head_dim_,
                                scratch_.rotated);
            uint16_t* to = packed_query(row, steps);
            for (int64_t d = 0; d < head_dim_; d += step, to += 512) {
                const __m512i a = _mm512_castps_si512(q.at(d, low));
                const __m512i b = high == 0 ? a : _mm512_castps_si512(q.at(d + 16, high));
                const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_castsi512_ps(_mm512_xor_si512(b, sign)),
                                                             _mm512_castsi512_ps(_mm512_xor_si512(a, sign)));
                _mm512_storeu_si512(to, (__m512i)rounded);
            }
        }
        for (int64_t row = queries_; queries_ > 16 && row < tiles() * 16; ++row) {
            uint16_t* const to = packed_query(row, steps);
            for (int64_t s = 0; s < steps; ++s) _mm512_storeu_si512(to + s * 512, _mm512_setzero_si512());
        }
    }

    uint16_t* packed_query(int64_t row, int64_t steps) const {
        return scratch_.queries + row / 16 * steps * 512 + row % 16 * 32;
    }

    // Calls keep(tile, state) for each tile that sees something of the split.
    template <class Keep>
    void attend_split(int64_t split, Keep&& keep) {
        const int64_t end = item_.first_position + item_.tokens, stop = smaller(end, (split + 1) * kKvSplit);
        start_ = larger(split * kKvSplit, begin_of(args_, item_.first_position) / kAmxChunk * kAmxChunk);
        const int64_t count = (stop - start_ + kAmxChunk - 1) / kAmxChunk;
        for (int64_t c = 0; c < count; ++c) {
            chunks_[c] = keys_.find(start_ + c * kAmxChunk, end, c);
            if (c < prefetch_chunks_) keys_.prefetch_keys(chunks_[c]);
        }
        prefetch_ = true;
        for (int64_t tile = 0; tile < tiles(); tile += 2) {
            group_tile_ = tile;
            group_tiles_ = smaller(2, tiles() - tile);
            attend_group(count);
            for (int64_t t = 0; t < group_tiles_; ++t) keep(tile + t, states_[t]);
            prefetch_ = false;
        }
    }

    // The group's tiles against the chunks of the split.
    void attend_group(int64_t count) {
        const int64_t last = position_of(smaller((group_tile_ + group_tiles_) * 16, queries_) - 1);
        const int64_t seen = begin_of(args_, position_of(group_tile_ * 16));
        first_ = seen < start_ ? 0 : smaller(count, (seen - start_) / kAmxChunk);
        last_ = last < start_ ? first_ : larger(first_, smaller(count, (last - start_) / kAmxChunk + 1));
        for (int64_t t = 0; t < group_tiles_; ++t) states_[t].clear();
        hidden_nonfinite_ = false;
        softmax_chunks();
        if (find_overflow()) {
            for_each_chunk([&](int64_t c, const float* scores) { rescale_chunk(c, scores); });
            for (int64_t t = 0; t < group_tiles_; ++t) states_[t].clear_l();
            softmax_chunks();
            find_overflow();
        }
        if (hidden_nonfinite_) return accumulate_rows_apart();
        const int64_t tile_stride = kKvSplitChunks * 1024;
        gemm_.accumulate_values(scratch_.probabilities + first_ * 1024, tile_stride, chunks_ + first_, last_ - first_,
                                scratch_.acc);
    }

    // Calls work(chunk, scores) for each.
    template <class ChunkWork>
    void for_each_chunk(ChunkWork&& work) {
        gemm_.begin_scores(scratch_.queries + group_tile_ * gemm_.query_items(), group_tiles_);
        for (int64_t c = first_; c < last_; ++c) {
            gemm_.score(chunks_[c], scratch_.scores);
            if (args_.softcap != 0.0f) cap(scratch_.scores);
            work(c, scratch_.scores);
        }
    }

    void softmax_chunks() {
        for_each_chunk([&](int64_t c, const float* scores) {
            if (prefetch_) {
                if (queries_ > 16) keys_.prefetch_values(chunks_[c], value_dim_);
                if (c + prefetch_chunks_ < last_) keys_.prefetch_keys(chunks_[c + prefetch_chunks_]);
            }
            softmax_chunk(c, scores);
        });
    }

    void softmax_chunk(int64_t c, const float* scores) {
        const Visible visible(*this, c);
        if (!visible.all && !hidden_are_finite(chunks_[c], value_dim_, visible.low, visible.high)) {
            hidden_nonfinite_ = true;
        }
        for (int64_t t = 0; t < group_tiles_; ++t, scores += 1024) {
            const int64_t rows = rows_of(group_tile_ + t);
            AmxSoftmaxState& state = states_[t];
            const uint64_t* seen = visible.all ? nullptr : visible.rows + t * 16;
            const __mmask16 without_max = state.without_max(rows);
            if (without_max != 0) state.rescale(without_max, row_max(scores, rows, seen), scale_log2_);
            uint16_t* const probabilities = scratch_.probabilities + (t * kKvSplitChunks + c) * 1024;
            if (visible.all) {
                compute_probabilities<false>(scores, rows, nullptr, scale_log2_, state, probabilities);
            } else {
                compute_probabilities<true>(scores, rows, seen, scale_log2_, state, probabilities);
            }
        }
    }

    void rescale_chunk(int64_t c, const float* scores) {
        const Visible visible(*this, c);
        for (int64_t t = 0; t < group_tiles_; ++t, scores += 1024) {
            const uint64_t* seen = visible.all ? nullptr : visible.rows + t * 16;
            states_[t].rescale(overflow_[t], row_max(scores, rows_of(group_tile_ + t), seen), scale_log2_);
        }
    }

    bool find_overflow() {
        bool any = false;
        for (int64_t t = 0; t < group_tiles_; ++t) {
            overflow_[t] = states_[t].sum_up(rows_of(group_tile_ + t), kMaxRowSum);
            any = any || overflow_[t] != 0;
        }
        return any;
    }

    void cap(float* scores) const {
        for (int64_t i = 0; i < group_tiles_ * 1024; i += 16) {
            store(scores + i, args_.softcap * tanh(load(scores + i) * args_.scale / args_.softcap));
        }
    }

    struct Range {
        int64_t low, high;
    };

    Range seen_by(int64_t position, int64_t base) const {
        return {larger(0, begin_of(args_, position) - base), smaller(kAmxChunk, position + 1 - base)};
    }

    // What each query of the group sees of a chunk.
    struct Visible {
        bool all;
        int64_t low, high;  // what all of them see
        uint64_t rows[32];

        Visible(const AmxWorkItem& item, int64_t c) {
            const int64_t base = item.start_ + c * kAmxChunk, first = item.group_tile_ * 16;
            const int64_t count = smaller(item.group_tiles_ * 16, item.queries_ - first);
            all = item.position_of(first) >= base + kAmxChunk - 1 &&
                  begin_of(item.args_, item.position_of(first + count - 1)) <= base;
            if (all) return;
            low = 0;
            high = kAmxChunk;
            Place place(first, item.group_);
            for (int64_t row = 0; row < count; ++row, place.advance()) {
                const Range range = item.seen_by(item.item_.first_position + place.token, base);
                low = larger(low, range.low);
                high = smaller(high, range.high);
                rows[row] = range.low < range.high ? ~uint64_t{0} >> (64 - (range.high - range.low)) << range.low : 0;
            }
        }
    };

    // Each query with the values that it sees, and zeros in place of the others.
    void accumulate_rows_apart() {
        __builtin_memset(scratch_.acc, 0, group_tiles_ * value_dim_ * 64);
        const int64_t count = smaller(group_tiles_ * 16, queries_ - group_tile_ * 16);
        for (int64_t row = 0; row < count; ++row) {
            AmxChunk own[kKvSplitChunks];
            int64_t first = first_, last = first_, copies = 0;
            for (int64_t c = first_; c < last_; ++c) {
                const Range range = seen_by(position_of(group_tile_ * 16 + row), start_ + c * kAmxChunk);
                if (range.low >= range.high) {
                    if (last == first) last = first = c + 1;
                    continue;
                }
                own[c] = chunks_[c];
                last = c + 1;
                if (range.low == 0 && range.high == kAmxChunk) continue;
                uint16_t* const room = scratch_.clean + copies++ * value_dim_ * kAmxChunk;
                own[c] = without_hidden(chunks_[c], value_dim_, range.low, range.high, room);
            }
            if (first == last) continue;
            const int64_t tile_stride = kKvSplitChunks * 1024;
            gemm_.accumulate_values(scratch_.probabilities + first * 1024, tile_stride, own + first, last - first,
                                    scratch_.apart);
            for (int64_t d = 0; d < value_dim_; d += 16) {
                const int64_t at = row / 16 * value_dim_ * 16 + (d + row % 16) * 16;
                _mm512_storeu_ps(scratch_.acc + at, _mm512_loadu_ps(scratch_.apart + at));
            }
        }
    }

    static constexpr int64_t kPrefetchTokens = 6;  // tokens by which queries, or outputs, are prefetched

    const AttentionArgs& args_;
    const WorkItem& item_;
    const int64_t group_, queries_;
    // Chunks by which keys are prefetched: for many tiles of queries a whole split; for one tile the next chunk, as the
    // processor's own prefetcher follows the rest, and faster.
    const int64_t prefetch_chunks_;
    const int64_t head_dim_, value_dim_;
    const float scale_log2_;  // FlashAttention's softmax_scale_log2: scores become exponents of two
    AmxScratch scratch_;
    const AmxKeys keys_;
    AmxGemm gemm_;
    AmxChunk chunks_[kKvSplitChunks];
    int64_t start_ = 0;  // the position of chunks_[0]
    bool prefetch_ = false;
    // The group of tiles that is worked on: the chunks of which it sees something, and its softmax.
    int64_t group_tile_ = 0, group_tiles_ = 0, first_ = 0, last_ = 0;
    bool hidden_nonfinite_ = false;  // some hidden value is not finite
    AmxSoftmaxState states_[2];
    __mmask16 overflow_[2];
};

// The kernel of a work item; the counterpart of `VectorAttention`.
struct AmxAttention {
    using Exponential = BinaryExponential;
    using TileState = AmxTileConfig;

    static bool serves(const CacheLayout& cache) {
        return cache.storage == Storage::bfloat16 && cache.head_dim % 2 == 0;
    }

    // Of a worker, for an item of so many queries.
    static size_t scratch_bytes(const AttentionArgs& args, int64_t queries) {
        return AmxScratch::bytes(args.cache, (queries + 15) / 16);
    }

    static int64_t tile_tokens(int64_t group) {
        const int64_t tokens = kAmxQueries / group;
        return tokens >= 256 ? 256 : tokens >= 16 ? tokens / 16 * 16 : larger(1, tokens);
    }

    static void write(const AttentionArgs& args, int64_t row, int64_t token, int64_t count, int64_t head, float* room) {
        write_amx_tokens(args, row, token, count, head, room);
    }

    static void attend(const LaunchArgs& launch, const WorkItem& item, TileState& tiles, int worker) {
        AmxWorkItem work(launch, item, tiles, worker);
        if (item.is_split) {
            work.store_partial(launch, item.split);
        } else {
            work.attend_all();
        }
    }
};

}  // namespace quire::QUIRE_ISA
