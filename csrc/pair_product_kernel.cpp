// Pair attention with multiplied interactions: tiles of pairs, online softmax over all of them (csrc/pair.h).
#include "pair_tile.h"
#include "philox.h"

namespace AVF_ISA {

// weights[j] *= 0 or 1 / (1 - p) for the pairs (i, j0 + j); j0 is a multiple of 8.
static void drop(const PairDropout& dropout, int64_t i, int64_t j0, int64_t n, int64_t block, int64_t head,
                 v16* weights) {
    v16 factors[8];
    for (int64_t j = 0; j < n; j += 8) {
        dropout.factors(i, j0 + j, block * LANES, head, factors);
        for (int64_t k = 0; k < min(n - j, 8); ++k) weights[j + k] *= factors[k];
    }
}

int64_t pair_product_forward(const AvfPair& a, int64_t b, int64_t h, int64_t block, float* base) {
    Scratch scratch(base);
    v16 *q = scratch.vectors(a.dk), *qa = scratch.vectors(a.dk), *weights = scratch.vectors(TILE);
    v16 *context = scratch.vectors(a.dv), *out = scratch.vectors(a.dv);
    float *k1 = scratch.floats(TILE * padded(a.dk)), *v1 = scratch.floats(TILE * padded(a.dv));
    float *k2 = scratch.floats(TILE * a.dk), *v2 = scratch.floats(TILE * a.dv);
    if (!base) return scratch.used;

    const Head head{a, b, h};
    const PairDropout dropout(a.seed, a.dropout_p);
    head.load(a.q, block, a.dk, a.scale, k1, q);
    Softmax softmax;
    for (int64_t d = 0; d < a.dv; ++d) out[d] = v16{};
    for_tiles(a.N[1], [&](int64_t j0, int64_t n) {
        const Rows keys = head.keys(1, j0, n, k2), values = head.values(1, j0, n, v2);
        for_tiles(a.N[0], [&](int64_t i0, int64_t m) {
            const Rows key_factors = head.keys(0, i0, m, k1), value_factors = head.values(0, i0, m, v1);
            const uint8_t* mask = head.mask(0, i0);
            for (int64_t i = 0; i < m; ++i) {
                if (mask && !mask[i]) continue;
                const float *a_i = key_factors[i], *u_i = value_factors[i];
                for (int64_t d = 0; d < a.dk; ++d) qa[d] = q[d] * a_i[d];
                dot(qa, keys, n, a.dk, weights);
                apply_mask(head.mask(1, j0), n, weights);
                const v16 rescale = softmax.add(weights, n);
                if (a.dropout_p > 0) drop(dropout, i0 + i, j0, n, block, b * a.H + h, weights);
                for (int64_t d = 0; d < a.dv; ++d) context[d] = v16{};
                weigh(weights, values, n, a.dv, v16{}, context);
                for (int64_t d = 0; d < a.dv; ++d) out[d] = out[d] * rescale + context[d] * u_i[d];
            }
        });
    });
    const v16i empty = softmax.no_token();
    const v16 factor = select(empty, v16{}, 1.f / softmax.sum);
    for (int64_t d = 0; d < a.dv; ++d) out[d] *= factor;
    head.store(out, a.out, block, a.dv, v1);
    head.put(a.lse, 0, block, select(empty, splat(-INFINITY), softmax.lse()));
    if (!a.saved) return 0;
    head.save(0, block, softmax.offset, factor, empty);
    from_lanes(out, a.dv, v1);
    for (int64_t f = 0; f < head.lanes(block); ++f)
        std::memcpy(head.saved_out() + (head.row(0, block) + f) * a.dv, v1 + f * padded(a.dv), a.dv * sizeof(float));
    return 0;
}

// n rows, copied to [n, padded(width)] with zeros beside them.
static Rows widen(Rows rows, int64_t n, int64_t width, float* to) {
    std::memset(to, 0, n * padded(width) * sizeof(float));
    for (int64_t i = 0; i < n; ++i) std::memcpy(to + i * padded(width), rows[i], width * sizeof(float));
    return {to, padded(width)};
}

// For n pairs (i, j) whose joint gradient is products[j]: grad_i += sum_j products[j] * row_j, grad_j += products[j] * row_i.
static void split_product(const float* products, const float* row_i, Rows rows_j, int64_t n, int64_t width,
                          float* grad_i, float* grad_j) {
    for (int64_t d = 0; d < width; d += LANES) {
        const v16 factor = load(row_i + d);
        v16 sum = load(grad_i + d);
        for (int64_t j = 0; j < n; ++j) {
            const v16 product = load(products + j * width + d);
            sum += product * load(rows_j[j] + d);
            store(grad_j + j * width + d, load(grad_j + j * width + d) + product * factor);
        }
        store(grad_i + d, sum);
    }
}

// With p_ij the weight and dp_ij = (grad_out * u_i) . w_j: ds_ij = p_ij (dp_ij - delta), delta = grad_out . out. The
// gradients of the pair's key and value, dk_ij = sum_f ds_ij q and dv_ij = sum_f p_ij grad_out, go to both of its
// tokens: da_i = sum_j dk_ij * b_j, db_j = sum_i dk_ij * a_i, and so do u and w. dq = sum_i a_i * sum_j ds_ij b_j.
int64_t pair_product_backward(const AvfPair& a, int64_t b, int64_t h, int64_t, float* base) {
    const int64_t dk = padded(a.dk), dv = padded(a.dv), blocks = blocks_of(a);
    Scratch scratch(base);
    HeadQueries queries(a, 1, scratch);
    v16 *qa = scratch.vectors(a.dk), *gu = scratch.vectors(a.dv), *t = scratch.vectors(a.dk);
    v16 *p = scratch.vectors(TILE), *ds = scratch.vectors(TILE), *delta = scratch.vectors(blocks);
    float *k_widened = scratch.floats(TILE * a.dk), *v_widened = scratch.floats(TILE * a.dv);
    float *k1 = scratch.floats(TILE * dk), *v1 = scratch.floats(TILE * dv);
    float *k2 = scratch.floats(TILE * dk), *v2 = scratch.floats(TILE * dv);
    float *pair_k = scratch.floats(TILE * dk), *pair_v = scratch.floats(TILE * dv);
    float *grad_k2 = scratch.floats(TILE * dk), *grad_v2 = scratch.floats(TILE * dv);
    float *grad_k1 = scratch.floats(a.N[0] * dk), *grad_v1 = scratch.floats(a.N[0] * dv);
    if (!base) return scratch.used;

    const Head head{a, b, h};
    const PairDropout dropout(a.seed, a.dropout_p);
    queries.load(head, 1);
    for (int64_t block = 0; block < blocks; ++block) {
        to_lanes({head.saved_out() + head.row(0, block) * a.dv, a.dv}, head.lanes(block), a.dv, 1.f, gu);
        delta[block] = -queries.grad_lse[block];
        for (int64_t d = 0; d < a.dv; ++d) delta[block] += queries.grad_out[block * a.dv + d] * gu[d];
    }
    std::memset(grad_k1, 0, a.N[0] * dk * sizeof(float));
    std::memset(grad_v1, 0, a.N[0] * dv * sizeof(float));
    for_tiles(a.N[1], [&](int64_t j0, int64_t n) {
        const Rows keys = widen(head.keys(1, j0, n, k_widened), n, a.dk, k2);
        const Rows values = widen(head.values(1, j0, n, v_widened), n, a.dv, v2);
        std::memset(grad_k2, 0, n * dk * sizeof(float));
        std::memset(grad_v2, 0, n * dv * sizeof(float));
        for_tiles(a.N[0], [&](int64_t i0, int64_t m) {
            const Rows key_factors = widen(head.keys(0, i0, m, k_widened), m, a.dk, k1);
            const Rows value_factors = widen(head.values(0, i0, m, v_widened), m, a.dv, v1);
            const uint8_t* mask = head.mask(0, i0);
            for (int64_t i = 0; i < m; ++i) {
                if (mask && !mask[i]) continue;
                const float *a_i = key_factors[i], *u_i = value_factors[i];
                for (int64_t block = 0; block < blocks; ++block) {
                    const int64_t lanes = head.lanes(block);
                    const v16 *q = queries.q + block * a.dk, *g = queries.grad_out + block * a.dv;
                    v16* grad_q = queries.grad_q + block * a.dk;
                    for (int64_t d = 0; d < a.dk; ++d) qa[d] = q[d] * a_i[d];
                    for (int64_t d = 0; d < a.dv; ++d) gu[d] = g[d] * u_i[d];
                    dot(qa, keys, n, a.dk, p);
                    apply_mask(head.mask(1, j0), n, p);
                    dot(gu, values, n, a.dv, ds);
                    // A dropped pair's value has no gradient, and its weight gets one through the softmax alone.
                    if (a.dropout_p > 0) drop(dropout, i0 + i, j0, n, block, b * a.H + h, ds);
                    normalised(p, n, queries.offset[block], queries.factor[block]);
                    for (int64_t j = 0; j < n; ++j) ds[j] = p[j] * (ds[j] - delta[block]);
                    if (a.dropout_p > 0) drop(dropout, i0 + i, j0, n, block, b * a.H + h, p);
                    for (int64_t d = 0; d < a.dk; ++d) t[d] = v16{};
                    weigh(ds, keys, n, a.dk, v16{}, t);
                    for (int64_t d = 0; d < a.dk; ++d) grad_q[d] += t[d] * a_i[d];
                    spread(ds, queries.q_rows + block * LANES * dk, lanes, n, a.dk, block > 0, pair_k, dk);
                    spread(p, queries.grad_out_rows + block * LANES * dv, lanes, n, a.dv, block > 0, pair_v, dv);
                }
                split_product(pair_k, a_i, keys, n, dk, grad_k1 + (i0 + i) * dk, grad_k2);
                split_product(pair_v, u_i, values, n, dv, grad_v1 + (i0 + i) * dv, grad_v2);
            }
        });
        head.write(grad_k2, dk, a.grad_k[1], j0, n, a.dk);
        head.write(grad_v2, dv, a.grad_v[1], j0, n, a.dv);
    });
    head.write(grad_k1, dk, a.grad_k[0], 0, a.N[0], a.dk);
    head.write(grad_v1, dv, a.grad_v[0], 0, a.N[0], a.dv);
    queries.write_grad_q(head);
    return 0;
}

}  // namespace AVF_ISA
