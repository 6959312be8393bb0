// Sampling of one token for each row, as defined in sampling_reference.py: temperature, min_p, top_k, top_p, then
// the Gumbel-max draw. Linear in the vocabulary: the borders of top_k and top_p are found by counting, not sorting.
#include <math.h>

#include "functions.h"

namespace quire::QUIRE_ISA {

namespace {

constexpr uint32_t kStream = 0x51554952u;
constexpr uint32_t kLastFinite = 0x7f7fffffu;
constexpr int64_t kBins = 2048;
constexpr float kLargestNoise = 22.9f;  // -log(2^-33), rounded up

// A worker's memory for one row.
struct Scratch {
    float* scaled;   // [padded vocabulary], at most 0; -inf where dropped
    float* weights;  // [padded vocabulary]
    double* mass;    // [kBins]
    int64_t* count;  // [kBins]
};

int64_t padded(int64_t vocabulary) { return (vocabulary + 63) / 64 * 64; }

size_t scratch_bytes(int64_t vocabulary) { return padded(vocabulary) * 8 + kBins * 16; }

Scratch scratch_at(void* memory, int64_t vocabulary) {
    float* scaled = static_cast<float*>(memory);
    float* weights = scaled + padded(vocabulary);
    double* mass = reinterpret_cast<double*>(weights + padded(vocabulary));
    return {scaled, weights, mass, reinterpret_cast<int64_t*>(mass + kBins)};
}

float largest(const float* x, int64_t size) {
    Floats best = splat(-__builtin_inff());
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) best = max(load(x + i), best);
    float result = max_lanes(best);
    for (; i < size; ++i) result = x[i] > result ? x[i] : result;
    return result;
}

int32_t first_equal(const float* x, int64_t size, float value) {
    for (int64_t i = 0; i < size; ++i) {
        if (x[i] == value) return static_cast<int32_t>(i);
    }
    return 0;
}

// Numbers at most 0 in descending order have ascending keys; -inf and NaN lie above kLastFinite.
uint32_t key_of(float scaled) {
    uint32_t bits;
    __builtin_memcpy(&bits, &scaled, 4);
    return bits & 0x7fffffffu;
}

// Tokens in the order of their keys are kept while the weight before them is less than the target.
struct Border {
    uint32_t key;   // all with a smaller key are kept,
    int64_t equal;  // and this many of those that have this one, lowest ids first
};

// The weight of each token is weights[i], or 1 if null. The key is found from its upper bits down: each level counts
// the tokens that share the bits found so far by their next bits.
Border find_border(const Scratch& scratch, const float* weights, int64_t vocabulary, double target) {
    constexpr int kShifts[] = {20, 9, 0};
    constexpr int kWidths[] = {11, 11, 9};
    uint32_t prefix = 0;
    double before = 0.0;
    int64_t bin = 0;
    for (int level = 0; level < 3; ++level) {
        const int shift = kShifts[level], width = kWidths[level];
        __builtin_memset(scratch.mass, 0, kBins * sizeof(double));
        __builtin_memset(scratch.count, 0, kBins * sizeof(int64_t));
        for (int64_t i = 0; i < vocabulary; ++i) {
            const uint32_t key = key_of(scratch.scaled[i]);
            if (key > kLastFinite || key >> shift >> width != prefix) continue;
            const uint32_t at = key >> shift & ((1u << width) - 1);
            scratch.mass[at] += weights == nullptr ? 1.0 : weights[i];
            ++scratch.count[at];
        }
        // The last bin in use stands in where rounding kept the sum below the target.
        bin = 0;
        double before_bin = before;
        for (int64_t b = 0; b < int64_t(1) << width; ++b) {
            if (scratch.count[b] == 0) continue;
            bin = b;
            before_bin = before;
            before += scratch.mass[b];
            if (before >= target) break;
        }
        before = before_bin;
        prefix = prefix << width | static_cast<uint32_t>(bin);
    }
    const int64_t count = scratch.count[bin];
    const double weight = count > 0 ? scratch.mass[bin] / count : 0.0;
    int64_t equal = 1;
    while (equal < count && before + equal * weight < target) ++equal;
    return {prefix, equal};
}

void drop_beyond(Border border, float* scaled, int64_t vocabulary) {
    for (int64_t i = 0; i < vocabulary; ++i) {
        const uint32_t key = key_of(scaled[i]);
        if (key > border.key || (key == border.key && border.equal-- <= 0)) scaled[i] = -__builtin_inff();
    }
}

// exp of every kept token, 0 for the others; returns their sum
double weigh(const Scratch& scratch, int64_t vocabulary) {
    double sums[8] = {};
    for (int64_t i = 0; i < padded(vocabulary); i += kLanes) store(scratch.weights + i, exp(load(scratch.scaled + i)));
    for (int64_t i = 0; i < padded(vocabulary); i += 8) {
        for (int j = 0; j < 8; ++j) sums[j] += scratch.weights[i + j];
    }
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// a * m in 64 bits, lane by lane
inline void multiply(Words a, uint32_t m, Words& high, Words& low) {
    low = a * m;
#if defined(__AVX512F__)
    const __m512i wide = (__m512i)a, factor = _mm512_set1_epi64(m);
    const __m512i even = _mm512_mul_epu32(wide, factor);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(wide, 32), factor);
    const __m512i both = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
    high = (Words)both;
#elif defined(__AVX2__)
    const __m256i wide = (__m256i)a, factor = _mm256_set1_epi64x(m);
    const __m256i even = _mm256_mul_epu32(wide, factor);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(wide, 32), factor);
    const __m256i both = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
    high = (Words)both;
#else
    for (int i = 0; i < kLanes; ++i) high[i] = static_cast<uint32_t>(static_cast<uint64_t>(a[i]) * m >> 32);
#endif
}

// Philox4x32-10 for kLanes counters that differ in word 2
inline void philox(Words counter[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        Words high0, low0, high1, low1;
        multiply(counter[0], 0xD2511F53u, high0, low0);
        multiply(counter[2], 0xCD9E8D57u, high1, low1);
        counter[0] = high1 ^ counter[1] ^ key0;
        counter[2] = high0 ^ counter[3] ^ key1;
        counter[1] = low1;
        counter[3] = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

inline Floats gumbel(Words word) {
    const Floats v = min((__builtin_convertvector(word, Floats) + 0.5f) * 0x1p-32f, splat(1.0f - 0x1p-24f));
    return -log(-log_one_minus(v));
}

struct Best {
    float score;
    int64_t token;
};

// Scores of the 4 * kLanes tokens from `first` on, against the best so far.
void score_block(const SampleArgs& args, int64_t row, const float* scaled, int64_t first, Best& best) {
    const uint64_t seed = args.seeds[row], position = static_cast<uint64_t>(args.positions[row]);
    Words index{};
    for (int i = 0; i < kLanes; ++i) index[i] = static_cast<uint32_t>(first / 4 + i);
    Words words[4] = {Words{} + static_cast<uint32_t>(position), Words{} + static_cast<uint32_t>(position >> 32),
                      index, Words{} + kStream};
    philox(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    float noise[4][kLanes];
    for (int lane = 0; lane < 4; ++lane) store(noise[lane], gumbel(words[lane]));
    for (int i = 0; i < 4 * kLanes && first + i < args.vocabulary; ++i) {
        const float s = scaled[first + i];
        const float score = s + noise[i % 4][i / 4];
        const bool better = score > best.score || (score == best.score && first + i < best.token);
        if (s > -__builtin_inff() && better) best = {score, first + i};
    }
}

// The largest logit's block goes first: with its score known, most other blocks cannot win, whatever their noise.
int32_t draw(const SampleArgs& args, int64_t row, const float* scaled) {
    constexpr int64_t kBlock = 4 * kLanes;
    const int64_t likely = first_equal(scaled, args.vocabulary, 0.0f);
    Best best{-__builtin_inff(), likely};
    score_block(args, row, scaled, likely / kBlock * kBlock, best);
    for (int64_t first = 0; first < args.vocabulary; first += kBlock) {
        if (first == likely / kBlock * kBlock) continue;
        Floats top = load(scaled + first);
        for (int64_t i = kLanes; i < kBlock; i += kLanes) top = max(top, load(scaled + first + i));
        if (max_lanes(top) + kLargestNoise >= best.score) score_block(args, row, scaled, first, best);
    }
    return static_cast<int32_t>(best.token);
}

int32_t sample_row(const SampleArgs& args, int64_t row, const Scratch& scratch) {
    const float* logits = args.logits + row * args.stride;
    const int64_t vocabulary = args.vocabulary;
    const float top = largest(logits, vocabulary), temperature = args.temperature[row];
    if (top == -__builtin_inff()) return 0;
    if (temperature == 0.0f) return first_equal(logits, vocabulary, top);
    const float min_p = args.min_p[row];
    const float lowest = min_p > 0.0f ? static_cast<float>(::log(static_cast<double>(min_p))) : -__builtin_inff();
    for (int64_t i = 0; i < vocabulary; ++i) {
        const float s = (logits[i] - top) / temperature;
        scratch.scaled[i] = s >= lowest ? s : -__builtin_inff();
    }
    for (int64_t i = vocabulary; i < padded(vocabulary); ++i) scratch.scaled[i] = -__builtin_inff();
    if (args.top_k[row] > 0 && args.top_k[row] < vocabulary) {
        drop_beyond(find_border(scratch, nullptr, vocabulary, args.top_k[row]), scratch.scaled, vocabulary);
    }
    if (args.top_p[row] < 1.0f) {
        const double target = args.top_p[row] * weigh(scratch, vocabulary);
        drop_beyond(find_border(scratch, scratch.weights, vocabulary, target), scratch.scaled, vocabulary);
    }
    return draw(args, row, scratch.scaled);
}

struct Job {
    const SampleArgs* args;
    ThreadPool* pool;
};

void work(void* context, int64_t row, int worker) {
    const Job& job = *static_cast<const Job*>(context);
    const int64_t vocabulary = job.args->vocabulary;
    void* memory = job.pool->scratch(worker, scratch_bytes(vocabulary));
    job.args->tokens[row] = sample_row(*job.args, row, scratch_at(memory, vocabulary));
}

}  // namespace

void sample(const SampleArgs& args, ThreadPool& pool) {
    Job job{&args, &pool};
    pool.run(args.rows, work, &job);
}

}  // namespace quire::QUIRE_ISA
