#include "packed.h"

#include <cstring>

namespace quire {

namespace {

int64_t panel_count(int64_t out) { return (out + kPanel - 1) / kPanel; }

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
                           Storage storage, ThreadPool& pool)
    : out(out),
      in(in),
      storage(storage),
      pages_(panel_count(out) * kPanel * in * bytes_of(storage), true),
      bias_(bias == nullptr ? std::vector<float>() : std::vector<float>(bias, bias + out)) {
    PackJob job{weight, out, in, stride, pages_.data()};
    pool.run(panel_count(out), bytes_of(storage) == 2 ? pack_panel<uint16_t> : pack_panel<uint32_t>, &job);
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
