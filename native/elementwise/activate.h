// The activations by name, on one vector.
#pragma once

#include "runtime/vector_math.h"

namespace quire::QUIRE_ISA {

static inline Floats activate(Activation kind, Floats x) {
    switch (kind) {
        case Activation::silu: return silu(x);
        case Activation::gelu: return gelu(x);
        case Activation::gelu_tanh: return gelu_tanh(x);
        case Activation::relu: return relu(x);
    }
    return x;
}

}  // namespace quire::QUIRE_ISA
