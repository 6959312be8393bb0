#include "runtime/isa.h"

#include <initializer_list>

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

struct Feature {
    const char* name;
    bool exists;
};

// "", what the set below lacks, or the first of these features that the processor lacks.
std::string missing(const std::string& below, std::initializer_list<Feature> features) {
    if (!below.empty()) return below;
    for (const Feature& feature : features) {
        if (!feature.exists) return std::string("the processor has no ") + feature.name;
    }
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

// __builtin_cpu_supports also checks that the operating system saves the registers; it takes a literal.
#define QUIRE_FEATURE(name) Feature{name, __builtin_cpu_supports(name) != 0}

IsaChoice choice(const Kernels& kernels, const std::string& missing) {
    return {&kernels, missing.empty(), missing.empty() ? "yes" : missing};
}

}  // namespace

std::vector<IsaChoice> instruction_sets() {
    __builtin_cpu_init();
    // The features that -march=x86-64-v3 and -v4 let the compiler use and that processors lack independently.
    const std::string no_avx2 = missing("", {QUIRE_FEATURE("avx2"), QUIRE_FEATURE("fma"), QUIRE_FEATURE("bmi2")});
    const std::string no_avx512 =
        missing(no_avx2, {QUIRE_FEATURE("avx512f"), QUIRE_FEATURE("avx512bw"), QUIRE_FEATURE("avx512cd"),
                          QUIRE_FEATURE("avx512dq"), QUIRE_FEATURE("avx512vl")});
    const std::string no_vnni = missing(no_avx512, {{"avx512_vnni", leaf_seven(0, 2, 11)}});
    const std::string no_bf16 = missing(no_vnni, {{"avx512_bf16", leaf_seven(1, 0, 5)}});
    std::string no_amx = missing(no_bf16, {{"amx_tile", leaf_seven(0, 3, 24)},
                                           {"amx_bf16", leaf_seven(0, 3, 22)},
                                           {"amx_int8", leaf_seven(0, 3, 25)}});
    if (no_amx.empty() && !tiles_permitted()) no_amx = "the operating system does not permit the use of tiles";
    // AMD's cores multiply a vector of pairs of bfloat16 in the time of one of float32. Intel's take four times as long: there
    // float32 is the faster, though it does half as much (docs/design/quantized.md has both rates).
    const bool pairs_pay = __builtin_cpu_is("amd");
    const IsaChoice bytes = choice(avx512_vnni::kernels, no_vnni);
    const IsaChoice pairs = choice(avx512_bf16::kernels, no_bf16);
    return {choice(baseline::kernels, ""), choice(avx2::kernels, no_avx2),
            choice(avx512::kernels, no_avx512), pairs_pay ? bytes : pairs, pairs_pay ? pairs : bytes,
            choice(amx::kernels, no_amx)};
}

#else

std::vector<IsaChoice> instruction_sets() { return {{&baseline::kernels, true, "yes"}}; }

#endif

}  // namespace quire
