#include "packed.h"

#include <cstring>

namespace quire {

namespace {

int64_t panel_count(int64_t out, Layout layout) {
    const int64_t width = layout == Layout::tiles ? kTilePanel : kPanel;
    return (out + width - 1) / width;
}

size_t panel_bytes(int64_t in, Storage storage, Layout layout) {
    if (layout == Layout::panels) return kPanel * in * bytes_of(storage);
    return kTilePanel * ((in + kTileDepth - 1) / kTileDepth * kTileDepth) * bytes_of(storage);
}

struct PackJob {
    const void* weight;
    int64_t out, in, stride;
    void* panels;
};

// Panels start as zero pages, so the padding needs no writing.
template <class Item>
void pack_panel(void* context, int64_t panel, int) {
    const PackJob& job = *static_cast<const PackJob*>(context);
    const Item* from = static_cast<const Item*>(job.weight) + panel * kPanel * job.stride;
    Item* to = static_cast<Item*>(job.panels) + panel * kPanel * job.in;
    const int64_t width = job.out - panel * kPanel < kPanel ? job.out - panel * kPanel : kPanel;
    for (int64_t k = 0; k < job.in; ++k) {
        for (int64_t o = 0; o < width; ++o) to[k * kPanel + o] = from[o * job.stride + k];
    }
}

// One chunk of 32 inputs for one output into its column of a tile, [16 pairs of inputs][16 outputs][2 inputs].
void pack_column(const uint16_t* from, int64_t inputs, uint16_t* to) {
    for (int64_t k = 0; k + 1 < inputs; k += 2) std::memcpy(to + k * kTileSide, from + k, 4);
    if (inputs % 2 == 1) to[(inputs - 1) * kTileSide] = from[inputs - 1];
}

void pack_tiles(void* context, int64_t panel, int) {
    const PackJob& job = *static_cast<const PackJob*>(context);
    constexpr int64_t piece = 8 * kTileDepth;  // inputs at a time: what is written meanwhile stays in the cache
    const int64_t depth = (job.in + kTileDepth - 1) / kTileDepth * kTileDepth;
    const int64_t first = panel * kTilePanel;
    const int64_t width = job.out - first < kTilePanel ? job.out - first : kTilePanel;
    uint16_t* const to = static_cast<uint16_t*>(job.panels) + first * depth;
    for (int64_t start = 0; start < job.in; start += piece) {
        const int64_t stop = job.in - start < piece ? job.in : start + piece;
        for (int64_t o = 0; o < width; ++o) {
            const uint16_t* from = static_cast<const uint16_t*>(job.weight) + (first + o) * job.stride;
            uint16_t* column = to + o / kTileSide * kTileSide * kTileDepth + o % kTileSide * 2;
            for (int64_t k = start; k < stop; k += kTileDepth) {
                pack_column(from + k, stop - k < kTileDepth ? stop - k : kTileDepth, column + k * kTilePanel);
            }
        }
    }
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
                           Storage storage, Layout layout, ThreadPool& pool)
    : out(out),
      in(in),
      storage(storage),
      layout(layout),
      pages_(panel_count(out, layout) * panel_bytes(in, storage, layout), true),
      bias_(bias == nullptr ? std::vector<float>() : std::vector<float>(bias, bias + out)) {
    PackJob job{weight, out, in, stride, pages_.data()};
    const Work pack = layout == Layout::tiles  ? pack_tiles
                      : bytes_of(storage) == 2 ? pack_panel<uint16_t>
                                               : pack_panel<uint32_t>;
    pool.run(panel_count(out, layout), pack, &job);
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
