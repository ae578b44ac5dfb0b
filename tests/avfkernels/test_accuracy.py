"""Five hundred draws an op, or AVF_DRAWS: dtypes, masks, dropout, strides, amplitudes, against float64 and the plain
formula; and the same bits for any number of threads. At the paper's shapes other files are stricter."""

import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import avfkernels
from avfkernels import latent_attention, pair_attention
from avfkernels.native import why_unavailable
from avfkernels.ops.common import pair_mask
from avfkernels.ops.dropout import pair_dropout
from avfkernels.ops.latent import absorbed_attention

pytestmark = pytest.mark.long  # that is what so many draws take
DRAWS = int(os.environ.get("AVF_DRAWS", 500))
SETTINGS = settings(
    max_examples=DRAWS, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
sizes, widths = st.sampled_from([1, 2, 3, 7, 16, 17, 33]), st.sampled_from([1, 3, 8, 16, 20, 32])
draws = st.builds(
    lambda *made: Draw(*made),
    st.integers(0, 10_000),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from(["dense", "packed", "strided"]),
    st.sampled_from([0.01, 1.0, 5.0]),
)


class Draw:
    """Random tensors of one seed, dtype, layout and amplitude."""

    def __init__(self, *made):
        self.seed, self.dtype, self.layout, self.amplitude = self.made = made
        self.generator = torch.Generator().manual_seed(self.seed)

    def __repr__(self):
        return f"Draw{self.made}"

    def __call__(self, *shape):
        x = (self.amplitude * torch.randn(shape, generator=self.generator, dtype=torch.float64)).to(self.dtype)
        if self.layout == "packed" and len(shape) == 4:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        elif self.layout == "strided" and len(shape) > 1:
            x = x.mT.contiguous().mT
        return x.requires_grad_()

    def mask(self, batch, n):
        return torch.rand(batch, n, generator=self.generator) > 0.4


class Weights(torch.autograd.Function):
    """Softmax weights as they are given; backward adds up the absolute values of what the softmax's adds up."""

    @staticmethod
    def forward(ctx, logits, p):
        ctx.save_for_backward(p)
        return p.clone()

    @staticmethod
    def backward(ctx, grad):
        (p,) = ctx.saved_tensors
        return p * (grad + (p * grad).sum(-1, keepdim=True)), None


def attention(q, k, v, scale, mask, drop, terms=None):
    """out, lse as one would type them, in the dtype of the inputs; 0 and -inf without a key.

    With `terms`, absolute values in the place of q, k and v: what out, lse and their gradients are sums of. A weight
    counts once for itself and as often as the rounding of its logit, a sum too, is multiplied by the exponential.
    """
    logits = q @ k.transpose(-2, -1) * scale
    keep = torch.ones_like(logits, dtype=torch.bool)
    if mask is not None:
        keep = keep & mask.view(len(mask), *[1] * (q.ndim - 2), -1)
    some = keep.any(-1, keepdim=True)
    hidden = logits.masked_fill(~keep & some, float("-inf"))
    weights = hidden.softmax(-1) * some
    lse = hidden.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1).masked_fill(~some[..., 0], float("-inf"))
    if terms is not None:
        q, k, v = terms
        logits = q @ k.transpose(-2, -1) * scale
        lse = (weights.detach() * logits).sum(-1) + lse.detach().abs()
        weights = Weights.apply(logits, (weights * (1 + logits)).detach())
    return (weights if drop is None else weights * drop.to(weights.dtype)) @ v, lse


def check(function, build, tensors, *options):
    """By norm: at most 3x the error of the plain formula in this dtype, or 4 eps of what the result is a sum of.

    build(*tensors) = q, k, v of ordinary attention, which is the plain formula; options: its scale, mask and dropout.
    """
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        upstream = [torch.randn(y.shape, generator=g, dtype=torch.float64) for y in function(*tensors)]

    def results(function, given, upstream):
        pairs = list(zip(function(*given), upstream, strict=False))  # lse may be nobody's
        loss = sum((torch.where(y.isfinite(), y, 0.0).double() * up).sum() for y, up in pairs)
        return [*(y for y, _ in pairs), *torch.autograd.grad(loss, given)]

    def plain(*given):
        return attention(*build(*given), *options)

    def absolute(*given):
        return attention(*build(*given), *options, terms=build(*(x.abs() for x in given)))

    got, usual, exact = (results(*of, upstream) for of in ((function, tensors), (plain, tensors), (plain, doubles)))
    terms = results(absolute, doubles, [up.abs() for up in upstream])
    eps = torch.finfo(tensors[0].dtype).eps
    for i, (x, e, p, size) in enumerate(zip(got, exact, usual, terms, strict=True)):
        assert bool((x.isfinite() == e.isfinite()).all())
        x, e, p, size = (torch.where(e.isfinite(), t.double(), 0.0) for t in (x, e, p, size))
        error, allowed, rounding = (x - e).norm().item(), 3 * (p - e).norm().item(), 4 * eps * size.norm().item()
        assert error <= max(allowed, rounding), (i, error, allowed, rounding)


@SETTINGS
@given(
    draw=draws, B=st.integers(1, 3), H=st.integers(1, 3), f=sizes, N1=sizes, N2=sizes, dk=widths, dv=widths,
    masks=st.sampled_from(["none", "first", "second", "both"]), dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
    interaction=st.sampled_from(["sum", "product"]),
)  # fmt: skip
def test_pair_attention(draw, B, H, f, N1, N2, dk, dv, masks, dropout_p, interaction):
    tensors = [draw(B, H, n, d) for n, d in ((f, dk), (N1, dk), (N1, dv), (N2, dk), (N2, dv))]
    mask1 = draw.mask(B, N1) if masks in ("first", "both") else None
    mask2 = draw.mask(B, N2) if masks in ("second", "both") else None
    options = {"interaction": interaction, "mask1": mask1, "mask2": mask2, "dropout_p": dropout_p, "seed": 5}
    function = partial(pair_attention, scale=dk**-0.5, return_lse=True, **options)
    join = torch.add if interaction == "sum" else torch.mul

    def pairs(q, k1, v1, k2, v2):
        return q, *(join(a.unsqueeze(3), b.unsqueeze(2)).flatten(2, 3) for a, b in ((k1, k2), (v1, v2)))

    drop = pair_dropout(torch.tensor(5), dropout_p, B, H, f, N1, N2).flatten(3) if dropout_p else None
    check(function, pairs, tensors, dk**-0.5, pair_mask(mask1, mask2, N1, N2), drop)

    if draw.dtype not in (torch.float32, torch.bfloat16) or why_unavailable():
        return  # of plain PyTorch, which promises nothing
    threads, bits = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            with avfkernels.backend("cpu"):
                out, lse = function(*tensors)
            bits.append((out, lse, *torch.autograd.grad(out.double().sum(), tensors)))
    finally:
        torch.set_num_threads(threads)
    for other in bits[1:]:
        assert all(torch.equal(a, b) for a, b in zip(bits[0], other, strict=True))


@SETTINGS
@given(draw=draws, B=st.integers(1, 3), M=sizes, N=sizes, D=widths, masked=st.booleans())
def test_latent_attention(draw, B, M, N, D, masked):
    tensors = [draw(B, M, D), draw(B, N, D)]
    mask = draw.mask(B, N) if masked else None
    function = partial(latent_attention, scale=D**-0.5, mask=mask, return_lse=True)
    check(function, lambda q, x: (q, x, x), tensors, D**-0.5, mask, None)


@SETTINGS
@given(
    draw=draws, B=st.integers(1, 3), H=st.integers(1, 3), m=st.integers(1, 9), N=sizes, D=widths,
    d=st.sampled_from([1, 4, 16]), masked=st.booleans(), biased=st.booleans(),
)  # fmt: skip
def test_absorbed_attention(draw, B, H, m, N, D, d, masked, biased):
    tensors = [draw(B, H, m, d), draw(B, N, D), draw(2 * H * d, D), *([draw(2 * H * d)] if biased else [])]
    mask = draw.mask(B, N) if masked else None

    def function(q, x, weight, bias=None):
        return (absorbed_attention(q, x, weight, bias, 0.3, mask),)

    def projected(q, x, weight, bias=None):
        k, v = F.linear(x, weight, bias).unflatten(2, (2, H, d)).permute(2, 0, 3, 1, 4)
        return q, k, v

    check(function, projected, tensors, 0.3, mask, None)
