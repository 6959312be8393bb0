// Attention over the paged cache: write this step's keys and values, then attend.
//
// An item of work is a tile of query tokens of one row for one key-value head. A row with one new token and a long
// context is cut at every 512th position instead, so that several threads can share it. The result is the same:
// every query's softmax restarts at those positions, wherever it runs, and the pieces merge in order.
#include "attention_tile.h"

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t kTileQueries = 48;  // query vectors (tokens x heads of a group) of an item, about
constexpr int64_t kConvertQueries = 9;  // from here on keys and values of a chunk are converted to float32 once
constexpr int64_t kWriteTokens = 16;

struct Item {
    int64_t row;
    int64_t head;           // key-value head
    int64_t first, last;    // tokens of the row, counted from query_starts[row]
    int64_t split, splits;  // splits > 1: only this one of them
    float* partial;         // [splits][group] records of value_dim + 2 floats
};

struct Job {
    const AttentionArgs* args;
    ThreadPool* pool;
    Item* items;
};

int64_t group_of(const AttentionArgs& args) { return args.heads / args.cache.kv_heads; }

template <class T>
void write_token(const AttentionArgs& args, int64_t row, int64_t token) {
    const CacheLayout& cache = args.cache;
    const int64_t position = args.starts[row] + token - args.query_starts[row];
    const int64_t block = args.tables[row * args.table_stride + position / cache.block_size];
    const int64_t slot = position % cache.block_size;
    for (int64_t head = 0; head < cache.kv_heads; ++head) {
        T* keys = reinterpret_cast<T*>(cache.unit(args.layer, block, head));
        T* values = keys + cache.slots() * cache.head_dim + slot * cache.value_dim();
        keys += slot / kTile * kTile * cache.head_dim + slot % kTile;
        const float* k = args.k + token * args.k_stride + head * cache.head_dim;
        const float* v = args.v + token * args.v_stride + head * cache.head_dim;
        for (int64_t d = 0; d < cache.head_dim; ++d) round_to(k[d], keys + d * kTile);
        for (int64_t d = 0; d < cache.head_dim; ++d) round_to(v[d], values + d);
        for (int64_t d = cache.head_dim; d < cache.value_dim(); ++d) round_to(0.0f, values + d);
    }
}

// An item is kWriteTokens consecutive tokens, of whatever rows.
template <class T>
void write_tokens(void* context, int64_t item, int) {
    const AttentionArgs& args = *static_cast<Job*>(context)->args;
    const int64_t first = item * kWriteTokens;
    const int64_t last = smaller(first + kWriteTokens, args.query_starts[args.rows]);
    int64_t low = 0, high = args.rows;  // the row of the first token, by halving
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (args.query_starts[middle] <= first ? low : high) = middle;
    }
    for (int64_t token = first, row = low; token < last; ++token) {
        while (args.query_starts[row + 1] <= token) ++row;
        write_token<T>(args, row, token);
    }
}

// The 16 positions from `position` on (a multiple of 16), of which those before `end` exist. Where blocks are whole
// tiles they lie in one block; otherwise they are gathered into `room` [16 * (head_dim + value_dim)].
template <class T>
void find_tile(const AttentionArgs& args, const Item& item, int64_t position, int64_t end, T* room, const T** keys,
               const T** values) {
    const CacheLayout& cache = args.cache;
    const int32_t* table = args.tables + item.row * args.table_stride;
    const int64_t size = cache.block_size;
    const int64_t key_items = cache.slots() * cache.head_dim;
    if (size % kTile == 0) {
        const T* unit =
            reinterpret_cast<const T*>(cache.unit(args.layer, table[position / size], item.head));
        *keys = unit + position % size * cache.head_dim;
        *values = unit + key_items + position % size * cache.value_dim();
        return;
    }
    T* room_values = room + kTile * cache.head_dim;
    for (int64_t j = 0; j < smaller(kTile, end - position); ++j) {
        const int64_t slot = (position + j) % size;
        const T* unit =
            reinterpret_cast<const T*>(cache.unit(args.layer, table[(position + j) / size], item.head));
        const T* from = unit + slot / kTile * kTile * cache.head_dim + slot % kTile;
        for (int64_t d = 0; d < cache.head_dim; ++d) room[d * kTile + j] = from[d * kTile];
        __builtin_memcpy(room_values + j * cache.value_dim(), unit + key_items + slot * cache.value_dim(),
                         cache.value_dim() * sizeof(T));
    }
    *keys = room;
    *values = room_values;
}

// A worker's memory for one item.
struct Scratch {
    Running* splits;  // [queries]: the running softmax of the present split
    Running* totals;  // [queries]: of those before
    float* converted;
    void* gathered;

    static int64_t floats(const AttentionArgs& args, int64_t queries) {
        const int64_t chunk = kChunk * (args.cache.head_dim + args.cache.value_dim());
        const int64_t states = queries * 2 * (args.cache.value_dim() + int64_t(sizeof(Running) / 4));
        return states + 2 * chunk + 64;
    }

    Scratch(const AttentionArgs& args, int64_t queries, void* memory) {
        const int64_t dims = args.cache.value_dim();
        float* next = static_cast<float*>(memory);
        converted = next;
        next += kChunk * (args.cache.head_dim + dims);
        gathered = next;
        next += kChunk * (args.cache.head_dim + dims);
        float* mixed = next;
        splits = reinterpret_cast<Running*>(next + 2 * queries * dims);
        totals = splits + queries;
        for (int64_t i = 0; i < queries; ++i) {
            splits[i].mixed = mixed + i * dims;
            totals[i] = {-__builtin_inff(), 0.0f, mixed + (queries + i) * dims};
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
    }
    return result;
}

// All queries of the item, in groups of up to four, against the chunk whose first position is `base`.
template <class T>
void attend_queries(const AttentionArgs& args, const Item& item, const Chunk<T>& chunk, int64_t base,
                    Running* states) {
    const int64_t group = group_of(args);
    const int64_t queries = (item.last - item.first) * group;
    const float* vectors[kQueries];
    Running* running[kQueries];
    int64_t low[kQueries], high[kQueries];
    int count = 0;
    for (int64_t i = 0; i < queries; ++i) {
        const int64_t token = item.first + i / group;
        const int64_t position = args.starts[item.row] + token;
        low[count] = position < args.window ? 0 : larger(0, position - args.window + 1 - base);
        high[count] = smaller(kChunk, position + 1 - base);
        if (low[count] < high[count]) {
            const int64_t head = item.head * group + i % group;
            vectors[count] = args.q + (args.query_starts[item.row] + token) * args.q_stride +
                             head * args.cache.head_dim;
            running[count++] = states + i;
        }
        if (count < kQueries && i + 1 < queries) continue;
        switch (count) {
            case 0: break;
            case 1: attend_chunk<1, T>(args, vectors, chunk, low, high, running); break;
            case 2: attend_chunk<2, T>(args, vectors, chunk, low, high, running); break;
            case 3: attend_chunk<3, T>(args, vectors, chunk, low, high, running); break;
            default: attend_chunk<4, T>(args, vectors, chunk, low, high, running); break;
        }
        count = 0;
    }
}

// Asks for the tiles of the chunk after the one at `base`, so that memory works while the processor does.
template <class T>
void prefetch_next(const AttentionArgs& args, const Item& item, int64_t base, int64_t stop) {
    const CacheLayout& cache = args.cache;
    if (cache.block_size % kTile != 0) return;
    const int64_t tile_bytes = kTile * (cache.head_dim + cache.value_dim()) * int64_t(sizeof(T));
    for (int64_t position = base + kChunk; position < smaller(stop, base + 2 * kChunk); position += kTile) {
        const T *keys, *values;
        find_tile<T>(args, item, position, stop, nullptr, &keys, &values);
        const char* key_bytes = reinterpret_cast<const char*>(keys);
        const char* value_bytes = reinterpret_cast<const char*>(values);
        for (int64_t at = 0; at < tile_bytes / 2; at += 64) {
            __builtin_prefetch(key_bytes + at, 0, 2);
            __builtin_prefetch(value_bytes + at, 0, 2);
        }
    }
}

template <class T>
void attend_split(const AttentionArgs& args, const Item& item, int64_t split, Scratch& scratch) {
    const CacheLayout& cache = args.cache;
    const int64_t queries = (item.last - item.first) * group_of(args);
    const int64_t first_position = args.starts[item.row] + item.first;
    const int64_t begin = first_position < args.window ? 0 : first_position - args.window + 1;
    const int64_t end = args.starts[item.row] + item.last;
    for (int64_t i = 0; i < queries; ++i) {
        scratch.splits[i].top = -__builtin_inff();
        scratch.splits[i].total = 0.0f;
        __builtin_memset(scratch.splits[i].mixed, 0, cache.value_dim() * sizeof(float));
    }
    const int64_t stop = smaller(end, (split + 1) * kSplit);
    for (int64_t base = larger(split * kSplit, begin / kChunk * kChunk); base < stop; base += kChunk) {
        prefetch_next<T>(args, item, base, stop);
        Chunk<T> chunk;
        for (int64_t tile = 0; tile < kTiles; ++tile) {
            // A tile past the end is the last one again; its scores are never looked at.
            const int64_t position = smaller(base + tile * kTile, (end - 1) / kTile * kTile);
            T* room = static_cast<T*>(scratch.gathered) + tile * kTile * (cache.head_dim + cache.value_dim());
            find_tile(args, item, position, end, room, &chunk.keys[tile], &chunk.values[tile]);
        }
        if (queries < kConvertQueries) {
            attend_queries(args, item, chunk, base, scratch.splits);
        } else {
            attend_queries(args, item, convert_chunk(args, chunk, scratch.converted), base, scratch.splits);
        }
    }
}

// Divide by the total, in which the sink takes part, and write the head's output.
void finish(const AttentionArgs& args, int64_t token, int64_t head, Running& state) {
    const int64_t dims = args.cache.head_dim;
    float factor = 1.0f, total = state.total;
    if (args.sinks != nullptr) {
        const float sink = args.sinks[head];
        const float top = state.top > sink ? state.top : sink;
        factor = exp(splat(state.top - top))[0];
        total = total * factor + exp(splat(sink - top))[0];
    }
    float* out = args.out + (token * args.heads + head) * dims;
    for (int64_t d = 0; d < dims; ++d) out[d] = state.mixed[d] * factor / total;
}

int64_t record_floats(const AttentionArgs& args) { return args.cache.value_dim() + 2; }

template <class T>
void attend_item(void* context, int64_t index, int worker) {
    const Job& job = *static_cast<Job*>(context);
    const AttentionArgs& args = *job.args;
    const Item& item = job.items[index];
    const int64_t group = group_of(args), dims = args.cache.value_dim();
    const int64_t queries = (item.last - item.first) * group;
    Scratch scratch(args, queries, job.pool->scratch(worker, Scratch::floats(args, queries) * sizeof(float)));
    if (item.splits > 1) {
        attend_split<T>(args, item, item.split, scratch);
        for (int64_t i = 0; i < group; ++i) {
            float* record = item.partial + (item.split * group + i) * record_floats(args);
            record[0] = scratch.splits[i].top;
            record[1] = scratch.splits[i].total;
            __builtin_memcpy(record + 2, scratch.splits[i].mixed, dims * sizeof(float));
        }
        return;
    }
    const int64_t end = args.starts[item.row] + item.last;
    for (int64_t split = 0; split * kSplit < end; ++split) {
        attend_split<T>(args, item, split, scratch);
        for (int64_t i = 0; i < queries; ++i) merge(scratch.totals[i], scratch.splits[i], dims);
    }
    for (int64_t i = 0; i < queries; ++i) {
        const int64_t token = args.query_starts[item.row] + item.first + i / group;
        finish(args, token, item.head * group + i % group, scratch.totals[i]);
    }
}

void merge_partials(const AttentionArgs& args, const Item& item) {
    const int64_t group = group_of(args);
    for (int64_t i = 0; i < group; ++i) {
        float* records = item.partial + i * record_floats(args);
        Running total{records[0], records[1], records + 2};
        for (int64_t split = 1; split < item.splits; ++split) {
            float* record = records + split * group * record_floats(args);
            merge(total, {record[0], record[1], record + 2}, args.cache.value_dim());
        }
        finish(args, args.query_starts[item.row] + item.first, item.head * group + i, total);
    }
}

int64_t splits_of(const AttentionArgs& args, int64_t row) {
    const int64_t tokens = args.query_starts[row + 1] - args.query_starts[row];
    return tokens == 1 ? args.starts[row] / kSplit + 1 : 1;
}

struct Counts {
    int64_t items;
    int64_t partial_floats;
};

// With `items` null only counts. Tiles with the longest context come first, so that threads end together.
Counts list_items(const AttentionArgs& args, int64_t tile, Item* items, float* partials) {
    Counts counts{0, 0};
    for (int64_t row = 0; row < args.rows; ++row) {
        const int64_t tokens = args.query_starts[row + 1] - args.query_starts[row];
        const int64_t splits = splits_of(args, row);
        for (int64_t last = tokens; last > 0; last -= smaller(tile, last)) {
            for (int64_t head = 0; head < args.cache.kv_heads; ++head) {
                for (int64_t split = 0; split < splits; ++split) {
                    if (items != nullptr) {
                        float* partial = splits > 1 ? partials + counts.partial_floats : nullptr;
                        items[counts.items] = {row, head, larger(0, last - tile), last, split, splits, partial};
                    }
                    ++counts.items;
                }
                if (splits > 1) counts.partial_floats += splits * group_of(args) * record_floats(args);
            }
        }
    }
    return counts;
}

template <class T>
void run(const AttentionArgs& args, ThreadPool& pool) {
    int64_t tile = larger(1, kTileQueries / group_of(args));
    Counts counts = list_items(args, tile, nullptr, nullptr);
    while (tile > 4 && counts.items < 4 * pool.threads()) {
        tile /= 2;
        counts = list_items(args, tile, nullptr, nullptr);
    }
    const size_t item_bytes = (counts.items * sizeof(Item) + 63) / 64 * 64;
    char* memory = static_cast<char*>(pool.shared_scratch(item_bytes + counts.partial_floats * sizeof(float)));
    Item* items = reinterpret_cast<Item*>(memory);
    list_items(args, tile, items, reinterpret_cast<float*>(memory + item_bytes));
    Job job{&args, &pool, items};
    pool.run((args.query_starts[args.rows] + kWriteTokens - 1) / kWriteTokens, write_tokens<T>, &job);
    pool.run(counts.items, attend_item<T>, &job);
    for (int64_t i = 0; i < counts.items; ++i) {
        if (items[i].splits > 1 && items[i].split == 0) merge_partials(args, items[i]);
    }
}

}  // namespace

void attention(const AttentionArgs& args, ThreadPool& pool) {
    switch (args.cache.storage) {
        case Storage::bfloat16: run<BFloat16>(args, pool); break;
        case Storage::float16: run<Float16>(args, pool); break;
        case Storage::float32: run<float>(args, pool); break;
    }
}

}  // namespace quire::QUIRE_ISA
