"""The fused early-fusion layer against the plain one: output, every gradient, kept weights, when it steps aside."""

import copy
import re
from functools import cache, partial

import pytest
import torch
from oracle import assert_accurate
from timm.models.vision_transformer import Block
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import avfkernels
from avfkernels import DenseFusion, FactorizedFusion, TokenFusion, fold, layer

DIM, HEADS, TOKENS = 32, 4, (8, 2, 3)
KINDS = {
    "token": TokenFusion,
    "dense": DenseFusion,
    "product": partial(DenseFusion, interaction="product"),
    "factorized": partial(FactorizedFusion, fusion_tkns=TOKENS),
    "projecting": partial(FactorizedFusion, fusion_tkns=(2, 9, 2)),  # 9 x 4 latents are more than 32 features
}


def build(kind, dtype=torch.float64, eps=1e-6, depth=1, **options):
    """Layers whose weights, norms and biases are all random."""
    torch.manual_seed(0)
    norm = partial(nn.LayerNorm, eps=eps)
    layers = [
        (*(Block(DIM, HEADS, qkv_bias=True, norm_layer=norm) for _ in range(2)), KINDS[kind](DIM, HEADS, **options))
        for _ in range(depth)
    ]
    model = nn.ModuleList(nn.ModuleList(blocks) for blocks in zip(*layers, strict=True)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def tokens(dtype=torch.float64, batch=2, scale=3e-3, grad=False):
    """Of a variance near the eps of the norms, which differ: their ratio counts."""
    g = torch.Generator().manual_seed(1)
    sizes = (17, 9, sum(TOKENS))
    return [
        (scale * torch.randn(batch, n, DIM, generator=g, dtype=torch.float64)).to(dtype).requires_grad_(grad)
        for n in sizes
    ]


def fused(model, *inputs):
    """The fused layers, uncompiled."""
    return layer._fused(*(blocks[0] for blocks in model), *inputs, None)


def plain(model, *inputs, **options):
    return layer.early_fusion(*model, *inputs, **options)[:3]


def derived(function, model, inputs):
    """Outputs, and the gradients of inputs and parameters."""
    outputs = function(model, *inputs)
    weights = torch.linspace(-1, 2, DIM, dtype=torch.float64).to(inputs[0].dtype)
    wanted = [*inputs, *model.parameters()]
    return [*outputs, *torch.autograd.grad(sum((x * weights).sin().sum() for x in outputs), wanted)]


@pytest.fixture
def eager_compiler(monkeypatch):
    """What layer.py compiles, compiled without inductor; counts graphs."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(
        layer, "_compiled", cache(partial(torch.compile, fullgraph=True, dynamic=False, backend=graphs))
    )
    return graphs


@pytest.fixture
def uncompiled(monkeypatch):
    """The fused layer where it would be compiled."""
    monkeypatch.setattr(layer, "_compiled", lambda function: function)


@pytest.mark.parametrize("absorb_from", [0, 99])
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_every_gradient_are_the_plain_layers(kind, eps, absorb_from, monkeypatch):
    monkeypatch.setattr(layer, "ABSORB_FROM", absorb_from)
    model, inputs = build(kind, eps=eps), tokens(grad=True)
    names = ["image", "audio", "fusion", *(f"d {n}" for n in "iaf"), *(n for n, _ in model.named_parameters())]
    scale = max(x.abs().max().item() for x in derived(plain, model, inputs))
    for name, got, expected in zip(names, derived(fused, model, inputs), derived(plain, model, inputs), strict=True):
        # The gradient of keys' biases is 0, and what is left of it rounding.
        error, size = (got - expected).norm().item(), expected.norm().item()
        assert error <= 1e-12 * max(size, 1e-3 * scale), (name, error, size)


def test_the_factor_between_the_two_eps_counts_here(monkeypatch):
    """Without it these tests would see an error."""
    model, inputs = build("dense"), tokens()
    expected = plain(model, *inputs)[2]
    model[2][0].norm1_img.eps = model[2][0].norm1_aud.eps = 1e-6
    assert (fused(model, *inputs)[2] - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "projecting"])
@pytest.mark.parametrize("absorb_from", [0, 99])
def test_error_is_that_of_the_plain_layer(kind, dtype, absorb_from, monkeypatch):
    """Against float64, with the same rounded weights; by norm."""
    monkeypatch.setattr(layer, "ABSORB_FROM", absorb_from)
    model, inputs = build(kind, dtype), tokens(dtype, batch=4, scale=1.0, grad=True)
    exact = derived(plain, copy.deepcopy(model).double(), [x.detach().double().requires_grad_() for x in inputs])
    got, expected = derived(fused, model, inputs), derived(plain, model, inputs)
    for i, name in enumerate(("image", "audio", "fusion", "d image", "d audio", "d fusion")):
        assert_accurate(got[i], exact[i], expected[i], name)
    vectors = [torch.cat([x.double().flatten() for x in grads[6:]]) for grads in (got, exact, expected)]
    assert_accurate(vectors[0].to(dtype), vectors[1], vectors[2].to(dtype), "gradient of the parameters")


@pytest.mark.parametrize("kind", ["dense"])  # and factorized, in tests/avfusion/test_compiled.py
def test_one_graph_for_all_layers_in_inference_and_one_in_training(kind, eager_compiler):
    model, leaves = build(kind, depth=3), tokens(scale=1.0, grad=True)
    for graphs, grad in ((1, False), (2, True)):
        with torch.set_grad_enabled(grad):
            inputs = [x * 1 for x in leaves]
            inputs[2] = inputs[2][:1].expand(2, -1, -1)  # the fusion tokens of an encoder, before the first layer
            for _ in range(2):
                got = plain(model, *inputs, compiled=True)
            torch.testing.assert_close(got, plain(model, *inputs))
        assert eager_compiler.frame_count == graphs
    grads = [
        torch.autograd.grad(sum(x.sin().sum() for x in out), list(model.parameters()))
        for out in (got, plain(model, *inputs))
    ]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def test_layers_without_fusion_are_compiled_too(eager_compiler):
    model, inputs = build("dense", torch.float32, depth=3), tokens(torch.float32, scale=1.0)
    blocks = [*model[:2], [None] * 3]
    with torch.no_grad():
        got = layer.early_fusion(*blocks, *inputs, compiled=True)[:3]
        torch.testing.assert_close(got, layer.early_fusion(*blocks, *inputs)[:3])
    assert eager_compiler.frame_count == 2  # for two lengths


def loaded(model, _):
    model.load_state_dict({key: value * 1.1 for key, value in model.state_dict().items()})


def stepped(model, optimizer, **options):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer(model.parameters(), lr=0.01, **options).step()


def written(model, mode):
    with mode():
        model[2][0].norm1_img.weight.mul_(1.5)


CHANGES = {
    "load_state_dict": loaded,
    "AdamW": lambda m, _: stepped(m, torch.optim.AdamW, foreach=False),
    "AdamW, foreach": lambda m, _: stepped(m, torch.optim.AdamW, foreach=True),
    "AdamW, fused": lambda m, _: stepped(m, torch.optim.AdamW, fused=True),
    "SGD": lambda m, _: stepped(m, torch.optim.SGD),
    "in place": lambda m, _: written(m, torch.no_grad),
    "in place, in inference mode": lambda m, _: written(m, torch.inference_mode),
    "another parameter": lambda m, _: setattr(m[2][0].norm1_aud, "bias", nn.Parameter(torch.ones(DIM).double())),
    "other data": lambda m, _: setattr(m[0][0].attn.qkv.weight, "data", torch.ones(3 * DIM, DIM).double()),
    "through .data": lambda m, _: (m[0][0].norm1.weight.data.mul_(2), avfkernels.weights_changed()),
    "a move": lambda m, _: m.float().double(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["dense", "factorized"])
def test_kept_weights_are_made_anew_when_a_parameter_has_changed(kind, change, uncompiled):
    model, inputs = build(kind), tokens()
    with torch.no_grad():
        before = plain(model, *inputs, compiled=True)
        kept = fold.kept_folds(*(blocks[0] for blocks in model), inputs[0])
        assert fold.kept_folds(*(blocks[0] for blocks in model), inputs[0]) is kept  # nothing changed
    CHANGES[change](model, inputs)
    with torch.no_grad():
        got, expected = plain(model, *inputs, compiled=True), plain(model, *inputs)
        again = fold.kept_folds(*(blocks[0] for blocks in model), inputs[0])
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()
    if change != "a move":
        assert any((a - b).norm() > 1e-3 * b.norm() for a, b in zip(before, expected, strict=True))
    in_place = change not in ("another parameter", "other data", "a move")
    assert (again[0].weight.data_ptr() == kept[0].weight.data_ptr()) == in_place  # where CUDA graphs have recorded it


def test_copies_keep_nothing_and_kept_weights_go_with_their_model(uncompiled):
    model, inputs = build("dense"), tokens()
    with torch.no_grad():
        plain(model, *inputs, compiled=True)
    kept = len(fold.KEPT)
    twin = copy.deepcopy(model)
    assert len(fold.KEPT) == kept
    del model
    assert len(fold.KEPT) == kept - 1
    assert list(twin.state_dict()) == list(build("dense").state_dict())


def test_weights_are_kept_in_the_dtype_of_autocast(uncompiled):
    model, inputs = build("dense", torch.float32), tokens(torch.float32, scale=1.0)
    with torch.no_grad():
        exact = plain(copy.deepcopy(model).double(), *(x.double() for x in inputs))
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = plain(model, *inputs, compiled=True), plain(model, *inputs)
        plain(model, *inputs, compiled=True)
    assert set(fold.KEPT[model[2][0]]) == {(torch.bfloat16, False), (torch.float32, False)}
    for triple in zip(got, exact, expected, strict=True):
        assert_accurate(*triple)


class Adapter(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x.mean(-1, keepdim=True)


def hooked(path):
    return lambda model: model.get_submodule(path).register_forward_hook(lambda *_: None)


def replaced(owner, name, made):
    return lambda model: setattr(model.get_submodule(owner), name, made())


ASIDE = {
    "a hook on a block": (hooked("0.0"), "the block has hooks"),
    "a hook on its attention": (hooked("1.0.attn"), "its attention has hooks"),
    "a hook on qkv": (hooked("0.0.attn.qkv"), "qkv has hooks"),
    "a hook on a norm": (hooked("1.0.norm1"), "norm1 has hooks"),
    "a hook on the fusion block": (hooked("2.0"), "the fusion block has hooks"),
    "a hook on what reads tokens": (hooked("2.0.attn.kv"), "the fusion block's kv has hooks"),
    "another forward": (lambda m: setattr(m[0][0], "forward", m[0][0].forward), "the block has hooks, or a forward of"),
    "an adapter": (replaced("0.0.attn", "qkv", lambda: Adapter(DIM, 3 * DIM)), "qkv is a Adapter and does more, or"),
    "an adapter of what reads": (replaced("2.0.attn", "kv", lambda: Adapter(2 * DIM, 16)), "kv is a Adapter and does"),
    "no affine": (replaced("0.0", "norm1", lambda: nn.LayerNorm(DIM, elementwise_affine=False)), "norm1 is a Layer"),
    "no bias": (replaced("0.0", "norm1", lambda: nn.LayerNorm(DIM, bias=False)), "a norm has no bias"),
    "attn_drop": (lambda m: setattr(m[2][0].attn, "attn_drop", 0.5), "attn_drop drops attention weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", ASIDE)
def test_what_the_fused_layer_cannot_do_runs_plain(case, eager_compiler):
    change, reason = ASIDE[case]
    model, inputs = build("dense"), tokens()
    assert layer.why_plain(*(blocks[0] for blocks in model)) is None
    change(model)
    model.double()
    assert reason in layer.why_plain(*(blocks[0] for blocks in model))
    results = []
    for compiled in (True, False):
        torch.manual_seed(0)
        results.append(plain(model, *inputs, compiled=compiled))
    assert all(map(torch.equal, *results))
    assert eager_compiler.frame_count == 0


@pytest.mark.parametrize("path", ["attn", "attn.qkv", "attn.proj", "mlp", "norm1"])
def test_hooks_in_a_block_that_reads_a_prefix_run(path):
    model, (x, _, prefix), seen = build("dense"), tokens(), []
    block = model[0][0]
    expected = layer.read_prefix(block, x, prefix)
    block.get_submodule(path).register_forward_hook(lambda *_: seen.append(path))
    torch.testing.assert_close(layer.read_prefix(block, x, prefix), expected)
    assert seen


def test_an_adapter_of_qkv_counts_in_a_block_that_reads_a_prefix():
    model, (x, _, prefix) = build("dense"), tokens()
    block = model[0][0]
    block.attn.qkv = Adapter(DIM, 3 * DIM).double()
    expected = block(torch.cat((prefix, x), 1))[:, prefix.shape[1] :]
    torch.testing.assert_close(layer.read_prefix(block, x, prefix), expected)


def test_hooks_of_what_is_called_run(eager_compiler):
    model, inputs, seen = build("dense"), tokens(), []
    model[0][0].mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    torch.testing.assert_close(plain(model, *inputs, compiled=True), plain(model, *inputs))
    assert seen == ["mlp", "mlp"]


def test_drop_path_and_dropout_are_drawn_in_training_and_rest_in_eval(uncompiled):
    model, inputs = build("dense", torch.float32, drop=0.3, drop_path=0.5), tokens(torch.float32, batch=16, scale=1.0)
    still = plain(model.eval(), *inputs)
    torch.testing.assert_close(plain(model, *inputs, compiled=True), still)
    with torch.no_grad():
        drawn = torch.stack([plain(model.train(), *inputs, compiled=True)[2] for _ in range(60)])
        again = torch.stack([plain(model, *inputs)[2] for _ in range(60)])
    assert not torch.equal(drawn[0], drawn[1])
    deviation = again.std(0)
    # 16 clips x 13 tokens x 32 features, compared in all: means within what 60 draws leave open.
    assert ((drawn.mean(0) - again.mean(0)) / deviation).abs().mean() < 2 * (2 / 60) ** 0.5
    assert (drawn.std(0) / deviation).mean().sub(1).abs() < 0.05


def test_the_reference_backend_and_torch_func_take_the_plain_layer(eager_compiler):
    model, inputs = build("dense"), tokens()
    with avfkernels.backend("reference"):
        plain(model, *inputs, compiled=True)
    torch.func.grad(lambda *x: plain(model, *x, compiled=True)[2].sin().sum())(*inputs)
    assert eager_compiler.frame_count == 0


def kernels(code: str) -> int:
    """Calls of kernels and of libraries in what inductor has generated."""
    body = code[code.index("def call(") :]
    calls = r"^ +cpp_fused\w*\(|extern_kernels\.\w+\(|^[^#\n]*torch\.ops\.\w+\.\w+(?:\.\w+)?\("
    return len(re.findall(calls, body, re.MULTILINE))


@pytest.mark.slow
def test_kernels_of_a_compiled_layer():
    """Minutes of g++. A GPU launches more, as a function in C++ holds several loops; what counts is the ratio."""
    torch._dynamo.reset()
    found, norm = {}, partial(nn.LayerNorm, eps=1e-6)
    blocks = [[Block(768, 12, qkv_bias=True, norm_layer=norm)] for _ in range(2)]
    for kind, fusion in {"none": None, "dense": DenseFusion(768, 12), "factorized": FactorizedFusion(768, 12)}.items():
        inputs = [torch.randn(4, n, 768) for n in (196, 96, 32)]
        with torch.no_grad():
            _, code = run_and_get_code(layer.early_fusion, *blocks, [fusion], *inputs, compiled=True)
        found[kind] = sum(map(kernels, code))
    print(f"\nkernels of a compiled layer: {found}")
    assert found["none"] <= 18
    assert found["dense"] <= 26
    assert found["factorized"] <= 52
