// The softmax of attention on matrix units (see attention_matrix.h). Scores are in logits times log2 e here: weights
// are powers of two.
#pragma once

#include "attention_matrix_keys.h"

namespace quire::QUIRE_ISA {

constexpr float kLog2e = 1.44269504f;

// 2^x to a relative 1e-4, which is little beside what a weight loses as bfloat16. A minimax polynomial on [0, 1), made
// for this file, of degree 3: every instruction here counts.
struct PowerOfTwo {
    __m512 c3 = constant(0.0780244768f), c2 = constant(0.226067156f);
    __m512 c1 = constant(0.695833504f), c0 = constant(0.999925196f);

    __m512 operator()(__m512 x) const {
        const __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
        const __m512 y = _mm512_fmadd_ps(_mm512_fmadd_ps(_mm512_fmadd_ps(c3, part, c2), part, c1), part, c0);
        return _mm512_scalef_ps(y, x);  // y * 2^floor(x)
    }

    // In a register: compilers would otherwise load it anew in every line of a loop.
    static __m512 constant(float value) {
        __m512 vector = _mm512_set1_ps(value);
        asm("" : "+v"(vector));
        return vector;
    }
};

// Of scores in binary units, exact to float32: for merging.
struct BinaryExponential {
    static constexpr float kUnit = kLog2e;  // of scores, in logits
    static Floats of(Floats x) { return exp(x * 0.693147181f); }
};

struct Largest {
    static __m512 of(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
};

struct Total {
    static __m512 of(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
};

// Lane i is the largest, or the sum, of the lanes of rows[i]: each step joins two vectors and halves what is left of a
// row.
template <class Operation>
inline __m512 across_rows(__m512* rows) {
    const auto quarters = [](__m512 a, __m512 b) {
        return Operation::of(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const auto alternate_quarters = [](__m512 a, __m512 b) {
        return Operation::of(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    for (int i = 0; i < 4; ++i) {
        rows[i] = alternate_quarters(quarters(rows[i], rows[i + 4]), quarters(rows[i + 8], rows[i + 12]));
    }
    __m512 halves[2];
    for (int i = 0; i < 2; ++i) {
        const __m512 a = rows[2 * i], b = rows[2 * i + 1];
        halves[i] = Operation::of(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    return Operation::of(_mm512_shuffle_ps(halves[0], halves[1], 0x88),
                         _mm512_shuffle_ps(halves[0], halves[1], 0xdd));
}

// The softmax of sixteen queries over one split. Totals are kept by lane and summed when it ends.
struct alignas(64) MatrixState {
    float tops[16];
    float sums[16];
    float totals[16][16];
    float* mixed;  // [value_dim / 16][16 queries][16]

    void clear() {
        for (float& top : tops) top = -__builtin_inff();
        clear_totals();
    }

    void clear_totals() { __builtin_memset(totals, 0, sizeof totals); }

    // Those of the first `rows` queries that have no top yet.
    __mmask16 lacking(int64_t rows) const {
        const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
        return _mm512_mask_cmp_ps_mask(static_cast<__mmask16>((1u << rows) - 1), _mm512_load_ps(tops), lowest, _CMP_EQ_OQ);
    }

    void raise(__mmask16 which, __m512 largest, float unit) {
        const __m512 before = _mm512_load_ps(tops);
        const __m512 after = _mm512_max_ps(before, _mm512_mul_ps(largest, _mm512_set1_ps(unit)));
        _mm512_store_ps(tops, _mm512_mask_mov_ps(before, which, after));
    }

    // Returns which of the first `rows` sums exceed the limit.
    __mmask16 sum_up(int64_t rows, float limit) {
        __m512 lanes[16];
        for (int row = 0; row < 16; ++row) lanes[row] = _mm512_load_ps(totals[row]);
        const __m512 sum = across_rows<Total>(lanes);
        _mm512_store_ps(sums, sum);
        return _mm512_mask_cmp_ps_mask(static_cast<__mmask16>((1u << rows) - 1), sum, _mm512_set1_ps(limit), _CMP_GT_OQ);
    }
};

// The same over the splits before.
struct alignas(64) MatrixTotal {
    float tops[16];
    float totals[16];
    float* mixed;
    bool empty;

    void add(const MatrixState& split, int64_t value_dim) {
        const Floats sums = load(split.sums);
        if (empty) {
            store(tops, sums != 0.0f ? load(split.tops) : splat(-__builtin_inff()));
            store(totals, sums);
            __builtin_memcpy(mixed, split.mixed, value_dim * 16 * sizeof(float));
            empty = false;
            return;
        }
        const Merge<BinaryExponential> merge(load(tops), load(split.tops), sums);
        store(tops, merge.top);
        store(totals, load(totals) * merge.factor_a + sums * merge.factor_b);
        alignas(64) float factors[2][16];
        store(factors[0], merge.factor_a);
        store(factors[1], merge.factor_b);
        for (int64_t at = 0; at < value_dim * 16; at += 16) {
            const __m512 a = _mm512_set1_ps(factors[0][at / 16 % 16]), b = _mm512_set1_ps(factors[1][at / 16 % 16]);
            const __m512 before = _mm512_mul_ps(_mm512_load_ps(mixed + at), a);
            _mm512_store_ps(mixed + at, _mm512_add_ps(before, _mm512_mul_ps(_mm512_load_ps(split.mixed + at), b)));
        }
    }
};

// scores [4][16][16] of `rows` queries: row r of quarter v
inline __m512 scores_at(const float* scores, int quarter, int64_t row) {
    return _mm512_loadu_ps(scores + quarter * 256 + row * 16);
}

// The largest score of each query; only those in `visible[row]` count where `visible` is given.
inline __m512 largest_scores(const float* scores, int64_t rows, const uint64_t* visible) {
    const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
    __m512 largest[16];
    for (int64_t row = 0; row < 16; ++row) {
        if (row >= rows) {
            largest[row] = lowest;
            continue;
        }
        const uint64_t seen = visible == nullptr ? ~uint64_t{0} : visible[row];
        __m512 s[4];
        for (int v = 0; v < 4; ++v) {
            s[v] = _mm512_mask_mov_ps(lowest, static_cast<__mmask16>(seen >> 16 * v), scores_at(scores, v, row));
        }
        largest[row] = _mm512_max_ps(_mm512_max_ps(s[0], s[1]), _mm512_max_ps(s[2], s[3]));
    }
    return across_rows<Largest>(largest);
}

// Weights 2^(unit score - top), as bfloat16 [2][16][32]; totals grow by them.
template <bool Masked>
void weigh(const float* scores, int64_t rows, const uint64_t* visible, float unit, MatrixState& state,
           uint16_t* weights) {
    const PowerOfTwo power;
    const __m512 units = PowerOfTwo::constant(unit), lowest = _mm512_set1_ps(-__builtin_inff());
    for (int64_t row = 0; row < rows; ++row) {
        const __m512 top = _mm512_set1_ps(state.tops[row]);
        __m512 w[4];
        for (int v = 0; v < 4; ++v) {
            __m512 x = _mm512_fmsub_ps(scores_at(scores, v, row), units, top);
            if (Masked) x = _mm512_mask_mov_ps(lowest, static_cast<__mmask16>(visible[row] >> 16 * v), x);
            w[v] = power(x);
        }
        const __m512 sum = _mm512_add_ps(_mm512_add_ps(w[0], w[1]), _mm512_add_ps(w[2], w[3]));
        _mm512_storeu_ps(state.totals[row], _mm512_add_ps(_mm512_loadu_ps(state.totals[row]), sum));
        for (int half = 0; half < 2; ++half) {
            const __m512bh pair = _mm512_cvtne2ps_pbh(w[2 * half + 1], w[2 * half]);
            _mm512_storeu_si512(weights + half * 512 + row * 32, (__m512i)pair);
        }
    }
}

}  // namespace quire::QUIRE_ISA
