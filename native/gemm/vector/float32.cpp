// y = x W^T + b in float32, for weights in panels. One work item is a panel of 64 outputs for up to kItemRows rows.
//
// Each output is a chain of fused multiply-adds over `in`, from the first input to the last, in its own lane. That
// chain is the same whatever number of rows is computed beside it, however they are blocked: when `in` is cut
// into pieces to stay in the cache, the partial sum waits in `y` (float32, so nothing is lost). Weights of e4m3 have such a
// chain for each group of inputs; from the first group to the last, y = fma(sum, scale, y).
#include "gemm/frame.h"
#include "gemm/linear.h"

namespace quire::QUIRE_ISA {

namespace {

constexpr int kItemRows = 128;
constexpr int64_t kDepth = 256;      // inputs in a piece; 64 x 256 floats of a converted panel stay in L2
constexpr int kRegisterRows = 6;     // rows whose sums are held in registers
constexpr int kConvertRows = 33;     // from here on a piece of a panel is converted to float32 once, for all rows
constexpr int kPrefetchBytes = 2048;

// Vectors of a panel held at once with `rows` rows: 32 registers with AVX-512 and on arm64, 16 elsewhere.
constexpr int vectors_for(int rows) {
#if defined(__AVX512F__)
    return rows > 0 ? 4 : 0;
#elif defined(__aarch64__)
    return rows <= 1 ? 16 : rows <= 3 ? 8 : 4;
#else
    return rows <= 1 ? 8 : rows <= 3 ? 4 : 2;
#endif
}

// The row of the panel that will be read soon: one core's own prefetcher does not keep the memory busy.
template <class T>
inline void prefetch_ahead(const T* w) {
    prefetch_lines(reinterpret_cast<const char*>(w) + kPrefetchBytes, kPanel * int64_t(sizeof(T)));
}

// Two vectors; of e4m3 half of what widens them is done for both.
template <class T>
inline void load_two(const T* w, Floats* weights) {
    weights[0] = load(w);
    weights[1] = load(w + kLanes);
}

#if defined(__AVX512F__)
inline void load_two(const E4M3* w, Floats* weights) {
    const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
    const __m512i halves = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16(int16_t(0xbfff)));
    weights[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    weights[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
}
#endif

// sums[r][0..63] (+)= x[r][0..depth) . panel[0..depth)[0..63]
template <int R, class T>
void accumulate(const float* x, int64_t x_stride, const T* panel, int64_t depth, float* sums, bool fresh) {
    constexpr int V = vectors_for(R);
    for (int64_t first = 0; first < kPanel; first += V * kLanes) {
        Floats acc[R][V];
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < V; ++v) {
                acc[r][v] = fresh ? Floats{} : load(sums + r * kPanel + first + v * kLanes);
            }
        }
        const T* w = panel + first;
        for (int64_t k = 0; k < depth; ++k, w += kPanel) {
            prefetch_ahead(w);
            Floats weights[V];
            for (int v = 0; v < V; v += 2) load_two(w + v * kLanes, weights + v);
            for (int r = 0; r < R; ++r) {
                const Floats input = splat(x[r * x_stride + k]);
                for (int v = 0; v < V; ++v) acc[r][v] = fma(input, weights[v], acc[r][v]);
            }
        }
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < V; ++v) store(sums + r * kPanel + first + v * kLanes, acc[r][v]);
        }
    }
}

template <class T>
void accumulate_rows(int64_t rows, const float* x, int64_t x_stride, const T* panel, int64_t depth, float* sums,
                     bool fresh) {
    for_even_blocks(rows, kRegisterRows, [&](int64_t row, int64_t now) {
        with_row_count<kRegisterRows>(now, [&](auto count) {
            accumulate<count.value>(x + row * x_stride, x_stride, panel, depth, sums + row * kPanel, fresh);
        });
    });
}

template <class T>
void convert(const T* from, int64_t depth, float* to) {
    for (int64_t k = 0; k < depth; ++k, from += kPanel, to += kPanel) {
        prefetch_ahead(from);
        for (int64_t i = 0; i < kPanel; i += 2 * kLanes) {
            Floats values[2];
            load_two(from + i, values);
            store(to + i, values[0]);
            store(to + i + kLanes, values[1]);
        }
    }
}

// sums [rows, 64] = x . one panel; behind kItemRows of them is memory for a converted piece and as many sums again.
template <class T>
void multiply_panel(const LinearArgs& args, const T* weights, const float* x, int64_t rows, float* sums) {
    const int64_t in = args.weight.in, piece = rows <= kRegisterRows ? larger(in, 1) : kDepth;
    float* const converted = sums + kItemRows * kPanel;  // [kDepth, 64]
    if (in == 0) __builtin_memset(sums, 0, rows * kPanel * 4);
    for (int64_t k = 0; k < in; k += piece) {
        const int64_t depth = smaller(piece, in - k);
        if (rows < kConvertRows) {
            accumulate_rows(rows, x + k, args.x_stride, weights + k * kPanel, depth, sums, k == 0);
        } else {
            convert(weights + k * kPanel, depth, converted);
            accumulate_rows(rows, x + k, args.x_stride, converted, depth, sums, k == 0);
        }
    }
}

void multiply_panel(const LinearArgs& args, const E4M3* at, const float* x, int64_t rows, float* y) {
    float* const converted = y + kItemRows * kPanel;  // [128, 64] at most
    float* const sums = converted + kDepth * kPanel;  // of a group
    __builtin_memset(y, 0, rows * kPanel * 4);
    for (int64_t k = 0; k < args.weight.in; k += args.weight.group) {
        const int64_t depth = smaller(args.weight.group, args.weight.in - k);
        const float* const scales = reinterpret_cast<const float*>(at);
        at += kPanel * sizeof(float);
        if (rows <= kRegisterRows) {
            accumulate_rows(rows, x + k, args.x_stride, at, depth, sums, true);
        } else {
            convert(at, depth, converted);
            accumulate_rows(rows, x + k, args.x_stride, converted, depth, sums, true);
        }
        at += kPanel * depth;
        for (int64_t i = 0; i < rows * kPanel; i += kLanes) {  // (what is loaded of e4m3 is 2^8 too small)
            store(y + i, fma(load(sums + i) * 0x1p8f, load(scales + i % kPanel), load(y + i)));
        }
    }
}

constexpr size_t kScratchBytes = (2 * kItemRows + kDepth) * kPanel * sizeof(float);

template <class T>
void work(void* context, int64_t index, int worker) {
    const GemmLaunch& launch = *static_cast<const GemmLaunch*>(context);
    const LinearArgs& args = *launch.args;
    const GemmLaunch::Item item = launch.item(index);
    const int64_t first_row = item.row_group * kItemRows, rows = smaller(kItemRows, args.rows - first_row);
    const float* const x = args.x + first_row * args.x_stride;
    float* const sums = reinterpret_cast<float*>(launch.scratch(worker, kScratchBytes));
    for (int64_t panel = item.first_panel; panel < item.last_panel; ++panel) {
        multiply_panel(args, reinterpret_cast<const T*>(launch.panel(panel)), x, rows, sums);
        for (int64_t r = 0; r < rows; ++r) finish_row<kPanel>(args, panel, first_row + r, sums + r * kPanel);
    }
}

}  // namespace

void linear_float32(const LinearArgs& args, ThreadPool& pool) {
    GemmLaunch launch{};
    if (!launch.reserve(args, pool, 0, kScratchBytes)) return;
    const Storage storage = args.weight.storage;
    run_panels(launch, 1, (args.rows + kItemRows - 1) / kItemRows,
               storage == Storage::bfloat16  ? work<BFloat16>
               : storage == Storage::float16 ? work<Float16>
               : storage == Storage::e4m3    ? work<E4M3>
                                             : work<float>);
}

}  // namespace quire::QUIRE_ISA
