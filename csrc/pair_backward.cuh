// What the backward kernels of pair attention share. A warp takes 16 tokens at once, the rows of mma.m16n8k16, and 16
// queries are its columns. With p the weights and dp the gradients of the weights, both [16 tokens, 16 queries], and
// delta = sum p dp - grad_lse of a query over all tokens: ds = p (dp - delta) are the gradients of the logits.
//
// delta takes a pass of its own. grad_out . out is the same number and costs nothing, but its rounding errors are not
// those of p and dp: the gradients of q and k would be less exact.
#pragma once
#include "pair_attention.cuh"

constexpr int STEP = 16;  // tokens that a warp takes at once

// 16 queries, as lanes see them in products whose columns are queries: rows g and 8 + g of q and of grad_out; and for
// queries 8j + 2t + e what turns their logits into weights, and delta.
template <int DK, int DV>
struct Queries {
    uint32_t q[2][DK / 8], grad_out[2][DV / 8];
    float offset[2][2], factor[2][2], delta[2][2];

    __device__ __forceinline__ void load_rows(const AvfCudaPairAttention& a, const Task& task) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int f = task.f0 + 8 * j + threadIdx.x % 32 / 4;
            Rows(a.q, task).load<DK>(f, int(a.F), q[j]);
            Rows(a.grad_out, task).load<DV>(f, int(a.F), grad_out[j]);
        }
    }
    // With a delta of 0, to add to.
    __device__ __forceinline__ void load(const AvfCudaPairAttention& a, const Task& task, int side) {
        const int t = threadIdx.x % 4, F = int(a.F);
        load_rows(a, task);
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {  // a column without a query has weights 0
                const int f = task.f0 + 8 * j + 2 * t + e;
                offset[j][e] = f < F ? a.saved_softmax[row_of(a, task, 2 * side, f)] : INFINITY;
                factor[j][e] = f < F ? a.saved_softmax[row_of(a, task, 2 * side + 1, f)] : 0.f;
                delta[j][e] = 0;
            }
    }
    __device__ __forceinline__ void load_delta(const AvfCudaPairAttention& a, const Task& task, int side) {
        const int t = threadIdx.x % 4;
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int f = task.f0 + 8 * j + 2 * t + e;
                delta[j][e] = f < a.F ? a.delta[row_of(a, task, side, f)] : 0.f;
            }
    }
    // delta of these queries from what each lane of warps [begin, end) has summed of it over its tokens, for all warps
    // of the block and for launches to come.
    __device__ __forceinline__ void merge_delta(const AvfCudaPairAttention& a, const Task& task, int side, int begin,
                                                int end) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warp = threadIdx.x / 32;
        float* shared = shared_memory();
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float sum = sum_of_quads(delta[j][e]);
                if (g == 0) shared[warp * QUERIES + 8 * j + 2 * t + e] = sum;
            }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int f = 8 * j + 2 * t + e;
                const bool exists = task.f0 + f < a.F;
                float sum = exists && a.grad_lse ? -a.grad_lse[row_of(a, task, 0, task.f0 + f)] : 0.f;
                for (int w = begin; w < end; ++w) sum += shared[w * QUERIES + f];
                delta[j][e] = sum;
                if (exists && warp == begin && g == 0) a.delta[row_of(a, task, side, task.f0 + f)] = sum;
            }
        __syncthreads();
    }
};

// 16 tokens: rows g and 8 + g of keys and values, and their weights p and dp, [16 tokens, 16 queries]: element 2r + e
// of column block j is token g + 8r, query 8j + 2t + e.
template <class T, int DK, int DV>
struct TokenTile {
    uint32_t k[2][DK / 8], v[2][DV / 8];
    float p[2][4], dp[2][4];

    __device__ __forceinline__ void load(const Rows& keys, const Rows& values, int j0, int count) {
        const int g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            keys.load<DK>(j0 + 8 * r + g, count, k[r]);
            values.load<DV>(j0 + 8 * r + g, count, v[r]);
        }
    }
    __device__ __forceinline__ void weigh(const Queries<DK, DV>& queries, const Tokens& tokens, int j0, float scale) {
        const int g = threadIdx.x % 32 / 4;
        bool keep[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) keep[r] = tokens.attended(j0 + 8 * r + g);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) p[j][i] = dp[j][i] = 0;
#pragma unroll
            for (int c = 0; c < DK / 8; c += 2)
                mma<T>(p[j], k[0][c], k[1][c], k[0][c + 1], k[1][c + 1], queries.q[j][c], queries.q[j][c + 1]);
#pragma unroll
            for (int c = 0; c < DV / 8; c += 2)
                mma<T>(dp[j], v[0][c], v[1][c], v[0][c + 1], v[1][c + 1], queries.grad_out[j][c],
                       queries.grad_out[j][c + 1]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                // Rounded before the subtraction, as forward rounds it: the weight of the only token is 1, exactly.
                const float logit = fmaf(p[j][i], scale, 0.f);
                const float weight = power_of_2(logit - queries.offset[j][i % 2]) * queries.factor[j][i % 2];
                p[j][i] = keep[i / 2] ? weight : 0.f;
            }
        }
    }
    __device__ __forceinline__ void add_to_delta(Queries<DK, DV>& queries) const {
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) queries.delta[j][i % 2] += p[j][i] * dp[j][i];
    }
    // dp becomes ds.
    __device__ __forceinline__ void subtract(const Queries<DK, DV>& queries) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) dp[j][i] = p[j][i] * (dp[j][i] - queries.delta[j][i % 2]);
    }
};

// sums [16, D] += x rows for x [16 tokens, 16 queries] as in TokenTile, and rows of the queries.
template <class T, int D>
__device__ __forceinline__ void add_to_tokens(float (&sums)[D / 8][4], const float (&x)[2][4],
                                              const uint32_t (&rows)[2][D / 8]) {
    const uint32_t a0 = pack<T>(x[0][0], x[0][1]), a1 = pack<T>(x[0][2], x[0][3]);
    const uint32_t a2 = pack<T>(x[1][0], x[1][1]), a3 = pack<T>(x[1][2], x[1][3]);
#pragma unroll
    for (int w = 0; w < D / 8; ++w) mma<T>(sums[w], a0, a1, a2, a3, transpose(rows[0][w]), transpose(rows[1][w]));
}

// The same for sums of queries: += x^T rows for rows of the tokens.
template <class T, int D>
__device__ __forceinline__ void add_to_queries(float (&sums)[D / 8][4], const float (&x)[2][4],
                                               const uint32_t (&rows)[2][D / 8]) {
    const uint32_t a0 = transpose(pack<T>(x[0][0], x[0][1])), a1 = transpose(pack<T>(x[1][0], x[1][1]));
    const uint32_t a2 = transpose(pack<T>(x[0][2], x[0][3])), a3 = transpose(pack<T>(x[1][2], x[1][3]));
#pragma unroll
    for (int w = 0; w < D / 8; ++w) mma<T>(sums[w], a0, a1, a2, a3, transpose(rows[0][w]), transpose(rows[1][w]));
}

// Rows n0 + g and n0 + g + 8.
template <class T, int D>
__device__ __forceinline__ void store(const Rows& to, const float (&sums)[D / 8][4], float scale, int n0, int count) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        uint32_t row[D / 8];
#pragma unroll
        for (int w = 0; w < D / 8; ++w) row[w] = pack<T>(sums[w][2 * r] * scale, sums[w][2 * r + 1] * scale);
        to.store<D>(n0 + threadIdx.x % 32 / 4 + 8 * r, count, row);
    }
}

// run(f, d) for the queries f of a task and columns d, d + 1, divided among the threads of the block.
template <int D, class Run>
__device__ __forceinline__ void for_each_query(const AvfCudaPairAttention& a, const Task& task, Run run) {
    for (int i = threadIdx.x; i < QUERIES * D / 2; i += blockDim.x) {
        const int f = task.f0 + i / (D / 2);
        if (f >= a.F) break;
        run(f, i % (D / 2) * 2);
    }
}

// Sums of queries [16, D] of every warp of a block in shared memory, and their sum over the warps, in this order.
template <int D>
constexpr size_t SHARED_SUMS = QUERIES * D * sizeof(float);  // a warp
template <int D>
__device__ __forceinline__ void share_sums(const float (&sums)[D / 8][4]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warp = threadIdx.x / 32;
#pragma unroll
    for (int w = 0; w < D / 8; ++w)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            shared_memory()[(warp * QUERIES + g + i / 2 * 8) * D + column<D>(w, t) + i % 2] = sums[w][i];
}
template <int D>
__device__ __forceinline__ float merged_sum(int row, int d) {
    float sum = 0;
    for (int w = 0; w < int(blockDim.x / 32); ++w) sum += shared_memory()[(w * QUERIES + row) * D + d];
    return sum;
}
