// Attention on matrix units (AMX): queries, keys, weights and values in bfloat16, sums and softmax in float32.
// Why it is done so: docs/design/attention.md.
//
// A block for one head (a unit of the cache) holds what the units read, without a copy:
//
//   | keys: tiles of 16 positions, each [head_dim / 2][16][2] | values: [value_dim / 16][slots / 2][16][2] |
//
// A group of two tiles of sixteen queries goes through the chunks of a split, 64 positions each from a multiple of 64:
//
//   scores [32][64] = queries [32][head_dim] . keys         weights = 2^(scores - top), rounded to bfloat16
//   mixed [32][value_dim] = weights [32][512] . values, once for all chunks of a split
//
// `top` is the largest score of the first chunk that the query sees of a split: any number of about that size will do,
// as floats of either kind have exponents enough. Where later scores are larger by so much that the weights sum up to
// more than 2^40, the query's largest score of all takes its place and the split is weighed again.
//
// A row of a product depends on that row alone, so a query has the same bits alone and among others; what it must not
// see gets weight 0, and a chunk of which it sees nothing leaves it as it was. Weight 0 times a value that is not
// finite would still be heard: where hidden values are such, each query gets a copy of the values without them.
//
// Rounding queries and weights to bfloat16 moves a result by up to 2^-8 of the largest value, usually far less.
#pragma once

#include "attention_matrix_products.h"
#include "attention_matrix_softmax.h"
#include "attention_matrix_write.h"

namespace quire::QUIRE_ISA {

constexpr int64_t kMatrixQueries = 768;  // query vectors of an item, about
constexpr int64_t kFewQueries = 64;      // up to which values are put together where they are used

constexpr int64_t kSplitChunks = kSplit / kMatrixChunk;
constexpr float kLargestSum = 0x1p40f;

// A worker's memory for one item.
struct MatrixScratch {
    float* rotated;       // [head_dim]
    uint16_t* queries;    // [tiles][steps][16][32]
    float* scores;        // [2 tiles][4][16][16]
    uint16_t* weights;    // [2 tiles][chunks][2][16][32]
    float* mixed;         // [2 tiles][value_dim / 16][16][16]
    float* apart;         // the same, of which only one row is wanted
    uint16_t* gathered;   // [chunks] what MatrixKeys needs for each
    uint16_t* clean;      // [2 chunks][value_dim / 16][32][16][2]
    MatrixTotal* totals;  // [tiles]
    uintptr_t end;

    MatrixScratch(const CacheLayout& cache, int64_t tiles, ThreadPool& pool, int worker)
        : MatrixScratch(cache, tiles, pool.scratch(worker, bytes(cache, tiles))) {
        const int64_t mixed_items = cache.value_dim() * 16;
        float* const sums = reinterpret_cast<float*>(end) - tiles * mixed_items;
        for (int64_t t = 0; t < tiles; ++t) totals[t].mixed = sums + t * mixed_items;
    }
    static size_t bytes(const CacheLayout& cache, int64_t tiles) { return MatrixScratch(cache, tiles, nullptr).end; }

private:
    // What lies where from `memory` on.
    MatrixScratch(const CacheLayout& cache, int64_t tiles, void* memory) : end(reinterpret_cast<uintptr_t>(memory)) {
        const int64_t dims = cache.value_dim(), mixed_bytes = dims * 64;
        take(scores, 2 * 4096);
        take(weights, 2 * kSplitChunks * 2048);
        take(mixed, 2 * mixed_bytes);
        take(apart, 2 * mixed_bytes);
        take(rotated, cache.head_dim * int64_t(sizeof(float)));
        take(queries, tiles * (cache.head_dim / key_step(cache.head_dim)) * 1024);
        take(gathered, kSplitChunks * MatrixKeys::room_items(cache) * 2);
        take(clean, 2 * dims * kMatrixChunk * 2);
        take(totals, tiles * int64_t(sizeof(MatrixTotal)));
        end += tiles * mixed_bytes;  // the sums of the totals
    }
    template <class T>
    void take(T*& part, int64_t bytes) {
        part = reinterpret_cast<T*>(end);
        end += (bytes + 63) / 64 * 64;
    }
};

// One item: queries in the order token, head of the group; sixteen of them are a tile.
class MatrixItem {
public:
    MatrixItem(const Job& job, const Item& item, MatrixUnit& unit, int worker)
        : args_(*job.args), item_(item), group_(group_of(args_)), queries_(item.tokens * group_),
          ahead_(queries_ <= 16 ? 1 : kSplitChunks), head_dim_(args_.cache.head_dim),
          value_dim_(args_.cache.value_dim()),
          unit_(args_.softcap != 0.0f ? kLog2e : magnitude(args_.scale) * kLog2e),
          scratch_(args_.cache, tiles(), *job.pool, worker),
          keys_(args_, item, queries_ <= kFewQueries, scratch_.gathered),
          products_(unit, smaller(queries_, 16), head_dim_, value_dim_, keys_.paired()) {
        for (int t = 0; t < 2; ++t) states_[t].mixed = scratch_.mixed + t * value_dim_ * 16;
        pack_queries();
    }
    MatrixItem(const MatrixItem&) = delete;
    MatrixItem& operator=(const MatrixItem&) = delete;

    // Writes the records of a split.
    void keep_split(const Job& job, int64_t split) {
        attend_split(split, [&](int64_t tile, const MatrixState& state) {
            for (int64_t row = 0; row < rows_of(tile); ++row) {
                float* record = record_of(job, item_, tile * 16 + row);
                record[0] = state.tops[row];
                record[1] = state.sums[row];
                for (int64_t d = 0; d < value_dim_; d += 16) {
                    store(record + 2 + d, load(state.mixed + d * 16 + row * 16));
                }
            }
        });
    }

    // All splits, one after the other.
    void attend_all() {
        for (int64_t tile = 0; tile < tiles(); ++tile) scratch_.totals[tile].empty = true;
        const int64_t end = item_.first_position + item_.tokens;
        for (int64_t split = begin_of(args_, item_.first_position) / kSplit; split * kSplit < end; ++split) {
            attend_split(split, [&](int64_t tile, const MatrixState& state) {
                scratch_.totals[tile].add(state, value_dim_);
            });
        }
        Place place(0, group_);
        for (int64_t query = 0; query < queries_; ++query, place.advance()) {
            const MatrixTotal& total = scratch_.totals[query / 16];
            const int64_t row = query % 16;
            prefetch_output(place);
            finish<BinaryExponential>(args_, item_.first_token + place.token, item_.head * group_ + place.head,
                                      {total.tops[row], total.totals[row], total.mixed + row * 16}, 16);
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

    // Queries and outputs of one token are close together, those of the next one are not: they are asked for here.
    void prefetch_query(const Place& place) const {
        if (place.token + kTokensAhead >= item_.tokens) return;
        const float* q = query_at(place) + kTokensAhead * args_.q_stride;
        for (int64_t d = 0; d < head_dim_; d += 16) __builtin_prefetch(q + d, 0, 3);
    }
    void prefetch_output(const Place& place) const {
        if (place.token + kTokensAhead >= item_.tokens) return;
        const int64_t token = item_.first_token + place.token + kTokensAhead;
        const float* out = args_.out + (token * args_.heads + item_.head * group_ + place.head) * head_dim_;
        for (int64_t d = 0; d < head_dim_; d += 16) __builtin_prefetch(out + d, 1, 3);
    }

    // Tiles are whole, with zeros past the last query, unless there is but one. The sign of the scale goes to the queries:
    // the largest score is the top.
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
        const int64_t end = item_.first_position + item_.tokens, stop = smaller(end, (split + 1) * kSplit);
        start_ = larger(split * kSplit, begin_of(args_, item_.first_position) / kMatrixChunk * kMatrixChunk);
        const int64_t count = (stop - start_ + kMatrixChunk - 1) / kMatrixChunk;
        for (int64_t c = 0; c < count; ++c) {
            chunks_[c] = keys_.find(start_ + c * kMatrixChunk, end, c);
            if (c < ahead_) keys_.prefetch_keys(chunks_[c]);
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
        first_ = seen < start_ ? 0 : smaller(count, (seen - start_) / kMatrixChunk);
        last_ = last < start_ ? first_ : larger(first_, smaller(count, (last - start_) / kMatrixChunk + 1));
        for (int64_t t = 0; t < group_tiles_; ++t) states_[t].clear();
        broken_ = false;
        weigh_chunks();
        if (find_overflow()) {
            for_each_chunk([&](int64_t c, const float* scores) { raise_tops(c, scores); });
            for (int64_t t = 0; t < group_tiles_; ++t) states_[t].clear_totals();
            weigh_chunks();
            find_overflow();
        }
        if (broken_) return mix_rows_apart();
        const int64_t tile_stride = kSplitChunks * 1024;
        products_.mix(scratch_.weights + first_ * 1024, tile_stride, chunks_ + first_, last_ - first_, scratch_.mixed);
    }

    // Calls work(chunk, scores) for each.
    template <class ChunkWork>
    void for_each_chunk(ChunkWork&& work) {
        products_.begin_scores(scratch_.queries + group_tile_ * products_.query_items(), group_tiles_);
        for (int64_t c = first_; c < last_; ++c) {
            products_.score(chunks_[c], scratch_.scores);
            if (args_.softcap != 0.0f) cap(scratch_.scores);
            work(c, scratch_.scores);
        }
    }

    void weigh_chunks() {
        for_each_chunk([&](int64_t c, const float* scores) {
            if (prefetch_) {
                if (queries_ > 16) keys_.prefetch_values(chunks_[c], value_dim_);
                if (c + ahead_ < last_) keys_.prefetch_keys(chunks_[c + ahead_]);
            }
            weigh_chunk(c, scores);
        });
    }

    void weigh_chunk(int64_t c, const float* scores) {
        const Visible visible(*this, c);
        if (!visible.all && !hidden_are_finite(chunks_[c], value_dim_, visible.low, visible.high)) broken_ = true;
        for (int64_t t = 0; t < group_tiles_; ++t, scores += 1024) {
            const int64_t rows = rows_of(group_tile_ + t);
            MatrixState& state = states_[t];
            const uint64_t* seen = visible.all ? nullptr : visible.rows + t * 16;
            const __mmask16 lacking = state.lacking(rows);
            if (lacking != 0) state.raise(lacking, largest_scores(scores, rows, seen), unit_);
            uint16_t* const weights = scratch_.weights + (t * kSplitChunks + c) * 1024;
            if (visible.all) {
                weigh<false>(scores, rows, nullptr, unit_, state, weights);
            } else {
                weigh<true>(scores, rows, seen, unit_, state, weights);
            }
        }
    }

    void raise_tops(int64_t c, const float* scores) {
        const Visible visible(*this, c);
        for (int64_t t = 0; t < group_tiles_; ++t, scores += 1024) {
            const uint64_t* seen = visible.all ? nullptr : visible.rows + t * 16;
            states_[t].raise(overflow_[t], largest_scores(scores, rows_of(group_tile_ + t), seen), unit_);
        }
    }

    bool find_overflow() {
        bool any = false;
        for (int64_t t = 0; t < group_tiles_; ++t) {
            overflow_[t] = states_[t].sum_up(rows_of(group_tile_ + t), kLargestSum);
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
        return {larger(0, begin_of(args_, position) - base), smaller(kMatrixChunk, position + 1 - base)};
    }

    // What each query of the group sees of a chunk.
    struct Visible {
        bool all;
        int64_t low, high;  // what all of them see
        uint64_t rows[32];

        Visible(const MatrixItem& item, int64_t c) {
            const int64_t base = item.start_ + c * kMatrixChunk, first = item.group_tile_ * 16;
            const int64_t count = smaller(item.group_tiles_ * 16, item.queries_ - first);
            all = item.position_of(first) >= base + kMatrixChunk - 1 &&
                  begin_of(item.args_, item.position_of(first + count - 1)) <= base;
            if (all) return;
            low = 0;
            high = kMatrixChunk;
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
    void mix_rows_apart() {
        __builtin_memset(scratch_.mixed, 0, group_tiles_ * value_dim_ * 64);
        const int64_t count = smaller(group_tiles_ * 16, queries_ - group_tile_ * 16);
        for (int64_t row = 0; row < count; ++row) {
            MatrixChunk own[kSplitChunks];
            int64_t first = first_, last = first_, copies = 0;
            for (int64_t c = first_; c < last_; ++c) {
                const Range range = seen_by(position_of(group_tile_ * 16 + row), start_ + c * kMatrixChunk);
                if (range.low >= range.high) {
                    if (last == first) last = first = c + 1;
                    continue;
                }
                own[c] = chunks_[c];
                last = c + 1;
                if (range.low == 0 && range.high == kMatrixChunk) continue;
                uint16_t* const room = scratch_.clean + copies++ * value_dim_ * kMatrixChunk;
                own[c] = without_hidden(chunks_[c], value_dim_, range.low, range.high, room);
            }
            if (first == last) continue;
            const int64_t tile_stride = kSplitChunks * 1024;
            products_.mix(scratch_.weights + first * 1024, tile_stride, own + first, last - first, scratch_.apart);
            for (int64_t d = 0; d < value_dim_; d += 16) {
                const int64_t at = row / 16 * value_dim_ * 16 + (d + row % 16) * 16;
                _mm512_storeu_ps(scratch_.mixed + at, _mm512_loadu_ps(scratch_.apart + at));
            }
        }
    }

    static constexpr int64_t kTokensAhead = 6;  // tokens whose queries, or outputs, are asked for before they are needed

    const AttentionArgs& args_;
    const Item& item_;
    const int64_t group_, queries_;
    // Chunks whose keys are asked for before they are needed: for many tiles of queries a split's; for one the next, as the
    // processor follows the rest by itself, and faster.
    const int64_t ahead_;
    const int64_t head_dim_, value_dim_;
    const float unit_;  // of scores, in binary logits
    MatrixScratch scratch_;
    const MatrixKeys keys_;
    MatrixProducts products_;
    MatrixChunk chunks_[kSplitChunks];
    int64_t start_ = 0;  // the position of chunks_[0]
    bool prefetch_ = false;
    // The group of tiles that is worked on: the chunks of which it sees something, and its softmax.
    int64_t group_tile_ = 0, group_tiles_ = 0, first_ = 0, last_ = 0;
    bool broken_ = false;  // some hidden value is not finite
    MatrixState states_[2];
    __mmask16 overflow_[2];
};

// The program of an item; the counterpart of `VectorAttention`.
struct MatrixAttention {
    using Exponential = BinaryExponential;
    using Unit = MatrixUnit;

    static bool serves(const CacheLayout& cache) {
        return cache.storage == Storage::bfloat16 && cache.head_dim % 2 == 0;
    }

    // Of a worker, for an item of so many queries.
    static size_t scratch_bytes(const AttentionArgs& args, int64_t queries) {
        return MatrixScratch::bytes(args.cache, (queries + 15) / 16);
    }

    static int64_t tile_tokens(int64_t group) {
        const int64_t tokens = kMatrixQueries / group;
        return tokens >= 256 ? 256 : tokens >= 16 ? tokens / 16 * 16 : larger(1, tokens);
    }

    static void write(const AttentionArgs& args, int64_t row, int64_t token, int64_t count, int64_t head, float* room) {
        write_matrix_tokens(args, row, token, count, head, room);
    }

    static void attend(const Job& job, const Item& item, Unit& unit, int worker) {
        MatrixItem work(job, item, unit, worker);
        if (item.divided) {
            work.keep_split(job, item.split);
        } else {
            work.attend_all();
        }
    }
};

}  // namespace quire::QUIRE_ISA
