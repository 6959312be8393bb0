// Weights and caches in the layouts of kernels.h.
#pragma once

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "runtime/memory.h"
#include "packing/pack.h"

namespace quire {

inline const char* name_of(Storage storage) {
    static const char* const names[] = {"bfloat16", "float16", "float32", "int8", "fp8"};
    return names[static_cast<int>(storage)];
}

inline const char* name_of(Layout layout) {
    static const char* const names[] = {"panels", "amx_bf16", "integers"};
    return names[static_cast<int>(layout)];
}

// Of weights.
inline std::optional<Storage> storage_named(const std::string& name) {
    if (name == "bfloat16") return Storage::bfloat16;
    if (name == "float16") return Storage::float16;
    if (name == "float32") return Storage::float32;
    return std::nullopt;
}

inline std::optional<Storage> cache_storage_named(const std::string& name) {
    if (name == "int8") return Storage::int8;
    if (name == "fp8") return Storage::e4m3;
    return storage_named(name);
}

// How a weight of small numbers is made; bits 0: it is none.
struct Integers {
    int64_t bits = 0, group = 0;
    int32_t qmax = 0;  // the largest integer of an input; 0: inputs stay as they are, and weights are e4m3
    bool half_scales = false, minima = false;

    Storage storage() const { return qmax == 0 ? Storage::e4m3 : Storage::float32; }
    Layout layout() const { return qmax == 0 ? Layout::panels : Layout::integers; }
};

class PackedLinear {
public:
    // A weight as it is, and one that is rounded to integers of `bits` bits; `bias` [out] may be null.
    // std::invalid_argument where its file ends early or it cannot be rounded; std::bad_alloc where it has no room.
    // `out` and `in` are below 2^31.
    PackedLinear(const WeightRows& weight, const float* bias, Layout layout, bool gated, const Kernels& kernels,
                 ThreadPool& pool, Arena& arena);
    PackedLinear(const WeightRows& weight, const float* bias, const Integers& integers, bool gated,
                 const Kernels& kernels, ThreadPool& pool, Arena& arena);

    // Over memory in which a weight of this header was packed before; it is read only. `weights` and `bias` (null data:
    // none) have `weight_bytes` and `bias_bytes` of its panels.
    PackedLinear(int64_t out, int64_t in, Storage storage, Layout layout, const Integers& integers, bool gated,
                 Arena::Piece weights, Arena::Piece bias);

    // QuantizedWeight of src/quire/ops/types.py; values of e4m3 as their bits.
    PackedLinear(const IntegerWeight& weight, int64_t out, int64_t in, const float* bias, const Integers& integers,
                 bool gated, ThreadPool& pool, Arena& arena);

    Panels panels() const {
        return {weights_.data, static_cast<const float*>(bias_.data), in, out, storage, layout, gated, integers.bits,
                padded_group(), integers.qmax, integers.half_scales, integers.minima};
    }
    size_t bytes() const { return weights_.bytes + bias_.bytes; }
    // Of the memory that a weight with these panels has; std::bad_alloc where none is that large.
    static size_t weight_bytes(const Panels& shape) { return checked_bytes({shape.panels(), shape.bytes_each()}); }
    static size_t bias_bytes(const Panels& shape) {
        return checked_bytes({shape.panels(), shape.width(), int64_t{sizeof(float)}});
    }
    const Arena::Piece& weights() const { return weights_; }
    const Arena::Piece& bias() const { return bias_; }
    int64_t num_operations() const { return 2 * out * in; }  // for each row
    int64_t out_width() const { return gated ? out / 2 : out; }
    // "960x576 bfloat16"
    std::string text() const {
        const std::string shape = std::to_string(out) + "x" + std::to_string(in) + " ";
        if (layout != Layout::integers) return shape + name_of(storage);
        return shape + "int" + std::to_string(integers.bits) + (integers.minima ? " with minima" : "") +
               (integers.qmax > 127 ? "" : " x int8");
    }
    bool reads_amx_bf16() const { return layout == Layout::tiles; }  // TileRows as inputs

    const int64_t out, in;
    const Storage storage;
    const Layout layout;
    const bool gated;
    const Integers integers;

private:
    PackedLinear(int64_t out, int64_t in, Storage storage, Layout layout, const Integers& integers, bool gated,
                 const float* bias, Arena& arena);
    void fill(const WeightRows& weight, const Kernels& kernels, ThreadPool& pool);
    // A group of 8 bits that is a whole row is padded.
    int64_t padded_group() const {
        if (layout != Layout::integers || integers.bits != 8 || integers.group != in) return integers.group;
        return in == 0 ? 64 : (in + 63) / 64 * 64;
    }

    Arena::Piece weights_, bias_;  // zero where padded
};

class Cache {
public:
    // All dimensions are in [1, 2^31); std::bad_alloc where their product is more than memory can be.
    Cache(int64_t layers, int64_t blocks, int64_t block_size, int64_t kv_heads, int64_t head_dim, Storage storage);

    const CacheLayout& layout() const { return layout_; }
    size_t bytes() const { return pages_.bytes(); }

    // Gives the memory of blocks [first, first + number) back to the system, but for pages that others share.
    void release_blocks(int64_t first, int64_t number) const {
        const size_t size = static_cast<size_t>(layout_.layers) * layout_.block_bytes();
        pages_.release(first * size, (first + number) * size);
    }

private:
    CacheLayout layout_;
    Pages pages_;
};

}  // namespace quire
