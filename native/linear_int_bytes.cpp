// Few rows by 4-bit weights, by products of four bytes at once (AVX512-VNNI): 64 bytes of memory, 128 weights, are two
// vectors of bytes after three instructions. An input of 16 bits is two signed bytes, 256 high + low.
//
// The instruction takes one side without sign. Weights lie as value + 8, so each group's sum is 8 times the sum of its
// inputs too large.
#include "linear_int.h"

#if defined(__AVX512VNNI__)

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t kAheadBytes = 8192;
constexpr int64_t kPairBytes = kIntegerBytes;  // of two quads of inputs

struct Job {
    const LinearArgs* args;
    ThreadPool* pool;
    int8_t* x;           // [rows][digits][padded]
    int32_t* excess;     // [rows][groups]: 8 times the sum of a group's inputs
    float* steps;        // [rows]
    int32_t* borders;
    int64_t digits, padded, groups;
};

void round_row(const Job& job, int64_t row) {
    const Panels& weight = job.args->weight;
    const float* const x = job.args->x + row * job.args->x_stride;
    const RoundedRow rounded = measure_row(x, weight.in, weight.levels);
    job.steps[row] = rounded.step;
    int8_t* const to = job.x + row * job.digits * job.padded;
    for (int64_t group = 0; group < job.groups; ++group) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = group * weight.group; i < (group + 1) * weight.group; i += kLanes) {
            Ints q = {};
            if (rounded.inverse != 0.0f && i < weight.in) {
                q = round_to_ints(load_some(x + i, weight.in - i), rounded.inverse);
            }
            sum = _mm512_add_epi32(sum, (__m512i)q);
            store_digits(q, job.digits, to + i, job.padded);
        }
        job.excess[row * job.groups + group] = 8 * _mm512_reduce_add_epi32(sum);
    }
}

inline __m512i splat_quad(const int8_t* x) {
    int32_t quad;
    __builtin_memcpy(&quad, x, 4);
    return _mm512_set1_epi32(quad);
}

// sums[r][v] = inputs of a group by the weights of a panel as they lie
template <int R, int Digits>
void multiply_group(const Job& job, const int8_t* x, const uint8_t* weights, const uint8_t* end, __m512i sums[][2]) {
    constexpr int kChains = R * Digits <= 2 ? 2 : 1;  // sums that do not wait for each other
    const __m512i low_half = _mm512_set1_epi8(15);
    __m512i acc[R][Digits][2][kChains];
    for (int i = 0; i < R * Digits * 2 * kChains; ++i) (&acc[0][0][0][0])[i] = _mm512_setzero_si512();
    for (int64_t k = 0; k < job.args->weight.group; k += 2 * kQuad, weights += kPairBytes) {
        if (weights + kAheadBytes < end) {
            __builtin_prefetch(weights + kAheadBytes);
            __builtin_prefetch(weights + kAheadBytes + 64);
        }
        __m512i first[2], second[2];
        for (int v = 0; v < 2; ++v) {
            const __m512i both = _mm512_loadu_si512(weights + v * 64);
            first[v] = _mm512_and_si512(both, low_half);
            second[v] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low_half);
        }
        for (int r = 0; r < R; ++r) {
            for (int d = 0; d < Digits; ++d) {
                const int8_t* const at = x + (r * Digits + d) * job.padded + k;
                const __m512i x_first = splat_quad(at), x_second = splat_quad(at + kQuad);
                for (int v = 0; v < 2; ++v) {
                    acc[r][d][v][0] = _mm512_dpbusd_epi32(acc[r][d][v][0], first[v], x_first);
                    __m512i& other = acc[r][d][v][kChains - 1];
                    other = _mm512_dpbusd_epi32(other, second[v], x_second);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < 2; ++v) {
            __m512i digit[2];
            for (int d = 0; d < Digits; ++d) {
                digit[d] = kChains == 2 ? _mm512_add_epi32(acc[r][d][v][0], acc[r][d][v][kChains - 1]) : acc[r][d][v][0];
            }
            sums[r][v] = Digits == 1 ? digit[0] : _mm512_add_epi32(_mm512_slli_epi32(digit[0], 8), digit[Digits - 1]);
        }
    }
}

// A run of panels for all rows.
template <int R, int Digits>
void work(void* context, int64_t item, int) {
    const Job& job = *static_cast<const Job*>(context);
    const Panels& weight = job.args->weight;
    const uint8_t* const data = static_cast<const uint8_t*>(weight.data);
    const int64_t last = job.borders[item + 1];
    const uint8_t* const end = data + last * weight.panel_bytes();
    for (int64_t panel = job.borders[item]; panel < last; ++panel) {
        alignas(64) float y[R][kTilePanel] = {};
        const uint8_t* at = data + panel * weight.panel_bytes();
        for (int64_t group = 0; group < job.groups; ++group, at += weight.group_bytes()) {
            __m512i sums[R][2];
            __builtin_prefetch(at + kAheadBytes);
            __builtin_prefetch(at + kAheadBytes + 64);
            multiply_group<R, Digits>(job, job.x + group * weight.group, at + kScaleBytes, end, sums);
            for (int r = 0; r < R; ++r) {
                const __m512i excess = _mm512_set1_epi32(job.excess[r * job.groups + group]);
                Floats whole[2];
                for (int v = 0; v < 2; ++v) whole[v] = to_floats((Ints)_mm512_sub_epi32(sums[r][v], excess));
                add_group(reinterpret_cast<const float*>(at), whole, y[r]);
            }
        }
        for (int64_t r = 0; r < R; ++r) {
            for (int64_t i = 0; i < kTilePanel; i += kLanes) store(y[r] + i, load(y[r] + i) * job.steps[r]);
            finish_row<kTilePanel>(*job.args, panel, r, y[r]);
        }
    }
}

Work work_of(int64_t rows, int64_t digits) {
    switch (rows) {
        case 1: return digits == 2 ? work<1, 2> : work<1, 1>;
        case 2: return digits == 2 ? work<2, 2> : work<2, 1>;
        case 3: return digits == 2 ? work<3, 2> : work<3, 1>;
        case 4: return digits == 2 ? work<4, 2> : work<4, 1>;
        case 5: return work<5, 1>;
        default: return work<6, 1>;
    }
}

}  // namespace

void linear_int_bytes(const LinearArgs& args, ThreadPool& pool) {
    const Panels& weight = args.weight;
    Job job{};
    job.args = &args;
    job.pool = &pool;
    job.digits = weight.levels > 127 ? 2 : 1;
    job.groups = weight.groups();
    job.padded = job.groups * weight.group;
    const int64_t x_bytes = args.rows * job.digits * job.padded;
    const int64_t words = args.rows * (job.groups + 1) + weight.panels() + 1;
    uint8_t* const shared = static_cast<uint8_t*>(pool.shared_scratch(x_bytes + words * 4));
    job.x = reinterpret_cast<int8_t*>(shared);
    job.excess = reinterpret_cast<int32_t*>(shared + x_bytes);
    job.steps = reinterpret_cast<float*>(job.excess + args.rows * job.groups);
    job.borders = reinterpret_cast<int32_t*>(job.steps + args.rows);
    for (int64_t row = 0; row < args.rows; ++row) round_row(job, row);
    const int64_t runs = divide_panels(weight.panels(), weight.panels(), pool.threads(), job.borders);
    pool.run(runs, work_of(args.rows, job.digits), &job);
}

}  // namespace quire::QUIRE_ISA

#endif
