// What the machine can do, for `quire bench kernels`: a streaming read, and products of operands that are loaded from
// the L1, as any kernel must load them. (Products of registers alone run faster; no kernel reaches that.)
#include "tile_unit.h"

namespace quire::QUIRE_ISA {

namespace {

constexpr int64_t kPiece = 1 << 20;  // bytes that one item reads
constexpr int64_t kSums = 8;
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
    alignas(64) float weights[kSums * kLanes] = {};
    Floats sums[kSums] = {};
    for (int64_t round = 0; round < kRounds; ++round) {
        asm volatile("" : : "r"(weights) : "memory");
        const Floats input = splat(weights[0]);
        for (int64_t i = 0; i < kSums; ++i) sums[i] = fma(input, load(weights + i * kLanes), sums[i]);
    }
    for (int64_t i = 0; i < kSums; ++i) asm volatile("" : : "x"(sums[i]));
}

#if QUIRE_TILES
// Two tiles of inputs by two of weights, into four of sums: four loads and four products.
template <bool Bytes>
void tile_item(void*, int64_t, int) {
    alignas(64) static const uint8_t tiles[4][1024] = {};
    load_config(TileConfig{});
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t round = 0; round < kRounds; ++round) {
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
    }
    _tile_release();
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
#if QUIRE_TILES
        case Probe::bfloat16:
            pool.run(items, tile_item<false>, nullptr);
            return items * kRounds * 4 * 16 * 16 * 32 * 2;
        case Probe::int8:
            pool.run(items, tile_item<true>, nullptr);
            return items * kRounds * 4 * 16 * 16 * 64 * 2;
#endif
        default:
            return 0;
    }
}

}  // namespace quire::QUIRE_ISA
