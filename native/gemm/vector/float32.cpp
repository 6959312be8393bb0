// y = x W^T + b, for weights in panels. One item of work is a panel of 64 outputs for up to kItemRows rows.
//
// Each output is a chain of fused multiply-adds over `in`, from the first input to the last, in its own lane. That
// chain is the same whatever number of rows is computed beside it, however they are blocked: when `in` is cut
// into pieces to stay in the cache, the partial sum waits in `y` (float32, so nothing is lost).
#include "gemm/epilogue.h"
#include "gemm/integers.h"
#include "gemm/amx/bfloat16.h"

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
    const char* at = reinterpret_cast<const char*>(w) + kPrefetchBytes;
    for (int64_t line = 0; line < kPanel * int64_t(sizeof(T)); line += 64) __builtin_prefetch(at + line);
}

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
            for (int v = 0; v < V; ++v) weights[v] = load(w + v * kLanes);
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
    while (rows > 0) {
        // 8 rows are 4 + 4, not 6 + 2: even blocks keep more sums in flight
        const int64_t blocks = (rows + kRegisterRows - 1) / kRegisterRows;
        const int64_t now = (rows + blocks - 1) / blocks;
        switch (now) {
            case 1: accumulate<1>(x, x_stride, panel, depth, sums, fresh); break;
            case 2: accumulate<2>(x, x_stride, panel, depth, sums, fresh); break;
            case 3: accumulate<3>(x, x_stride, panel, depth, sums, fresh); break;
            case 4: accumulate<4>(x, x_stride, panel, depth, sums, fresh); break;
            case 5: accumulate<5>(x, x_stride, panel, depth, sums, fresh); break;
            default: accumulate<6>(x, x_stride, panel, depth, sums, fresh); break;
        }
        rows -= now;
        x += now * x_stride;
        sums += now * kPanel;
    }
}

template <class T>
void convert(const T* from, int64_t depth, float* to) {
    for (int64_t k = 0; k < depth; ++k, from += kPanel, to += kPanel) {
        prefetch_ahead(from);
        for (int64_t i = 0; i < kPanel; i += kLanes) store(to + i, load(from + i));
    }
}

template <class T>
void compute_item(const LinearArgs& args, int64_t item, float* scratch) {
    const int64_t groups = (args.rows + kItemRows - 1) / kItemRows;
    const int64_t panel = item / groups;
    const int64_t first_row = item % groups * kItemRows;
    const int64_t rows = smaller(kItemRows, args.rows - first_row);
    const int64_t in = args.weight.in;
    const T* weights = static_cast<const T*>(args.weight.data) + panel * in * kPanel;
    const float* x = args.x + first_row * args.x_stride;
    float* sums = scratch;                          // [rows, 64]
    float* converted = scratch + kItemRows * kPanel;  // [kDepth, 64]
    if (in == 0) __builtin_memset(sums, 0, rows * kPanel * 4);
    if (rows <= kRegisterRows) {
        accumulate_rows(rows, x, args.x_stride, weights, in, sums, true);
    } else {
        for (int64_t k = 0; k < in; k += kDepth) {
            const int64_t depth = smaller(kDepth, in - k);
            if (rows < kConvertRows) {
                accumulate_rows(rows, x + k, args.x_stride, weights + k * kPanel, depth, sums, k == 0);
            } else {
                convert(weights + k * kPanel, depth, converted);
                accumulate_rows(rows, x + k, args.x_stride, converted, depth, sums, k == 0);
            }
        }
    }
    for (int64_t r = 0; r < rows; ++r) finish_row<kPanel>(args, panel, first_row + r, sums + r * kPanel);
}

struct LaunchArgs {
    const LinearArgs* args;
    ThreadPool* pool;
};

constexpr size_t kScratchBytes = (kItemRows + kDepth) * kPanel * sizeof(float);

template <class T>
void work(void* context, int64_t item, int worker) {
    const LaunchArgs& launch = *static_cast<const LaunchArgs*>(context);
    compute_item<T>(*launch.args, item, static_cast<float*>(launch.pool->scratch(worker, kScratchBytes)));
}

template <class T>
void embed_rows(void* context, int64_t item, int) {
    const EmbedArgs& args = *static_cast<const EmbedArgs*>(context);
    const int64_t in = args.table.in;
    const int64_t id = args.ids[item];
    const T* row = static_cast<const T*>(args.table.data) + id / kPanel * in * kPanel + id % kPanel;
    for (int64_t i = 0; i < in; ++i) args.y[item * in + i] = to_float(row[i * kPanel]) * args.scale;
}

}  // namespace

void linear(const LinearArgs& args, ThreadPool& pool) {
    if (args.weight.layout == Layout::integers) return linear_int(args, pool);
#if QUIRE_TILES
    if (args.weight.layout == Layout::tiles) return linear_tiles(args, pool);
#endif
    const int64_t panels = args.weight.panels();
    const int64_t groups = (args.rows + kItemRows - 1) / kItemRows;
    LaunchArgs launch{&args, &pool};
    Work item = args.weight.storage == Storage::bfloat16  ? work<BFloat16>
                : args.weight.storage == Storage::float16 ? work<Float16>
                                                          : work<float>;
    if (pool.reserve(kScratchBytes)) pool.run(panels * groups, item, &launch);
}

void embed(const EmbedArgs& args, ThreadPool& pool) {
    if (args.table.layout == Layout::integers) return embed_int(args, pool);
#if QUIRE_TILES
    if (args.table.layout == Layout::tiles) return embed_tiles(args, pool);
#endif
    Work item = args.table.storage == Storage::bfloat16  ? embed_rows<BFloat16>
                : args.table.storage == Storage::float16 ? embed_rows<Float16>
                                                         : embed_rows<float>;
    pool.run(args.tokens, item, const_cast<EmbedArgs*>(&args));
}

}  // namespace quire::QUIRE_ISA
