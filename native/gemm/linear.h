// The kernels of `linear`, by the layout of the weight and the instruction set that this file is compiled for.
#pragma once

#include "kernels.h"

#if defined(__AVX512BF16__)
#define QUIRE_TILES 1
#else
#define QUIRE_TILES 0
#endif
#if defined(__AMX_TILE__) && QUIRE_TILES
#define QUIRE_AMX 1
#else
#define QUIRE_AMX 0
#endif

namespace quire::QUIRE_ISA {

constexpr Layout kBFloat16Layout = QUIRE_TILES ? Layout::tiles : Layout::panels;

void linear_float32(const LinearArgs& args, ThreadPool& pool);  // weights in panels, of any dtype
#if QUIRE_TILES
void linear_bfloat16(const LinearArgs& args, ThreadPool& pool);  // weights in tiles
#endif
#if defined(__AVX512VNNI__)
// The most rows whose sums linear_int8_vnni holds in registers.
static inline int64_t vnni_rows(const Panels& weight) { return weight.qmax > 127 ? 4 : 6; }
void linear_int8_vnni(const LinearArgs& args, ThreadPool& pool);
#else
void linear_int16(const LinearArgs& args, ThreadPool& pool);
#endif
#if QUIRE_AMX
void linear_int8_amx(const LinearArgs& args, ThreadPool& pool);
#endif

}  // namespace quire::QUIRE_ISA
