"""Latent attention, written out; the oracle of the tests."""

from avfkernels._math import compute_dtype, masked_softmax


def forward(q, x, *, scale, mask, return_lse):
    """See `avfkernels.latent_attention`. Half types are computed in float32 throughout."""
    dtype = compute_dtype(q.dtype)
    weights, lse = masked_softmax(q.to(dtype) @ x.to(dtype).transpose(-2, -1) * scale, mask, return_lse)
    return (weights @ x.to(dtype)).to(q.dtype), lse


def why_not(**_) -> None:
    return None
