// The floating-point state that every operation computes in, whatever the caller's thread has set: rounds to nearest,
// keeps subnormals, traps nothing. The same operation has the same bits in every thread.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace quire {

// While this lives the calling thread is in that state; then in its own again. Two instructions where it is already.
class FloatMode {
public:
    FloatMode() : own_(read()) {
        if ((own_ & kControls) != kDefault) write(kDefault);
    }
    ~FloatMode() {
        if ((own_ & kControls) != kDefault) write(own_);
    }
    FloatMode(const FloatMode&) = delete;
    FloatMode& operator=(const FloatMode&) = delete;

private:
#if defined(__x86_64__)
    // MXCSR: the low six bits only say what has happened.
    static constexpr uint64_t kControls = 0xffc0, kDefault = 0x1f80;

    static uint64_t read() { return _mm_getcsr(); }
    static void write(uint64_t state) { _mm_setcsr(static_cast<unsigned>(state)); }
#elif defined(__aarch64__)
    // FPCR: all bits that are defined control, and 0 is the default of each.
    static constexpr uint64_t kControls = ~uint64_t{0}, kDefault = 0;

    static uint64_t read() {
        uint64_t state;
        asm volatile("mrs %0, fpcr" : "=r"(state));
        return state;
    }
    static void write(uint64_t state) { asm volatile("msr fpcr, %0" : : "r"(state)); }
#else
    static constexpr uint64_t kControls = 0, kDefault = 0;

    static uint64_t read() { return 0; }
    static void write(uint64_t) {}
#endif

    const uint64_t own_;
};

}  // namespace quire
