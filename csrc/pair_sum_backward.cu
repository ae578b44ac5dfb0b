// Pair attention with summed interactions, backward, in one launch: with p the softmax of one side and
// dp = grad_out . v: ds = p (dp - delta), dq += ds k, dk = ds^T q, dv = p^T grad_out.
//
// A block has one head, a warp some of the tokens of one side: it owns their gradients, and what it adds to dq is
// merged with the other warps' in a fixed order. No atomics: the result is bitwise reproducible.
#include "pair_backward.cuh"

template <class T, int DK, int DV>
__global__ void __launch_bounds__(32 * MAX_WARPS, 1)
pair_sum_backward_kernel(const AvfCudaPairAttention a, int blocks, int first) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int side = warp >= first, begin = side ? first : 0, end = side ? warps : first;
    Task task(a, 1);
    const Rows keys(a.k[side], task), values(a.v[side], task);
    const Rows grad_k(a.grad_k[side], task), grad_v(a.grad_v[side], task), grad_q(a.grad_q, task);
    const Tokens tokens(a, side, task.b);
    const int N = tokens.count, j_begin = STEP * (warp - begin), j_step = STEP * (end - begin);
    const float scale = a.scale * LOG2E;
    Queries<DK, DV> queries;
    TokenTile<T, DK, DV> tile;

    for (int block = 0; block < blocks; ++block) {
        task.f0 = QUERIES * block;
        queries.load(a, task, side);
        for (int j0 = j_begin; j0 < N; j0 += j_step) {
            tile.load(keys, values, j0, N);
            tile.weigh(queries, tokens, j0, scale);
            tile.add_to_delta(queries);
        }
        queries.merge_delta(a, task, side, begin, end);

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
        share_sums<DK>(dq);
        __syncthreads();
        for_each_query<DK>(a, task, [&](int f, int d) {
            const float low = merged_sum<DK>(f - task.f0, d), high = merged_sum<DK>(f - task.f0, d + 1);
            grad_q.write(f, d, pack<T>(low * a.scale, high * a.scale));
        });
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
            queries.load_delta(a, task, side);
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
                      split.warps * SHARED_SUMS<DK>, a.stream, a, query_blocks(a), split.first);
    });
}
