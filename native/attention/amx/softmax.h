// The softmax of attention on AMX (see attention.h). Scores are in logits times log2 e here: P holds powers of two.
#pragma once

#include "attention/amx/keys.h"

namespace quire::QUIRE_ISA {

constexpr float kLog2e = 1.44269504f;

// 2^x to a relative 1e-4, which is little beside what P loses as bfloat16. A minimax polynomial on [0, 1), made
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
    static constexpr float kUnit = kLog2e;  // a logit, in scores
    static Floats of(Floats x) { return exp(x * 0.693147181f); }
};

struct RowMax {
    static __m512 of(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
};

struct RowSum {
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

// The softmax of sixteen queries over one KV split. The row sum is kept by lane and folded when the split ends.
struct alignas(64) AmxSoftmaxState {
    float m[16];
    float l[16];
    float l_lanes[16][16];
    float* acc;  // [value_dim / 16][16 queries][16]

    void clear() {
        for (float& row_max : m) row_max = -__builtin_inff();
        clear_l();
    }

    void clear_l() { __builtin_memset(l_lanes, 0, sizeof l_lanes); }

    // Those of the first `rows` queries that have no row max yet.
    __mmask16 without_max(int64_t rows) const {
        const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
        return _mm512_mask_cmp_ps_mask(static_cast<__mmask16>((1u << rows) - 1), _mm512_load_ps(m), lowest, _CMP_EQ_OQ);
    }

    // Moves m of those queries to the row max of one more chunk.
    void rescale(__mmask16 which, __m512 largest, float scale_log2) {
        const __m512 before = _mm512_load_ps(m);
        const __m512 after = _mm512_max_ps(before, _mm512_mul_ps(largest, _mm512_set1_ps(scale_log2)));
        _mm512_store_ps(m, _mm512_mask_mov_ps(before, which, after));
    }

    // Folds the row sums; returns which of the first `rows` exceed the limit.
    __mmask16 sum_up(int64_t rows, float limit) {
        __m512 lanes[16];
        for (int row = 0; row < 16; ++row) lanes[row] = _mm512_load_ps(l_lanes[row]);
        const __m512 sum = across_rows<RowSum>(lanes);
        _mm512_store_ps(l, sum);
        return _mm512_mask_cmp_ps_mask(static_cast<__mmask16>((1u << rows) - 1), sum, _mm512_set1_ps(limit), _CMP_GT_OQ);
    }
};

// The same over the splits before.
struct alignas(64) AmxRunningSoftmax {
    float m[16];
    float l[16];
    float* acc;
    bool empty;

    void add(const AmxSoftmaxState& split, int64_t value_dim) {
        const Floats split_l = load(split.l);
        if (empty) {
            store(m, split_l != 0.0f ? load(split.m) : splat(-__builtin_inff()));
            store(l, split_l);
            __builtin_memcpy(acc, split.acc, value_dim * 16 * sizeof(float));
            empty = false;
            return;
        }
        const Merge<BinaryExponential> merge(load(m), load(split.m), split_l);
        store(m, merge.m);
        store(l, load(l) * merge.factor_a + split_l * merge.factor_b);
        alignas(64) float factors[2][16];
        store(factors[0], merge.factor_a);
        store(factors[1], merge.factor_b);
        for (int64_t at = 0; at < value_dim * 16; at += 16) {
            const __m512 a = _mm512_set1_ps(factors[0][at / 16 % 16]), b = _mm512_set1_ps(factors[1][at / 16 % 16]);
            const __m512 before = _mm512_mul_ps(_mm512_load_ps(acc + at), a);
            _mm512_store_ps(acc + at, _mm512_add_ps(before, _mm512_mul_ps(_mm512_load_ps(split.acc + at), b)));
        }
    }
};

// scores [4][16][16] of `rows` queries: row r of quarter v
inline __m512 scores_at(const float* scores, int quarter, int64_t row) {
    return _mm512_loadu_ps(scores + quarter * 256 + row * 16);
}

// The largest score of each query; only those in `visible[row]` count where `visible` is given.
inline __m512 row_max(const float* scores, int64_t rows, const uint64_t* visible) {
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
    return across_rows<RowMax>(largest);
}

// P = 2^(scale_log2 S - m), as bfloat16 [2][16][32]; l grows by its row sum.
template <bool Masked>
void compute_probabilities(const float* scores, int64_t rows, const uint64_t* visible, float scale_log2,
                           AmxSoftmaxState& state, uint16_t* probabilities) {
    const PowerOfTwo power;
    const __m512 scales = PowerOfTwo::constant(scale_log2), lowest = _mm512_set1_ps(-__builtin_inff());
    for (int64_t row = 0; row < rows; ++row) {
        const __m512 m = _mm512_set1_ps(state.m[row]);
        __m512 p[4];
        for (int v = 0; v < 4; ++v) {
            __m512 x = _mm512_fmsub_ps(scores_at(scores, v, row), scales, m);
            if (Masked) x = _mm512_mask_mov_ps(lowest, static_cast<__mmask16>(visible[row] >> 16 * v), x);
            p[v] = power(x);
        }
        const __m512 sum = _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
        _mm512_storeu_ps(state.l_lanes[row], _mm512_add_ps(_mm512_loadu_ps(state.l_lanes[row]), sum));
        for (int half = 0; half < 2; ++half) {
            const __m512bh pair = _mm512_cvtne2ps_pbh(p[2 * half + 1], p[2 * half]);
            _mm512_storeu_si512(probabilities + half * 512 + row * 32, (__m512i)pair);
        }
    }
}

}  // namespace quire::QUIRE_ISA
