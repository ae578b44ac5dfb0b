"""Latent attention in plain PyTorch: two batched matrix products around a softmax, in the dtype of the inputs."""

from avfkernels._math import masked_softmax


def forward(q, x, *, scale, mask, return_lse):
    """See `avfkernels.latent_attention`."""
    weights, lse = masked_softmax(q @ x.transpose(-2, -1) * scale, mask, return_lse)
    return weights @ x, lse


def why_not(**_) -> None:
    return None
