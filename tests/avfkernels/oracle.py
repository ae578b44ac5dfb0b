"""What the tests of the ops compare with: random inputs, the plain formula, and the accuracy contract."""

import torch

import avfkernels


def pair_inputs(B=2, H=3, F=16, N1=9, N2=14, dk=16, dv=16, dtype=torch.float64, logit=1.0, seed=0, grad=False):
    """q, k1, v1, k2, v2 whose logits are of the order of `logit` at scale dk^-0.5."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(B, H, F, dk), (B, H, N1, dk), (B, H, N1, dv), (B, H, N2, dk), (B, H, N2, dv)]
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    tensors[0] *= logit
    return [tensor.to(dtype).requires_grad_(grad) for tensor in tensors]


def plain_pair_attention(q, k1, v1, k2, v2, *, scale, interaction="sum", mask1=None, mask2=None):
    """out, lse as one would type them, in the dtype of the inputs: R1 for sums, all pairs for products."""
    sides = [(k1, v1, mask1), (k2, v2, mask2)]
    if interaction == "product":
        k, v = ((a.unsqueeze(3) * b.unsqueeze(2)).flatten(2, 3) for a, b in ((k1, k2), (v1, v2)))
        sides = [(k, v, None if mask1 is None else (mask1.unsqueeze(2) & mask2.unsqueeze(1)).flatten(1))]
    out, lse = 0.0, 0.0
    for k, v, mask in sides:
        logits = q @ k.transpose(-2, -1) * scale
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
        out, lse = out + logits.softmax(-1) @ v, lse + logits.logsumexp(-1)
    return out, lse.to(torch.promote_types(q.dtype, torch.float32))


def in_double(function, *tensors):
    """Runs a function on float64 copies under the reference backend; gradients if the tensors want them."""
    copies = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
    with avfkernels.backend("reference"):
        return function(*copies), copies


def assert_accurate(got, exact, plain, what=""):
    """The accuracy contract, by norm: at most 1.5x the error of the plain formula in this dtype.

    And one rounding of the exact result, which is all that is left where the plain formula happens to make no error.
    """
    assert got.dtype == plain.dtype, what
    error, allowed = ((t.double() - exact).norm().item() for t in (got, plain))
    rounding = torch.finfo(got.dtype).eps / 2 * exact.norm().item()
    message = f"{what}: error {error:.2e}, plain {allowed:.2e}, rounding {rounding:.2e} (norms)"
    assert error <= 1.5 * allowed + rounding, message
