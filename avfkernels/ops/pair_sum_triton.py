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

from avfkernels.ops.pair_triton import bytes_of, cdiv, padded
from avfkernels.ops.tiles import (
    at_head,
    counted,
    dot,
    exp,
    finish,
    load_rows,
    load_softmax,
    merge,
    save_partial,
    softmax_start,
    softmax_step,
    store_rows,
)  # fmt: skip

PROGRAMS = 256  # enough for a device
SHORTEST_SPLIT = 256  # tokens


@triton.jit
def attend(
    q, p_k, p_v, p_mask, stride_k, stride_v, start, end, scale, m_i, l_i, acc,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Takes a softmax through the tokens [start, end) of one set."""
    for n0 in range(start, end, BLOCK_N):
        tokens = n0 + tl.arange(0, BLOCK_N)
        inside = counted(p_mask, tokens, end)
        k = load_rows(p_k, tokens, stride_k, inside, DK, BLOCK_DK)
        v = load_rows(p_v, tokens, stride_v, inside, DV, BLOCK_DV)
        s = tl.where(inside[None, :], dot(q, tl.trans(k)) * scale, float("-inf"))
        p, m_i, l_i, rescale = softmax_step(s, m_i, l_i, q.dtype == tl.float32)
        acc = dot(p.to(v.dtype), v, acc * rescale[:, None])
    return m_i, l_i, acc


@triton.jit(do_not_specialize=["B", "H", "F", "N1", "N2", "splits"])
def forward_kernel(
    p_q, p_k1, p_v1, p_k2, p_v2, p_mask1, p_mask2, p_out, p_lse, p_softmax, p_partial,
    stride_q, stride_k1, stride_v1, stride_k2, stride_v2, stride_out, B, H, F, N1, N2, splits, scale,
    DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(F, BLOCK_F)
    split, block = tl.program_id(0) % splits, tl.program_id(0) // splits % blocks
    bh = tl.program_id(0) // splits // blocks
    b, h = bh // H, bh % H
    if p_mask1 is not None:
        p_mask1 += b.to(tl.int64) * N1
    if p_mask2 is not None:
        p_mask2 += b.to(tl.int64) * N2
    rows = block * BLOCK_F + tl.arange(0, BLOCK_F)
    q = load_rows(at_head(p_q, stride_q, b, h), rows, stride_q[2], rows < F, DK, BLOCK_DK)

    piece1 = tl.cdiv(tl.cdiv(N1, BLOCK_N), splits) * BLOCK_N
    piece2 = tl.cdiv(tl.cdiv(N2, BLOCK_N), splits) * BLOCK_N
    m1, l1, acc1 = softmax_start(BLOCK_F, BLOCK_DV)
    m1, l1, acc1 = attend(
        q, at_head(p_k1, stride_k1, b, h), at_head(p_v1, stride_v1, b, h), p_mask1, stride_k1[2], stride_v1[2],
        split * piece1, tl.minimum(split * piece1 + piece1, N1), scale, m1, l1, acc1,
        DK, DV, BLOCK_N, BLOCK_DK, BLOCK_DV,
    )  # fmt: skip
    m2, l2, acc2 = softmax_start(BLOCK_F, BLOCK_DV)
    m2, l2, acc2 = attend(
        q, at_head(p_k2, stride_k2, b, h), at_head(p_v2, stride_v2, b, h), p_mask2, stride_k2[2], stride_v2[2],
        split * piece2, tl.minimum(split * piece2 + piece2, N2), scale, m2, l2, acc2,
        DK, DV, BLOCK_N, BLOCK_DK, BLOCK_DV,
    )  # fmt: skip

    row0, total = bh.to(tl.int64) * F, B.to(tl.int64) * H * F
    if p_partial is not None:
        save_partial(p_partial, split * 2, rows, row0, total, F, m1, l1, acc1, DV, BLOCK_DV)
        save_partial(p_partial, split * 2 + 1, rows, row0, total, F, m2, l2, acc2, DV, BLOCK_DV)
    else:
        finish(
            m1, l1, acc1, m2, l2, acc2, at_head(p_out, stride_out, b, h), p_lse, p_softmax,
            rows, row0, total, F, stride_out[2], 2, DV, BLOCK_DV,
        )  # fmt: skip


@triton.jit
def weights(q, g, k, v, inside, scale, offset, factor):
    """p, the weights of a tile of tokens, and dp, their gradients."""
    s = tl.where(inside[None, :], dot(q, tl.trans(k)) * scale, float("-inf"))
    return exp(s - offset[:, None], q.dtype == tl.float32) * factor[:, None], dot(g, tl.trans(v))


@triton.jit
def add_delta(
    q, g, p_k, p_v, p_mask, stride_k, stride_v, start, end, scale, offset, factor, delta,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    for n0 in range(start, end, BLOCK_N):
        tokens = n0 + tl.arange(0, BLOCK_N)
        inside = counted(p_mask, tokens, end)
        k = load_rows(p_k, tokens, stride_k, inside, DK, BLOCK_DK)
        v = load_rows(p_v, tokens, stride_v, inside, DV, BLOCK_DV)
        p, dp = weights(q, g, k, v, inside, scale, offset, factor)
        delta += tl.sum(p * dp, 1)
    return delta


@triton.jit
def add_gradients(
    q, g, p_k, p_v, p_mask, p_grad_k, p_grad_v, stride_k, stride_v, stride_grad_k, stride_grad_v,
    n, scale, offset, factor, delta, grad_q,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The gradients of a set whose queries are all at hand; adds its part to grad_q."""
    for n0 in range(0, n, BLOCK_N):
        tokens = n0 + tl.arange(0, BLOCK_N)
        inside = counted(p_mask, tokens, n)
        k = load_rows(p_k, tokens, stride_k, inside, DK, BLOCK_DK)
        v = load_rows(p_v, tokens, stride_v, inside, DV, BLOCK_DV)
        p, dp = weights(q, g, k, v, inside, scale, offset, factor)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        grad_q = dot(ds, k, grad_q)
        store_rows(p_grad_k, dot(tl.trans(ds), q) * scale, tokens, stride_grad_k, n, DK, BLOCK_DK)
        store_rows(p_grad_v, dot(tl.trans(p.to(g.dtype)), g), tokens, stride_grad_v, n, DV, BLOCK_DV)
    return grad_q


# With p the softmax and dp = grad_out . v: ds = p (dp - delta), dq = ds k, dk = ds^T q, dv = p^T grad_out, where
# delta = sum p dp (- grad_lse) takes a pass of its own. grad_out . out is the same number and costs nothing, but its
# rounding errors are not those of p and dp: the gradients of q and k would be some 1.4 times less exact.
@triton.jit(do_not_specialize=["B", "H", "F", "N1", "N2", "splits"])
def backward_kernel(
    p_g, p_grad_lse, p_q, p_k1, p_v1, p_k2, p_v2, p_mask1, p_mask2, p_softmax, p_delta,
    p_grad_q, p_grad_k1, p_grad_v1, p_grad_k2, p_grad_v2,
    stride_g, stride_q, stride_k1, stride_v1, stride_k2, stride_v2,
    stride_grad_q, stride_grad_k1, stride_grad_v1, stride_grad_k2, stride_grad_v2, B, H, F, N1, N2, splits, scale,
    DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Every gradient of a head. With p_delta no gradient, but a split's part of delta, [splits, 2, B, H, F]."""
    blocks = tl.cdiv(F, BLOCK_F)
    split, block = tl.program_id(0) % splits, tl.program_id(0) // splits % blocks
    bh = tl.program_id(0) // splits // blocks
    b, h = bh // H, bh % H
    if p_mask1 is not None:
        p_mask1 += b.to(tl.int64) * N1
    if p_mask2 is not None:
        p_mask2 += b.to(tl.int64) * N2
    rows, row0, total = block * BLOCK_F + tl.arange(0, BLOCK_F), bh.to(tl.int64) * F, B.to(tl.int64) * H * F
    q = load_rows(at_head(p_q, stride_q, b, h), rows, stride_q[2], rows < F, DK, BLOCK_DK)
    g = load_rows(at_head(p_g, stride_g, b, h), rows, stride_g[2], rows < F, DV, BLOCK_DV)
    p_k1, p_v1 = at_head(p_k1, stride_k1, b, h), at_head(p_v1, stride_v1, b, h)
    p_k2, p_v2 = at_head(p_k2, stride_k2, b, h), at_head(p_v2, stride_v2, b, h)
    offset1, factor1 = load_softmax(p_softmax, rows, row0, total, F)
    offset2, factor2 = load_softmax(p_softmax + 2 * total, rows, row0, total, F)

    piece1 = tl.cdiv(tl.cdiv(N1, BLOCK_N), splits) * BLOCK_N
    piece2 = tl.cdiv(tl.cdiv(N2, BLOCK_N), splits) * BLOCK_N
    delta1 = tl.zeros([BLOCK_F], tl.float32)
    if p_grad_lse is not None:
        delta1 -= tl.load(p_grad_lse + row0 + rows, mask=rows < F, other=0.0)
    delta2 = delta1
    delta1 = add_delta(
        q, g, p_k1, p_v1, p_mask1, stride_k1[2], stride_v1[2], split * piece1,
        tl.minimum(split * piece1 + piece1, N1), scale, offset1, factor1, delta1, DK, DV, BLOCK_N, BLOCK_DK, BLOCK_DV,
    )  # fmt: skip
    delta2 = add_delta(
        q, g, p_k2, p_v2, p_mask2, stride_k2[2], stride_v2[2], split * piece2,
        tl.minimum(split * piece2 + piece2, N2), scale, offset2, factor2, delta2, DK, DV, BLOCK_N, BLOCK_DK, BLOCK_DV,
    )  # fmt: skip
    if p_delta is not None:
        p = p_delta + 2 * total * split + row0 + rows
        tl.store(p, delta1, mask=rows < F)
        tl.store(p + total, delta2, mask=rows < F)
    else:
        grad_q = tl.zeros([BLOCK_F, BLOCK_DK], tl.float32)
        grad_q = add_gradients(
            q, g, p_k1, p_v1, p_mask1, at_head(p_grad_k1, stride_grad_k1, b, h),
            at_head(p_grad_v1, stride_grad_v1, b, h), stride_k1[2], stride_v1[2], stride_grad_k1[2], stride_grad_v1[2],
            N1, scale, offset1, factor1, delta1, grad_q, DK, DV, BLOCK_N, BLOCK_DK, BLOCK_DV,
        )  # fmt: skip
        grad_q = add_gradients(
            q, g, p_k2, p_v2, p_mask2, at_head(p_grad_k2, stride_grad_k2, b, h),
            at_head(p_grad_v2, stride_grad_v2, b, h), stride_k2[2], stride_v2[2], stride_grad_k2[2], stride_grad_v2[2],
            N2, scale, offset2, factor2, delta2, grad_q, DK, DV, BLOCK_N, BLOCK_DK, BLOCK_DV,
        )  # fmt: skip
        p_grad_q = at_head(p_grad_q, stride_grad_q, b, h)
        store_rows(p_grad_q, grad_q * scale, rows, stride_grad_q[2], F, DK, BLOCK_DK)


@triton.jit(do_not_specialize=["B", "H", "F", "N", "first"])
def backward_tokens_kernel(
    p_g, p_q, p_k, p_v, p_mask, p_softmax, p_delta, p_grad_k, p_grad_v, p_parts,
    stride_g, stride_q, stride_k, stride_v, stride_grad_k, stride_grad_v, B, H, F, N, first, scale,
    DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of tokens of one set from all queries, and its part of grad_q: p_parts [tiles, B, H, F,
    DK], of which those of this set begin at `first`. Tiles are [queries, tokens]: warps divide the longer side."""
    tiles = tl.cdiv(N, BLOCK_N)
    bh, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h = bh // H, bh % H
    row0, total = bh.to(tl.int64) * F, B.to(tl.int64) * H * F
    p_g, p_q = at_head(p_g, stride_g, b, h), at_head(p_q, stride_q, b, h)
    p_parts += (total * (first + tile) + row0) * DK
    if p_mask is not None:
        p_mask += b.to(tl.int64) * N
    tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = counted(p_mask, tokens, N)
    k = load_rows(at_head(p_k, stride_k, b, h), tokens, stride_k[2], inside, DK, BLOCK_DK)
    v = load_rows(at_head(p_v, stride_v, b, h), tokens, stride_v[2], inside, DV, BLOCK_DV)
    grad_k = tl.zeros([BLOCK_N, BLOCK_DK], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for f0 in range(0, F, BLOCK_F):
        rows = f0 + tl.arange(0, BLOCK_F)
        q = load_rows(p_q, rows, stride_q[2], rows < F, DK, BLOCK_DK)
        g = load_rows(p_g, rows, stride_g[2], rows < F, DV, BLOCK_DV)
        offset, factor = load_softmax(p_softmax, rows, row0, total, F)
        delta = tl.load(p_delta + row0 + rows, mask=rows < F, other=0.0)
        p, dp = weights(q, g, k, v, inside, scale, offset, factor)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        grad_k = dot(tl.trans(ds), q, grad_k)
        grad_v = dot(tl.trans(p.to(g.dtype)), g, grad_v)
        store_rows(p_parts, dot(ds, k) * scale, rows, DK, F, DK, BLOCK_DK)
    store_rows(at_head(p_grad_k, stride_grad_k, b, h), grad_k * scale, tokens, stride_grad_k[2], N, DK, BLOCK_DK)
    store_rows(at_head(p_grad_v, stride_grad_v, b, h), grad_v, tokens, stride_grad_v[2], N, DV, BLOCK_DV)


def _blocks(q, dv: int) -> dict:
    """Sizes of tiles, see bench/codegen.py for what they need. 16 queries are one fragment of a matrix instruction: one
    warp does it all while a tile fits its registers."""
    F, dk = q.shape[2:]
    width = padded(dk) + padded(dv)
    if F <= 16:
        block_f, block_n, num_warps = (16, 64, 1) if width <= 32 else (16, 32, 2) if width <= 80 else (16, 32, 4)
    else:
        block_f, block_n, num_warps = (64, 32, 4) if width <= 32 else (64, 32, 8) if width <= 128 else (32, 32, 4)
    return {
        "DK": dk, "DV": dv, "BLOCK_F": block_f, "BLOCK_N": block_n, "BLOCK_DK": padded(dk), "BLOCK_DV": padded(dv),
        "num_warps": num_warps, "num_stages": 2,
    }  # fmt: skip


def _splits(programs: int, longest: int) -> int:
    return max(1, min(cdiv(PROGRAMS, programs), cdiv(longest, SHORTEST_SPLIT)))


def forward(a, out, lse, saved):
    """Fills out and, unless they are None, lse and saved."""
    (B, H, F, _), N1, N2, dv = a.q.shape, a.k1.shape[2], a.k2.shape[2], a.v1.shape[3]
    blocks, tensors = _blocks(a.q, dv), a.tensors()
    programs = B * H * cdiv(F, blocks["BLOCK_F"])
    splits = _splits(programs, max(N1, N2))
    partial = a.q.new_empty(splits, 2, B, H, F, dv + 2, dtype=torch.float32) if splits > 1 else None
    forward_kernel[(programs * splits,)](
        *tensors, bytes_of(a.mask1), bytes_of(a.mask2), out, lse, saved, partial,
        *(t.stride()[:3] for t in (*tensors, out)), B, H, F, N1, N2, splits, a.scale, **blocks,
    )  # fmt: skip
    if partial is not None:
        merge[(B * H * cdiv(F, 16),)](
            partial, out, lse, saved, out.stride()[:3], B, H, F, splits,
            SETS=2, WIDTH=dv, BLOCK_F=16, BLOCK=padded(dv), num_warps=4,
        )  # fmt: skip


def backward(a, saved, grad_out, grad_lse, grads):
    """Fills the gradients of q, k1, v1, k2, v2."""
    (B, H, F, dk), N1, N2, dv = a.q.shape, a.k1.shape[2], a.k2.shape[2], a.v1.shape[3]
    blocks, tensors = _blocks(a.q, dv), a.tensors()
    programs = B * H * cdiv(F, blocks["BLOCK_F"])
    splits = _splits(programs, max(N1, N2))
    whole = splits == 1 and blocks["BLOCK_F"] >= F
    delta = None if whole else a.q.new_empty(splits, 2, B, H, F, dtype=torch.float32)
    masks = bytes_of(a.mask1), bytes_of(a.mask2)
    strides = [t.stride()[:3] for t in (grad_out, *tensors)]
    grad_strides = [t.stride()[:3] for t in grads]
    backward_kernel[(programs * splits,)](
        grad_out, grad_lse if whole else None, *tensors, *masks, saved, delta, *grads, *strides, *grad_strides,
        B, H, F, N1, N2, splits, a.scale, **blocks,
    )  # fmt: skip
    if whole:
        return
    delta = delta.sum(0)
    if grad_lse is not None:
        delta -= grad_lse
    if blocks["num_warps"] == 1:
        blocks["num_warps"] = 4  # gradients of a tile of tokens take registers too
    tiles1, tiles2 = cdiv(N1, blocks["BLOCK_N"]), cdiv(N2, blocks["BLOCK_N"])
    parts = a.q.new_empty(tiles1 + tiles2, B, H, F, dk, dtype=torch.float32)
    for side, (N, tiles, first) in enumerate(((N1, tiles1, 0), (N2, tiles2, tiles1))):
        if N > 0:
            k, v = 1 + 2 * side, 2 + 2 * side
            backward_tokens_kernel[(B * H * tiles,)](
                grad_out, a.q, tensors[k], tensors[v], masks[side], saved[2 * side * B * H * F :], delta[side],
                grads[k], grads[v], parts, *strides[:2], strides[k + 1], strides[v + 1], grad_strides[k],
                grad_strides[v], B, H, F, N, first, a.scale, **blocks,
            )  # fmt: skip
    grads[0].copy_(parts.sum(0))
