#include "packing/packed.h"

#include <stdexcept>
#include <utility>

namespace quire {

namespace {

size_t cache_bytes(const CacheLayout& layout) {
    return checked_bytes({layout.slots(), layout.position_bytes(), layout.kv_heads, layout.blocks, layout.layers});
}

}  // namespace

PackedLinear::PackedLinear(int64_t out, int64_t in, Storage storage, Layout layout, const Integers& integers,
                           bool gated, const float* bias, Arena& arena)
    : out(out), in(in), storage(storage), layout(layout), gated(gated), integers(integers) {
    const Panels shape = panels();
    weights_ = arena.take(weight_bytes(shape));
    if (bias == nullptr) return;
    bias_ = arena.take(bias_bytes(shape));
    float* const to = static_cast<float*>(bias_.data);
    for (int64_t i = 0; i < shape.panels() * shape.width(); ++i) {
        const int64_t row = shape.source(i / shape.width(), i % shape.width());
        if (row >= 0) to[i] = bias[row];
    }
}

PackedLinear::PackedLinear(int64_t out, int64_t in, Storage storage, Layout layout, const Integers& integers,
                           bool gated, Arena::Piece weights, Arena::Piece bias)
    : out(out), in(in), storage(storage), layout(layout), gated(gated), integers(integers),
      weights_(std::move(weights)), bias_(std::move(bias)) {}

PackedLinear::PackedLinear(const WeightRows& weight, const float* bias, Layout layout, bool gated,
                           const Kernels& kernels, ThreadPool& pool, Arena& arena)
    : PackedLinear(weight.out, weight.in, weight.storage, layout, Integers{}, gated, bias, arena) {
    fill(weight, kernels, pool);
}

PackedLinear::PackedLinear(const WeightRows& weight, const float* bias, const Integers& integers, bool gated,
                           const Kernels& kernels, ThreadPool& pool, Arena& arena)
    : PackedLinear(weight.out, weight.in, integers.storage(), integers.layout(), integers, gated, bias, arena) {
    fill(weight, kernels, pool);
}

PackedLinear::PackedLinear(const IntegerWeight& weight, int64_t out, int64_t in, const float* bias,
                           const Integers& integers, bool gated, ThreadPool& pool, Arena& arena)
    : PackedLinear(out, in, integers.storage(), integers.layout(), integers, gated, bias, arena) {
    pack_integers(weight, panels(), weights_.data, pool);
}

void PackedLinear::fill(const WeightRows& weight, const Kernels& kernels, ThreadPool& pool) {
    switch (pack_rows(weight, panels(), weights_.data, kernels, pool)) {
        case Packed::whole: return;
        case Packed::file_ended: throw std::invalid_argument("its file ended or could not be read");
        case Packed::not_finite: throw std::invalid_argument("a weight is not finite");
    }
}

Cache::Cache(int64_t layers, int64_t blocks, int64_t block_size, int64_t kv_heads, int64_t head_dim, Storage storage)
    : layout_{nullptr, layers, blocks, block_size, kv_heads, head_dim, storage}, pages_(cache_bytes(layout_), true) {
    layout_.data = static_cast<uint8_t*>(pages_.data());
}

}  // namespace quire
