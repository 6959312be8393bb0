// The tile configuration of AMX, and how a GEMM is partitioned into work items.
//
// Few registers are used at a time: while a neighbour keeps the core busy, a loop over all eight takes more than twice as long
// as one that multiplies as often with four, as if both threads renamed them from one small store (docs/design/amx.md).
#pragma once

#include "gemm/amx/bfloat16.h"
#include "runtime/simd.h"

namespace quire::QUIRE_ISA {

// Runs of panels that shrink towards the end: long enough to stream, and no thread waits long for the last one. `groups`
// items of other rows share a run: where they are many they even things out. One thread never waits. Returns the number of
// runs.
static inline int64_t divide_panels(int64_t panels, int64_t longest, int64_t groups, int threads, int32_t* borders) {
    int64_t runs = 0;
    borders[0] = 0;
    for (int64_t first = 0; first < panels;) {
        const int64_t left = panels - first, share = threads == 1 ? left : left * groups / (2 * threads);
        first += larger(1, smaller(smaller(share, longest), left));
        borders[++runs] = static_cast<int32_t>(first);
    }
    return runs;
}

#if QUIRE_AMX
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static inline void load_config(const TileConfig& config) {
    asm volatile("" : : "r"(&config) : "memory");  // the intrinsic of gcc 12 tells the compiler of 8 bytes only
    _tile_loadconfig(&config);
}
#endif

}  // namespace quire::QUIRE_ISA
