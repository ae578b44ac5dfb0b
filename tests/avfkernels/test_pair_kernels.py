"""The fused backends of pair attention against float64: sums and products, dropout, masks, every gradient."""

import pytest
import torch
from oracle import assert_accurate, in_double, pair_inputs, plain_pair_attention

import avfkernels
from avfkernels import pair_attention
from avfkernels.native import why_unavailable

needs_native = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
FUSED = [pytest.param("cpu", marks=needs_native)]
INTERACTIONS = ["sum", "product"]
NAMES = ("q", "k1", "v1", "k2", "v2")


def random_mask(batch, n, seed):
    mask = torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[:, 0] = True
    return mask


def loss(tensors, upstream, **options):
    """A scalar that depends on out and lse, each weighted at random."""
    out, lse = pair_attention(*tensors, return_lse=True, **options)
    return (out.double() * upstream).sum() + (torch.where(lse.isfinite(), lse, 0.0).double() * upstream[..., 0]).sum()


def compare(backend, dtype, shape, **options):
    """Output, lse and every gradient against the reference in float64."""
    tensors = pair_inputs(*shape, dtype=dtype, grad=True)
    upstream = torch.randn(*shape[:3], shape[6], dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    results = []
    for name, inputs in ((backend, tensors), ("reference", doubles), ("reference", tensors)):
        with avfkernels.backend(name):
            out, lse = pair_attention(*inputs, return_lse=True, **options)
            results.append((out, lse, *torch.autograd.grad(loss(inputs, upstream, **options), inputs)))
    # Of one pair or a few, the logits have no gradient or little: what is left of terms as large as other gradients.
    size = max(grad.norm().item() for grad in results[1][2:])
    for name, *triple in zip(("out", "lse", *NAMES), *results, strict=True):
        assert_accurate(*triple, name, times=3, roundings=4, size=size if name in NAMES else 0.0)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("logit", [1e-3, 30.0, 1e4])
def test_extreme_logits_equal_the_pairs(backend, interaction, logit):
    tensors = pair_inputs(2, 2, 17, 33, 65, 16, 20, torch.float32, logit)
    options = {"scale": 0.25, "interaction": interaction}
    exact, _ = in_double(lambda *t: pair_attention(*t, return_lse=True, **options), *tensors)
    with avfkernels.backend(backend):
        got = pair_attention(*tensors, return_lse=True, **options)
    for name, *triple in zip(("out", "lse"), got, exact, plain_pair_attention(*tensors, **options), strict=True):
        assert_accurate(*triple, name)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("eager", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)]
    + [pytest.param("cpu", dtype, marks=needs_native) for dtype in (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize("dv", [16, 64])
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_error_is_that_of_the_plain_formula_in_every_dtype(backend, dtype, dv, interaction):
    tensors = pair_inputs(2, 4, 16, 48, 98, 16, dv, dtype, logit=3.0, grad=True)
    options = {"scale": 0.25, "interaction": interaction}
    exact, doubles = in_double(lambda *t: pair_attention(*t, **options), *tensors)
    plain, _ = plain_pair_attention(*tensors, **options)
    with avfkernels.backend(backend):
        out = pair_attention(*tensors, **options)
    if dtype == torch.float64 and interaction == "product":  # the plain formula is the exact one, and R4 another
        torch.testing.assert_close(out, exact)
        return
    assert_accurate(out, exact, plain, "out")
    upstream = torch.randn(exact.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact_grads = torch.autograd.grad(exact, doubles, upstream)
    plain_grads = torch.autograd.grad(plain, tensors, upstream.to(dtype))
    grads = torch.autograd.grad(out, tensors, upstream.to(dtype))
    for name, *triple in zip(NAMES, grads, exact_grads, plain_grads, strict=True):
        assert_accurate(*triple, f"gradient of {name}")


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_bfloat16_equals_the_pairs_forward_and_backward(backend, interaction, dropout_p):
    masks = {"mask1": random_mask(2, 33, 0), "mask2": random_mask(2, 70, 1)}
    for shape in ((2, 3, 16, 33, 70, 16, 16), (2, 1, 21, 33, 70, 9, 23)):
        compare(
            backend, torch.bfloat16, shape, scale=0.25, interaction=interaction, dropout_p=dropout_p, seed=5, **masks
        )


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_entries_without_a_pair_are_zero_with_zero_gradients(backend, interaction, dropout_p, dtype):
    tensors = pair_inputs(B=3, dtype=dtype, grad=True)
    mask1, mask2 = torch.ones(3, 9, dtype=torch.bool), torch.ones(3, 14, dtype=torch.bool)
    mask1[0], mask2[2] = False, False
    options = {"scale": 0.25, "interaction": interaction, "mask1": mask1, "mask2": mask2, "dropout_p": dropout_p}
    with avfkernels.backend(backend):
        out, lse = pair_attention(*tensors, return_lse=True, **options)
        finite = out.float().square().sum() + torch.where(lse.isfinite(), lse, 0.0).sum()
        grads = torch.autograd.grad(finite, tensors)
    assert bool((lse[[0, 2]] == float("-inf")).all())
    assert bool(lse[1].isfinite().all())
    for tensor in (out, *grads):
        assert torch.equal(tensor[[0, 2]], torch.zeros_like(tensor[[0, 2]]))
        assert bool((tensor[1] != 0).any())


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_slices_of_a_packed_projection_and_an_expanded_gradient(backend, interaction):
    packed = [torch.randn(2, n, 3, 4, 16, requires_grad=True) for n in (6, 11, 17)]
    views = [
        packed[i][:, :, part].transpose(1, 2) for i, part in ((0, 0), (1, 1), (1, 2), (2, 1), (2, 2))
    ]  # [B, H, N, d] with the strides of [B, N, 3, H, d]
    copies = [view.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for view in views]
    options = {"scale": 0.25, "interaction": interaction}
    with avfkernels.backend(backend):
        out, copied = pair_attention(*views, **options), pair_attention(*copies, **options)
        assert torch.equal(out, copied)
        # sum() hands back a gradient all of whose strides are 0
        grads, expected = torch.autograd.grad(out.sum(), views), torch.autograd.grad(copied.sum(), copies)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("backend", FUSED)
def test_gradients_of_lse_alone(backend):
    tensors = pair_inputs(dtype=torch.float32, grad=True)
    exact, doubles = in_double(lambda *t: pair_attention(*t, scale=0.25, return_lse=True)[1].sin().sum(), *tensors)
    with avfkernels.backend(backend):
        lse = pair_attention(*tensors, scale=0.25, return_lse=True)[1]
        grad_q, grad_k1, grad_v1, grad_k2, grad_v2 = torch.autograd.grad(lse.sin().sum(), tensors)
    assert not grad_v1.any()
    assert not grad_v2.any()
    expected = torch.autograd.grad(exact, [doubles[i] for i in (0, 1, 3)])
    plain = plain_pair_attention(*tensors, scale=0.25)[1].sin().sum()
    plain = torch.autograd.grad(plain, [tensors[i] for i in (0, 1, 3)])
    for triple in zip((grad_q, grad_k1, grad_k2), expected, plain, strict=True):
        assert_accurate(*triple)


@needs_native
def test_native_output_is_a_view_away_from_merged_heads():
    with avfkernels.backend("cpu"):
        out = pair_attention(*pair_inputs(dtype=torch.float32), scale=0.25)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@needs_native
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("index", range(5))
def test_non_finite_input_does_not_vanish_in_the_native_kernel(bad, index):
    """PyTorch's own fused attention on a CPU, and with it `eager`, gives 0 for a query that is NaN."""
    tensors = pair_inputs(1, 1, 4, 5, 6, 8, 8, torch.float32)
    tensors[index][0, 0, 1] = bad
    with avfkernels.backend("cpu"):
        assert not pair_attention(*tensors, scale=0.25).isfinite().all()


@needs_native
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_the_lse_of_a_query_that_is_nan_is_nan_and_not_that_of_no_token(interaction, dropout_p):
    tensors = pair_inputs(1, 1, 4, 5, 6, 8, 8, torch.float32)
    tensors[0][0, 0, 1] = float("nan")
    with avfkernels.backend("cpu"):
        _, lse = pair_attention(
            *tensors, scale=0.25, interaction=interaction, dropout_p=dropout_p, seed=1, return_lse=True
        )
    assert lse.isnan().tolist() == [[[False, True, False, False]]]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_repeated_backward_is_bitwise_the_same(backend, interaction, dropout_p):
    tensors = pair_inputs(2, 3, 40, 70, 90, dtype=torch.float32, grad=True)
    options = {"scale": 0.25, "interaction": interaction, "dropout_p": dropout_p, "seed": 3}
    with avfkernels.backend(backend):
        runs = [torch.autograd.grad(pair_attention(*tensors, **options).sin().sum(), tensors) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
