"""On a GPU (`pytest -m gpu`): every backend of every op against float64, graphs, compile, streams, devices, repeats."""

import itertools
import random

import pytest
import torch
from oracle import assert_accurate, pair_inputs, plain_pair_attention
from torch.library import opcheck

import avfkernels
from avfkernels import latent_attention, pair_attention
from avfkernels.ops import pair
from avfkernels.ops.pair_plain import Pairs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
BACKENDS = ("eager", "triton", "cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERACTIONS = ("sum", "product")
NAMES = ("q", "k1", "v1", "k2", "v2")


def inputs(*shape, dtype=torch.bfloat16, grad=False, device="cuda", **options):
    return [t.to(device).requires_grad_(grad) for t in pair_inputs(*shape, dtype=dtype, **options)]


def why_not(backend, tensors, interaction="sum", mask1=None, mask2=None, dropout_p=0.0, seed=None):
    return pair.WHY_NOT[backend](Pairs(*tensors, mask1, mask2, seed, 0.25, interaction, dropout_p))


def skip_unless_it_runs(backend, tensors, **options):
    if reason := why_not(backend, tensors, **options):
        pytest.skip(reason)


def run(backend, tensors, **options):
    with avfkernels.backend(backend):
        return pair_attention(*tensors, **{"scale": 0.25, "return_lse": True} | options)


def with_gradients(backend, tensors, **options):
    out, lse = run(backend, tensors, **options)
    finite = torch.where(lse.isfinite(), lse, 0.0)
    grads = torch.autograd.grad(out.float().sin().sum() + finite.sin().sum(), tensors)
    return (out.detach(), lse.detach(), *grads)


def masks_for(B, N1, N2):
    masks = [torch.rand(B, n, generator=torch.Generator().manual_seed(n)) > 0.4 for n in (N1, N2)]
    for mask in masks:
        mask[:, 0] = True
    return {"mask1": masks[0].cuda(), "mask2": masks[1].cuda()}


# B, H, F, N1, N2, dk, dv
SMALL = [(2, 2, 16, 19, 49, 16, 16), (1, 2, 5, 8, 8, 16, 64), (2, 1, 21, 33, 130, 32, 64)]
SHAPES = [*SMALL, (4, 12, 16, 96, 196, 16, 16), (2, 8, 3, 1, 1, 16, 16)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pair_error_is_that_of_the_plain_formula(backend, shape, interaction, dtype, masked):
    B, H, F, N1, N2, _, dv = shape
    options = {"interaction": interaction} | (masks_for(B, N1, N2) if masked else {})
    tensors = inputs(*shape, dtype=dtype, logit=2.0, grad=True)
    skip_unless_it_runs(backend, tensors, **options)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    exact, exact_lse = run("reference", doubles, **options)
    out, lse = run(backend, tensors, **options)
    plain, plain_lse = plain_pair_attention(*tensors, scale=0.25, **options)
    assert_accurate(out, exact, plain, "out")
    assert_accurate(lse, exact_lse, plain_lse, "lse")
    upstream = torch.randn(B, H, F, dv, generator=torch.Generator().manual_seed(1)).cuda().to(dtype)
    exact_grads = torch.autograd.grad(exact, doubles, upstream.double())
    plain_grads = torch.autograd.grad(plain, tensors, upstream)
    grads = torch.autograd.grad(out, tensors, upstream)
    for name, *triple in zip(NAMES, grads, exact_grads, plain_grads, strict=True):
        assert_accurate(*triple, f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_drops_the_pairs_that_the_reference_drops(backend, interaction, dtype):
    options = {"interaction": interaction, "dropout_p": 0.3, "seed": torch.tensor(5, device="cuda")}
    tensors = inputs(2, 3, 16, 33, 70, dtype=dtype, grad=True)
    skip_unless_it_runs(backend, tensors, **options)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    upstream = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).cuda().to(dtype)
    results = []
    for name, given in ((backend, tensors), ("reference", doubles), ("reference", tensors)):
        out, _ = run(name, given, **options)
        results.append((out, *torch.autograd.grad(out, given, upstream.to(out.dtype))))
    for name, *triple in zip(("out", *NAMES), *results, strict=True):
        assert_accurate(*triple, name)


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_entries_without_a_pair_are_zero(backend, interaction):
    tensors = inputs(3, 2, 16, 9, 40, grad=True)
    mask1, mask2 = (torch.ones(3, n, dtype=torch.bool, device="cuda") for n in (9, 40))
    mask1[0], mask2[2] = False, False
    options = {"interaction": interaction, "mask1": mask1, "mask2": mask2}
    skip_unless_it_runs(backend, tensors, **options)
    out, lse, *grads = with_gradients(backend, tensors, **options)
    assert bool((lse[[0, 2]] == float("-inf")).all())
    for tensor in (out, *grads):
        assert torch.equal(tensor[[0, 2]], torch.zeros_like(tensor[[0, 2]]))
        assert bool((tensor[1] != 0).any())


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_tokens_may_hold_nan(backend, interaction):
    options, results = {"interaction": interaction} | masks_for(2, 19, 49), []
    for value in (0.0, float("nan")):
        tensors = inputs(2, 3, 16, 19, 49)
        for x, name in zip(tensors[1:], ("mask1", "mask1", "mask2", "mask2"), strict=True):
            x.masked_fill_(~options[name][:, None, :, None], value)
        tensors = [x.requires_grad_() for x in tensors]
        skip_unless_it_runs(backend, tensors, **options)
        results.append(with_gradients(backend, tensors, **options))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_a_packed_projection(backend, interaction):
    packed = [torch.randn(2, n, 3, 4, 16, device="cuda", dtype=torch.bfloat16) for n in (16, 37, 50)]
    views = [packed[i][:, :, part].transpose(1, 2) for i, part in ((0, 0), (1, 1), (1, 2), (2, 1), (2, 2))]
    views = [view.requires_grad_() for view in views]
    copies = [view.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for view in views]
    skip_unless_it_runs(backend, views, interaction=interaction)
    results = (with_gradients(backend, given, interaction=interaction) for given in (views, copies))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_small_shapes_for_the_sanitizer(backend, shape):
    """What bench/gpu.sh runs under compute-sanitizer: every kernel, forward and backward, few threads."""
    for interaction, dropout_p in itertools.product(INTERACTIONS, (0.0, 0.3)):
        options = {"interaction": interaction, "dropout_p": dropout_p, "seed": torch.tensor(1, device="cuda")}
        tensors = inputs(*shape, grad=True)
        if not why_not(backend, tensors, **options):
            with_gradients(backend, tensors, **options)
            run(backend, [t.detach() for t in tensors], **options)
    torch.cuda.synchronize()


def latent_inputs(dtype):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, 768, generator=g).to("cuda", dtype).requires_grad_() for n in (96, 196)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_latent_attention_is_as_accurate(dtype):
    tensors = latent_inputs(dtype)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    scale = 768**-0.5
    with avfkernels.backend("reference"):
        exact = latent_attention(*doubles, scale=scale)
    out, (q, x) = latent_attention(*tensors, scale=scale), tensors
    plain = (q @ x.transpose(-2, -1) * scale).softmax(-1) @ x
    assert_accurate(out, exact, plain, "out")
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).cuda().to(dtype)
    grads = [
        torch.autograd.grad(x, t, upstream.to(x.dtype)) for x, t in ((out, tensors), (exact, doubles), (plain, tensors))
    ]
    for i, triple in enumerate(zip(*grads, strict=True)):
        assert_accurate(*triple, f"gradient {i}")


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graphs_replay_with_new_inputs(backend, interaction):
    tensors, others = inputs(4, 12, 16, 96, 196, grad=True), inputs(4, 12, 16, 96, 196, seed=1, grad=True)
    skip_unless_it_runs(backend, tensors, interaction=interaction)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            with_gradients(backend, tensors, interaction=interaction)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(backend, tensors, interaction=interaction)
    with torch.no_grad():
        for tensor, other in zip(tensors, others, strict=True):
            tensor.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, with_gradients(backend, others, interaction=interaction), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_with_dynamic_shapes(backend, interaction):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: pair_attention(*t, scale=0.25, interaction=interaction), fullgraph=True, dynamic=True
    )
    for shape in ((2, 3, 16, 19, 49, 16, 16), (3, 3, 16, 33, 70, 16, 16)):
        tensors = inputs(*shape, grad=True)
        skip_unless_it_runs(backend, tensors, interaction=interaction)
        with avfkernels.backend(backend):
            out, expected = compiled(*tensors), pair_attention(*tensors, scale=0.25, interaction=interaction)
        torch.testing.assert_close(out, expected, rtol=1.6e-2, atol=1e-2)
        grads = [torch.autograd.grad(x.float().sin().sum(), tensors) for x in (out, expected)]
        torch.testing.assert_close(*grads, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_streams_do_not_disturb_each_other(backend, interaction):
    first, second = (inputs(8, 12, 16, 96, 196, seed=seed, grad=True) for seed in (0, 1))
    skip_unless_it_runs(backend, first, interaction=interaction)
    expected = [with_gradients(backend, tensors, interaction=interaction) for tensors in (first, second)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        for stream, tensors in zip(streams, (first, second), strict=True):
            with torch.cuda.stream(stream):
                results.append(with_gradients(backend, tensors, interaction=interaction))
        torch.cuda.synchronize()
        for got, wanted in zip(results, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_that_is_not_the_current_one(backend, interaction):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    tensors = inputs(2, 3, 16, 19, 49, grad=True)
    skip_unless_it_runs(backend, tensors, interaction=interaction)
    there = [t.detach().to("cuda:1").requires_grad_() for t in tensors]
    assert torch.cuda.current_device() == 0
    results = (with_gradients(backend, given, interaction=interaction) for given in (there, tensors))
    for got, expected in zip(*results, strict=True):
        assert got.device == torch.device("cuda:1")
        torch.testing.assert_close(got.cpu(), expected.cpu())


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_hundred_runs_give_the_same_bits(backend, interaction):
    tensors = inputs(4, 12, 21, 96, 196, grad=True)
    skip_unless_it_runs(backend, tensors, interaction=interaction)
    first = with_gradients(backend, tensors, interaction=interaction)
    for _ in range(100):
        again = with_gradients(backend, tensors, interaction=interaction)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_opcheck(backend, interaction):
    tensors = inputs(grad=True)
    skip_unless_it_runs(backend, tensors, interaction=interaction)
    options = (*masks_for(2, 9, 14).values(), None, 0.25, interaction, 0.0, backend)
    opcheck(torch.ops.avfkernels.pair_attention.default, (*tensors, *options, True))


@pytest.mark.parametrize("shape", [(1, 2, 16, 5000, 3000, 16, 16), (1, 2, 70, 600, 900, 16, 64)], ids=str)
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_long_sides_whichever_is_chosen(interaction, shape):
    """Sums split their backward over tokens; products are FlexAttention's."""
    tensors = inputs(*shape, grad=True)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    options = {"scale": 0.25, "interaction": interaction}
    results = []
    with avfkernels.backend("eager"):
        exact = pair_attention(*(t[:, :1] for t in doubles), **options)
    for out, given in ((pair_attention(*tensors, **options), tensors), (exact, doubles)):
        grads = torch.autograd.grad(out[:, :1].double().sin().sum(), given)
        results.append((out[:, :1], *(grad[:, :1] for grad in grads)))
    for name, got, expected in zip(("out", *NAMES), *results, strict=True):
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 0.02, (name, error)


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("shape", [(2, 3, 16, 0, 5, 16, 16), (2, 3, 5, 9, 0, 16, 64), (0, 3, 16, 5, 4, 16, 16)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_pairs_all_is_zero(backend, shape, interaction):
    tensors = inputs(*shape, grad=True)
    skip_unless_it_runs(backend, tensors, interaction=interaction)
    out, lse, *grads = with_gradients(backend, tensors, interaction=interaction)
    assert bool((lse == float("-inf")).all())
    assert not any(bool(tensor.any()) for tensor in (out, *grads))
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_and_large_logits(backend, seed, interaction, dtype):
    rng = random.Random(seed)
    shape = [rng.randint(*of) for of in ((1, 3), (2, 4), (5, 40), (3, 50), (3, 90))] + rng.choices((16, 32, 64), k=2)
    tensors = inputs(*shape, dtype=dtype, logit=2.0, seed=seed)
    skip_unless_it_runs(backend, tensors, interaction=interaction)
    exact, _ = run("reference", [t.double() for t in tensors], interaction=interaction)
    plain, _ = plain_pair_attention(*tensors, scale=0.25, interaction=interaction)
    assert_accurate(run(backend, tensors, interaction=interaction)[0], exact, plain, "out")
    tensors[0] *= 100.0
    assert all(bool(t.isfinite().all()) for t in run(backend, tensors, interaction=interaction))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_and_an_expanded_gradient(backend):
    tensors = inputs(2, 3, 16, 19, 49, dtype=torch.float32)
    halves = [t.bfloat16().requires_grad_() for t in tensors]
    skip_unless_it_runs(backend, halves)
    out = run(backend, halves)[0]
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(run(backend, tensors)[0], out)
    expanded = torch.autograd.grad(out.sum(), halves, retain_graph=True)
    dense = torch.autograd.grad(out, halves, torch.ones_like(out).contiguous())
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


def latent_results(tensors):
    """out, lse and gradients of latent attention.

    Detached: a graph that is alive keeps its AccumulateGrad nodes, and those the stream they were made on. Where two
    gradients of one leaf are added (x is keys and values), autograd does it on that stream: captured, the legacy stream
    would wait for the capture, which CUDA refuses.
    """
    out, lse = latent_attention(*tensors, scale=tensors[0].shape[-1] ** -0.5, return_lse=True)
    grads = torch.autograd.grad(out.float().sin().sum() + lse.sin().sum(), tensors)
    return (out.detach(), lse.detach(), *grads)


def same_bits(got, expected):
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_latent_attention_in_graphs_streams_and_on_another_device():
    tensors, changed = latent_inputs(torch.bfloat16), latent_inputs(torch.bfloat16)
    with torch.no_grad():
        for tensor in changed:
            tensor.mul_(0.5)
    expected = [latent_results(given) for given in (tensors, changed)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        for stream, given in zip(streams, (tensors, changed), strict=True):
            with torch.cuda.stream(stream):
                results.append(latent_results(given))
        torch.cuda.synchronize()
        assert all(same_bits(*pair) for pair in zip(results, expected, strict=True))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = latent_results(tensors)
    with torch.no_grad():
        for tensor, new in zip(tensors, changed, strict=True):
            tensor.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(captured, expected[1])

    if torch.cuda.device_count() > 1:
        there = latent_results([t.detach().to("cuda:1").requires_grad_() for t in changed])
        for got, here in zip(there, expected[1], strict=True):
            torch.testing.assert_close(got.cpu(), here.cpu())


def test_latent_attention_compiles_whole_with_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: latent_attention(*t, scale=0.1), fullgraph=True, dynamic=True)
    tensors = latent_inputs(torch.bfloat16)
    shorter = [t[..., : t.shape[-2] - 9, :].detach().clone().requires_grad_() for t in tensors]
    for given in (tensors, shorter):
        out, expected = compiled(*given), latent_attention(*given, scale=0.1)
        torch.testing.assert_close(out, expected, rtol=1.6e-2, atol=1e-2)
        grads = [torch.autograd.grad(x.float().sin().sum(), given) for x in (out, expected)]
        torch.testing.assert_close(*grads, rtol=3e-2, atol=3e-2)
