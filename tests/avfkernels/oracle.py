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


def plain_pair(q, k1, v1, k2, v2, scale):
    """R1 as one would type it, in the dtype of the inputs."""
    return sum((q @ k.transpose(-2, -1) * scale).softmax(-1) @ v for k, v in ((k1, v1), (k2, v2)))


def plain_product(q, k1, v1, k2, v2, scale):
    """Products over all pairs as one would type them, in the dtype of the inputs."""
    k, v = ((a.unsqueeze(3) * b.unsqueeze(2)).flatten(2, 3) for a, b in ((k1, k2), (v1, v2)))
    return (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v


def in_double(function, *tensors):
    """Runs a function on float64 copies under the reference backend; gradients if the tensors want them."""
    copies = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
    with avfkernels.backend("reference"):
        return function(*copies), copies


def assert_accurate(got, exact, plain, what=""):
    """The accuracy contract: no larger an error than the plain formula's in this dtype (1.5x: a maximum is noisy)."""
    assert got.dtype == plain.dtype, what
    error, allowed = ((t.double() - exact).abs().max().item() if t.numel() else 0.0 for t in (got, plain))
    rounding = torch.finfo(got.dtype).eps * (exact.abs().max().item() if exact.numel() else 0.0)
    message = f"{what}: error {error:.2e}, plain {allowed:.2e}, rounding {rounding:.2e}"
    assert error <= 1.5 * allowed + 2 * rounding, message
