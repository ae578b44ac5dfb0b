"""The rewrites against the paper's equations: shapes, dtypes, masks, extremes, layouts, bad arguments."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import assert_accurate, in_double, pair_inputs, plain_attention

import avfkernels
from avfkernels import latent_attention, pair_attention
from avfkernels.native import why_unavailable
from avfkernels.ops import pair_plain

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
sizes = st.sampled_from([1, 2, 3, 7, 16, 17, 33, 65, 130])
widths = st.sampled_from([1, 3, 8, 16, 20, 64])
needs_native = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
PAIR_BACKENDS = ["eager", pytest.param("cpu", marks=needs_native)]


def random_mask(batch, n, seed, keep_one=True):
    mask = torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) > 0.4
    if keep_one:
        mask[:, 0] = True
    return mask


@SETTINGS
@given(
    B=st.integers(1, 3), H=st.integers(1, 3), F=sizes, N1=sizes, N2=sizes, dk=widths, dv=widths,
    masks=st.sampled_from(["none", "first", "second", "both"]),
    logit=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 1000),
)  # fmt: skip
@example(B=1, H=1, F=1, N1=1, N2=1, dk=16, dv=64, masks="none", logit=1.0, seed=0)
def test_pairs_separate_r1(B, H, F, N1, N2, dk, dv, masks, logit, seed):
    tensors = pair_inputs(B, H, F, N1, N2, dk, dv, logit=logit, seed=seed)
    mask1 = random_mask(B, N1, seed) if masks in ("first", "both") else None
    mask2 = random_mask(B, N2, seed + 1) if masks in ("second", "both") else None
    options = {"scale": dk**-0.5, "mask1": mask1, "mask2": mask2, "return_lse": True}
    (exact, exact_lse), _ = in_double(lambda *t: pair_attention(*t, **options), *tensors)
    with avfkernels.backend("eager"):
        out, lse = pair_attention(*tensors, **options)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-13 * max(1.0, logit) * 10)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", *PAIR_BACKENDS])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("empty", ["N1", "N2", "both", "F", "B"])
def test_pair_attention_without_pairs_is_zero_with_lse_minus_infinity(backend, empty, return_lse):
    shape = {"B": 2, "F": 5, "N1": 3, "N2": 4}
    shape |= {"N1": 0, "N2": 0} if empty == "both" else {empty: 0}
    tensors = pair_inputs(**shape, dtype=torch.float32, grad=True)
    with avfkernels.backend(backend):
        out = pair_attention(*tensors, scale=1.0, return_lse=return_lse)
    out, lse = out if return_lse else (out, None)
    assert out.shape == (shape["B"], 3, shape["F"], 16)
    assert torch.equal(out, torch.zeros_like(out))
    if return_lse:
        assert lse.shape == out.shape[:3]
        assert lse.dtype == torch.float32
        assert bool((lse == float("-inf")).all())
    grads = torch.autograd.grad(out.sum(), tensors)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize("backend", ["reference", *PAIR_BACKENDS])
@pytest.mark.parametrize("return_lse", [False, True])
def test_a_side_masked_out_whole_leaves_no_pair(backend, return_lse):
    """The other side alone would still give an output; there is no pair, so there must be none."""
    tensors = pair_inputs(B=3, dtype=torch.float32, grad=True)
    mask1, mask2 = torch.ones(3, 9, dtype=torch.bool), torch.ones(3, 14, dtype=torch.bool)
    mask1[0], mask2[2] = False, False
    with avfkernels.backend(backend):
        out = pair_attention(*tensors, scale=0.25, mask1=mask1, mask2=mask2, return_lse=return_lse)
        whole = pair_attention(*tensors, scale=0.25)
    out, lse = out if return_lse else (out, None)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    torch.testing.assert_close(out[1], whole[1])
    if return_lse:
        assert bool((lse[[0, 2]] == float("-inf")).all())
        assert bool(lse[1].isfinite().all())
        out = out + torch.where(lse.isfinite(), lse, 0.0)[..., None]
    for grad in torch.autograd.grad(out.square().sum(), tensors):
        assert bool(grad.isfinite().all())
        assert torch.equal(grad[[0, 2]], torch.zeros_like(grad[[0, 2]]))
        assert bool((grad[1] != 0).any())


@pytest.mark.parametrize("backend", PAIR_BACKENDS)
@pytest.mark.parametrize("return_lse", [False, True])
def test_gradients_of_out_and_lse_with_masks_equal_the_pairs(backend, return_lse):
    tensors = pair_inputs(2, 3, 5, 9, 14, 8, 12, torch.float32, grad=True)
    options = {"scale": 0.3, "mask1": random_mask(2, 9, 0), "mask2": random_mask(2, 14, 1), "return_lse": return_lse}

    def loss(*t):
        out = pair_attention(*t, **options)
        return out[0].sin().sum() + (out[1] ** 2).sum() if return_lse else out.sin().sum()

    exact, doubles = in_double(loss, *tensors)
    grads = []
    for name in (backend, "reference"):
        with avfkernels.backend(name):
            grads.append(torch.autograd.grad(loss(*tensors), tensors))
    for got, expected, plain in zip(grads[0], torch.autograd.grad(exact, doubles), grads[1], strict=True):
        assert_accurate(got, expected, plain)


@pytest.mark.parametrize("backend", ["reference", *PAIR_BACKENDS])
def test_pair_attention_takes_slices_of_a_packed_projection(backend):
    packed = [torch.randn(2, n, 3, 4, 16) for n in (6, 11, 17)]
    views = [
        packed[i][:, :, part].transpose(1, 2) for i, part in ((0, 0), (1, 1), (1, 2), (2, 1), (2, 2))
    ]  # [B, H, N, d] with the strides of [B, N, 3, H, d]
    with avfkernels.backend(backend):
        out = pair_attention(*views, scale=0.25)
        copied = pair_attention(*(view.contiguous() for view in views), scale=0.25)
    torch.testing.assert_close(out, copied)


@pytest.mark.parametrize(("N1", "N2"), [(4, 3), (3, 4)])  # the shorter side becomes rows (R4)
@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_product_interactions_equal_the_equation(backend, N1, N2):
    q, k1, v1, k2, v2 = tensors = pair_inputs(N1=N1, N2=N2, F=2)
    scores = torch.einsum("bhfd,bhid,bhjd->bhfij", q, k1, k2) * 0.5
    weights = scores.flatten(3).softmax(-1).view_as(scores)
    expected = torch.einsum("bhfij,bhid,bhjd->bhfd", weights, v1, v2)
    with avfkernels.backend(backend):
        out, lse = pair_attention(*tensors, scale=0.5, interaction="product", return_lse=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, scores.flatten(3).logsumexp(-1))


@pytest.mark.filterwarnings("ignore")  # not compiled, it holds its scores, and says so
@pytest.mark.parametrize("masked", [False, True])
def test_products_by_flex_attention_as_on_a_gpu(monkeypatch, masked):
    """Forward: it has no backward on a CPU. One entry has no token of the side that is attended to."""
    from torch.nn.attention.flex_attention import flex_attention

    tensors = pair_inputs(3, 2, 5, 9, 14, 16, 16, torch.float32)
    masks = {"mask1": random_mask(3, 9, 0), "mask2": random_mask(3, 14, 1)} if masked else {}
    if masked:
        masks["mask2"][1] = False
    results = []
    for name in ("eager", "reference"):
        with monkeypatch.context() as patch, avfkernels.backend(name):
            patch.setattr(pair_plain, "_flex_attention", lambda: flex_attention)
            patch.setattr(pair_plain, "_attend", pair_plain.flex)
            results.append(pair_attention(*tensors, scale=0.25, interaction="product", return_lse=True, **masks))
    torch.testing.assert_close(*results)
    assert not masked or not results[0][0][1].any()


@SETTINGS
@given(
    B=st.integers(1, 3), M=sizes, N=sizes, D=widths, mask=st.booleans(), logit=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_latent_attention_equals_the_reference(B, M, N, D, mask, logit, seed):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, M, D, generator=g, dtype=torch.float64) * logit
    x = torch.randn(B, N, D, generator=g, dtype=torch.float64)
    options = {"scale": D**-0.5, "mask": random_mask(B, N, seed) if mask else None, "return_lse": True}
    (exact, exact_lse), _ = in_double(lambda *t: latent_attention(*t, **options), q, x)
    with avfkernels.backend("eager"):
        out, lse = latent_attention(q, x, **options)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-11 * max(1.0, logit))
    torch.testing.assert_close(lse, exact_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_latent_attention_is_as_accurate_as_the_plain_formula(dtype):
    g = torch.Generator().manual_seed(0)
    q, x = (torch.randn(2, n, 64, generator=g).to(dtype).requires_grad_() for n in (24, 50))

    exact, doubles = in_double(lambda *t: latent_attention(*t, scale=0.125), q, x)
    with avfkernels.backend("eager"):
        out = latent_attention(q, x, scale=0.125)
    plain = plain_attention(q, x, x, scale=0.125)[0]
    assert_accurate(out, exact, plain, "out")
    upstream = torch.randn(out.shape, generator=g)
    grads = [
        torch.autograd.grad(y, given, upstream.to(y.dtype))
        for y, given in ((out, [q, x]), (exact, doubles), (plain, [q, x]))
    ]
    for name, *triple in zip("qx", *grads, strict=True):
        assert_accurate(*triple, f"gradient of {name}")


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_latent_attention_without_tokens_is_zero(backend):
    q, x = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [True] * 5])
    with avfkernels.backend(backend):
        out, lse = latent_attention(q, x, scale=1.0, mask=mask, return_lse=True)
        nothing, nothing_lse = latent_attention(q, x[:, :0], scale=1.0, return_lse=True)
    assert torch.equal(out[0], torch.zeros(3, 8))
    assert bool((lse[0] == float("-inf")).all())
    assert bool(lse[1].isfinite().all())
    assert torch.equal(nothing, torch.zeros(2, 3, 8))
    assert bool((nothing_lse == float("-inf")).all())


def pair_arguments(**changes):
    return (
        dict(zip(("q", "k1", "v1", "k2", "v2"), pair_inputs(dtype=torch.float32), strict=True))
        | {"scale": 1.0}
        | changes
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 16)}, ValueError, r"q must have shape \[B H F dk\], got \[2, 3, 16\]"),
        ({"k1": torch.zeros(2, 3, 9, 8)}, ValueError, r"k1 .* dk = 16 as in q, got \[2, 3, 9, 8\]"),
        ({"v1": torch.zeros(2, 3, 8, 16)}, ValueError, r"v1 .* N1 = 9 as in k1"),
        ({"v2": torch.zeros(2, 3, 14, 8)}, ValueError, r"v2 .* dv = 16 as in v1"),
        ({"k2": torch.zeros(1, 3, 14, 16)}, ValueError, r"k2 .* B = 2 as in q"),
        ({"k2": torch.zeros(2, 3, 14, 16, dtype=torch.float64)}, ValueError,
         r"k2 \[2, 3, 14, 16\] is torch.float64, q \[2, 3, 16, 16\] is torch.float32; cast them to one dtype"),
        (dict.fromkeys(("q", "k1", "v1", "k2", "v2"), torch.zeros(2, 3, 9, 16, dtype=torch.int64)), TypeError,
         "q must be floating point"),
        ({"v2": None}, TypeError, "v2 must be a tensor"),
        ({"k1": torch.zeros(2, 3, 9, 16, device="meta")}, ValueError, "k1 is on meta, q on cpu"),
        ({"mask1": torch.ones(2, 8, dtype=torch.bool)}, ValueError, r"mask1 must have shape \[B, N\] = \[2, 9\]"),
        ({"mask2": torch.ones(2, 14)}, ValueError, r"mask2 must be a bool tensor \[B, N\] = \[2, 14\].*got.*float32"),
        ({"interaction": "max"}, ValueError, "interaction must be one of"),
    ],
)  # fmt: skip
def test_pair_attention_names_the_bad_argument(changes, error, message):
    with pytest.raises(error, match=message):
        pair_attention(**pair_arguments(**changes))


def test_latent_attention_names_the_bad_argument():
    with pytest.raises(ValueError, match=r"x must have shape \[B N D\] with D = 8 as in q"):
        latent_attention(torch.zeros(1, 2, 8), torch.zeros(1, 2, 9), scale=1.0)
    with pytest.raises(ValueError, match="mask must have shape"):
        latent_attention(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8), scale=1.0, mask=torch.ones(1, 3, dtype=torch.bool))
