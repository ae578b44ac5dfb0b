// Pair attention with summed interactions, forward: two ordinary attentions in one launch, added.
//
// A block has 16 queries of one head: exactly the rows of mma.m16n8k16, and for width 16 a single fragment. Each of its
// warps goes over some of the tokens of one side, keeping logits, weights and output in registers.
#include "pair_attention.cuh"

constexpr int STEP = 32;  // tokens of a side that a warp takes at once

template <class T, int DK, int DV>
__global__ void __launch_bounds__(32 * MAX_WARPS, 1)
pair_sum_forward_kernel(const AvfCudaPairAttention a, int blocks, int first) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const Task task(a, blocks);
    const int side = warp >= first;

    uint32_t q[2][DK / 8];  // rows g and g + 8
    for (int r = 0; r < 2; ++r) Rows(a.q, task).load<DK>(task.f0 + g + 8 * r, int(a.F), q[r]);
    const Rows keys(a.k[side], task), values(a.v[side], task);
    const Tokens tokens(a, side, task.b);
    const float scale = a.scale * LOG2E;
    const int N = tokens.count, stride = STEP * (side ? warps - first : first);
    Partial<DV> partial;

    for (int j0 = STEP * (side ? warp - first : warp); j0 < N; j0 += stride) {
        uint32_t k[STEP / 8][DK / 8], v[STEP / 8][DV / 8];  // tokens j0 + 8n + g
#pragma unroll
        for (int n = 0; n < STEP / 8; ++n) keys.load<DK>(j0 + 8 * n + g, N, k[n]);
#pragma unroll
        for (int n = 0; n < STEP / 8; ++n) values.load<DV>(j0 + 8 * n + g, N, v[n]);

        float p[STEP / 8][4] = {};
#pragma unroll
        for (int n = 0; n < STEP / 8; ++n) {
#pragma unroll
            for (int c = 0; c < DK / 8; c += 2)
                mma<T>(p[n], q[0][c], q[1][c], q[0][c + 1], q[1][c + 1], k[n][c], k[n][c + 1]);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const bool keep = tokens.attended(j0 + 8 * n + 2 * t + e);
                p[n][e] = keep ? p[n][e] * scale : -INFINITY;
                p[n][2 + e] = keep ? p[n][2 + e] * scale : -INFINITY;
            }
        }
        float rescale[2];
        partial.add(p, rescale);
#pragma unroll
        for (int w = 0; w < DV / 8; ++w) {
#pragma unroll
            for (int e = 0; e < 4; ++e) partial.out[w][e] *= rescale[e / 2];
#pragma unroll
            for (int n = 0; n < STEP / 8; n += 2)
                mma<T>(partial.out[w], pack<T>(p[n][0], p[n][1]), pack<T>(p[n][2], p[n][3]),
                       pack<T>(p[n + 1][0], p[n + 1][1]), pack<T>(p[n + 1][2], p[n + 1][3]), transpose(v[n][w]),
                       transpose(v[n + 1][w]));
        }
    }
    partial.share();
    __syncthreads();
    write_merged<T, DV, 2>(a, task, first);
}

cudaError_t pair_sum_forward(const AvfCudaPairAttention& a) {
    return with_types(a, [&](auto type, auto dk, auto dv) {
        constexpr int DK = decltype(dk)::value, DV = decltype(dv)::value;
        const Split split = split_warps(a, STEP);
        const int blocks = query_blocks(a);
        return launch(pair_sum_forward_kernel<decltype(type), DK, DV>, a.B * a.H * blocks, 32 * split.warps,
                      split.warps * Partial<DV>::FLOATS * sizeof(float), a.stream, a, blocks, split.first);
    });
}
