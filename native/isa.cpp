#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// Linux gives the tiles (8 KB of state a thread) only to a process that asks; the answer holds for its threads and
// children, and asking again is harmless.
bool tiles_permitted() {
#if defined(__linux__)
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

std::string missing_for_amx() {
    const std::string missing = missing_for_avx512();
    if (!missing.empty()) return missing;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return "the processor has no amx_tile";
    if (!(edx >> 24 & 1)) return "the processor has no amx_tile";
    if (!(edx >> 22 & 1)) return "the processor has no amx_bf16";
    if (!(edx >> 25 & 1)) return "the processor has no amx_int8";
    if (!(ecx >> 11 & 1)) return "the processor has no avx512_vnni";
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax >> 5 & 1)) return "the processor has no avx512_bf16";
    if (!tiles_permitted()) return "the operating system does not permit the use of tiles";
    return "";
}

IsaChoice choice(const Kernels& kernels, const std::string& missing) {
    return {&kernels, missing.empty(), missing.empty() ? "yes" : missing};
}

}  // namespace

std::vector<IsaChoice> instruction_sets() {
    __builtin_cpu_init();
    return {choice(baseline::kernels, ""), choice(avx2::kernels, missing_for_avx2()),
            choice(avx512::kernels, missing_for_avx512()), choice(amx::kernels, missing_for_amx())};
}

#else

std::vector<IsaChoice> instruction_sets() { return {{&baseline::kernels, true, "yes"}}; }

#endif

}  // namespace quire
