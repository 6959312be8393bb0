// Rows of weights to small integers and scales, on the calling thread.
#pragma once

#include "simd.h"

namespace quire::QUIRE_ISA {

// `values` [in], `scales` [ceil(in / group_size)]; false, with nothing to be read in them, where a weight is not finite.
// `scratch` is quantize_scratch_bytes() of memory.
bool quantize_row(const QuantizeArgs& args, const void* weight, int8_t* values, float* scales, void* scratch);

}  // namespace quire::QUIRE_ISA
