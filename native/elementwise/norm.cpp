// rms_norm, add_rms_norm, layer_norm. The order of a row's sums depends on its length only.
#include "runtime/vector_math.h"
#include "gemm/tile_rows.h"

namespace quire::QUIRE_ISA {

namespace {

// sum of (x - centre)^2, or of x where `squares` is false
float sum_row(const float* x, int64_t size, float centre, bool squares) {
    Floats even{}, odd{};
    int64_t i = 0;
    for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
        const Floats a = load(x + i) - centre;
        const Floats b = load(x + i + kLanes) - centre;
        even = squares ? fma(a, a, even) : even + a;
        odd = squares ? fma(b, b, odd) : odd + b;
    }
    float tail = 0.0f;
    for (; i < size; ++i) {
        const float a = x[i] - centre;
        tail += squares ? a * a : a;
    }
    return sum_lanes(even + odd) + tail;
}

// y = (x - mean) * factor * weight + bias for `count` elements from `first` on
void scale_part(const NormArgs& args, const float* x, int64_t first, int64_t count, float mean, float factor, float* y) {
    const float* const weight = args.weight + first;
    for (int64_t i = 0; i < count; ++i) y[i] = (x[i] - mean) * factor * weight[i];
    if (args.bias == nullptr) return;
    for (int64_t i = 0; i < count; ++i) y[i] += args.bias[first + i];
}

void norm_row(const NormArgs& args, int64_t row) {
    const int64_t size = args.size;
    const float* x = args.x + row / args.groups * args.x_stride + row % args.groups * size;
    if (args.residual != nullptr) {
        float* residual = args.residual + row * args.residual_stride;
        for (int64_t i = 0; i < size; ++i) residual[i] += x[i];
        x = residual;
    }
    const float count = static_cast<float>(size);
    const float mean = args.centre ? sum_row(x, size, 0.0f, false) / count : 0.0f;
    const float factor = 1.0f / __builtin_sqrtf(sum_row(x, size, mean, true) / count + args.eps);
    if (args.y != nullptr) return scale_part(args, x, 0, size, mean, factor, args.y + row * size);
    for (int64_t first = 0; first < size; first += kTileDepth) {
        const int64_t count = smaller(kTileDepth, size - first);
        float values[kTileDepth];
        scale_part(args, x + first, first, count, mean, factor, values);
        round_chunk(values, count, args.y_tiles.at(row, first / kTileDepth));
    }
}

void work(void* context, int64_t item, int) {
    const NormArgs& args = *static_cast<const NormArgs*>(context);
    const int64_t step = rows_per_item(args.rows, args.size);
    const int64_t end = smaller(args.rows, (item + 1) * step);
    for (int64_t row = item * step; row < end; ++row) norm_row(args, row);
}

}  // namespace

void norm(const NormArgs& args, ThreadPool& pool) {
    const int64_t step = rows_per_item(args.rows, args.size);
    pool.run((args.rows + step - 1) / step, work, const_cast<NormArgs*>(&args));
}

}  // namespace quire::QUIRE_ISA
