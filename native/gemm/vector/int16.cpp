// y = x W^T + b for weights of 8 or 4 bits, by vectors without AVX512-VNNI: pairs of 16-bit integers multiplied and added
// into 32 bits.
//
// Up to kBlockRows rows read the weights once, as they come from memory. More rows meet a piece of a panel that was
// widened to 16 bits once for all of them.
#include "gemm/integers.h"
#include "gemm/linear.h"

#if !defined(__AVX512VNNI__)

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t kItemRows = 64;
constexpr int64_t kPiece = 256;     // inputs at a time: with 15 bits by 7 their sum fits into 32 bits
constexpr int64_t kPrefetchBytes = 12288;  // between what is read and what is prefetched
constexpr int64_t kVectors = kTilePanel / kLanes;  // of sums of a panel; two are computed at a time
constexpr int64_t kVectorBytes = kLanes * 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t kBlockRows = 6;  // whose sums are held in registers
#else
constexpr int64_t kBlockRows = 3;
#endif

struct LaunchArgs : GemmLaunch {
    int64_t padded, groups;  // inputs of a row, with padding; groups of inputs
    float* x_sums;           // [rows][groups]: of the inputs of each group, where weights have minima

    int16_t* row(int64_t index) const { return reinterpret_cast<int16_t*>(x) + index * padded; }
};

// sum + pairs of a by pairs of b
inline Ints multiply_pairs(Ints sum, Shorts a, Shorts b) {
#if defined(__AVX512BW__)
    return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sum + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    const Ints p = (Ints)a, q = (Ints)b;
    return sum + (p << 16 >> 16) * (q << 16 >> 16) + (p >> 16) * (q >> 16);
#endif
}

inline Shorts splat_pair(const int16_t* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, 4);
    return (Shorts)(pair - Ints{});
}

// Where weights come from: two quads of inputs for kLanes outputs, widened to 16 bits: w[0] and w[1] are the first and
// the second pair of the first quad, w[2] and w[3] those of the second.
struct EightBits {
    static constexpr int64_t kPairBytes = 2 * kIntegerBytes, kStep = kVectorBytes;

    static void load(const uint8_t* at, Shorts* w) {
        const Shorts first = load_shorts(at), second = load_shorts(at + kIntegerBytes);
        w[0] = first << 8 >> 8;
        w[1] = first >> 8;
        w[2] = second << 8 >> 8;
        w[3] = second >> 8;
    }
};

struct FourBits {
    static constexpr int64_t kPairBytes = kIntegerBytes, kStep = kVectorBytes;

    static void load(const uint8_t* at, Shorts* w) {
        const Shorts both = load_shorts(at) ^ static_cast<int16_t>(0x8888);
        w[0] = both << 12 >> 12;
        w[1] = both << 4 >> 12;
        w[2] = both << 8 >> 12;
        w[3] = both >> 12;
    }
};

struct UnsignedFourBits {
    static constexpr int64_t kPairBytes = kIntegerBytes, kStep = kVectorBytes;

    static void load(const uint8_t* at, Shorts* w) {
        const Shorts both = load_shorts(at), low = (Shorts)(Ints{} + 0x000f000f);
        w[0] = both & low;
        w[1] = both >> 8 & low;
        w[2] = both >> 4 & low;
        w[3] = both >> 12 & low;
    }
};

struct Widened {
    static constexpr int64_t kPairBytes = 4 * kIntegerBytes, kStep = 4 * kVectorBytes;

    static void load(const uint8_t* at, Shorts* w) {
        for (int i = 0; i < 4; ++i) w[i] = load_shorts(at + i * kVectorBytes);
    }
};

template <class Source>
void widen(const uint8_t* from, int64_t inputs, uint8_t* to) {
    for (int64_t k = 0; k < inputs; k += 2 * kQuad, from += Source::kPairBytes) {
        for (int64_t v = 0; v < kVectors; ++v, to += Widened::kStep) {
            Shorts w[4];
            Source::load(from + v * Source::kStep, w);
            for (int i = 0; i < 4; ++i) store(to + i * kVectorBytes, w[i]);
        }
    }
}

// sums[r][v] = x[r] . weights of kLanes outputs, for all vectors of a panel, over `inputs` (a multiple of 8). Prefetches
// kPrefetchBytes ahead, where that is before `end`.
template <int R, class Source>
void multiply(const int16_t* x, int64_t x_stride, const uint8_t* weights, int64_t inputs, const uint8_t* end,
              Ints sums[][kVectors]) {
    constexpr int kChains = R == 1 ? 4 : R == 2 ? 2 : 1;  // sums that do not wait for each other
    for (int64_t first = 0; first < kVectors; first += 2) {
        Ints acc[R][2][kChains] = {};
        const uint8_t* at = weights + first * Source::kStep;
        for (int64_t k = 0; k < inputs; k += 2 * kQuad, at += Source::kPairBytes) {
            if (at + kPrefetchBytes < end) {
                prefetch_lines(at + kPrefetchBytes, 2 * Source::kStep * Source::kPairBytes / kIntegerBytes);
            }
            Shorts w[2][4];
            Source::load(at, w[0]);
            Source::load(at + Source::kStep, w[1]);
            for (int r = 0; r < R; ++r) {
                for (int i = 0; i < 4; ++i) {
                    const Shorts input = splat_pair(x + r * x_stride + k + 2 * i);
                    for (int v = 0; v < 2; ++v) {
                        acc[r][v][i % kChains] = multiply_pairs(acc[r][v][i % kChains], w[v][i], input);
                    }
                }
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < 2; ++v) {
                Ints sum = acc[r][v][0];
                for (int chain = 1; chain < kChains; ++chain) sum += acc[r][v][chain];
                sums[r][first + v] = sum;
            }
        }
    }
}

// The state of a row between pieces. A group of several pieces keeps its sum as high * 2^16 + low.
struct RowState {
    alignas(64) float y[kTilePanel];
    int32_t high[kTilePanel], low[kTilePanel];
};

void absorb(const Panels& weight, const Ints* sums, const uint8_t* head, float x_sum, bool first, bool last, RowState& state) {
    Floats whole[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) {
        if (first && last) {
            whole[v] = to_floats(sums[v]);
            continue;
        }
        int32_t* const high = state.high + v * kLanes;
        int32_t* const low = state.low + v * kLanes;
        const Ints sum_high = (sums[v] >> 16) + (first ? Ints{} : load_ints(high));
        const Ints sum_low = (sums[v] & 0xffff) + (first ? Ints{} : load_ints(low));
        store(high, sum_high);
        store(low, sum_low);
        if (last) whole[v] = join(sum_high, sum_low, 16);
    }
    if (last) add_group(weight, head, whole, x_sum, state.y);
}

// One panel for up to kItemRows rows.
template <class Source>
void multiply_panel(const LaunchArgs& launch, int64_t panel, int64_t first_row, int64_t rows, const uint8_t* end,
                    uint8_t* scratch) {
    const Panels& weight = launch.args->weight;
    RowState* const states = reinterpret_cast<RowState*>(scratch);
    uint8_t* const widened = scratch + kItemRows * sizeof(RowState);
    for (int64_t r = 0; r < rows; ++r) __builtin_memset(states[r].y, 0, sizeof states[r].y);
    const uint8_t* at = launch.panel(panel);
    const bool streamed = rows <= kBlockRows;
    for (int64_t group = 0; group < launch.groups; ++group) {
        const uint8_t* const head = at;
        at += weight.head_bytes();
        for (int64_t k = 0; k < weight.group; k += kPiece) {
            const int64_t inputs = smaller(kPiece, weight.group - k);
            if (!streamed) widen<Source>(at, inputs, widened);
            for_even_blocks(rows, kBlockRows, [&](int64_t r, int64_t now) {
                const int16_t* const x = launch.row(first_row + r) + group * weight.group + k;
                Ints sums[kBlockRows][kVectors];
                with_row_count<kBlockRows>(now, [&](auto count) {
                    if (streamed) {
                        multiply<count.value, Source>(x, launch.padded, at, inputs, end, sums);
                    } else {
                        multiply<count.value, Widened>(x, launch.padded, widened, inputs, widened, sums);
                    }
                });
                for (int64_t i = 0; i < now; ++i) {
                    const int64_t sum = (first_row + r + i) * launch.groups + group;
                    absorb(weight, sums[i], head, weight.minima ? launch.x_sums[sum] : 0.0f, k == 0,
                           k + inputs == weight.group, states[r + i]);
                }
            });
            at += inputs / (2 * kQuad) * Source::kPairBytes;
        }
    }
    for (int64_t r = 0; r < rows; ++r) finish_quantized_row(launch, panel, first_row + r, states[r].y);
}

constexpr size_t kScratchBytes = kItemRows * sizeof(RowState) + kPiece / (2 * kQuad) * Widened::kPairBytes;

// A run of panels for one group of rows.
template <class Source>
void work(void* context, int64_t index, int worker) {
    const LaunchArgs& launch = *static_cast<const LaunchArgs*>(context);
    const GemmLaunch::Item item = launch.item(index);
    uint8_t* const scratch = launch.scratch(worker, kScratchBytes);
    const int64_t first_row = item.row_group * kItemRows, rows = smaller(kItemRows, launch.args->rows - first_row);
    const uint8_t* const end = launch.panel(item.last_panel);
    for (int64_t panel = item.first_panel; panel < item.last_panel; ++panel) {
        multiply_panel<Source>(launch, panel, first_row, rows, end, scratch);
    }
}

void quantize_activations(void* context, int64_t row, int) {
    const LaunchArgs& launch = *static_cast<const LaunchArgs*>(context);
    const LinearArgs& args = *launch.args;
    const float* const x = args.x + row * args.x_stride;
    const QuantizedRow quantized = measure_row(x, args.weight.in, args.weight.qmax);
    launch.x_scales[row] = quantized.scale;
    int16_t* const to = launch.row(row);
    typedef int16_t Narrow __attribute__((vector_size(kLanes * 2)));
    for (int64_t i = 0; i < launch.padded; i += kLanes) {
        const Narrow q = __builtin_convertvector(quantized.at(x, i, args.weight.in), Narrow);
        __builtin_memcpy(to + i, &q, sizeof q);
    }
    if (!args.weight.minima) return;
    for (int64_t group = 0; group < launch.groups; ++group) {
        int32_t sum = 0;
        for (int64_t i = 0; i < args.weight.group; ++i) sum += to[group * args.weight.group + i];
        launch.x_sums[row * launch.groups + group] = static_cast<float>(sum);
    }
}

Work work_of(const Panels& weight) {
    if (weight.bits == 8) return work<EightBits>;
    return weight.minima ? work<UnsignedFourBits> : work<FourBits>;
}

}  // namespace

void linear_int16(const LinearArgs& args, ThreadPool& pool) {
    LaunchArgs launch{};
    launch.groups = args.weight.groups();
    launch.padded = launch.groups * args.weight.group;
    const int64_t x_bytes = args.rows * launch.padded * 2, sums = args.weight.minima ? args.rows * launch.groups : 0;
    if (!launch.reserve(args, pool, x_bytes + sums * 4, kScratchBytes)) return;
    launch.x_sums = reinterpret_cast<float*>(launch.x + x_bytes);
    prepare_activations(launch, args.rows, quantize_activations);
    run_panels(launch, args.rows <= kBlockRows ? args.weight.panels() : 1, (args.rows + kItemRows - 1) / kItemRows,
               work_of(args.weight));
}

}  // namespace quire::QUIRE_ISA

#endif
