// The table of the instruction set this file is compiled for.
#include "linear_tiles.h"

#define QUIRE_NAME_OF(isa) #isa
#define QUIRE_NAME(isa) QUIRE_NAME_OF(isa)

namespace quire::QUIRE_ISA {

void linear(const LinearArgs&, ThreadPool&);
void embed(const EmbedArgs&, ThreadPool&);
void norm(const NormArgs&, ThreadPool&);
void rope(const RopeArgs&, ThreadPool&);
void activation(const ActivationArgs&, ThreadPool&);
void attention(const AttentionArgs&, ThreadPool&);
void sample(const SampleArgs&, ThreadPool&);
void logprobs(const LogprobsArgs&, ThreadPool&);
void rows_finite(const FiniteArgs&, ThreadPool&);
int64_t probe(const ProbeArgs&, ThreadPool&);
bool quantize_row(const QuantizeArgs&, const void* weight, int8_t* values, float* scales, void* scratch);

extern const Kernels kernels{QUIRE_NAME(QUIRE_ISA), kBFloat16Layout, linear,    embed,  norm,     rope,
                             activation,            attention,       sample, logprobs, rows_finite, probe, quantize_row};

}  // namespace quire::QUIRE_ISA
