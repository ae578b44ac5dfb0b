"""What torch needs of an op: opcheck, gradcheck, compile, meta tensors, autocast, torch.func."""

import pytest
import torch
from oracle import pair_inputs
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import avfkernels
from avfkernels import latent_attention, pair_attention
from avfkernels.native import why_unavailable

needs_native = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


def latent_inputs(dtype=torch.float64, grad=False):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, 6, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad) for n in (3, 5)]


def small_pair_inputs(dtype=torch.float64, grad=False):
    return pair_inputs(2, 3, 9, 4, 5, 6, 7, dtype, grad=grad)


OPS = [(pair_attention, small_pair_inputs), (latent_attention, latent_inputs)]


@needs_native
@pytest.mark.parametrize("interaction", ["sum", "product"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck_of_the_registered_pair(interaction, masked, dropout_p):
    masks = (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)) if masked else (None, None)
    tensors = small_pair_inputs(torch.float32, grad=True)
    options = (*masks, torch.tensor(3) if dropout_p else None, 0.5, interaction, dropout_p, "cpu")
    for save in (True, False):
        given = tensors if save else [t.detach() for t in tensors]
        opcheck(torch.ops.avfkernels.pair_attention.default, (*given, *options, save))
    tensors = [t.detach() for t in tensors]
    out, lse, saved = torch.ops.avfkernels.pair_attention(*tensors, *options, True)
    opcheck(torch.ops.avfkernels.pair_attention_backward.default, (out, lse, saved, *tensors, *options))


def test_one_pair_of_ops_is_registered():
    assert {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("avfkernels::")} == {
        "avfkernels::pair_attention", "avfkernels::pair_attention_backward",
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize(("op", "inputs"), OPS)
def test_derivatives_equal_finite_differences(op, inputs, backend):
    with avfkernels.backend(backend):
        assert torch.autograd.gradcheck(lambda *t: op(*t, scale=0.5), inputs(grad=True))


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("interaction", ["sum", "product"])
def test_derivatives_of_lse_and_of_products_equal_finite_differences(interaction, backend):
    tensors = small_pair_inputs(grad=True)
    mask = torch.tensor([[True, False, True, True], [True, True, True, False]])
    with avfkernels.backend(backend):
        assert torch.autograd.gradcheck(
            lambda *t: pair_attention(*t, scale=0.5, interaction=interaction, mask1=mask, return_lse=True), tensors
        )


@needs_native
@pytest.mark.parametrize("interaction", ["sum", "product"])
def test_a_second_derivative_of_a_kernel_is_an_error_and_has_a_remedy(interaction):
    tensors = small_pair_inputs(torch.float32, grad=True)

    def penalty():
        loss = pair_attention(*tensors, scale=0.5, interaction=interaction).sin().sum()
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    with pytest.raises(RuntimeError, match=r"pair_attention: create_graph=True .*backend\('reference'\)"):
        penalty()
    with avfkernels.backend("reference"):
        assert all(bool(g.isfinite().all()) for g in penalty())


@pytest.mark.parametrize(("op", "inputs"), OPS)
def test_compiles_whole_and_once_for_all_shapes(op, inputs):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: op(*t, scale=0.5), fullgraph=True, dynamic=True, backend=counter)
    tensors = inputs(torch.float32)
    longer = [torch.cat((x, x, x), x.ndim - 2) for x in tensors]
    more = [torch.cat((x, x, x)) for x in tensors]
    graphs = set()
    for t in (tensors, longer, more):
        torch.testing.assert_close(compiled(*t), op(*t, scale=0.5))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1
    tensors = [x.requires_grad_() for x in tensors]
    grads = torch.autograd.grad(compiled(*tensors).sin().sum(), tensors)
    torch.testing.assert_close(grads, torch.autograd.grad(op(*tensors, scale=0.5).sin().sum(), tensors))


@needs_native
@pytest.mark.parametrize("interaction", ["sum", "product"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_kernel_and_its_backward_are_in_the_compiled_graphs(interaction, dropout_p):
    torch._dynamo.reset()
    tensors, graphs = small_pair_inputs(torch.float32, grad=True), []

    def run(*t):
        seed = torch.tensor(7) if dropout_p else None
        return pair_attention(*t, scale=0.5, interaction=interaction, dropout_p=dropout_p, seed=seed)

    def keep(graph, _):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(run, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    results = [(out, *torch.autograd.grad(out.sin().sum(), tensors)) for out in (compiled(*tensors), run(*tensors))]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    assert ["pair_attention_backward" in code for code in graphs] == [False, True]
    assert "avfkernels.pair_attention.default" in graphs[0]


@pytest.mark.parametrize(("op", "inputs"), OPS)
def test_meta_tensors_have_the_shape_of_the_result(op, inputs):
    tensors = inputs(torch.float32)
    out = op(*(t.to("meta") for t in tensors), scale=0.5)
    assert out.device.type == "meta"
    assert out.shape == op(*tensors, scale=0.5).shape


@pytest.mark.parametrize(("op", "inputs"), OPS)
@pytest.mark.parametrize("backend", ["reference", None])
def test_autocast_computes_in_the_autocast_dtype(op, inputs, backend):
    tensors = inputs(torch.float32)
    tensors[1] = tensors[1].bfloat16()  # mixed dtypes are welcome under autocast
    with avfkernels.backend(backend):
        with torch.autocast("cpu", torch.bfloat16):
            out = op(*tensors, scale=0.5)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, op(*(t.bfloat16() for t in tensors), scale=0.5))
        doubles = [t.double() for t in tensors]
        with torch.autocast("cpu", torch.bfloat16):
            assert op(*doubles, scale=0.5).dtype == torch.float64


def test_vmap_and_functional_gradients():
    tensors = small_pair_inputs()

    def loss(*t):
        return pair_attention(*t, scale=0.5).sin().sum()

    stacked = [torch.stack((t, 2 * t)) for t in tensors]
    grads = torch.func.vmap(torch.func.grad(loss))(*stacked)
    torch.testing.assert_close(grads[1], torch.func.grad(loss)(*(2 * t for t in tensors)))


@pytest.mark.parametrize(
    "case",
    [
        (small_pair_inputs, lambda *t: pair_attention(*t, scale=0.5)),
        (small_pair_inputs, lambda *t: pair_attention(*t, scale=0.5, interaction="product")),
        (latent_inputs, lambda *t: latent_attention(*t, scale=0.5)),
    ],
)
def test_forward_mode_differentiation(case):
    inputs, function = case
    tensors = inputs(torch.float32)
    tangents = [torch.randn_like(t) for t in tensors]
    _, got = torch.func.jvp(function, tuple(tensors), tuple(tangents))
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
        tangent = torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent
    torch.testing.assert_close(tangent, got)
    step = 1e-3
    moved = [[t + sign * step * d for t, d in zip(tensors, tangents, strict=True)] for sign in (1, -1)]
    expected = (function(*moved[0]) - function(*moved[1])) / (2 * step)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-3)


@needs_native
def test_compiled_code_follows_the_override():
    torch._dynamo.reset()
    graphs = []
    keep = aot_autograd(fw_compiler=lambda graph, _: graphs.append(graph.code) or graph)
    compiled = torch.compile(lambda *t: pair_attention(*t, scale=0.5), fullgraph=True, backend=keep)
    tensors = pair_inputs(2, 4, 16, 96, 196, dtype=torch.float32)
    for name in (None, "eager", "reference", None):
        with avfkernels.backend(name):
            compiled(*tensors)
    assert ["avfkernels.pair_attention" in code for code in graphs] == [True, False, False]
    assert len(set(graphs)) == 3


@pytest.mark.parametrize("mask", ["mask1", "mask2"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("interaction", ["sum", "product"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "eager", None])
def test_bug_what_hidden_tokens_hold_reached_results_as_0_times_nan(backend, dtype, dropout_p, interaction, bad, mask):
    if backend == "eager" and dropout_p:
        pytest.skip("it drops no pairs")
    n, keys = (9, 1) if mask == "mask1" else (14, 3)
    keep = torch.arange(n).expand(2, n) % 3 != 1
    options = {"scale": 0.25, "interaction": interaction, "dropout_p": dropout_p, "seed": 3, "return_lse": True}
    results = []
    for value in (0.0, bad):
        tensors = pair_inputs(dtype=dtype)
        for x in tensors[keys : keys + 2]:
            x.masked_fill_(~keep[:, None, :, None], value)
        tensors = [x.requires_grad_() for x in tensors]
        with avfkernels.backend(backend):
            out, lse = pair_attention(*tensors, **options, **{mask: keep})
        results.append((out, lse, *torch.autograd.grad(out.sin().sum() + lse.sin().sum(), tensors)))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    hidden = results[1][2 + keys][:, :, ~keep[0]]
    assert not hidden.any()


def test_hidden_tokens_of_latent_attention_may_be_nan():
    x = torch.randn(2, 5, 8)
    keep = torch.arange(5).expand(2, 5) < 3
    dirty = x.masked_fill(~keep[..., None], float("nan"))
    torch.testing.assert_close(
        latent_attention(x, dirty, scale=1.0, mask=keep), latent_attention(x, x[:, :3], scale=1.0)
    )
