"""Prefix attention as the release computes it: concatenate, then attend with every weight in memory."""

import torch

from avfkernels._math import compute_dtype, masked_softmax


def forward(q, k, v, k_prefix, v_prefix, *, scale, return_lse):
    """See `avfkernels.prefix_attention`. Half types are computed in float32 throughout."""
    dtype = compute_dtype(q.dtype)
    k, v = (torch.cat(pair, dim=2).to(dtype) for pair in ((k_prefix, k), (v_prefix, v)))
    weights, lse = masked_softmax(q.to(dtype) @ k.transpose(-2, -1) * scale, None, return_lse)
    return (weights @ v).to(q.dtype), lse


def why_not(**_) -> None:
    return None
