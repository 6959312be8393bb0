// GEMM of integers by AMX: tiles of 16 rows of 64 bytes by 64 x 16 bytes, sums of 32 bits.
//
// An input of 16 bits has a high and a low byte plane, 256 high + low, both signed, and its row is two rows of tiles. 4-bit
// weights are widened to bytes in the L1, once for all rows of an item; each group's sums are stored, scaled and added.
#include "gemm/amx/tile_config.h"
#include "gemm/integers.h"

#if QUIRE_AMX

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t kChunk = 64;                            // inputs in a tile
constexpr int64_t kChunkBytes = kChunk * kTilePanel;      // 8-bit weights of a panel for one chunk
constexpr int64_t kBlockSums = kTileSide * kTilePanel;    // of a block of rows and a panel
constexpr int64_t kRowBytes = kIntegerBytes;              // from one quad of weights to the next
constexpr int64_t kPrefetchBytes = 8192;
constexpr int64_t kPieceChunks = 18;   // their 8-bit weights, 36 KB, stay in the L1
constexpr int64_t kWidenedChunks = 4;   // the same of 4-bit weights as they are widened: 8 KB
constexpr int64_t kStreamedChunks = 4;  // and where they are used once
constexpr int64_t kGroupBlocks = 32;   // blocks of rows whose inputs of one piece, 0.6 MB, stay in the L2
constexpr int64_t kRunPanels = 8;      // panels whose sums are kept and written together

// Tiles 0 and 1 hold sums, 2 rows of x, 3 weights, `depth` inputs deep.
void configure(int64_t rows, int64_t depth) {
    TileConfig config;
    for (int tile = 0; tile < 4; ++tile) config.rows[tile] = static_cast<uint8_t>(tile < 3 ? rows : depth / kQuad);
    config.row_bytes[2] = static_cast<uint16_t>(depth);
    load_config(config);
}

// x [blocks][chunks][tile_rows][64]; with two byte planes blocks 2 i and 2 i + 1 are of the same rows
struct LaunchArgs : GemmLaunch {
    int64_t planes;  // bytes of an input
    bool stacked;    // two byte planes of at most 8 rows: one block, the low plane in the rows below
    int64_t chunks, tile_rows, blocks, piece_chunks;

    int64_t block_bytes() const { return chunks * tile_rows * kChunk; }
    int64_t plane_bytes() const { return stacked ? args->rows * kChunk : block_bytes(); }
    int64_t rows_of(int64_t block_count) const { return block_count / planes * kTileSide; }
    int8_t* block(int64_t index) const { return reinterpret_cast<int8_t*>(x) + index * block_bytes(); }
};

// One block of rows, all its planes; rows and inputs that do not exist are zero.
void quantize_block(void* context, int64_t item, int) {
    const LaunchArgs& launch = *static_cast<const LaunchArgs*>(context);
    const LinearArgs& args = *launch.args;
    int8_t* const to = launch.block(item * launch.planes);
    const int64_t rows = launch.stacked ? args.rows : launch.tile_rows;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = item * kTileSide + r;
        const float* const x = args.x + (row < args.rows ? row * args.x_stride : 0);
        QuantizedRow quantized{0.0f, 0.0f};
        if (row < args.rows) {
            quantized = measure_row(x, args.weight.in, args.weight.qmax);
            launch.x_scales[row] = quantized.scale;
        }
        for (int64_t i = 0; i < launch.chunks * kChunk; i += kLanes) {
            store_planes(quantized.at(x, i, args.weight.in), launch.planes,
                         to + (i / kChunk * launch.tile_rows + r) * kChunk + i % kChunk, launch.plane_bytes());
        }
    }
}

// 8-bit weights: sums are integers until the end of the inputs.

// sums [16][32] = (what they are, or 0) + a block of x . weights over `chunks` chunks of inputs. `StreamsX`: x is too large to
// stay in the L1, and leaves it to the weights.
template <bool StreamsX>
void multiply_block(const LaunchArgs& launch, const int8_t* x, const uint8_t* weights, int64_t chunks, bool fresh,
                    int32_t* sums, Prefetcher& prefetcher, int64_t lines) {
    constexpr int64_t bytes = kTilePanel * 4;
    const int64_t x_bytes = launch.tile_rows * kChunk;
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
    } else {
        _tile_loadd(0, sums, bytes);
        _tile_loadd(1, sums + kTileSide, bytes);
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk, x += x_bytes, weights += kChunkBytes) {
        _tile_loadd(3, weights, kRowBytes);
        if (StreamsX) {
            _tile_stream_loadd(2, x, kChunk);
        } else {
            _tile_loadd(2, x, kChunk);
        }
        _tile_dpbssd(0, 2, 3);
        prefetcher.step(lines);
        _tile_loadd(3, weights + 64, kRowBytes);
        _tile_dpbssd(1, 2, 3);
    }
    _tile_stored(0, sums, bytes);
    _tile_stored(1, sums + kTileSide, bytes);
}

struct EightBitTiles {
    using Sum = int32_t;

    // Some chunks of one panel for blocks of rows from `x` on.
    static void multiply(const LaunchArgs& launch, const int8_t* x, int64_t blocks, int64_t panel, int64_t chunk,
                         int64_t chunks, Prefetcher prefetcher, Sum* sums, uint8_t*) {
        const uint8_t* const weights = launch.panel(panel) + kScaleBytes + chunk * kChunkBytes;
        const int64_t lines = (kChunkBytes / 64 + blocks - 1) / blocks;
        const auto multiply = blocks <= 2 ? multiply_block<false> : multiply_block<true>;
        for (int64_t block = 0; block < blocks; ++block) {
            const int8_t* const from = x + block * launch.block_bytes() + chunk * launch.tile_rows * kChunk;
            multiply(launch, from, weights, chunks, chunk == 0, sums + block * kBlockSums, prefetcher, lines);
        }
    }

    // One row's sums of one panel as they are scaled.
    static void scale(const LaunchArgs& launch, int64_t panel, int64_t row, const Sum* sums, float* y) {
        const float* const scales = reinterpret_cast<const float*>(launch.panel(panel));
        const Sum* const at = sums + row / kTileSide * launch.planes * kBlockSums + row % kTileSide * kTilePanel;
        const int64_t low = launch.stacked ? launch.args->rows * kTilePanel : kBlockSums;
        for (int64_t i = 0; i < kTilePanel; i += kLanes) {
            const Ints first = load_ints(at + i);
            const Floats sum = launch.planes == 1 ? to_floats(first) : join(first, load_ints(at + low + i), 8);
            store(y + i, fma(sum, load(scales + i), Floats{}));
        }
    }
};

// 4-bit weights: each group's sums are scaled as they come.

// `inputs` of a panel as bytes, in the order of 8-bit weights.
void widen(const uint8_t* from, int64_t inputs, uint8_t* to, Prefetcher& prefetcher) {
    const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    for (int64_t i = 0; i < inputs; i += 2 * kQuad, from += kRowBytes, to += 2 * kRowBytes) {
        prefetcher.step(kRowBytes / 64);
        for (int64_t half = 0; half < kRowBytes; half += 64) {
            const __m512i both = _mm512_loadu_si512(from + half);
            const __m512i first = _mm512_and_si512(both, low);
            const __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
            _mm512_store_si512(to + half, _mm512_sub_epi8(first, eight));
            _mm512_store_si512(to + kRowBytes + half, _mm512_sub_epi8(second, eight));
        }
    }
}

// Sums of the groups of one half of a panel, for up to Rows rows. Two tiles of sums take turns: while one is stored, the
// other is computed. They are those of two groups, or of the high and the low byte plane.
template <int Planes, bool Stacked, int Rows>
struct GroupSums {
    static constexpr bool kTwoBlocks = Planes == 2 && !Stacked;

    const LaunchArgs& launch;
    const int8_t* x;
    const uint8_t* weights;  // widened
    const uint8_t* scales;   // of the first group
    int32_t* sums;  // [2][planes][16][16]: what is stored of two groups

    // Tile `Tile` = the inputs of a group, or one byte plane of them, by its weights. (A tile's number is a literal of gcc's.)
    template <int Tile>
    __attribute__((always_inline)) void multiply(int64_t group) {
        const int64_t inputs = launch.args->weight.group, depth = smaller(inputs, kChunk);
        if constexpr (Tile == 0) {
            _tile_zero(0);
        } else {
            _tile_zero(1);
        }
        for (int64_t input = group * inputs; input < (group + 1) * inputs; input += depth) {
            const int8_t* const from = x + input / kChunk * launch.tile_rows * kChunk + input % kChunk;
            _tile_loadd(3, weights + input / kQuad * kRowBytes, kRowBytes);
            _tile_loadd(2, kTwoBlocks && Tile == 1 ? from + launch.block_bytes() : from, kChunk);
            if constexpr (Tile == 0) {
                _tile_dpbssd(0, 2, 3);
            } else {
                _tile_dpbssd(1, 2, 3);
            }
        }
    }

    // Where the sums of a group are stored.
    __attribute__((always_inline)) int32_t* place(int64_t group, int plane) const {
        return sums + (group % 2 * 2 + plane) * kTileSide * kTileSide;
    }

    // (`y` is no member: what a tile store may write to would not stay in registers)
    __attribute__((always_inline)) void scale(int64_t group, __m512* y) const {
        const int32_t* const high = place(group, 0);
        const int32_t* const low = Stacked ? high + launch.args->rows * kTileSide : place(group, 1);
        const __m512 factor = _mm512_load_ps(scales + group * launch.args->weight.group_bytes());
        for (int r = 0; r < Rows; ++r) {
            __m512i sum = _mm512_load_si512(high + r * kTileSide);
            if (Planes == 2) {
                sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), _mm512_load_si512(low + r * kTileSide));
            }
            y[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, y[r]);
        }
    }

    // Sums are scaled a group later than they are stored: vectors do not wait for tiles.
    __attribute__((always_inline)) void add_planes(int64_t groups, __m512* y) {
        multiply<0>(0);
        for (int64_t group = 0; group < groups; ++group) {
            multiply<1>(group);
            _tile_stored(0, place(group, 0), kTileSide * 4);
            if (group > 0) scale(group - 1, y);
            if (group + 1 < groups) multiply<0>(group + 1);
            _tile_stored(1, place(group, 1), kTileSide * 4);
        }
        scale(groups - 1, y);
    }

    __attribute__((always_inline)) void add_groups(int64_t groups, __m512* y) {
        multiply<0>(0);
        for (int64_t group = 0; group < groups; group += 2) {
            if (group + 1 < groups) multiply<1>(group + 1);
            _tile_stored(0, place(group, 0), kTileSide * 4);
            if (group > 0) scale(group - 1, y);
            if (group + 2 < groups) multiply<0>(group + 2);
            if (group + 1 < groups) _tile_stored(1, place(group + 1, 0), kTileSide * 4);
            scale(group, y);
        }
        if (groups % 2 == 0) scale(groups - 1, y);
    }
};

// y [Rows][32] += scaled sums of `groups` groups.
template <int Planes, bool Stacked, int Rows>
void multiply_groups(const LaunchArgs& launch, const int8_t* x, const uint8_t* widened, const uint8_t* scales,
                     int64_t groups, float* y) {
    alignas(64) int32_t sums[4 * kTileSide * kTileSide];
    for (int64_t half = 0; half < kTilePanel; half += kTileSide) {
        GroupSums<Planes, Stacked, Rows> state{launch, x, widened + half * kQuad, scales + half * 4, sums};
        __m512 results[Rows];
        for (int r = 0; r < Rows; ++r) results[r] = _mm512_load_ps(y + r * kTilePanel + half);
        if constexpr (Planes == 2 && !Stacked) {
            state.add_planes(groups, results);
        } else {
            state.add_groups(groups, results);
        }
        for (int r = 0; r < Rows; ++r) _mm512_store_ps(y + r * kTilePanel + half, results[r]);
    }
}

auto groups_of(const LaunchArgs& launch) {
    if (launch.stacked) return multiply_groups<2, true, 8>;
    if (launch.planes == 2) return multiply_groups<2, false, 16>;
    return launch.tile_rows <= 8 ? multiply_groups<1, false, 8> : multiply_groups<1, false, 16>;
}

struct FourBitTiles {
    using Sum = float;

    static void multiply(const LaunchArgs& launch, const int8_t* x, int64_t blocks, int64_t panel, int64_t chunk,
                         int64_t chunks, Prefetcher prefetcher, Sum* sums, uint8_t* widened) {
        const Panels& weight = launch.args->weight;
        const int64_t first = chunk * kChunk / weight.group;
        const int64_t last = smaller((chunk + chunks) * kChunk / weight.group, weight.groups());
        const uint8_t* const groups = launch.panel(panel) + first * weight.group_bytes();
        for (int64_t group = first; group < last; ++group) {
            prefetcher.step(kScaleBytes / 64);
            widen(groups + (group - first) * weight.group_bytes() + kScaleBytes, weight.group,
                  widened + (group - first) * weight.group * kTilePanel, prefetcher);
        }
        const auto multiply = groups_of(launch);
        for (int64_t block = 0; block < blocks; block += launch.stacked ? 1 : launch.planes) {
            Sum* const y = sums + block / launch.planes * kBlockSums;
            if (chunk == 0) __builtin_memset(y, 0, kBlockSums * sizeof(Sum));
            multiply(launch, x + block * launch.block_bytes() + chunk * launch.tile_rows * kChunk, widened, groups,
                     last - first, y);
        }
    }

    static void scale(const LaunchArgs&, int64_t, int64_t row, const Sum* sums, float* y) {
        __builtin_memcpy(y, sums + row * kTilePanel, kTilePanel * sizeof(float));
    }
};

template <class Tiles>
void finish(const LaunchArgs& launch, int64_t panel, int64_t first_row, int64_t row, const typename Tiles::Sum* sums) {
    float y[kTilePanel];
    Tiles::scale(launch, panel, row, sums, y);
    finish_quantized_row(launch, panel, first_row + row, y);
}

constexpr size_t kWidenedBytes = kPieceChunks * kChunkBytes;

Prefetcher prefetcher(const uint8_t* at, const uint8_t* end) {
    return {reinterpret_cast<const char*>(at), reinterpret_cast<const char*>(end)};
}

// All rows, which are few, by a run of panels: each weight is used once.
template <class Tiles>
void stream_item(void* context, int64_t index, int worker) {
    const LaunchArgs& launch = *static_cast<const LaunchArgs*>(context);
    const GemmLaunch::Item item = launch.item(index);
    uint8_t* const scratch = launch.scratch(worker, kWidenedBytes + launch.blocks * kBlockSums * 4);
    auto* const sums = reinterpret_cast<typename Tiles::Sum*>(scratch + kWidenedBytes);
    const int64_t panel_bytes = launch.args->weight.panel_bytes();
    configure(launch.tile_rows, smaller(launch.args->weight.group, kChunk));
    for (int64_t panel = item.first_panel; panel < item.last_panel; ++panel) {
        for (int64_t chunk = 0; chunk < launch.chunks; chunk += launch.piece_chunks) {
            const int64_t chunks = smaller(launch.piece_chunks, launch.chunks - chunk);
            const uint8_t* const next = launch.panel(panel) + panel_bytes * chunk / launch.chunks + kPrefetchBytes;
            Tiles::multiply(launch, launch.block(0), launch.blocks, panel, chunk, chunks,
                            prefetcher(next, launch.panel(item.last_panel)), sums, scratch);
        }
        for (int64_t row = 0; row < launch.args->rows; ++row) finish<Tiles>(launch, panel, 0, row, sums);
    }
    _tile_release();
}

// A run of panels for one group of rows: for each piece of the inputs, for each panel, all rows.
template <class Tiles>
void block_item(void* context, int64_t index, int worker) {
    const LaunchArgs& launch = *static_cast<const LaunchArgs*>(context);
    const Panels& weight = launch.args->weight;
    const auto [first_panel, last_panel, row_group] = launch.item(index);
    const int64_t first_block = row_group * kGroupBlocks;
    const int64_t blocks = smaller(kGroupBlocks, launch.blocks - first_block);
    const int64_t first_row = launch.rows_of(first_block);
    const int64_t panel_sums = (blocks + 1) / 2 * 2 * kBlockSums;
    uint8_t* const scratch = launch.scratch(worker, kWidenedBytes + (last_panel - first_panel) * panel_sums * 4);
    auto* const sums = reinterpret_cast<typename Tiles::Sum*>(scratch + kWidenedBytes);
    configure(kTileSide, smaller(weight.group, kChunk));
    for (int64_t chunk = 0; chunk < launch.chunks; chunk += launch.piece_chunks) {
        const int64_t chunks = smaller(launch.piece_chunks, launch.chunks - chunk);
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
            const uint8_t* const next = launch.panel(panel + 1) + weight.panel_bytes() * chunk / launch.chunks;
            Tiles::multiply(launch, launch.block(first_block), blocks, panel, chunk, chunks,
                            prefetcher(next, launch.panel(last_panel)), sums + (panel - first_panel) * panel_sums,
                            scratch);
        }
    }
    _tile_release();
    for (int64_t row = 0; row < smaller(launch.rows_of(blocks), launch.args->rows - first_row); ++row) {
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
            finish<Tiles>(launch, panel, first_row, row, sums + (panel - first_panel) * panel_sums);
        }
    }
}

}  // namespace

void linear_int8_amx(const LinearArgs& args, ThreadPool& pool) {
    const Panels& weight = args.weight;
    const int64_t panels = weight.panels(), row_blocks = (args.rows + kTileSide - 1) / kTileSide;
    LaunchArgs launch{};
    launch.planes = weight.qmax > 127 ? 2 : 1;
    launch.chunks = (weight.groups() * weight.group + kChunk - 1) / kChunk;
    launch.stacked = launch.planes == 2 && args.rows <= kTileSide / 2;
    launch.tile_rows = launch.stacked ? 2 * args.rows : smaller(args.rows, kTileSide);
    launch.blocks = launch.stacked ? 1 : row_blocks * launch.planes;
    const bool streamed = launch.blocks <= 2, bytes = weight.bits == 8;
    const int64_t longest = bytes ? kPieceChunks : streamed ? kStreamedChunks : kWidenedChunks;
    const int64_t pieces = larger(1, (launch.chunks + longest - 1) / longest);
    // whole groups, so an even number: of 128 inputs
    launch.piece_chunks = larger(2, ((launch.chunks + pieces - 1) / pieces + 1) / 2 * 2);

    const int64_t block_sums = (smaller(kGroupBlocks, launch.blocks) + 1) / 2 * 2 * kBlockSums;
    const int64_t sums = streamed ? launch.blocks * kBlockSums : smaller(kRunPanels, panels) * block_sums;
    if (!launch.reserve(args, pool, launch.blocks * launch.block_bytes(), kWidenedBytes + sums * 4)) return;
    prepare_activations(launch, row_blocks, quantize_block);
    if (streamed) return run_panels(launch, panels, 1, bytes ? stream_item<EightBitTiles> : stream_item<FourBitTiles>);
    run_panels(launch, kRunPanels, (launch.blocks + kGroupBlocks - 1) / kGroupBlocks,
               bytes ? block_item<EightBitTiles> : block_item<FourBitTiles>);
}

}  // namespace quire::QUIRE_ISA

#endif
