// The tile configuration of AMX.
//
// Few registers are used at a time: while a neighbour keeps the core busy, a loop over all eight takes more than twice as long
// as one that multiplies as often with four, as if both threads renamed them from one small store (docs/design/amx.md).
#pragma once

#include "gemm/linear.h"

#if QUIRE_AMX
#include <immintrin.h>

namespace quire::QUIRE_ISA {

// What `ldtilecfg` reads: eight whole tiles unless said otherwise.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static inline void load_config(const TileConfig& config) {
    asm volatile("" : : "r"(&config) : "memory");  // the intrinsic of gcc 12 tells the compiler of 8 bytes only
    _tile_loadconfig(&config);
}

}  // namespace quire::QUIRE_ISA
#endif
