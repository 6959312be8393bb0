// Sampling of one token for each row, as defined in sampling_reference.py: temperature, min_p, top_k, top_p, then
// the Gumbel-max sample. Linear in the vocabulary: the borders of top_k and top_p are found by counting, not sorting.
#include <math.h>

#include "runtime/vector_math.h"

namespace quire::QUIRE_ISA {

namespace {

constexpr uint32_t kStream = 0x51554952u;
constexpr uint32_t kLastFinite = 0x7f7fffffu;
constexpr int64_t kBins = 2048;
constexpr float kLargestNoise = 22.9f;  // -log(2^-33), rounded up

constexpr int64_t kBlock = 64;

// A worker's memory for one row.
struct Scratch {
    float* scaled;      // [padded vocabulary], at most 0; -inf where dropped
    float* probabilities;      // [padded vocabulary], not normalized
    uint32_t* keys;     // [padded vocabulary]: of the candidates for a border
    float* key_probabilities; // [padded vocabulary]
    double* mass;       // [kBins]
    int64_t* count;     // [kBins]
};

int64_t padded(int64_t vocabulary) { return (vocabulary + kBlock - 1) / kBlock * kBlock; }

size_t scratch_bytes(int64_t vocabulary) { return padded(vocabulary) * 16 + kBins * 16; }

Scratch scratch_at(void* memory, int64_t vocabulary) {
    const int64_t size = padded(vocabulary);
    float* scaled = static_cast<float*>(memory);
    uint32_t* keys = reinterpret_cast<uint32_t*>(scaled + 2 * size);
    double* mass = reinterpret_cast<double*>(scaled + 4 * size);
    return {scaled, scaled + size, keys, scaled + 3 * size, mass, reinterpret_cast<int64_t*>(mass + kBins)};
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

// Tokens in the order of their keys are kept while the probability before them is less than the target.
struct Border {
    uint32_t key;    // all with a smaller key are kept,
    int64_t equal;   // and this many of those that have this one, lowest ids first
    bool all_equal;  // which are all that have it
};

// The border among `size` keys, each of probabilities[i], or 1 if null. It is found from the upper bits down: each level
// counts the keys that share the bits found so far by their next bits.
Border find_border(const Scratch& scratch, const uint32_t* keys, const float* probabilities, int64_t size,
                   double target) {
    constexpr int kShifts[] = {20, 9, 0};
    constexpr int kWidths[] = {11, 11, 9};
    uint32_t prefix = 0;
    double before = 0.0;
    int64_t bin = 0;
    for (int level = 0; level < 3; ++level) {
        const int shift = kShifts[level], width = kWidths[level];
        __builtin_memset(scratch.mass, 0, kBins * sizeof(double));
        __builtin_memset(scratch.count, 0, kBins * sizeof(int64_t));
        for (int64_t i = 0; i < size; ++i) {
            if (keys[i] >> shift >> width != prefix) continue;
            const uint32_t at = keys[i] >> shift & ((1u << width) - 1);
            scratch.mass[at] += probabilities == nullptr ? 1.0 : probabilities[i];
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
    const double probability = count > 0 ? scratch.mass[bin] / count : 0.0;
    int64_t equal = 1;
    while (equal < count && before + equal * probability < target) ++equal;
    return {prefix, equal, equal >= count};
}

// Copies the keys up to `limit` (`with_probabilities`: these too) to the scratch memory; returns how many.
int64_t collect(const Scratch& scratch, int64_t vocabulary, uint32_t limit, bool with_probabilities) {
    float lowest;
    __builtin_memcpy(&lowest, &limit, 4);
    int64_t count = 0;
    for (int64_t block = 0; block < padded(vocabulary); block += kBlock) {
        if (largest(scratch.scaled + block, kBlock) < -lowest) continue;
        for (int64_t i = block; i < block + kBlock; ++i) {
            const uint32_t key = key_of(scratch.scaled[i]);
            scratch.keys[count] = key;
            if (with_probabilities) scratch.key_probabilities[count] = scratch.probabilities[i];
            count += key <= limit;
        }
    }
    return count;
}

void drop_beyond(Border border, float* scaled, int64_t vocabulary) {
    for (int64_t i = 0; i < vocabulary; ++i) scaled[i] = key_of(scaled[i]) > border.key ? -__builtin_inff() : scaled[i];
    if (border.all_equal) return;
    for (int64_t i = 0; i < vocabulary; ++i) {
        if (key_of(scaled[i]) == border.key && border.equal-- <= 0) scaled[i] = -__builtin_inff();
    }
}

// exp of every kept token, 0 for the others; returns their sum
double exponentiate(const Scratch& scratch, int64_t vocabulary) {
    double sums[8] = {};
    float* const probabilities = scratch.probabilities;
    for (int64_t i = 0; i < padded(vocabulary); i += kLanes) store(probabilities + i, exp(load(scratch.scaled + i)));
    for (int64_t i = 0; i < padded(vocabulary); i += 8) {
        for (int j = 0; j < 8; ++j) sums[j] += probabilities[i + j];
    }
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

void keep_top_k(const Scratch& scratch, int64_t vocabulary, int64_t top_k) {
    // The k-th of the blocks' best tokens is no better than the k-th token: what is worse need not be looked at.
    const int64_t blocks = padded(vocabulary) / kBlock;
    uint32_t limit = kLastFinite;
    if (top_k <= blocks) {
        for (int64_t b = 0; b < blocks; ++b) scratch.keys[b] = key_of(largest(scratch.scaled + b * kBlock, kBlock));
        limit = find_border(scratch, scratch.keys, nullptr, blocks, top_k).key;
        limit = limit < kLastFinite ? limit : kLastFinite;
    }
    const int64_t count = collect(scratch, vocabulary, limit, false);
    drop_beyond(find_border(scratch, scratch.keys, nullptr, count, top_k), scratch.scaled, vocabulary);
}

void keep_top_p(const Scratch& scratch, int64_t vocabulary, double top_p) {
    const double total = exponentiate(scratch, vocabulary);
    // All tokens below (1 - top_p) / vocabulary of the best one's probability together have less than 1 - top_p of the
    // total, which is at least the best one's: none of them is kept. (The 0.01 is for rounding.)
    const double lowest = ::log((1.0 - top_p) / vocabulary) - 0.01;
    const int64_t count = collect(scratch, vocabulary, key_of(static_cast<float>(lowest)), true);
    const Border border = find_border(scratch, scratch.keys, scratch.key_probabilities, count, top_p * total);
    drop_beyond(border, scratch.scaled, vocabulary);
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

// Whether the noise of any word can lift a token from `block_max` to the best score. Noise falls as the word grows, and
// -log(-log1p(-v)) > g needs v < e^-g: the 0.01 is for rounding.
bool can_win(const Words* words, float block_max, float best) {
    const float limit = exp(splat(block_max - best + 0.01f))[0] * 0x1p32f + 2.0f;
    if (!(limit < 0x1p32f)) return true;
    const uint32_t highest = static_cast<uint32_t>(limit);
    Ints low{};
    for (int i = 0; i < 4; ++i) low |= (Ints)(words[i] <= highest);
    int any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= low[lane];
    return any != 0;
}

// Scores of the 4 * kLanes tokens from `first` on, of which the largest is `block_max`, against the best so far.
void score_block(const SampleArgs& args, int64_t row, const float* scaled, int64_t first, float block_max, Best& best) {
    const uint64_t seed = args.seeds[row], position = static_cast<uint64_t>(args.positions[row]);
    Words index{};
    for (int i = 0; i < kLanes; ++i) index[i] = static_cast<uint32_t>(first / 4 + i);
    Words words[4] = {Words{} + static_cast<uint32_t>(position), Words{} + static_cast<uint32_t>(position >> 32),
                      index, Words{} + kStream};
    philox(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    if (!can_win(words, block_max, best.score)) return;
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
int32_t sample_token(const SampleArgs& args, int64_t row, const float* scaled) {
    constexpr int64_t kStep = 4 * kLanes;
    const int64_t likely = first_equal(scaled, args.vocabulary, 0.0f);
    Best best{-__builtin_inff(), likely};
    score_block(args, row, scaled, likely / kStep * kStep, 0.0f, best);
    for (int64_t first = 0; first < args.vocabulary; first += kStep) {
        if (first == likely / kStep * kStep) continue;
        const float block_max = largest(scaled + first, kStep);
        if (block_max + kLargestNoise >= best.score) score_block(args, row, scaled, first, block_max, best);
    }
    return static_cast<int32_t>(best.token);
}

int32_t sample_row(const SampleArgs& args, int64_t row, const Scratch& scratch) {
    const float* logits = args.logits + row * args.stride;
    const int64_t vocabulary = args.vocabulary;
    const float max_logit = largest(logits, vocabulary), temperature = args.temperature[row];
    if (max_logit == -__builtin_inff()) return 0;
    if (temperature == 0.0f) return first_equal(logits, vocabulary, max_logit);
    const float min_p = args.min_p[row];
    const float lowest = min_p > 0.0f ? static_cast<float>(::log(static_cast<double>(min_p))) : -__builtin_inff();
    for (int64_t i = 0; i < vocabulary; ++i) {
        const float s = (logits[i] - max_logit) / temperature;
        scratch.scaled[i] = s >= lowest ? s : -__builtin_inff();
    }
    for (int64_t i = vocabulary; i < padded(vocabulary); ++i) scratch.scaled[i] = -__builtin_inff();
    if (args.top_k[row] > 0 && args.top_k[row] < vocabulary) keep_top_k(scratch, vocabulary, args.top_k[row]);
    if (args.top_p[row] < 1.0f) keep_top_p(scratch, vocabulary, args.top_p[row]);
    return sample_token(args, row, scratch.scaled);
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
    if (args.rows > 0 && pool.reserve(scratch_bytes(args.vocabulary))) pool.run(args.rows, work, &job);
}

}  // namespace quire::QUIRE_ISA
