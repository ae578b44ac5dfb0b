"""What the tests of the ops compare with: random inputs, the plain formula, and the accuracy contract."""

import torch

import avfkernels
from avfkernels.ops.common import pair_mask


def pair_inputs(B=2, H=3, F=16, N1=9, N2=14, dk=16, dv=16, dtype=torch.float64, logit=1.0, seed=0, grad=False):
    """q, k1, v1, k2, v2 whose logits are of the order of `logit` at scale dk^-0.5."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, H, F, dk), (B, H, N1, dk), (B, H, N1, dv), (B, H, N2, dk), (B, H, N2, dv)]
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    tensors[0] *= logit
    return [tensor.to(dtype).requires_grad_(grad) for tensor in tensors]


def plain_attention(q, k, v, *, scale, mask=None):
    """out, lse as one would type them, in the dtype of the inputs; mask [B, keys]."""
    logits = q @ k.transpose(-2, -1) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask.view(len(mask), *[1] * (q.ndim - 2), -1), float("-inf"))
    return logits.softmax(-1) @ v, logits.logsumexp(-1).to(torch.promote_types(q.dtype, torch.float32))


def plain_pair_attention(q, k1, v1, k2, v2, *, scale, interaction="sum", mask1=None, mask2=None):
    """The same over pairs: R1 for sums, all pairs for products."""
    if interaction == "sum":
        sides = [
            plain_attention(q, k1, v1, scale=scale, mask=mask1),
            plain_attention(q, k2, v2, scale=scale, mask=mask2),
        ]
        return tuple(first + second for first, second in zip(*sides, strict=True))
    k, v = ((a.unsqueeze(3) * b.unsqueeze(2)).flatten(2, 3) for a, b in ((k1, k2), (v1, v2)))
    return plain_attention(q, k, v, scale=scale, mask=pair_mask(mask1, mask2, k1.shape[2], k2.shape[2]))


def in_double(function, *tensors):
    """Runs a function on float64 copies under the reference backend; gradients if the tensors want them."""
    copies = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
    with avfkernels.backend("reference"):
        return function(*copies), copies


def assert_accurate(got, exact, plain, what="", times=1.5, roundings=0.5, size=0.0):
    """The accuracy contract, by norm: at most 1.5x the error of the plain formula in this dtype.

    And one rounding (eps / 2) of the exact result, which is all that is left where the plain formula happens to make no
    error. Random shapes, some of one number, ask for `times` 3 and `roundings` 4: there both errors are chance. `size`:
    the norm of what cancels in the result, where that is more than the result.
    """
    assert got.dtype == plain.dtype, what
    eps = torch.finfo(got.dtype).eps
    assert got.shape == exact.shape, what
    assert bool((got.isfinite() == exact.isfinite()).all()), what
    got, exact, plain = (torch.where(exact.isfinite(), t.double(), 0.0) for t in (got, exact, plain))
    error, allowed = ((t - exact).norm().item() for t in (got, plain))
    rounding = roundings * eps * max(size, exact.norm().item())
    message = f"{what}: error {error:.2e}, plain {allowed:.2e}, rounding {rounding:.2e} (norms)"
    assert error <= times * allowed + rounding, message
