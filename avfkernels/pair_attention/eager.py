"""Pair attention by rewrite R1 in plain PyTorch: two ordinary attentions, added. O(N1 + N2) time and memory."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from avfkernels._autograd import transformed
from avfkernels._math import compute_dtype, masked_softmax
from avfkernels.pair_attention import reference


def forward(q, k1, v1, k2, v2, *, scale, interaction, mask1, mask2, dropout_p, seed, return_lse):
    """See `avfkernels.pair_attention`."""
    mask1, mask2, any_pair = close_empty(mask1, mask2)
    if return_lse or q.dtype == torch.float64 or transformed() or 0 in (k1.shape[2], k2.shape[2]):
        out, lse = _explicit(q, k1, v1, k2, v2, scale, mask1, mask2, return_lse)
    else:
        # PyTorch's fused attention has neither lse nor forward mode nor second derivatives (hence float64, where they
        # are checked).
        out = _sdpa(q, k1, v1, mask1, scale) + _sdpa(q, k2, v2, mask2, scale)
        lse = q.new_empty(0, dtype=torch.float32)
    if any_pair is not None:
        out = torch.where(any_pair, out, 0.0)
        lse = torch.where(any_pair[..., 0], lse, float("-inf")) if return_lse else lse
    return out, lse


def formula(tensors, scale, interaction, mask1=None, mask2=None, dropout_p=0.0, seed=None):
    """For fused backends: (function, tensors) with function(*tensors) = out, lse, differentiable as often as wanted."""
    options = {"scale": scale, "interaction": interaction, "mask1": mask1, "mask2": mask2, "dropout_p": dropout_p,
               "seed": seed, "return_lse": True}  # fmt: skip
    plain = forward if why_not(interaction=interaction, dropout_p=dropout_p) is None else reference.forward
    return partial(plain, **options), tensors


def why_not(*, interaction, dropout_p, **_) -> str | None:
    if interaction != "sum":
        return "R1 separates sums, not products"
    return "R1 does not separate weights of which some pairs are dropped" if dropout_p > 0.0 else None


def close_empty(mask1: Tensor | None, mask2: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Where one side has no token left there is no pair, though the other side alone would still give an output.

    Returns the masks with such batch entries opened (so that nothing is NaN), and which have a pair [B, 1, 1, 1].
    """
    if mask1 is None and mask2 is None:
        return None, None, None
    any_pair = None
    for mask in (mask1, mask2):
        if mask is not None:
            any_pair = mask.any(-1, keepdim=True) if any_pair is None else any_pair & mask.any(-1, keepdim=True)
    opened = [None if mask is None else mask | ~any_pair for mask in (mask1, mask2)]
    return *opened, any_pair[..., None, None]


def _sdpa(q, k, v, mask, scale):
    return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None], scale=scale)


def _explicit(q, k1, v1, k2, v2, scale, mask1, mask2, return_lse):
    """The same by matrix products and a softmax, in at least float32."""
    dtype = compute_dtype(q.dtype)
    out, lse = 0.0, 0.0
    for k, v, mask in ((k1, v1, mask1), (k2, v2, mask2)):
        weights, side_lse = masked_softmax(q.to(dtype) @ k.to(dtype).transpose(-2, -1) * scale, mask, return_lse)
        out, lse = out + weights @ v.to(dtype), lse + side_lse
    if 0 in (k1.shape[2], k2.shape[2]):  # no pair: out 0 (still a function of its inputs), lse -inf
        out, lse = out * 0.0, lse.detach() - float("inf") if return_lse else lse
    return out.to(q.dtype), lse
