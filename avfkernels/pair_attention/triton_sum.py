"""Attention over two sets of tokens in Triton, with a softmax over each (pair attention by rewrite R1: the outputs add
up) or, where JOINT, one over both (prefix attention).

Forward is one launch: a program takes a block of queries of one head through both sets. With too few such programs to
fill a device, each set is cut into `splits` pieces and a second launch merges. Backward recomputes the weights from the
saved softmax. With one block of queries it is one launch; with more, gradients of queries and of tokens are two, so
that every program owns what it writes.
"""

import torch
import triton
import triton.language as tl

from avfkernels._tiles import (
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
from avfkernels._triton import bytes_of, cdiv, like, padded, upstream

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
        k = load_rows(p_k, tokens, stride_k, end, DK, BLOCK_DK)
        v = load_rows(p_v, tokens, stride_v, end, DV, BLOCK_DV)
        s = dot(q, tl.trans(k)) * scale
        s = tl.where(counted(p_mask, tokens, end)[None, :], s, float("-inf"))
        p, m_i, l_i, rescale = softmax_step(s, m_i, l_i, q.dtype == tl.float32)
        acc = dot(p.to(v.dtype), v, acc * rescale[:, None])
    return m_i, l_i, acc


@triton.jit(do_not_specialize=["B", "H", "F", "N1", "N2", "splits"])
def forward_kernel(
    p_q, p_k1, p_v1, p_k2, p_v2, p_mask1, p_mask2, p_out, p_lse, p_softmax, p_partial,
    stride_q, stride_k1, stride_v1, stride_k2, stride_v2, stride_out, B, H, F, N1, N2, splits, scale,
    JOINT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
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
    q = load_rows(at_head(p_q, stride_q, b, h), rows, stride_q[2], F, DK, BLOCK_DK)

    piece1 = tl.cdiv(tl.cdiv(N1, BLOCK_N), splits) * BLOCK_N
    piece2 = tl.cdiv(tl.cdiv(N2, BLOCK_N), splits) * BLOCK_N
    m1, l1, acc1 = softmax_start(BLOCK_F, BLOCK_DV)
    m1, l1, acc1 = attend(
        q, at_head(p_k1, stride_k1, b, h), at_head(p_v1, stride_v1, b, h), p_mask1, stride_k1[2], stride_v1[2],
        split * piece1, tl.minimum(split * piece1 + piece1, N1), scale, m1, l1, acc1,
        DK, DV, BLOCK_N, BLOCK_DK, BLOCK_DV,
    )  # fmt: skip
    m2, l2, acc2 = softmax_start(BLOCK_F, BLOCK_DV)
    if JOINT:
        m2, l2, acc2 = m1, l1, acc1
    m2, l2, acc2 = attend(
        q, at_head(p_k2, stride_k2, b, h), at_head(p_v2, stride_v2, b, h), p_mask2, stride_k2[2], stride_v2[2],
        split * piece2, tl.minimum(split * piece2 + piece2, N2), scale, m2, l2, acc2,
        DK, DV, BLOCK_N, BLOCK_DK, BLOCK_DV,
    )  # fmt: skip
    if JOINT:
        m1, l1, acc1 = m2, l2, acc2

    SETS: tl.constexpr = 1 if JOINT else 2
    row0, total = bh.to(tl.int64) * F, B.to(tl.int64) * H * F
    if p_partial is not None:
        save_partial(p_partial, split * SETS, rows, row0, total, F, m1, l1, acc1, DV, BLOCK_DV)
        if SETS == 2:
            save_partial(p_partial, split * SETS + 1, rows, row0, total, F, m2, l2, acc2, DV, BLOCK_DV)
    else:
        finish(
            m1, l1, acc1, m2, l2, acc2, at_head(p_out, stride_out, b, h), p_lse, p_softmax,
            rows, row0, total, F, stride_out[2], SETS, DV, BLOCK_DV,
        )  # fmt: skip


@triton.jit
def weights(
    q, g, p_k, p_v, p_mask, stride_k, stride_v, tokens, n, scale, offset, factor,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """p, the weights of a tile of tokens, and dp, their gradients; and the tile of keys."""
    k = load_rows(p_k, tokens, stride_k, n, DK, BLOCK_DK)
    v = load_rows(p_v, tokens, stride_v, n, DV, BLOCK_DV)
    s = dot(q, tl.trans(k)) * scale
    s = tl.where(counted(p_mask, tokens, n)[None, :], s, float("-inf"))
    return exp(s - offset[:, None], q.dtype == tl.float32) * factor[:, None], dot(g, tl.trans(v)), k


@triton.jit
def add_delta(
    q, g, p_k, p_v, p_mask, stride_k, stride_v, n, scale, offset, factor, delta,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    for n0 in range(0, n, BLOCK_N):
        p, dp, _ = weights(
            q, g, p_k, p_v, p_mask, stride_k, stride_v, n0 + tl.arange(0, BLOCK_N), n, scale, offset, factor,
            DK, DV, BLOCK_DK, BLOCK_DV,
        )  # fmt: skip
        delta += tl.sum(p * dp, 1)
    return delta


@triton.jit
def add_grad_q(
    q, g, p_k, p_v, p_mask, p_grad_k, p_grad_v, stride_k, stride_v, stride_grad_k, stride_grad_v,
    n, scale, offset, factor, delta, grad_q,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
    ALL: tl.constexpr,
):  # fmt: skip
    """Adds one set's part to grad_q; where the block of queries is ALL of them, the set's gradients are whole."""
    for n0 in range(0, n, BLOCK_N):
        tokens = n0 + tl.arange(0, BLOCK_N)
        p, dp, k = weights(
            q, g, p_k, p_v, p_mask, stride_k, stride_v, tokens, n, scale, offset, factor, DK, DV, BLOCK_DK, BLOCK_DV
        )
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        grad_q = dot(ds, k, grad_q)
        if ALL:
            store_rows(p_grad_k, dot(tl.trans(ds), q) * scale, tokens, stride_grad_k, n, DK, BLOCK_DK)
            store_rows(p_grad_v, dot(tl.trans(p.to(g.dtype)), g), tokens, stride_grad_v, n, DV, BLOCK_DV)
    return grad_q


# With p the softmax and dp = grad_out . v: ds = p (dp - delta), dq = ds k, dk = ds^T q, dv = p^T grad_out, where
# delta = sum p dp (- grad_lse) takes a pass of its own. grad_out . out is the same number and costs nothing, but its
# rounding errors are not those of p and dp: the gradients of q and k would be some 1.4 times less exact.
@triton.jit(do_not_specialize=["B", "H", "F", "N1", "N2"])
def backward_kernel(
    p_g, p_grad_lse, p_q, p_k1, p_v1, p_k2, p_v2, p_mask1, p_mask2, p_softmax, p_delta,
    p_grad_q, p_grad_k1, p_grad_v1, p_grad_k2, p_grad_v2,
    stride_g, stride_q, stride_k1, stride_v1, stride_k2, stride_v2,
    stride_grad_q, stride_grad_k1, stride_grad_v1, stride_grad_k2, stride_grad_v2, B, H, F, N1, N2, scale,
    JOINT: tl.constexpr, ALL: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta and grad_q of a block of queries; where it is ALL of them, every gradient of the head."""
    blocks = tl.cdiv(F, BLOCK_F)
    bh, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, h = bh // H, bh % H
    if p_mask1 is not None:
        p_mask1 += b.to(tl.int64) * N1
    if p_mask2 is not None:
        p_mask2 += b.to(tl.int64) * N2
    rows, row0, total = block * BLOCK_F + tl.arange(0, BLOCK_F), bh.to(tl.int64) * F, B.to(tl.int64) * H * F
    q = load_rows(at_head(p_q, stride_q, b, h), rows, stride_q[2], F, DK, BLOCK_DK)
    g = load_rows(at_head(p_g, stride_g, b, h), rows, stride_g[2], F, DV, BLOCK_DV)
    p_k1, p_v1 = at_head(p_k1, stride_k1, b, h), at_head(p_v1, stride_v1, b, h)
    p_k2, p_v2 = at_head(p_k2, stride_k2, b, h), at_head(p_v2, stride_v2, b, h)
    offset1, factor1 = load_softmax(p_softmax, rows, row0, total, F)
    offset2, factor2 = offset1, factor1
    if not JOINT:
        offset2, factor2 = load_softmax(p_softmax + 2 * total, rows, row0, total, F)

    delta1 = tl.zeros([BLOCK_F], tl.float32)
    if p_grad_lse is not None:
        delta1 -= tl.load(p_grad_lse + row0 + rows, mask=rows < F, other=0.0)
    delta2 = delta1
    delta1 = add_delta(
        q, g, p_k1, p_v1, p_mask1, stride_k1[2], stride_v1[2], N1, scale, offset1, factor1, delta1,
        DK, DV, BLOCK_N, BLOCK_DK, BLOCK_DV,
    )  # fmt: skip
    if JOINT:
        delta2 = delta1
    delta2 = add_delta(
        q, g, p_k2, p_v2, p_mask2, stride_k2[2], stride_v2[2], N2, scale, offset2, factor2, delta2,
        DK, DV, BLOCK_N, BLOCK_DK, BLOCK_DV,
    )  # fmt: skip
    if JOINT:
        delta1 = delta2
    if ALL:
        p_grad_k1, p_grad_v1 = at_head(p_grad_k1, stride_grad_k1, b, h), at_head(p_grad_v1, stride_grad_v1, b, h)
        p_grad_k2, p_grad_v2 = at_head(p_grad_k2, stride_grad_k2, b, h), at_head(p_grad_v2, stride_grad_v2, b, h)
    else:
        tl.store(p_delta + row0 + rows, delta1, mask=rows < F)
        if not JOINT:
            tl.store(p_delta + total + row0 + rows, delta2, mask=rows < F)

    grad_q = tl.zeros([BLOCK_F, BLOCK_DK], tl.float32)
    grad_q = add_grad_q(
        q, g, p_k1, p_v1, p_mask1, p_grad_k1, p_grad_v1, stride_k1[2], stride_v1[2], stride_grad_k1[2],
        stride_grad_v1[2], N1, scale, offset1, factor1, delta1, grad_q, DK, DV, BLOCK_N, BLOCK_DK, BLOCK_DV, ALL,
    )  # fmt: skip
    grad_q = add_grad_q(
        q, g, p_k2, p_v2, p_mask2, p_grad_k2, p_grad_v2, stride_k2[2], stride_v2[2], stride_grad_k2[2],
        stride_grad_v2[2], N2, scale, offset2, factor2, delta2, grad_q, DK, DV, BLOCK_N, BLOCK_DK, BLOCK_DV, ALL,
    )  # fmt: skip
    store_rows(
        at_head(p_grad_q, stride_grad_q, b, h), grad_q * scale, rows, stride_grad_q[2], F, DK, BLOCK_DK
    )  # fmt: skip


@triton.jit
def grads_of_tokens(
    p_g, p_q, p_k, p_v, p_mask, p_softmax, p_delta, p_grad_k, p_grad_v,
    stride_g, stride_q, stride_k, stride_v, stride_grad_k, stride_grad_v, n0, n, F, row0, total, scale,
    DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of tokens from all queries; tiles are [queries, tokens], the longer side first, which is
    the one that warps divide among them."""
    tokens = n0 + tl.arange(0, BLOCK_N)
    k = load_rows(p_k, tokens, stride_k, n, DK, BLOCK_DK)
    v = load_rows(p_v, tokens, stride_v, n, DV, BLOCK_DV)
    inside = counted(p_mask, tokens, n)
    grad_k = tl.zeros([BLOCK_N, BLOCK_DK], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for f0 in range(0, F, BLOCK_F):
        rows = f0 + tl.arange(0, BLOCK_F)
        q = load_rows(p_q, rows, stride_q, F, DK, BLOCK_DK)
        g = load_rows(p_g, rows, stride_g, F, DV, BLOCK_DV)
        offset, factor = load_softmax(p_softmax, rows, row0, total, F)
        delta = tl.load(p_delta + row0 + rows, mask=rows < F, other=0.0)
        s = dot(q, tl.trans(k)) * scale
        p = exp(s - offset[:, None], q.dtype == tl.float32) * factor[:, None]
        p = tl.where(inside[None, :], p, 0.0)
        ds = p * (dot(g, tl.trans(v)) - delta[:, None])
        grad_k = dot(tl.trans(ds.to(q.dtype)), q, grad_k)
        grad_v = dot(tl.trans(p.to(g.dtype)), g, grad_v)
    store_rows(p_grad_k, grad_k * scale, tokens, stride_grad_k, n, DK, BLOCK_DK)
    store_rows(p_grad_v, grad_v, tokens, stride_grad_v, n, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["B", "H", "F", "N1", "N2"])
def backward_tokens_kernel(
    p_g, p_q, p_k1, p_v1, p_k2, p_v2, p_mask1, p_mask2, p_softmax, p_delta,
    p_grad_k1, p_grad_v1, p_grad_k2, p_grad_v2,
    stride_g, stride_q, stride_k1, stride_v1, stride_k2, stride_v2,
    stride_grad_k1, stride_grad_v1, stride_grad_k2, stride_grad_v2, B, H, F, N1, N2, scale,
    JOINT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DK: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program per tile of tokens, those of the first set first."""
    tiles1 = tl.cdiv(N1, BLOCK_N)
    tiles = tiles1 + tl.cdiv(N2, BLOCK_N)
    bh, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h = bh // H, bh % H
    row0, total = bh.to(tl.int64) * F, B.to(tl.int64) * H * F
    p_g, p_q = at_head(p_g, stride_g, b, h), at_head(p_q, stride_q, b, h)
    if p_mask1 is not None:
        p_mask1 += b.to(tl.int64) * N1
    if p_mask2 is not None:
        p_mask2 += b.to(tl.int64) * N2
    if tile < tiles1:
        grads_of_tokens(
            p_g, p_q, at_head(p_k1, stride_k1, b, h), at_head(p_v1, stride_v1, b, h), p_mask1, p_softmax, p_delta,
            at_head(p_grad_k1, stride_grad_k1, b, h), at_head(p_grad_v1, stride_grad_v1, b, h),
            stride_g[2], stride_q[2], stride_k1[2], stride_v1[2], stride_grad_k1[2], stride_grad_v1[2],
            tile * BLOCK_N, N1, F, row0, total, scale, DK, DV, BLOCK_F, BLOCK_N, BLOCK_DK, BLOCK_DV,
        )  # fmt: skip
    else:
        if not JOINT:
            p_softmax += 2 * total
            p_delta += total
        grads_of_tokens(
            p_g, p_q, at_head(p_k2, stride_k2, b, h), at_head(p_v2, stride_v2, b, h), p_mask2, p_softmax, p_delta,
            at_head(p_grad_k2, stride_grad_k2, b, h), at_head(p_grad_v2, stride_grad_v2, b, h),
            stride_g[2], stride_q[2], stride_k2[2], stride_v2[2], stride_grad_k2[2], stride_grad_v2[2],
            (tile - tiles1) * BLOCK_N, N2, F, row0, total, scale, DK, DV, BLOCK_F, BLOCK_N, BLOCK_DK, BLOCK_DV,
        )  # fmt: skip


def _blocks(q, dv: int) -> dict:
    """Sizes of tiles, see bench/codegen.py for what they need. 16 queries are one fragment of a matrix instruction: one
    warp does it all while a tile fits its registers."""
    F, dk = q.shape[2:]
    width = padded(dk) + padded(dv)
    if F <= 16:
        block_f, block_n, num_warps = (16, 64, 1) if width <= 32 else (16, 32, 2) if width <= 80 else (16, 32, 4)
    else:
        block_f, block_n, num_warps = (64, 32, 4 if width <= 32 else 8)
    return {
        "DK": dk, "DV": dv, "BLOCK_F": block_f, "BLOCK_N": block_n, "BLOCK_DK": padded(dk), "BLOCK_DV": padded(dv),
        "num_warps": num_warps, "num_stages": 2,
    }  # fmt: skip


def forward(q, k1, v1, k2, v2, scale, mask1, mask2, out, lse, saved_softmax, joint):
    """Fills out, and lse and saved_softmax unless None."""
    (B, H, F, _), N1, N2, dv = q.shape, k1.shape[2], k2.shape[2], v1.shape[3]
    blocks = _blocks(q, dv)
    programs = B * H * cdiv(F, blocks["BLOCK_F"])
    if programs == 0:
        return
    splits = max(1, min(cdiv(PROGRAMS, programs), cdiv(max(N1, N2), SHORTEST_SPLIT)))
    sets = 1 if joint else 2
    partial = q.new_empty(splits, sets, B, H, F, dv + 2, dtype=torch.float32) if splits > 1 else None
    with torch.cuda.device_of(q):
        forward_kernel[(programs * splits,)](
            q, k1, v1, k2, v2, bytes_of(mask1), bytes_of(mask2), out, lse, saved_softmax, partial,
            *(t.stride()[:3] for t in (q, k1, v1, k2, v2, out)), B, H, F, N1, N2, splits, scale, JOINT=joint, **blocks,
        )  # fmt: skip
        if partial is not None:
            merge[(B * H * cdiv(F, 16),)](
                partial, out, lse, saved_softmax, out.stride()[:3], B, H, F, splits,
                SETS=sets, WIDTH=dv, BLOCK_F=16, BLOCK=padded(dv), num_warps=4,
            )  # fmt: skip


def backward(grad_out, grad_lse, q, k1, v1, k2, v2, saved_softmax, scale, mask1, mask2, joint):
    """Gradients of q, k1, v1, k2, v2."""
    (B, H, F, _), N1, N2, dv = q.shape, k1.shape[2], k2.shape[2], v1.shape[3]
    tensors = (q, k1, v1, k2, v2)
    blocks = _blocks(q, dv)
    whole = blocks["BLOCK_F"] >= F
    if B * H * F == 0:
        return tuple(torch.zeros_like(t) for t in tensors)
    grads = tuple(like(t) for t in tensors)
    g = upstream(grad_out, (B, H, F, dv), q)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    mask1, mask2 = bytes_of(mask1), bytes_of(mask2)
    delta = None if whole else q.new_empty(1 if joint else 2, B, H, F, dtype=torch.float32)
    strides = [t.stride()[:3] for t in (g, *tensors)]
    grad_strides = [t.stride()[:3] for t in grads]
    with torch.cuda.device_of(q):
        backward_kernel[(B * H * cdiv(F, blocks["BLOCK_F"]),)](
            g, grad_lse, *tensors, mask1, mask2, saved_softmax, delta, *grads, *strides, *grad_strides,
            B, H, F, N1, N2, scale, JOINT=joint, ALL=whole, **blocks,
        )  # fmt: skip
        if not whole and N1 + N2 > 0:
            tiles = cdiv(N1, blocks["BLOCK_N"]) + cdiv(N2, blocks["BLOCK_N"])
            backward_tokens_kernel[(B * H * tiles,)](
                g, *tensors, mask1, mask2, saved_softmax, delta, *grads[1:], *strides, *grad_strides[1:],
                B, H, F, N1, N2, scale, JOINT=joint, **blocks,
            )  # fmt: skip
    return grads
