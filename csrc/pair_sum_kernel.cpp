// Pair attention with summed interactions: two ordinary attentions, added (csrc/pair_attention.h).
#include "pair_tile.h"

namespace AVF_ISA {

// Online softmax attention of 16 queries over one side: the unnormalised output in `sums` [dv].
static Softmax attend(const AvfPairAttention& a, int s, int64_t b, int64_t h, const v16* q, v16* logits,
                      float* widened, v16* sums) {
    Softmax softmax;
    const int64_t tile = tile_of(a.N[s]);
    for (int64_t d = 0; d < a.dv; ++d) sums[d] = v16{};
    for (int64_t j0 = 0; j0 < a.N[s]; j0 += tile) {
        const int64_t n = min(a.N[s] - j0, tile);
        dot(q, rows_of(a.k[s], a.dtype, b, h, j0, n, a.dk, widened), n, a.dk, logits);
        apply_mask(mask_of(a, s, b, j0), n, logits);
        const v16 rescale = softmax.add(logits, n);
        weigh(logits, rows_of(a.v[s], a.dtype, b, h, j0, n, a.dv, widened), n, a.dv, rescale, sums);
    }
    return softmax;
}

int64_t pair_sum_forward(const AvfPairAttention& a, int64_t b, int64_t h, int64_t block, float* base) {
    Scratch scratch(base);
    v16* q = scratch.vectors(a.dk);
    v16* sums[2] = {scratch.vectors(a.dv), scratch.vectors(a.dv)};
    v16* logits = scratch.vectors(TILE);
    float* widened = scratch.floats(TILE * padded(a.dk > a.dv ? a.dk : a.dv));
    if (!base) return scratch.used;

    load_lanes(a.q, a, b, h, block, a.dk, a.scale, widened, q);
    Softmax softmax[2];
    for (int s = 0; s < 2; ++s) softmax[s] = attend(a, s, b, h, q, logits, widened, sums[s]);

    // A side without any token leaves no pair: the output is 0 and lse is -inf.
    const v16i empty = softmax[0].no_token() | softmax[1].no_token();
    for (int s = 0; s < 2; ++s) {
        const v16 factor = select(empty, v16{}, 1.f / softmax[s].sum);
        for (int64_t d = 0; d < a.dv; ++d) sums[s][d] *= factor;
        if (a.saved_softmax) save(a, s, b, h, block, softmax[s].offset, factor, empty);
    }
    for (int64_t d = 0; d < a.dv; ++d) sums[0][d] += sums[1][d];
    write_lanes(sums[0], a.out, a, b, h, block, a.dv, widened);
    if (a.lse)
        write_lse(a, b, h, block,
                  select(empty, splat(-INFINITY), softmax[0].lse() + softmax[1].lse()));
    return 0;
}

// p = the weights of n tokens of side s, dp = grad_out . v.
static void weights_of(const AvfPairAttention& a, int s, int64_t b, int64_t j0, int64_t n, int64_t block,
                       const HeadQueries& head, Rows k, Rows v, v16* p, v16* dp) {
    const int64_t at = s * blocks_of(a) + block;
    dot(head.q + block * a.dk, k, n, a.dk, p);
    apply_mask(mask_of(a, s, b, j0), n, p);
    normalised(p, n, head.offset[at], head.factor[at]);
    dot(head.grad_out + block * a.dv, v, n, a.dv, dp);
}

// With p the softmax of one side and dp = grad_out . v: ds = p (dp - delta), dq += ds k, dk = ds^T q, dv = p^T grad_out.
// delta = sum p dp (- grad_lse) takes a pass of its own. grad_out . out is the same number and costs nothing, but its
// rounding errors are not those of p and dp: the gradients of q and k would be some 1.4 times less exact.
int64_t pair_sum_backward(const AvfPairAttention& a, int64_t b, int64_t h, int64_t, float* base) {
    constexpr int64_t KEPT = 1024;  // weights of so many tokens are kept from the first pass to the second
    const int64_t blocks = blocks_of(a), longest = a.N[0] > a.N[1] ? a.N[0] : a.N[1];
    const bool keep = blocks == 1 && longest <= KEPT;
    Scratch scratch(base);
    HeadQueries head(a, 2, scratch);
    v16 *p = scratch.vectors(keep ? longest : TILE), *ds = scratch.vectors(keep ? longest : TILE);
    v16* delta = scratch.vectors(blocks);
    float *k_widened = scratch.floats(TILE * a.dk), *v_widened = scratch.floats(TILE * a.dv);
    float *k_buffer = scratch.floats(TILE * padded(a.dk)), *v_buffer = scratch.floats(TILE * padded(a.dv));
    if (!base) return scratch.used;

    head.load(a, 2, b, h);
    for (int s = 0; s < 2; ++s) {
        const int64_t tile = tile_of(a.N[s]);
        for (int64_t block = 0; block < blocks; ++block) delta[block] = -head.grad_lse[block];
        for (int64_t j0 = 0; j0 < a.N[s]; j0 += tile) {
            const int64_t n = min(a.N[s] - j0, tile), at = keep ? j0 : 0;
            const Rows k = rows_of(a.k[s], a.dtype, b, h, j0, n, a.dk, k_widened);
            const Rows v = rows_of(a.v[s], a.dtype, b, h, j0, n, a.dv, v_widened);
            for (int64_t block = 0; block < blocks; ++block) {
                weights_of(a, s, b, j0, n, block, head, k, v, p + at, ds + at);
                v16 sum{};
                for (int64_t j = at; j < at + n; ++j) sum += p[j] * ds[j];
                delta[block] += sum;
            }
        }
        for (int64_t j0 = 0; j0 < a.N[s]; j0 += tile) {
            const int64_t n = min(a.N[s] - j0, tile), at = keep ? j0 : 0;
            const Rows k = rows_of(a.k[s], a.dtype, b, h, j0, n, a.dk, k_widened);
            const Rows v = rows_of(a.v[s], a.dtype, b, h, j0, n, a.dv, v_widened);
            const GradientTile grad_k(a.grad_k[s], a, b, h, j0, a.dk, k_buffer);
            const GradientTile grad_v(a.grad_v[s], a, b, h, j0, a.dv, v_buffer);
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t lanes = lanes_of(a, block);
                if (!keep) weights_of(a, s, b, j0, n, block, head, k, v, p, ds);
                for (int64_t j = at; j < at + n; ++j) ds[j] = p[j] * (ds[j] - delta[block]);
                weigh(ds + at, k, n, a.dk, splat(1.f), head.grad_q + block * a.dk);
                spread(ds + at, head.q_rows + block * LANES * padded(a.dk), lanes, n, a.dk, block > 0, grad_k.rows,
                       grad_k.stride);
                spread(p + at, head.grad_out_rows + block * LANES * padded(a.dv), lanes, n, a.dv, block > 0,
                       grad_v.rows, grad_v.stride);
            }
            grad_k.finish(n);
            grad_v.finish(n);
        }
    }
    head.write_grad_q(a, b, h);
    return 0;
}

}  // namespace AVF_ISA
