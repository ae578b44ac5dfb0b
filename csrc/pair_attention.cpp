#include "pair_attention.h"

#include <atomic>
#include <cstdlib>
#include <new>

#include "avf.h"
#include "isa.h"
#ifdef _OPENMP
#include <omp.h>
#endif

static PairAttentionTask choose_task() {
    switch (isa()) {
#if defined(AVF_HAVE_AVX512)
        case Isa::avx512: return avx512::pair_attention_sum_task;
#endif
#if defined(AVF_HAVE_AVX2)
        case Isa::avx2: return avx2::pair_attention_sum_task;
#endif
        default: return portable::pair_attention_sum_task;
    }
}

AVF_API int avf_pair_attention_sum_fwd_f32(
    const float* q, const float* k1, const float* v1, const float* k2, const float* v2,
    const uint8_t* mask1, const uint8_t* mask2, float* out, float* lse,
    const int64_t* sizes, const int64_t* strides, float scale) {
    const int64_t B = sizes[0], H = sizes[1], F = sizes[2], N1 = sizes[3], N2 = sizes[4], dk = sizes[5], dv = sizes[6];
    const int64_t *sq = strides, *sk1 = sq + 3, *sv1 = sk1 + 3, *sk2 = sv1 + 3, *sv2 = sk2 + 3, *so = sv2 + 3;
    const PairAttention args{
        q,
        {{k1, v1, mask1, N1, sk1[0], sk1[1], sk1[2], sv1[0], sv1[1], sv1[2]},
         {k2, v2, mask2, N2, sk2[0], sk2[1], sk2[2], sv2[0], sv2[1], sv2[2]}},
        out, lse, B, H, F, dk, dv, sq[0], sq[1], sq[2], so[0], so[1], so[2], scale};
    const int64_t blocks = (F + LANES - 1) / LANES, tasks = B * H * blocks;
    const int64_t scratch_bytes = (pair_attention_scratch(args) * int64_t(sizeof(float)) + 63) / 64 * 64;
    const PairAttentionTask task = choose_task();
    std::atomic<bool> out_of_memory{false};

    // Below some 100k multiply-adds waking the other threads costs more than they save.
#pragma omp parallel if (tasks > 1 && tasks * LANES * (N1 + N2) * (dk + dv) > 100000)
    {
        float* scratch = static_cast<float*>(std::aligned_alloc(64, scratch_bytes));
        if (!scratch) out_of_memory = true;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tasks; ++t) {
            if (!scratch) continue;
            task(args, t / (H * blocks), t / blocks % H, t % blocks, scratch);
        }
        std::free(scratch);
    }
    return out_of_memory ? AVF_OUT_OF_MEMORY : AVF_OK;
}
