// Weights of 8 or 4 bits by multiplications of four bytes at once (AVX512-VNNI): 64 bytes of memory are 64 weights after one
// instruction, or 128 after three. An input of 16 bits has a high and a low byte plane, 256 high + low, both signed.
//
// The instruction takes one side without sign: weights are value + 128, or + 8, so each group's sum is so many times the sum
// of its inputs too large. (What does not fit into 32 bits on the way there wraps, and wraps back.)
#include "gemm/integers.h"

#if defined(__AVX512VNNI__)

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t kPrefetchBytes = 8192;
constexpr int64_t kItemRows = 96;       // of x that stay in the L2 beside a panel
constexpr int64_t kSerialItems = 32768;  // inputs that one thread rounds faster than it finds others to help

struct LaunchArgs {
    const LinearArgs* args;
    ThreadPool* pool;
    int8_t* x;          // [rows][planes][padded]
    int32_t* excess;    // [rows][groups][planes]: what the sums of a group are too large by
    float* x_scales;       // [rows]
    int32_t* borders;
    int64_t planes, padded, groups;
};

// What turns a weight into value + excess.
constexpr int excess_bits(int64_t bits) { return bits == 4 ? 3 : 7; }

void quantize_activations(void* context, int64_t row, int) {
    const LaunchArgs& launch = *static_cast<const LaunchArgs*>(context);
    const Panels& weight = launch.args->weight;
    const float* const x = launch.args->x + row * launch.args->x_stride;
    const QuantizedRow quantized = measure_row(x, weight.in, weight.levels);
    launch.x_scales[row] = quantized.scale;
    int8_t* const to = launch.x + row * launch.planes * launch.padded;
    for (int64_t group = 0; group < launch.groups; ++group) {
        __m512i high_sum = _mm512_setzero_si512(), sum = _mm512_setzero_si512();
        for (int64_t i = group * weight.group; i < (group + 1) * weight.group; i += kLanes) {
            Ints q = {};
            if (quantized.inverse != 0.0f && i < weight.in) {
                q = quantize_to_ints(load_some(x + i, weight.in - i), quantized.inverse);
            }
            sum = _mm512_add_epi32(sum, (__m512i)q);
            high_sum = _mm512_add_epi32(high_sum, (__m512i)((q + 128) >> 8));
            store_planes(q, launch.planes, to + i, launch.padded);
        }
        if (launch.planes == 2) sum = _mm512_sub_epi32(sum, _mm512_slli_epi32(high_sum, 8));
        int32_t* const excess = launch.excess + (row * launch.groups + group) * launch.planes;
        const int bits = excess_bits(weight.bits);
        if (launch.planes == 2) excess[0] = _mm512_reduce_add_epi32(_mm512_slli_epi32(high_sum, bits));
        excess[launch.planes - 1] = _mm512_reduce_add_epi32(_mm512_slli_epi32(sum, bits));
    }
}

inline __m512i splat_quad(const int8_t* x) {
    int32_t quad;
    __builtin_memcpy(&quad, x, 4);
    return _mm512_set1_epi32(quad);
}

// Two quads of inputs, by 16 outputs each.
template <int Bits>
inline void load_quads(const uint8_t* weights, __m512i* first, __m512i* second) {
    for (int v = 0; v < 2; ++v) {
        const __m512i both = _mm512_loadu_si512(weights + v * 64);
        if constexpr (Bits == 4) {
            const __m512i low_half = _mm512_set1_epi8(15);
            first[v] = _mm512_and_si512(both, low_half);
            second[v] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_half);
        } else {
            const __m512i sign = _mm512_set1_epi8(-128);
            first[v] = _mm512_xor_si512(both, sign);
            second[v] = _mm512_xor_si512(_mm512_loadu_si512(weights + kIntegerBytes + v * 64), sign);
        }
    }
}

// sums[r][d][v] = one byte plane of the inputs of a group by the weights of a panel as they lie, value + excess
template <int Bits, int R, int Planes>
void multiply_group(const LaunchArgs& launch, const int8_t* x, const uint8_t* weights, const uint8_t* end,
                    __m512i sums[][Planes][2]) {
    constexpr int64_t bytes = 2 * kQuad * kTilePanel * Bits / 8;  // of two quads of inputs
    constexpr int kChains = R * Planes <= 2 ? 2 : 1;  // sums that do not wait for each other
    __m512i acc[R][Planes][2][kChains];
    for (int i = 0; i < R * Planes * 2 * kChains; ++i) (&acc[0][0][0][0])[i] = _mm512_setzero_si512();
    for (int64_t k = 0; k < launch.args->weight.group; k += 2 * kQuad, weights += bytes) {
        if (weights + kPrefetchBytes < end) {
            for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(weights + kPrefetchBytes + line);
        }
        __m512i first[2], second[2];
        load_quads<Bits>(weights, first, second);
        for (int r = 0; r < R; ++r) {
            for (int d = 0; d < Planes; ++d) {
                const int8_t* const at = x + (r * Planes + d) * launch.padded + k;
                const __m512i x_first = splat_quad(at), x_second = splat_quad(at + kQuad);
                for (int v = 0; v < 2; ++v) {
                    acc[r][d][v][0] = _mm512_dpbusd_epi32(acc[r][d][v][0], first[v], x_first);
                    __m512i& other = acc[r][d][v][kChains - 1];
                    other = _mm512_dpbusd_epi32(other, second[v], x_second);
                }
            }
        }
    }
    for (int i = 0; i < R * Planes * 2; ++i) {
        const __m512i* const chains = &acc[0][0][0][0] + i * kChains;
        (&sums[0][0][0])[i] = kChains == 2 ? _mm512_add_epi32(chains[0], chains[kChains - 1]) : chains[0];
    }
}

// One panel for R rows from `row` on. Prefetches ahead where that is before `end`.
template <int Bits, int R, int Planes>
void multiply_panel(const LaunchArgs& launch, int64_t panel, int64_t row, const uint8_t* end) {
    const Panels& weight = launch.args->weight;
    alignas(64) float y[R][kTilePanel] = {};
    const uint8_t* at = static_cast<const uint8_t*>(weight.data) + panel * weight.panel_bytes();
    const int8_t* const x = launch.x + row * Planes * launch.padded;
    for (int64_t group = 0; group < launch.groups; ++group, at += weight.group_bytes()) {
        __m512i sums[R][Planes][2];
        if (at + kPrefetchBytes < end) {
            __builtin_prefetch(at + kPrefetchBytes);
            __builtin_prefetch(at + kPrefetchBytes + 64);
        }
        multiply_group<Bits, R, Planes>(launch, x + group * weight.group, at + kScaleBytes, end, sums);
        for (int r = 0; r < R; ++r) {
            const int32_t* const excess = launch.excess + ((row + r) * launch.groups + group) * Planes;
            Floats whole[2];
            for (int v = 0; v < 2; ++v) {
                const Ints high = (Ints)sums[r][0][v] - excess[0];
                const Ints low = (Ints)sums[r][Planes - 1][v] - excess[Planes - 1];
                whole[v] = Planes == 1 ? to_floats(high) : Bits == 8 ? join(high, low, 8) : to_floats((high << 8) + low);
            }
            add_group(reinterpret_cast<const float*>(at), whole, y[r]);
        }
    }
    for (int64_t r = 0; r < R; ++r) {
        for (int64_t i = 0; i < kTilePanel; i += kLanes) store(y[r] + i, load(y[r] + i) * launch.x_scales[row + r]);
        finish_row<kTilePanel>(*launch.args, panel, row + r, y[r]);
    }
}

template <int Bits, int Planes>
void multiply_rows(const LaunchArgs& launch, int64_t panel, int64_t row, int64_t rows, const uint8_t* end) {
    switch (rows) {
        case 1: return multiply_panel<Bits, 1, Planes>(launch, panel, row, end);
        case 2: return multiply_panel<Bits, 2, Planes>(launch, panel, row, end);
        case 3: return multiply_panel<Bits, 3, Planes>(launch, panel, row, end);
        case 4: return multiply_panel<Bits, 4, Planes>(launch, panel, row, end);
    }
    if constexpr (Planes == 1) {
        if (rows == 5) return multiply_panel<Bits, 5, 1>(launch, panel, row, end);
        multiply_panel<Bits, 6, 1>(launch, panel, row, end);
    }
}

// A run of panels for one group of rows.
template <int Bits, int Planes>
void work(void* context, int64_t item, int) {
    const LaunchArgs& launch = *static_cast<const LaunchArgs*>(context);
    const Panels& weight = launch.args->weight;
    const int64_t row_groups = (launch.args->rows + kItemRows - 1) / kItemRows, run = item / row_groups;
    const int64_t first_row = item % row_groups * kItemRows, end_row = smaller(first_row + kItemRows, launch.args->rows);
    const int64_t last = launch.borders[run + 1], most = byte_rows(weight);
    const uint8_t* const data = static_cast<const uint8_t*>(weight.data);
    for (int64_t panel = launch.borders[run]; panel < last; ++panel) {
        const uint8_t* end = data + last * weight.panel_bytes();
        for (int64_t row = first_row; row < end_row; end = data) {
            const int64_t blocks = (end_row - row + most - 1) / most, now = (end_row - row + blocks - 1) / blocks;
            multiply_rows<Bits, Planes>(launch, panel, row, now, end);
            row += now;
        }
    }
}

Work work_of(int64_t bits, int64_t planes) {
    if (bits == 8) return planes == 2 ? work<8, 2> : work<8, 1>;
    return planes == 2 ? work<4, 2> : work<4, 1>;
}

}  // namespace

void linear_int_bytes(const LinearArgs& args, ThreadPool& pool) {
    const Panels& weight = args.weight;
    LaunchArgs launch{};
    launch.args = &args;
    launch.pool = &pool;
    launch.planes = weight.levels > 127 ? 2 : 1;
    launch.groups = weight.groups();
    launch.padded = launch.groups * weight.group;
    const int64_t x_bytes = args.rows * launch.planes * launch.padded;
    const int64_t words = args.rows * (launch.groups * launch.planes + 1) + weight.panels() + 1;
    uint8_t* const shared = static_cast<uint8_t*>(pool.shared_scratch(x_bytes + words * 4));
    if (shared == nullptr) return;
    launch.x = reinterpret_cast<int8_t*>(shared);
    launch.excess = reinterpret_cast<int32_t*>(shared + x_bytes);
    launch.x_scales = reinterpret_cast<float*>(launch.excess + args.rows * launch.groups * launch.planes);
    launch.borders = reinterpret_cast<int32_t*>(launch.x_scales + args.rows);
    if (args.rows * weight.in < kSerialItems) {
        for (int64_t row = 0; row < args.rows; ++row) quantize_activations(&launch, row, 0);
    } else {
        pool.run(args.rows, quantize_activations, &launch);
    }
    const int64_t longest = args.rows <= byte_rows(weight) ? weight.panels() : 1;
    const int64_t runs = divide_panels(weight.panels(), longest, 1, pool.threads(), launch.borders);
    const int64_t row_groups = (args.rows + kItemRows - 1) / kItemRows;
    pool.run(runs * row_groups, work_of(weight.bits, launch.planes), &launch);
}

}  // namespace quire::QUIRE_ISA

#endif
