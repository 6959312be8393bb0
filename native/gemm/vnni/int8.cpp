// Weights of 8 or 4 bits by multiplications of four bytes at once (AVX512-VNNI): 64 bytes of memory are 64 weights after one
// instruction, or 128 after three. An input of 16 bits has a high and a low byte plane, 256 high + low, both signed.
//
// The instruction takes one side without sign: weights are value + 128, or + 8, so each group's sum is so many times the sum
// of its inputs too large. (What does not fit into 32 bits on the way there wraps, and wraps back.)
#include "gemm/integers.h"
#include "gemm/linear.h"

#if defined(__AVX512VNNI__)

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t kPrefetchBytes = 8192;
constexpr int64_t kItemRows = 96;  // of x that stay in the L2 beside a panel

struct LaunchArgs : GemmLaunch {  // x [rows][planes][padded]
    int32_t* excess;              // [rows][groups][planes]: what the sums of a group are too large by
    float* x_sums;                // [rows][groups]: of the inputs of each group, where weights have minima
    int64_t planes, padded, groups;

    int8_t* row(int64_t index) const { return reinterpret_cast<int8_t*>(x) + index * planes * padded; }
};

// The sums of a row's inputs by their planes; `bits` of excess: what a weight lies there too large by, 2^bits; -1: nothing.
inline void store_excess(__m512i high_sum, __m512i low_sum, int64_t planes, int bits, int32_t* excess) {
    if (planes == 2) excess[0] = bits < 0 ? 0 : _mm512_reduce_add_epi32(_mm512_slli_epi32(high_sum, bits));
    excess[planes - 1] = bits < 0 ? 0 : _mm512_reduce_add_epi32(_mm512_slli_epi32(low_sum, bits));
}

void quantize_activations(void* context, int64_t row, int) {
    const LaunchArgs& launch = *static_cast<const LaunchArgs*>(context);
    const Panels& weight = launch.args->weight;
    const float* const x = launch.args->x + row * launch.args->x_stride;
    const QuantizedRow quantized = measure_row(x, weight.in, weight.qmax);
    launch.x_scales[row] = quantized.scale;
    int8_t* const to = launch.row(row);
    const int excess_bits = weight.bits == 8 ? 7 : weight.minima ? -1 : 3;
    for (int64_t group = 0; group < launch.groups; ++group) {
        __m512i high_sum = _mm512_setzero_si512(), sum = _mm512_setzero_si512();
        for (int64_t i = group * weight.group; i < (group + 1) * weight.group; i += kLanes) {
            const Ints q = quantized.at(x, i, weight.in);
            sum = _mm512_add_epi32(sum, (__m512i)q);
            high_sum = _mm512_add_epi32(high_sum, (__m512i)((q + 128) >> 8));
            store_planes(q, launch.planes, to + i, launch.padded);
        }
        const int64_t at = row * launch.groups + group;
        if (weight.minima) launch.x_sums[at] = static_cast<float>(_mm512_reduce_add_epi32(sum));
        if (launch.planes == 2) sum = _mm512_sub_epi32(sum, _mm512_slli_epi32(high_sum, 8));
        store_excess(high_sum, sum, launch.planes, excess_bits, launch.excess + at * launch.planes);
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
// (4 bits with minima lie as they are)
template <int Bits, int R, int Planes>
void multiply_group(const LaunchArgs& launch, const int8_t* x, const uint8_t* weights, const uint8_t* end,
                    __m512i sums[][Planes][2]) {
    constexpr int64_t bytes = 2 * kQuad * kTilePanel * Bits / 8;  // of two quads of inputs
    constexpr int kChains = R * Planes <= 2 ? 2 : 1;  // sums that do not wait for each other
    __m512i acc[R][Planes][2][kChains];
    for (int i = 0; i < R * Planes * 2 * kChains; ++i) (&acc[0][0][0][0])[i] = _mm512_setzero_si512();
    for (int64_t k = 0; k < launch.args->weight.group; k += 2 * kQuad, weights += bytes) {
        if (weights + kPrefetchBytes < end) prefetch_lines(weights + kPrefetchBytes, bytes);
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
    const uint8_t* at = launch.panel(panel);
    const int8_t* const x = launch.row(row);
    const int64_t head_bytes = weight.head_bytes();
    const bool fits = Bits == 4 || weight.group <= 128;  // a group's sum, into 32 bits
    for (int64_t group = 0; group < launch.groups; ++group, at += weight.group_bytes()) {
        __m512i sums[R][Planes][2];
        if (at + kPrefetchBytes < end) prefetch_lines(at + kPrefetchBytes, head_bytes);
        multiply_group<Bits, R, Planes>(launch, x + group * weight.group, at + head_bytes, end, sums);
        for (int r = 0; r < R; ++r) {
            const int64_t index = (row + r) * launch.groups + group;
            const int32_t* const excess = launch.excess + index * Planes;
            Floats whole[2];
            for (int v = 0; v < 2; ++v) {
                const Ints high = (Ints)sums[r][0][v] - excess[0];
                const Ints low = (Ints)sums[r][Planes - 1][v] - excess[Planes - 1];
                whole[v] = Planes == 1 ? to_floats(high) : fits ? to_floats((high << 8) + low) : join(high, low, 8);
            }
            add_group(weight, at, whole, weight.minima ? launch.x_sums[index] : 0.0f, y[r]);
        }
    }
    for (int64_t r = 0; r < R; ++r) finish_quantized_row(launch, panel, row + r, y[r]);
}

// A run of panels for one group of rows. The weights of the run are prefetched for its first block of rows alone.
template <int Bits, int Planes>
void work(void* context, int64_t index, int) {
    const LaunchArgs& launch = *static_cast<const LaunchArgs*>(context);
    constexpr int kMostRows = Planes == 2 ? 4 : 6;
    const GemmLaunch::Item item = launch.item(index);
    const int64_t first_row = item.row_group * kItemRows, rows = smaller(kItemRows, launch.args->rows - first_row);
    for (int64_t panel = item.first_panel; panel < item.last_panel; ++panel) {
        for_even_blocks(rows, kMostRows, [&](int64_t row, int64_t now) {
            const uint8_t* const end = launch.panel(row == 0 ? item.last_panel : 0);
            with_row_count<kMostRows>(now, [&](auto count) {
                multiply_panel<Bits, count.value, Planes>(launch, panel, first_row + row, end);
            });
        });
    }
}

Work work_of(int64_t bits, int64_t planes) {
    if (bits == 8) return planes == 2 ? work<8, 2> : work<8, 1>;
    return planes == 2 ? work<4, 2> : work<4, 1>;
}

}  // namespace

void linear_int8_vnni(const LinearArgs& args, ThreadPool& pool) {
    const Panels& weight = args.weight;
    LaunchArgs launch{};
    launch.planes = weight.qmax > 127 ? 2 : 1;
    launch.groups = weight.groups();
    launch.padded = launch.groups * weight.group;
    const int64_t x_bytes = args.rows * launch.planes * launch.padded;
    const int64_t groups = args.rows * launch.groups;
    if (!launch.reserve(args, pool, x_bytes + groups * (launch.planes + weight.minima) * 4, 0)) return;
    launch.excess = reinterpret_cast<int32_t*>(launch.x + x_bytes);
    launch.x_sums = reinterpret_cast<float*>(launch.excess + groups * launch.planes);
    prepare_activations(launch, args.rows, quantize_activations);
    run_panels(launch, args.rows <= vnni_rows(weight) ? weight.panels() : 1, (args.rows + kItemRows - 1) / kItemRows,
               work_of(weight.bits, launch.planes));
}

}  // namespace quire::QUIRE_ISA

#endif
