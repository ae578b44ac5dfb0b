// Pair attention with multiplied interactions, backward. For a token i of side 0 the queries and upstream gradients are
// q * a_i and grad_out * u_i, and p, dp and ds are those of attention over side 1:
//
//     db_j = sum_if ds_ijf (q_f * a_i)        t_if = sum_j ds_ijf b_j     da_i = sum_f q_f * t_if
//     dw_j = sum_if p_ijf (grad_out_f * u_i)  c_if = sum_j p_ijf w_j      du_i = sum_f grad_out_f * c_if
//     dq_f = sum_i a_i * t_if
//
// Four launches: delta; then a warp has a token i and all j ("first"), so that t and c are sums in registers; then a
// warp has 16 tokens j and all i ("second"). Both compute the weights of all pairs, rounded as in forward: a warp can
// own the gradients of one side only, and would have to join those of the other with all warps', pair by pair. A block
// of "first" leaves its part of dq, and the last launch adds the parts up in a fixed order. No atomics: the result is
// bitwise reproducible.
#include "pair_backward.cuh"

// `count` things among the warps of `groups` blocks, as evenly as can be.
struct Division {
    int groups, warps;
};
static Division divide(int64_t count) {
    const int64_t groups = (count + MAX_WARPS - 1) / MAX_WARPS;
    return {int(groups), groups ? int((count + groups - 1) / groups) : 0};
}

// The factors of token i: rows of k and v of side 0.
template <class T, int DK, int DV>
struct Factors {
    uint32_t k[DK / 8], v[DV / 8];
    __device__ __forceinline__ Factors(const Rows& keys, const Rows& values, int i, int count) {
        keys.load<DK>(i, count, k);
        values.load<DV>(i, count, v);
    }
    // q * a_i and grad_out * u_i.
    __device__ __forceinline__ Queries<DK, DV> of(Queries<DK, DV> queries) const {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int w = 0; w < DK / 8; ++w) queries.q[j][w] = multiply<T>(queries.q[j][w], k[w]);
#pragma unroll
            for (int w = 0; w < DV / 8; ++w) queries.grad_out[j][w] = multiply<T>(queries.grad_out[j][w], v[w]);
        }
        return queries;
    }
};

template <class T, int DK, int DV>
__global__ void __launch_bounds__(32 * MAX_WARPS, 1)
pair_product_delta_kernel(const AvfCudaPairAttention a, int blocks) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const Task task(a, blocks);
    const Rows key_factors(a.k[0], task), value_factors(a.v[0], task), keys(a.k[1], task), values(a.v[1], task);
    const Tokens tokens1(a, 0, task.b), tokens2(a, 1, task.b);
    Queries<DK, DV> queries;
    TokenTile<T, DK, DV> tile;
    queries.load(a, task, 0);
    for (int j0 = 0; j0 < tokens2.count; j0 += STEP) {
        tile.load(keys, values, j0, tokens2.count);
        for (int i = warp; i < tokens1.count; i += warps) {
            if (!tokens1.attended(i)) continue;
            const Factors<T, DK, DV> factors(key_factors, value_factors, i, tokens1.count);
            tile.weigh(factors.of(queries), tokens2, j0, a.scale * LOG2E);
            tile.add_to_delta(queries);
        }
    }
    queries.merge_delta(a, task, 0, 0, warps);
}

// The gradient of one token, sum_f row_f * x_f for rows and x [16, D] of queries: quad w keeps word w.
template <class T, int D>
struct TokenGradient {
    float sums[2] = {0, 0};

    __device__ __forceinline__ void add(const uint32_t (&rows)[2][D / 8], const float (&x)[D / 8][4]) {
        const int g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int w = 0; w < D / 8; ++w) {
            float added[2] = {0, 0};
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float low, high;
                unpack<T>(rows[r][w], low, high);
                added[0] += low * x[w][2 * r];
                added[1] += high * x[w][2 * r + 1];
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float sum = sum_of_quads(added[e]);
                if (g == w) sums[e] += sum;
            }
        }
    }
    __device__ __forceinline__ void store(const Rows& to, float scale, int n, int count) const {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        if (n < count && g < D / 8) to.write(n, column<D>(g, t), pack<T>(sums[0] * scale, sums[1] * scale));
    }
};

template <class T, int DK, int DV>
__global__ void __launch_bounds__(32 * MAX_WARPS, 1)
pair_product_first_kernel(const AvfCudaPairAttention a, int blocks, int groups) {
    const int group = blockIdx.x % groups, i = group * int(blockDim.x / 32) + int(threadIdx.x / 32);
    Task task(a, groups);
    const Rows key_factors(a.k[0], task), value_factors(a.v[0], task), keys(a.k[1], task), values(a.v[1], task);
    const Tokens tokens1(a, 0, task.b), tokens2(a, 1, task.b);
    const bool attended = tokens1.attended(i);
    TokenGradient<T, DK> grad_k;
    TokenGradient<T, DV> grad_v;

    for (int block = 0; block < blocks; ++block) {
        task.f0 = QUERIES * block;
        Queries<DK, DV> queries;
        float t[DK / 8][4] = {}, context[DV / 8][4] = {};
        if (attended) {
            queries.load(a, task, 0);
            queries.load_delta(a, task, 0);
            queries = Factors<T, DK, DV>(key_factors, value_factors, i, tokens1.count).of(queries);
            for (int j0 = 0; j0 < tokens2.count; j0 += STEP) {
                TokenTile<T, DK, DV> tile;
                tile.load(keys, values, j0, tokens2.count);
                tile.weigh(queries, tokens2, j0, a.scale * LOG2E);
                tile.subtract(queries);
                add_to_queries<T, DK>(t, tile.dp, tile.k);
                add_to_queries<T, DV>(context, tile.p, tile.v);
            }
        }
        __syncthreads();  // the sums of the queries before have been read
        if (attended) {
            // Read again rather than kept in registers; the barrier keeps the compiler from undoing that.
            queries.load_rows(a, task);
            grad_k.add(queries.q, t);
            grad_v.add(queries.grad_out, context);
            uint32_t factor[DK / 8];
            key_factors.load<DK>(i, tokens1.count, factor);
#pragma unroll
            for (int w = 0; w < DK / 8; ++w) {
                float factors[2];
                unpack<T>(factor[w], factors[0], factors[1]);
#pragma unroll
                for (int e = 0; e < 4; ++e) t[w][e] *= factors[e % 2];
            }
        }
        share_sums<DK>(t);
        __syncthreads();
        for_each_query<DK>(a, task, [&](int f, int d) {
            float* part = a.grad_q_parts + row_of(a, task, group, f) * DK + d;
            for (int e = 0; e < 2; ++e) part[e] = merged_sum<DK>(f - task.f0, d + e);
        });
    }
    grad_k.store(Rows(a.grad_k[0], task), a.scale, i, tokens1.count);
    grad_v.store(Rows(a.grad_v[0], task), 1.f, i, tokens1.count);
}

template <class T, int DK, int DV>
__global__ void __launch_bounds__(32 * MAX_WARPS, 1)
pair_product_second_kernel(const AvfCudaPairAttention a, int blocks, int groups) {
    const int j0 = STEP * (int(blockIdx.x % groups) * int(blockDim.x / 32) + int(threadIdx.x / 32));
    Task task(a, groups);
    const Rows key_factors(a.k[0], task), value_factors(a.v[0], task);
    const Tokens tokens1(a, 0, task.b), tokens2(a, 1, task.b);
    TokenTile<T, DK, DV> tile;
    tile.load(Rows(a.k[1], task), Rows(a.v[1], task), j0, tokens2.count);
    float dk[DK / 8][4] = {}, dv[DV / 8][4] = {};

    for (int block = 0; block < blocks; ++block) {
        task.f0 = QUERIES * block;
        Queries<DK, DV> queries;
        queries.load(a, task, 0);
        queries.load_delta(a, task, 0);
        for (int i = 0; i < tokens1.count; ++i) {
            if (!tokens1.attended(i)) continue;
            const auto pairs = Factors<T, DK, DV>(key_factors, value_factors, i, tokens1.count).of(queries);
            tile.weigh(pairs, tokens2, j0, a.scale * LOG2E);
            tile.subtract(pairs);
            add_to_tokens<T, DK>(dk, tile.dp, pairs.q);
            add_to_tokens<T, DV>(dv, tile.p, pairs.grad_out);
        }
    }
    store<T, DK>(Rows(a.grad_k[1], task), dk, a.scale, j0, tokens2.count);
    store<T, DV>(Rows(a.grad_v[1], task), dv, 1.f, j0, tokens2.count);
}

template <class T, int DK>
__global__ void __launch_bounds__(32 * MAX_WARPS, 1)
pair_product_merge_kernel(const AvfCudaPairAttention a, int blocks, int groups) {
    const Task task(a, blocks);
    const Rows grad_q(a.grad_q, task);
    for_each_query<DK>(a, task, [&](int f, int d) {
        float sums[2] = {0, 0};
        for (int group = 0; group < groups; ++group)
            for (int e = 0; e < 2; ++e) sums[e] += a.grad_q_parts[row_of(a, task, group, f) * DK + d + e];
        grad_q.write(f, d, pack<T>(sums[0] * a.scale, sums[1] * a.scale));
    });
}

cudaError_t pair_product_backward(const AvfCudaPairAttention& a) {
    return with_types(a, [&](auto type, auto dk, auto dv) {
        using T = decltype(type);
        constexpr int DK = decltype(dk)::value, DV = decltype(dv)::value;
        const int blocks = query_blocks(a);
        const int64_t heads = a.B * a.H;
        const Division first = divide(a.N[0]), second = divide((a.N[1] + STEP - 1) / STEP);
        const int delta_warps = a.N[0] < 1 ? 1 : a.N[0] > MAX_WARPS ? MAX_WARPS : int(a.N[0]);
        const cudaError_t errors[] = {
            launch(pair_product_delta_kernel<T, DK, DV>, heads * blocks, 32 * delta_warps,
                   delta_warps * QUERIES * sizeof(float), a.stream, a, blocks),
            launch(pair_product_first_kernel<T, DK, DV>, heads * first.groups, 32 * first.warps,
                   first.warps * SHARED_SUMS<DK>, a.stream, a, blocks, first.groups),
            launch(pair_product_second_kernel<T, DK, DV>, heads * second.groups, 32 * second.warps, 0, a.stream, a,
                   blocks, second.groups),
            launch(pair_product_merge_kernel<T, DK>, heads * blocks, 32 * MAX_WARPS, 0, a.stream, a, blocks,
                   first.groups),
        };
        for (const cudaError_t error : errors)
            if (error != cudaSuccess) return error;
        return cudaSuccess;
    });
}
