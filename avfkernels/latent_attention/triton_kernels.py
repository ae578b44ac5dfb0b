"""Latent attention in Triton: x is keys and values, and a tile of it is read once for both.

Rows are up to 1024 wide, and few: a product over a row's columns is a small tile with a long sum. The columns are dealt
out to the warps, so that tiles are [CHUNKS, rows, columns of a chunk] and products are batched over the chunks: each
warp multiplies its own columns, and only the [queries, tokens] tile, summed over chunks, crosses warps. A warp that had
all columns would repeat what the others do and hold more than its registers. Rows come as two pieces, [0, D1) and
[D1, D), so that 768 = 512 + 256 is not padded.
"""

import torch
import triton
import triton.language as tl

from avfkernels._tiles import NO_POLICY, counted, dot, finite, load_softmax, save_softmax, softmax_step
from avfkernels._triton import bytes_of, cdiv, padded, upstream


@triton.jit
def chunk_addresses(p, rows, stride, n, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Addresses of a piece of the given rows of a matrix, as [CHUNKS, rows, BLOCK], and which of them exist."""
    columns = tl.arange(0, CHUNKS)[:, None, None] * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    inside = rows[None, :, None] < n
    if WIDTH < CHUNKS * BLOCK:
        inside = inside & (columns < WIDTH)
    return p + rows.to(tl.int64)[None, :, None] * stride + columns, inside


@triton.jit
def load_pieces(
    p, rows, stride, n,
    D1: tl.constexpr, D2: tl.constexpr, CHUNKS: tl.constexpr, BLOCK1: tl.constexpr, BLOCK2: tl.constexpr,
    EVICT: tl.constexpr = NO_POLICY,
):  # fmt: skip
    address1, inside1 = chunk_addresses(p, rows, stride, n, D1, CHUNKS, BLOCK1)
    address2, inside2 = chunk_addresses(p + D1, rows, stride, n, D2, CHUNKS, BLOCK2)
    tile1 = tl.load(address1, mask=inside1, other=0.0, eviction_policy=EVICT)
    return tile1, tl.load(address2, mask=inside2, other=0.0, eviction_policy=EVICT)


@triton.jit
def again(
    tile1, tile2, p, rows, stride, n,
    D1: tl.constexpr, D2: tl.constexpr, CHUNKS: tl.constexpr, BLOCK1: tl.constexpr, BLOCK2: tl.constexpr,
):  # fmt: skip
    """Pieces that were used transposed, for use as they are. In float32 both at once are too much for shared memory:
    they are read again, and the eviction policy keeps the compiler from undoing that."""
    if tile1.dtype == tl.float32:
        tile1, tile2 = load_pieces(p, rows, stride, n, D1, D2, CHUNKS, BLOCK1, BLOCK2, "evict_last")
    return tile1, tile2


@triton.jit
def store_pieces(
    p, tile1, tile2, rows, stride, n,
    D1: tl.constexpr, D2: tl.constexpr, CHUNKS: tl.constexpr, BLOCK1: tl.constexpr, BLOCK2: tl.constexpr,
):  # fmt: skip
    address1, inside1 = chunk_addresses(p, rows, stride, n, D1, CHUNKS, BLOCK1)
    address2, inside2 = chunk_addresses(p + D1, rows, stride, n, D2, CHUNKS, BLOCK2)
    tl.store(address1, tile1.to(p.dtype.element_ty), mask=inside1)
    tl.store(address2, tile2.to(p.dtype.element_ty), mask=inside2)


@triton.jit
def chunk_products(a1, a2, b1, b2):
    """a @ b^T over both pieces, [CHUNKS, rows of a, rows of b]: its sum over chunks is the product."""
    return dot(a2, tl.permute(b2, (0, 2, 1)), dot(a1, tl.permute(b1, (0, 2, 1))))


@triton.jit
def sums(products1, products2):
    """Sums over chunks of two tiles; as one reduction they need fewer registers than as two."""
    return tl.split(tl.sum(tl.join(products1, products2), 0))


@triton.jit
def add_weighted(w, x1, x2, acc1, acc2):
    """acc + w @ x, in which every chunk has the same weights."""
    w = w.to(x1.dtype)[None, :, :]
    acc1 = dot(tl.broadcast_to(w, (x1.shape[0], w.shape[1], w.shape[2])), x1, acc1)
    acc2 = dot(tl.broadcast_to(w, (x2.shape[0], w.shape[1], w.shape[2])), x2, acc2)
    return acc1, acc2


@triton.jit(do_not_specialize=["B", "M", "N"])
def forward_kernel(
    p_q, p_x, p_mask, p_out, p_lse, p_softmax, stride_q, stride_x, stride_out, B, M, N, scale,
    D1: tl.constexpr, D2: tl.constexpr, CHUNKS: tl.constexpr, BLOCK1: tl.constexpr, BLOCK2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per block of queries, [BLOCK_M, D]."""
    blocks = tl.cdiv(M, BLOCK_M)
    b, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b64 = b.to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q1, q2 = load_pieces(p_q + b64 * stride_q[0], rows, stride_q[1], M, D1, D2, CHUNKS, BLOCK1, BLOCK2)
    p_x += b64 * stride_x[0]
    if p_mask is not None:
        p_mask += b64 * N
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([CHUNKS, BLOCK_M, BLOCK1], tl.float32)
    acc2 = tl.zeros([CHUNKS, BLOCK_M, BLOCK2], tl.float32)
    for n0 in range(0, N, BLOCK_N):
        tokens = n0 + tl.arange(0, BLOCK_N)
        x1, x2 = load_pieces(p_x, tokens, stride_x[1], N, D1, D2, CHUNKS, BLOCK1, BLOCK2)
        s = tl.sum(chunk_products(q1, q2, x1, x2), 0) * scale
        s = tl.where(counted(p_mask, tokens, N)[None, :], s, float("-inf"))
        p, m_i, l_i, rescale = softmax_step(s, m_i, l_i)
        rescale = rescale[None, :, None]
        x1, x2 = again(x1, x2, p_x, tokens, stride_x[1], N, D1, D2, CHUNKS, BLOCK1, BLOCK2)
        acc1, acc2 = add_weighted(p, x1, x2, acc1 * rescale, acc2 * rescale)
    factor = tl.where(l_i == 0.0, 0.0, 1.0 / l_i)
    store_pieces(
        p_out + b64 * stride_out[0], acc1 * factor[None, :, None], acc2 * factor[None, :, None], rows, stride_out[1],
        M, D1, D2, CHUNKS, BLOCK1, BLOCK2,
    )  # fmt: skip
    if p_lse is not None:
        tl.store(p_lse + b64 * M + rows, (finite(m_i) + tl.log(l_i)), mask=rows < M)
    if p_softmax is not None:
        save_softmax(p_softmax, rows, b64 * M, B.to(tl.int64) * M, M, m_i, factor)


@triton.jit(do_not_specialize=["B", "M", "N"])
def backward_q_kernel(
    p_g, p_grad_lse, p_q, p_x, p_mask, p_softmax, p_delta, p_grad_q, stride_g, stride_q, stride_x, stride_grad_q,
    B, M, N, scale,
    D1: tl.constexpr, D2: tl.constexpr, CHUNKS: tl.constexpr, BLOCK1: tl.constexpr, BLOCK2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """delta = sum p dp - grad_lse and dq = sum p (dp - delta) x of a block of queries, in two passes over x."""
    blocks = tl.cdiv(M, BLOCK_M)
    b, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b64 = b.to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q1, q2 = load_pieces(p_q + b64 * stride_q[0], rows, stride_q[1], M, D1, D2, CHUNKS, BLOCK1, BLOCK2)
    g1, g2 = load_pieces(p_g + b64 * stride_g[0], rows, stride_g[1], M, D1, D2, CHUNKS, BLOCK1, BLOCK2)
    p_x += b64 * stride_x[0]
    if p_mask is not None:
        p_mask += b64 * N
    offset, factor = load_softmax(p_softmax, rows, b64 * M, B.to(tl.int64) * M, M)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if p_grad_lse is not None:
        delta -= tl.load(p_grad_lse + b64 * M + rows, mask=rows < M, other=0.0)
    for n0 in range(0, N, BLOCK_N):
        tokens = n0 + tl.arange(0, BLOCK_N)
        x1, x2 = load_pieces(p_x, tokens, stride_x[1], N, D1, D2, CHUNKS, BLOCK1, BLOCK2)
        s, dp = sums(chunk_products(q1, q2, x1, x2), chunk_products(g1, g2, x1, x2))
        s = tl.where(counted(p_mask, tokens, N)[None, :], s * scale, float("-inf"))
        delta += tl.sum(tl.exp(s - offset[:, None]) * factor[:, None] * dp, 1)
    tl.store(p_delta + b64 * M + rows, delta, mask=rows < M)
    grad1 = tl.zeros([CHUNKS, BLOCK_M, BLOCK1], tl.float32)
    grad2 = tl.zeros([CHUNKS, BLOCK_M, BLOCK2], tl.float32)
    for n0 in range(0, N, BLOCK_N):
        tokens = n0 + tl.arange(0, BLOCK_N)
        x1, x2 = load_pieces(p_x, tokens, stride_x[1], N, D1, D2, CHUNKS, BLOCK1, BLOCK2)
        s, dp = sums(chunk_products(q1, q2, x1, x2), chunk_products(g1, g2, x1, x2))
        s = tl.where(counted(p_mask, tokens, N)[None, :], s * scale, float("-inf"))
        ds = tl.exp(s - offset[:, None]) * factor[:, None] * (dp - delta[:, None])
        x1, x2 = again(x1, x2, p_x, tokens, stride_x[1], N, D1, D2, CHUNKS, BLOCK1, BLOCK2)
        grad1, grad2 = add_weighted(ds, x1, x2, grad1, grad2)
    store_pieces(
        p_grad_q + b64 * stride_grad_q[0], grad1 * scale, grad2 * scale, rows, stride_grad_q[1], M,
        D1, D2, CHUNKS, BLOCK1, BLOCK2,
    )  # fmt: skip


@triton.jit(do_not_specialize=["B", "M", "N"])
def backward_x_kernel(
    p_g, p_q, p_x, p_mask, p_softmax, p_delta, p_grad_x, stride_g, stride_q, stride_x, stride_grad_x, B, M, N, scale,
    D1: tl.constexpr, D2: tl.constexpr, CHUNKS: tl.constexpr, BLOCK1: tl.constexpr, BLOCK2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx = p^T grad_out + scale ds^T q of a tile of tokens, from all queries; tiles are [tokens, queries]."""
    tiles = tl.cdiv(N, BLOCK_N)
    b, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b64 = b.to(tl.int64)
    tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    x1, x2 = load_pieces(p_x + b64 * stride_x[0], tokens, stride_x[1], N, D1, D2, CHUNKS, BLOCK1, BLOCK2)
    if p_mask is not None:
        p_mask += b64 * N
    inside = counted(p_mask, tokens, N)
    grad1 = tl.zeros([CHUNKS, BLOCK_N, BLOCK1], tl.float32)
    grad2 = tl.zeros([CHUNKS, BLOCK_N, BLOCK2], tl.float32)
    p_q += b64 * stride_q[0]
    p_g += b64 * stride_g[0]
    for m0 in range(0, M, BLOCK_M):
        rows = m0 + tl.arange(0, BLOCK_M)
        q1, q2 = load_pieces(p_q, rows, stride_q[1], M, D1, D2, CHUNKS, BLOCK1, BLOCK2)
        g1, g2 = load_pieces(p_g, rows, stride_g[1], M, D1, D2, CHUNKS, BLOCK1, BLOCK2)
        offset, factor = load_softmax(p_softmax, rows, b64 * M, B.to(tl.int64) * M, M)
        delta = tl.load(p_delta + b64 * M + rows, mask=rows < M, other=0.0)
        s, dp = sums(chunk_products(x1, x2, q1, q2), chunk_products(x1, x2, g1, g2))
        p = tl.where(inside[:, None], tl.exp(s * scale - offset[None, :]) * factor[None, :], 0.0)
        ds = p * (dp - delta[None, :]) * scale
        g1, g2 = again(g1, g2, p_g, rows, stride_g[1], M, D1, D2, CHUNKS, BLOCK1, BLOCK2)
        grad1, grad2 = add_weighted(p, g1, g2, grad1, grad2)
        q1, q2 = again(q1, q2, p_q, rows, stride_q[1], M, D1, D2, CHUNKS, BLOCK1, BLOCK2)
        grad1, grad2 = add_weighted(ds, q1, q2, grad1, grad2)
    store_pieces(
        p_grad_x + b64 * stride_grad_x[0], grad1, grad2, tokens, stride_grad_x[1], N, D1, D2, CHUNKS, BLOCK1, BLOCK2
    )


def _blocks(D: int, dtype: torch.dtype) -> dict:
    """Sizes of tiles: a chunk of each piece is at least the 16 columns that a matrix instruction sums over."""
    chunks = max(1, min(8 if D > 256 else 4, padded(D) // 32))
    D1 = min(D, max(16, padded(D) // 2))
    return {
        "D1": D1, "D2": D - D1, "CHUNKS": chunks,
        "BLOCK1": padded(cdiv(D1, chunks)), "BLOCK2": padded(cdiv(D - D1, chunks)), "BLOCK_M": 16,
        "BLOCK_N": 16 if dtype == torch.float32 else 32,
        "num_warps": chunks, "num_stages": 1,
    }  # fmt: skip


def forward(q, x, scale, mask, out, lse, saved_softmax):
    """Fills out, and lse and saved_softmax unless None."""
    (B, M, D), N = q.shape, x.shape[1]
    blocks = _blocks(D, q.dtype)
    with torch.cuda.device_of(q):
        forward_kernel[(B * cdiv(M, blocks["BLOCK_M"]),)](
            q, x, bytes_of(mask), out, lse, saved_softmax, *(t.stride()[:2] for t in (q, x, out)), B, M, N, scale,
            **blocks,
        )  # fmt: skip


def backward(grad_out, grad_lse, q, x, saved_softmax, scale, mask):
    """Gradients of q and x."""
    (B, M, D), N = q.shape, x.shape[1]
    if B * M * N * D == 0:
        return q.new_zeros(q.shape), x.new_zeros(x.shape)
    grad_q, grad_x = q.new_empty(q.shape), x.new_empty(x.shape)
    blocks = _blocks(D, q.dtype)
    tile = 16  # rows of grad_x that a program holds
    g, mask = upstream(grad_out, q.shape, q), bytes_of(mask)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    delta = q.new_empty(B, M, dtype=torch.float32)
    strides = [t.stride()[:2] for t in (g, q, x)]
    with torch.cuda.device_of(q):
        backward_q_kernel[(B * cdiv(M, blocks["BLOCK_M"]),)](
            g, grad_lse, q, x, mask, saved_softmax, delta, grad_q, *strides, grad_q.stride()[:2], B, M, N, scale,
            **blocks,
        )  # fmt: skip
        backward_x_kernel[(B * cdiv(N, tile),)](
            g, q, x, mask, saved_softmax, delta, grad_x, *strides, grad_x.stride()[:2], B, M, N, scale,
            **blocks | {"BLOCK_N": tile},
        )  # fmt: skip
    return grad_q, grad_x
