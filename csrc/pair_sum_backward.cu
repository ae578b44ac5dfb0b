// Pair attention with summed interactions, backward, in one launch: with p the softmax of one side and
// dp = grad_out . v: ds = p (dp - delta), dq += ds k, dk = ds^T q, dv = p^T grad_out.
//
// delta = sum p dp (- grad_lse) takes a pass of its own. grad_out . out is the same number and costs nothing, but its
// rounding errors are not those of p and dp: the gradients of q and k would be less exact.
//
// A block has one head, a warp some of the tokens of one side: it owns their gradients, and what it adds to dq is
// merged with the other warps' in a fixed order. No atomics: the result is bitwise reproducible.
#include "pair_attention.cuh"

constexpr int STEP = 16;  // tokens that a warp takes at once: the rows of mma.m16n8k16; queries are its columns

// 16 queries, as lanes see them in products whose columns are queries: rows g and 8 + g of q and of grad_out; and for
// queries 8j + 2t + e what turns their logits into weights, and delta.
template <int DK, int DV>
struct Queries {
    uint32_t q[2][DK / 8], grad_out[2][DV / 8];
    float offset[2][2], factor[2][2], delta[2][2];

    __device__ __forceinline__ void load(const AvfCudaPairAttention& a, const Task& task, int side) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, F = int(a.F);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            Rows(a.q, task).load<DK>(task.f0 + 8 * j + g, F, q[j]);
            Rows(a.grad_out, task).load<DV>(task.f0 + 8 * j + g, F, grad_out[j]);
#pragma unroll
            for (int e = 0; e < 2; ++e) {  // a column without a query has weights 0
                const int f = task.f0 + 8 * j + 2 * t + e;
                offset[j][e] = f < F ? a.saved_softmax[row_of(a, task, 2 * side, f)] : INFINITY;
                factor[j][e] = f < F ? a.saved_softmax[row_of(a, task, 2 * side + 1, f)] : 0.f;
            }
        }
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
                const float weight = power_of_2(p[j][i] * scale - queries.offset[j][i % 2]) * queries.factor[j][i % 2];
                p[j][i] = keep[i / 2] ? weight : 0.f;
            }
        }
    }
    // dp becomes ds.
    __device__ __forceinline__ void subtract(const Queries<DK, DV>& queries) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) dp[j][i] = p[j][i] * (dp[j][i] - queries.delta[j][i % 2]);
    }
};

// sums [16, D] += x^T rows for x [16 queries, 16 tokens] transposed as in TokenTile, and rows of the queries.
template <class T, int D>
__device__ __forceinline__ void add_to_tokens(float (&sums)[D / 8][4], const float (&x)[2][4],
                                              const uint32_t (&rows)[2][D / 8]) {
    const uint32_t a0 = pack<T>(x[0][0], x[0][1]), a1 = pack<T>(x[0][2], x[0][3]);
    const uint32_t a2 = pack<T>(x[1][0], x[1][1]), a3 = pack<T>(x[1][2], x[1][3]);
#pragma unroll
    for (int w = 0; w < D / 8; ++w) mma<T>(sums[w], a0, a1, a2, a3, transpose(rows[0][w]), transpose(rows[1][w]));
}

// The same for sums of queries: += x rows for rows of the tokens.
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

template <class T, int DK, int DV>
__global__ void __launch_bounds__(32 * MAX_WARPS, 1)
pair_sum_backward_kernel(const AvfCudaPairAttention a, int blocks, int first) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int side = warp >= first, begin = side ? first : 0, end = side ? warps : first;
    Task task(a, 1);
    const Rows keys(a.k[side], task), values(a.v[side], task);
    const Rows grad_k(a.grad_k[side], task), grad_v(a.grad_v[side], task), grad_q(a.grad_q, task);
    const Tokens tokens(a, side, task.b);
    const int N = tokens.count, j_begin = STEP * (warp - begin), j_step = STEP * (end - begin);
    const float scale = a.scale * LOG2E;
    float* shared = shared_memory();
    Queries<DK, DV> queries;
    TokenTile<T, DK, DV> tile;

    for (int block = 0; block < blocks; ++block) {
        task.f0 = QUERIES * block;
        queries.load(a, task, side);

        float delta[2][2] = {};
        for (int j0 = j_begin; j0 < N; j0 += j_step) {
            tile.load(keys, values, j0, N);
            tile.weigh(queries, tokens, j0, scale);
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) delta[j][i % 2] += tile.p[j][i] * tile.dp[j][i];
        }
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
                queries.delta[j][e] = sum;
                if (exists && warp == begin && g == 0) a.delta[row_of(a, task, side, task.f0 + f)] = sum;
            }
        __syncthreads();

        float dq[DK / 8][4] = {};
        for (int j0 = j_begin; j0 < N; j0 += j_step) {
            tile.load(keys, values, j0, N);
            tile.weigh(queries, tokens, j0, scale);
            tile.subtract(queries);
            add_to_queries<T, DK>(dq, tile.dp, tile.k);
            if (blocks == 1) {
                float dk[DK / 8][4] = {}, dv[DV / 8][4] = {};
                add_to_tokens<T, DK>(dk, tile.dp, queries.q);
                store<T, DK>(grad_k, dk, a.scale, j0, N);
                add_to_tokens<T, DV>(dv, tile.p, queries.grad_out);
                store<T, DV>(grad_v, dv, 1.f, j0, N);
            }
        }
#pragma unroll
        for (int w = 0; w < DK / 8; ++w)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                shared[(warp * QUERIES + g + i / 2 * 8) * DK + column<DK>(w, t) + i % 2] = dq[w][i];
        __syncthreads();
        for (int i = threadIdx.x; i < QUERIES * DK / 2; i += blockDim.x) {
            const int f = i / (DK / 2), d = i % (DK / 2) * 2;
            if (task.f0 + f >= a.F) break;
            float sums[2] = {0, 0};
            for (int w = 0; w < warps; ++w)
                for (int e = 0; e < 2; ++e) sums[e] += shared[(w * QUERIES + f) * DK + d + e];
            *reinterpret_cast<uint32_t*>(grad_q.data + (task.f0 + f) * grad_q.stride + d) =
                pack<T>(sums[0] * a.scale, sums[1] * a.scale);
        }
        __syncthreads();
    }
    if (blocks == 1) return;

    // The gradients of tokens are sums over all queries.
    for (int j0 = j_begin; j0 < N; j0 += j_step) {
        tile.load(keys, values, j0, N);
        float dk[DK / 8][4] = {}, dv[DV / 8][4] = {};
        for (int block = 0; block < blocks; ++block) {
            task.f0 = QUERIES * block;
            queries.load(a, task, side);
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int f = task.f0 + 8 * j + 2 * t + e;
                    queries.delta[j][e] = f < a.F ? a.delta[row_of(a, task, side, f)] : 0.f;
                }
            tile.weigh(queries, tokens, j0, scale);
            tile.subtract(queries);
            add_to_tokens<T, DK>(dk, tile.dp, queries.q);
            add_to_tokens<T, DV>(dv, tile.p, queries.grad_out);
        }
        store<T, DK>(grad_k, dk, a.scale, j0, N);
        store<T, DV>(grad_v, dv, 1.f, j0, N);
    }
}

cudaError_t pair_sum_backward(const AvfCudaPairAttention& a) {
    return with_types(a, [&](auto type, auto dk, auto dv) {
        constexpr int DK = decltype(dk)::value, DV = decltype(dv)::value;
        const Split split = split_warps(a, STEP);
        return launch(pair_sum_backward_kernel<decltype(type), DK, DV>, a.B * a.H, 32 * split.warps,
                      split.warps * QUERIES * DK * sizeof(float), a.stream, a, query_blocks(a), split.first);
    });
}
