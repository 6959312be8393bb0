// Products of bfloat16 by the matrix unit, where the instruction set of this file has one.
#pragma once

#include "kernels.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define QUIRE_TILES 1
#else
#define QUIRE_TILES 0
#endif

namespace quire::QUIRE_ISA {

constexpr Layout kBFloat16Layout = QUIRE_TILES ? Layout::tiles : Layout::panels;

#if QUIRE_TILES
// `linear` and `embed` of weights in Layout::tiles.
void linear_tiles(const LinearArgs& args, ThreadPool& pool);
void embed_tiles(const EmbedArgs& args, ThreadPool& pool);
#endif

}  // namespace quire::QUIRE_ISA
