"""Prefix attention in plain PyTorch. PyTorch's fused attention takes one key tensor, so the two are still joined."""

import torch
import torch.nn.functional as F

from avfkernels._autograd import transformed
from avfkernels.prefix_attention import reference


def forward(q, k, v, k_prefix, v_prefix, *, scale, return_lse):
    """See `avfkernels.prefix_attention`."""
    if return_lse or q.dtype == torch.float64 or transformed() or k.shape[2] + k_prefix.shape[2] == 0:
        # The fused attention has no lse, no forward mode, no second derivatives (checked in float64) and no answer for
        # zero keys.
        return reference.forward(q, k, v, k_prefix, v_prefix, scale=scale, return_lse=return_lse)
    k, v = torch.cat((k_prefix, k), dim=2), torch.cat((v_prefix, v), dim=2)
    return F.scaled_dot_product_attention(q, k, v, scale=scale), q.new_empty(0, dtype=torch.float32)


def why_not(**_) -> None:
    return None
