// Log-probabilities, ranks and the best tokens of raw logits; and the check for rows that are not finite.
#include <math.h>

#include "runtime/vector_math.h"

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t kSumStep = 2048;  // float32 sums of this many terms are added up in float64

float log_sum_exp(const float* x, int64_t size) {
    const float m = largest(x, size);
    double l = 0.0;
    for (int64_t step = 0; step < size; step += kSumStep) {
        const int64_t end = smaller(size, step + kSumStep);
        Floats sum{};
        int64_t i = step;
        for (; i + kLanes <= end; i += kLanes) sum = sum + exp(load(x + i) - m);
        float rest[kLanes];
        for (int j = 0; j < kLanes; ++j) rest[j] = i + j < end ? x[i + j] - m : -__builtin_inff();
        l += sum_lanes(sum + exp(load(rest)));
    }
    return m + static_cast<float>(::log(l));
}

int32_t rank_of(const float* x, int64_t size, float value) {
    Ints above{};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) above -= load(x + i) > value;
    int32_t rank = 1;
    for (int lane = 0; lane < kLanes; ++lane) rank += above[lane];
    for (; i < size; ++i) rank += x[i] > value;
    return rank;
}

// Larger is better: the logit's bits in order, then the lower id. NaN has a place too, so order is total.
uint64_t order_of(float logit, int64_t id) {
    uint32_t bits;
    __builtin_memcpy(&bits, &logit, 4);
    bits = bits == 0x80000000u ? 0 : bits;  // -0 equals +0
    bits ^= bits >> 31 != 0 ? 0xffffffffu : 0x80000000u;
    return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

// The logit of an order.
float logit_of(uint64_t order) {
    uint32_t bits = static_cast<uint32_t>(order >> 32);
    bits ^= bits >> 31 != 0 ? 0x80000000u : 0xffffffffu;
    float logit;
    __builtin_memcpy(&logit, &bits, 4);
    return logit;
}

// Whether all of 4 * kLanes logits are at most `limit`; no NaN is.
bool all_at_most(const float* x, float limit) {
    Ints above{};
    for (int i = 0; i < 4; ++i) above |= ~(Ints)(load(x + i * kLanes) <= limit);
    int any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= above[lane];
    return any == 0;
}

// Puts `value` at the root of a heap whose smallest is at the root.
void sift_down(uint64_t* heap, int64_t size, uint64_t value) {
    int64_t at = 0;
    while (2 * at + 1 < size) {
        int64_t child = 2 * at + 1;
        if (child + 1 < size && heap[child + 1] < heap[child]) ++child;
        if (heap[child] >= value) break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = value;
}

// heap [num_top] becomes the best tokens, best first
void find_best(const float* x, int64_t size, int64_t num_top, uint64_t* heap) {
    __builtin_memset(heap, 0, num_top * sizeof(uint64_t));
    constexpr int64_t kStep = 4 * kLanes;
    for (int64_t first = 0; first < size; first += kStep) {
        // What equals the least of the best so far has a higher id: it comes after it.
        const bool whole = heap[0] != 0 && first + kStep <= size;
        if (whole && all_at_most(x + first, logit_of(heap[0]))) continue;
        for (int64_t i = first; i < smaller(size, first + kStep); ++i) {
            const uint64_t order = order_of(x[i], i);
            if (order > heap[0]) sift_down(heap, num_top, order);
        }
    }
    for (int64_t last = num_top - 1; last > 0; --last) {
        const uint64_t smallest = heap[0];
        sift_down(heap, last, heap[last]);
        heap[last] = smallest;
    }
}

struct Job {
    const LogprobsArgs* args;
    ThreadPool* pool;
};

void work(void* context, int64_t row, int worker) {
    const Job& job = *static_cast<const Job*>(context);
    const LogprobsArgs& args = *job.args;
    const float* logits = args.logits + row * args.stride;
    const float normaliser = log_sum_exp(logits, args.vocabulary);
    const float chosen = logits[args.ids[row]];
    args.chosen[row] = chosen - normaliser;
    args.rank[row] = rank_of(logits, args.vocabulary, chosen);
    if (args.num_top == 0) return;
    uint64_t* heap = static_cast<uint64_t*>(job.pool->scratch(worker, args.num_top * sizeof(uint64_t)));
    find_best(logits, args.vocabulary, args.num_top, heap);
    for (int64_t i = 0; i < args.num_top; ++i) {
        const uint32_t id = 0xffffffffu - static_cast<uint32_t>(heap[i]);
        args.top_ids[row * args.num_top + i] = static_cast<int32_t>(id);
        args.top_logprobs[row * args.num_top + i] = logits[id] - normaliser;
    }
}

void check_row(void* context, int64_t row, int) {
    const FiniteArgs& args = *static_cast<const FiniteArgs*>(context);
    const float* x = args.logits + row * args.stride;
    Ints nonfinite_lanes{}, any_lanes{};
    int64_t i = 0;
    for (; i + kLanes <= args.vocabulary; i += kLanes) {
        const Floats v = load(x + i);
        nonfinite_lanes |= ~(Ints)(v < __builtin_inff());
        any_lanes |= (Ints)(v > -__builtin_inff());
    }
    bool nonfinite = false, any = false;
    for (int lane = 0; lane < kLanes; ++lane) {
        nonfinite |= nonfinite_lanes[lane] != 0;
        any |= any_lanes[lane] != 0;
    }
    for (; i < args.vocabulary; ++i) {
        nonfinite |= !(x[i] < __builtin_inff());
        any |= x[i] > -__builtin_inff();
    }
    args.finite[row] = any && !nonfinite;
}

}  // namespace

void logprobs(const LogprobsArgs& args, ThreadPool& pool) {
    Job job{&args, &pool};
    if (args.rows == 0 || (args.num_top > 0 && !pool.reserve(args.num_top * sizeof(uint64_t)))) return;
    pool.run(args.rows, work, &job);
}

void rows_finite(const FiniteArgs& args, ThreadPool& pool) {
    pool.run(args.rows, check_row, const_cast<FiniteArgs*>(&args));
}

}  // namespace quire::QUIRE_ISA
