// How attention is divided into items of work, and how the parts of a divided context come together.
//
// An item is some consecutive tokens for one key-value head. A row of few new tokens and a long context is cut at
// every kSplit-th position, so that several threads can share it. The result is the same: every query's softmax
// restarts at those positions wherever it runs, and the pieces merge in order.
//
// Rows of one new token each whose block tables agree over a whole split (a shared prefix) attend to it in one item:
// their keys and values are read once.
#pragma once

#include "functions.h"

namespace quire::QUIRE_ISA {

constexpr int64_t kSplit = 512;       // positions after which a new running softmax starts
constexpr int64_t kSplitTokens = 16;  // rows of at most so many new tokens are divided over their context

// A running softmax over the positions seen so far (arXiv 1805.02867).
struct Running {
    float top;     // the largest score
    float total;   // sum of exp(score - top)
    float* mixed;  // [value_dim]: sum of exp(score - top) * value
};

struct Item {
    int64_t row;             // whose block table leads to the keys
    int64_t head;            // key-value head
    int64_t first_token;     // of the batch
    int64_t tokens;          // consecutive
    int64_t first_position;  // of the first token; those of the others follow, or all lie behind the split
    int64_t split;           // where `divided`: the only split of this item
    bool divided;
    bool shared;  // token i belongs to row + i, not to row
};

struct Job {
    const AttentionArgs* args;
    ThreadPool* pool;
    Item* items;
    float* partials;
    int64_t* partial_starts;  // [rows]: where in `partials` a divided row's records begin
    int32_t* unfinished;      // [rows, kv_heads]: splits of a divided row that are not yet attended to
    int64_t count;            // of items
    int64_t batch;            // items that one thread takes at once
    bool writes;              // whoever attends to a row's last split writes its new keys and values before
};

inline int64_t group_of(const AttentionArgs& args) { return args.heads / args.cache.kv_heads; }
inline int64_t tokens_of(const AttentionArgs& args, int64_t row) {
    return args.query_starts[row + 1] - args.query_starts[row];
}

// Of the item's token `token`. Tokens of several rows stand at positions of their own.
inline int64_t token_position(const AttentionArgs& args, const Item& item, int64_t token) {
    return item.shared ? args.starts[item.row + token] : item.first_position + token;
}

// The first position that a query sees.
inline int64_t begin_of(const AttentionArgs& args, int64_t position) {
    return position < args.window ? 0 : position - args.window + 1;
}

inline int64_t first_split(const AttentionArgs& args, int64_t row) {
    return begin_of(args, args.starts[row]) / kSplit;
}
inline int64_t last_split(const AttentionArgs& args, int64_t row) {
    return (args.starts[row] + tokens_of(args, row) - 1) / kSplit;
}

inline int64_t record_floats(const AttentionArgs& args) { return args.cache.value_dim() + 2; }

// The record [top, total, mixed] of query `query` (of tokens x heads of the group) of the row.
inline float* record_of(const Job& job, int64_t row, int64_t head, int64_t split, int64_t query) {
    const AttentionArgs& args = *job.args;
    const int64_t queries = tokens_of(args, row) * group_of(args);
    const int64_t splits = last_split(args, row) - first_split(args, row) + 1;
    const int64_t part = head * splits + split - first_split(args, row);
    return job.partials + job.partial_starts[row] + (part * queries + query) * record_floats(args);
}

// How a running softmax (top_a) goes on with a second one (top_b, total_b), lane by lane: each is multiplied by its
// factor and they are added. One that has seen nothing has total 0. Exponential is that of the scores' unit.
template <class Exponential>
struct Merge {
    Floats top, factor_a, factor_b;

    Merge(Floats top_a, Floats top_b, Floats total_b) {
        const Floats both = max(top_a, top_b);
        factor_a = total_b != 0.0f ? Exponential::of(top_a - both) : splat(1.0f);
        factor_b = total_b != 0.0f ? Exponential::of(top_b - both) : splat(0.0f);
        top = total_b != 0.0f ? both : top_a;
    }
};

template <class Exponential>
inline void merge(Running& a, const Running& b, int64_t dims) {
    const Merge<Exponential> merge(splat(a.top), splat(b.top), splat(b.total));
    const float factor_a = merge.factor_a[0], factor_b = merge.factor_b[0];
    a.top = merge.top[0];
    a.total = a.total * factor_a + b.total * factor_b;
    for (int64_t d = 0; d < dims; d += kLanes) {
        store(a.mixed + d, load(a.mixed + d) * factor_a + load(b.mixed + d) * factor_b);
    }
}

// Divide by the total, in which the sink takes part, and write the head's output. `mixed` comes in pieces of 16
// dimensions, 16 * stride floats apart.
template <class Exponential>
void finish(const AttentionArgs& args, int64_t token, int64_t head, const Running& state, int64_t stride) {
    const int64_t dims = args.cache.head_dim;
    float factor = 1.0f, total = state.total;
    if (args.sinks != nullptr) {
        const float sink = args.sinks[head] * Exponential::kUnit;
        const float top = state.top > sink ? state.top : sink;
        factor = Exponential::of(splat(state.top - top))[0];
        total = total * factor + Exponential::of(splat(sink - top))[0];
    }
    float* out = args.out + (token * args.heads + head) * dims;
    const float scale = factor / total;
    for (int64_t d = 0; d < dims; d += 16, out += 16) {
        const float* mixed = state.mixed + d * stride;
        if (dims - d >= 16) {
            for (int64_t i = 0; i < 16; i += kLanes) store(out + i, load(mixed + i) * scale);
        } else {
            for (int64_t i = 0; i < dims - d; ++i) out[i] = mixed[i] * scale;
        }
    }
}

template <class Exponential>
void merge_row(const Job& job, int64_t row, int64_t head) {
    const AttentionArgs& args = *job.args;
    const int64_t group = group_of(args);
    const int64_t first = first_split(args, row), last = last_split(args, row);
    for (int64_t query = 0; query < tokens_of(args, row) * group; ++query) {
        float* record = record_of(job, row, head, first, query);
        Running total{record[0], record[1], record + 2};
        for (int64_t split = first + 1; split <= last; ++split) {
            float* next = record_of(job, row, head, split, query);
            merge<Exponential>(total, {next[0], next[1], next + 2}, args.cache.value_dim());
        }
        finish<Exponential>(args, args.query_starts[row] + query / group, head * group + query % group, total, 1);
    }
}

// Whoever attends to the last split of a row merges its parts, in order.
template <class Exponential>
void close_item(const Job& job, const Item& item) {
    if (!item.divided) return;
    for (int64_t i = 0; i < (item.shared ? item.tokens : 1); ++i) {
        int32_t* left = job.unfinished + (item.row + i) * job.args->cache.kv_heads + item.head;
        if (__atomic_sub_fetch(left, 1, __ATOMIC_ACQ_REL) == 0) merge_row<Exponential>(job, item.row + i, item.head);
    }
}

inline float* record_of(const Job& job, const Item& item, int64_t query) {
    const int64_t group = group_of(*job.args);
    if (!item.shared) return record_of(job, item.row, item.head, item.split, query);
    return record_of(job, item.row + query / group, item.head, item.split, query % group);
}

// Lists items; with `items` null only counts them.
class Plan {
public:
    Plan(const AttentionArgs& args, int64_t tile_tokens, Item* items) : args_(args), tile_(tile_tokens), items_(items) {
        for (int64_t row = 0; row < args.rows; ++row) {
            if (!divides(row)) add_tiles(row);
        }
        add_splits();
    }

    int64_t count() const { return count_; }

    static bool divides(const AttentionArgs& args, int64_t tile_tokens, int64_t row) {
        const int64_t tokens = tokens_of(args, row);
        return tokens == 1 || (tokens <= kSplitTokens && tokens <= tile_tokens);
    }

private:
    bool divides(int64_t row) const { return divides(args_, tile_, row); }

    void add(const Item& item) {
        if (items_ != nullptr) items_[count_] = item;
        ++count_;
    }

    // Those with the longest context first, so that threads end together; head by head, so that keys stay near.
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
                const int64_t last = tokens_of(args_, row) == 0 || !divides(row) ? -1 : last_split(args_, row);
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
        const int64_t end = (split + 1) * kSplit;
        for (const int64_t r : {row, other}) {
            if (tokens_of(args_, r) != 1 || args_.starts[r] < end || begin_of(args_, args_.starts[r]) > 0) return false;
        }
        const int64_t from = split * kSplit / args_.cache.block_size, to = (end - 1) / args_.cache.block_size;
        const int32_t* table = args_.tables + row * args_.table_stride;
        const int32_t* other_table = args_.tables + other * args_.table_stride;
        return __builtin_memcmp(table + from, other_table + from, (to - from + 1) * sizeof(int32_t)) == 0;
    }

    const AttentionArgs& args_;
    const int64_t tile_;
    Item* const items_;
    int64_t count_ = 0;
};

}  // namespace quire::QUIRE_ISA
