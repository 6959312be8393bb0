// y = x W^T + b by AMX, or by vectors of pairs (AVX512-BF16): x rounded to bfloat16, accumulated in float32.
//
// An output is one chain of tile multiplications over chunks of 32 inputs, from the first to the last. The rows of a tile
// are treated alike, so a row's sums have the same bits in any row of a tile and beside any others; where `in` is cut into
// pieces to stay in the cache, the partial sums wait as float32. docs/design/amx.md
#include "gemm/linear.h"

#if QUIRE_TILES

#include "gemm/amx/interleaved_epilogue.h"
#include "gemm/amx/tile_config.h"
#include "gemm/frame.h"

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t kTileItems = kTileSide * kTileDepth;    // bfloat16 in a tile
constexpr int64_t kChunkItems = kTilePanel * kTileDepth;  // weights of a panel for one chunk of inputs
constexpr int64_t kChunkLines = kChunkItems * 2 / 64;
constexpr int64_t kStreamedRows = 2 * kTileSide;  // up to here each weight is used once and memory is the limit
constexpr int64_t kPrefetchItems = 4096;          // weights between what is read and what is prefetched
constexpr int64_t kRoundedChunks = 8;
// Above kStreamedRows a group of rows meets a piece of a panel at a time.
constexpr int64_t kPieceChunks = 18;      // chunks of inputs in a piece: its weights, 36 KB, stay in the L1
constexpr int64_t kGroupRows = 512;       // with that piece of their x, 0.6 MB, in the L2
constexpr int64_t kGroupItems = 1 << 19;  // inputs of a group of rows that stay in the L2, all pieces together
constexpr int64_t kRunPanels = 32;        // panels for which a group's x, which other items displace, comes to the L2 once
// Where even those do not stay, a piece of x passes by so many panels while its next piece is fetched; it and their sums do.
constexpr int64_t kPassedPanels = 16;
constexpr int64_t kPassingRows = 256;
constexpr int64_t kBlockSums = kTileSide * kTilePanel;

struct LaunchArgs : GemmLaunch {
    const uint16_t* tiles;  // TileRows
    TileRows rounded;       // the same where x arrives as floats
    int64_t chunks;         // of 32 inputs
    int64_t tile_rows;      // 16, or all rows where they are fewer
    int64_t group_rows;
    bool resident;   // a group's x stays in the cache
    int64_t pieces;  // of the chunks

    const uint16_t* weights(int64_t panel, int64_t chunk) const {
        return static_cast<const uint16_t*>(args->weight.data) + (panel * chunks + chunk) * kChunkItems;
    }
};

// One block of rows as tiles; rows and inputs that do not exist are zero. A few chunks of all rows at a time, so that
// tiles leave the cache complete.
void round_block(void* context, int64_t block, int) {
    const LaunchArgs& launch = *static_cast<const LaunchArgs*>(context);
    const LinearArgs& args = *launch.args;
    for (int64_t first = 0; first < launch.chunks; first += kRoundedChunks) {
        const int64_t last = smaller(launch.chunks, first + kRoundedChunks);
        for (int64_t r = 0; r < launch.tile_rows; ++r) {
            const int64_t row = block * kTileSide + r;
            for (int64_t chunk = first; chunk < last; ++chunk) {
                const int64_t inputs = row < args.rows ? args.weight.in - chunk * kTileDepth : 0;
                const float* from = inputs > 0 ? args.x + row * args.x_stride + chunk * kTileDepth : args.x;
                round_chunk(from, inputs, launch.rounded.at(block * kTileSide + r, chunk));
            }
        }
    }
}

// What is interleaved with the GEMM, some of it in each chunk: the prefetch of weights that will be read soon, and the
// epilogue of the rows before. A GEMM tile works on a copy, so that it lies in registers.
template <class Results>
struct Interleaved {
    Results results;
    Prefetcher weights, x;
    int64_t weight_lines, x_lines;  // with each chunk

    inline void prefetch() {
        weights.step(weight_lines);
        x.step(x_lines);
    }
};

// A block of rows by a panel over some chunks of inputs.
struct GemmTile {
    const uint16_t *x, *weights;
    int64_t chunks, x_items;
    float* sums;  // [16][32], or [32][32] of both blocks; free once `interleaved.results` are finished
    bool fresh;   // else added to what sums holds
    int64_t rows;  // that exist; AMX computes the whole tile
};

#if QUIRE_AMX
// Tiles 0 and 1 hold sums (a block of rows by two of outputs), 2 rows of x, 3 weights; of a second block 4 and 5, 6, 7.
void configure(int64_t rows) {
    TileConfig config;
    for (int tile = 0; tile < 3; ++tile) config.rows[tile] = static_cast<uint8_t>(rows);
    load_config(config);
}

void release() { _tile_release(); }

// x that passes by once for each piece of weights should not displace them.
template <bool Streams, class Results>
void multiply(const GemmTile& tile, Interleaved<Results>& outer) {
    constexpr int64_t bytes = kTilePanel * 4;
    Interleaved<Results> interleaved = outer;
    if (tile.fresh) {
        _tile_zero(0);
        _tile_zero(1);
    } else {
        _tile_loadd(0, tile.sums, bytes);
        _tile_loadd(1, tile.sums + kTileSide, bytes);
    }
    const uint16_t *x = tile.x, *weights = tile.weights;
    for (int64_t chunk = 0; chunk < tile.chunks; ++chunk, x += tile.x_items, weights += kChunkItems) {
        _tile_loadd(3, weights, 64);
        if constexpr (Streams) {
            _tile_loadd(2, x, 64);
        } else {
            _tile_stream_loadd(2, x, 64);
        }
        _tile_dpbf16ps(0, 2, 3);
        interleaved.prefetch();
        _tile_loadd(3, weights + kTileItems, 64);
        _tile_dpbf16ps(1, 2, 3);
        interleaved.results.step();
    }
    interleaved.results.finish();
    outer = interleaved;
    _tile_stored(0, tile.sums, bytes);
    _tile_stored(1, tile.sums + kTileSide, bytes);
}

// Two blocks of rows, all chunks of inputs: each weight is loaded once. A tile is zeroed after its last use, which frees its
// register.
template <class Results>
void multiply_both(const GemmTile& tile, Interleaved<Results>& outer) {
    constexpr int64_t bytes = kTilePanel * 4;
    Interleaved<Results> interleaved = outer;
    const uint16_t *x = tile.x, *weights = tile.weights;
    const uint16_t* second = x + tile.chunks * tile.x_items;
    for (int64_t chunk = 0; chunk < tile.chunks; ++chunk, x += tile.x_items, second += tile.x_items) {
        _tile_loadd(3, weights, 64);
        _tile_loadd(2, x, 64);
        _tile_dpbf16ps(0, 2, 3);
        _tile_loadd(6, second, 64);
        _tile_dpbf16ps(4, 6, 3);
        _tile_zero(3);
        interleaved.prefetch();
        _tile_loadd(7, weights + kTileItems, 64);
        _tile_dpbf16ps(1, 2, 7);
        _tile_zero(2);
        _tile_dpbf16ps(5, 6, 7);
        _tile_zero(6);
        _tile_zero(7);
        interleaved.results.step();
        interleaved.results.step();
        weights += kChunkItems;
    }
    interleaved.results.finish();
    outer = interleaved;
    _tile_stored(0, tile.sums, bytes);
    _tile_stored(1, tile.sums + kTileSide, bytes);
    _tile_stored(4, tile.sums + kBlockSums, bytes);
    _tile_stored(5, tile.sums + kBlockSums + kTileSide, bytes);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(4);
    _tile_zero(5);
}
#else
void configure(int64_t) {}
void release() {}

// Rows [first, first + R) of a block. A pair of inputs is added at a time, the same for any R.
template <int R>
void multiply_rows(const GemmTile& tile, int64_t first, Interleaved<AnyResults>* interleaved) {
    __m512 acc[R][2];
    float* const sums = tile.sums + first * kTilePanel;
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < 2; ++v) {
            acc[r][v] = tile.fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * kTilePanel + v * kTileSide);
        }
    }
    const uint16_t *x = tile.x + first * kTileDepth, *weights = tile.weights;
    for (int64_t chunk = 0; chunk < tile.chunks; ++chunk, x += tile.x_items, weights += kChunkItems) {
        for (int64_t pair = 0; pair < kTileDepth; pair += 2) {
            const __m512bh left = (__m512bh)_mm512_loadu_si512(weights + pair * kTileSide);
            const __m512bh right = (__m512bh)_mm512_loadu_si512(weights + kTileItems + pair * kTileSide);
            for (int r = 0; r < R; ++r) {
                int32_t both;
                __builtin_memcpy(&both, x + r * kTileDepth + pair, 4);
                const __m512bh inputs = (__m512bh)_mm512_set1_epi32(both);
                acc[r][0] = _mm512_dpbf16_ps(acc[r][0], left, inputs);
                acc[r][1] = _mm512_dpbf16_ps(acc[r][1], right, inputs);
            }
        }
        if (interleaved != nullptr) {
            interleaved->prefetch();
            interleaved->results.step();
        }
    }
    if (interleaved != nullptr) interleaved->results.finish();
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < 2; ++v) _mm512_storeu_ps(sums + r * kTilePanel + v * kTileSide, acc[r][v]);
    }
}

template <bool Streams>
void multiply(const GemmTile& tile, Interleaved<AnyResults>& interleaved) {
    constexpr int kMostRows = 8;  // rows whose sums are held in registers
    for_even_blocks(tile.rows, kMostRows, [&](int64_t row, int64_t now) {
        Interleaved<AnyResults>* const once = row == 0 ? &interleaved : nullptr;
        with_row_count<kMostRows>(now, [&](auto count) { multiply_rows<count.value>(tile, row, once); });
    });
}

void multiply_both(const GemmTile& tile, Interleaved<AnyResults>& interleaved) {
    GemmTile block = tile;
    block.rows = kTileSide;
    multiply<true>(block, interleaved);
    block.x += tile.chunks * tile.x_items;
    block.sums += kBlockSums;
    block.rows = tile.rows - kTileSide;
    Interleaved<AnyResults> nothing = interleaved;
    nothing.weights.at = nothing.weights.end;
    multiply<true>(block, nothing);
}
#endif

// Up to 32 rows by a run of panels: each weight comes from memory once. Nothing past the end of the run is prefetched:
// another thread reads on there.
template <class Results>
void stream_item(void* context, int64_t index, int worker) {
    const LaunchArgs& launch = *static_cast<const LaunchArgs*>(context);
    const LinearArgs& args = *launch.args;
    const GemmLaunch::Item item = launch.item(index);
    GemmTile tile{launch.tiles, nullptr, launch.chunks, launch.tile_rows * kTileDepth, nullptr, true, args.rows};
    tile.sums = reinterpret_cast<float*>(launch.scratch(worker, kStreamedRows * kTilePanel * sizeof(float)));
    Interleaved<Results> interleaved{
        Results(args),
        {reinterpret_cast<const char*>(launch.weights(item.first_panel, 0) + kPrefetchItems),
         reinterpret_cast<const char*>(launch.weights(item.last_panel, 0))},
        {nullptr, nullptr},
        kChunkLines,
        0};
    configure(launch.tile_rows);
    for (int64_t panel = item.first_panel; panel < item.last_panel; ++panel) {
        tile.weights = launch.weights(panel, 0);
        args.rows > kTileSide ? multiply_both(tile, interleaved) : multiply<true>(tile, interleaved);
        interleaved.results.begin(panel, 0, args.rows, tile.sums);
    }
    release();
    interleaved.results.finish();
}

// A run of panels for one group of rows: `together` panels at a time, for each piece of `in`, for each of the panels, all
// rows. Where x stays in the cache one panel is complete before the next.
template <class Results>
void block_item(void* context, int64_t index, int worker) {
    const LaunchArgs& launch = *static_cast<const LaunchArgs*>(context);
    const LinearArgs& args = *launch.args;
    const auto [first_panel, last_panel, row_group] = launch.item(index);
    const int64_t first_row = row_group * launch.group_rows;
    const int64_t end_row = smaller(first_row + launch.group_rows, args.rows);
    const int64_t blocks = (end_row - first_row + kTileSide - 1) / kTileSide;
    const int64_t together = launch.resident ? 1 : last_panel - first_panel;
    const size_t sums_bytes = together * blocks * kBlockSums * sizeof(float);
    float* const sums = reinterpret_cast<float*>(launch.scratch(worker, sums_bytes));
    const int64_t tile_bytes = kTileItems * 2, x_lines = (tile_bytes / 64 + together - 1) / together;
    Interleaved<Results> interleaved{
        Results(args), {nullptr, nullptr}, {nullptr, nullptr}, (kChunkLines + blocks - 1) / blocks, x_lines};
    configure(kTileSide);
    for (int64_t start = first_panel; start < last_panel; start += together) {
        for (int64_t step = 0; step < launch.pieces * together; ++step) {
            const int64_t part = step / together, panel = start + step % together;
            const int64_t chunk = part * launch.chunks / launch.pieces;
            const int64_t chunks = (part + 1) * launch.chunks / launch.pieces - chunk;
            const bool done = step + 1 == launch.pieces * together, none = done && start + together >= last_panel;
            const uint16_t* const next = done ? launch.weights(none ? panel : start + together, 0)
                                              : launch.weights(start + (step + 1) % together,
                                                            (step + 1) / together * launch.chunks / launch.pieces);
            interleaved.weights.at = reinterpret_cast<const char*>(next);
            interleaved.weights.end = reinterpret_cast<const char*>(none ? next : next + chunks * kChunkItems);
            const bool more = !launch.resident && part + 1 < launch.pieces;
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t row = first_row + block * kTileSide;
                const int64_t slot = launch.pieces == 1 ? 0 : step % together * blocks + block;
                const uint16_t* const x = launch.tiles + (row * launch.chunks + chunk * kTileSide) * kTileDepth;
                const GemmTile tile{x, launch.weights(panel, chunk), chunks, kTileItems, sums + slot * kBlockSums,
                                    part == 0, smaller(kTileSide, end_row - row)};
                if (more) {  // a share of the block's next piece of x
                    const char* const coming = reinterpret_cast<const char*>(x + chunks * kTileItems);
                    interleaved.x.at = coming + step % together * chunks * x_lines * 64;
                    interleaved.x.end = coming + chunks * tile_bytes;
                }
                multiply<false>(tile, interleaved);
                if (part + 1 == launch.pieces) {
                    interleaved.results.begin(panel, row, smaller(row + kTileSide, end_row), tile.sums);
                }
            }
        }
    }
    release();
    interleaved.results.finish();
}

}  // namespace

void linear_bfloat16(const LinearArgs& args, ThreadPool& pool) {
    const bool streamed = args.rows <= kStreamedRows;
    const int64_t panels = args.weight.panels();
    LaunchArgs launch{};
    launch.chunks = (args.weight.in + kTileDepth - 1) / kTileDepth;
    launch.tile_rows = smaller(args.rows, kTileSide);
    launch.pieces = larger(1, (launch.chunks + kPieceChunks - 1) / kPieceChunks);
    const int64_t resident_rows = kGroupItems / larger(1, launch.chunks * kTileDepth) / kStreamedRows * kStreamedRows;
    launch.resident = resident_rows >= smaller(args.rows, kGroupRows / 2);
    launch.group_rows = streamed ? kStreamedRows : launch.resident ? smaller(kGroupRows, resident_rows) : kPassingRows;
    const int64_t row_groups = (args.rows + launch.group_rows - 1) / launch.group_rows;

    launch.rounded = TileRows{nullptr, args.x == nullptr ? 0 : args.rows, args.weight.in};
    const bool stays = streamed || (launch.resident && row_groups == 1);
    const int64_t longest = stays ? panels : launch.resident ? kRunPanels : kPassedPanels;
    const int64_t together = launch.resident ? 1 : smaller(longest, panels);  // most panels whose sums an item keeps
    const int64_t group_blocks = (smaller(launch.group_rows, args.rows) + kTileSide - 1) / kTileSide;
    const int64_t sums = streamed ? kStreamedRows * kTilePanel : together * group_blocks * kBlockSums;
    if (!launch.reserve(args, pool, launch.rounded.bytes(), sums * int64_t{sizeof(float)})) return;
    launch.rounded.data = reinterpret_cast<uint16_t*>(launch.x);
    launch.tiles = args.x == nullptr ? args.x_tiles.data : launch.rounded.data;
    prepare_activations(launch, launch.rounded.blocks(), round_block);
    with_results(args, [&](auto results) {
        using Results = decltype(results);
        run_panels(launch, longest, row_groups, streamed ? stream_item<Results> : block_item<Results>);
    });
}

}  // namespace quire::QUIRE_ISA

#endif
