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
constexpr int64_t kGroupRows = 512;    // beyond: rows multiplied by a piece of a panel while it is in the cache,
constexpr int64_t kPieceChunks = 18;   // chunks of inputs in such a piece (36 KB of weights),
constexpr int64_t kRunPanels = 8;      // and panels whose partial sums one worker keeps
constexpr int64_t kAheadItems = 4096;  // weights between what is read and what is asked of memory
constexpr int64_t kSerialItems = 32768;  // inputs that one thread rounds faster than it finds others to help

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
    uint16_t* x;        // [blocks of rows][chunks][tile_rows][32]
    int32_t* borders;   // [runs + 1]: the panels of each run
    int64_t chunks;
    int64_t tile_rows;  // 16, or all rows where they are fewer
    int64_t groups;     // of kGroupRows rows
};

// One block of rows as tiles; rows and inputs that do not exist are zero.
void round_block(void* context, int64_t block, int) {
    const Job& job = *static_cast<const Job*>(context);
    const LinearArgs& args = *job.args;
    const int64_t in = args.weight.in;
    uint16_t* const to = job.x + block * kTileItems * job.chunks;
    for (int64_t r = 0; r < job.tile_rows; ++r) {
        const int64_t row = block * kTileSide + r;
        const bool exists = row < args.rows;
        const float* from = args.x + (exists ? row * args.x_stride : 0);
        for (int64_t chunk = 0; chunk < job.chunks; ++chunk) {
            const int64_t left = exists ? smaller(in - chunk * kTileDepth, kTileDepth) : 0;
            const uint32_t mask = left == kTileDepth ? ~0u : (1u << left) - 1;
            const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from + chunk * kTileDepth);
            const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), from + chunk * kTileDepth + 16);
            const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
            __builtin_memcpy(to + (chunk * job.tile_rows + r) * kTileDepth, &rounded, 64);
        }
    }
}

// What to fetch while multiplying: `lines` lines of 64 bytes for each chunk, from `at` up to `end`.
struct Ahead {
    const char* at;
    const char* end;
    int64_t lines;
};

struct Sums {
    float* at;  // [Blocks * 16][stride]
    int64_t stride;
};

// to = (from or 0) + x . panel for `Blocks` blocks of rows, 32 outputs and `chunks` chunks of inputs.
template <int Blocks>
void multiply(const uint16_t* x, int64_t block_items, int64_t tile_rows, const uint16_t* weights, int64_t chunks,
              const float* from, Sums to, Ahead& ahead) {
    constexpr int64_t from_bytes = kTilePanel * 4, from_block = kTileSide * kTilePanel;
    if (from == nullptr) {
        _tile_zero(0);
        _tile_zero(1);
        if (Blocks == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
    } else {
        _tile_loadd(0, from, from_bytes);
        _tile_loadd(1, from + kTileSide, from_bytes);
        if (Blocks == 2) {
            _tile_loadd(2, from + from_block, from_bytes);
            _tile_loadd(3, from + from_block + kTileSide, from_bytes);
        }
    }
    const int64_t x_items = tile_rows * kTileDepth;
    const char* fetch = ahead.at;
    for (int64_t chunk = 0; chunk < chunks; ++chunk, x += x_items, weights += kChunkItems) {
        if (fetch < ahead.end) {
            for (int64_t line = 0; line < ahead.lines; ++line, fetch += 64) __builtin_prefetch(fetch);
        }
        _tile_loadd(6, weights, 64);
        _tile_loadd(4, x, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, weights + kTileItems, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (Blocks == 2) {
            _tile_loadd(5, x + block_items, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    ahead.at = fetch;
    const int64_t to_bytes = to.stride * 4;
    _tile_stored(0, to.at, to_bytes);
    _tile_stored(1, to.at + kTileSide, to_bytes);
    if (Blocks == 2) {
        _tile_stored(2, to.at + kTileSide * to.stride, to_bytes);
        _tile_stored(3, to.at + kTileSide * to.stride + kTileSide, to_bytes);
    }
}

// The sums of one or two blocks of rows and one panel have ended in `sums` [rows][32].
void finish_blocks(const LinearArgs& args, int64_t panel, int64_t first_row, int64_t rows, const float* sums) {
    finish_rows<kTilePanel>(args, panel * kTilePanel, first_row, smaller(rows, args.rows - first_row), sums);
}

// A run of panels for one group of rows: for each piece of `in`, for each panel, all rows.
void compute_item(void* context, int64_t item, int worker) {
    const Job& job = *static_cast<const Job*>(context);
    const LinearArgs& args = *job.args;
    const int64_t first_panel = job.borders[item / job.groups], last_panel = job.borders[item / job.groups + 1];
    const int64_t first_row = item % job.groups * kGroupRows;
    const int64_t blocks = (smaller(kGroupRows, args.rows - first_row) + kTileSide - 1) / kTileSide;
    const int64_t pairs = (blocks + 1) / 2;
    const bool streamed = args.rows <= kStreamedRows;
    const int64_t pieces = streamed ? 1 : larger(1, (job.chunks + kPieceChunks - 1) / kPieceChunks);
    const int64_t panel_sums = (pieces == 1 ? 2 : blocks) * kTileSide * kTilePanel;
    const int64_t kept = pieces == 1 ? 1 : last_panel - first_panel;
    float* const scratch = static_cast<float*>(job.pool->scratch(worker, kept * panel_sums * sizeof(float)));
    const uint16_t* const data = static_cast<const uint16_t*>(args.weight.data);
    const uint16_t* const x = job.x + first_row * job.chunks * kTileDepth;
    const int64_t block_items = job.chunks * kTileItems;
    const bool plain = is_plain(args);

    const auto weights_at = [&](int64_t panel, int64_t piece) {
        return data + (panel * job.chunks + piece * job.chunks / pieces) * kChunkItems;
    };
    Ahead ahead{reinterpret_cast<const char*>(weights_at(first_panel, 0) + kAheadItems),
                reinterpret_cast<const char*>(weights_at(last_panel, 0)), kChunkLines};
    configure(job.tile_rows);
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t first_chunk = piece * job.chunks / pieces, last_chunk = (piece + 1) * job.chunks / pieces;
        const int64_t chunks = last_chunk - first_chunk;
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
            if (!streamed) {  // the piece after this one, while this one is multiplied by all rows
                const bool more = panel + 1 < last_panel;
                const uint16_t* next = more ? weights_at(panel + 1, piece) : weights_at(first_panel, piece + 1);
                ahead = {reinterpret_cast<const char*>(next), reinterpret_cast<const char*>(next + chunks * kChunkItems),
                         (kChunkLines + pairs - 1) / pairs};
                if (!more && piece + 1 == pieces) ahead.at = ahead.end;
            }
            const bool whole = plain && (panel + 1) * kTilePanel <= args.weight.out;
            float* const panel_scratch = pieces == 1 ? scratch : scratch + (panel - first_panel) * panel_sums;
            for (int64_t block = 0; block < blocks; block += 2) {
                const int64_t row = first_row + block * kTileSide;
                const int64_t rows = (blocks - block == 1 ? 1 : 2) * job.tile_rows;
                float* const sums = pieces == 1 ? scratch : panel_scratch + block * kTileSide * kTilePanel;
                const bool last = piece + 1 == pieces, direct = last && whole && row + rows <= args.rows;
                const Sums to = direct ? Sums{args.y + row * args.weight.out + panel * kTilePanel, args.weight.out}
                                       : Sums{sums, kTilePanel};
                const auto multiply_blocks = blocks - block == 1 ? multiply<1> : multiply<2>;
                multiply_blocks(x + block * block_items + first_chunk * job.tile_rows * kTileDepth, block_items,
                                job.tile_rows, weights_at(panel, piece), chunks, piece == 0 ? nullptr : sums, to, ahead);
                if (last && !direct) finish_blocks(args, panel, row, rows, sums);
            }
        }
    }
    _tile_release();
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
    const int64_t panels = (args.weight.out + kTilePanel - 1) / kTilePanel;
    const int64_t blocks = (args.rows + kTileSide - 1) / kTileSide;
    Job job{};
    job.args = &args;
    job.pool = &pool;
    job.chunks = (args.weight.in + kTileDepth - 1) / kTileDepth;
    job.tile_rows = smaller(args.rows, kTileSide);
    job.groups = (args.rows + kGroupRows - 1) / kGroupRows;
    const int64_t x_bytes = blocks * job.chunks * job.tile_rows * kTileDepth * 2;
    job.x = static_cast<uint16_t*>(pool.shared_scratch(x_bytes + (panels + 1) * sizeof(int32_t)));
    job.borders = reinterpret_cast<int32_t*>(job.x + x_bytes / 2);
    if (args.rows * args.weight.in < kSerialItems) {
        for (int64_t block = 0; block < blocks; ++block) round_block(&job, block, 0);
    } else {
        pool.run(blocks, round_block, &job);
    }
    const int64_t longest = args.rows <= kStreamedRows ? panels : kRunPanels;
    const int64_t runs = divide(panels, longest, pool.threads(), job.borders);
    pool.run(runs * job.groups, compute_item, &job);
}

void embed_tiles(const EmbedArgs& args, ThreadPool& pool) {
    pool.run(args.tokens, embed_row, const_cast<EmbedArgs*>(&args));
}

}  // namespace quire::QUIRE_ISA

#endif
