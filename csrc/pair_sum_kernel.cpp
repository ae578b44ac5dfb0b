// Pair attention with summed interactions: two ordinary attentions, added (csrc/pair.h).
#include "pair_tile.h"

namespace AVF_ISA {

int64_t pair_sum_forward(const AvfPair& a, int64_t b, int64_t h, int64_t block, float* base) {
    Scratch scratch(base);
    v16* q = scratch.vectors(a.dk);
    v16* sums[2] = {scratch.vectors(a.dv), scratch.vectors(a.dv)};
    v16* logits = scratch.vectors(TILE);
    float* widened = scratch.floats(TILE * widest(a));
    if (!base) return scratch.used;

    const Head head{a, b, h};
    head.load(a.q, block, a.dk, a.scale, widened, q);
    Softmax softmax[2];
    for (int s = 0; s < 2; ++s) {
        for (int64_t d = 0; d < a.dv; ++d) sums[s][d] = v16{};
        for_tiles(a.N[s], [&](int64_t j0, int64_t n) {
            dot(q, head.keys(s, j0, n, widened), n, a.dk, logits);
            apply_mask(head.mask(s, j0), n, logits);
            const v16 rescale = softmax[s].add(logits, n);
            weigh(logits, head.values(s, j0, n, widened), n, a.dv, rescale, sums[s]);
        });
    }
    // A side without any token leaves no pair: the output is 0 and lse is -inf.
    const v16i empty = softmax[0].no_token() | softmax[1].no_token();
    for (int s = 0; s < 2; ++s) {
        const v16 factor = select(empty, v16{}, 1.f / softmax[s].sum);
        for (int64_t d = 0; d < a.dv; ++d) sums[s][d] *= factor;
        head.save(s, block, softmax[s].offset, factor, empty);
    }
    for (int64_t d = 0; d < a.dv; ++d) sums[0][d] += sums[1][d];
    head.store(sums[0], a.out, block, a.dv, widened);
    head.put(a.lse, 0, block, select(empty, splat(-INFINITY), softmax[0].lse() + softmax[1].lse()));
    return 0;
}

// With p the softmax of one side and dp = grad_out . v: ds = p (dp - delta), dq += ds k, dk = ds^T q, dv = p^T grad_out.
// delta = sum p dp (- grad_lse) takes a pass of its own. grad_out . out is the same number and costs nothing, but its
// rounding errors are not those of p and dp: the gradients of q and k would be some 1.4 times less exact.
int64_t pair_sum_backward(const AvfPair& a, int64_t b, int64_t h, int64_t, float* base) {
    constexpr int64_t KEPT = 1024;  // weights of so many tokens are kept from the first pass to the second
    const int64_t blocks = blocks_of(a), longest = a.N[0] > a.N[1] ? a.N[0] : a.N[1];
    const bool keep = blocks == 1 && longest <= KEPT;
    Scratch scratch(base);
    HeadQueries queries(a, 2, scratch);
    v16 *p = scratch.vectors(keep ? longest : TILE), *ds = scratch.vectors(keep ? longest : TILE);
    v16* delta = scratch.vectors(blocks);
    float *k_widened = scratch.floats(TILE * a.dk), *v_widened = scratch.floats(TILE * a.dv);
    float *k_buffer = scratch.floats(TILE * padded(a.dk)), *v_buffer = scratch.floats(TILE * padded(a.dv));
    if (!base) return scratch.used;

    const Head head{a, b, h};
    queries.load(head, 2);
    for (int s = 0; s < 2; ++s) {
        // p = the weights of n tokens, ds = grad_out . v.
        const auto weights_of = [&](int64_t j0, int64_t n, int64_t block, Rows k, Rows v, v16* p, v16* ds) {
            const int64_t at = s * blocks + block;
            dot(queries.q + block * a.dk, k, n, a.dk, p);
            apply_mask(head.mask(s, j0), n, p);
            normalised(p, n, queries.offset[at], queries.factor[at]);
            dot(queries.grad_out + block * a.dv, v, n, a.dv, ds);
        };
        for (int64_t block = 0; block < blocks; ++block) delta[block] = -queries.grad_lse[block];
        for_tiles(a.N[s], [&](int64_t j0, int64_t n) {
            const int64_t at = keep ? j0 : 0;
            const Rows k = head.keys(s, j0, n, k_widened), v = head.values(s, j0, n, v_widened);
            for (int64_t block = 0; block < blocks; ++block) {
                weights_of(j0, n, block, k, v, p + at, ds + at);
                v16 sum{};
                for (int64_t j = at; j < at + n; ++j) sum += p[j] * ds[j];
                delta[block] += sum;
            }
        });
        for_tiles(a.N[s], [&](int64_t j0, int64_t n) {
            const int64_t at = keep ? j0 : 0;
            const Rows k = head.keys(s, j0, n, k_widened), v = head.values(s, j0, n, v_widened);
            const GradientTile grad_k(a.grad_k[s], head, j0, a.dk, k_buffer);
            const GradientTile grad_v(a.grad_v[s], head, j0, a.dv, v_buffer);
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t lanes = head.lanes(block);
                if (!keep) weights_of(j0, n, block, k, v, p, ds);
                for (int64_t j = at; j < at + n; ++j) ds[j] = p[j] * (ds[j] - delta[block]);
                weigh(ds + at, k, n, a.dk, splat(1.f), queries.grad_q + block * a.dk);
                spread(ds + at, queries.q_rows + block * LANES * padded(a.dk), lanes, n, a.dk, block > 0, grad_k.rows,
                       grad_k.stride);
                spread(p + at, queries.grad_out_rows + block * LANES * padded(a.dv), lanes, n, a.dv, block > 0,
                       grad_v.rows, grad_v.stride);
            }
            grad_k.finish(n);
            grad_v.finish(n);
        });
    }
    queries.write_grad_q(head);
    return 0;
}

}  // namespace AVF_ISA
