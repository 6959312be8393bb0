// Attention over the paged cache: write this step's keys and values, then attend.
//
// All writes of a step come before the reads of other rows. One pass over all rows writes, and its end is the barrier;
// only where no row reads what another one writes (`private_writes`) may each thread write just before it reads.
//
// On matrix units (level amx) keys and values in bfloat16 are multiplied as they are; everything else is float32
// arithmetic on vectors. Which of the two a cache gets depends on its storage and head_dim alone.
#include "attention_vector.h"
#if defined(__AMX_BF16__)
#include "attention_matrix.h"
#endif

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t kWriteTokens = 16;

// An item is kWriteTokens consecutive tokens, of whatever rows.
template <class Program>
void write_tokens(void* context, int64_t item, int worker) {
    const Job& job = *static_cast<Job*>(context);
    const AttentionArgs& args = *job.args;
    float* const room = static_cast<float*>(job.pool->scratch(worker, args.cache.head_dim * sizeof(float)));
    const int64_t first = item * kWriteTokens;
    const int64_t last = smaller(first + kWriteTokens, args.query_starts[args.rows]);
    int64_t low = 0, high = args.rows;  // the row of the first token, by halving
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (args.query_starts[middle] <= first ? low : high) = middle;
    }
    for (int64_t token = first, row = low; token < last;) {
        while (args.query_starts[row + 1] <= token) ++row;
        const int64_t count = smaller(last, args.query_starts[row + 1]) - token;
        for (int64_t head = 0; head < args.cache.kv_heads; ++head) Program::write(args, row, token, count, head, room);
        token += count;
    }
}

// The queries of an item's first token, written by whoever multiplied for them.
void prefetch_queries(const AttentionArgs& args, const Item& item) {
    const int64_t count = group_of(args) * args.cache.head_dim;
    const float* const q = args.q + item.first_token * args.q_stride + item.head * count;
    for (int64_t d = 0; d < count; d += 16) __builtin_prefetch(q + d, 0, 3);
}

template <class Program>
void attend_items(void* context, int64_t index, int worker) {
    const Job& job = *static_cast<Job*>(context);
    const AttentionArgs& args = *job.args;
    const int64_t last = smaller(job.count, (index + 1) * job.batch);
    typename Program::Unit unit;
    for (int64_t i = index * job.batch; i < last; ++i) {
        const Item& item = job.items[i];
        if (job.writes && item.split == last_split(args, item.row)) {
            float* const room = static_cast<float*>(job.pool->scratch(worker, args.cache.head_dim * sizeof(float)));
            Program::write(args, item.row, item.first_token, item.tokens, item.head, room);
        }
        if (i + 1 < last) prefetch_queries(args, job.items[i + 1]);
        Program::attend(job, item, unit, worker);
        close_item<typename Program::Exponential>(job, item);
    }
}

// Whether all rows are divided, each with its new tokens in its last split: then of the items of a row only that of the
// last split reads what the row writes.
bool only_last_splits_grow(const AttentionArgs& args, int64_t tile) {
    for (int64_t row = 0; row < args.rows; ++row) {
        if (tokens_of(args, row) == 0) continue;
        if (!Plan::divides(args, tile, row) || args.starts[row] / kSplit != last_split(args, row)) return false;
    }
    return true;
}

// Fills in the tables of divided rows, unless they are null, and returns the floats that their records need.
int64_t list_divided(const AttentionArgs& args, int64_t tile, int64_t* starts, int32_t* unfinished) {
    int64_t floats = 0;
    for (int64_t row = 0; row < args.rows; ++row) {
        if (starts != nullptr) starts[row] = floats;
        if (tokens_of(args, row) == 0 || !Plan::divides(args, tile, row)) continue;
        const int64_t splits = last_split(args, row) - first_split(args, row) + 1;
        for (int64_t head = 0; unfinished != nullptr && head < args.cache.kv_heads; ++head) {
            unfinished[row * args.cache.kv_heads + head] = static_cast<int32_t>(splits);
        }
        floats += splits * tokens_of(args, row) * args.heads * record_floats(args);
    }
    return floats;
}

int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class Program>
void run(const AttentionArgs& args, ThreadPool& pool) {
    const int64_t writes = (args.query_starts[args.rows] + kWriteTokens - 1) / kWriteTokens;
    if (args.out == nullptr) {
        Job job{};
        job.args = &args;
        job.pool = &pool;
        return pool.run(writes, write_tokens<Program>, &job);
    }
    int64_t tile = Program::tile_tokens(group_of(args));
    int64_t count = Plan(args, tile, nullptr).count();
    while (tile > 4 && count < 10 * pool.threads()) {
        tile /= 2;
        count = Plan(args, tile, nullptr).count();
    }
    const int64_t item_bytes = whole_lines(count * sizeof(Item));
    const int64_t start_bytes = whole_lines(args.rows * sizeof(int64_t));
    const int64_t unfinished_bytes = whole_lines(args.rows * args.cache.kv_heads * sizeof(int32_t));
    const int64_t partial_floats = list_divided(args, tile, nullptr, nullptr);
    char* memory = static_cast<char*>(
        pool.shared_scratch(item_bytes + start_bytes + unfinished_bytes + partial_floats * sizeof(float)));
    Job job{};
    job.args = &args;
    job.pool = &pool;
    job.items = reinterpret_cast<Item*>(memory);
    job.partial_starts = reinterpret_cast<int64_t*>(memory + item_bytes);
    job.unfinished = reinterpret_cast<int32_t*>(memory + item_bytes + start_bytes);
    job.partials = reinterpret_cast<float*>(memory + item_bytes + start_bytes + unfinished_bytes);
    Plan(args, tile, job.items);
    list_divided(args, tile, job.partial_starts, job.unfinished);
    job.count = count;
    const bool divided = only_last_splits_grow(args, tile);
    job.writes = divided && args.private_writes && args.k != nullptr;
    job.batch = divided ? larger(1, count / (pool.threads() * 8)) : 1;
    if (!job.writes && args.k != nullptr) pool.run(writes, write_tokens<Program>, &job);
    pool.run((count + job.batch - 1) / job.batch, attend_items<Program>, &job);
}

// With memory for the items of `run`: none has more than a tile of tokens.
template <class Program>
void run_reserved(const AttentionArgs& args, ThreadPool& pool) {
    const int64_t group = group_of(args);
    const int64_t tokens = smaller(Program::tile_tokens(group), args.query_starts[args.rows]);
    if (pool.reserve(Program::scratch_bytes(args, tokens * group))) run<Program>(args, pool);
}

}  // namespace

void attention(const AttentionArgs& args, ThreadPool& pool) {
    if (args.query_starts[args.rows] == 0) return;
#if defined(__AMX_BF16__)
    if (MatrixAttention::serves(args.cache)) return run_reserved<MatrixAttention>(args, pool);
#endif
    switch (args.cache.storage) {
        case Storage::bfloat16: run_reserved<VectorAttention<BFloat16>>(args, pool); break;
        case Storage::float16: run_reserved<VectorAttention<Float16>>(args, pool); break;
        case Storage::float32: run_reserved<VectorAttention<float>>(args, pool); break;
    }
}

}  // namespace quire::QUIRE_ISA
