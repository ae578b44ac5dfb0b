"""What torch needs of an op: opcheck, gradcheck, compile, meta tensors, autocast, export."""

import pytest
import torch
from oracle import assert_accurate, pair_inputs
from torch.library import opcheck

import avfkernels
from avfkernels import latent_attention, pair_attention, prefix_attention
from avfkernels._native import why_unavailable

needs_native = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


def latent_inputs(dtype=torch.float64, grad=False):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, 6, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad) for n in (3, 5)]


def prefix_inputs(dtype=torch.float64, grad=False):
    g = torch.Generator().manual_seed(0)
    shapes = [(2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6), (2, 2, 2, 4), (2, 2, 2, 6)]
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad) for shape in shapes]


def small_pair_inputs(dtype=torch.float64, grad=False):
    return pair_inputs(2, 2, 3, 4, 5, 3, 2, dtype, grad=grad)


OPS = [(pair_attention, small_pair_inputs), (latent_attention, latent_inputs), (prefix_attention, prefix_inputs)]


@pytest.mark.parametrize(("op", "inputs"), OPS)
def test_opcheck(op, inputs):
    registered = getattr(torch.ops.avfkernels, op.__name__).default
    opcheck(registered, tuple(inputs(torch.float32, grad=True)), {"scale": 0.5})


@needs_native
@pytest.mark.parametrize("interaction", ["sum", "product"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck_of_the_native_kernels(interaction, masked, dropout_p):
    masks = (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)) if masked else (None, None)
    tensors = small_pair_inputs(torch.float32, grad=True)
    options = (0.5, interaction, *masks, dropout_p, torch.tensor(3) if dropout_p else None)
    opcheck(torch.ops.avfkernels.pair_attention_cpu.default, (*tensors, *options, True))
    tensors = [t.detach() for t in tensors]
    opcheck(torch.ops.avfkernels.pair_attention_cpu_inference.default, (*tensors, *options, True))
    out, lse, *saved = torch.ops.avfkernels.pair_attention_cpu(*tensors, *options, True)
    opcheck(torch.ops.avfkernels.pair_attention_cpu_backward.default, (out, lse, *tensors, *saved, *options))


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize(("op", "inputs"), OPS)
def test_first_and_second_derivatives_equal_finite_differences(op, inputs, backend):
    with avfkernels.backend(backend):
        tensors = inputs(grad=True)
        assert torch.autograd.gradcheck(lambda *t: op(*t, scale=0.5), tensors)
        assert torch.autograd.gradgradcheck(lambda *t: op(*t, scale=0.5), tensors)


@pytest.mark.parametrize("interaction", ["sum", "product"])
def test_derivatives_of_lse_and_of_products_equal_finite_differences(interaction):
    tensors = small_pair_inputs(grad=True)
    mask = torch.tensor([[True, False, True, True], [True, True, True, False]])
    assert torch.autograd.gradcheck(
        lambda *t: pair_attention(*t, scale=0.5, interaction=interaction, mask1=mask, return_lse=True), tensors
    )


# Traces each op twice; the first trace of a process imports the compiler.
@pytest.mark.parametrize(("op", "inputs"), OPS)
def test_compiles_whole_with_dynamic_shapes(op, inputs):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: op(*t, scale=0.5), fullgraph=True, dynamic=True, backend="aot_eager")
    tensors = inputs(torch.float32, grad=True)
    for t in ([x.detach() for x in tensors], [torch.cat((x, x, x), 1).detach() for x in tensors]):
        torch.testing.assert_close(compiled(*t), op(*t, scale=0.5))
    grads = torch.autograd.grad(compiled(*tensors).sin().sum(), tensors)
    expected = torch.autograd.grad(op(*tensors, scale=0.5).sin().sum(), tensors)
    torch.testing.assert_close(grads, expected)


@needs_native
def test_the_native_kernel_is_chosen_under_compile_too():
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(
        lambda *t: pair_attention(*t, scale=0.5), fullgraph=True, backend=aot_autograd(fw_compiler=keep)
    )
    tensors = pair_inputs(2, 4, 16, 96, 196, dtype=torch.float32)
    torch.testing.assert_close(compiled(*tensors), pair_attention(*tensors, scale=0.5))
    assert "pair_attention_cpu_inference" in graphs[0].code


@needs_native
@pytest.mark.parametrize("interaction", ["sum", "product"])
def test_the_native_backward_and_dropout_compile_whole(interaction):
    torch._dynamo.reset()
    tensors = small_pair_inputs(torch.float32, grad=True)

    def run(*t):
        return pair_attention(*t, scale=0.5, interaction=interaction, dropout_p=0.3, seed=torch.tensor(7))

    from torch._dynamo.backends.common import aot_autograd

    graphs = []
    keep = aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=lambda graph, _: graphs.append(graph) or graph)
    compiled = torch.compile(run, fullgraph=True, backend=keep)
    results = [(out, *torch.autograd.grad(out.sin().sum(), tensors)) for out in (compiled(*tensors), run(*tensors))]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    assert "pair_attention_cpu_backward" in graphs[0].code


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


def test_export_decomposes_into_aten():
    class Pairs(torch.nn.Module):
        def forward(self, *tensors):
            return pair_attention(*tensors, scale=0.5)

    tensors = tuple(small_pair_inputs(torch.float32))
    with avfkernels.backend("eager"):
        program = torch.export.export(Pairs(), tensors).run_decompositions()
    assert "avfkernels" not in program.graph_module.code
    torch.testing.assert_close(program.module()(*tensors), pair_attention(*tensors, scale=0.5))


def test_vmap_and_functional_gradients():
    tensors = small_pair_inputs()

    def loss(*t):
        return pair_attention(*t, scale=0.5).sin().sum()

    stacked = [torch.stack((t, 2 * t)) for t in tensors]
    grads = torch.func.vmap(torch.func.grad(loss))(*stacked)
    torch.testing.assert_close(grads[1], torch.func.grad(loss)(*(2 * t for t in tensors)))


@needs_native
@pytest.mark.parametrize("interaction", ["sum", "product"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_second_derivatives_through_the_native_kernel(interaction, dropout_p):
    """The gradient of a gradient penalty: the kernel gives way to the formula where autograd records."""
    options = {"scale": 0.5, "interaction": interaction, "dropout_p": dropout_p, "seed": 3, "return_lse": True}
    results = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        tensors = small_pair_inputs(dtype, grad=True)
        with avfkernels.backend(backend):
            out, lse = pair_attention(*tensors, **options)
            assert ("CPU" in str(out.grad_fn) or "cpu" in str(out.grad_fn)) == (backend == "cpu")
            loss = out.sin().sum() + lse.cos().sum()
            first = torch.autograd.grad(loss, tensors, create_graph=True)
            results.append((*first, *torch.autograd.grad(sum(g.square().sum() for g in first), tensors)))
    for triple in zip(*results, strict=True):
        assert_accurate(*triple, times=3, roundings=4)


@needs_native
def test_second_derivatives_where_an_output_depends_on_nothing_that_wants_any():
    """Frozen keys: lse has no gradient, though one is given; and a piece without tokens has none at all."""
    q, k1, v1, k2, v2 = small_pair_inputs(torch.float32)
    for wanted, keys in ((v1, k1), (q, k1[:, :, :0])):
        wanted.requires_grad_()
        with avfkernels.backend("cpu"):
            out, lse = pair_attention(q, keys, v1[:, :, : keys.shape[2]], k2, v2, scale=0.5, return_lse=True)
            finite = lse.masked_fill(lse.isinf(), 0.0)
            (first,) = torch.autograd.grad(out.sin().sum() + finite.sum(), wanted, create_graph=True, allow_unused=True)
        assert first is None or first.isfinite().all()
        wanted.requires_grad_(False)


@pytest.mark.parametrize(
    "case",
    [
        (small_pair_inputs, lambda *t: pair_attention(*t, scale=0.5)),
        (small_pair_inputs, lambda *t: pair_attention(*t, scale=0.5, interaction="product")),
        (prefix_inputs, lambda *t: prefix_attention(*t, scale=0.5)),
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
    from torch._dynamo.backends.common import aot_autograd

    graphs = []
    keep = aot_autograd(fw_compiler=lambda graph, _: graphs.append(graph.code) or graph)
    compiled = torch.compile(lambda *t: pair_attention(*t, scale=0.5), fullgraph=True, backend=keep)
    tensors = pair_inputs(2, 4, 16, 96, 196, dtype=torch.float32)
    for name in (None, "eager", "reference", None):
        with avfkernels.backend(name):
            compiled(*tensors)
    assert ["pair_attention_cpu" in code for code in graphs] == [True, False, False]
    assert len(set(graphs)) == 3


def test_what_caches_of_compiled_graphs_see_tells_backends_apart():
    """Inductor's cache on disk takes the graph before the op is resolved as its key."""
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(
        lambda *t: latent_attention(*t, scale=0.5), backend=lambda graph, _: graphs.append(graph.code) or graph
    )
    for name in (None, "eager", "reference"):
        with avfkernels.backend(name):
            compiled(*latent_inputs())
    assert len(set(graphs)) == 3
