"""Softmax and mask arithmetic that the plain PyTorch backends share."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that logits and softmax use: half types are widened to float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def combine_masks(mask1: Tensor | None, mask2: Tensor | None, n1: int, n2: int) -> Tensor | None:
    """[B, N1], [B, N2] -> [B, N1 * N2]: a pair counts where both of its tokens do."""
    if mask1 is None and mask2 is None:
        return None
    if mask1 is None:
        mask1 = mask2.new_ones(mask2.shape[0], n1)
    if mask2 is None:
        mask2 = mask1.new_ones(mask1.shape[0], n2)
    return (mask1.unsqueeze(2) & mask2.unsqueeze(1)).flatten(1)


def masked_softmax(scores: Tensor, mask: Tensor | None, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Softmax over the last dimension, in at least float32, back in the dtype of `scores`.

    mask [B, N] keeps where True. A row without any key has weights 0 and lse -inf. lse is fp32 (float64 for float64
    scores), and empty unless asked for.
    """
    dtype = scores.dtype
    scores = scores.to(compute_dtype(dtype))
    keep = None
    if mask is not None:
        mask = mask.reshape(mask.shape[0], *[1] * (scores.ndim - 2), mask.shape[1])
        keep = mask.any(-1, keepdim=True)
        # Rows without a key are computed as if unmasked and then zeroed: no NaN, forward or backward.
        scores = scores.masked_fill(~mask & keep, float("-inf"))
    weights = scores.softmax(-1)
    lse = torch.logsumexp(scores, -1) if return_lse else scores.new_empty(0)
    if keep is not None:
        weights = weights * keep
        lse = lse.masked_fill(~keep.squeeze(-1), float("-inf")) if return_lse else lse
    return weights.to(dtype), lse
