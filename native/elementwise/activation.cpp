// Activations, alone or times the second half of the row.
#include "runtime/vector_math.h"
#include "gemm/tile_rows.h"

namespace quire::QUIRE_ISA {

namespace {

template <Floats (*Function)(Floats)>
void apply(const float* x, const float* factor, int64_t size, float* y) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        const Floats value = Function(load(x + i));
        store(y + i, factor != nullptr ? value * load(factor + i) : value);
    }
    if (i == size) return;
    // The rest goes through the same function, padded: an element's bits do not depend on its place.
    float rest[kLanes] = {};
    for (int64_t j = i; j < size; ++j) rest[j - i] = x[j];
    store(rest, Function(load(rest)));
    for (int64_t j = i; j < size; ++j) y[j] = factor != nullptr ? rest[j - i] * factor[j] : rest[j - i];
}

void activate_part(const ActivationArgs& args, const float* x, int64_t size, float* y) {
    const float* factor = args.multiply ? x + args.size : nullptr;
    switch (args.kind) {
        case Activation::silu: apply<silu>(x, factor, size, y); break;
        case Activation::gelu: apply<gelu>(x, factor, size, y); break;
        case Activation::gelu_tanh: apply<gelu_tanh>(x, factor, size, y); break;
        case Activation::relu: apply<relu>(x, factor, size, y); break;
    }
}

void activate_row(const ActivationArgs& args, int64_t row) {
    const float* x = args.x + row * args.x_stride;
    if (args.y != nullptr) return activate_part(args, x, args.size, args.y + row * args.size);
    for (int64_t first = 0; first < args.size; first += kTileDepth) {
        const int64_t size = smaller(kTileDepth, args.size - first);
        float values[kTileDepth];
        activate_part(args, x + first, size, values);
        round_chunk(values, size, args.y_tiles.at(row, first / kTileDepth));
    }
}

void work(void* context, int64_t item, int) {
    const ActivationArgs& args = *static_cast<const ActivationArgs*>(context);
    const int64_t step = rows_per_item(args.rows, args.size * 4);
    const int64_t end = smaller(args.rows, (item + 1) * step);
    for (int64_t row = item * step; row < end; ++row) activate_row(args, row);
}

}  // namespace

void activation(const ActivationArgs& args, ThreadPool& pool) {
    const int64_t step = rows_per_item(args.rows, args.size * 4);
    pool.run((args.rows + step - 1) / step, work, const_cast<ActivationArgs*>(&args));
}

}  // namespace quire::QUIRE_ISA
