// y = x W^T + b by the matrix unit (AMX): x rounded to bfloat16, products exact, sums float32.
//
// An output is one chain of tile products over chunks of 32 inputs, from the first to the last. The unit treats
// the rows of a tile alike, so a row's sums have the same bits in any row of a tile and beside any others; where
// `in` is cut into pieces to stay in the cache, the partial sums wait as float32. docs/design/amx.md
#include "linear_tiles.h"

#if QUIRE_TILES

#include "linear_finish.h"

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t kTileItems = kTileSide * kTileDepth;    // bfloat16 in a tile
constexpr int64_t kChunkItems = kTilePanel * kTileDepth;  // weights of a panel for one chunk of inputs
constexpr int64_t kChunkLines = kChunkItems * 2 / 64;
constexpr int64_t kStreamedRows = 2 * kTileSide;  // up to here each weight is used once and memory is the limit
constexpr int64_t kAheadItems = 8192;             // weights between what is read and what is asked of memory
constexpr int64_t kRoundedChunks = 8;
constexpr int64_t kSerialItems = 32768;  // inputs that one thread rounds faster than it finds others to help
// Above kStreamedRows a group of rows meets a piece of a panel at a time.
constexpr int64_t kPieceChunks = 18;      // chunks of inputs in a piece: its weights, 36 KB, stay in the L1
constexpr int64_t kGroupRows = 512;       // with that piece of their x, 0.6 MB, in the L2
constexpr int64_t kGroupItems = 1 << 19;  // inputs of a group of rows that stay in the L2, all pieces together
constexpr int64_t kRunPanels = 8;         // panels of an item
constexpr int64_t kLongRunPanels = 16;    // the same where x does not stay: it is read once for each run
constexpr int64_t kPairSums = kStreamedRows * kTilePanel;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums (two blocks of rows by two of outputs), 4 and 5 rows of x, 6 and 7 weights.
void configure(int64_t rows) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) config.rows[tile] = tile < 6 ? static_cast<uint8_t>(rows) : kTileSide;
    asm volatile("" : : "r"(&config) : "memory");  // the intrinsic of gcc 12 tells the compiler of 8 bytes only
    _tile_loadconfig(&config);
}

struct Job {
    const LinearArgs* args;
    ThreadPool* pool;
    const uint16_t* x;   // TileRows
    TileRows rounded;    // what x is where it arrives as floats
    int32_t* borders;    // [runs + 1]: the panels of each run
    int64_t chunks;      // of 32 inputs
    int64_t tile_rows;   // 16, or all rows where they are fewer
    int64_t group_rows, groups;
    bool resident;       // a group's x stays in the cache
    int64_t pieces;      // of the chunks

    const uint16_t* weights(int64_t panel, int64_t chunk) const {
        return static_cast<const uint16_t*>(args->weight.data) + (panel * chunks + chunk) * kChunkItems;
    }
};

// One block of rows as tiles; rows and inputs that do not exist are zero. A few chunks of all rows at a time, so that
// tiles leave the cache complete.
void round_block(void* context, int64_t block, int) {
    const Job& job = *static_cast<const Job*>(context);
    const LinearArgs& args = *job.args;
    for (int64_t first = 0; first < job.chunks; first += kRoundedChunks) {
        const int64_t last = smaller(job.chunks, first + kRoundedChunks);
        for (int64_t r = 0; r < job.tile_rows; ++r) {
            const int64_t row = block * kTileSide + r;
            for (int64_t chunk = first; chunk < last; ++chunk) {
                const int64_t inputs = row < args.rows ? args.weight.in - chunk * kTileDepth : 0;
                const float* from = inputs > 0 ? args.x + row * args.x_stride + chunk * kTileDepth : args.x;
                round_chunk(from, inputs, job.rounded.at(block * kTileSide + r, chunk));
            }
        }
    }
}

// Part of a product: two blocks of rows (or one) by a panel over some chunks of inputs.
struct Piece {
    const uint16_t* x;  // the second block lies `block_items` further
    const uint16_t* weights;
    int64_t chunks, x_items, block_items;
    float* sums;  // [blocks * 16][32]
    bool fresh;   // else added to what sums holds
};

// A tile of x into register 4, or 5 for the second block. Where x passes by once for each piece of weights it should not
// displace them.
template <bool Second, bool Streams>
inline void load_x(const uint16_t* x) {
    if constexpr (Second && Streams) {
        _tile_stream_loadd(5, x, 64);
    } else if constexpr (Second) {
        _tile_loadd(5, x, 64);
    } else if constexpr (Streams) {
        _tile_stream_loadd(4, x, 64);
    } else {
        _tile_loadd(4, x, 64);
    }
}

// `beside` is called in each chunk, and at the end: what it does, vectors do while the matrix unit works.
template <int Blocks, class Beside>
void multiply(const Piece& piece, Beside& beside) {
    constexpr int64_t bytes = kTilePanel * 4, second = kTileSide * kTilePanel;
    float* const sums = piece.sums;
    if (piece.fresh) {
        _tile_zero(0);
        _tile_zero(1);
        if (Blocks == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, sums, bytes);
        _tile_loadd(1, sums + kTileSide, bytes);
        if (Blocks == 2) {
            _tile_loadd(2, sums + second, bytes);
            _tile_loadd(3, sums + second + kTileSide, bytes);
        }
    }
    const uint16_t *x = piece.x, *weights = piece.weights;
    for (int64_t chunk = 0; chunk < piece.chunks; ++chunk, x += piece.x_items, weights += kChunkItems) {
        _tile_loadd(6, weights, 64);
        load_x<false, Beside::kStreamsX>(x);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weights + kTileItems, 64);
        _tile_dpbf16ps(1, 4, 7);
        beside.fetch(chunk);
        if (Blocks == 2) {
            load_x<true, Beside::kStreamsX>(x + piece.block_items);
            _tile_dpbf16ps(2, 5, 6);
            beside.finish();
            _tile_dpbf16ps(3, 5, 7);
        } else {
            beside.finish();
        }
    }
    beside.end();
    _tile_stored(0, sums, bytes);
    _tile_stored(1, sums + kTileSide, bytes);
    if (Blocks == 2) {
        _tile_stored(2, sums + second, bytes);
        _tile_stored(3, sums + second + kTileSide, bytes);
    }
}

// Asks memory for where a row's results of a panel will go: a store that waits holds up those behind it.
inline void fetch_results(const LinearArgs& args, int64_t panel, int64_t row) {
    if (row >= args.rows || args.y == nullptr) return;
    const float* const at = args.y + row * args.weight.products() + panel * args.weight.panel_products();
    __builtin_prefetch(at, 1);
    __builtin_prefetch(at + 16, 1);
}

// Fetches the weights that will be read soon, and nothing past the end of the run: another thread reads on there.
struct BesideStream {
    const LinearArgs* args;
    int64_t panel;
    const char* at;
    const char* end_at;

    static constexpr bool kStreamsX = false;
    void fetch(int64_t chunk) {
        if (at < end_at) {
            for (int64_t line = 0; line < kChunkLines; ++line) __builtin_prefetch(at + line * 64);
        }
        at += kChunkLines * 64;
        fetch_results(*args, panel, chunk);
    }
    void finish() {}
    void end() {}
};

// Up to 32 rows by a run of panels: each weight is used once.
void stream_item(void* context, int64_t item, int worker) {
    const Job& job = *static_cast<const Job*>(context);
    const LinearArgs& args = *job.args;
    float* const sums = static_cast<float*>(job.pool->scratch(worker, kPairSums * sizeof(float)));
    const int64_t first = job.borders[item], last = job.borders[item + 1];
    BesideStream beside{&args, first, reinterpret_cast<const char*>(job.weights(first, 0) + kAheadItems),
                        reinterpret_cast<const char*>(job.weights(last, 0))};
    const auto multiply_rows = args.rows > kTileSide ? multiply<2, BesideStream> : multiply<1, BesideStream>;
    Piece piece{job.x, nullptr, job.chunks, job.tile_rows * kTileDepth, job.chunks * kTileItems, sums, true};
    const Finish finish = finish_of<kTilePanel>(args);
    configure(job.tile_rows);
    for (int64_t panel = first; panel < last; ++panel) {
        beside.panel = panel;
        piece.weights = job.weights(panel, 0);
        multiply_rows(piece, beside);
        finish(args, panel, 0, args.rows, sums);
    }
    _tile_release();
}

// Fetches the next piece of weights into the second cache, and writes the results of the piece before.
struct BesideBlock {
    const LinearArgs* args;
    const char* at;  // weights
    const char* end_at;
    int64_t lines;  // of them for each chunk
    Finish finish_rows;
    int64_t panel, row, end_row, rows_per_chunk;
    const float* sums;

    static constexpr bool kStreamsX = true;
    void fetch(int64_t) {
        if (at < end_at) {
            for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(at + line * 64, 0, 2);
        }
        at += lines * 64;
    }
    void finish() {
        if (row < end_row) finish_until(smaller(end_row, row + rows_per_chunk));
    }
    void end() {
        if (row < end_row) finish_until(end_row);
    }
    void finish_until(int64_t end) {
        finish_rows(*args, panel, row, end, sums);
        sums += (end - row) * kTilePanel;
        row = end;
    }
};

// A run of panels for one group of rows: `together` panels at a time, for each piece of `in`, for each of the panels, all
// rows. Where x stays in the cache one panel is complete before the next.
void block_item(void* context, int64_t item, int worker) {
    const Job& job = *static_cast<const Job*>(context);
    const LinearArgs& args = *job.args;
    const int64_t first_panel = job.borders[item / job.groups], last_panel = job.borders[item / job.groups + 1];
    const int64_t first_row = item % job.groups * job.group_rows;
    const int64_t end_row = smaller(first_row + job.group_rows, args.rows);
    const int64_t pairs = (end_row - first_row + kStreamedRows - 1) / kStreamedRows;
    const int64_t together = job.resident ? 1 : last_panel - first_panel;
    const size_t sums_bytes = together * pairs * kPairSums * sizeof(float);
    float* const sums = static_cast<float*>(job.pool->scratch(worker, sums_bytes));
    BesideBlock beside{};
    beside.args = &args;
    beside.finish_rows = finish_of<kTilePanel>(args);
    configure(kTileSide);
    for (int64_t start = first_panel; start < last_panel; start += together) {
        for (int64_t step = 0; step < job.pieces * together; ++step) {
            const int64_t part = step / together, panel = start + step % together;
            const int64_t chunk = part * job.chunks / job.pieces;
            const int64_t chunks = (part + 1) * job.chunks / job.pieces - chunk;
            const bool done = step + 1 == job.pieces * together, none = done && start + together >= last_panel;
            const uint16_t* const next = done ? job.weights(none ? panel : start + together, 0)
                                              : job.weights(start + (step + 1) % together,
                                                            (step + 1) / together * job.chunks / job.pieces);
            beside.at = reinterpret_cast<const char*>(next);
            beside.end_at = reinterpret_cast<const char*>(none ? next : next + chunks * kChunkItems);
            beside.lines = (kChunkLines + pairs - 1) / pairs;
            beside.rows_per_chunk = (kStreamedRows + chunks - 1) / chunks;
            for (int64_t pair = 0; pair < pairs; ++pair) {
                const int64_t row = first_row + pair * kStreamedRows;
                const int64_t slot = job.pieces == 1 ? 0 : step % together * pairs + pair;
                const uint16_t* const x = job.x + (row * job.chunks + chunk * kTileSide) * kTileDepth;
                const Piece piece{x,          job.weights(panel, chunk), chunks,
                                  kTileItems, job.chunks * kTileItems,   sums + slot * kPairSums,
                                  part == 0};
                (args.rows - row > kTileSide ? multiply<2, BesideBlock> : multiply<1, BesideBlock>)(piece, beside);
                if (part + 1 < job.pieces) continue;
                beside.panel = panel;
                beside.row = row;
                beside.end_row = smaller(row + kStreamedRows, end_row);
                beside.sums = piece.sums;
            }
        }
    }
    _tile_release();
    beside.end();
}

void embed_row(void* context, int64_t item, int) {
    const EmbedArgs& args = *static_cast<const EmbedArgs*>(context);
    const int64_t in = args.table.in, id = args.ids[item];
    const int64_t chunks = (in + kTileDepth - 1) / kTileDepth;
    const uint16_t* const column = static_cast<const uint16_t*>(args.table.data) +
                                   id / kTilePanel * chunks * kChunkItems + id % kTilePanel / kTileSide * kTileItems +
                                   id % kTileSide * 2;
    for (int64_t i = 0; i < in; ++i) {
        const uint16_t bits = column[i / kTileDepth * kChunkItems + i % kTileDepth / 2 * kTileDepth + i % 2];
        args.y[item * in + i] = to_float(BFloat16{bits}) * args.scale;
    }
}

// Runs of panels that shrink towards the end: long enough to stream, and no thread waits long for the last one.
// Returns their number.
int64_t divide(int64_t panels, int64_t longest, int threads, int32_t* borders) {
    int64_t runs = 0;
    borders[0] = 0;
    for (int64_t first = 0; first < panels;) {
        const int64_t share = (panels - first) / (2 * threads);
        first += larger(1, smaller(share, longest));
        borders[++runs] = static_cast<int32_t>(first);
    }
    return runs;
}

}  // namespace

void linear_tiles(const LinearArgs& args, ThreadPool& pool) {
    if (args.rows == 0) return;
    const bool streamed = args.rows <= kStreamedRows;
    const int64_t panels = args.weight.panels();
    Job job{};
    job.args = &args;
    job.pool = &pool;
    job.chunks = (args.weight.in + kTileDepth - 1) / kTileDepth;
    job.tile_rows = smaller(args.rows, kTileSide);
    job.pieces = larger(1, (job.chunks + kPieceChunks - 1) / kPieceChunks);
    const int64_t resident_rows = kGroupItems / larger(1, job.chunks * kTileDepth) / kStreamedRows * kStreamedRows;
    job.resident = resident_rows >= smaller(args.rows, kGroupRows / 2);
    job.group_rows = job.resident ? smaller(kGroupRows, resident_rows) : kGroupRows;
    if (streamed) job.group_rows = kStreamedRows;
    job.groups = (args.rows + job.group_rows - 1) / job.group_rows;

    job.rounded = TileRows{nullptr, args.x == nullptr ? 0 : args.rows, args.weight.in};
    void* const memory = pool.shared_scratch(job.rounded.bytes() + (panels + 1) * sizeof(int32_t));
    job.rounded.data = static_cast<uint16_t*>(memory);
    job.borders = reinterpret_cast<int32_t*>(job.rounded.data + job.rounded.bytes() / 2);
    job.x = args.x == nullptr ? args.x_tiles.data : job.rounded.data;
    const int64_t blocks = job.rounded.blocks();
    if (args.rows * args.weight.in < kSerialItems) {
        for (int64_t block = 0; block < blocks; ++block) round_block(&job, block, 0);
    } else {
        pool.run(blocks, round_block, &job);
    }
    const int64_t longest = streamed ? panels : job.resident ? kRunPanels : kLongRunPanels;
    const int64_t runs = divide(panels, longest, pool.threads(), job.borders);
    if (streamed) {
        pool.run(runs, stream_item, &job);
    } else {
        pool.run(runs * job.groups, block_item, &job);
    }
}

void embed_tiles(const EmbedArgs& args, ThreadPool& pool) {
    pool.run(args.tokens, embed_row, const_cast<EmbedArgs*>(&args));
}

}  // namespace quire::QUIRE_ISA

#endif
