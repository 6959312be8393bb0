#include "packing/pack.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>

namespace quire {

namespace {

// A thread takes panels of this many bytes at once: where two begin in one large page both would have it cleared.
constexpr int64_t kItemBytes = int64_t{1} << 21;

// Panels that are one item of work: there are still several items for each thread.
int64_t panels_per_item(const Panels& shape, int threads) {
    const int64_t fit = kItemBytes / std::max<int64_t>(shape.bytes_each(), 1);
    return std::max<int64_t>(1, std::min(fit, shape.panels() / (4 * threads)));
}

bool read_fully(int descriptor, char* to, int64_t bytes, int64_t offset) {
    while (bytes > 0) {
        const ssize_t count = pread(descriptor, to, static_cast<size_t>(bytes), offset);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return false;
        to += count;
        offset += count;
        bytes -= count;
    }
    return true;
}

bool read_rows(const WeightRows& weight, int64_t first, int64_t count, char* to) {
    for (const FileRows& file : weight.files) {
        if (first >= file.rows) {
            first -= file.rows;
            continue;
        }
        const int64_t now = std::min(count, file.rows - first), bytes = now * weight.row_bytes();
        if (!read_fully(file.descriptor, to, bytes, file.offset + first * weight.row_bytes())) return false;
        to += bytes;
        count -= now;
        first = 0;
        if (count == 0) break;
    }
    return count == 0;
}

// Where the row of each column of a panel is, null for padding: in the weight's memory, or read to `buffer`.
bool gather(const WeightRows& weight, const Panels& shape, int64_t panel, char* buffer, const char** rows) {
    for (int64_t column = 0; column < shape.width();) {
        const int64_t row = shape.source(panel, column);
        if (row < 0) {
            rows[column++] = nullptr;
            continue;
        }
        int64_t count = 1;  // as many as follow one another
        while (column + count < shape.width() && shape.source(panel, column + count) == row + count) ++count;
        char* const to = buffer + column * weight.row_bytes();
        if (weight.memory == nullptr && !read_rows(weight, row, count, to)) return false;
        for (int64_t i = 0; i < count; ++i) {
            rows[column++] = weight.memory == nullptr ? to + i * weight.row_bytes()
                                                      : weight.memory + (row + i) * weight.stride;
        }
    }
    return true;
}

template <class Item>
void fill_panel(const char* const* rows, int64_t in, void* panel) {
    Item* const to = static_cast<Item*>(panel);
    constexpr int64_t piece = 64;  // inputs at a time: what is written meanwhile stays in the cache
    for (int64_t start = 0; start < in; start += piece) {
        const int64_t stop = std::min(in, start + piece);
        for (int64_t o = 0; o < kPanel; ++o) {
            const Item* const from = reinterpret_cast<const Item*>(rows[o]);
            for (int64_t k = start; from != nullptr && k < stop; ++k) to[k * kPanel + o] = from[k];
        }
    }
}

// One chunk of 32 inputs for one output into its column of a tile, [16 pairs of inputs][16 outputs][2 inputs].
void fill_column(const uint16_t* from, int64_t inputs, uint16_t* to) {
    for (int64_t k = 0; k + 1 < inputs; k += 2) std::memcpy(to + k * kTileSide, from + k, 4);
    if (inputs % 2 == 1) to[(inputs - 1) * kTileSide] = from[inputs - 1];
}

void fill_tiles(const char* const* rows, int64_t in, void* panel) {
    constexpr int64_t piece = 8 * kTileDepth;  // inputs at a time: what is written meanwhile stays in the cache
    for (int64_t start = 0; start < in; start += piece) {
        const int64_t stop = std::min(in, start + piece);
        for (int64_t o = 0; o < kTilePanel; ++o) {
            const uint16_t* const from = reinterpret_cast<const uint16_t*>(rows[o]);
            if (from == nullptr) continue;
            uint16_t* const column = static_cast<uint16_t*>(panel) + o / kTileSide * kTileSide * kTileDepth + o % kTileSide * 2;
            int64_t k = start;
            for (; k + kTileDepth <= stop; k += kTileDepth) fill_column(from + k, kTileDepth, column + k * kTilePanel);
            if (k < stop) fill_column(from + k, stop - k, column + k * kTilePanel);
        }
    }
}

uint32_t four_bytes(const int8_t* from) {
    uint32_t word;
    std::memcpy(&word, from, 4);
    return word;
}

// Bytes 0 1 2 3 -> 0 2 1 3
uint32_t ordered(uint32_t word) { return (word & 0xff0000ffu) | (word >> 8 & 0xff00u) | (word & 0xff00u) << 8; }

// A weight's integers of `bits` bits, as one word of a column for the inputs from `from` on: 4 bytes, or 8 halves.
// `zero` is 8 or 0.
template <int Bits>
uint32_t column_word(const int8_t* from, uint32_t zero) {
    if constexpr (Bits == 8) return ordered(four_bytes(from));
    const uint32_t flip = zero * 0x01010101u;  // value + 8
    const uint32_t low = (four_bytes(from) & 0x0f0f0f0fu) ^ flip;
    const uint32_t high = (four_bytes(from + 4) & 0x0f0f0f0fu) ^ flip;
    return ordered(low | high << 4);
}

// The integers of `inputs` inputs of a group, from its first on, for every column that has a row.
template <int Bits>
void fill_group(const int8_t* const* values, int64_t inputs, int zero, uint8_t* to) {
    constexpr int64_t word_inputs = 32 / Bits;
    constexpr int64_t piece = 64;  // words of a column at a time: what is written meanwhile stays in the cache
    const int64_t words = inputs / word_inputs;
    for (int64_t start = 0; start < words; start += piece) {
        const int64_t stop = std::min(words, start + piece);
        for (int64_t column = 0; column < kTilePanel; ++column) {
            const int8_t* const from = values[column];
            for (int64_t i = start; from != nullptr && i < stop; ++i) {
                const uint32_t word = column_word<Bits>(from + i * word_inputs, zero);
                std::memcpy(to + (i * kTilePanel + column) * 4, &word, 4);
            }
        }
    }
    for (int64_t i = words * word_inputs; i < inputs; ++i) {  // padding stays zero
        for (int64_t column = 0; column < kTilePanel; ++column) {
            if (values[column] == nullptr) continue;
            uint8_t& byte = to[integer_byte(Bits, i, column)];
            const uint8_t value = static_cast<uint8_t>(values[column][i]);
            byte = Bits == 8 ? value : static_cast<uint8_t>(byte | (value + zero) << (i & 4));
        }
    }
}

// A row of integers with its scales and, where there are any, its minima, as bytes; `values` null: padding.
struct IntegerRow {
    const int8_t* values;
    const char *scales, *minima;
};

void fill_e4m3(const IntegerRow* rows, const Panels& shape, uint8_t* to) {
    const char* at[kPanel];
    for (int64_t group = 0; group < shape.groups(); ++group) {
        const int64_t first = group * shape.group, inputs = std::min(shape.group, shape.in - first);
        for (int64_t column = 0; column < kPanel; ++column) {
            const IntegerRow& row = rows[column];
            at[column] = row.values == nullptr ? nullptr : reinterpret_cast<const char*>(row.values) + first;
            if (row.values != nullptr) std::memcpy(to + column * 4, row.scales + group * 4, 4);
        }
        fill_panel<uint8_t>(at, inputs, to + kPanel * 4);
        to += kPanel * (4 + inputs);
    }
}

void fill_integers(const IntegerRow* rows, const Panels& shape, uint8_t* to) {
    if (shape.storage == Storage::e4m3) return fill_e4m3(rows, shape, to);
    const int8_t* at[kTilePanel];
    const int64_t bytes = shape.scale_bytes();
    for (int64_t group = 0; group < shape.groups(); ++group, to += shape.group_bytes()) {
        const int64_t first = group * shape.group;
        for (int64_t column = 0; column < kTilePanel; ++column) {
            const IntegerRow& row = rows[column];
            at[column] = row.values == nullptr ? nullptr : row.values + first;
            if (row.values == nullptr) continue;
            std::memcpy(to + column * bytes, row.scales + group * bytes, bytes);
            if (shape.minima) std::memcpy(to + (kTilePanel + column) * bytes, row.minima + group * bytes, bytes);
        }
        const int64_t inputs = std::min(shape.group, shape.in - first);
        (shape.bits == 8 ? fill_group<8> : fill_group<4>)(at, inputs, shape.zero(), to + shape.head_bytes());
    }
}

// A worker's memory for one panel.
struct Workspace {
    Workspace(const WeightRows& weight, const Panels& shape, const QuantizeArgs& rounding)
        : rows_bytes(weight.memory == nullptr ? whole_lines(shape.width() * weight.row_bytes()) : 0) {
        if (shape.bits == 0) return;
        values_bytes = whole_lines(shape.width() * weight.in);
        scales_bytes = whole_lines(shape.width() * rounding.groups() * int64_t{sizeof(float)});
        rounding_bytes = static_cast<int64_t>(rounding.scratch_bytes());
    }
    static int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
    size_t bytes() const { return static_cast<size_t>(rows_bytes + values_bytes + scales_bytes + rounding_bytes + 1); }

    int64_t rows_bytes, values_bytes = 0, scales_bytes = 0, rounding_bytes = 0;
};

struct Job {
    const WeightRows& weight;
    const Panels& shape;
    char* data;
    const Kernels& kernels;
    ThreadPool& pool;
    QuantizeArgs rounding;
    Workspace workspace;
    int64_t step;  // panels in an item
    std::atomic<Packed> result{Packed::whole};
};

Packed pack_panel(const Job& job, int64_t panel, char* memory) {
    const Panels& shape = job.shape;
    const char* rows[kPanel];
    if (!gather(job.weight, shape, panel, memory, rows)) return Packed::file_ended;
    void* const to = job.data + panel * shape.bytes_each();
    if (shape.layout == Layout::tiles) {
        fill_tiles(rows, shape.in, to);
    } else if (shape.bits == 0) {
        (bytes_of(shape.storage) == 2 ? fill_panel<uint16_t> : fill_panel<uint32_t>)(rows, shape.in, to);
    } else {
        char* const behind = memory + job.workspace.rows_bytes;
        int8_t* const integers = reinterpret_cast<int8_t*>(behind);
        float* const factors = reinterpret_cast<float*>(behind + job.workspace.values_bytes);
        void* const scratch = behind + job.workspace.values_bytes + job.workspace.scales_bytes;
        IntegerRow rounded[kPanel] = {};
        for (int64_t column = 0; column < shape.width(); ++column) {
            if (rows[column] == nullptr) continue;
            int8_t* const value = integers + column * shape.in;
            float* const scale = factors + column * job.rounding.groups();
            if (!job.kernels.quantize_row(job.rounding, rows[column], value, scale, scratch)) return Packed::not_finite;
            rounded[column] = {value, reinterpret_cast<const char*>(scale), nullptr};
        }
        fill_integers(rounded, shape, static_cast<uint8_t*>(to));
    }
    return Packed::whole;
}

void pack_item(void* context, int64_t item, int worker) {
    Job& job = *static_cast<Job*>(context);
    char* const memory = static_cast<char*>(job.pool.scratch(worker, job.workspace.bytes()));
    const int64_t stop = std::min(job.shape.panels(), (item + 1) * job.step);
    for (int64_t panel = item * job.step; panel < stop && job.result == Packed::whole; ++panel) {
        const Packed result = pack_panel(job, panel, memory);
        if (result != Packed::whole) job.result = result;
    }
}

struct IntegerJob {
    const IntegerWeight& weight;
    const Panels& shape;
    uint8_t* data;
};

void pack_integer_panel(void* context, int64_t panel, int) {
    const IntegerJob& job = *static_cast<const IntegerJob*>(context);
    const IntegerWeight& weight = job.weight;
    IntegerRow rows[kPanel] = {};
    for (int64_t column = 0; column < job.shape.width(); ++column) {
        const int64_t row = job.shape.source(panel, column);
        if (row < 0) continue;
        rows[column] = {weight.values + row * weight.stride, weight.scales + row * weight.scales_stride,
                        weight.minima == nullptr ? nullptr : weight.minima + row * weight.minima_stride};
    }
    fill_integers(rows, job.shape, job.data + panel * job.shape.bytes_each());
}

}  // namespace

Packed pack_rows(const WeightRows& weight, const Panels& shape, void* data, const Kernels& kernels, ThreadPool& pool) {
    const Rounding to = shape.storage == Storage::e4m3 ? Rounding::e4m3 : shape.bits == 4 ? Rounding::int4 : Rounding::int8;
    const QuantizeArgs rounding{weight.in, weight.storage, shape.group, to};
    const int64_t step = panels_per_item(shape, pool.threads());
    Job job{weight, shape, static_cast<char*>(data), kernels, pool, rounding, {weight, shape, rounding}, step};
    if (shape.panels() > 0) pool.reserve(job.workspace.bytes());
    pool.run((shape.panels() + step - 1) / step, pack_item, &job);
    return job.result;
}

void pack_integers(const IntegerWeight& weight, const Panels& shape, void* data, ThreadPool& pool) {
    IntegerJob job{weight, shape, static_cast<uint8_t*>(data)};
    pool.run(shape.panels(), pack_integer_panel, &job);
}

}  // namespace quire
