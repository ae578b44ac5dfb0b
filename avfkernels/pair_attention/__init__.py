"""Attention of a few queries over all pairs of tokens of two sets."""

from __future__ import annotations

import torch
from torch import Tensor

from avfkernels._checks import check_mask, check_tensors

INTERACTIONS = ("sum", "product")


def pair_attention(
    q: Tensor,
    k1: Tensor,
    v1: Tensor,
    k2: Tensor,
    v2: Tensor,
    *,
    scale: float,
    interaction: str = "sum",
    mask1: Tensor | None = None,
    mask2: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention over the N1 x N2 pairwise interactions of two token sets.

    The pair (i, j) has the key k1[i] + k2[j] and the value v1[i] + v2[j] (`interaction="sum"`, the dense interactions
    of DeepAVFusion, Eqs. 4-6) or k1[i] * k2[j] and v1[i] * v2[j] (`"product"`, the low-rank bilinear form):

        out[f] = sum_ij softmax_ij(scale * q[f] . k_ij) v_ij,     lse[f] = log sum_ij exp(scale * q[f] . k_ij)

    For sums the softmax separates exactly (rewrite R1), softmax_ij = softmax_i(q . k1[i]) * softmax_j(q . k2[j]), so

        out = softmax(scale q k1^T) v1 + softmax(scale q k2^T) v2,     lse = lse1 + lse2

    costs O(N1 + N2) in time and memory. Products do not separate: today only the `reference` backend has them, and it
    holds all pairs in memory.

    Args:
        q: [B, H, F, dk] queries; k1 [B, H, N1, dk], v1 [B, H, N1, dv]; k2 [B, H, N2, dk], v2 [B, H, N2, dv]. fp32,
            fp16, bf16 or float64, one dtype and device; any strides (a unit last stride avoids copies). Under autocast,
            cast as torch's own attention does.
        scale: factor on the logits.
        interaction: "sum" or "product".
        mask1, mask2: bool [B, N1], [B, N2], True for tokens that count; a pair counts where both do.
        return_lse: also return the log-sum-exp.

    Returns:
        out [B, H, F, dv] and, if asked for, lse [B, H, F] in fp32 (float64 for float64 inputs). Without any pair (an
        empty side, a side masked out whole), out is 0 and lse is -inf.

    Raises:
        ValueError, TypeError: naming the argument, its shape or dtype, and what was expected.
        RuntimeError: a backend was forced that cannot run with these arguments.

    Source: Mo & Morgado, CVPR 2024, https://arxiv.org/abs/2312.01017.
    """
    check_tensors(
        "pair_attention",
        q,
        {
            "q": (q, "B H F dk"),
            "k1": (k1, "B H N1 dk"),
            "v1": (v1, "B H N1 dv"),
            "k2": (k2, "B H N2 dk"),
            "v2": (v2, "B H N2 dv"),
        },
    )
    check_mask("pair_attention", "mask1", mask1, q.shape[0], k1.shape[2], q)
    check_mask("pair_attention", "mask2", mask2, q.shape[0], k2.shape[2], q)
    if interaction not in INTERACTIONS:
        raise ValueError(f"pair_attention: interaction must be one of {INTERACTIONS}, got {interaction!r}")
    out, lse = torch.ops.avfkernels.pair_attention(
        q, k1, v1, k2, v2, scale=scale, interaction=interaction, mask1=mask1, mask2=mask2, return_lse=return_lse
    )
    return (out, lse) if return_lse else out
