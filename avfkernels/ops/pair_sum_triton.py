"""Sums of pairs in Triton, by rewrite R1: attention over two sets of tokens, a softmax over each, the outputs added.

Forward is one launch: a program takes a block of queries of one head through both sets. With too few such programs to
fill a device, each set is cut into `splits` pieces and a second launch merges. Backward recomputes the weights from the
saved softmax. With one block of queries and short sets it is one launch. Otherwise delta = sum p dp comes first, by
pieces; then each program owns a tile of tokens and writes its part of the gradient of the queries, which are summed in
a fixed order.
"""

import torch
import triton
import triton.language as tl

from avfkernels.ops.pair_launch import launch, padded, side, sides, widths
from avfkernels.ops.tiles import (
    at_head,
    dot,
    exp,
    finish,
    head_of,
    load_rows,
    load_side,
    load_softmax,
    merge,
    save_partial,
    softmax_start,
    softmax_step,
    store_rows,
    store_side,
    zeros,
)  # fmt: skip

PROGRAMS = 256  # enough for a device
SHORTEST_SPLIT = 256  # tokens
SIZES = ["B", "H", "F", "N1", "N2", "splits"]


@triton.jit
def task(H, F, splits, BLOCK_F: tl.constexpr):
    """What this program computes: split, batch entry, head, and the rows of queries."""
    blocks = tl.cdiv(F, BLOCK_F)
    bh, block = tl.program_id(0) // splits // blocks, tl.program_id(0) // splits % blocks
    return tl.program_id(0) % splits, bh // H, bh % H, block * BLOCK_F + tl.arange(0, BLOCK_F)


@triton.jit
def piece_of(N, split, splits, BLOCK_N: tl.constexpr):
    """The tokens [start, end) of a split."""
    piece = tl.cdiv(tl.cdiv(N, BLOCK_N), splits) * BLOCK_N
    return split * piece, tl.minimum(split * piece + piece, N)


@triton.jit
def attend(q, side, head, start, end, scale, WIDTHS: tl.constexpr, BLOCK_N: tl.constexpr):
    """A softmax, in progress, over the tokens [start, end) of one set."""
    m_i, l_i, acc = softmax_start(q.shape[0], WIDTHS[3])
    for n0 in range(start, end, BLOCK_N):
        inside, k, v = load_side(side, head, n0 + tl.arange(0, BLOCK_N), end, WIDTHS)
        s = tl.where(inside[None, :], dot(q, tl.trans(k)) * scale, float("-inf"))
        p, m_i, l_i, rescale = softmax_step(s, m_i, l_i, q.dtype == tl.float32)
        acc = dot(p.to(v.dtype), v, acc * rescale[:, None])
    return m_i, l_i, acc


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    p_q, stride_q, side1, side2, p_out, stride_out, p_lse, p_softmax, p_partial, B, H, F, N1, N2, splits, scale,
    WIDTHS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    split, b, h, rows = task(H, F, splits, BLOCK_F)
    q = load_rows(at_head(p_q, stride_q, b, h), rows, stride_q[2], rows < F, WIDTHS[0], WIDTHS[2])
    start, end = piece_of(N1, split, splits, BLOCK_N)
    m1, l1, acc1 = attend(q, side1, head_of(side1, b, h, N1), start, end, scale, WIDTHS, BLOCK_N)
    start, end = piece_of(N2, split, splits, BLOCK_N)
    m2, l2, acc2 = attend(q, side2, head_of(side2, b, h, N2), start, end, scale, WIDTHS, BLOCK_N)
    row0, total = (b * H + h).to(tl.int64) * F, B.to(tl.int64) * H * F
    if p_partial is not None:
        save_partial(p_partial, split * 2, rows, row0, total, F, m1, l1, acc1, WIDTHS[1], WIDTHS[3])
        save_partial(p_partial, split * 2 + 1, rows, row0, total, F, m2, l2, acc2, WIDTHS[1], WIDTHS[3])
    else:
        finish(
            m1, l1, acc1, m2, l2, acc2, at_head(p_out, stride_out, b, h), p_lse, p_softmax,
            rows, row0, total, F, stride_out[2], 2, WIDTHS[1], WIDTHS[3],
        )  # fmt: skip


@triton.jit
def weights(q, g, k, v, inside, scale, softmax):
    """p, the weights of a tile of tokens, and dp, their gradients."""
    s = tl.where(inside[None, :], dot(q, tl.trans(k)) * scale, float("-inf"))
    return exp(s - softmax[0][:, None], q.dtype == tl.float32) * softmax[1][:, None], dot(g, tl.trans(v))


@triton.jit
def add_delta(q, g, side, head, start, end, scale, softmax, delta, WIDTHS: tl.constexpr, BLOCK_N: tl.constexpr):
    for n0 in range(start, end, BLOCK_N):
        inside, k, v = load_side(side, head, n0 + tl.arange(0, BLOCK_N), end, WIDTHS)
        p, dp = weights(q, g, k, v, inside, scale, softmax)
        delta += tl.sum(p * dp, 1)
    return delta


@triton.jit
def add_gradients(
    q, g, side, head, grads, b, h, n, scale, softmax, delta, grad_q, WIDTHS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The gradients of a set whose queries are all at hand; adds its part to grad_q."""
    for n0 in range(0, n, BLOCK_N):
        tokens = n0 + tl.arange(0, BLOCK_N)
        inside, k, v = load_side(side, head, tokens, n, WIDTHS)
        p, dp = weights(q, g, k, v, inside, scale, softmax)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        grad_q = dot(ds, k, grad_q)
        grad_k, grad_v = dot(tl.trans(ds), q) * scale, dot(tl.trans(p.to(g.dtype)), g)
        store_side(grads, b, h, grad_k, grad_v, tokens, n, WIDTHS)
    return grad_q


# With p the softmax and dp = grad_out . v: ds = p (dp - delta), dq = ds k, dk = ds^T q, dv = p^T grad_out, where
# delta = sum p dp (- grad_lse) takes a pass of its own. grad_out . out is the same number and costs nothing, but its
# rounding errors are not those of p and dp: the gradients of q and k would be some 1.4 times less exact.
@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    queries, side1, side2, p_grad_lse, p_softmax, p_delta, p_grad_q, stride_grad_q, grads1, grads2,
    B, H, F, N1, N2, splits, scale, WIDTHS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Every gradient of a head. With p_delta no gradient, but a split's part of delta, [splits, 2, B, H, F]."""
    split, b, h, rows = task(H, F, splits, BLOCK_F)
    row0, total = (b * H + h).to(tl.int64) * F, B.to(tl.int64) * H * F
    _, q, g = load_side(queries, head_of(queries, b, h, F), rows, F, WIDTHS)
    head1, head2 = head_of(side1, b, h, N1), head_of(side2, b, h, N2)
    softmax1 = load_softmax(p_softmax, rows, row0, total, F)
    softmax2 = load_softmax(p_softmax + 2 * total, rows, row0, total, F)
    delta1 = tl.zeros([BLOCK_F], tl.float32)
    if p_grad_lse is not None:
        delta1 -= tl.load(p_grad_lse + row0 + rows, mask=rows < F, other=0.0)
    delta2 = delta1
    start, end = piece_of(N1, split, splits, BLOCK_N)
    delta1 = add_delta(q, g, side1, head1, start, end, scale, softmax1, delta1, WIDTHS, BLOCK_N)
    start, end = piece_of(N2, split, splits, BLOCK_N)
    delta2 = add_delta(q, g, side2, head2, start, end, scale, softmax2, delta2, WIDTHS, BLOCK_N)
    if p_delta is not None:
        p = p_delta + 2 * total * split + row0 + rows
        tl.store(p, delta1, mask=rows < F)
        tl.store(p + total, delta2, mask=rows < F)
    else:
        grad_q = zeros(BLOCK_F, WIDTHS[2])
        grad_q = add_gradients(q, g, side1, head1, grads1, b, h, N1, scale, softmax1, delta1, grad_q, WIDTHS, BLOCK_N)
        grad_q = add_gradients(q, g, side2, head2, grads2, b, h, N2, scale, softmax2, delta2, grad_q, WIDTHS, BLOCK_N)
        p_grad_q = at_head(p_grad_q, stride_grad_q, b, h)
        store_rows(p_grad_q, grad_q * scale, rows, stride_grad_q[2], F, WIDTHS[0], WIDTHS[2])


@triton.jit(do_not_specialize=["B", "H", "F", "N", "first"])
def backward_tokens_kernel(
    queries, side, p_softmax, p_delta, grads, p_parts, B, H, F, N, first, scale,
    WIDTHS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of tokens of one set from all queries, and its part of grad_q: p_parts [tiles, B, H, F,
    dk], of which those of this set begin at `first`. Tiles are [queries, tokens]: warps divide the longer side."""
    tiles = tl.cdiv(N, BLOCK_N)
    bh, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h = bh // H, bh % H
    row0, total = bh.to(tl.int64) * F, B.to(tl.int64) * H * F
    head = head_of(queries, b, h, F)
    p_parts += (total * (first + tile) + row0) * WIDTHS[0]
    tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, k, v = load_side(side, head_of(side, b, h, N), tokens, N, WIDTHS)
    grad_k = zeros(BLOCK_N, WIDTHS[2])
    grad_v = zeros(BLOCK_N, WIDTHS[3])
    for f0 in range(0, F, BLOCK_F):
        rows = f0 + tl.arange(0, BLOCK_F)
        _, q, g = load_side(queries, head, rows, F, WIDTHS)
        delta = tl.load(p_delta + row0 + rows, mask=rows < F, other=0.0)
        p, dp = weights(q, g, k, v, inside, scale, load_softmax(p_softmax, rows, row0, total, F))
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        grad_k = dot(tl.trans(ds), q, grad_k)
        grad_v = dot(tl.trans(p.to(g.dtype)), g, grad_v)
        store_rows(p_parts, dot(ds, k) * scale, rows, WIDTHS[0], F, WIDTHS[0], WIDTHS[2])
    store_side(grads, b, h, grad_k * scale, grad_v, tokens, N, WIDTHS)


def _blocks(a) -> dict:
    """Sizes of tiles, see bench/codegen.py for what they need. 16 queries are one fragment of a matrix instruction: one
    warp does it all while a tile fits its registers."""
    F, width = a.q.shape[2], sum(widths(a)[2:])
    if F <= 16:
        block_f, block_n, num_warps = (16, 64, 1) if width <= 32 else (16, 32, 2) if width <= 80 else (16, 32, 4)
    else:
        block_f, block_n, num_warps = (64, 32, 4) if width <= 32 else (64, 32, 8) if width <= 128 else (32, 32, 4)
    return {"WIDTHS": widths(a), "BLOCK_F": block_f, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": 2}


def _splits(programs: int, longest: int) -> int:
    return max(1, min(triton.cdiv(PROGRAMS, programs), triton.cdiv(longest, SHORTEST_SPLIT)))


def forward(a, out, lse, saved):
    """Fills out and, unless they are None, lse and saved."""
    (B, H, F, _), N1, N2, dv = a.q.shape, a.k1.shape[2], a.k2.shape[2], a.v1.shape[3]
    blocks = _blocks(a)
    programs = B * H * triton.cdiv(F, blocks["BLOCK_F"])
    splits = _splits(programs, max(N1, N2))
    partial = a.q.new_empty(splits, 2, B, H, F, dv + 2, dtype=torch.float32) if splits > 1 else None
    pointers = a.q, a.q.stride()[:3], *sides(a), out, out.stride()[:3], lse, saved, partial
    launch(forward_kernel, a.q.device, programs * splits, pointers, (B, H, F, N1, N2, splits, a.scale), blocks)
    if partial is not None:
        pointers, sizes = (partial, out, lse, saved, out.stride()[:3]), (B, H, F, splits)
        blocks = {"SETS": 2, "WIDTH": dv, "BLOCK_F": 16, "BLOCK": padded(dv), "num_warps": 4}
        launch(merge, a.q.device, B * H * triton.cdiv(F, 16), pointers, sizes, blocks)


def backward(a, saved, grad_out, grad_lse, grads):
    """Fills the gradients of q, k1, v1, k2, v2."""
    (B, H, F, dk), N1, N2 = a.q.shape, a.k1.shape[2], a.k2.shape[2]
    blocks = _blocks(a)
    programs = B * H * triton.cdiv(F, blocks["BLOCK_F"])
    splits = _splits(programs, max(N1, N2))
    whole = splits == 1 and blocks["BLOCK_F"] >= F
    delta = None if whole else a.q.new_empty(splits, 2, B, H, F, dtype=torch.float32)
    queries, both, of_both = side(a.q, grad_out), sides(a), (side(*grads[1:3]), side(*grads[3:]))
    of_lse = grad_lse if whole else None
    pointers = queries, *both, of_lse, saved, delta, grads[0], grads[0].stride()[:3], *of_both
    launch(backward_kernel, a.q.device, programs * splits, pointers, (B, H, F, N1, N2, splits, a.scale), blocks)
    if whole:
        return
    delta = delta.sum(0)
    if grad_lse is not None:
        delta -= grad_lse
    if blocks["num_warps"] == 1:
        blocks["num_warps"] = 4  # gradients of a tile of tokens take registers too
    tiles1, tiles2 = triton.cdiv(N1, blocks["BLOCK_N"]), triton.cdiv(N2, blocks["BLOCK_N"])
    parts = a.q.new_empty(tiles1 + tiles2, B, H, F, dk, dtype=torch.float32)
    for s, (N, tiles, first) in enumerate(((N1, tiles1, 0), (N2, tiles2, tiles1))):
        if N > 0:
            pointers = queries, both[s], saved[2 * s * B * H * F :], delta[s], of_both[s], parts
            launch(backward_tokens_kernel, a.q.device, B * H * tiles, pointers, (B, H, F, N, first, a.scale), blocks)
    grads[0].copy_(parts.sum(0))
