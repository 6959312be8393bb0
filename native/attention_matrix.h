// Attention on matrix units (AMX): queries, keys, weights and values in bfloat16, sums and softmax in float32.
//
// A block for one head (a unit of the cache) holds what the units read, without a copy:
//
//   | keys: tiles of 16 positions, each [head_dim / 2][16][2] | values: [value_dim / 16][slots / 2][16][2] |
//
// Sixteen queries are the rows of a matrix; 64 positions, from a multiple of 64 on, are one chunk of work:
//
//   scores [16][64] = queries [16][head_dim] . keys        weights = 2^(scores - top), rounded to bfloat16
//   mixed [16][value_dim] += weights [16][64] . values     (whenever top grows by much, mixed shrinks first)
//
// A row of a product depends on that row alone, so a query has the same bits alone and among others; what it must not
// see gets weight 0, and a chunk of which it sees nothing leaves it as it was. Weight 0 times a value that is not
// finite would still be heard: where hidden values are such, each token gets a copy of the values without them.
//
// Rounding queries and weights to bfloat16 moves a result by up to 2^-8 of the largest value, usually far less.
#pragma once

#include "attention_matrix_products.h"
#include "attention_matrix_softmax.h"
#include "attention_matrix_steps.h"
#include "rotate.h"

namespace quire::QUIRE_ISA {

constexpr int64_t kMatrixQueries = 384;  // query vectors of an item, about

inline void write_matrix_token(const AttentionArgs& args, int64_t row, int64_t token, float* room) {
    const CacheLayout& cache = args.cache;
    const int64_t position = args.starts[row] + token - args.query_starts[row];
    const int64_t block = args.tables[row * args.table_stride + position / cache.block_size];
    const int64_t slot = position % cache.block_size, dims = cache.head_dim;
    for (int64_t head = 0; head < cache.kv_heads; ++head) {
        uint16_t* keys = reinterpret_cast<uint16_t*>(cache.unit(args.layer, block, head));
        uint16_t* values = keys + cache.slots() * dims + slot / 2 * 32 + slot % 2;
        keys += slot / kTile * kTile * dims + slot % kTile * 2;
        const float* k = rotated(args.rope, position, args.k + token * args.k_stride + head * dims, dims, room);
        const float* v = args.v + token * args.v_stride + head * dims;
        for (int64_t d = 0; d < cache.value_dim(); d += 16, values += cache.slots() * 16) {
            const __mmask16 present = static_cast<__mmask16>((1u << smaller(16, dims - d)) - 1);
            alignas(32) uint32_t pairs[8];
            const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(present, k + d));
            _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), (__m256i)rounded);
            for (int64_t i = 0; i < smaller(16, dims - d) / 2; ++i) {
                __builtin_memcpy(keys + (d / 2 + i) * 32, pairs + i, 4);
            }
            // Only this token's half of each pair is written: another thread may be writing the other.
            const __m512i spread =
                _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(present, v + d)));
            _mm512_mask_storeu_epi16(values, 0x55555555u, spread);
        }
    }
}

// A worker's memory for one item.
struct MatrixScratch {
    MatrixTile* tiles;
    float* rotated;       // [head_dim]
    uint16_t* queries;    // [tiles][steps][16][32]
    MatrixState* states;  // [tiles]
    float* scores;        // [2][4][16][16]
    uint16_t* weights;    // [2][2][16][32]
    float* apart;         // [value_dim / 16][16][16]: mixed rows of which only some are wanted
    uint16_t* gathered;
    uint16_t* clean;
    MatrixTotal* totals;  // [tiles]

    MatrixScratch(const CacheLayout& cache, int64_t rows, ThreadPool& pool, int worker) {
        const int64_t count = (rows + 15) / 16, steps = cache.head_dim / key_step(cache.head_dim);
        const int64_t dims = cache.value_dim();
        char* next = nullptr;
        const auto take = [&](int64_t bytes) {
            char* const taken = next;
            next += (bytes + 63) / 64 * 64;
            return taken;
        };
        for (int pass = 0; pass < 2; ++pass) {  // the first only counts
            rotated = reinterpret_cast<float*>(take(cache.head_dim * int64_t(sizeof(float))));
            queries = reinterpret_cast<uint16_t*>(take(count * steps * 1024));
            tiles = reinterpret_cast<MatrixTile*>(take(count * int64_t(sizeof(MatrixTile))));
            states = reinterpret_cast<MatrixState*>(take(count * int64_t(sizeof(MatrixState))));
            scores = reinterpret_cast<float*>(take(2 * 4096));
            weights = reinterpret_cast<uint16_t*>(take(2 * 2048));
            apart = reinterpret_cast<float*>(take(dims * 64));
            gathered = reinterpret_cast<uint16_t*>(take(kSplitChunks * MatrixKeys::room_items(cache) * 2));
            clean = reinterpret_cast<uint16_t*>(take(dims * kMatrixChunk * 2));
            totals = reinterpret_cast<MatrixTotal*>(take(count * int64_t(sizeof(MatrixTotal))));
            for (int64_t tile = 0; tile < count; ++tile) {
                float* const mixed = reinterpret_cast<float*>(take(2 * dims * 64));
                if (pass == 0) continue;
                states[tile].mixed = mixed;
                totals[tile].mixed = mixed + dims * 16;
            }
            if (pass == 0) next = static_cast<char*>(pool.scratch(worker, reinterpret_cast<uintptr_t>(next)));
        }
    }
};

// One item: queries in the order token, head of the group; sixteen of them are a tile.
class MatrixItem {
public:
    MatrixItem(const Job& job, const Item& item, int worker)
        : args_(*job.args), item_(item), group_(group_of(args_)), queries_(item.tokens * group_),
          head_dim_(args_.cache.head_dim), value_dim_(args_.cache.value_dim()), step_(key_step(head_dim_)),
          unit_(args_.softcap != 0.0f ? kLog2e : magnitude(args_.scale) * kLog2e),
          scratch_(args_.cache, queries_, *job.pool, worker), keys_(args_, item, scratch_.gathered) {
        for (int64_t tile = 0; tile < tiles(); ++tile) {
            const int64_t first = position_of(tile * 16), last = position_of(last_of(tile));
            scratch_.tiles[tile] = {first, last, begin_of(args_, first), begin_of(args_, last)};
        }
        pack_queries();
        configure(smaller(queries_, 16), step_);
    }
    ~MatrixItem() { _tile_release(); }
    MatrixItem(const MatrixItem&) = delete;
    MatrixItem& operator=(const MatrixItem&) = delete;

    void attend_split(int64_t split) {
        for (int64_t tile = 0; tile < tiles(); ++tile) scratch_.states[tile].clear(value_dim_);
        const int64_t begin = begin_of(args_, item_.first_position) / kMatrixChunk * kMatrixChunk;
        const int64_t end = item_.first_position + item_.tokens;
        Steps steps(keys_, scratch_.tiles, tiles(), larger(split * kSplit, begin), smaller(end, (split + 1) * kSplit),
                    end);
        Step step, next;
        if (!steps.next(step)) return;
        score_ = score_of(step);
        finish_products();
        for (bool more = true; more; step = next) {
            more = steps.next(next);
            float* const scores = scores_;
            if (more) score_ = score_of(next);
            attend(step, scores);
        }
        finish_products();
    }

    // Writes the records of the split.
    void keep_split(const Job& job) const {
        for (int64_t tile = 0; tile < tiles(); ++tile) {
            const MatrixState& state = scratch_.states[tile];
            const Floats sums = state.sums();
            for (int64_t row = 0; row <= last_of(tile) - tile * 16; ++row) {
                float* record = record_of(job, item_, tile * 16 + row);
                record[0] = state.tops[row];
                record[1] = sums[row];
                for (int64_t d = 0; d < value_dim_; d += 16) {
                    store(record + 2 + d, load(state.mixed + d * 16 + row * 16));
                }
            }
        }
    }

    // All splits, one after the other.
    void attend_all() {
        for (int64_t tile = 0; tile < tiles(); ++tile) scratch_.totals[tile].clear(value_dim_);
        const int64_t end = item_.first_position + item_.tokens;
        for (int64_t split = begin_of(args_, item_.first_position) / kSplit; split * kSplit < end; ++split) {
            attend_split(split);
            for (int64_t tile = 0; tile < tiles(); ++tile) {
                scratch_.totals[tile].add(scratch_.states[tile], value_dim_);
            }
        }
        Place place(0, group_);
        for (int64_t query = 0; query < queries_; ++query, place.advance()) {
            const MatrixTotal& total = scratch_.totals[query / 16];
            const int64_t row = query % 16;
            finish<BinaryExponential>(args_, item_.first_token + place.token, item_.head * group_ + place.head,
                                      {total.tops[row], total.totals[row], total.mixed + row * 16}, 16);
        }
    }

private:
    static float magnitude(float x) { return x < 0.0f ? -x : x; }
    int64_t tiles() const { return (queries_ + 15) / 16; }
    int64_t position_of(int64_t query) const { return item_.first_position + query / group_; }
    int64_t last_of(int64_t tile) const { return smaller(tile * 16 + 15, queries_ - 1); }

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

    // Rows past the last query are zero. The sign of the scale goes to the queries: the largest score is the top.
    void pack_queries() {
        const int64_t steps = head_dim_ / step_;
        const __m512i sign = _mm512_set1_epi32(args_.scale < 0.0f && args_.softcap == 0.0f ? INT32_MIN : 0);
        Place place(0, group_);
        for (int64_t row = 0; row < tiles() * 16; ++row, place.advance()) {
            const float* q = args_.q + (item_.first_token + place.token) * args_.q_stride +
                             (item_.head * group_ + place.head) * head_dim_;
            if (row < queries_) {
                q = rotated(args_.rope, token_position(args_, item_, place.token), q, head_dim_, scratch_.rotated);
            }
            uint16_t* to = scratch_.queries + row / 16 * steps * 512 + row % 16 * 32;
            for (int64_t d = 0; d < head_dim_; d += step_, to += 512) {
                const uint32_t present = row < queries_ ? static_cast<uint32_t>((uint64_t{1} << step_) - 1) : 0;
                const __mmask16 low = static_cast<__mmask16>(present), high = static_cast<__mmask16>(present >> 16);
                const __m512i a = _mm512_castps_si512(_mm512_maskz_loadu_ps(low, q + d));
                const __m512i b = _mm512_castps_si512(_mm512_maskz_loadu_ps(high, q + d + 16));
                const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_castsi512_ps(_mm512_xor_si512(b, sign)),
                                                             _mm512_castsi512_ps(_mm512_xor_si512(a, sign)));
                _mm512_storeu_si512(to, (__m512i)rounded);
            }
        }
    }

    ScoreWork score_of(const Step& step) {
        scores_ = scores_ == scratch_.scores ? scratch_.scores + 1024 : scratch_.scores;
        return {scratch_.queries + step.tile * (head_dim_ / step_) * 512, step.chunk, head_dim_, step_, scores_};
    }

    // The matrix unit works on the products of the step before and the scores of the next one while the vector units
    // weigh those of this step.
    void continue_products() {
        if (!mix_.done()) {
            mix_.advance();
        } else if (!score_.done()) {
            score_.advance();
        }
    }

    void finish_products() {
        while (!mix_.done() || !score_.done()) continue_products();
    }

    void attend(const Step& step, float* scores) {
        if (args_.softcap != 0.0f) cap(scores);
        const MatrixTile& tile = scratch_.tiles[step.tile];
        if (tile.first_position < step.base + kMatrixChunk - 1 || tile.last_seen > step.base) {
            return attend_partly(step, scores);
        }
        MatrixState& state = scratch_.states[step.tile];
        uint16_t* const weights = next_weights();
        Lowering lowering;
        weigh<false>(scores, smaller(queries_, 16), nullptr, unit_, state, weights, lowering,
                     [this] { continue_products(); });
        finish_products();
        lowering.apply(state.mixed, value_dim_);
        mix_ = {weights, step.chunk, value_dim_, state.mixed, state.mixed};
    }

    uint16_t* next_weights() {
        odd_ = !odd_;
        return scratch_.weights + odd_ * 1024;
    }

    void cap(float* scores) const {
        for (int64_t i = 0; i < 1024; i += 16) {
            store(scores + i, args_.softcap * tanh(load(scores + i) * args_.scale / args_.softcap));
        }
    }

    // A tile of which some query does not see all of the chunk.
    void attend_partly(const Step& step, const float* scores) {
        uint64_t visible[16] = {};
        const int64_t first = step.tile * 16, rows = last_of(step.tile) - first + 1;
        int64_t low = 0, high = kMatrixChunk;  // what all of them see
        Place place(first, group_);
        for (int64_t row = 0; row < rows; ++row, place.advance()) {
            const Range range = seen_by(item_.first_position + place.token, step.base);
            low = larger(low, range.low);
            high = smaller(high, range.high);
            if (range.low >= range.high) continue;
            visible[row] = ~uint64_t{0} >> (64 - (range.high - range.low)) << range.low;
        }
        MatrixState& state = scratch_.states[step.tile];
        uint16_t* const weights = next_weights();
        Lowering lowering;
        weigh<true>(scores, smaller(queries_, 16), visible, unit_, state, weights, lowering,
                    [this] { continue_products(); });
        finish_products();
        lowering.apply(state.mixed, value_dim_);
        if (hidden_are_finite(*step.chunk, value_dim_, low, high)) {
            mix_apart(weights, *step.chunk, state);
            for (int64_t row = 0; row < rows; ++row) {
                if (visible[row] != 0) keep_row(state, row);
            }
            return;
        }
        for (int64_t row = 0; row < rows; ++row) {
            if (visible[row] == 0) continue;
            const Range range = seen_by(position_of(first + row), step.base);
            mix_apart(weights, without_hidden(*step.chunk, value_dim_, range.low, range.high, scratch_.clean), state);
            keep_row(state, row);
        }
    }

    void mix_apart(const uint16_t* weights, const MatrixChunk& chunk, const MatrixState& state) {
        MixWork mix{weights, &chunk, value_dim_, state.mixed, scratch_.apart};
        while (!mix.done()) mix.advance();
    }

    struct Range {
        int64_t low, high;
    };

    Range seen_by(int64_t position, int64_t base) const {
        return {larger(0, begin_of(args_, position) - base), smaller(kMatrixChunk, position + 1 - base)};
    }

    void keep_row(MatrixState& state, int64_t row) {
        for (int64_t d = 0; d < value_dim_; d += 16) {
            const int64_t at = (d + row) * 16;
            _mm512_storeu_ps(state.mixed + at, _mm512_loadu_ps(scratch_.apart + at));
        }
    }

    const AttentionArgs& args_;
    const Item& item_;
    const int64_t group_, queries_, head_dim_, value_dim_, step_;
    const float unit_;  // of what `score` leaves, in binary logits
    MatrixScratch scratch_;
    const MatrixKeys keys_;
    ScoreWork score_{};
    MixWork mix_{};
    float* scores_ = nullptr;  // where `score_` writes
    bool odd_ = false;
};

// The program of an item; the counterpart of `VectorAttention`.
struct MatrixAttention {
    using Exponential = BinaryExponential;

    static bool serves(const CacheLayout& cache) {
        return cache.storage == Storage::bfloat16 && cache.head_dim % 2 == 0;
    }

    static int64_t tile_tokens(int64_t group) {
        const int64_t tokens = kMatrixQueries / group;
        return tokens >= 128 ? 128 : tokens >= 16 ? tokens / 16 * 16 : larger(1, tokens);
    }

    static void write(const AttentionArgs& args, int64_t row, int64_t token, float* room) {
        write_matrix_token(args, row, token, room);
    }

    static void attend(const Job& job, const Item& item, int worker) {
        MatrixItem work(job, item, worker);
        if (item.divided) {
            work.attend_split(item.split);
            work.keep_split(job);
        } else {
            work.attend_all();
        }
    }
};

}  // namespace quire::QUIRE_ISA
