#include <cmath>

#include "pair_attention.h"
#include "vec16.h"

namespace AVF_ISA {

// Value columns summed in registers at a time: as many as leave room for the weights and a broadcast.
#if defined(__AVX512F__)
constexpr int CHUNK = 16;
#else
constexpr int CHUNK = 4;
#endif
constexpr float LOG2E = 1.44269504088896340736f;

// scores[j] = scale * q . k_j for n keys, 16 queries at once.
static void score_tile(const v16* q, int64_t dk, const float* k, int64_t k_n, int64_t n, float scale, v16* scores) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        const float *k0 = k + j * k_n, *k1 = k0 + k_n, *k2 = k1 + k_n, *k3 = k2 + k_n;
        v16 s0{}, s1{}, s2{}, s3{};
        for (int64_t d = 0; d < dk; ++d) {
            const v16 qd = q[d];
            s0 += qd * k0[d];
            s1 += qd * k1[d];
            s2 += qd * k2[d];
            s3 += qd * k3[d];
        }
        scores[j] = s0 * scale;
        scores[j + 1] = s1 * scale;
        scores[j + 2] = s2 * scale;
        scores[j + 3] = s3 * scale;
    }
    for (; j < n; ++j) {
        v16 s{};
        for (int64_t d = 0; d < dk; ++d) s += q[d] * k[j * k_n + d];
        scores[j] = s * scale;
    }
}

// acc[d] = acc[d] * rescale + sum_j weights[j] * v_j[d] for the C columns from d. A tile is summed on its own first,
// which keeps the rounding error of long sums down.
template <int C>
static void value_columns(const v16* weights, const float* v, int64_t v_n, int64_t n, v16 rescale, v16* acc) {
    v16 sum[C];
    for (int c = 0; c < C; ++c) sum[c] = v16{};
    for (int64_t j = 0; j < n; ++j) {
        const v16 w = weights[j];
        const float* row = v + j * v_n;
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) sum[c] += w * row[c];
    }
    for (int c = 0; c < C; ++c) acc[c] = acc[c] * rescale + sum[c];
}

// Online softmax attention of 16 queries over one side. Leaves the unnormalised output in acc [dv], and the running
// maximum and sum of exponentials; the maximum stays -inf when no key may be attended to.
static void attend(const PairSide& side, int64_t b, int64_t h, const v16* q, int64_t dk, int64_t dv, float scale,
                   v16* weights, v16* acc, v16& maximum, v16& sum) {
    const float* k = side.k + b * side.k_b + h * side.k_h;
    const float* v = side.v + b * side.v_b + h * side.v_h;
    const uint8_t* mask = side.mask ? side.mask + b * side.n : nullptr;
    const v16 minus_infinity = splat(-INFINITY);
    maximum = minus_infinity;
    sum = v16{};
    for (int64_t d = 0; d < dv; ++d) acc[d] = v16{};

    for (int64_t j0 = 0; j0 < side.n; j0 += KEY_TILE) {
        const int64_t n = side.n - j0 < KEY_TILE ? side.n - j0 : KEY_TILE;
        score_tile(q, dk, k + j0 * side.k_n, side.k_n, n, scale, weights);
        if (mask)
            for (int64_t j = 0; j < n; ++j)
                if (!mask[j0 + j]) weights[j] = minus_infinity;

        v16 new_maximum = maximum;
        for (int64_t j = 0; j < n; ++j) new_maximum = max(weights[j], new_maximum);
        // While every key so far is masked the maximum is -inf; subtract 0 instead, so that the weights are 0, not NaN.
        const v16 offset = select(new_maximum == minus_infinity, v16{}, new_maximum);
        const v16 rescale = exp2_nonpositive((maximum - offset) * LOG2E);
        v16 tile_sum{};
        for (int64_t j = 0; j < n; ++j) {
            weights[j] = exp2_nonpositive((weights[j] - offset) * LOG2E);
            tile_sum += weights[j];
        }
        sum = sum * rescale + tile_sum;
        maximum = new_maximum;

        int64_t d = 0;
        for (; d + CHUNK <= dv; d += CHUNK)
            value_columns<CHUNK>(weights, v + j0 * side.v_n + d, side.v_n, n, rescale, acc + d);
        for (; d < dv; ++d) value_columns<1>(weights, v + j0 * side.v_n + d, side.v_n, n, rescale, acc + d);
    }
}

void pair_attention_sum_task(const PairAttention& a, int64_t b, int64_t h, int64_t block, float* scratch) {
    v16* q = reinterpret_cast<v16*>(scratch);  // [dk] queries, one a lane
    v16* acc1 = q + a.dk;
    v16* acc2 = acc1 + a.dv;
    v16* weights = acc2 + a.dv;

    const int64_t f0 = block * LANES;
    const int64_t lanes = a.F - f0 < LANES ? a.F - f0 : LANES;
    const float* rows = a.q + b * a.q_b + h * a.q_h + f0 * a.q_n;
    for (int64_t d = 0; d < a.dk; ++d) {
        v16 lane{};
        for (int64_t f = 0; f < lanes; ++f) lane[f] = rows[f * a.q_n + d];
        q[d] = lane;
    }

    v16 max1, sum1, max2, sum2;
    attend(a.side[0], b, h, q, a.dk, a.dv, a.scale, weights, acc1, max1, sum1);
    attend(a.side[1], b, h, q, a.dk, a.dv, a.scale, weights, acc2, max2, sum2);

    // A side with no key leaves no pair: the output is 0 and lse is -inf.
    const v16 minus_infinity = splat(-INFINITY);
    const v16i empty = (max1 == minus_infinity) | (max2 == minus_infinity);
    const v16 scale1 = select(empty, v16{}, 1.f / sum1), scale2 = select(empty, v16{}, 1.f / sum2);

    float* out = a.out + b * a.o_b + h * a.o_h + f0 * a.o_n;
    for (int64_t d = 0; d < a.dv; ++d) {
        const v16 o = acc1[d] * scale1 + acc2[d] * scale2;
        for (int64_t f = 0; f < lanes; ++f) out[f * a.o_n + d] = o[f];
    }
    float* lse = a.lse + (b * a.H + h) * a.F + f0;
    for (int64_t f = 0; f < lanes; ++f)
        lse[f] = empty[f] ? -INFINITY : (max1[f] + max2[f]) + (std::log(sum1[f]) + std::log(sum2[f]));
}

}  // namespace AVF_ISA
