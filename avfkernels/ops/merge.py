"""Joins attention over parts of the tokens into attention over all of them."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    r"""The attention over the union of two disjoint sets of keys (or of pairs), from that over each:

        lse = log(exp(lse1) + exp(lse2)),     out = exp(lse1 - lse) out1 + exp(lse2 - lse) out2

    Exact and associative, so that token sets too long for one call can be visited in pieces, or on several devices. It
    works on the results of every op of this package called with `return_lse=True`. For `pair_attention` split one of
    the two sets: the pairs of (A1 u A2) x B are those of A1 x B and those of A2 x B.

    Args:
        out1, out2: [..., d], one shape, dtype and device. lse1, lse2: [...], the shape of out without its last
            dimension. An lse of -inf stands for no key at all.

    Returns:
        out [..., d] in the dtype of out1, and lse [...] in the dtype of lse1.

    Raises:
        ValueError: a shape or dtype that does not fit, with what was expected.
    """
    if out1.shape != out2.shape or out1.dtype != out2.dtype:
        raise ValueError(
            f"merge_attention: out1 and out2 must have one shape and dtype, got {list(out1.shape)} {out1.dtype} and "
            f"{list(out2.shape)} {out2.dtype}"
        )
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        if lse.shape != out1.shape[:-1]:
            raise ValueError(f"merge_attention: {name} must have shape {list(out1.shape[:-1])}, got {list(lse.shape)}")
    empty = torch.maximum(lse1, lse2) == float("-inf")  # no key in either part: weights 0, not NaN
    # Infinities must not reach logaddexp together: its gradient there is NaN, even of nothing.
    reference = torch.logaddexp(lse1.masked_fill(empty, 0.0), lse2.masked_fill(empty, 0.0)).masked_fill(empty, 0.0)
    lse = reference.masked_fill(empty, float("-inf"))
    weight1, weight2 = ((part - reference).exp().unsqueeze(-1) for part in (lse1, lse2))
    return (out1 * weight1 + out2 * weight2).to(out1.dtype), lse
