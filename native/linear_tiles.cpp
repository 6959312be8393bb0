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
constexpr int64_t kRunPanels = 8;         // panels whose sums are kept and written together: 1 KB of a row of y
constexpr int64_t kLongRunPanels = 16;    // the same where x does not stay: it is read once for each run
constexpr int64_t kRowsAhead = 3;         // rows of y between what is written and what is asked of memory

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

// sums [Blocks * 16][32] = (what they are, or 0) + x . weights over `chunks` chunks of inputs. `Fetch` asks memory for
// what comes next, once for each chunk, and says whether x is too large to stay in the nearest cache.
template <int Blocks, class Fetch>
void multiply(const Job& job, const uint16_t* x, const uint16_t* weights, int64_t chunks, bool fresh, float* sums,
              Fetch& fetch) {
    constexpr int64_t bytes = kTilePanel * 4, second = kTileSide * kTilePanel;
    const int64_t x_items = job.tile_rows * kTileDepth, block_items = job.chunks * kTileItems;
    if (fresh) {
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
    for (int64_t chunk = 0; chunk < chunks; ++chunk, x += x_items, weights += kChunkItems) {
        fetch();
        _tile_loadd(6, weights, 64);
        if (Fetch::kStreamsX) {
            _tile_stream_loadd(4, x, 64);
        } else {
            _tile_loadd(4, x, 64);
        }
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weights + kTileItems, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (Blocks == 2) {
            if (Fetch::kStreamsX) {
                _tile_stream_loadd(5, x + block_items, 64);
            } else {
                _tile_loadd(5, x + block_items, 64);
            }
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, bytes);
    _tile_stored(1, sums + kTileSide, bytes);
    if (Blocks == 2) {
        _tile_stored(2, sums + second, bytes);
        _tile_stored(3, sums + second + kTileSide, bytes);
    }
}

// The weights that will be read soon, and nothing past the end of the run: another thread reads on there.
struct FetchStream {
    static constexpr bool kStreamsX = false;
    const char* at;
    const char* end;

    void operator()() {
        if (at < end) {
            for (int64_t line = 0; line < kChunkLines; ++line) __builtin_prefetch(at + line * 64);
        }
        at += kChunkLines * 64;
    }
};

// Up to 32 rows by a run of panels: each weight is used once.
void stream_item(void* context, int64_t item, int worker) {
    const Job& job = *static_cast<const Job*>(context);
    const LinearArgs& args = *job.args;
    float* const sums = static_cast<float*>(job.pool->scratch(worker, kStreamedRows * kTilePanel * sizeof(float)));
    const int64_t first = job.borders[item], last = job.borders[item + 1];
    FetchStream fetch{reinterpret_cast<const char*>(job.weights(first, 0) + kAheadItems),
                      reinterpret_cast<const char*>(job.weights(last, 0))};
    const auto multiply_rows = args.rows > kTileSide ? multiply<2, FetchStream> : multiply<1, FetchStream>;
    configure(job.tile_rows);
    for (int64_t panel = first; panel < last; ++panel) {
        multiply_rows(job, job.x, job.weights(panel, 0), job.chunks, true, sums, fetch);
        finish_rows<kTilePanel>(args, panel, 0, args.rows, sums);
    }
    _tile_release();
}

// Some of the next piece of weights, which would be waited for otherwise.
struct FetchBlock {
    static constexpr bool kStreamsX = true;
    const char* at;
    const char* end;
    int64_t lines;  // for each chunk

    void operator()() {
        if (at < end) {
            for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(at + line * 64, 0, 2);
        }
        at += lines * 64;
    }
};

// Writes the rows of a run of panels from sums [panels][panel_sums]. Short pieces of long rows: without asking for
// them ahead memory takes them at a third of its speed.
void finish_run(const LinearArgs& args, int64_t first_panel, int64_t last_panel, int64_t first_row, int64_t rows,
                const float* sums, int64_t panel_sums) {
    const int64_t first = first_panel * args.weight.panel_products();
    const int64_t width = smaller(last_panel * args.weight.panel_products(), args.weight.products()) - first;
    for (int64_t r = 0; r < rows; ++r) {
        if (args.y != nullptr && r + kRowsAhead < rows) {
            const float* later = args.y + (first_row + r + kRowsAhead) * args.weight.products() + first;
            for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(later + i, 1);
        }
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
            finish_row<kTilePanel>(args, panel, first_row + r,
                                   sums + (panel - first_panel) * panel_sums + r * kTilePanel);
        }
    }
}

// A run of panels for one group of rows: for each piece of `in`, for each panel, all rows.
void block_item(void* context, int64_t item, int worker) {
    const Job& job = *static_cast<const Job*>(context);
    const LinearArgs& args = *job.args;
    const int64_t first_panel = job.borders[item / job.groups], last_panel = job.borders[item / job.groups + 1];
    const int64_t first_row = item % job.groups * job.group_rows;
    const int64_t rows = smaller(job.group_rows, args.rows - first_row);
    const int64_t pairs = (rows + kStreamedRows - 1) / kStreamedRows;
    constexpr int64_t pair_sums = kStreamedRows * kTilePanel;
    const int64_t panel_sums = pairs * pair_sums;
    const size_t sums_bytes = (last_panel - first_panel) * panel_sums * sizeof(float);
    float* const sums = static_cast<float*>(job.pool->scratch(worker, sums_bytes));
    configure(kTileSide);
    for (int64_t piece = 0; piece < job.pieces; ++piece) {
        const int64_t chunk = piece * job.chunks / job.pieces;
        const int64_t chunks = (piece + 1) * job.chunks / job.pieces - chunk;
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
            const bool last = panel + 1 == last_panel;
            const uint16_t* next = last ? job.weights(first_panel, chunk + chunks) : job.weights(panel + 1, chunk);
            const bool none = last && piece + 1 == job.pieces;
            FetchBlock fetch{reinterpret_cast<const char*>(next),
                             reinterpret_cast<const char*>(none ? next : next + chunks * kChunkItems),
                             (kChunkLines + pairs - 1) / pairs};
            for (int64_t pair = 0; pair < pairs; ++pair) {
                const int64_t row = first_row + pair * kStreamedRows;
                const uint16_t* const x = job.x + (row * job.chunks + chunk * kTileSide) * kTileDepth;
                const auto multiply_rows =
                    args.rows - row > kTileSide ? multiply<2, FetchBlock> : multiply<1, FetchBlock>;
                multiply_rows(job, x, job.weights(panel, chunk), chunks, piece == 0,
                              sums + (panel - first_panel) * panel_sums + pair * pair_sums, fetch);
            }
        }
    }
    _tile_release();
    finish_run(args, first_panel, last_panel, first_row, rows, sums, panel_sums);
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
    const bool resident = resident_rows >= smaller(args.rows, kGroupRows / 2);
    job.group_rows = resident ? smaller(kGroupRows, resident_rows) : kGroupRows;
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
    const int64_t runs = divide(panels, streamed ? panels : resident ? kRunPanels : kLongRunPanels, pool.threads(), job.borders);
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
