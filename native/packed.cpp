#include "packed.h"

namespace quire {

namespace {

size_t panel_bytes(int64_t in, Storage storage, Layout layout) {
    if (layout == Layout::panels) return kPanel * in * bytes_of(storage);
    return kTilePanel * ((in + kTileDepth - 1) / kTileDepth * kTileDepth) * bytes_of(storage);
}

struct PackJob {
    const void* weight;
    int64_t stride;
    Panels shape;
    void* panels;
};

// Panels start as zero pages, so the padding needs no writing.
template <class Item>
void pack_panel(void* context, int64_t panel, int) {
    const PackJob& job = *static_cast<const PackJob*>(context);
    Item* const to = static_cast<Item*>(job.panels) + panel * kPanel * job.shape.in;
    constexpr int64_t piece = 64;  // inputs at a time: what is written meanwhile stays in the cache
    for (int64_t start = 0; start < job.shape.in; start += piece) {
        const int64_t stop = job.shape.in - start < piece ? job.shape.in : start + piece;
        for (int64_t o = 0; o < kPanel; ++o) {
            const int64_t row = job.shape.source(panel, o);
            if (row < 0) continue;
            const Item* const from = static_cast<const Item*>(job.weight) + row * job.stride;
            for (int64_t k = start; k < stop; ++k) to[k * kPanel + o] = from[k];
        }
    }
}

// One chunk of 32 inputs for one output into its column of a tile, [16 pairs of inputs][16 outputs][2 inputs].
void pack_column(const uint16_t* from, int64_t inputs, uint16_t* to) {
    for (int64_t k = 0; k + 1 < inputs; k += 2) std::memcpy(to + k * kTileSide, from + k, 4);
    if (inputs % 2 == 1) to[(inputs - 1) * kTileSide] = from[inputs - 1];
}

void pack_tiles(void* context, int64_t panel, int) {
    const PackJob& job = *static_cast<const PackJob*>(context);
    const int64_t in = job.shape.in;
    constexpr int64_t piece = 8 * kTileDepth;  // inputs at a time: what is written meanwhile stays in the cache
    const int64_t depth = (in + kTileDepth - 1) / kTileDepth * kTileDepth;
    uint16_t* const to = static_cast<uint16_t*>(job.panels) + panel * kTilePanel * depth;
    for (int64_t start = 0; start < in; start += piece) {
        const int64_t stop = in - start < piece ? in : start + piece;
        for (int64_t o = 0; o < kTilePanel; ++o) {
            const int64_t row = job.shape.source(panel, o);
            if (row < 0) continue;
            const uint16_t* from = static_cast<const uint16_t*>(job.weight) + row * job.stride;
            uint16_t* column = to + o / kTileSide * kTileSide * kTileDepth + o % kTileSide * 2;
            for (int64_t k = start; k < stop; k += kTileDepth) {
                pack_column(from + k, stop - k < kTileDepth ? stop - k : kTileDepth, column + k * kTilePanel);
            }
        }
    }
}

struct IntegerJob {
    const IntegerWeight* weight;
    Panels shape;
    uint8_t* data;
};

// One panel of integers; padding is left zero.
void pack_integers(void* context, int64_t panel, int) {
    const IntegerJob& job = *static_cast<const IntegerJob*>(context);
    const IntegerWeight& weight = *job.weight;
    const int64_t bits = job.shape.bits, group = job.shape.group;
    uint8_t* to = job.data + panel * job.shape.panel_bytes();
    for (int64_t first = 0; first < weight.in; first += group, to += job.shape.group_bytes()) {
        const int64_t inputs = weight.in - first < group ? weight.in - first : group;
        float* const scales = reinterpret_cast<float*>(to);
        uint8_t* const integers = to + kTilePanel * sizeof(float);
        for (int64_t column = 0; column < kTilePanel; ++column) {
            const int64_t row = job.shape.source(panel, column);
            if (row < 0) continue;
            const int8_t* const values = weight.values + row * weight.stride + first;
            scales[column] = weight.scales[row * weight.scales_stride + first / group];
            for (int64_t i = 0; i < inputs; ++i) {
                uint8_t& byte = integers[integer_byte(bits, i, column)];
                const uint8_t value = static_cast<uint8_t>(values[i]);
                byte = bits == 8 ? value : static_cast<uint8_t>(byte | (value + 8) << (i & 4));
            }
        }
    }
}

int64_t padded_group(const IntegerWeight& weight) {
    if (weight.bits == 4) return weight.group;
    return weight.in == 0 ? 64 : (weight.in + 63) / 64 * 64;
}

Panels shape_of(const IntegerWeight& weight) {
    return {nullptr,         nullptr,      weight.in,   weight.out,           Storage::float32,
            Layout::integers, weight.gated, weight.bits, padded_group(weight), weight.levels};
}

size_t cache_bytes(const CacheLayout& layout) {
    // Each factor is below 2^31 (checked by the binding), so a product of two cannot wrap; the others are checked.
    int64_t bytes = 0;
    const bool wraps = __builtin_mul_overflow(layout.slots() * bytes_of(layout.storage),
                                              layout.head_dim + layout.value_dim(), &bytes) ||
                       __builtin_mul_overflow(bytes, layout.kv_heads, &bytes) ||
                       __builtin_mul_overflow(bytes, layout.blocks, &bytes) ||
                       __builtin_mul_overflow(bytes, layout.layers, &bytes);
    if (wraps) throw std::bad_alloc();
    return static_cast<size_t>(bytes);
}

}  // namespace

PackedLinear::PackedLinear(const void* weight, int64_t out, int64_t in, int64_t stride, const float* bias,
                           Storage storage, Layout layout, bool gated, ThreadPool& pool)
    : out(out),
      in(in),
      storage(storage),
      layout(layout),
      gated(gated),
      pages_(Panels{nullptr, nullptr, in, out, storage, layout, gated}.panels() * panel_bytes(in, storage, layout), true) {
    PackJob job{weight, stride, panels(), pages_.data()};
    const Work pack = layout == Layout::tiles  ? pack_tiles
                      : bytes_of(storage) == 2 ? pack_panel<uint16_t>
                                               : pack_panel<uint32_t>;
    pool.run(job.shape.panels(), pack, &job);
    order_bias(bias);
}

void PackedLinear::order_bias(const float* bias) {
    if (bias == nullptr) return;
    const Panels shape = panels();
    bias_.resize(shape.panels() * shape.width());
    for (size_t i = 0; i < bias_.size(); ++i) {
        const int64_t row = shape.source(i / shape.width(), i % shape.width());
        if (row >= 0) bias_[i] = bias[row];
    }
}

PackedLinear::PackedLinear(const IntegerWeight& weight, const float* bias, ThreadPool& pool)
    : out(weight.out),
      in(weight.in),
      storage(Storage::float32),
      layout(Layout::integers),
      gated(weight.gated),
      bits(weight.bits),
      group(padded_group(weight)),
      levels(weight.levels),
      pages_(shape_of(weight).panels() * shape_of(weight).panel_bytes(), true) {
    IntegerJob job{&weight, panels(), static_cast<uint8_t*>(pages_.data())};
    pool.run(job.shape.panels(), pack_integers, &job);
    order_bias(bias);
}

Cache::Cache(int64_t layers, int64_t blocks, int64_t block_size, int64_t kv_heads, int64_t head_dim, Storage storage)
    : layout_{nullptr, layers, blocks, block_size, kv_heads, head_dim, storage}, pages_(cache_bytes(layout_), false) {
    layout_.data = static_cast<uint8_t*>(pages_.data());
}

void Cache::copy_block(int64_t source, int64_t target) const {
    if (source == target) return;
    for (int64_t layer = 0; layer < layout_.layers; ++layer) {
        std::memcpy(layout_.unit(layer, target, 0), layout_.unit(layer, source, 0), layout_.block_bytes());
    }
}

}  // namespace quire
