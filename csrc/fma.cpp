#include <chrono>

#include "avf.h"
#include "isa.h"

namespace avx512 { int64_t multiply_adds(int64_t, float*); }
namespace avx2 { int64_t multiply_adds(int64_t, float*); }
namespace portable { int64_t multiply_adds(int64_t, float*); }

static int64_t multiply_adds(int64_t steps, float* seen) {
    switch (isa()) {
#if defined(AVF_HAVE_AVX512)
        case Isa::avx512: return avx512::multiply_adds(steps, seen);
#endif
#if defined(AVF_HAVE_AVX2)
        case Isa::avx2: return avx2::multiply_adds(steps, seen);
#endif
        default: return portable::multiply_adds(steps, seen);
    }
}

AVF_API double avf_fma_flops(double seconds) {
    using clock = std::chrono::steady_clock;
    double best = 0;
    for (const auto end = clock::now() + std::chrono::duration<double>(seconds); clock::now() < end;) {
        const auto begin = clock::now();
        int64_t count = 0;
#pragma omp parallel reduction(+ : count)
        {
            float seen;
            count += multiply_adds(1000000, &seen);
            asm volatile("" : : "g"(&seen) : "memory");
        }
        const double flops = 2 * double(count) / std::chrono::duration<double>(clock::now() - begin).count();
        if (flops > best) best = flops;
    }
    return best;
}
