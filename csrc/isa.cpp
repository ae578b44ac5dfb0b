#include "isa.h"

#include <cstdlib>
#include <cstring>

#include "avf.h"

static Isa detect() {
    Isa best = Isa::portable;
#if defined(AVF_HAVE_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
#endif
#if defined(AVF_HAVE_AVX512)
    if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        best = Isa::avx512;
#endif
    const char* asked = std::getenv("AVF_CPU_ISA");
    if (asked && !std::strcmp(asked, "portable")) return Isa::portable;
    if (asked && !std::strcmp(asked, "avx2") && best == Isa::avx512) return Isa::avx2;
    return best;
}

Isa isa() {
    static const Isa chosen = detect();
    return chosen;
}

AVF_API const char* avf_isa() {
    switch (isa()) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        default: return "portable";
    }
}

AVF_API int avf_abi_version() { return AVF_ABI_VERSION; }
