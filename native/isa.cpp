#include "isa.h"

namespace quire {

#if defined(__x86_64__)

namespace {

// The features that -march=x86-64-v3 and -v4 let the compiler use and that processors lack independently.
// __builtin_cpu_supports also checks that the operating system saves the registers.
std::string missing_for_avx2() {
    if (!__builtin_cpu_supports("avx2")) return "the processor has no avx2";
    if (!__builtin_cpu_supports("fma")) return "the processor has no fma";
    if (!__builtin_cpu_supports("bmi2")) return "the processor has no bmi2";
    return "";
}

std::string missing_for_avx512() {
    const std::string missing = missing_for_avx2();
    if (!missing.empty()) return missing;
    if (!__builtin_cpu_supports("avx512f")) return "the processor has no avx512f";
    if (!__builtin_cpu_supports("avx512bw")) return "the processor has no avx512bw";
    if (!__builtin_cpu_supports("avx512cd")) return "the processor has no avx512cd";
    if (!__builtin_cpu_supports("avx512dq")) return "the processor has no avx512dq";
    if (!__builtin_cpu_supports("avx512vl")) return "the processor has no avx512vl";
    return "";
}

IsaChoice choice(const Kernels& kernels, const std::string& missing) {
    return {&kernels, missing.empty(), missing.empty() ? "yes" : missing};
}

}  // namespace

std::vector<IsaChoice> instruction_sets() {
    __builtin_cpu_init();
    return {choice(baseline::kernels, ""), choice(avx2::kernels, missing_for_avx2()),
            choice(avx512::kernels, missing_for_avx512())};
}

#else

std::vector<IsaChoice> instruction_sets() { return {{&baseline::kernels, true, "yes"}}; }

#endif

}  // namespace quire
