// Weights and caches in the layouts of kernels.h.
#pragma once

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"

namespace quire {

inline std::optional<Storage> storage_named(const std::string& name) {
    if (name == "bfloat16") return Storage::bfloat16;
    if (name == "float16") return Storage::float16;
    if (name == "float32") return Storage::float32;
    return std::nullopt;
}

struct IntegerWeight {
    const int8_t* values;  // [out, in], rows `stride` apart
    int64_t stride;
    const float* scales;  // [out, ceil(in / group)], rows `scales_stride` apart
    int64_t scales_stride, out, in, bits, group;
    int32_t levels;
    bool gated;
};

class PackedLinear {
public:
    // `weight` [out, in] holds items of `storage`, rows `stride` items apart; `bias` [out] may be null.
    PackedLinear(const void* weight, int64_t out, int64_t in, int64_t stride, const float* bias, Storage storage,
                 Layout layout, bool gated, ThreadPool& pool);

    // QuantizedWeight of src/quire/ops/types.py.
    PackedLinear(const IntegerWeight& weight, const float* bias, ThreadPool& pool);

    Panels panels() const {
        return {pages_.data(), bias_.empty() ? nullptr : bias_.data(), in, out, storage, layout, gated, bits, group,
                levels};
    }
    size_t bytes() const { return pages_.bytes() + bias_.size() * sizeof(float); }
    int64_t num_operations() const { return 2 * out * in; }  // for each row
    int64_t products() const { return gated ? out / 2 : out; }
    // "960x576 bfloat16"
    std::string text() const {
        static const char* const names[] = {"bfloat16", "float16", "float32"};
        const std::string shape = std::to_string(out) + "x" + std::to_string(in) + " ";
        if (layout != Layout::integers) return shape + names[static_cast<int>(storage)];
        return shape + "int" + std::to_string(bits) + (levels > 127 ? "" : " x int8");
    }
    bool reads_tiles() const { return layout == Layout::tiles; }  // TileRows as inputs

    const int64_t out, in;
    const Storage storage;
    const Layout layout;
    const bool gated;
    const int64_t bits = 0, group = 0;
    const int32_t levels = 0;

private:
    void order_bias(const float* bias);

    Pages pages_;
    std::vector<float> bias_;
};

// TileRows in memory of their own, NaN until written: what a producer leaves out shows.
class TileBuffer {
public:
    TileBuffer(int64_t rows, int64_t width)
        : pages_(TileRows{nullptr, rows, width}.bytes(), false),
          rows_{static_cast<uint16_t*>(pages_.data()), rows, width} {
        std::memset(pages_.data(), 0xff, rows_.bytes());
    }

    const TileRows& rows() const { return rows_; }

private:
    Pages pages_;
    TileRows rows_;
};

class Cache {
public:
    // All dimensions are at least 1; std::bad_alloc where their product is more than memory can be.
    Cache(int64_t layers, int64_t blocks, int64_t block_size, int64_t kv_heads, int64_t head_dim, Storage storage);

    const CacheLayout& layout() const { return layout_; }
    size_t bytes() const { return pages_.bytes(); }
    void copy_block(int64_t source, int64_t target) const;

private:
    CacheLayout layout_;
    Pages pages_;
};

}  // namespace quire
