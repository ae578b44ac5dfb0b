"""Pair attention pair by pair in Triton: products, and sums whose pairs are dropped. No pair is in memory.

A row of a tile is a token i of the first set with a query f: for products, attention of the queries q_f * a_i over the
second set is ordinary flash attention of N1 x F queries, and the outputs, times u_i, are joined over i. For sums the
row's logits are q_f . b_j + q_f . a_i, and its output is sum_j p_ij w_j + (sum_j p_ij) u_i.

Backward, with g = grad_out, dp_ij = (g * u_i) . w_j or g . (u_i + w_j), delta = sum p dp / sum p - grad_lse
and ds_ij = p_ij (dp_ij - delta):

    products   db_j = sum_if ds_ij q_f * a_i  da_i = sum_f q_f * t_if   dq_f = sum_i a_i * t_if   t_if = sum_j ds_ij b_j
    sums       db_j = sum_if ds_ij q_f        da_i = sum_jf ds_ij q_f   dq_f = sum_i t_if + (sum_j ds_ij) a_i

and w, u like b, a with p for ds and g for q. One kernel owns tiles of j, one blocks of i; the parts of dq, one for each
block of i, are summed in a fixed order. A dropped pair's value has no gradient, and its weight gets one through the
softmax alone. A first pass sums p and p dp. g . out would be the same delta, but its rounding errors do not cancel in
ds where one pair has all the weight; and dividing by sum p makes the weights of backward, whose exponentials are not
rounded as those of the online softmax are, sum to 1.
"""

from functools import partial

import torch
import triton
import triton.language as tl

from avfkernels.ops.dropout import keep_factor, threshold
from avfkernels.ops.pair_launch import launch, padded, side, sides, widths
from avfkernels.ops.tiles import (
    at_head,
    dot,
    exp,
    finish,
    finite,
    head_of,
    load_rows,
    load_side,
    load_softmax,
    merge,
    save_partial,
    softmax_join,
    softmax_start,
    softmax_step,
    store_rows,
    store_side,
    zeros,
)  # fmt: skip

PROGRAMS = 512  # enough for a device
BLOCK_F = 16
SIZES = ["B", "H", "F", "N1", "N2", "splits"]


@triton.jit
def drop(tile, dropout, i, f, bh, j0, ROWS: tl.constexpr, BLOCK_J: tl.constexpr):
    """tile [rows, BLOCK_J] * 0 or a factor, for the pairs (i, j0 + j) of queries f (dropout.py); 8 divides j0."""
    p_seed, threshold, keep_factor = dropout
    groups = j0 // 8 + tl.arange(0, BLOCK_J // 8)
    zero = tl.zeros([ROWS, BLOCK_J // 8], tl.int32)
    w0, w1, w2, w3 = tl.philox(
        tl.load(p_seed), zero + groups[None, :], zero + i[:, None], zero + f[:, None], zero + bh.to(tl.int32)
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [rows, group, high bit of the word's index, low bit]
    numbers = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [ROWS, BLOCK_J])
    return tl.where(numbers.to(tl.int32) >= threshold, tile * keep_factor, 0.0)


@triton.jit
def row_factors(x, y, PRODUCT: tl.constexpr):
    """The query side of a row: q_f * a_i for products, q_f for sums."""
    if PRODUCT:
        x = (x.to(tl.float32) * y.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def row_logits(x, y, PRODUCT: tl.constexpr):
    """What a row's logits have in common: nothing for products, q_f . a_i for sums."""
    logits = tl.zeros([x.shape[0]], tl.float32)
    if not PRODUCT:
        logits = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    return logits


@triton.jit
def by_query(rows, BLOCK_I: tl.constexpr, BLOCK_F: tl.constexpr):
    """[rows, ...] -> [BLOCK_I, BLOCK_F, ...]"""
    if len(rows.shape) == 1:
        rows = tl.reshape(rows, [BLOCK_I, BLOCK_F])
    else:
        rows = tl.reshape(rows, [BLOCK_I, BLOCK_F, rows.shape[1]])
    return rows


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    p_q, stride_q, side1, side2, dropout, p_out, stride_out, p_lse, p_softmax, p_partial,
    B, H, F, N1, N2, splits, scale, PRODUCT: tl.constexpr, WIDTHS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head over a split of the first set and all of the second."""
    ROWS: tl.constexpr = BLOCK_I * BLOCK_F
    blocks = tl.cdiv(F, BLOCK_F)
    split, block = tl.program_id(0) % splits, tl.program_id(0) // splits % blocks
    bh = tl.program_id(0) // splits // blocks
    b, h = bh // H, bh % H
    head1, head2 = head_of(side1, b, h, N1), head_of(side2, b, h, N2)
    row = tl.arange(0, ROWS)
    f = block * BLOCK_F + row % BLOCK_F
    q = load_rows(at_head(p_q, stride_q, b, h), f, stride_q[2], f < F, WIDTHS[0], WIDTHS[2])

    piece = tl.cdiv(tl.cdiv(N1, BLOCK_I), splits) * BLOCK_I
    m_f, l_f, acc_f = softmax_start(BLOCK_F, WIDTHS[3])
    for i0 in range(split * piece, tl.minimum(split * piece + piece, N1), BLOCK_I):
        i = i0 + row // BLOCK_F
        first, a, _ = load_side(side1, head1, i, N1, WIDTHS)
        qa = row_factors(q, a, PRODUCT)
        common = row_logits(q, a, PRODUCT)
        m_i, l_i, acc = softmax_start(ROWS, WIDTHS[3])
        kept = tl.zeros([ROWS], tl.float32)  # the sum of the weights that are not dropped
        for j0 in range(0, N2, BLOCK_J):
            second, k, v = load_side(side2, head2, j0 + tl.arange(0, BLOCK_J), N2, WIDTHS)
            s = (dot(qa, tl.trans(k)) + common[:, None]) * scale
            s = tl.where(second[None, :], s, float("-inf"))
            p, m_i, l_i, rescale = softmax_step(s, m_i, l_i, q.dtype == tl.float32)
            if dropout[0] is not None:
                p = drop(p, dropout, i, f, bh, j0, ROWS, BLOCK_J)
            if not PRODUCT:
                kept = kept * rescale + tl.sum(p, 1)
            acc = dot(p.to(v.dtype), v, acc * rescale[:, None])
        _, _, u = load_side(side1, head1, i, N1, WIDTHS, "evict_last")  # now: over the loop it would take registers
        if PRODUCT:
            acc *= u.to(tl.float32)
        else:
            acc += kept[:, None] * u.to(tl.float32)
        # Join the rows of each query.
        m_i = by_query(tl.where(first, m_i, float("-inf")), BLOCK_I, BLOCK_F)
        m_tile = tl.max(m_i, 0)
        rescale = exp(m_i - finite(m_tile)[None, :], q.dtype == tl.float32)
        l_tile = tl.sum(by_query(l_i, BLOCK_I, BLOCK_F) * rescale, 0)
        acc_tile = tl.sum(by_query(acc, BLOCK_I, BLOCK_F) * rescale[:, :, None], 0)
        m_f, l_f, acc_f = softmax_join(m_f, l_f, acc_f, m_tile, l_tile, acc_tile)

    rows = block * BLOCK_F + tl.arange(0, BLOCK_F)
    row0, total = bh.to(tl.int64) * F, B.to(tl.int64) * H * F
    if p_partial is not None:
        save_partial(p_partial, split, rows, row0, total, F, m_f, l_f, acc_f, WIDTHS[1], WIDTHS[3])
    else:
        finish(
            m_f, l_f, acc_f, m_f, l_f, acc_f, at_head(p_out, stride_out, b, h), p_lse, p_softmax,
            rows, row0, total, F, stride_out[2], 1, WIDTHS[1], WIDTHS[3],
        )  # fmt: skip


@triton.jit
def weights(qa, gu, k, v, common, common_dp, keep, scale, softmax, dropout, i, f, bh, j0):
    """Of a tile of pairs p, what is kept of it, and dp; keep: which pairs count."""
    s = (dot(qa, tl.trans(k)) + common[:, None]) * scale
    p = tl.where(keep, exp(s - softmax[0][:, None], qa.dtype == tl.float32) * softmax[1][:, None], 0.0)
    dp = dot(gu, tl.trans(v)) + common_dp[:, None]
    kept = p
    if dropout[0] is not None:
        ones = tl.full([p.shape[0], p.shape[1]], 1.0, tl.float32)
        factor = drop(ones, dropout, i, f, bh, j0, p.shape[0], p.shape[1])
        kept, dp = p * factor, dp * factor
    return p, kept, dp


@triton.jit(do_not_specialize=["B", "H", "F", "N1", "N2"])
def backward_second_kernel(
    queries, side1, side2, dropout, p_softmax, p_delta, grads2, B, H, F, N1, N2, scale, PRODUCT: tl.constexpr,
    WIDTHS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of the second set. Tiles are [rows, j], not [j, rows]: warps divide the first side among
    them, and one that is too short for all is computed several times."""
    tiles = tl.cdiv(N2, BLOCK_J)
    bh, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h = bh // H, bh % H
    head, head1 = head_of(queries, b, h, F), head_of(side1, b, h, N1)
    row0, total = bh.to(tl.int64) * F, B.to(tl.int64) * H * F
    row = tl.arange(0, BLOCK_I * BLOCK_F)
    j = tile * BLOCK_J + tl.arange(0, BLOCK_J)
    second, k, v = load_side(side2, head_of(side2, b, h, N2), j, N2, WIDTHS)
    grad_k = zeros(BLOCK_J, WIDTHS[2])
    grad_v = zeros(BLOCK_J, WIDTHS[3])
    for f0 in range(0, F, BLOCK_F):
        f = f0 + row % BLOCK_F
        _, q, g = load_side(queries, head, f, F, WIDTHS)
        softmax = load_softmax(p_softmax, f, row0, total, F)
        delta = tl.load(p_delta + row0 + f, mask=f < F, other=0.0)
        for i0 in range(0, N1, BLOCK_I):
            i = i0 + row // BLOCK_F
            first, a, u = load_side(side1, head1, i, N1, WIDTHS)
            qa, gu = row_factors(q, a, PRODUCT), row_factors(g, u, PRODUCT)
            p, kept, dp = weights(
                qa, gu, k, v, row_logits(q, a, PRODUCT), row_logits(g, u, PRODUCT), first[:, None] & second[None, :],
                scale, softmax, dropout, i, f, bh, tile * BLOCK_J,
            )  # fmt: skip
            grad_v = dot(tl.trans(kept.to(g.dtype)), gu, grad_v)
            grad_k = dot(tl.trans((p * (dp - delta[:, None])).to(q.dtype)), qa, grad_k)
    store_side(grads2, b, h, grad_k * scale, grad_v, j, N2, WIDTHS)


@triton.jit(do_not_specialize=["B", "H", "F", "N1", "N2"])
def backward_first_kernel(
    queries, side1, side2, dropout, p_softmax, p_delta, grads1, p_partial, B, H, F, N1, N2, scale,
    PRODUCT: tl.constexpr, WIDTHS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of the first set, and its part of grad_q: p_partial [blocks of i, B, H, F, dk].

    Without delta it computes nothing but its parts of sum p dp and sum p: p_partial [blocks of i, B, H, F, 2].
    """
    ROWS: tl.constexpr = BLOCK_I * BLOCK_F
    WIDTH: tl.constexpr = 2 if p_delta is None else WIDTHS[0]
    tiles = tl.cdiv(N1, BLOCK_I)
    bh, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h = bh // H, bh % H
    head, head1, head2 = head_of(queries, b, h, F), head_of(side1, b, h, N1), head_of(side2, b, h, N2)
    row0, total = bh.to(tl.int64) * F, B.to(tl.int64) * H * F
    p_partial += (total * tile + row0) * WIDTH
    row = tl.arange(0, ROWS)
    i = tile * BLOCK_I + row // BLOCK_F
    grad_a = zeros(BLOCK_I, WIDTHS[2])
    grad_u = zeros(BLOCK_I, WIDTHS[3])
    for f0 in range(0, F, BLOCK_F):
        f = f0 + row % BLOCK_F
        _, q, g = load_side(queries, head, f, F, WIDTHS)
        first, a, u = load_side(side1, head1, i, N1, WIDTHS)
        qa, gu = row_factors(q, a, PRODUCT), row_factors(g, u, PRODUCT)
        common, common_dp = row_logits(q, a, PRODUCT), row_logits(g, u, PRODUCT)
        softmax = load_softmax(p_softmax, f, row0, total, F)
        delta = tl.zeros([ROWS], tl.float32)
        if p_delta is not None:
            delta = tl.load(p_delta + row0 + f, mask=f < F, other=0.0)
        t = zeros(ROWS, WIDTHS[2])
        context = zeros(ROWS, WIDTHS[3])
        sum_ds, sum_p = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        for j0 in range(0, N2, BLOCK_J):
            second, k, v = load_side(side2, head2, j0 + tl.arange(0, BLOCK_J), N2, WIDTHS)
            p, kept, dp = weights(
                qa, gu, k, v, common, common_dp, first[:, None] & second[None, :], scale, softmax, dropout, i, f, bh, j0
            )
            ds = p * (dp - delta[:, None])
            if p_delta is None:
                sum_ds += tl.sum(ds, 1)
                sum_p += tl.sum(p, 1)
            else:
                t = dot(ds.to(k.dtype), k, t)
                if PRODUCT:
                    context = dot(kept.to(v.dtype), v, context)
                else:
                    sum_ds += tl.sum(ds, 1)
                    sum_p += tl.sum(kept, 1)
        rows = f0 + tl.arange(0, BLOCK_F)
        if p_delta is None:
            tl.store(p_partial + 2 * rows, tl.sum(by_query(sum_ds, BLOCK_I, BLOCK_F), 0), mask=rows < F)
            tl.store(p_partial + 2 * rows + 1, tl.sum(by_query(sum_p, BLOCK_I, BLOCK_F), 0), mask=rows < F)
        else:
            # Read again rather than kept in registers; the eviction policy keeps the compiler from undoing that.
            _, q, g = load_side(queries, head, f, F, WIDTHS, "evict_last")
            _, a, _ = load_side(side1, head1, i, N1, WIDTHS, "evict_last")
            if not PRODUCT:
                t, context = t + sum_ds[:, None] * a.to(tl.float32), context + sum_p[:, None]
                grad_a += tl.sum(by_query(sum_ds[:, None] * q.to(tl.float32), BLOCK_I, BLOCK_F), 1)
            else:
                grad_a += tl.sum(by_query(t * q.to(tl.float32), BLOCK_I, BLOCK_F), 1)
                t *= a.to(tl.float32)
            grad_u += tl.sum(by_query(context * g.to(tl.float32), BLOCK_I, BLOCK_F), 1)
            grad_q = tl.sum(by_query(t, BLOCK_I, BLOCK_F), 0)
            store_rows(p_partial, grad_q * scale, rows, WIDTHS[0], F, WIDTHS[0], WIDTHS[2])
    if p_delta is not None:
        i = tile * BLOCK_I + tl.arange(0, BLOCK_I)
        store_side(grads1, b, h, grad_a * scale, grad_u, i, N1, WIDTHS)


def _blocks(a, backward: bool) -> dict:
    """Sizes of tiles; bench/codegen.py shows what they need."""
    widest, drops = max(widths(a)[2:]), a.dropout_p > 0.0
    if backward:
        block_i, block_j, num_warps = (
            (4, 32, 4) if widest <= 32 else (2, 32, 8) if widest > 64 else (4, 16 if drops else 32, 8)
        )
    else:
        block_i, block_j, num_warps = (4, 32, 8) if widest > 64 else (4, 32, 4) if drops else (4, 64, 4)
    return {
        "PRODUCT": a.interaction == "product", "WIDTHS": widths(a), "BLOCK_I": block_i, "BLOCK_F": BLOCK_F,
        "BLOCK_J": block_j, "num_warps": num_warps, "num_stages": 2,
    }  # fmt: skip


def _dropout(a) -> tuple:
    """Of `drop`: where the seed is (None without dropout), threshold and factor."""
    return (None, 0, 1.0) if a.dropout_p == 0.0 else (a.seed, threshold(a.dropout_p), keep_factor(a.dropout_p))


def forward(a, out, lse, saved):
    """Fills out and, unless they are None, lse and saved."""
    (B, H, F, _), N1, N2, dv = a.q.shape, a.k1.shape[2], a.k2.shape[2], a.v1.shape[3]
    blocks = _blocks(a, False)
    programs = B * H * triton.cdiv(F, BLOCK_F)
    splits = max(1, min(triton.cdiv(PROGRAMS, programs), triton.cdiv(N1, blocks["BLOCK_I"])))
    pieces = a.q.new_empty(splits, B, H, F, dv + 2, dtype=torch.float32) if splits > 1 else None
    pointers = a.q, a.q.stride()[:3], *sides(a), _dropout(a), out, out.stride()[:3], lse, saved, pieces
    launch(forward_kernel, a.q.device, programs * splits, pointers, (B, H, F, N1, N2, splits, a.scale), blocks)
    if pieces is not None:
        pointers, sizes = (pieces, out, lse, saved, out.stride()[:3]), (B, H, F, splits)
        blocks = {"SETS": 1, "WIDTH": dv, "BLOCK_F": BLOCK_F, "BLOCK": padded(dv), "num_warps": 4}
        launch(merge, a.q.device, programs, pointers, sizes, blocks)


def backward(a, saved, grad_out, grad_lse, grads):
    """Fills the gradients of q, k1, v1, k2, v2."""
    (B, H, F, dk), N1, N2 = a.q.shape, a.k1.shape[2], a.k2.shape[2]
    if N1 * N2 == 0:
        for grad in grads:
            grad.zero_()
        return
    blocks = _blocks(a, True)
    tiles1, tiles2 = triton.cdiv(N1, blocks["BLOCK_I"]), triton.cdiv(N2, blocks["BLOCK_J"])
    inputs, sizes = (side(a.q, grad_out), *sides(a), _dropout(a)), (B, H, F, N1, N2, a.scale)
    grads1, grads2 = side(*grads[1:3]), side(*grads[3:])
    softmax = saved[: 2 * B * H * F].view(2, B, H, F)
    parts = a.q.new_empty(tiles1, B, H, F, 2, dtype=torch.float32)
    first = partial(launch, backward_first_kernel, a.q.device, B * H * tiles1)
    first((*inputs, softmax, None, grads1, parts), sizes, blocks)
    sum_p_dp, sum_p = parts.sum(0).unbind(-1)
    factor = torch.where(sum_p == 0, 0.0, 1 / sum_p)  # without a pair: 0
    delta = sum_p_dp * factor
    softmax = torch.stack((softmax[0], softmax[1] * factor))
    if grad_lse is not None:
        delta -= grad_lse
    parts = a.q.new_empty(tiles1, B, H, F, dk, dtype=torch.float32)
    first((*inputs, softmax, delta, grads1, parts), sizes, blocks)
    launch(backward_second_kernel, a.q.device, B * H * tiles2, (*inputs, softmax, delta, grads2), sizes, blocks)
    grads[0].copy_(parts.sum(0))
