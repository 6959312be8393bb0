// y = x W^T + b for weights of 8 or 4 bits, by vectors without AVX512-VNNI: pairs of 16-bit integers multiplied and added
// into 32 bits.
//
// Up to kBlockRows rows read the weights once, as they come from memory. More rows meet a piece of a panel that was
// widened to 16 bits once for all of them.
#include "gemm/integers.h"

namespace quire::QUIRE_ISA {

namespace {

#if !defined(__AVX512VNNI__)
constexpr int64_t kItemRows = 64;
constexpr int64_t kPiece = 256;     // inputs at a time: with 15 bits by 7 their sum fits into 32 bits
constexpr int64_t kPrefetchBytes = 12288;  // between what is read and what is prefetched
constexpr int64_t kSerialItems = 32768;  // inputs that one thread rounds faster than it finds others to help
constexpr int64_t kVectors = kTilePanel / kLanes;  // of sums of a panel; two are computed at a time
constexpr int64_t kVectorBytes = kLanes * 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t kBlockRows = 6;  // whose sums are held in registers
#else
constexpr int64_t kBlockRows = 3;
#endif

struct LaunchArgs {
    const LinearArgs* args;
    ThreadPool* pool;
    int16_t* x;    // [rows][padded]
    float* x_scales;  // [rows]
    int32_t* borders;
    int64_t padded, groups;
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
                for (int64_t line = 0; line < 2 * Source::kStep * Source::kPairBytes / kIntegerBytes; line += 64) {
                    __builtin_prefetch(at + kPrefetchBytes + line);
                }
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

template <class Source>
void multiply_rows(int64_t rows, const int16_t* x, int64_t x_stride, const uint8_t* weights, int64_t inputs,
                   const uint8_t* end, Ints sums[][kVectors]) {
    switch (rows) {
        case 1: return multiply<1, Source>(x, x_stride, weights, inputs, end, sums);
        case 2: return multiply<2, Source>(x, x_stride, weights, inputs, end, sums);
        case 3: return multiply<3, Source>(x, x_stride, weights, inputs, end, sums);
#if defined(__AVX512F__) || defined(__aarch64__)
        case 4: return multiply<4, Source>(x, x_stride, weights, inputs, end, sums);
        case 5: return multiply<5, Source>(x, x_stride, weights, inputs, end, sums);
        default: return multiply<6, Source>(x, x_stride, weights, inputs, end, sums);
#endif
    }
}

// The state of a row between pieces. A group of several pieces keeps its sum as high * 2^16 + low.
struct RowState {
    alignas(64) float y[kTilePanel];
    int32_t high[kTilePanel], low[kTilePanel];
};

void absorb(const Ints* sums, const float* scales, bool first, bool last, RowState& state) {
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
    if (last) add_group(scales, whole, state.y);
}

// One panel for up to kItemRows rows.
template <class Source>
void multiply_panel(const LaunchArgs& launch, int64_t panel, int64_t first_row, int64_t rows, const uint8_t* end,
                    uint8_t* scratch) {
    const Panels& weight = launch.args->weight;
    RowState* const states = reinterpret_cast<RowState*>(scratch);
    uint8_t* const widened = scratch + kItemRows * sizeof(RowState);
    for (int64_t r = 0; r < rows; ++r) __builtin_memset(states[r].y, 0, sizeof states[r].y);
    const uint8_t* at = static_cast<const uint8_t*>(weight.data) + panel * weight.panel_bytes();
    const bool streamed = rows <= kBlockRows;
    for (int64_t group = 0; group < launch.groups; ++group) {
        const float* const scales = reinterpret_cast<const float*>(at);
        at += kScaleBytes;
        for (int64_t k = 0; k < weight.group; k += kPiece) {
            const int64_t inputs = smaller(kPiece, weight.group - k);
            if (!streamed) widen<Source>(at, inputs, widened);
            for (int64_t r = 0; r < rows;) {
                const int64_t blocks = (rows - r + kBlockRows - 1) / kBlockRows, now = (rows - r + blocks - 1) / blocks;
                const int16_t* const x = launch.x + (first_row + r) * launch.padded + group * weight.group + k;
                Ints sums[kBlockRows][kVectors];
                if (streamed) {
                    multiply_rows<Source>(now, x, launch.padded, at, inputs, end, sums);
                } else {
                    multiply_rows<Widened>(now, x, launch.padded, widened, inputs, widened, sums);
                }
                for (int64_t i = 0; i < now; ++i) {
                    absorb(sums[i], scales, k == 0, k + inputs == weight.group, states[r + i]);
                }
                r += now;
            }
            at += inputs / (2 * kQuad) * Source::kPairBytes;
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        float* const y = states[r].y;
        for (int64_t i = 0; i < kTilePanel; i += kLanes) store(y + i, load(y + i) * launch.x_scales[first_row + r]);
        finish_row<kTilePanel>(*launch.args, panel, first_row + r, y);
    }
}

constexpr size_t kScratchBytes = kItemRows * sizeof(RowState) + kPiece / (2 * kQuad) * Widened::kPairBytes;

// A run of panels for one group of rows.
template <class Source>
void work(void* context, int64_t item, int worker) {
    const LaunchArgs& launch = *static_cast<const LaunchArgs*>(context);
    const LinearArgs& args = *launch.args;
    uint8_t* const scratch = static_cast<uint8_t*>(launch.pool->scratch(worker, kScratchBytes));
    const int64_t row_groups = (args.rows + kItemRows - 1) / kItemRows;
    const int64_t run = item / row_groups, first_row = item % row_groups * kItemRows;
    const int64_t last = launch.borders[run + 1];
    const uint8_t* const end = static_cast<const uint8_t*>(args.weight.data) + last * args.weight.panel_bytes();
    for (int64_t panel = launch.borders[run]; panel < last; ++panel) {
        multiply_panel<Source>(launch, panel, first_row, smaller(kItemRows, args.rows - first_row), end, scratch);
    }
}

void quantize_activations(void* context, int64_t row, int) {
    const LaunchArgs& launch = *static_cast<const LaunchArgs*>(context);
    const LinearArgs& args = *launch.args;
    const float* const x = args.x + row * args.x_stride;
    const QuantizedRow quantized = measure_row(x, args.weight.in, args.weight.levels);
    launch.x_scales[row] = quantized.scale;
    int16_t* const to = launch.x + row * launch.padded;
    typedef int16_t Narrow __attribute__((vector_size(kLanes * 2)));
    for (int64_t i = 0; i < launch.padded; i += kLanes) {
        Narrow q = {};
        if (quantized.inverse != 0.0f && i < args.weight.in) {
            q = __builtin_convertvector(quantize_to_ints(load_some(x + i, args.weight.in - i), quantized.inverse), Narrow);
        }
        __builtin_memcpy(to + i, &q, sizeof q);
    }
}

#endif

void embed_row(void* context, int64_t item, int) {
    const EmbedArgs& args = *static_cast<const EmbedArgs*>(context);
    const Panels& table = args.table;
    const int64_t id = args.ids[item], column = id % kTilePanel;
    const uint8_t* const panel = static_cast<const uint8_t*>(table.data) + id / kTilePanel * table.panel_bytes();
    for (int64_t i = 0; i < table.in; ++i) {
        const uint8_t* const group = panel + i / table.group * table.group_bytes();
        const float scale = reinterpret_cast<const float*>(group)[column];
        const int64_t input = i % table.group;
        const uint8_t byte = group[kScaleBytes + integer_byte(table.bits, input, column)];
        const int value = table.bits == 8 ? static_cast<int8_t>(byte) : (byte >> (input & 4) & 15) - 8;
        args.y[item * table.in + i] = static_cast<float>(value) * scale * args.scale;
    }
}

}  // namespace

void linear_int(const LinearArgs& args, ThreadPool& pool) {
    if (args.rows == 0) return;
#if QUIRE_AMX
    // Bytes go from memory into tiles as they are; few rows by 4-bit weights, which must be widened, are faster by vectors.
    const int64_t by_vectors = args.weight.bits == 8 ? 0 : byte_rows(args.weight);
    if (args.rows > by_vectors && args.weight.in > 0) return linear_int_tiles(args, pool);
#endif
#if defined(__AVX512VNNI__)
    return linear_int_bytes(args, pool);
#else
    LaunchArgs launch{};
    launch.args = &args;
    launch.pool = &pool;
    launch.groups = args.weight.groups();
    launch.padded = launch.groups * args.weight.group;
    const int64_t panels = args.weight.panels();
    const int64_t x_bytes = (args.rows * launch.padded * 2 + 63) / 64 * 64;
    uint8_t* const shared = static_cast<uint8_t*>(pool.shared_scratch(x_bytes + (args.rows + panels + 1) * 4));
    if (shared == nullptr || !pool.reserve(kScratchBytes)) return;
    launch.x = reinterpret_cast<int16_t*>(shared);
    launch.x_scales = reinterpret_cast<float*>(shared + x_bytes);
    launch.borders = reinterpret_cast<int32_t*>(launch.x_scales + args.rows);
    if (args.rows * args.weight.in < kSerialItems) {
        for (int64_t row = 0; row < args.rows; ++row) quantize_activations(&launch, row, 0);
    } else {
        pool.run(args.rows, quantize_activations, &launch);
    }
    const int64_t runs = divide_panels(panels, args.rows <= kBlockRows ? panels : 1, 1, pool.threads(), launch.borders);
    const int64_t row_groups = (args.rows + kItemRows - 1) / kItemRows;
    pool.run(runs * row_groups, args.weight.bits == 4 ? work<FourBits> : work<EightBits>, &launch);
#endif
}

void embed_int(const EmbedArgs& args, ThreadPool& pool) {
    pool.run(args.tokens, embed_row, const_cast<EmbedArgs*>(&args));
}

}  // namespace quire::QUIRE_ISA
