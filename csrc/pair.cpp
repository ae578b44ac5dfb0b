// libavfkernels: the choice of an instruction set at run time, and the tasks of a call shared out among threads.
#include "pair.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

enum class Isa { portable, avx2, avx512 };
enum { OUT_OF_MEMORY = 1 };

// The best set that this build holds and this processor has; AVF_CPU_ISA asks for a lower one.
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

static Isa isa() {
    static const Isa chosen = detect();
    return chosen;
}

#define AVF_TASKS(isa)                                        \
    PairTasks {                                               \
        {isa::pair_sum_forward, isa::pair_sum_backward},      \
        {isa::pair_dropout_forward, isa::pair_dropout_backward}, \
        {isa::pair_product_forward, isa::pair_product_backward}  \
    }

static PairTasks tasks() {
    switch (isa()) {
#if defined(AVF_HAVE_AVX512)
        case Isa::avx512: return AVF_TASKS(avx512);
#endif
#if defined(AVF_HAVE_AVX2)
        case Isa::avx2: return AVF_TASKS(avx2);
#endif
        default: return AVF_TASKS(portable);
    }
}

static int run(const AvfPair& a, bool backward, int64_t blocks) {
    const PairTasks t = tasks();
    const PairTask task = (a.interaction == AVF_PRODUCT ? t.product : a.dropout_p > 0 ? t.dropout : t.sum)[backward];
    const int64_t count = a.B * a.H * blocks;
    if (count == 0) return 0;
    const int64_t pairs = a.interaction == AVF_PRODUCT || a.dropout_p > 0 ? a.N[0] * a.N[1] : a.N[0] + a.N[1];
    const size_t scratch_bytes = (size_t(task(a, 0, 0, 0, nullptr)) * sizeof(float) + 63) / 64 * 64;
    std::atomic<bool> out_of_memory{false};

    // Below some 100k multiply-adds waking the other threads costs more than they save.
#pragma omp parallel if (count > 1 && double(a.B * a.H) * double(a.F) * double(pairs) * double(a.dk + a.dv) > 1e5)
    {
        float* scratch = static_cast<float*>(std::aligned_alloc(64, scratch_bytes));
        if (!scratch) out_of_memory = true;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < count; ++t)
            if (scratch) task(a, t / (a.H * blocks), t / blocks % a.H, t % blocks, scratch);
        std::free(scratch);
    }
    return out_of_memory ? OUT_OF_MEMORY : 0;
}

AVF_API int avf_pair_forward(const AvfPair* a) { return run(*a, false, (a->F + 15) / 16); }
AVF_API int avf_pair_backward(const AvfPair* a) { return run(*a, true, 1); }
AVF_API int avf_abi_version() { return AVF_ABI_VERSION; }
AVF_API int avf_pair_bytes() { return sizeof(AvfPair); }
AVF_API const char* avf_error(int code) { return code == OUT_OF_MEMORY ? "out of memory" : "unknown error"; }
AVF_API const char* avf_isa() {
    static const char* const names[] = {"portable", "avx2", "avx512"};
    return names[int(isa())];
}
