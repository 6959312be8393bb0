// exp, log, tanh, Gaussian error on vectors, to float32 accuracy: relative error below 3e-7 (erfc: 3e-7 plus that
// of exp's argument). Coefficients of tanh and erfc are Chebyshev fits made for this file.
#pragma once

#include "runtime/simd.h"

namespace quire::QUIRE_ISA {

// x * 2^n for integers n in [-252, 254]
static inline Floats times_power_of_two(Floats x, Floats n) {
#if defined(__AVX512F__)
    return _mm512_scalef_ps(x, n);
#else
    // in two factors, so that subnormal and infinite results come out right
    const Ints whole = __builtin_convertvector(n, Ints);
    const Ints half = whole >> 1;
    const Floats a = as_floats(((Words)half + 127u) << 23);
    const Ints rest = whole - half;
    const Floats b = as_floats(((Words)rest + 127u) << 23);
    return x * a * b;
#endif
}

// A NaN comes through: a comparison with it is false, and then `max` and `min` take their second argument.
static inline Floats exp(Floats x) {
    const Floats bounded = min(splat(89.0f), max(splat(-104.0f), x));
    // Adding 1.5 * 2^23 rounds to an integer.
    const Floats shift = splat(12582912.0f);
    const Floats n = fma(bounded, splat(1.44269504f), shift) - shift;
    Floats r = fma(n, splat(-0.693145752f), bounded);  // ln 2 in two parts
    r = fma(n, splat(-1.42860677e-6f), r);
    // e^r = 1 + r + r^2 p(r): p is the minimax fit for |r| <= ln 2 / 2, relative error 3e-9
    Floats p = splat(0.00138145f);
    p = fma(p, r, splat(0.00836875f));
    p = fma(p, r, splat(0.04166839f));
    p = fma(p, r, splat(0.1666652f));
    p = fma(p, r, splat(0.49999993f));
    p = fma(p, r, splat(1.0f));
    return times_power_of_two(fma(p, r, splat(1.0f)), n);
}

// 1 / x for x in [2^-125, inf], within 1e-7
static inline Floats reciprocal(Floats x) {
#if defined(__AVX512F__)
    const Floats bounded = min(splat(0x1p125f), x);
    const Floats y = _mm512_rcp14_ps(bounded);
    return fma(y, fma(-bounded, y, splat(1.0f)), y);
#else
    return 1.0f / x;
#endif
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

static inline Floats silu(Floats x) { return x * reciprocal(exp(-x) + 1.0f); }

static inline Floats gelu(Floats x) {
    const Floats tail = 0.5f * erfc((x < 0.0f ? -x : x) * 0.707106781f);
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

// (1 + tanh u) / 2 = 1 / (1 + exp(-2u))
static inline Floats gelu_tanh(Floats x) {
    const Floats u = 0.797884561f * fma(0.044715f * x * x, x, x);
    return x * reciprocal(exp(u * -2.0f) + 1.0f);
}

static inline Floats relu(Floats x) { return x < 0.0f ? 0.0f * x : x; }

}  // namespace quire::QUIRE_ISA
