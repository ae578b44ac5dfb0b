// Pair attention with multiplied interactions, forward: for one token i of side 0 it is attention over side 1 with the
// queries q * a_i, its output multiplied by u_i.
//
// A block has 16 queries of one head, a warp every so many tokens i. Tokens of side 1 stay in registers while it goes
// over its i: a pair costs no memory access.
#include "pair_attention.cuh"

constexpr int STEP = 32;  // tokens of side 1 that a warp takes at once

template <class T, int DK, int DV>
__global__ void __launch_bounds__(32 * MAX_WARPS, 1)
pair_product_forward_kernel(const AvfCudaPairAttention a, int blocks) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const Task task(a, blocks);
    uint32_t q[2][DK / 8];  // rows g and g + 8
    for (int r = 0; r < 2; ++r) Rows(a.q, task).load<DK>(task.f0 + g + 8 * r, int(a.F), q[r]);
    const Rows key_factors(a.k[0], task), value_factors(a.v[0], task), keys(a.k[1], task), values(a.v[1], task);
    const Tokens tokens1(a, 0, task.b), tokens2(a, 1, task.b);
    const float scale = a.scale * LOG2E;
    Partial<DV> partial;

    for (int j0 = 0; j0 < tokens2.count; j0 += STEP) {
        uint32_t k[STEP / 8][DK / 8], v[STEP / 8][DV / 8];  // tokens j0 + 8n + g; v transposed
        float bias[STEP / 8][2];                            // tokens j0 + 8n + 2t + e
#pragma unroll
        for (int n = 0; n < STEP / 8; ++n) {
            keys.load<DK>(j0 + 8 * n + g, tokens2.count, k[n]);
            values.load<DV>(j0 + 8 * n + g, tokens2.count, v[n]);
#pragma unroll
            for (int w = 0; w < DV / 8; ++w) v[n][w] = transpose(v[n][w]);
#pragma unroll
            for (int e = 0; e < 2; ++e) bias[n][e] = tokens2.attended(j0 + 8 * n + 2 * t + e) ? 0.f : -INFINITY;
        }
        for (int i = warp; i < tokens1.count; i += warps) {
            if (!tokens1.attended(i)) continue;
            uint32_t row[DK / 8], qa[2][DK / 8];
            key_factors.load<DK>(i, tokens1.count, row);
#pragma unroll
            for (int w = 0; w < DK / 8; ++w)
#pragma unroll
                for (int r = 0; r < 2; ++r) qa[r][w] = multiply<T>(q[r][w], row[w]);
            float p[STEP / 8][4] = {};
#pragma unroll
            for (int n = 0; n < STEP / 8; ++n) {
#pragma unroll
                for (int c = 0; c < DK / 8; c += 2)
                    mma<T>(p[n], qa[0][c], qa[1][c], qa[0][c + 1], qa[1][c + 1], k[n][c], k[n][c + 1]);
#pragma unroll
                for (int e = 0; e < 4; ++e) p[n][e] = p[n][e] * scale + bias[n][e % 2];
            }
            float rescale[2];
            partial.add(p, rescale);

            uint32_t u[DV / 8];
            value_factors.load<DV>(i, tokens1.count, u);
#pragma unroll
            for (int w = 0; w < DV / 8; ++w) {
                float context[4] = {}, factor[2];
#pragma unroll
                for (int n = 0; n < STEP / 8; n += 2)
                    mma<T>(context, pack<T>(p[n][0], p[n][1]), pack<T>(p[n][2], p[n][3]),
                           pack<T>(p[n + 1][0], p[n + 1][1]), pack<T>(p[n + 1][2], p[n + 1][3]), v[n][w], v[n + 1][w]);
                unpack<T>(u[w], factor[0], factor[1]);
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    partial.out[w][e] = partial.out[w][e] * rescale[e / 2] + context[e] * factor[e % 2];
            }
        }
    }
    partial.share();
    __syncthreads();
    write_merged<T, DV, 1>(a, task, 0);
}

cudaError_t pair_product_forward(const AvfCudaPairAttention& a) {
    return with_types(a, [&](auto type, auto dk, auto dv) {
        constexpr int DK = decltype(dk)::value, DV = decltype(dv)::value;
        const int blocks = query_blocks(a), warps = a.N[0] < 1 ? 1 : a.N[0] > MAX_WARPS ? MAX_WARPS : int(a.N[0]);
        return launch(pair_product_forward_kernel<decltype(type), DK, DV>, a.B * a.H * blocks, 32 * warps,
                      warps * Partial<DV>::FLOATS * sizeof(float), a.stream, a, blocks);
    });
}
