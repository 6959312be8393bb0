#include "runtime/isa.h"

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

// The bit of a register after `cpuid` with leaf 7; false where the processor has no such leaf.
bool leaf_seven(unsigned subleaf, int word, int bit) {
    unsigned words[4] = {};
    return __get_cpuid_count(7, subleaf, words, words + 1, words + 2, words + 3) && (words[word] >> bit & 1);
}

std::string missing_for_avx512_vnni() {
    const std::string missing = missing_for_avx512();
    if (!missing.empty()) return missing;
    return leaf_seven(0, 2, 11) ? "" : "the processor has no avx512_vnni";
}

std::string missing_for_avx512_bf16() {
    const std::string missing = missing_for_avx512_vnni();
    if (!missing.empty()) return missing;
    return leaf_seven(1, 0, 5) ? "" : "the processor has no avx512_bf16";
}

std::string missing_for_amx() {
    const std::string missing = missing_for_avx512_bf16();
    if (!missing.empty()) return missing;
    if (!leaf_seven(0, 3, 24)) return "the processor has no amx_tile";
    if (!leaf_seven(0, 3, 22)) return "the processor has no amx_bf16";
    if (!leaf_seven(0, 3, 25)) return "the processor has no amx_int8";
    if (!tiles_permitted()) return "the operating system does not permit the use of tiles";
    return "";
}

IsaChoice choice(const Kernels& kernels, const std::string& missing) {
    return {&kernels, missing.empty(), missing.empty() ? "yes" : missing};
}

}  // namespace

std::vector<IsaChoice> instruction_sets() {
    __builtin_cpu_init();
    // AMD's cores multiply a vector of pairs of bfloat16 in the time of one of float32. Intel's take four times as long: there
    // float32 is the faster, though it does half as much (docs/design/quantized.md has both rates).
    const bool pairs_pay = __builtin_cpu_is("amd");
    const IsaChoice bytes = choice(avx512_vnni::kernels, missing_for_avx512_vnni());
    const IsaChoice pairs = choice(avx512_bf16::kernels, missing_for_avx512_bf16());
    return {choice(baseline::kernels, ""), choice(avx2::kernels, missing_for_avx2()),
            choice(avx512::kernels, missing_for_avx512()), pairs_pay ? bytes : pairs, pairs_pay ? pairs : bytes,
            choice(amx::kernels, missing_for_amx())};
}

#else

std::vector<IsaChoice> instruction_sets() { return {{&baseline::kernels, true, "yes"}}; }

#endif

}  // namespace quire
