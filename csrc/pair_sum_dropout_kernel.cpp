// Pair attention with summed interactions and dropped pairs (csrc/pair_attention.h).
//
// Both softmaxes are computed first, a vector of weights for each token; then all pairs are visited for the sums over
// those that were kept, alpha' = R beta and beta' = R^T alpha. Scratch is O(N1 + N2).
#include "philox.h"
#include "pair_tile.h"

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
static void visit_pairs(const AvfPairAttention& a, int64_t b, int64_t h, int64_t block, Visit visit) {
    const PairDropout dropout(a.seed, a.dropout_p);
    const int64_t tile = tile_of(a.N[1]);
    v16 factors[8];
    for (int64_t j0 = 0; j0 < a.N[1]; j0 += tile)
        for (int64_t i = 0; i < a.N[0]; ++i)
            for (int64_t j = j0; j < min(j0 + tile, a.N[1]); j += 8) {
                dropout.factors(i, j, block * LANES, b * a.H + h, factors);
                for (int64_t k = 0; k < min(8, a.N[1] - j); ++k) visit(i, j + k, factors[k]);
            }
}

static void logits_of(const AvfPairAttention& a, int s, int64_t b, int64_t h, const v16* q, float* widened,
                      v16* logits) {
    const int64_t tile = tile_of(a.N[s]);
    for (int64_t j0 = 0; j0 < a.N[s]; j0 += tile) {
        const int64_t n = min(a.N[s] - j0, tile);
        dot(q, rows_of(a.k[s], a.dtype, b, h, j0, n, a.dk, widened), n, a.dk, logits + j0);
    }
    apply_mask(mask_of(a, s, b, 0), a.N[s], logits);
}

int64_t pair_sum_dropout_forward(const AvfPairAttention& a, int64_t b, int64_t h, int64_t block, float* base) {
    Scratch scratch(base);
    v16 *q = scratch.vectors(a.dk), *out = scratch.vectors(a.dv);
    float* widened = scratch.floats(TILE * padded(a.dk > a.dv ? a.dk : a.dv));
    const DropSide side[2] = {{a.N[0], false, scratch}, {a.N[1], false, scratch}};
    if (!base) return scratch.used;

    load_lanes(a.q, a, b, h, block, a.dk, a.scale, widened, q);
    Softmax softmax[2];
    for (int s = 0; s < 2; ++s) {
        logits_of(a, s, b, h, q, widened, side[s].weights);
        softmax[s].add(side[s].weights, a.N[s]);
    }
    const v16i empty = softmax[0].no_token() | softmax[1].no_token();
    v16 factors[2];
    for (int s = 0; s < 2; ++s) {
        const v16 factor = factors[s] = select(empty, v16{}, 1.f / softmax[s].sum);
        for (int64_t j = 0; j < a.N[s]; ++j) {
            side[s].weights[j] *= factor;
            side[s].kept[j] = v16{};
        }
    }
    visit_pairs(a, b, h, block, [&](int64_t i, int64_t j, v16 keep) {
        side[0].kept[i] += keep * side[1].weights[j];
        side[1].kept[j] += keep * side[0].weights[i];
    });
    for (int64_t d = 0; d < a.dv; ++d) out[d] = v16{};
    for (int s = 0; s < 2; ++s) {
        const int64_t tile = tile_of(a.N[s]);
        for (int64_t j = 0; j < a.N[s]; ++j) side[s].kept[j] *= side[s].weights[j];
        for (int64_t j0 = 0; j0 < a.N[s]; j0 += tile) {
            const int64_t n = min(a.N[s] - j0, tile);
            weigh(side[s].kept + j0, rows_of(a.v[s], a.dtype, b, h, j0, n, a.dv, widened), n, a.dv, splat(1.f), out);
        }
    }
    write_lanes(out, a.out, a, b, h, block, a.dv, widened);
    if (a.saved_softmax)
        for (int s = 0; s < 2; ++s) save(a, s, b, h, block, softmax[s].offset, factors[s], empty);
    if (a.lse)
        write_lse(a, b, h, block,
                  select(empty, splat(-INFINITY), softmax[0].lse() + softmax[1].lse()));
    return 0;
}

// P_ij = alpha_i beta_j R_ij weighs u_i + w_j. With A_i = grad_out . u_i and C_j = grad_out . w_j, the gradient of alpha_i
// is A_i (R beta)_i + (R (beta C))_i, that of beta_j likewise, and the softmax of each side subtracts their weighted mean.
int64_t pair_sum_dropout_backward(const AvfPairAttention& a, int64_t b, int64_t h, int64_t, float* base) {
    const int64_t dk = padded(a.dk), dv = padded(a.dv);
    Scratch scratch(base);
    HeadQueries head(a, 2, scratch);
    float* widened = scratch.floats(TILE * padded(a.dk > a.dv ? a.dk : a.dv));
    const DropSide side[2] = {{a.N[0], true, scratch}, {a.N[1], true, scratch}};
    float *grad_k[2], *grad_v[2];
    for (int s = 0; s < 2; ++s) grad_k[s] = scratch.floats(a.N[s] * dk), grad_v[s] = scratch.floats(a.N[s] * dv);
    if (!base) return scratch.used;

    const int64_t blocks = blocks_of(a);
    head.load(a, 2, b, h);
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t lanes = lanes_of(a, block);
        v16 *q = head.q + block * a.dk, *g = head.grad_out + block * a.dv, *grad_q = head.grad_q + block * a.dk;
        for (int s = 0; s < 2; ++s) {
            const int64_t tile = tile_of(a.N[s]);
            logits_of(a, s, b, h, q, widened, side[s].weights);
            for (int64_t j0 = 0; j0 < a.N[s]; j0 += tile) {
                const int64_t n = min(a.N[s] - j0, tile);
                dot(g, rows_of(a.v[s], a.dtype, b, h, j0, n, a.dv, widened), n, a.dv, side[s].dp + j0);
            }
            const int64_t at = s * blocks + block;
            normalised(side[s].weights, a.N[s], head.offset[at], head.factor[at]);
            for (int64_t j = 0; j < a.N[s]; ++j) side[s].kept[j] = side[s].kept_dp[j] = v16{};
        }
        visit_pairs(a, b, h, block, [&](int64_t i, int64_t j, v16 keep) {
            const v16 alpha = keep * side[0].weights[i], beta = keep * side[1].weights[j];
            side[0].kept[i] += beta;
            side[0].kept_dp[i] += beta * side[1].dp[j];
            side[1].kept[j] += alpha;
            side[1].kept_dp[j] += alpha * side[0].dp[i];
        });
        for (int s = 0; s < 2; ++s) {
            const int64_t tile = tile_of(a.N[s]);
            v16 delta = -head.grad_lse[block];
            for (int64_t j = 0; j < a.N[s]; ++j) {
                side[s].kept_dp[j] += side[s].dp[j] * side[s].kept[j];
                delta += side[s].weights[j] * side[s].kept_dp[j];
            }
            for (int64_t j = 0; j < a.N[s]; ++j) {
                const v16 weight = side[s].weights[j];
                side[s].weights[j] = weight * (side[s].kept_dp[j] - delta);  // ds
                side[s].kept[j] *= weight;
            }
            for (int64_t j0 = 0; j0 < a.N[s]; j0 += tile) {
                const int64_t n = min(a.N[s] - j0, tile);
                weigh(side[s].weights + j0, rows_of(a.k[s], a.dtype, b, h, j0, n, a.dk, widened), n, a.dk, splat(1.f),
                      grad_q);
            }
            spread(side[s].weights, head.q_rows + block * LANES * dk, lanes, a.N[s], a.dk, block > 0, grad_k[s], dk);
            spread(side[s].kept, head.grad_out_rows + block * LANES * dv, lanes, a.N[s], a.dv, block > 0, grad_v[s], dv);
        }
    }
    for (int s = 0; s < 2; ++s) {
        write_rows(grad_k[s], dk, a.grad_k[s], a.dtype, b, h, 0, a.N[s], a.dk);
        write_rows(grad_v[s], dv, a.grad_v[s], a.dtype, b, h, 0, a.N[s], a.dv);
    }
    head.write_grad_q(a, b, h);
    return 0;
}

}  // namespace AVF_ISA
