"""The self-attention of a ViT block, by what computes it fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from avfkernels import native
from avfkernels.choice import multiplies_bf16, untraced
from avfkernels.ops.pair import pair_attention

SCORES = 1 << 22  # logits in memory at a time


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0) -> Tensor:
    """softmax(scale q k^T) v, with the weights dropped out: q [B, H, F, d], k and v [B, H, N, d] -> [B, H, F, d].

    It is PyTorch's, which on a CPU multiplies by MKL (as slow on AMD as it is for linear layers), and widens bfloat16.
    In inference there, float32 is one side of `pair_attention` in C++; bfloat16 is matrix products, a few samples at a
    time.
    """
    how = None if dropout_p > 0.0 else _on_cpu(q, k, v)
    if how == torch.float32:
        nothing = v.new_zeros(v.shape[3]).expand(*v.shape[:2], 1, -1)  # a second side of one token adds 0
        return pair_attention(q, k, v, nothing, nothing, scale=scale)
    if how == torch.bfloat16:
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        samples = max(1, SCORES // (q.shape[1] * q.shape[2] * k.shape[2]))
        for *parts, to in zip(*(x.split(samples) for x in (q, k, v, out)), strict=True):
            q_, k_, v_ = (x.flatten(0, 1) for x in parts)
            scores = torch.baddbmm(q.new_zeros(1), q_, k_.transpose(1, 2), beta=0, alpha=scale)  # ignores the first
            to.copy_((scores.softmax(-1) @ v_).view_as(to))
        return out
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)


def _on_cpu(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype | None:
    """The dtype of which there is a faster form, or None."""
    if not q.is_cpu or type(q) is not Tensor or 0 in (*q.shape, k.shape[2]) or not untraced():
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return None
    if torch.is_autocast_enabled("cpu") and q.dtype != torch.get_autocast_dtype("cpu"):
        return None
    if q.dtype == torch.bfloat16 and multiplies_bf16():
        return q.dtype
    vectors = q.dtype == torch.float32 and q.shape[2] >= 16 and native.why_unavailable() is None
    return q.dtype if vectors and native.isa() == "avx512" else None
