// What the kernels compute: plain structs of pointers, checked by the binding before they arrive. Each kernel is
// compiled once for each instruction set; `Kernels` is the table of one of them.
#pragma once

#include <cstdint>

#include "runtime/thread_pool.h"

namespace quire {

// int8 is of a cache alone, a number for each item and a scale for each position; e4m3 of a cache, or of panels.
enum class Storage { bfloat16, float16, float32, int8, e4m3 };
enum class Activation { silu, gelu, gelu_tanh, relu };

inline bool has_scales(Storage storage) { return storage == Storage::int8 || storage == Storage::e4m3; }
inline int64_t bytes_of(Storage storage) { return storage == Storage::float32 ? 4 : has_scales(storage) ? 1 : 2; }

constexpr int64_t kPanel = 64;      // outputs in a weight panel
constexpr int64_t kTileSide = 16;   // rows, or outputs, in a tile of AMX
constexpr int64_t kTilePanel = 32;  // outputs in a panel of tiles: two side by side
constexpr int64_t kTileDepth = 32;  // inputs in a tile of bfloat16
constexpr int64_t kMaxIntegerInputs = 1 << 17;  // of a weight of integers: 2^17 products of two bytes fit into 32 bits
constexpr int64_t kTile = 16;   // positions in a tile of keys

// The order in which `linear` reads a weight [out, in]. Padding, in both directions, is zero.
//
//   panels  [ceil(out / 64)][in][64 outputs]; of e4m3 [ceil(out / 64)][groups of inputs] of [64 scales][inputs][64 outputs], with
//           scales of float32
//   tiles   [ceil(out / 32)][ceil(in / 32)][2 tiles][16 pairs of inputs][16 outputs][2 inputs], bfloat16 only:
//           a tile is 1 KB, the right-hand side of one AMX instruction
//   integers  [ceil(out / 32)][groups of inputs] of [32 scales][32 minima][quads of inputs][32 outputs][4 inputs, in the
//           order 0 2 1 3], int8, or int4 (as value + 8) with two quads in a byte, the first in its low half. A group of int8 that
//           is all inputs is padded to a multiple of 64. Where groups have minima, int4 is unsigned and lies as it is; else
//           there are no minima. Scales and minima are float32 or float16.
enum class Layout { panels, tiles, integers };

inline int64_t panel_width(Layout layout) { return layout == Layout::panels ? kPanel : kTilePanel; }

// A *gated* weight [2 n, in] is that of gate (the first n outputs) and up: half of a panel's columns are outputs of gate,
// the other half the same outputs of up. Its result is n wide: activation(gate x) * up x.
struct Panels {
    const void* data;
    const float* bias;  // [panels][width] in the order of the panels' columns, zero where padded; or null
    int64_t in, out;
    Storage storage;  // of panels and tiles
    Layout layout;
    bool gated;
    // of integers
    int64_t bits = 0;    // 8 or 4
    int64_t group = 0;   // inputs in a group, of e4m3 too
    int32_t qmax = 0;  // the largest integer of an input
    bool half_scales = false;  // scales and minima are float16
    bool minima = false;       // groups have them

    int64_t width() const { return panel_width(layout); }
    int64_t out_width() const { return gated ? out / 2 : out; }                 // the width of y
    int64_t panel_out_width() const { return gated ? width() / 2 : width(); }  // of a panel
    int64_t panels() const { return (out_width() + panel_out_width() - 1) / panel_out_width(); }
    // The row of the weight in a column of a panel; -1 for padding.
    int64_t source(int64_t panel, int64_t column) const {
        const int64_t output = panel * panel_out_width() + column % panel_out_width();
        return output >= out_width() ? -1 : column < panel_out_width() ? output : out_width() + output;
    }

    // of integers
    int64_t groups() const { return (in + group - 1) / group; }
    int64_t scale_bytes() const { return half_scales ? 2 : 4; }
    int64_t head_bytes() const { return kTilePanel * scale_bytes() * (minima ? 2 : 1); }  // in front of a group's integers
    int64_t group_bytes() const { return head_bytes() + kTilePanel * group * bits / 8; }
    // What is added to an integer of 4 bits before it is packed.
    int zero() const { return minima ? 0 : 8; }
    // Whether gemm/amx reads it: 4 bits in groups of a tile's width or more, 8 in whole rows; float32 scales alone.
    bool fits_amx() const {
        return !half_scales && !minima && (bits == 4 ? group >= 32 : groups() <= 1 && group < in + 64 && group % 64 == 0);
    }
    int64_t panel_bytes() const { return groups() * group_bytes(); }

    // of any layout
    int64_t bytes_each() const {
        if (layout == Layout::integers) return panel_bytes();
        const int64_t depth = layout == Layout::tiles ? (in + kTileDepth - 1) / kTileDepth * kTileDepth : in;
        return width() * (depth * bytes_of(storage) + (storage == Storage::e4m3 ? groups() * int64_t{sizeof(float)} : 0));
    }
};

// The byte, behind its group's scales, that holds an integer; with 4 bits its half is the upper one where `input` & 4.
inline int64_t integer_byte(int64_t bits, int64_t input, int64_t column) {
    constexpr int64_t order[4] = {0, 2, 1, 3};
    return input * bits / 32 * kTilePanel * 4 + column * 4 + order[input % 4];
}

// Rows of bfloat16 in the order of AMX tiles: what makes them rounds (to nearest, ties to even), once.
//
//   [blocks of 16 rows][chunks of 32 inputs][16 rows, or all where there are fewer][32 inputs]
//
// Inputs past `width` are zero; rows past `rows` are anything. gemm/tile_rows.h writes them.
struct TileRows {
    uint16_t* data;  // 64-byte aligned; null: none
    int64_t rows, width;

    int64_t chunks() const { return (width + kTileDepth - 1) / kTileDepth; }
    int64_t tile_rows() const { return rows < kTileSide ? rows : kTileSide; }
    int64_t blocks() const { return (rows + kTileSide - 1) / kTileSide; }
    int64_t bytes() const { return blocks() * chunks() * tile_rows() * kTileDepth * 2; }
    // 32 inputs of a row
    uint16_t* at(int64_t row, int64_t chunk) const {
        const int64_t block = row / kTileSide * chunks() * kTileSide;
        return data + (block + chunk * tile_rows() + row % kTileSide) * kTileDepth;
    }
};

// The largest result of a row in one panel and the lowest output that has it; +inf where one is +inf or NaN.
struct Best {
    float value;
    int32_t output;
};

// One of `x` and `x_tiles` (weights in tiles only) is read, one of `y`, `y_tiles` and `best` written.
struct LinearArgs {
    const float* x;  // [rows, in], rows `x_stride` floats apart
    int64_t x_stride, rows;
    TileRows x_tiles;  // [rows, in]
    Panels weight;
    float* y;          // [rows, weight.out_width()]
    bool add;          // to what y holds
    TileRows y_tiles;  // [rows, weight.out_width()]
    Best* best;        // [rows, weight.panels()]
    Activation activation;  // of a gated weight
    float scale;
    float softcap;  // 0: none
};

struct EmbedArgs {
    const int32_t* ids;  // [tokens]
    int64_t tokens;
    Panels table;
    float scale;
    float* y;  // [tokens, in]
};

struct NormArgs {
    const float* x;  // [rows / groups][groups, size]
    int64_t x_stride, rows, size;
    float* residual;  // [rows, size] or null; x is added to it first and the sum is normalised
    int64_t residual_stride;
    const float* weight;  // [size]
    const float* bias;    // [size] or null
    float eps;
    bool centre;  // layer_norm
    float* y;     // [rows, size], or null:
    TileRows y_tiles;
    int64_t groups;  // consecutive rows of x, `size` floats apart; x_stride leads from one group to the next
};

struct ActivationArgs {
    const float* x;  // [rows, size], or [rows, 2 * size] where `multiply`
    int64_t x_stride, rows, size;
    Activation kind;
    bool multiply;
    float* y;  // [rows, size], or null:
    TileRows y_tiles;
};

// The paged cache, [blocks][layers][kv_heads] head blocks, each of one block for one head:
//
//   | keys: [slots] positions of head_dim | values: [slots] positions of value_dim | scales |
//
// The scales, [slots] of keys and [slots] of values in float32, are those of 8 bits and of nothing else. `slots` is block_size rounded up to 16 and `value_dim` is head_dim rounded up to 16. The order inside the two parts is
// the attention kernel's own: attention/vector/attention.h and attention/amx/attention.h show it.
struct CacheLayout {
    uint8_t* data;
    int64_t layers, blocks, block_size, kv_heads, head_dim;
    Storage storage;

    int64_t slots() const { return (block_size + kTile - 1) / kTile * kTile; }
    int64_t value_dim() const { return (head_dim + 15) / 16 * 16; }
    int64_t position_bytes() const {
        return (head_dim + value_dim()) * bytes_of(storage) + (has_scales(storage) ? 2 * int64_t{sizeof(float)} : 0);
    }
    int64_t head_block_bytes() const { return slots() * position_bytes(); }
    int64_t block_bytes() const { return kv_heads * head_block_bytes(); }
    uint8_t* head_block(int64_t layer, int64_t block, int64_t head) const {
        return data + ((block * layers + layer) * kv_heads + head) * head_block_bytes();
    }
};

struct RopeTables {
    const float* cos;  // [max_positions, half]; null: no rotation
    const float* sin;
    int64_t half;
};

struct AttentionArgs {
    const float *q, *k, *v;  // [tokens, heads | kv_heads, head_dim]; k and v null: they are written already
    int64_t q_stride, k_stride, v_stride;
    int64_t heads;
    CacheLayout cache;
    int64_t layer;
    int64_t rows;
    const int32_t* query_starts;  // [rows + 1]
    const int32_t* starts;        // [rows]
    const int32_t* tables;        // [rows, max_blocks]
    int64_t table_stride;
    bool private_writes;  // no row reads a block that another row of this step writes
    float scale;
    int64_t window;      // INT64_MAX: none
    float softcap;       // 0: none
    const float* sinks;  // [heads] or null
    RopeTables rope;     // of q, and of k before it is written
    float* out;          // [tokens, heads * head_dim]; null: k and v are only written
};

struct SampleArgs {
    const float* logits;  // [rows, vocabulary]
    int64_t stride, rows, vocabulary;
    const float* temperature;
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const uint64_t* seeds;
    const int64_t* positions;
    int32_t* tokens;  // [rows]
};

struct LogprobsArgs {
    const float* logits;  // [rows, vocabulary]
    int64_t stride, rows, vocabulary, num_top;
    const int32_t* ids;   // [rows]
    float* chosen;        // [rows]
    int32_t* rank;        // [rows]
    int32_t* top_ids;     // [rows, num_top]
    float* top_logprobs;  // [rows, num_top]
};

struct FiniteArgs {
    const float* logits;
    int64_t stride, rows, vocabulary;
    bool* finite;  // [rows]
};

enum class Rounding { int8, int4, e4m3, int4_min, int4_min_half };  // the last with scales and minima of float16

// Round to nearest, ops/quantize_reference.py: the numbers of rows of a weight.
struct QuantizeArgs {
    int64_t in;
    Storage storage;  // of the weight
    int64_t group_size;  // inputs that share a scale; `in` or more is a whole row
    Rounding rounding;

    int64_t groups() const { return in == 0 ? 0 : (in + group_size - 1) / group_size; }
    bool has_minima() const { return rounding == Rounding::int4_min || rounding == Rounding::int4_min_half; }
    bool whole() const { return rounding != Rounding::int4 && !has_minima() && group_size >= in; }
    int64_t scales() const { return groups() * (has_minima() ? 2 : 1); }  // of a row, its minima behind them
    int64_t padded() const { return whole() ? (in + 15) / 16 * 16 : groups() * group_size; }
    size_t scratch_bytes() const { return static_cast<size_t>(padded()) * 5; }
};

enum class Probe { read, float32, bfloat16, int8, bfloat16_four_tiles, int8_four_tiles };

struct ProbeArgs {
    Probe kind;
    const uint8_t* data;  // what `read` reads
    int64_t bytes;
};

struct Kernels {
    const char* name;
    Layout bfloat16_layout;  // of weights of that storage; all others are panels
    void (*linear)(const LinearArgs&, ThreadPool&);
    void (*embed)(const EmbedArgs&, ThreadPool&);
    void (*norm)(const NormArgs&, ThreadPool&);
    void (*activation)(const ActivationArgs&, ThreadPool&);
    void (*attention)(const AttentionArgs&, ThreadPool&);
    void (*sample)(const SampleArgs&, ThreadPool&);
    void (*logprobs)(const LogprobsArgs&, ThreadPool&);
    void (*rows_finite)(const FiniteArgs&, ThreadPool&);
    // The bytes that were read or the additions and multiplications that were done; 0 where the instructions are missing.
    int64_t (*probe)(const ProbeArgs&, ThreadPool&);
    // One row: `values` [in], `scales` [groups()]. False where a weight is not finite: then both hold nothing.
    bool (*quantize_row)(const QuantizeArgs&, const void* weight, int8_t* values, float* scales, void* scratch);
};

// Written by hand: adding an instruction set is one line here, one in runtime/isa.cpp and one in CMakeLists.txt.
namespace baseline { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512_vnni { extern const Kernels kernels; }
namespace avx512_bf16 { extern const Kernels kernels; }
namespace amx { extern const Kernels kernels; }
#endif

}  // namespace quire
