// Python arrays as plain pointers, checked. The buffer protocol costs a tenth of a microsecond an array.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>

namespace quire {

namespace nb = nanobind;

inline std::string shape_text(const Py_buffer& view) {
    std::string text = "[";
    for (int i = 0; i < view.ndim; ++i) text += (i ? ", " : "") + std::to_string(view.shape[i]);
    return text + "]";
}

// Whether a buffer's format is the native one of T: 'l' and 'q' are both 64-bit integers on Linux.
template <class T>
bool format_is(const char* format) {
    if (format == nullptr || format[0] == '\0' || format[1] != '\0') return false;
    const char code = format[0];
    if constexpr (std::is_same_v<T, float>) return code == 'f';
    if constexpr (std::is_same_v<T, bool>) return code == '?';
    if constexpr (std::is_same_v<T, int32_t>) return code == 'i' || (code == 'l' && sizeof(long) == 4);
    if constexpr (std::is_same_v<T, int64_t>) return code == 'q' || (code == 'l' && sizeof(long) == 8);
    if constexpr (std::is_same_v<T, uint64_t>) return code == 'Q' || (code == 'L' && sizeof(long) == 8);
    if constexpr (std::is_same_v<T, uint16_t>) return code == 'H';
    if constexpr (std::is_same_v<T, int8_t>) return code == 'b';
    if constexpr (std::is_same_v<T, uint8_t>) return code == 'B';
    return false;
}

template <class T>
constexpr const char* type_name() {
    if constexpr (std::is_same_v<T, float>) return "float32";
    if constexpr (std::is_same_v<T, bool>) return "bool";
    if constexpr (std::is_same_v<T, int32_t>) return "int32";
    if constexpr (std::is_same_v<T, int64_t>) return "int64";
    if constexpr (std::is_same_v<T, uint64_t>) return "uint64";
    if constexpr (std::is_same_v<T, int8_t>) return "int8";
    if constexpr (std::is_same_v<T, uint8_t>) return "uint8";
    return "uint16";
}

// Sizes of arrays of two and three dimensions are below this. Rows may be one and the same (a stride of 0), so memory does
// not bound their number; what is computed from two sizes and a few constants fits into 64 bits.
constexpr int64_t kSizeLimit = int64_t{1} << 30;

// An array of `Dims` dimensions whose last `Dims - 1` (all, with one) are contiguous; the first may be strided.
// Holds the buffer while it lives.
template <class T, int Dims>
class Array {
public:
    Array(nb::handle object, const char* name, bool writable = false) {
        const int flags = PyBUF_STRIDED_RO | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) {
            PyErr_Clear();
            fail(name, writable ? "is not a writable array" : "is not an array");
        }
        const bool right_type = format_is<T>(view_.format) && view_.itemsize == sizeof(T);
        if (!right_type) release_and_fail(name, std::string("is not ") + type_name<T>());
        if (view_.ndim != Dims) {
            release_and_fail(name, "has shape " + shape_text(view_) + ", not " + std::to_string(Dims) + " dimensions");
        }
        for (int i = 0; i < Dims && Dims > 1; ++i) {
            if (view_.shape[i] >= kSizeLimit) release_and_fail(name, "is too large: its shape is " + shape_text(view_));
        }
        int64_t expected = sizeof(T);
        for (int i = Dims - 1; i >= (Dims > 1 ? 1 : 0); --i) {
            if (view_.shape[i] > 1 && view_.strides[i] != expected) release_and_fail(name, "is not contiguous");
            expected *= view_.shape[i];
        }
        stride_ = Dims == 1 ? 1 : view_.shape[0] > 1 ? view_.strides[0] / int64_t(sizeof(T)) : expected / int64_t(sizeof(T));
        if (view_.shape[0] > 1 && view_.strides[0] % int64_t(sizeof(T)) != 0) release_and_fail(name, "is misaligned");
        if (reinterpret_cast<uintptr_t>(view_.buf) % alignof(T) != 0) release_and_fail(name, "is misaligned");
    }
    ~Array() { PyBuffer_Release(&view_); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;

    T* data() const { return static_cast<T*>(view_.buf); }
    int64_t size(int dimension) const { return view_.shape[dimension]; }
    int64_t stride() const { return stride_; }

private:
    [[noreturn]] static void fail(const char* name, const std::string& what) {
        throw nb::value_error((std::string(name) + " " + what).c_str());
    }
    [[noreturn]] void release_and_fail(const char* name, const std::string& what) {
        PyBuffer_Release(&view_);
        fail(name, what);
    }

    Py_buffer view_;
    int64_t stride_;
};

inline void require(bool condition, const char* message) {
    if (!condition) throw nb::value_error(message);
}

}  // namespace quire
