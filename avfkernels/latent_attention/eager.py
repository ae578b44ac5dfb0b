"""Latent attention in plain PyTorch: two batched matrix products around a softmax, in the dtype of the inputs."""

import torch

from avfkernels._math import masked_softmax


def forward(q, x, *, scale, mask, return_lse):
    """See `avfkernels.latent_attention`."""
    # The scale rides along with the product; beta=0 ignores the first argument.
    scores = torch.baddbmm(q.new_zeros(1), q, x.transpose(-2, -1), beta=0, alpha=scale)
    weights, lse = masked_softmax(scores, mask, return_lse)
    return weights @ x, lse


def why_not(**_) -> None:
    return None
