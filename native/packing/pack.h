// From the rows of a weight to the order of kernels.h, in all threads, a panel at a time.
#pragma once

#include <vector>

#include "kernels.h"

namespace quire {

// Consecutive rows of a weight in an open file, `offset` bytes from its beginning.
struct FileRows {
    int descriptor;
    int64_t offset, rows;
};

// A weight [out, in], in memory or in files, from which each thread reads the rows of a panel when it packs that.
struct WeightRows {
    int64_t out, in;
    Storage storage;
    const char* memory;  // null: in files
    int64_t stride;      // bytes from row to row of memory
    std::vector<FileRows> files;

    int64_t row_bytes() const { return in * bytes_of(storage); }
};

struct IntegerWeight {
    const int8_t* values;  // [out, in], rows `stride` apart
    int64_t stride;
    const char* scales;  // [out, ceil(in / group)] as the panels have them, rows `scales_stride` bytes apart
    int64_t scales_stride;
    const char* minima;  // the same, or null
    int64_t minima_stride;
};

enum class Packed { whole, file_ended, not_finite };

// Fills `data`, which is zero, with the panels of `shape`; rounds where these are integers.
Packed pack_rows(const WeightRows& weight, const Panels& shape, void* data, const Kernels& kernels, ThreadPool& pool);
void pack_integers(const IntegerWeight& weight, const Panels& shape, void* data, ThreadPool& pool);

}  // namespace quire
