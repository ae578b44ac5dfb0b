// The rate that shares of peak refer to: multiply-adds on registers alone, all chains independent.
#include "vec16.h"

namespace AVF_ISA {

#if defined(__AVX512F__)
constexpr int CHAINS = 12;  // of one register each
#else
constexpr int CHAINS = 5;  // of two registers each, or four
#endif

// Runs `steps` steps of CHAINS * 16 multiply-adds; returns their number. The sum is written where it can be seen.
int64_t multiply_adds(int64_t steps, float* seen) {
    v16 sums[CHAINS];
    const v16 x = splat(0.999f), y = splat(1e-3f);
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; ++c) sums[c] = splat(float(c));
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
        for (int c = 0; c < CHAINS; ++c) sums[c] = sums[c] * x + y;
    }
    v16 total{};
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; ++c) total += sums[c];
    std::memcpy(seen, &total, sizeof *seen);
    return steps * CHAINS * 16;
}

}  // namespace AVF_ISA
