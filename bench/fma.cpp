// The rate that shares of a CPU's peak refer to: fused multiply-adds on registers alone, all chains independent.
// Compiled by bench/attention.py for the machine it runs on.
#include <chrono>
#include <cstdint>

#if defined(__AVX512F__)
typedef float Vector __attribute__((vector_size(64)));
#else
typedef float Vector __attribute__((vector_size(32)));
#endif
constexpr int CHAINS = 12;

static int64_t multiply_adds(int64_t steps) {
    Vector sums[CHAINS];
    for (int c = 0; c < CHAINS; ++c) sums[c] = Vector{} + float(c);  // equal ones would be computed once
    const Vector x = Vector{} + 0.999f, y = Vector{} + 1e-3f;
    for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 12
        for (int c = 0; c < CHAINS; ++c) sums[c] = sums[c] * x + y;
    for (Vector& sum : sums) asm volatile("" : : "m"(sum));
    return steps * CHAINS * int64_t(sizeof(Vector) / sizeof(float));
}

// FLOP/s of all threads together: the best of runs that fill `seconds`.
extern "C" double fma_flops(double seconds) {
    using clock = std::chrono::steady_clock;
    double best = 0;
    for (const auto end = clock::now() + std::chrono::duration<double>(seconds); clock::now() < end;) {
        const auto begin = clock::now();
        int64_t count = 0;
#pragma omp parallel reduction(+ : count)
        count += multiply_adds(1000000);
        const double flops = 2 * double(count) / std::chrono::duration<double>(clock::now() - begin).count();
        if (flops > best) best = flops;
    }
    return best;
}
