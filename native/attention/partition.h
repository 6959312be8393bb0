// How attention is partitioned into work items, and how the partial results of a split context are merged.
//
// A work item is some consecutive tokens for one key-value head. A row of few new tokens and a long context is cut at
// every kKvSplit-th position (the KV splits of Flash-Decoding), so that several threads share it. The bits are the same:
// every query's softmax restarts at those positions wherever it runs, and the partial results are merged in order.
//
// Rows of one new token each whose block tables agree over a whole split (a shared prefix) attend to it in one item:
// their keys and values are read once.
#pragma once

#include "runtime/vector_math.h"

namespace quire::QUIRE_ISA {

constexpr int64_t kKvSplit = 512;       // positions of a KV split, after which a new running softmax starts
constexpr int64_t kKvSplitTokens = 16;  // rows of at most so many new tokens are split over their context

// The running softmax of a query over the positions seen so far, as in FlashAttention (arXiv 1805.02867, 2205.14135).
struct SoftmaxState {
    float m;     // row max: the largest score
    float l;     // row sum of P = exp(S - m)
    float* acc;  // [value_dim]: P V
};

struct WorkItem {
    int64_t row;             // whose block table leads to the keys
    int64_t head;            // key-value head
    int64_t first_token;     // of the batch
    int64_t tokens;          // consecutive
    int64_t first_position;  // of the first token; those of the others follow, or all lie behind the split
    int64_t split;           // where `is_split`: the KV split of this item
    bool is_split;
    bool shared;  // token i belongs to row + i, not to row
};

struct LaunchArgs {
    const AttentionArgs* args;
    ThreadPool* pool;
    WorkItem* items;
    float* partials;
    int64_t* partial_starts;  // [rows]: where in `partials` the partial results of a split row begin
    int32_t* unfinished;      // [rows, kv_heads]: KV splits of a row that are not yet attended to
    int64_t count;            // of items
    int64_t batch;            // items that one thread takes at once
    bool writes;              // the thread that attends to a row's last split writes its new keys and values before
};

inline int64_t group_of(const AttentionArgs& args) { return args.heads / args.cache.kv_heads; }
inline int64_t tokens_of(const AttentionArgs& args, int64_t row) {
    return args.query_starts[row + 1] - args.query_starts[row];
}

// Of the item's token `token`. Tokens of several rows stand at positions of their own.
inline int64_t token_position(const AttentionArgs& args, const WorkItem& item, int64_t token) {
    return item.shared ? args.starts[item.row + token] : item.first_position + token;
}

// The first position that a query sees.
inline int64_t begin_of(const AttentionArgs& args, int64_t position) {
    return position < args.window ? 0 : position - args.window + 1;
}

inline int64_t first_split(const AttentionArgs& args, int64_t row) {
    return begin_of(args, args.starts[row]) / kKvSplit;
}
inline int64_t last_split(const AttentionArgs& args, int64_t row) {
    return (args.starts[row] + tokens_of(args, row) - 1) / kKvSplit;
}

inline int64_t partial_floats(const AttentionArgs& args) { return args.cache.value_dim() + 2; }

// The partial result [m, l, acc] of query `query` (of tokens x heads of the group) of the row.
inline float* partial_of(const LaunchArgs& launch, int64_t row, int64_t head, int64_t split, int64_t query) {
    const AttentionArgs& args = *launch.args;
    const int64_t queries = tokens_of(args, row) * group_of(args);
    const int64_t splits = last_split(args, row) - first_split(args, row) + 1;
    const int64_t part = head * splits + split - first_split(args, row);
    return launch.partials + launch.partial_starts[row] + (part * queries + query) * partial_floats(args);
}

// How a running softmax (m_a) is merged with a second one (m_b, l_b), lane by lane: each is rescaled by its factor and
// they are added. One that has seen nothing has l = 0. Exponential is that of the scores' base.
template <class Exponential>
struct Merge {
    Floats m, factor_a, factor_b;

    Merge(Floats m_a, Floats m_b, Floats l_b) {
        const Floats both = max(m_a, m_b);
        factor_a = l_b != 0.0f ? Exponential::of(m_a - both) : splat(1.0f);
        factor_b = l_b != 0.0f ? Exponential::of(m_b - both) : splat(0.0f);
        m = l_b != 0.0f ? both : m_a;
    }
};

template <class Exponential>
inline void merge(SoftmaxState& a, const SoftmaxState& b, int64_t dims) {
    const Merge<Exponential> merge(splat(a.m), splat(b.m), splat(b.l));
    const float factor_a = merge.factor_a[0], factor_b = merge.factor_b[0];
    a.m = merge.m[0];
    a.l = a.l * factor_a + b.l * factor_b;
    for (int64_t d = 0; d < dims; d += kLanes) {
        store(a.acc + d, load(a.acc + d) * factor_a + load(b.acc + d) * factor_b);
    }
}

// Divides acc by l, in which the sink takes part, and writes the head's output. `acc` comes in pieces of 16 dimensions,
// 16 * stride floats apart.
template <class Exponential>
void finish(const AttentionArgs& args, int64_t token, int64_t head, const SoftmaxState& state, int64_t stride) {
    const int64_t dims = args.cache.head_dim;
    float factor = 1.0f, l = state.l;
    if (args.sinks != nullptr) {
        const float sink = args.sinks[head] * Exponential::kUnit;
        const float m = state.m > sink ? state.m : sink;
        factor = Exponential::of(splat(state.m - m))[0];
        l = l * factor + Exponential::of(splat(sink - m))[0];
    }
    float* out = args.out + (token * args.heads + head) * dims;
    const float scale = factor / l;
    for (int64_t d = 0; d < dims; d += 16, out += 16) {
        const float* acc = state.acc + d * stride;
        if (dims - d >= 16) {
            for (int64_t i = 0; i < 16; i += kLanes) store(out + i, load(acc + i) * scale);
        } else {
            for (int64_t i = 0; i < dims - d; ++i) out[i] = acc[i] * scale;
        }
    }
}

template <class Exponential>
void merge_row(const LaunchArgs& launch, int64_t row, int64_t head) {
    const AttentionArgs& args = *launch.args;
    const int64_t group = group_of(args);
    const int64_t first = first_split(args, row), last = last_split(args, row);
    for (int64_t query = 0; query < tokens_of(args, row) * group; ++query) {
        float* partial = partial_of(launch, row, head, first, query);
        SoftmaxState state{partial[0], partial[1], partial + 2};
        for (int64_t split = first + 1; split <= last; ++split) {
            float* next = partial_of(launch, row, head, split, query);
            merge<Exponential>(state, {next[0], next[1], next + 2}, args.cache.value_dim());
        }
        finish<Exponential>(args, args.query_starts[row] + query / group, head * group + query % group, state, 1);
    }
}

// The thread that finishes a row's last KV split merges the partial results, in order.
template <class Exponential>
void close_item(const LaunchArgs& launch, const WorkItem& item) {
    if (!item.is_split) return;
    for (int64_t i = 0; i < (item.shared ? item.tokens : 1); ++i) {
        int32_t* left = launch.unfinished + (item.row + i) * launch.args->cache.kv_heads + item.head;
        if (__atomic_sub_fetch(left, 1, __ATOMIC_ACQ_REL) == 0) merge_row<Exponential>(launch, item.row + i, item.head);
    }
}

inline float* partial_of(const LaunchArgs& launch, const WorkItem& item, int64_t query) {
    const int64_t group = group_of(*launch.args);
    if (!item.shared) return partial_of(launch, item.row, item.head, item.split, query);
    return partial_of(launch, item.row + query / group, item.head, item.split, query % group);
}

// Lists the work items; with `items` null only counts them.
class Partition {
public:
    Partition(const AttentionArgs& args, int64_t tile_tokens, WorkItem* items) : args_(args), tile_(tile_tokens), items_(items) {
        for (int64_t row = 0; row < args.rows; ++row) {
            if (!splits_kv(row)) add_tiles(row);
        }
        add_splits();
    }

    int64_t count() const { return count_; }

    static bool splits_kv(const AttentionArgs& args, int64_t tile_tokens, int64_t row) {
        const int64_t tokens = tokens_of(args, row);
        return tokens == 1 || (tokens <= kKvSplitTokens && tokens <= tile_tokens);
    }

private:
    bool splits_kv(int64_t row) const { return splits_kv(args_, tile_, row); }

    void add(const WorkItem& item) {
        if (items_ != nullptr) items_[count_] = item;
        ++count_;
    }

    // Items with the longest context first, so that threads end together; head by head, so that keys stay in the cache.
    void add_tiles(int64_t row) {
        const int64_t tokens = tokens_of(args_, row);
        for (int64_t head = 0; head < args_.cache.kv_heads; ++head) {
            for (int64_t last = tokens; last > 0; last -= smaller(tile_, last)) {
                const int64_t first = larger(0, last - tile_);
                add({row, head, args_.query_starts[row] + first, last - first, args_.starts[row] + first, 0, false,
                     false});
            }
        }
    }

    // The heads of a row one after the other: their keys and values lie side by side.
    void add_splits() {
        bool more = true;
        for (int64_t split = 0; more; ++split) {
            more = false;
            for (int64_t row = 0; row < args_.rows;) {
                const int64_t last = tokens_of(args_, row) == 0 || !splits_kv(row) ? -1 : last_split(args_, row);
                more = more || last > split;
                if (last < split || first_split(args_, row) > split) {
                    ++row;
                    continue;
                }
                int64_t end = row + 1;
                while (end - row < tile_ && end < args_.rows && shares(row, end, split)) ++end;
                const bool shared = end - row > 1;
                for (int64_t head = 0; head < args_.cache.kv_heads; ++head) {
                    add({row, head, args_.query_starts[row], shared ? end - row : tokens_of(args_, row),
                         args_.starts[row], split, true, shared});
                }
                row = end;
            }
        }
    }

    // Whether two rows of one token have the same blocks in the split, and all of it behind them.
    bool shares(int64_t row, int64_t other, int64_t split) const {
        const int64_t end = (split + 1) * kKvSplit;
        for (const int64_t r : {row, other}) {
            if (tokens_of(args_, r) != 1 || args_.starts[r] < end || begin_of(args_, args_.starts[r]) > 0) return false;
        }
        const int64_t from = split * kKvSplit / args_.cache.block_size, to = (end - 1) / args_.cache.block_size;
        const int32_t* table = args_.tables + row * args_.table_stride;
        const int32_t* other_table = args_.tables + other * args_.table_stride;
        return __builtin_memcmp(table + from, other_table + from, (to - from + 1) * sizeof(int32_t)) == 0;
    }

    const AttentionArgs& args_;
    const int64_t tile_;
    WorkItem* const items_;
    int64_t count_ = 0;
};

}  // namespace quire::QUIRE_ISA
