"""Backward passes written by hand, `split_linear` and `absorbed_attention`: against what autograd makes of the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_accurate
from torch.autograd import gradcheck, gradgradcheck

import avfkernels
from avfkernels import split_linear
from avfkernels.ops.latent import absorbed_attention

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"))


def random(*shape, dtype=torch.float64, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()


def by_rows(biased=True, **options):
    """Two inputs of other lengths, the first three rows of the weight for the first."""
    tensors = [random(2, 3, 4, **options), random(2, 5, 4, seed=1, **options), random(8, 4, **options)]
    return [*tensors, random(8, **options) if biased else None], {"sizes": (3, 5)}


def by_columns(biased=True, **options):
    tensors = [random(2, 3, 4, **options), random(2, 5, 2, **options), random(7, 6, **options)]
    return [*tensors, random(7, **options) if biased else None], {}


def cross(biased=True, heads=2, latents=3, tokens=5, dim=6, width=4, **options):
    tensors = [random(2, heads, latents, width, **options), random(2, tokens, dim, **options)]
    tensors.append(random(2 * heads * width, dim, **options))
    return [*tensors, random(2 * heads * width, **options) if biased else None]


def apply(x1, x2, weight, bias, sizes=None):
    return split_linear((x1, x2), weight, bias, sizes=sizes)


def exact_copies(tensors):
    return [t if t is None else t.detach().double().requires_grad_() for t in tensors]


def written_out(x1, x2, weight, bias, sizes=None):
    if sizes is None:
        (w1, w2), (b1, b2) = weight.split((x1.shape[-1], x2.shape[-1]), dim=1), (None, bias)
    else:
        (w1, w2), (b1, b2) = weight.split(sizes), (None, None) if bias is None else bias.split(sizes)
    return F.linear(x1, w1, b1), F.linear(x2, w2, b2)


def projected(q, x, weight, bias, scale):
    """What absorbed attention equals: keys and values of every token."""
    k, v = F.linear(x, weight, bias).unflatten(2, (2, q.shape[1], -1)).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(2, 3) * scale).softmax(-1) @ v


def gradients(outputs, tensors, grads):
    return torch.autograd.grad(outputs, [t for t in tensors if t is not None], grads, allow_unused=True)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("case", [by_rows, by_columns])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_split_linear_equals_its_parts_with_every_gradient(case, biased, dtype, device):
    tensors, options = case(biased, dtype=dtype, device=device)
    results = []
    for function, inputs in ((apply, tensors), (written_out, exact_copies(tensors)), (written_out, tensors)):
        outputs = function(*inputs, **options)
        grads = [random(*y.shape, dtype=dtype, seed=2, device=device).detach().to(y.dtype) for y in outputs]
        results.append((*outputs, *gradients(outputs, inputs, grads)))
    assert "SplitLinear" in type(results[0][0].grad_fn).__name__
    for triple in zip(*results, strict=True):
        assert_accurate(*triple)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [{}, {"heads": 1, "latents": 1, "tokens": 1, "dim": 1, "width": 1},
                                   {"tokens": 196, "latents": 8, "dim": 96, "width": 16, "heads": 6}])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_absorbed_attention_equals_the_projected_one_with_every_gradient(shape, biased, dtype, device):
    tensors = cross(biased, **shape, dtype=dtype, device=device)
    exact = exact_copies(tensors)
    results = []
    for function, inputs in ((projected, exact), (projected, tensors), (absorbed_attention, tensors)):
        with avfkernels.backend("eager"):
            out = function(*inputs, 0.3)
        grad = random(*out.shape, seed=2, device=device).detach().to(out.dtype)
        results.append((out, *gradients(out, inputs, grad)))
    assert "Absorbed" in str(out.grad_fn.next_functions[0] if biased else out.grad_fn)
    for expected, usual, got in zip(*results, strict=True):
        error, allowed = ((x.double() - expected).norm() for x in (got, usual))
        # The bias of keys has no gradient: what the projected one finds there is rounding.
        assert error <= 2 * allowed + 1e-6 * expected.norm() + (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("case", [by_rows, by_columns, cross])
def test_derivatives_equal_finite_differences(case, strided):
    made = case()
    tensors, options = (made, {"scale": 0.5}) if case is cross else made
    if strided:
        tensors[:2] = [t.detach().mT.contiguous().mT.requires_grad_() for t in tensors[:2]]
    function = absorbed_attention if case is cross else apply
    assert gradcheck(lambda *t: function(*t, **options), tensors)
    if case is not cross:
        assert gradgradcheck(lambda *t: function(*t, **options), tensors)
        return
    outputs = function(*tensors, **options)
    with pytest.raises(RuntimeError, match=r"absorbed_attention: create_graph=True asks for second"):
        torch.autograd.grad(sum(y.sum() for y in outputs), tensors, create_graph=True)


@pytest.mark.parametrize("masked", [False, True])
def test_absorbed_attention_with_a_mask(masked):
    """The last sample has no token."""
    q, x, weight, bias = cross()
    mask = torch.tensor([[True, True, False, True, False], [not masked] * 5])
    got = absorbed_attention(q, x, weight, bias, 0.5, mask)
    grads = torch.autograd.grad(got.sin().sum(), (q, x, weight, bias))
    for i in range(2):
        expected = projected(q[i : i + 1], x[i : i + 1, mask[i]], weight, bias, 0.5)
        torch.testing.assert_close(got[i : i + 1], expected)
        of_x = torch.autograd.grad(expected.sin().sum(), x)[0]
        torch.testing.assert_close(grads[1][i], of_x[i])
    assert gradcheck(lambda *t: absorbed_attention(*t, 0.5, mask), (q, x, weight, bias))


@pytest.mark.parametrize("case", [by_rows, by_columns, cross])
def test_gradients_of_each_sample_by_torch_func(case):
    made = case()
    tensors, options = (made, {"scale": 0.5}) if case is cross else made
    hand, plain = (absorbed_attention, projected) if case is cross else (apply, written_out)

    def loss(function):
        def of_sample(a, b, *shared):
            outputs = function(a[None], b[None], *shared, **options)
            return sum(y.sin().sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,)))

        return torch.func.vmap(torch.func.grad(of_sample, argnums=(0, 1, 2, 3)), in_dims=(0, 0, None, None))

    tensors = [t.detach() for t in tensors]
    got, expected = (loss(function)(*tensors) for function in (hand, plain))
    torch.testing.assert_close(got, expected)


def test_an_empty_batch_has_gradients_of_zero():
    for tensors, function in (
        (by_rows()[0], lambda *t: apply(*t, sizes=(3, 5))),
        (by_columns()[0], apply),
        (cross(), lambda *t: (absorbed_attention(*t, 0.5),)),
    ):
        tensors[:2] = [t.detach()[:0].requires_grad_() for t in tensors[:2]]
        outputs = function(*tensors)
        grads = torch.autograd.grad(outputs, tensors, [torch.ones_like(y) for y in outputs])
        assert [g.shape for g in grads] == [t.shape for t in tensors]
        assert all((g == 0).all() for g in grads)


def test_split_linear_takes_vectors():
    (x1, x2, *shared), options = by_rows()
    x1, x2 = (x.detach()[0, 0].requires_grad_() for x in (x1, x2))
    assert gradcheck(lambda *t: apply(*t, **options), (x1, x2, *shared))


@pytest.mark.parametrize("frozen", range(4))
def test_what_is_frozen_gets_no_gradient_and_the_rest_keeps_its_own(frozen):
    for tensors, function in (
        (by_rows()[0], lambda *t: apply(*t, sizes=(3, 5))),
        (by_columns()[0], apply),
        (cross(), lambda *t: (absorbed_attention(*t, 0.5),)),
    ):
        wanted = [t for i, t in enumerate(tensors) if i != frozen]
        outputs = function(*tensors)
        expected = torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])
        tensors[frozen].requires_grad_(False)
        outputs = function(*tensors)
        got = torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])
        torch.testing.assert_close(got, expected)
        tensors[frozen].requires_grad_()


@pytest.mark.parametrize("function", [lambda dtype: apply(*by_rows(dtype=dtype)[0], sizes=(3, 5)),
                                      lambda dtype: (absorbed_attention(*cross(dtype=dtype), 0.5),)])  # fmt: skip
def test_under_autocast_outputs_are_of_its_dtype_and_gradients_of_the_weights(function):
    with torch.autocast("cpu", torch.bfloat16):
        outputs = function(torch.float32)
    for triple in zip(outputs, function(torch.float64), function(torch.bfloat16), strict=True):
        assert_accurate(*triple)
    tensors, options = by_columns(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = apply(*tensors, **options)
    grads = gradients(outputs, tensors, [torch.ones_like(y) for y in outputs])
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("block", [avfkernels.DenseFusion, avfkernels.FactorizedFusion])
def test_one_graph_in_training_with_and_without_autocast(block, autocast):
    torch.manual_seed(0)
    module = block(32, 4, **({"fusion_tkns": (4, 3, 3)} if block is avfkernels.FactorizedFusion else {}))
    tensors = [torch.randn(2, n, 32) for n in (10, 9, 8)]
    compiled, exact = torch.compile(module, fullgraph=True, backend="aot_eager"), copy.deepcopy(module).double()
    results = []
    for run, own in ((compiled, module), (exact, exact), (module, module)):
        inputs = [t.double() for t in tensors] if own is exact else tensors
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and own is module):
            out = run(*inputs)
        grads = torch.autograd.grad(out.to(inputs[0].dtype).sin().sum(), list(own.parameters()))
        results.append((out, *grads))
    for triple in zip(*results, strict=True):
        assert_accurate(*triple)


def test_split_linear_names_sizes_that_do_not_fit():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"2 inputs by rows \[3, 4\].*\[8, 4\]"):
        split_linear((x, x), torch.ones(8, 4), sizes=(3, 4))
    with pytest.raises(ValueError, match=r"2 inputs by columns \[4, 4\].*\[8, 4\]"):
        split_linear((x, x), torch.ones(8, 4))
