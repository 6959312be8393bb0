// Attention over the paged cache: write this step's keys and values, then attend.
//
// All writes of a step come before the reads of other rows. One pass over all rows writes, and its end is the barrier;
// only where no row reads what another one writes (`private_writes`) may each thread write just before it reads.
//
// On AMX keys and values in bfloat16 are multiplied as they are; everything else, 8 bits too, is float32 arithmetic on vectors. Which of the two a cache gets depends on its storage and head_dim alone.
#include "attention/vector/attention.h"
#if defined(__AMX_BF16__)
#include "attention/amx/attention.h"
#endif

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t kWriteTokens = 16;

// An item is kWriteTokens consecutive tokens, of whatever rows.
template <class Kernel>
void write_tokens(void* context, int64_t item, int worker) {
    const LaunchArgs& launch = *static_cast<LaunchArgs*>(context);
    const AttentionArgs& args = *launch.args;
    float* const room = static_cast<float*>(launch.pool->scratch(worker, args.cache.head_dim * sizeof(float)));
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
        for (int64_t head = 0; head < args.cache.kv_heads; ++head) Kernel::write(args, row, token, count, head, room);
        token += count;
    }
}

// The queries of an item's first token, which the GEMM before wrote from any core.
void prefetch_queries(const AttentionArgs& args, const WorkItem& item) {
    const int64_t count = group_of(args) * args.cache.head_dim;
    const float* const q = args.q + item.first_token * args.q_stride + item.head * count;
    for (int64_t d = 0; d < count; d += 16) __builtin_prefetch(q + d, 0, 3);
}

template <class Kernel>
void attend_items(void* context, int64_t index, int worker) {
    const LaunchArgs& launch = *static_cast<LaunchArgs*>(context);
    const AttentionArgs& args = *launch.args;
    const int64_t last = smaller(launch.count, (index + 1) * launch.batch);
    typename Kernel::TileState tiles;
    for (int64_t i = index * launch.batch; i < last; ++i) {
        const WorkItem& item = launch.items[i];
        if (launch.writes && item.split == last_split(args, item.row)) {
            float* const room = static_cast<float*>(launch.pool->scratch(worker, args.cache.head_dim * sizeof(float)));
            Kernel::write(args, item.row, item.first_token, item.tokens, item.head, room);
        }
        if (i + 1 < last) prefetch_queries(args, launch.items[i + 1]);
        Kernel::attend(launch, item, tiles, worker);
        close_item<typename Kernel::Exponential>(launch, item);
    }
}

// Whether all rows are split, each with its new tokens in its last split: then of the items of a row only that of the
// last split reads what the row writes.
bool only_last_splits_grow(const AttentionArgs& args, int64_t tile) {
    for (int64_t row = 0; row < args.rows; ++row) {
        if (tokens_of(args, row) == 0) continue;
        if (!Partition::splits_kv(args, tile, row) || args.starts[row] / kKvSplit != last_split(args, row)) return false;
    }
    return true;
}

// Fills in the tables of split rows, unless they are null, and returns the floats that their partial results need.
int64_t list_split_rows(const AttentionArgs& args, int64_t tile, int64_t* starts, int32_t* unfinished) {
    int64_t floats = 0;
    for (int64_t row = 0; row < args.rows; ++row) {
        if (starts != nullptr) starts[row] = floats;
        if (tokens_of(args, row) == 0 || !Partition::splits_kv(args, tile, row)) continue;
        const int64_t splits = last_split(args, row) - first_split(args, row) + 1;
        for (int64_t head = 0; unfinished != nullptr && head < args.cache.kv_heads; ++head) {
            unfinished[row * args.cache.kv_heads + head] = static_cast<int32_t>(splits);
        }
        floats += splits * tokens_of(args, row) * args.heads * partial_floats(args);
    }
    return floats;
}

int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class Kernel>
void run(const AttentionArgs& args, ThreadPool& pool) {
    const int64_t writes = (args.query_starts[args.rows] + kWriteTokens - 1) / kWriteTokens;
    if (args.out == nullptr) {
        LaunchArgs launch{};
        launch.args = &args;
        launch.pool = &pool;
        return pool.run(writes, write_tokens<Kernel>, &launch);
    }
    int64_t tile = Kernel::tile_tokens(group_of(args));
    int64_t count = Partition(args, tile, nullptr).count();
    while (tile > 4 && count < 10 * pool.threads()) {
        tile /= 2;
        count = Partition(args, tile, nullptr).count();
    }
    const int64_t item_bytes = whole_lines(count * sizeof(WorkItem));
    const int64_t start_bytes = whole_lines(args.rows * sizeof(int64_t));
    const int64_t unfinished_bytes = whole_lines(args.rows * args.cache.kv_heads * sizeof(int32_t));
    const int64_t partial_floats = list_split_rows(args, tile, nullptr, nullptr);
    char* memory = static_cast<char*>(
        pool.shared_scratch(item_bytes + start_bytes + unfinished_bytes + partial_floats * sizeof(float)));
    LaunchArgs launch{};
    launch.args = &args;
    launch.pool = &pool;
    launch.items = reinterpret_cast<WorkItem*>(memory);
    launch.partial_starts = reinterpret_cast<int64_t*>(memory + item_bytes);
    launch.unfinished = reinterpret_cast<int32_t*>(memory + item_bytes + start_bytes);
    launch.partials = reinterpret_cast<float*>(memory + item_bytes + start_bytes + unfinished_bytes);
    Partition(args, tile, launch.items);
    list_split_rows(args, tile, launch.partial_starts, launch.unfinished);
    launch.count = count;
    const bool all_split = only_last_splits_grow(args, tile);
    launch.writes = all_split && args.private_writes && args.k != nullptr;
    launch.batch = all_split ? larger(1, count / (pool.threads() * 8)) : 1;
    if (!launch.writes && args.k != nullptr) pool.run(writes, write_tokens<Kernel>, &launch);
    pool.run((count + launch.batch - 1) / launch.batch, attend_items<Kernel>, &launch);
}

// With memory for the items of `run`: none has more than a tile of tokens.
template <class Kernel>
void run_reserved(const AttentionArgs& args, ThreadPool& pool) {
    const int64_t group = group_of(args);
    const int64_t tokens = smaller(Kernel::tile_tokens(group), args.query_starts[args.rows]);
    if (pool.reserve(Kernel::scratch_bytes(args, tokens * group))) run<Kernel>(args, pool);
}

}  // namespace

void attention(const AttentionArgs& args, ThreadPool& pool) {
    if (args.query_starts[args.rows] == 0) return;
#if defined(__AMX_BF16__)
    if (AmxAttention::serves(args.cache)) return run_reserved<AmxAttention>(args, pool);
#endif
    switch (args.cache.storage) {
        case Storage::bfloat16: run_reserved<VectorAttention<BFloat16>>(args, pool); break;
        case Storage::float16: run_reserved<VectorAttention<Float16>>(args, pool); break;
        case Storage::float32: run_reserved<VectorAttention<float>>(args, pool); break;
        case Storage::int8: run_reserved<VectorAttention<int8_t>>(args, pool); break;
        case Storage::e4m3: run_reserved<VectorAttention<E4M3>>(args, pool); break;
    }
}

}  // namespace quire::QUIRE_ISA
