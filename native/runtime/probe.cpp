// What the machine can do, for `quire doctor`: a streaming read, and multiplications of operands that are
// loaded from the L1, as any kernel must load them. (Registers alone run faster; no kernel reaches that.)
#include "gemm/amx/tile_config.h"
#include "runtime/simd.h"

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t kPiece = 1 << 20;  // bytes that one item reads
constexpr int64_t kSums = 8;
constexpr int kChains = 14;  // of multiplications with longer latency
constexpr int64_t kRounds = 4096;

void read_item(void* context, int64_t item, int) {
    const ProbeArgs& args = *static_cast<const ProbeArgs*>(context);
    const float* from = reinterpret_cast<const float*>(args.data + item * kPiece);
    const float* const end = reinterpret_cast<const float*>(args.data + smaller(args.bytes, (item + 1) * kPiece));
    Words sums[kSums] = {};
    for (; from + kSums * kLanes <= end; from += kSums * kLanes) {
        __builtin_prefetch(reinterpret_cast<const char*>(from) + 4096);
        __builtin_prefetch(reinterpret_cast<const char*>(from) + 4096 + 64);
        for (int64_t i = 0; i < kSums; ++i) sums[i] |= as_words(load(from + i * kLanes));
    }
    for (int64_t i = 0; i < kSums; ++i) asm volatile("" : : "x"(sums[i]));
}

void float_item(void*, int64_t, int) {
    alignas(64) static const float weights[kSums * kLanes] = {};
    Floats sums[kSums] = {};
    for (int64_t round = 0; round < kRounds; ++round) {
        const float* from = weights;
        asm volatile("" : "+r"(from));  // the compiler cannot know it: loads stay in the loop, sums in registers
        const Floats input = splat(from[0]);
        for (int64_t i = 0; i < kSums; ++i) sums[i] = fma(input, load(from + i * kLanes), sums[i]);
    }
    Floats sum = {};
    for (int64_t i = 0; i < kSums; ++i) sum = sum + sums[i];
    asm volatile("" : : "x"(sum));
}

#if QUIRE_AMX
// Four loads and four multiplications, by all eight tiles: two of inputs by two of weights into four of sums, the most that loads
// can be shared. Or by four: what the kernels use, and faster beside a busy hyper-thread (gemm/amx/tile_config.h).
template <bool Bytes, bool Eight>
void tile_item(void*, int64_t, int) {
    alignas(64) static const uint8_t tiles[4][1024] = {};
    load_config(TileConfig{});
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Eight) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t round = 0; round < kRounds; ++round) {
        if constexpr (Eight) {
            _tile_loadd(4, tiles[0], 64);
            _tile_loadd(5, tiles[1], 64);
            _tile_loadd(6, tiles[2], 64);
            _tile_loadd(7, tiles[3], 64);
            if constexpr (Bytes) {
                _tile_dpbssd(0, 4, 6);
                _tile_dpbssd(1, 4, 7);
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            } else {
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        } else {
            for (int half = 0; half < 2; ++half) {  // three loads for two multiplications
                _tile_loadd(3, tiles[2], 64);
                _tile_loadd(2, tiles[half], 64);
                if constexpr (Bytes) {
                    _tile_dpbssd(0, 2, 3);
                } else {
                    _tile_dpbf16ps(0, 2, 3);
                }
                _tile_loadd(3, tiles[3], 64);
                if constexpr (Bytes) {
                    _tile_dpbssd(1, 2, 3);
                } else {
                    _tile_dpbf16ps(1, 2, 3);
                }
            }
        }
    }
    _tile_release();
}
#elif defined(__AVX512VNNI__)
// Pairs of bfloat16, or quads of bytes, by vectors.
template <bool Bytes>
void vector_item(void*, int64_t, int) {
    alignas(64) static const uint8_t weights[kChains * 64] = {};
    __m512i sums[kChains] = {};
    for (int64_t round = 0; round < kRounds; ++round) {
        const uint8_t* from = weights;
        asm volatile("" : "+r"(from));
        const __m512i input = _mm512_set1_epi32(from[0]);
        for (int64_t i = 0; i < kChains; ++i) {
            const __m512i weight = _mm512_load_si512(from + i * 64);
            if constexpr (Bytes) sums[i] = _mm512_dpbusd_epi32(sums[i], weight, input);
#if QUIRE_TILES
            if constexpr (!Bytes) {
                sums[i] = (__m512i)_mm512_dpbf16_ps((__m512)sums[i], (__m512bh)weight, (__m512bh)input);
            }
#endif
        }
    }
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < kChains; ++i) sum = _mm512_or_si512(sum, sums[i]);
    asm volatile("" : : "x"(sum));
}
#endif

}  // namespace

int64_t probe(const ProbeArgs& args, ThreadPool& pool) {
    constexpr int64_t items_each = 16;
    const int64_t items = items_each * pool.threads();
    ProbeArgs copy = args;
    switch (args.kind) {
        case Probe::read:
            pool.run((args.bytes + kPiece - 1) / kPiece, read_item, &copy);
            return args.bytes;
        case Probe::float32:
            pool.run(items, float_item, nullptr);
            return items * kRounds * kSums * kLanes * 2;
#if QUIRE_AMX
        case Probe::bfloat16:
            pool.run(items, tile_item<false, true>, nullptr);
            return items * kRounds * 4 * 16 * 16 * 32 * 2;
        case Probe::bfloat16_four_tiles:
            pool.run(items, tile_item<false, false>, nullptr);
            return items * kRounds * 4 * 16 * 16 * 32 * 2;
        case Probe::int8:
            pool.run(items, tile_item<true, true>, nullptr);
            return items * kRounds * 4 * 16 * 16 * 64 * 2;
        case Probe::int8_four_tiles:
            pool.run(items, tile_item<true, false>, nullptr);
            return items * kRounds * 4 * 16 * 16 * 64 * 2;
#elif defined(__AVX512VNNI__)
#if QUIRE_TILES
        case Probe::bfloat16:
            pool.run(items, vector_item<false>, nullptr);
            return items * kRounds * kChains * 32 * 2;
#endif
        case Probe::int8:
            pool.run(items, vector_item<true>, nullptr);
            return items * kRounds * kChains * 64 * 2;
#endif
        default:
            return 0;
    }
}

}  // namespace quire::QUIRE_ISA
