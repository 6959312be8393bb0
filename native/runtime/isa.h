// Which of the compiled instruction sets this processor can run.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace quire {

struct IsaChoice {
    const Kernels* kernels;
    bool runs_here;
    std::string reason;  // "yes", or what the processor lacks
};

// Every compiled one, slowest first.
std::vector<IsaChoice> instruction_sets();

}  // namespace quire
