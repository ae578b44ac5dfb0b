"""What the Triton kernels share: tiles of rows, the online softmax, the end of a forward pass, merging partial results.

A softmax in progress is (m_i, l_i, acc): the largest logit, the sum of exp(logit - m_i), and the
weighted sum of values, one row per query. Indices of a whole tensor are int64.
"""

import triton
import triton.language as tl

NO_POLICY = tl.constexpr("")  # of eviction; as a default, Triton 3.6 takes no plain string


@triton.jit
def at_head(p, strides, b, h):
    return p + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]


@triton.jit
def load_rows(p, rows, stride, keep, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EVICT: tl.constexpr = NO_POLICY):
    """Rows of a matrix [., WIDTH] as a tile [rows, BLOCK]; zeros beside it and where `keep` [rows] is False: what is
    hidden, a NaN too, must meet no weight of 0."""
    columns = tl.arange(0, BLOCK)
    inside = keep[:, None]
    if WIDTH < BLOCK:
        inside = inside & (columns[None, :] < WIDTH)
    address = p + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(address, mask=inside, other=0.0, eviction_policy=EVICT)


@triton.jit
def store_rows(p, tile, rows, stride, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = rows[:, None] < n
    if WIDTH < BLOCK:
        inside = inside & (columns[None, :] < WIDTH)
    tl.store(p + rows.to(tl.int64)[:, None] * stride + columns[None, :], tile.to(p.dtype.element_ty), mask=inside)


@triton.jit
def counted(p_mask, tokens, n):
    """Which tokens count: those that exist and that the mask, if there is one, keeps."""
    inside = tokens < n
    if p_mask is not None:
        inside = inside & (tl.load(p_mask + tokens, mask=inside, other=0) != 0)
    return inside


@triton.jit
def head_of(side, b, h, n):
    """Where one head of a side begins. A side is (keys, values, their strides, mask): that of queries and the gradient
    of the output has no mask, nor has one of gradients. WIDTHS are those of keys and of values, then of their tiles."""
    return at_head(side[0], side[2], b, h), at_head(side[1], side[3], b, h), b.to(tl.int64) * n


@triton.jit
def load_side(side, head, tokens, n, WIDTHS: tl.constexpr, EVICT: tl.constexpr = NO_POLICY):
    """Which tokens of a head count, their keys and their values."""
    p_mask = side[4]
    if p_mask is not None:
        p_mask += head[2]
    inside = counted(p_mask, tokens, n)
    k = load_rows(head[0], tokens, side[2][2], inside, WIDTHS[0], WIDTHS[2], EVICT)
    return inside, k, load_rows(head[1], tokens, side[3][2], inside, WIDTHS[1], WIDTHS[3], EVICT)


@triton.jit
def store_side(side, b, h, k, v, tokens, n, WIDTHS: tl.constexpr):
    p_k, p_v, _ = head_of(side, b, h, n)
    store_rows(p_k, k, tokens, side[2][2], n, WIDTHS[0], WIDTHS[2])
    store_rows(p_v, v, tokens, side[3][2], n, WIDTHS[1], WIDTHS[3])


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc), accumulated in float32, which is not rounded to TF32."""
    return tl.dot(a, b, acc=acc, input_precision="ieee")


@triton.jit
def exp(x, EXACT: tl.constexpr):
    """exp(x) for x <= 0. EXACT, for float32 inputs: to a rounding error or two.

    The instruction is 2^y with y = x log2(e), whose rounding error grows with |x|; so x = n log(2) + r, log(2) in two
    parts, and the instruction sees r alone.
    """
    if EXACT:
        x = tl.where(x < -104.0, -104.0, x)  # exp(-104) is 0 in float32, and n stays finite; a NaN stays one
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        r = x - n * 0.693145751953125 - n * 1.42860682030941723212e-6
        return tl.exp2(n) * tl.exp(r)
    return tl.exp(x)


@triton.jit
def softmax_start(ROWS: tl.constexpr, BLOCK: tl.constexpr):
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    return m_i, tl.zeros([ROWS], tl.float32), zeros(ROWS, BLOCK)


@triton.jit
def finite(m_i):
    """The offset of a softmax: its largest logit, 0 while there is none."""
    return tl.where(m_i == float("-inf"), 0.0, m_i)


@triton.jit
def softmax_step(s, m_i, l_i, EXACT: tl.constexpr):
    """Weights exp(s - m_i) of a tile of logits, the new (m_i, l_i), and what the previous sums are rescaled by."""
    m_new = tl.maximum(m_i, tl.max(s, 1))
    offset = finite(m_new)
    p = exp(s - offset[:, None], EXACT)
    rescale = exp(m_i - offset, EXACT)
    return p, m_new, l_i * rescale + tl.sum(p, 1), rescale


@triton.jit
def softmax_join(m1, l1, acc1, m2, l2, acc2):
    """Two softmaxes over different keys as one over all of them."""
    m_i = tl.maximum(m1, m2)
    r1, r2 = tl.exp(m1 - finite(m_i)), tl.exp(m2 - finite(m_i))
    return m_i, l1 * r1 + l2 * r2, acc1 * r1[:, None] + acc2 * r2[:, None]


@triton.jit
def save_partial(p_partial, index, rows, row0, total, n, m_i, l_i, acc, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Writes a softmax in progress to p_partial [index, total, WIDTH + 2]: acc, then m_i and l_i."""
    p = p_partial + (total * index + row0) * (WIDTH + 2)
    store_rows(p, acc, rows, WIDTH + 2, n, WIDTH, BLOCK)
    tl.store(p + rows.to(tl.int64) * (WIDTH + 2) + WIDTH, m_i, mask=rows < n)
    tl.store(p + rows.to(tl.int64) * (WIDTH + 2) + WIDTH + 1, l_i, mask=rows < n)


@triton.jit
def load_partial(p_partial, index, rows, row0, total, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    p = p_partial + (total * index + row0) * (WIDTH + 2)
    m_i = tl.load(p + rows.to(tl.int64) * (WIDTH + 2) + WIDTH, mask=rows < n, other=float("-inf"))
    l_i = tl.load(p + rows.to(tl.int64) * (WIDTH + 2) + WIDTH + 1, mask=rows < n, other=0.0)
    return m_i, l_i, load_rows(p, rows, WIDTH + 2, rows < n, WIDTH, BLOCK)


@triton.jit
def save_softmax(p_softmax, rows, row0, total, n, m_i, factor):
    """offset and 1 / sum, from which backward recomputes the weights: two rows of p_softmax [2, total]."""
    p = p_softmax + row0 + rows
    tl.store(p, finite(m_i), mask=rows < n)
    tl.store(p + total, factor, mask=rows < n)


@triton.jit
def load_softmax(p_softmax, rows, row0, total, n):
    p = p_softmax + row0 + rows
    return tl.load(p, mask=rows < n, other=0.0), tl.load(p + total, mask=rows < n, other=0.0)


@triton.jit
def finish(
    m1, l1, acc1, m2, l2, acc2, p_out, p_lse, p_softmax, rows, row0, total, n, stride,
    SETS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalises one softmax, or two whose outputs add up, and writes out, lse, and what backward needs.

    If either of two has no key there is no pair: out is 0 and lse -inf.
    """
    empty = l1 == 0.0
    lse = m1 + tl.log(l1)
    if SETS == 2:
        empty = empty | (l2 == 0.0)
        lse += m2 + tl.log(l2)
    factor = tl.where(empty, 0.0, 1.0 / l1)
    out = acc1 * factor[:, None]
    if p_softmax is not None:
        save_softmax(p_softmax, rows, row0, total, n, m1, factor)
    if SETS == 2:
        factor = tl.where(empty, 0.0, 1.0 / l2)
        out += acc2 * factor[:, None]
        if p_softmax is not None:
            save_softmax(p_softmax + 2 * total, rows, row0, total, n, m2, factor)
    store_rows(p_out, out, rows, stride, n, WIDTH, BLOCK)
    if p_lse is not None:
        tl.store(p_lse + row0 + rows, tl.where(empty, float("-inf"), lse), mask=rows < n)


@triton.jit(do_not_specialize=["B", "H", "F", "splits"])
def merge(
    p_partial, p_out, p_lse, p_softmax, stride_out, B, H, F, splits,
    SETS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program joins the partial results of a block of queries, always in the same order."""
    blocks = tl.cdiv(F, BLOCK_F)
    bh, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    rows, row0, total = block * BLOCK_F + tl.arange(0, BLOCK_F), bh.to(tl.int64) * F, B.to(tl.int64) * H * F
    m1, l1, acc1 = softmax_start(BLOCK_F, BLOCK)
    m2, l2, acc2 = softmax_start(BLOCK_F, BLOCK)
    for split in range(0, splits):
        m_i, l_i, acc = load_partial(p_partial, split * SETS, rows, row0, total, F, WIDTH, BLOCK)
        m1, l1, acc1 = softmax_join(m1, l1, acc1, m_i, l_i, acc)
        if SETS == 2:
            m_i, l_i, acc = load_partial(p_partial, split * SETS + 1, rows, row0, total, F, WIDTH, BLOCK)
            m2, l2, acc2 = softmax_join(m2, l2, acc2, m_i, l_i, acc)
    finish(
        m1, l1, acc1, m2, l2, acc2, at_head(p_out, stride_out, bh // H, bh % H), p_lse, p_softmax, rows,
        row0, total, F, stride_out[2], SETS, WIDTH, BLOCK,
    )  # fmt: skip
