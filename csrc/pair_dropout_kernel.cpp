// Pair attention with summed interactions and dropped pairs (csrc/pair.h).
//
// Both softmaxes are computed first, a vector of weights for each token; then all pairs are visited for the sums over
// those that were kept, alpha' = R beta and beta' = R^T alpha. Scratch is O(N1 + N2).
#include "pair_tile.h"
#include "philox.h"

namespace AVF_ISA {

// One side: its weights, what multiplies the weight of the other side's pair, and the sums over kept pairs.
struct DropSide {
    v16 *weights, *dp;           // [N]: alpha; grad_out . u
    v16 *kept, *kept_dp;         // [N]: sum_j R_ij beta_j; sum_j R_ij beta_j (grad_out . w_j)
    DropSide(int64_t n, bool backward, Scratch& scratch)
        : weights(scratch.vectors(n)),
          dp(backward ? scratch.vectors(n) : nullptr),
          kept(scratch.vectors(n)),
          kept_dp(backward ? scratch.vectors(n) : nullptr) {}
};

// Calls visit(i, j, R_ij) for every pair. Tiles of j are small enough that what belongs to them stays in the cache.
template <class Visit>
static void visit_pairs(const Head& head, int64_t block, Visit visit) {
    const AvfPair& a = head.a;
    const PairDropout dropout(a.seed, a.dropout_p);
    v16 factors[8];
    for_tiles(a.N[1], [&](int64_t j0, int64_t n) {
        for (int64_t i = 0; i < a.N[0]; ++i)
            for (int64_t j = j0; j < j0 + n; j += 8) {
                dropout.factors(i, j, block * LANES, head.b * a.H + head.h, factors);
                for (int64_t k = 0; k < min(8, a.N[1] - j); ++k) visit(i, j + k, factors[k]);
            }
    });
}

static void logits_of(const Head& head, int s, const v16* q, float* widened, v16* logits) {
    for_tiles(head.a.N[s], [&](int64_t j0, int64_t n) {
        dot(q, head.keys(s, j0, n, widened), n, head.a.dk, logits + j0);
    });
    apply_mask(head.mask(s, 0), head.a.N[s], logits);
}

int64_t pair_dropout_forward(const AvfPair& a, int64_t b, int64_t h, int64_t block, float* base) {
    Scratch scratch(base);
    v16 *q = scratch.vectors(a.dk), *out = scratch.vectors(a.dv);
    float* widened = scratch.floats(TILE * widest(a));
    const DropSide side[2] = {{a.N[0], false, scratch}, {a.N[1], false, scratch}};
    if (!base) return scratch.used;

    const Head head{a, b, h};
    head.load(a.q, block, a.dk, a.scale, widened, q);
    Softmax softmax[2];
    for (int s = 0; s < 2; ++s) {
        logits_of(head, s, q, widened, side[s].weights);
        softmax[s].add(side[s].weights, a.N[s]);
    }
    const v16i empty = softmax[0].no_token() | softmax[1].no_token();
    for (int s = 0; s < 2; ++s) {
        const v16 factor = select(empty, v16{}, 1.f / softmax[s].sum);
        head.save(s, block, softmax[s].offset, factor, empty);
        for (int64_t j = 0; j < a.N[s]; ++j) {
            side[s].weights[j] *= factor;
            side[s].kept[j] = v16{};
        }
    }
    visit_pairs(head, block, [&](int64_t i, int64_t j, v16 keep) {
        side[0].kept[i] += keep * side[1].weights[j];
        side[1].kept[j] += keep * side[0].weights[i];
    });
    for (int64_t d = 0; d < a.dv; ++d) out[d] = v16{};
    for (int s = 0; s < 2; ++s) {
        for (int64_t j = 0; j < a.N[s]; ++j) side[s].kept[j] *= side[s].weights[j];
        for_tiles(a.N[s], [&](int64_t j0, int64_t n) {
            weigh(side[s].kept + j0, head.values(s, j0, n, widened), n, a.dv, splat(1.f), out);
        });
    }
    head.store(out, a.out, block, a.dv, widened);
    head.put(a.lse, 0, block, select(empty, splat(-INFINITY), softmax[0].lse() + softmax[1].lse()));
    return 0;
}

// P_ij = alpha_i beta_j R_ij weighs u_i + w_j. With A_i = grad_out . u_i and C_j = grad_out . w_j, the gradient of alpha_i
// is A_i (R beta)_i + (R (beta C))_i, that of beta_j likewise, and the softmax of each side subtracts their weighted mean.
int64_t pair_dropout_backward(const AvfPair& a, int64_t b, int64_t h, int64_t, float* base) {
    const int64_t dk = padded(a.dk), dv = padded(a.dv), blocks = blocks_of(a);
    Scratch scratch(base);
    HeadQueries queries(a, 2, scratch);
    float* widened = scratch.floats(TILE * widest(a));
    const DropSide side[2] = {{a.N[0], true, scratch}, {a.N[1], true, scratch}};
    float *grad_k[2], *grad_v[2];
    for (int s = 0; s < 2; ++s) grad_k[s] = scratch.floats(a.N[s] * dk), grad_v[s] = scratch.floats(a.N[s] * dv);
    if (!base) return scratch.used;

    const Head head{a, b, h};
    queries.load(head, 2);
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t lanes = head.lanes(block);
        const v16 *q = queries.q + block * a.dk, *g = queries.grad_out + block * a.dv;
        for (int s = 0; s < 2; ++s) {
            const int64_t at = s * blocks + block;
            logits_of(head, s, q, widened, side[s].weights);
            for_tiles(a.N[s], [&](int64_t j0, int64_t n) {
                dot(g, head.values(s, j0, n, widened), n, a.dv, side[s].dp + j0);
            });
            normalised(side[s].weights, a.N[s], queries.offset[at], queries.factor[at]);
            for (int64_t j = 0; j < a.N[s]; ++j) side[s].kept[j] = side[s].kept_dp[j] = v16{};
        }
        visit_pairs(head, block, [&](int64_t i, int64_t j, v16 keep) {
            const v16 alpha = keep * side[0].weights[i], beta = keep * side[1].weights[j];
            side[0].kept[i] += beta;
            side[0].kept_dp[i] += beta * side[1].dp[j];
            side[1].kept[j] += alpha;
            side[1].kept_dp[j] += alpha * side[0].dp[i];
        });
        for (int s = 0; s < 2; ++s) {
            v16 delta = -queries.grad_lse[block];
            for (int64_t j = 0; j < a.N[s]; ++j) {
                side[s].kept_dp[j] += side[s].dp[j] * side[s].kept[j];
                delta += side[s].weights[j] * side[s].kept_dp[j];
            }
            for (int64_t j = 0; j < a.N[s]; ++j) {
                const v16 weight = side[s].weights[j];
                side[s].weights[j] = weight * (side[s].kept_dp[j] - delta);  // ds
                side[s].kept[j] *= weight;
            }
            for_tiles(a.N[s], [&](int64_t j0, int64_t n) {
                weigh(side[s].weights + j0, head.keys(s, j0, n, widened), n, a.dk, splat(1.f),
                      queries.grad_q + block * a.dk);
            });
            spread(side[s].weights, queries.q_rows + block * LANES * dk, lanes, a.N[s], a.dk, block > 0, grad_k[s], dk);
            spread(side[s].kept, queries.grad_out_rows + block * LANES * dv, lanes, a.N[s], a.dv, block > 0, grad_v[s],
                   dv);
        }
    }
    for (int s = 0; s < 2; ++s) {
        head.write(grad_k[s], dk, a.grad_k[s], 0, a.N[s], a.dk);
        head.write(grad_v[s], dv, a.grad_v[s], 0, a.N[s], a.dv);
    }
    queries.write_grad_q(head);
    return 0;
}

}  // namespace AVF_ISA
