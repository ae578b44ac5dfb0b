#include "pair_attention.h"

#include <atomic>
#include <cstdlib>

#include "isa.h"

#define AVF_TASKS(isa)                                                                                        \
    PairTasks {                                                                                               \
        isa::pair_sum_forward, isa::pair_sum_backward, isa::pair_sum_dropout_forward,                         \
            isa::pair_sum_dropout_backward, isa::pair_product_forward, isa::pair_product_backward             \
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

static int run(const AvfPairAttention& a, PairTask task, int64_t blocks) {
    const int64_t count = a.B * a.H * blocks;
    if (count == 0) return AVF_OK;
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
    return out_of_memory ? AVF_OUT_OF_MEMORY : AVF_OK;
}

AVF_API int avf_pair_attention_forward(const AvfPairAttention* a) {
    const PairTasks t = tasks();
    const PairTask task = a->interaction == AVF_PRODUCT ? t.product_forward
                          : a->dropout_p > 0            ? t.sum_dropout_forward
                                                        : t.sum_forward;
    return run(*a, task, (a->F + 15) / 16);
}

AVF_API int avf_pair_attention_backward(const AvfPairAttention* a) {
    const PairTasks t = tasks();
    const PairTask task = a->interaction == AVF_PRODUCT ? t.product_backward
                          : a->dropout_p > 0            ? t.sum_dropout_backward
                                                        : t.sum_backward;
    return run(*a, task, 1);
}
