// Pair attention with summed interactions (rewrite R1).
//
// Keys and values of the pair (i, j) are sums, k_ij = a_i + b_j and v_ij = u_i + w_j, so that the softmax over all
// N1 x N2 pairs is the product of two softmaxes and
//
//     out = sum_i softmax_i(q.a_i) u_i + sum_j softmax_j(q.b_j) w_j,     lse = lse_1 + lse_2.
//
// One task is one block of 16 queries of one head: a query is a lane of a 16-float vector, keys and values are
// broadcast, and both softmaxes run online over tiles of keys. Nothing of size N1 x N2 exists.
#pragma once
#include <cstdint>

struct PairSide {
    const float *k, *v;
    const uint8_t* mask;               // [B, N] or null
    int64_t n;                         // tokens
    int64_t k_b, k_h, k_n, v_b, v_h, v_n;  // strides
};

struct PairAttention {
    const float* q;
    PairSide side[2];
    float *out, *lse;
    int64_t B, H, F, dk, dv;
    int64_t q_b, q_h, q_n, o_b, o_h, o_n;  // strides
    float scale;
};

constexpr int64_t LANES = 16;      // queries in flight
constexpr int64_t KEY_TILE = 64;   // keys whose weights wait in L1 for the values

// Floats of scratch that one task needs (64-byte aligned).
inline int64_t pair_attention_scratch(const PairAttention& a) { return LANES * (a.dk + 2 * a.dv + KEY_TILE); }

// Computes queries [16 * block, 16 * block + 16) of head h of batch entry b.
using PairAttentionTask = void (*)(const PairAttention&, int64_t b, int64_t h, int64_t block, float* scratch);

namespace avx512 { void pair_attention_sum_task(const PairAttention&, int64_t, int64_t, int64_t, float*); }
namespace avx2 { void pair_attention_sum_task(const PairAttention&, int64_t, int64_t, int64_t, float*); }
namespace portable { void pair_attention_sum_task(const PairAttention&, int64_t, int64_t, int64_t, float*); }
