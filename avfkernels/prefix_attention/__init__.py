"""Self-attention that also reads a prefix of other tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from avfkernels._checks import check_tensors


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, *, scale: float) -> Tensor:
    r"""Softmax attention over the keys [prefix ; own]:

        out[i] = sum_j softmax_j(scale * q[i] . [k_prefix ; k][j]) [v_prefix ; v][j]

    Tokens that are read and not updated need only keys and values, never queries (rewrite R3). `TokenFusion` attends to
    both modalities with it.

    Args:
        q, k, v: [B, H, N, d], [B, H, K, d], [B, H, K, dv]; k_prefix, v_prefix: [B, H, P, d], [B, H, P, dv]. fp32, fp16,
            bf16 or float64, one dtype and device.
        scale: factor on the logits.

    Returns:
        out [B, H, N, dv]; 0 if there is no key at all.

    Raises:
        ValueError, TypeError: naming the argument, its shape or dtype, and what was expected.
    """
    check_tensors(
        "prefix_attention",
        q,
        {
            "q": (q, "B H N d"),
            "k": (k, "B H K d"),
            "v": (v, "B H K dv"),
            "k_prefix": (k_prefix, "B H P d"),
            "v_prefix": (v_prefix, "B H P dv"),
        },
    )
    return torch.ops.avfkernels.prefix_attention(q, k, v, k_prefix, v_prefix, scale=scale)
