// What the binding makes of the arguments of packing and rounding: weights in arrays or files, their biases, their integers.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "binding/checks.h"
#include "packing/pack.h"

namespace quire {

inline Storage storage_or_raise(const std::string& name) {
    const auto storage = storage_named(name);
    require(storage.has_value(), "storage is not one of bfloat16, float16, float32");
    return *storage;
}

inline Rounding rounding_or_raise(const std::string& name) {
    if (name == "int8") return Rounding::int8;
    if (name == "int4") return Rounding::int4;
    if (name == "int4_min") return Rounding::int4_min;
    if (name == "int4_min_half") return Rounding::int4_min_half;
    require(name == "fp8", "quantize: rounding is not one of int8, int4, int4_min, int4_min_half, fp8");
    return Rounding::e4m3;
}

using Bytes = Array<uint8_t, 1>;

// An argument [out] that may be None.
struct Bias {
    Bias(nb::handle object, int64_t out) {
        if (object.is_none()) return;
        array.emplace(object, "bias");
        require(array->size(0) == out, "pack: one bias for each output is needed");
    }
    const float* data() const { return array.has_value() ? array->data() : nullptr; }

    std::optional<Floats1> array;
};

// Memory of a Python object that has a buffer of bytes, which lives as long as the piece.
inline Arena::Piece borrowed(nb::handle object, const char* name) {
    const std::shared_ptr<Bytes> bytes(new Bytes(object, name), [](Bytes* held) {
        const nb::gil_scoped_acquire locked;
        delete held;
    });
    return {bytes, bytes->data(), static_cast<size_t>(bytes->size(0))};
}

inline void require_field(bool right, const std::string& field, const std::string& is, const std::string& expected) {
    if (right) return;
    throw nb::value_error(("packed weight: " + field + " is " + is + ", not " + expected).c_str());
}

inline void require_piece(const Arena::Piece& piece, const std::string& name, size_t bytes) {
    require_field(piece.bytes == bytes, "size of " + name, std::to_string(piece.bytes), std::to_string(bytes));
    const size_t beside = reinterpret_cast<uintptr_t>(piece.data) % 64;
    require_field(beside == 0 || bytes == 0, "alignment of " + name, std::to_string(beside) + " bytes past a multiple of 64",
                  "one");
}

// The bytes of a packed weight or its bias, for Python to read: it has a buffer.
struct PackedBytes {
    static int get_buffer(PyObject* self, Py_buffer* view, int flags) {
        const Arena::Piece& piece = nb::inst_ptr<PackedBytes>(self)->piece;
        return PyBuffer_FillInfo(view, self, piece.data, static_cast<Py_ssize_t>(piece.bytes), 1, flags);
    }

    Arena::Piece piece;
};

struct QuantizeJob {
    static constexpr int64_t kRows = 16;

    QuantizeArgs args;
    const Kernels* kernels;
    ThreadPool* pool;
    int64_t out;
    const void* weight;
    int64_t weight_bytes;  // from row to row
    int8_t* values;
    int64_t values_stride;
    float* scales;
    int64_t scales_stride;
    std::atomic<bool> finite;

    static void work(void* context, int64_t item, int worker) {
        QuantizeJob& job = *static_cast<QuantizeJob*>(context);
        void* const scratch = job.pool->scratch(worker, job.args.scratch_bytes());
        for (int64_t o = item * kRows; o < job.out && o < (item + 1) * kRows; ++o) {
            const bool finite = job.kernels->quantize_row(
                job.args, static_cast<const char*>(job.weight) + o * job.weight_bytes,
                job.values + o * job.values_stride, job.scales + o * job.scales_stride, scratch);
            if (!finite) job.finite = false;
        }
    }
};

inline void require_four_bits(const Array<int8_t, 2>& values, int zero) {
    unsigned outside = 0;
    for (int64_t row = 0; row < values.size(0); ++row) {
        const int8_t* const at = values.data() + row * values.stride();
        for (int64_t i = 0; i < values.size(1); ++i) outside |= static_cast<uint8_t>(at[i] + zero) & 0xf0u;
    }
    require(outside == 0, zero == 8 ? "pack: an integer of 4 bits is outside [-8, 7]"
                                    : "pack: an integer of 4 bits is outside [0, 15]");
}

// (bits, inputs in a group, the largest integer of an input, bytes of a scale, whether there are minima)
using IntegersTuple = std::tuple<int, int64_t, int, int, bool>;

inline void require_no_nan(const Array<int8_t, 2>& e4m3) {
    bool any = false;
    for (int64_t row = 0; row < e4m3.size(0); ++row) {
        const int8_t* const at = e4m3.data() + row * e4m3.stride();
        for (int64_t i = 0; i < e4m3.size(1); ++i) any |= (at[i] & 0x7f) == 0x7f;
    }
    require(!any, "pack: a number of e4m3 is NaN");
}

inline bool is_block(int64_t group) { return group == 16 || group == 32 || group == 64 || group == 128; }

inline Integers checked_integers(const IntegersTuple& stated, int64_t in) {
    const auto& [bits, group, qmax, scale_bytes, minima] = stated;
    require(bits == 4 || bits == 8, "pack: integers have 4 or 8 bits");
    const bool whole = bits == 8 && group == in;
    if (qmax == 0) {
        require(bits == 8 && is_block(group) && scale_bytes == 4 && !minima, "pack: no such weights of e4m3");
        return {bits, group, qmax, false, false};
    }
    require(is_block(group) || (whole && !minima), "pack: no such size of groups");
    require(qmax == 127 || qmax == 32639, "pack: the qmax of inputs is 127 or 32639, or 0 for e4m3");
    require(qmax == 32639 || (!minima && (bits == 4 || whole)), "pack: such groups take inputs of 16 bits");
    require(scale_bytes == 2 || scale_bytes == 4, "pack: scales have 2 or 4 bytes");
    require(in < kMaxIntegerInputs, "pack: more inputs than a sum of 32 bits can hold");
    return {bits, group, qmax, scale_bytes == 2, minima};
}

// Rounding makes float32 scales, no minima, and of 4 bits groups of 32 or more.
inline Integers checked_rounding(const IntegersTuple& stated, int64_t in) {
    const Integers integers = checked_integers(stated, in);
    require(!integers.half_scales && !integers.minima && (integers.bits == 8 || integers.group > 16),
            "pack: weights are not rounded to this");
    return integers;
}

// The scales or minima [out, groups] of integers: float32, or the bits of float16.
struct Scales {
    Scales(nb::handle object, const char* name, int64_t out, int64_t groups, bool halves) {
        if (halves) {
            take<uint16_t>(half.emplace(object, name), out, groups, 0x7c00);
        } else {
            take<uint32_t>(single.emplace(object, name), out, groups, 0x7f800000);
        }
    }
    template <class Bits, class Item>
    void take(const Array<Item, 2>& array, int64_t out, int64_t groups, Bits exponent) {
        require(array.size(0) == out && array.size(1) == groups,
                "pack: one scale, and one minimum where there are any, for each group of each output is needed");
        data = reinterpret_cast<const char*>(array.data());
        stride = array.stride() * int64_t{sizeof(Item)};
        for (int64_t row = 0; row < out; ++row) {
            const Bits* const at = reinterpret_cast<const Bits*>(data + row * stride);
            unsigned strange = 0;
            for (int64_t i = 0; i < groups; ++i) strange |= (at[i] & exponent) == exponent;
            require(strange == 0, "pack: a scale or minimum is not finite");
        }
    }

    std::optional<Array<uint16_t, 2>> half;
    std::optional<Floats2> single;
    const char* data = nullptr;
    int64_t stride = 0;
};

// (in, [(descriptor, offset in bytes, rows), ...])
inline WeightRows file_rows(nb::handle object, Storage storage) {
    std::tuple<int64_t, std::vector<std::tuple<int, int64_t, int64_t>>> stated;
    require(nb::try_cast(object, stated), "pack: not (in, rows of files)");
    const auto& [in, files] = stated;
    WeightRows weight{0, in, storage, nullptr, 0, {}};
    require(in >= 0 && in < INT32_MAX, "pack: a size is out of range");
    for (const auto& [descriptor, offset, rows] : files) {
        int64_t end = 0;
        require(offset >= 0 && rows >= 0 && rows < INT32_MAX - weight.out, "pack: a size is out of range");
        require(!__builtin_mul_overflow(rows, weight.row_bytes(), &end) && !__builtin_add_overflow(end, offset, &end),
                "pack: a size is out of range");
        weight.files.push_back({descriptor, offset, rows});
        weight.out += rows;
    }
    return weight;
}

}  // namespace quire
