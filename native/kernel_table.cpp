// The table of the instruction set this file is compiled for. One that adds only to GEMMs takes the rest from the set
// below, QUIRE_BELOW; else that is itself.
#include "gemm/linear.h"

#define QUIRE_NAME_OF(isa) #isa
#define QUIRE_NAME(isa) QUIRE_NAME_OF(isa)

namespace quire::QUIRE_BELOW {

void attention(const AttentionArgs&, ThreadPool&);
void sample(const SampleArgs&, ThreadPool&);
void logprobs(const LogprobsArgs&, ThreadPool&);
void rows_finite(const FiniteArgs&, ThreadPool&);
bool quantize_row(const QuantizeArgs&, const void* weight, int8_t* values, float* scales, void* scratch);

}  // namespace quire::QUIRE_BELOW

namespace quire::QUIRE_ISA {

void linear(const LinearArgs&, ThreadPool&);
void embed(const EmbedArgs&, ThreadPool&);
void norm(const NormArgs&, ThreadPool&);
void activation(const ActivationArgs&, ThreadPool&);
int64_t probe(const ProbeArgs&, ThreadPool&);

namespace below = QUIRE_BELOW;

extern const Kernels kernels{QUIRE_NAME(QUIRE_ISA), kBFloat16Layout,    linear,           embed,
                             norm,                  activation,       below::attention,
                             below::sample,         below::logprobs,    below::rows_finite, probe,
                             below::quantize_row};

}  // namespace quire::QUIRE_ISA
