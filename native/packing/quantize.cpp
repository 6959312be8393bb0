// Round to nearest: rows of weights to small integers and scales; the definition is ops/quantize_reference.py, bit for
// bit. Sums run in sixteen lanes on every instruction set and are folded in halves, so all give the same weights.
#include "runtime/simd.h"

namespace quire::QUIRE_ISA {

namespace {

constexpr int kWide = 16;
typedef float Wide __attribute__((vector_size(kWide * 4)));
typedef int32_t WideInts __attribute__((vector_size(kWide * 4)));
typedef int8_t WideBytes __attribute__((vector_size(kWide)));

constexpr float kDivisors[] = {6.5f, 7.0f, 7.5f, 8.0f, 8.5f};
constexpr float kShares[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f};
constexpr float kLargest = 1e17f;  // squares of more, summed over a group, are beyond float32
constexpr float kSmallest = 1e-30f;  // weights below are taken for zero: their scale has no reciprocal

inline Wide load_wide(const float* p) {
    Wide v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class Operation>
inline float fold(Wide v) {
#if defined(__AVX512F__)
    return across_lanes<Operation>(v);
#else
    float lanes[kWide];
    __builtin_memcpy(lanes, &v, sizeof v);
    for (int width = kWide / 2; width > kLanes; width /= 2) {
        for (int i = 0; i < width; ++i) lanes[i] = Operation::of(lanes[i], lanes[i + width]);
    }
    return across_lanes<Operation>(Operation::of(load(lanes), load(lanes + kLanes)));
#endif
}

inline Wide wide(float value) { return value - Wide{}; }
#if defined(__AVX512F__)  // gcc takes two instructions for the other form
inline Wide at_least(Wide a, Wide b) { return _mm512_max_ps(a, b); }
inline Wide at_most(Wide a, Wide b) { return _mm512_min_ps(a, b); }
#else
inline Wide at_least(Wide a, Wide b) { return a > b ? a : b; }
inline Wide at_most(Wide a, Wide b) { return a < b ? a : b; }
#endif

// To the nearest integer, ties to even: |v| is far below 2^22.
inline Wide rounded(Wide v) {
    const Wide shift = wide(12582912.0f);
    return v + shift - shift;
}

inline void store_bytes(Wide v, int8_t* to) {
    const WideBytes bytes = __builtin_convertvector(__builtin_convertvector(v, WideInts), WideBytes);
    __builtin_memcpy(to, &bytes, sizeof bytes);
}

// The largest and the smallest of x[0, padded) with zeros past its end; whether all are finite.
struct Range {
    float most, least;
    bool finite;
};

Range range_of(const float* x, int64_t padded) {
    Wide most = {}, least = {};
    WideInts strange = {};
    for (int64_t i = 0; i < padded; i += kWide) {
        const Wide v = load_wide(x + i);
        most = at_least(v, most);
        least = at_most(v, least);
        strange |= ~(v - v == Wide{});
    }
    bool finite = true;
    for (int i = 0; i < kWide; ++i) finite = finite && strange[i] == 0;
    return {fold<Max>(most), -fold<Max>(-least), finite};
}

void eight_bits(const float* x, int64_t padded, bool e4m3, const Range& range, int8_t* values, float* scale) {
    const float largest = range.most > -range.least ? range.most : -range.least, qmax = e4m3 ? 448.0f : 127.0f;
    const bool none = largest < kSmallest;
    *scale = none ? 0.0f : largest / qmax;
    const Wide inverse = wide(none ? 0.0f : 1.0f / *scale);
    const Wide limit = wide(qmax);
    for (int64_t i = 0; i < padded; i += kWide) {
        const Wide v = load_wide(x + i) * inverse, within = at_most(at_least(e4m3 ? v : rounded(v), -limit), limit);
        if (!e4m3) {
            store_bytes(within, values + i);
            continue;
        }
        E4M3* const numbers = reinterpret_cast<E4M3*>(values + i);
        for (int lane = 0; lane < kWide; ++lane) round_to(within[lane], numbers + lane);
    }
}

inline Wide four_bits(Wide unit, float divisor) {
    return at_most(at_least(rounded(unit * wide(-divisor)), wide(-8.0f)), wide(7.0f));
}

// The weight of largest magnitude becomes about -8; of a few divisors the one whose integers, with the scale of least
// squares for them, leave the smallest error. Weights are first divided by that largest one, so no sum can underflow.
template <int N>  // vectors of the group
void group(const float* x, int8_t* values, float* scale) {
    const Range range = range_of(x, N * kWide);
    const float extreme = range.most > -range.least ? range.most : range.least;
    if ((extreme < 0.0f ? -extreme : extreme) < kSmallest) {
        *scale = 0.0f;
        __builtin_memset(values, 0, N * kWide);
        return;
    }
    Wide unit[N];
    for (int i = 0; i < N; ++i) unit[i] = load_wide(x + i * kWide) * wide(1.0f / extreme);
    float best_gain = -1.0f, best_divisor = 0.0f, best_scale = 0.0f;
    for (const float divisor : kDivisors) {
        Wide crosses = {}, squares = {};
        for (int i = 0; i < N; ++i) {
            const Wide q = four_bits(unit[i], divisor);
            crosses = crosses + unit[i] * q;
            squares = squares + q * q;
        }
        const float cross = fold<Sum>(crosses), square = fold<Sum>(squares);  // some q is -6 or less
        const float gain = cross * cross / square;
        const bool better = gain > best_gain;
        best_scale = better ? cross / square : best_scale;
        best_divisor = better ? divisor : best_divisor;
        best_gain = better ? gain : best_gain;
    }
    *scale = best_scale * extreme;
    for (int i = 0; i < N; ++i) store_bytes(four_bits(unit[i], best_divisor), values + i * kWide);
}

// Which lanes of a group are weights, as 1 and 0, and how many.
template <int N>
struct Places {
    Wide there[N];
    float count;

    explicit Places(int64_t weights) : count(static_cast<float>(weights)) {
        for (int i = 0; i < N * kWide; ++i) there[i / kWide][i % kWide] = i < weights ? 1.0f : 0.0f;
    }
};

inline Wide above(Wide x, float minimum, float inverse) {
    return at_most(at_least(rounded((x - wide(minimum)) * wide(inverse)), Wide{}), wide(15.0f));
}

inline float inverse_of(float step) { return (step < 0.0f ? -step : step) < kSmallest ? 0.0f : 1.0f / step; }

inline float stored(float x, bool half) {
    if (!half) return x;
    Float16 y;
    round_to(x, &y);
    return to_float(y);
}

// Shares of the group's range in 15 steps, each with the scale and the minimum of least squares for its numbers; sums are over
// what a weight has beyond the least one. The minimum is stored first and the scale fitted to it. Infinite where it cannot be.
template <int N>
void group_with_minimum(const float* x, const Places<N>& places, bool half, int8_t* values, float* scale, float* minimum) {
    Wide low = load_wide(x), high = low, beyond[N], totals = {};
    for (int i = 1; i < N; ++i) {
        low = at_most(load_wide(x + i * kWide), low);
        high = at_least(load_wide(x + i * kWide), high);
    }
    const float least = -fold<Max>(-low), most = fold<Max>(high), span = most - least, count = places.count;
    for (int i = 0; i < N; ++i) {
        beyond[i] = (load_wide(x + i * kWide) - wide(least)) * places.there[i];
        totals = totals + beyond[i];
    }
    const float total = fold<Sum>(totals);
    float best_gain = 0.0f, best_minimum = total / count, best_cross = 0.0f, best_of_q = 0.0f, best_square = 1.0f;
    for (const float share : kShares) {
        const float inverse = inverse_of(span < kSmallest ? 0.0f : span * share / 15.0f);
        const float start = (span - span * share) * 0.5f;
        Wide numbers = {}, squares = {}, crosses = {};
        for (int i = 0; i < N; ++i) {
            const Wide q = above(beyond[i], start, inverse) * places.there[i];
            numbers = numbers + q;
            squares = squares + q * q;
            crosses = crosses + q * beyond[i];
        }
        const float of_q = fold<Sum>(numbers), square = fold<Sum>(squares), cross = fold<Sum>(crosses);
        const float spread = square * count - of_q * of_q;
        const float fitted = spread < 0.5f ? 0.0f : (cross * count - of_q * total) / spread;
        const float gain = fitted * (cross - of_q * total / count);
        if (!(gain > best_gain)) continue;
        best_gain = gain;
        best_minimum = (total - fitted * of_q) / count;
        best_cross = cross, best_of_q = of_q, best_square = square;
    }
    *minimum = stored(least + best_minimum, half);
    *scale = stored((best_cross - (*minimum - least) * best_of_q) / (best_square > 1.0f ? best_square : 1.0f), half);
    if (*scale == 0.0f) *minimum = stored(least + total / count, half);
    if (most > kLargest || least < -kLargest) *scale = __builtin_inff();
    const float inverse = inverse_of(*scale);
    for (int i = 0; i < N; ++i) store_bytes(above(load_wide(x + i * kWide), *minimum, inverse), values + i * kWide);
}

template <int N>
void row_with_minima(const float* x, int64_t in, bool half, int8_t* values, float* scales, float* minima) {
    const int64_t size = N * kWide;
    const Places<N> whole(size), rest((in - 1) % size + 1);
    for (int64_t first = 0; first < in; first += size, ++scales, ++minima) {
        group_with_minimum<N>(x + first, first + size <= in ? whole : rest, half, values + first, scales, minima);
    }
}

template <class Item>
void to_floats(const void* weight, int64_t in, float* to) {
    const Item* const from = static_cast<const Item*>(weight);
    int64_t i = 0;
    for (; i + kLanes <= in; i += kLanes) store(to + i, load(from + i));
    for (; i < in; ++i) to[i] = to_float(from[i]);
}

}  // namespace

bool quantize_row(const QuantizeArgs& args, const void* weight, int8_t* values, float* scales, void* scratch) {
    const int64_t in = args.in, padded = args.padded();
    if (in == 0) return true;  // and no scale
    float* const x = static_cast<float*>(scratch);
    int8_t* const bytes = reinterpret_cast<int8_t*>(x + padded);
    const auto convert = args.storage == Storage::bfloat16  ? to_floats<BFloat16>
                         : args.storage == Storage::float16 ? to_floats<Float16>
                                                            : to_floats<float>;
    convert(weight, in, x);
    for (int64_t i = in; i < padded; ++i) x[i] = args.has_minima() ? x[in - 1] : 0.0f;
    if (!range_of(x, padded).finite) return false;
    if (args.has_minima()) {
        const auto round_row = args.group_size == 16   ? row_with_minima<1>
                               : args.group_size == 32 ? row_with_minima<2>
                               : args.group_size == 64 ? row_with_minima<4>
                                                       : row_with_minima<8>;
        round_row(x, in, args.rounding == Rounding::int4_min_half, bytes, scales, scales + args.groups());
    } else if (args.rounding != Rounding::int4) {
        const int64_t size = args.whole() ? padded : args.group_size;
        for (int64_t first = 0; first < padded; first += size) {
            const Range range = range_of(x + first, size);
            eight_bits(x + first, size, args.rounding == Rounding::e4m3, range, bytes + first, scales + first / size);
        }
    } else {
        const auto round_group = args.group_size == 32 ? group<2> : args.group_size == 64 ? group<4> : group<8>;
        for (int64_t first = 0; first < padded; first += args.group_size) {
            round_group(x + first, bytes + first, scales + first / args.group_size);
        }
    }
    __builtin_memcpy(values, bytes, in);
    return true;
}

}  // namespace quire::QUIRE_ISA
