"""Self-attention that also reads a prefix of other tokens (rewrite R3)."""

from __future__ import annotations

import torch
from torch import Tensor

from avfkernels.ops.common import attend, casts_for_autocast, check_mask, check_tensors

LAYOUTS = {"q": "B H N d", "k": "B H K d", "v": "B H K dv", "k_prefix": "B H P d", "v_prefix": "B H P dv"}
LAYOUTS = {name: layout.split() for name, layout in LAYOUTS.items()}


@casts_for_autocast
def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, *, scale: float,
    mask: Tensor | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    r"""Softmax attention over the keys [prefix ; own]:

        out[i] = sum_j softmax_j(scale * q[i] . [k_prefix ; k][j]) [v_prefix ; v][j]

    Tokens that are read and not updated need only keys and values, never queries (rewrite R3). `TokenFusion` attends to
    both modalities with it.

    Args:
        q, k, v: [B, H, N, d], [B, H, K, d], [B, H, K, dv]; k_prefix, v_prefix: [B, H, P, d], [B, H, P, dv]. fp32, fp16,
            bf16 or float64, one dtype and device.
        scale: factor on the logits.
        mask: bool [B, P + K] over [prefix ; own], True for tokens that count.
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        out [B, H, N, dv] and, if asked for, lse [B, H, N] in fp32 (float64 for float64 inputs). Without any key, out is
        0 and lse is -inf.

    Raises:
        ValueError, TypeError: naming the argument, its shape or dtype, and what was expected.
    """
    check_tensors("prefix_attention", LAYOUTS, q, k, v, k_prefix, v_prefix)
    k, v = torch.cat((k_prefix, k), dim=2), torch.cat((v_prefix, v), dim=2)
    check_mask("prefix_attention", "mask", mask, k.shape[0], k.shape[2], k.device)
    out, lse = attend(q, k, v, scale, mask, return_lse)
    return (out, lse) if return_lse else out
