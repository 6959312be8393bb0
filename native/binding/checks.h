// What the binding requires of arrays before a kernel sees them.
#pragma once

#include <vector>

#include "binding/arrays.h"
#include "packing/packed.h"

namespace quire {

using Floats1 = Array<float, 1>;
using Floats2 = Array<float, 2>;
using Floats3 = Array<float, 3>;
using Ints1 = Array<int32_t, 1>;
using Ints2 = Array<int32_t, 2>;

inline void require_ids(const Ints1& ids, int64_t limit, const char* message) {
    uint32_t highest = 0;
    for (int64_t i = 0; i < ids.size(0); ++i) {
        const uint32_t id = static_cast<uint32_t>(ids.data()[i]);
        highest = id > highest ? id : highest;  // a negative id is a large one
    }
    require(ids.size(0) == 0 || highest < limit, message);
}

inline Layout layout_of(const Kernels& kernels, Storage storage) {
    return storage == Storage::bfloat16 ? kernels.bfloat16_layout : Layout::panels;
}

inline void require_packed_here(const Kernels& kernels, const PackedLinear& packed) {
    require(packed.layout == Layout::integers || packed.layout == layout_of(kernels, packed.storage),
            "the weight is packed for another instruction set");
}

// Results are written to one row after the other.
template <class T>
void require_contiguous(const Array<T, 2>& array, const char* message) {
    require(array.size(0) <= 1 || array.size(1) == 0 || array.stride() == array.size(1), message);
}

inline void require_rope_tables(const Floats2& cos, const Floats2& sin, int64_t head_dim) {
    require(cos.size(0) == sin.size(0) && cos.size(1) == sin.size(1), "rope: cos and sin differ in shape");
    require(cos.stride() == cos.size(1) && sin.stride() == sin.size(1), "rope: cos and sin are not contiguous");
    require(cos.size(1) <= head_dim / 2, "rope: the rotated part is wider than a head");
}

inline Activation activation_numbered(int kind) {
    require(kind >= 0 && kind <= 3, "activation: no such kind");
    return static_cast<Activation>(kind);
}

// The position behind a row's last new token. Both numbers may be as large as an int32.
inline int64_t row_end(const Ints1& query_starts, const Ints1& starts, int64_t row) {
    return int64_t{starts.data()[row]} + query_starts.data()[row + 1] - query_starts.data()[row];
}

inline void require_rows(int64_t tokens, const CacheLayout& layout, const Ints1& query_starts, const Ints1& starts,
                         const Ints2& tables) {
    const int64_t rows = starts.size(0);
    require(query_starts.size(0) == rows + 1 && tables.size(0) == rows, "attention: shapes differ in rows");
    const int32_t* first = query_starts.data();
    require(first[0] == 0 && first[rows] == tokens, "attention: query_starts do not cover the tokens");
    for (int64_t row = 0; row < rows; ++row) {
        require(first[row] <= first[row + 1], "attention: query_starts descend");
        require(starts.data()[row] >= 0, "attention: a start is negative");
        const int64_t end = row_end(query_starts, starts, row);
        require(end <= INT32_MAX, "attention: a position is out of range");
        const int64_t blocks = (end + layout.block_size - 1) / layout.block_size;
        require(blocks <= tables.size(1), "attention: a row is longer than its block table");
        const int32_t* table = tables.data() + row * tables.stride();
        for (int64_t i = 0; i < blocks; ++i) {
            require(table[i] >= 0 && table[i] < layout.blocks, "attention: a block id is outside the cache");
        }
    }
}

// Whether no row of the step reads a block that another one writes. Only then may a thread write a row's keys and values
// as late as just before it attends to them: a block stands in the tables of others as soon as its step is scheduled,
// so that a request which is admitted in the same step shares it. Expects what `require_rows` requires.
inline bool writes_are_private(const CacheLayout& layout, const Ints1& query_starts, const Ints1& starts,
                               const Ints2& tables) {
    std::vector<uint64_t> written((layout.blocks + 63) / 64);
    const auto bit = [](int64_t block) { return uint64_t{1} << (block % 64); };
    const int64_t size = layout.block_size, rows = starts.size(0);
    for (int64_t row = 0; row < rows; ++row) {
        const int32_t* const table = tables.data() + row * tables.stride();
        const int64_t start = starts.data()[row], end = start + query_starts.data()[row + 1] - query_starts.data()[row];
        for (int64_t i = start / size; start < end && i < (end + size - 1) / size; ++i) {
            uint64_t& word = written[table[i] / 64];
            if ((word & bit(table[i])) != 0) return false;
            word |= bit(table[i]);
        }
    }
    for (int64_t row = 0; row < rows; ++row) {
        if (query_starts.data()[row] == query_starts.data()[row + 1]) continue;
        const int32_t* const table = tables.data() + row * tables.stride();
        for (int64_t i = 0; i < starts.data()[row] / size; ++i) {
            if ((written[table[i] / 64] & bit(table[i])) != 0) return false;
        }
    }
    return true;
}

inline void require_rope_covers(int64_t positions, const Ints1& query_starts, const Ints1& starts) {
    for (int64_t row = 0; row < starts.size(0); ++row) {
        require(row_end(query_starts, starts, row) <= positions, "attention: a position is outside the rope tables");
    }
}

}  // namespace quire
