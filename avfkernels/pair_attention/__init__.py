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
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention over the N1 x N2 pairwise interactions of two token sets.

    The pair (i, j) has the key k1[i] + k2[j] and the value v1[i] + v2[j] (`interaction="sum"`, the dense interactions
    of DeepAVFusion, Eqs. 4-6) or k1[i] * k2[j] and v1[i] * v2[j] (`"product"`, the low-rank bilinear form):

        out[f] = sum_ij softmax_ij(scale * q[f] . k_ij) v_ij,     lse[f] = log sum_ij exp(scale * q[f] . k_ij)

    For sums the softmax separates exactly (rewrite R1), softmax_ij = softmax_i(q . k1[i]) * softmax_j(q . k2[j]), so

        out = softmax(scale q k1^T) v1 + softmax(scale q k2^T) v2,     lse = lse1 + lse2

    costs O(N1 + N2) in time and memory. Products and dropped pairs do not separate. The fused backends then visit every
    pair, in O(N1 N2) time and O(N1 + N2) memory, forward and backward (second derivatives hold all pairs); where there
    is none (float64, float16, another device) the `reference` computes them and holds all pairs in memory.

    Split into pieces, either set of tokens at a time, and joined by `merge_attention`, the result is the same.

    Args:
        q: [B, H, F, dk] queries; k1 [B, H, N1, dk], v1 [B, H, N1, dv]; k2 [B, H, N2, dk], v2 [B, H, N2, dv]. fp32,
            fp16, bf16 or float64, one dtype and device; any strides (a unit last stride avoids copies). Under autocast,
            cast as torch's own attention does.
        scale: factor on the logits.
        interaction: "sum" or "product".
        mask1, mask2: bool [B, N1], [B, N2], True for tokens that count; a pair counts where both do.
        dropout_p: probability, in steps of 1 / 65536, that the weight of a pair is dropped after the softmax; what is
            kept is scaled up. Pass 0 in evaluation.
        seed: of the dropout mask, a function of it and of the indices of the pair alone, on every backend: an int or
            an int64 tensor of one element. None draws one from torch's generator of q's device.
        return_lse: also return the log-sum-exp (that before dropout).

    Returns:
        out [B, H, F, dv] and, if asked for, lse [B, H, F] in fp32 (float64 for float64 inputs). Without any pair (an
        empty side, a side masked out whole), out is 0 and lse is -inf.

    Raises:
        ValueError, TypeError: naming the argument, its shape or dtype, and what was expected.
        RuntimeError: a backend was forced that cannot run with these arguments.

    Source: Mo & Morgado, CVPR 2024, https://arxiv.org/abs/2312.01017.
    """
    from avfkernels import _ops  # which imports the backends beside this file

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
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"pair_attention: dropout_p must be in [0, 1], got {dropout_p}")
    if dropout_p == 0.0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (), device=q.device)
    elif not isinstance(seed, Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=q.device)
    elif seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"pair_attention: seed must be one int64, got {list(seed.shape)} {seed.dtype}")
    else:
        seed = seed.to(q.device)
    if interaction == "product" or dropout_p > 0.0:  # a copy of tokens is little beside what visits all pairs
        q, k1, v1, k2, v2 = (
            t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (q, k1, v1, k2, v2)
        )
    out, lse = _ops.call(
        "pair_attention", q=q, k1=k1, v1=v1, k2=k2, v2=v2, scale=scale, interaction=interaction,
        mask1=mask1, mask2=mask2, dropout_p=dropout_p, seed=seed, return_lse=return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out
