// Pair attention: softmax attention of F queries over all N1 x N2 pairs of tokens (i, j), pair by pair or separated.
//
//     sum      k_ij = a_i + b_j, v_ij = u_i + w_j. The softmax over pairs is the product of two softmaxes (rewrite R1):
//              out = sum_i alpha_i u_i + sum_j beta_j w_j,   lse = lse_1 + lse_2.           O(N1 + N2)
//     dropout  of a sum's pair weights, R_ij in {0, 1 / (1 - p)}, couples the sides again, two numbers a pair:
//              out = sum_i alpha_i (R beta)_i u_i + sum_j beta_j (R^T alpha)_j w_j          2 multiply-adds a pair
//     product  k_ij = a_i * b_j, v_ij = u_i * w_j. For one i it is attention over j with the queries q * a_i, its
//              output multiplied by u_i.                                                    dk + dv multiply-adds a pair
//
// Nothing of size N1 x N2 exists anywhere: softmaxes run online over tiles of tokens, backward recomputes the weights
// from the saved log-sum-exp, and dropout masks come from a counter (csrc/philox.h). A task owns all that it writes,
// so results do not depend on the number of threads, bit for bit.
#pragma once
#include "avf.h"

// Computes one task and returns 0. With `scratch` null it computes nothing and returns the floats of scratch (aligned
// to 64 bytes) that a task needs. Forward: queries [16 * block, 16 * block + 16) of head (b, h). Backward: the whole
// head, so that the gradients of its keys and values are summed in one place; `block` is 0.
using PairTask = int64_t (*)(const AvfPair&, int64_t b, int64_t h, int64_t block, float* scratch);

struct PairTasks {
    PairTask sum[2], dropout[2], product[2];  // forward, backward
};

// csrc/*_kernel.cpp is compiled once for each instruction set.
#define AVF_DECLARE_TASK(name) int64_t name(const AvfPair&, int64_t, int64_t, int64_t, float*);
#define AVF_DECLARE_TASKS(isa)                                                            \
    namespace isa {                                                                       \
    AVF_DECLARE_TASK(pair_sum_forward) AVF_DECLARE_TASK(pair_sum_backward)                \
    AVF_DECLARE_TASK(pair_dropout_forward) AVF_DECLARE_TASK(pair_dropout_backward)        \
    AVF_DECLARE_TASK(pair_product_forward) AVF_DECLARE_TASK(pair_product_backward)        \
    }
AVF_DECLARE_TASKS(avx512)
AVF_DECLARE_TASKS(avx2)
AVF_DECLARE_TASKS(portable)
