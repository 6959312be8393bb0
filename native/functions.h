// exp, log, tanh, Gaussian error on vectors, to float32 accuracy: relative error below 3e-7 (erfc: 3e-7 plus that
// of exp's argument). Coefficients of tanh and erfc are Chebyshev fits made for this file.
#pragma once

#include "simd.h"

namespace quire::QUIRE_ISA {

// 2^n for n in [-252, 254], in two factors so that subnormal and infinite results come out right.
static inline Floats times_power_of_two(Floats x, Ints n) {
    const Ints half = n >> 1;
    const Floats a = as_floats(((Words)half + 127u) << 23);
    const Ints rest = n - half;
    const Floats b = as_floats(((Words)rest + 127u) << 23);
    return x * a * b;
}

static inline Floats exp(Floats x) {
    const Floats bounded = min(max(x, splat(-104.0f)), splat(89.0f));
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    const Floats shift = splat(12582912.0f);
    const Floats shifted = fma(bounded, splat(1.44269504f), shift);
    const Floats n = shifted - shift;
    const Words low = as_words(shifted) - as_words(shift);
    Floats r = fma(n, splat(-0.693145752f), bounded);  // ln 2 in two parts
    r = fma(n, splat(-1.42860677e-6f), r);
    Floats y = splat(1.0f / 5040);
    y = fma(y, r, splat(1.0f / 720));
    y = fma(y, r, splat(1.0f / 120));
    y = fma(y, r, splat(1.0f / 24));
    y = fma(y, r, splat(1.0f / 6));
    y = fma(y, r, splat(0.5f));
    y = fma(y, r, splat(1.0f));
    y = fma(y, r, splat(1.0f));
    y = times_power_of_two(y, (Ints)low);
    return x != x ? x : y;
}

// log(m 2^n) with m = 1 + f, from s = f / (2 + f): log m = 2 (s + s^3/3 + s^5/5 + ...).
static inline Floats log_of_parts(Floats f, Floats n) {
    const Floats s = f / (f + 2.0f);
    const Floats u = s * s;
    Floats y = splat(2.0f / 9);
    y = fma(y, u, splat(2.0f / 7));
    y = fma(y, u, splat(2.0f / 5));
    y = fma(y, u, splat(2.0f / 3));
    y = fma(y * u, s, s + s);
    return fma(n, splat(0.693145752f), fma(n, splat(1.42860677e-6f), y));
}

// n with x / 2^n in [sqrt(1/2), sqrt(2)), for positive normal x
static inline Ints exponent_of(Floats x) {
    const Words n = (as_words(x) - 0x3f3504f3u) >> 23;  // counted from sqrt(1/2); wraps below it
    const Ints count = (Ints)n;
    return count > 255 ? count - 512 : count;
}

static inline Floats log(Floats x) {
    const Ints n = exponent_of(x);
    const Words fraction = as_words(x) - ((Words)n << 23);
    return log_of_parts(as_floats(fraction) - 1.0f, __builtin_convertvector(n, Floats));
}

// log(1 - v) for v in [2^-33, 1 - 2^-24]; exact in v where 1 - v would round it away
static inline Floats log_one_minus(Floats v) {
    const Floats x = 1.0f - v;
    const Ints n = exponent_of(x);
    const Words fraction = as_words(x) - ((Words)n << 23);
    const Floats f = n == 0 ? -v : as_floats(fraction) - 1.0f;
    return log_of_parts(f, __builtin_convertvector(n, Floats));
}

static inline Floats tanh(Floats x) {
    const Floats u = x * x;
    Floats small = splat(-0.00621422706f);
    small = fma(small, u, splat(0.0210809354f));
    small = fma(small, u, splat(-0.0538692735f));
    small = fma(small, u, splat(0.133328959f));
    small = fma(small, u, splat(-0.333333313f));
    small = fma(small * u, x, x);
    const Floats magnitude = x < 0.0f ? -x : x;
    const Floats large = 1.0f - 2.0f / (exp(magnitude + magnitude) + 1.0f);
    return magnitude < 0.625f || x != x ? small : (x < 0.0f ? -large : large);
}

// erfc(z) for z >= 0: t exp(-z^2 + Q(t)), t = 1 / (1 + z/2)
static inline Floats erfc(Floats z) {
    const Floats t = 1.0f / fma(z, splat(0.5f), splat(1.0f));
    Floats q = splat(0.148791149f);
    q = fma(q, t, splat(-0.701847255f));
    q = fma(q, t, splat(1.20616949f));
    q = fma(q, t, splat(-0.761984169f));
    q = fma(q, t, splat(-0.0259946827f));
    q = fma(q, t, splat(-0.0275120921f));
    q = fma(q, t, splat(0.0443623438f));
    q = fma(q, t, splat(0.384606361f));
    q = fma(q, t, splat(0.998868406f));
    q = fma(q, t, splat(-1.26545954f));
    return t * exp(q - z * z);
}

static inline Floats silu(Floats x) { return x / (exp(-x) + 1.0f); }

static inline Floats gelu(Floats x) {
    const Floats tail = 0.5f * erfc((x < 0.0f ? -x : x) * 0.707106781f);
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

// (1 + tanh u) / 2 = 1 / (1 + exp(-2u))
static inline Floats gelu_tanh(Floats x) {
    const Floats u = 0.797884561f * fma(0.044715f * x * x, x, x);
    return x / (exp(u * -2.0f) + 1.0f);
}

static inline Floats relu(Floats x) { return x < 0.0f ? 0.0f * x : x; }

}  // namespace quire::QUIRE_ISA
