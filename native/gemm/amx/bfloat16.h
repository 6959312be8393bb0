// GEMM of bfloat16, weights in tiles: by AMX where the instruction set of this file has it, else by vectors.
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

#if QUIRE_TILES
// `linear` and `embed` of weights in Layout::tiles.
void linear_tiles(const LinearArgs& args, ThreadPool& pool);
void embed_tiles(const EmbedArgs& args, ThreadPool& pool);
#endif

}  // namespace quire::QUIRE_ISA
