"""Linear layers by oneDNN, and attention beside them: against float64, each branch proven to have run."""

import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import avfkernels
from avfkernels import choice
from avfkernels.ops import attention, linear, onednn
from avfusion import DeepAVFusion, EncoderConfig

SMALL = {"dim": 48, "depth": 2, "num_heads": 4, "image_size": (32, 32), "audio_size": (32, 32), "fusion_tokens": 4,
         "image_agg_tokens": 2, "audio_agg_tokens": 2}  # fmt: skip
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
AMD = frozenset(("AuthenticAMD", "avx2", "avx512_bf16"))


@pytest.fixture
def flags(monkeypatch):
    """flags(*names): the processor becomes another, for what asks by name."""

    def become(*names):
        choice.cpu_flags.cache_clear()
        onednn.why_not.cache_clear()
        monkeypatch.setattr(choice, "cpu_flags", lambda: frozenset(names))
        monkeypatch.setattr(onednn, "cpu_flags", lambda: frozenset(names))

    yield become
    onednn.why_not.cache_clear()


@pytest.fixture
def ran(flags, monkeypatch):
    """Where oneDNN is, whatever the processor: the products that it computed."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch comes without oneDNN")
    flags(*AMD)
    calls, product = [], onednn.product

    def spy(x, weight, bias=None, **options):
        assert weight.is_mkldnn or weight.is_contiguous() or weight.t().is_contiguous(), "1000 times slower"
        calls.append((tuple(x.shape), weight.is_mkldnn, options))
        return product(x, weight, bias, **options)

    monkeypatch.setattr(onednn, "product", spy)
    return calls


@pytest.mark.parametrize(
    ("names", "fast"),
    [
        (AMD, True),
        (("GenuineIntel", "avx512_bf16", "amx_bf16"), True),
        (("GenuineIntel", "avx512_bf16"), False),  # measured: slower than float32
        (("AuthenticAMD", "avx2"), False),
        ((), False),
    ],
)
def test_bfloat16_is_chosen_where_it_is_faster(flags, names, fast):
    flags(*names)
    assert choice.multiplies_bf16() == fast
    if not fast:
        assert onednn.why_not(torch.bfloat16)


def dtype_or_skip(dtype):
    if reason := onednn.why_not(dtype):
        pytest.skip(reason)
    return dtype


def layer(n_in=24, n_out=40, dtype=torch.float32, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    module = nn.Linear(n_in, n_out, bias=bias)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=generator)
    return module.to(dtype)


def expected(x, module, gelu=False, add=None):
    bias = None if module.bias is None else module.bias.double()
    y = F.linear(x.double(), module.weight.double(), bias)
    y = F.gelu(y) if gelu else y
    return y if add is None else y + add.double()


def error(actual, wanted):
    return ((actual.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("pack", ["1", "0"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("behind", ["", "gelu", "add", "gelu add"])
@pytest.mark.parametrize("shape", [(7, 24), (1, 24), (3, 5, 24), (24,), (2, 3, 5, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_equals_the_equation(ran, monkeypatch, dtype, shape, behind, bias, pack):
    monkeypatch.setenv("AVF_PACK", pack)
    module, x = layer(dtype=dtype_or_skip(dtype), bias=bias), torch.randn(shape).to(dtype)
    add = torch.randn(*shape[:-1], 40).to(dtype) if "add" in behind else None
    with torch.no_grad():
        y = linear.apply_linear(module, x, gelu="gelu" in behind, add=add)
    assert y.shape == (*shape[:-1], 40)
    assert y.dtype == dtype
    assert error(y, expected(x, module, "gelu" in behind, add)) < BOUND[dtype]
    (call,) = [call for call in ran if call[0] == shape]
    assert call[1] == (pack == "1")
    assert (call[2].get("add") is not None) == (behind == "add")


def test_strided_inputs(ran):
    module, x = layer(), torch.randn(4, 9, 48)[:, 2:, ::2]
    with torch.no_grad():
        assert error(linear.apply_linear(module, x), expected(x, module)) < 1e-6
    assert ran[-1][0] == (4, 7, 24)


def test_shapes_that_do_not_fit_are_told_as_by_pytorch(ran):
    module = layer()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"shapes cannot be multiplied \(5x23 and 24x40\)"):
        linear.apply_linear(module, torch.randn(5, 23))
    with torch.no_grad():
        x, add = torch.randn(3, 5, 24), torch.randn(5, 40)
        assert error(linear.apply_linear(module, x, add=add), expected(x, module, add=add)) < 1e-6


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)])
def test_no_rows_are_pytorchs(ran, shape):
    with torch.no_grad():
        assert linear.apply_linear(layer(), torch.empty(shape)).shape == (*shape[:-1], 40)
    assert not [call for call in ran if call[0] == shape]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e-40, 3e38])
def test_values_that_are_no_numbers_are_those_of_the_plain_form(ran, value):
    module, x = layer(), torch.randn(6, 24)
    x[2, 5] = value
    with torch.no_grad():
        torch.testing.assert_close(linear.apply_linear(module, x), F.linear(x, module.weight, module.bias),
                                   equal_nan=True, rtol=1e-5, atol=1e-5)  # fmt: skip
    assert ran


def test_one_thread_gives_the_same(ran):
    module, x, threads = layer(256, 512), torch.randn(64, 256), torch.get_num_threads()
    with torch.no_grad():
        many = linear.apply_linear(module, x, gelu=True)
        try:
            torch.set_num_threads(1)
            torch.testing.assert_close(linear.apply_linear(module, x, gelu=True), many)
        finally:
            torch.set_num_threads(threads)


def test_autocast_computes_in_its_dtype(ran):
    dtype_or_skip(torch.bfloat16)
    module, x = layer(), torch.randn(6, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = linear.apply_linear(module, x, add=x.new_ones(6, 40))
    assert y.dtype == torch.float32  # the residual is
    assert 1e-6 < error(y, expected(x, module, add=torch.ones(6, 40))) < 1e-2


# Where it runs, and where it does not.


@pytest.mark.parametrize(
    ("names", "dtype", "reason"),
    [
        (("AuthenticAMD", "avx2"), torch.float32, None),
        (("GenuineIntel", "avx2", "avx512f"), torch.float32, "on AMD alone"),
        (("AuthenticAMD", "sse4_2"), torch.float32, "on AMD alone"),
        ((), torch.float32, "on AMD alone"),
        (("AuthenticAMD", "avx2", "avx512f"), torch.bfloat16, "does not multiply bfloat16"),
        (AMD, torch.float16, "no such operators"),
        (AMD, torch.float64, "no such operators"),
    ],
)
def test_where_it_runs(flags, names, dtype, reason):
    flags(*names)
    assert (onednn.why_not(dtype) or "") == "" if reason is None else reason in onednn.why_not(dtype)


def test_operators_that_are_wrong_or_missing_are_not_used(flags, monkeypatch):
    flags(*AMD)
    monkeypatch.setattr(onednn, "product", lambda x, weight, bias=None, **_: F.linear(x, weight.to_dense(), bias) + 1)
    assert "are not right" in onednn.why_not(torch.float32)

    def missing(*_, **__):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    onednn.why_not.cache_clear()
    monkeypatch.setattr(onednn, "product", missing)
    assert "_linear_pointwise" in onednn.why_not(torch.float32)
    module, x = layer(), torch.randn(6, 24)
    with torch.no_grad():
        torch.testing.assert_close(linear.apply_linear(module, x), F.linear(x, module.weight, module.bias))


def test_what_asks_for_pytorchs_operators_gets_them(ran):
    module, x = layer(), torch.randn(6, 24)
    onednn.why_not(torch.float32)
    ran.clear()
    with torch.no_grad():
        for name in ("eager", "reference"):
            with avfkernels.backend(name):
                linear.apply_linear(module, x)
        with torch.backends.mkldnn.flags(enabled=False):
            linear.apply_linear(module, x)
        with FlopCounterMode(display=False) as counter:
            linear.apply_linear(module, x)
        torch.func.vmap(lambda x: linear.apply_linear(module, x))(x)
        torch.func.functional_call(module, {"weight": module.weight * 2}, x)
        linear.apply_linear(module, x.double().float().as_subclass(Strange))
        torch.compile(lambda x: linear.apply_linear(module, x), backend="eager", fullgraph=True)(x)
    program = torch.export.export(Applied(module), (x,))
    assert not ran
    assert counter.get_total_flops() == 2 * 6 * 24 * 40
    assert not [node for node in program.graph.nodes if "mkldnn" in str(node.target)]
    with torch.no_grad(), warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        assert "mkldnn" not in str(torch.jit.trace(Applied(module), x).inlined_graph)


class Strange(torch.Tensor):
    """A subclass, which may define what a product is."""


class Applied(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return linear.apply_linear(self.module, x, gelu=True)


def test_modules_that_do_more_are_called(ran):
    module, x, seen = layer(), torch.randn(6, 24), []
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        linear.apply_linear(module, x)
        handle.remove()

        class Doubled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        module.__class__ = Doubled
        assert error(linear.apply_linear(module, x), 2 * expected(x, module)) < 1e-6
    assert seen == [1]


@pytest.mark.parametrize("part", ["mlp", "attn"])
def test_parts_of_a_block_that_are_not_timms_are_called(part):
    block = DeepAVFusion(EncoderConfig(fusion="none", **SMALL)).image.blocks[0].eval()
    x, theirs = torch.randn(2, 4, 48), type(getattr(block, part))

    class Doubled(theirs):
        """The same parts, and another forward."""

        def forward(self, x, **options):
            return 2 * super().forward(x)

    with torch.no_grad():
        getattr(block, part).__class__ = Doubled
        attended = x + block.attn(block.norm1(x))
        torch.testing.assert_close(block(x), attended + block.mlp(block.norm2(attended)))


# What is kept.


def test_weights_that_are_written_to_count(ran):
    module, x = layer(), torch.randn(6, 24)
    other = layer(seed=1)
    writes = {
        "in place": lambda: module.weight.mul_(2),
        "the bias alone": lambda: module.bias.add_(1),
        "load_state_dict": lambda: module.load_state_dict(other.state_dict()),
        "data": lambda: (module.weight.data.mul_(3), avfkernels.weights_changed()),
        "another parameter": lambda: setattr(module, "weight", nn.Parameter(other.weight.detach() + 1)),
        "assigned data": lambda: setattr(module.weight, "data", other.weight.detach() - 1),
        "no bias": lambda: setattr(module, "bias", None),
    }
    with torch.no_grad():
        for name, write in {"nothing": lambda: None, **writes}.items():
            write()
            for _ in range(2):
                assert error(linear.apply_linear(module, x), expected(x, module)) < 1e-6, name
    assert all(packed for shape, packed, _ in ran if shape == (6, 24))


def test_other_weights_at_the_address_of_those_that_were_kept(ran):
    """Freed memory is given out again, and `data` keeps the version counter: 37 of 200 were taken for the first."""
    x = torch.randn(4, 8)
    with torch.no_grad():
        for _ in range(200):
            module = layer(8, 8)
            linear.apply_linear(module, x)
            for _ in range(2):
                module.weight.data = torch.randn(8, 8)
            assert error(linear.apply_linear(module, x), expected(x, module)) < 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_steps_of_optimizers_count(ran, fused):
    module, x = layer(), torch.randn(6, 24)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused)
    for _ in range(3):
        linear.apply_linear(module, x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            assert error(linear.apply_linear(module, x), expected(x, module)) < 1e-6


def test_weights_of_inference_mode_are_not_kept(ran):
    x = torch.randn(6, 24)
    with torch.inference_mode():
        module = layer()
        linear.apply_linear(module, x)
        module.weight.mul_(2)
        assert error(linear.apply_linear(module, x), expected(x, module)) < 1e-6
    assert not any(packed for shape, packed, _ in ran if shape == (6, 24))


def kept_bytes():
    return sum(torch.ops.mkldnn._nbytes(kept[1][0]) for by_part in onednn.PACKED.values() for kept in by_part.values())


@pytest.mark.parametrize("fusion", ["none", "token", "dense", "factorized"])
def test_at_most_one_copy_of_the_linear_weights_is_kept_and_goes_with_the_model(ran, monkeypatch, fusion):
    gc.collect()
    before = kept_bytes()
    model = DeepAVFusion(EncoderConfig(fusion=fusion, **SMALL | {"dim": 256})).eval()  # oneDNN pads narrower ones
    inputs = torch.randn(2, 3, 32, 32), torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        outputs = model(*inputs)
        assert ran
        weights = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
        assert 0.5 * weights < kept_bytes() - before <= 1.02 * weights
        with torch.autocast("cpu", torch.bfloat16):
            model(*inputs)
        model.image.blocks[0](torch.randn(2, 4, 256))  # without a prefix: qkv as a whole
        assert kept_bytes() - before <= 1.02 * weights
        twin = copy.deepcopy(model)
        del model
        gc.collect()
        assert kept_bytes() == before
        monkeypatch.setenv("AVF_PACK", "0")
        for a, b in zip(twin(*inputs), outputs, strict=True):
            assert error(a, b.double()) < 1e-5
        assert kept_bytes() == before


@pytest.mark.parametrize("fusion", ["none", "token", "dense", "factorized"])
@pytest.mark.parametrize("pack", ["1", "0"])
def test_encoders_are_those_of_plain_pytorch(ran, monkeypatch, fusion, pack):
    monkeypatch.setenv("AVF_PACK", pack)
    model = DeepAVFusion(EncoderConfig(fusion=fusion, **SMALL)).eval()
    inputs = torch.randn(3, 3, 32, 32), torch.randn(3, 1, 32, 32)
    ids = torch.tensor([[0, 2]] * 3), torch.tensor([[1]] * 3)
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        for some in ((), ids):
            exact = wide(*(x.double() for x in inputs), *some)
            assert not ran
            for ours, theirs in zip(model(*inputs, *some), exact, strict=True):
                assert error(ours, theirs) < 1e-6
            assert ran
            ran.clear()


# Gradients.


@pytest.mark.parametrize("behind", ["", "gelu", "add"])
@pytest.mark.parametrize("frozen", ["", "weight", "bias", "x"])
def test_every_gradient(ran, behind, frozen):
    module, x = layer(), torch.randn(3, 7, 24, requires_grad=frozen != "x")
    if frozen in ("weight", "bias"):
        getattr(module, frozen).requires_grad_(False)
    add = torch.randn(3, 7, 40, requires_grad=True) if behind == "add" else None
    y = linear.apply_linear(module, x, gelu=behind == "gelu", add=add)
    wide, x_wide = copy.deepcopy(module).double(), x.detach().double().requires_grad_(x.requires_grad)
    add_wide = None if add is None else add.detach().double().requires_grad_()
    exact = expected(x_wide, wide, behind == "gelu", add_wide)
    grad = torch.randn(3, 7, 40)
    y.backward(grad)
    exact.backward(grad.double())
    assert error(y, exact) < 1e-6
    pairs = [(x, x_wide), *zip(module.parameters(), wide.parameters(), strict=True)]
    for ours, theirs in pairs if add is None else [*pairs, (add, add_wide)]:
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            assert error(ours.grad, theirs.grad) < 2e-6
    assert len([call for call in ran if call[0][:2] == (3, 7)]) == 1 + x.requires_grad


def test_second_derivatives(ran):
    module, x = layer(), torch.randn(7, 24, requires_grad=True)

    def penalty(apply, module, x):
        (grad,) = torch.autograd.grad(apply(module, x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        return module.weight.grad

    wide = copy.deepcopy(module).double()
    ours = penalty(linear.apply_linear, module, x)
    theirs = penalty(lambda module, x: module(x), wide, x.detach().double().requires_grad_())
    assert error(ours, theirs) < 2e-6


# Attention.


@pytest.mark.parametrize(
    ("dtype", "options", "how"),
    [
        (torch.float32, {}, "pair_attention"),
        (torch.bfloat16, {}, "baddbmm"),
        (torch.float32, {"queries": 7}, "scaled_dot_product_attention"),
        (torch.float32, {"grad": True}, "scaled_dot_product_attention"),
        (torch.bfloat16, {"grad": True}, "scaled_dot_product_attention"),
        (torch.float32, {"backend": "eager"}, "scaled_dot_product_attention"),
        (torch.float64, {}, "scaled_dot_product_attention"),
        (torch.bfloat16, {"samples": 2}, "baddbmm"),
    ],
)
def test_attention_of_a_block(flags, monkeypatch, dtype, options, how):
    flags(*AMD)
    if how == "pair_attention" and (avfkernels.native.why_unavailable() or avfkernels.native.isa() != "avx512"):
        pytest.skip("the kernel needs AVX-512")
    B, H, N, P, d = 5, 3, options.get("queries", 33), 4, 16
    if "samples" in options:
        monkeypatch.setattr(attention, "SCORES", options["samples"] * H * N * (N + P))
    qkv = torch.randn(B, N + P, 3 * H * d, dtype=dtype, requires_grad=options.get("grad", False))
    q, k, v = (y.unflatten(-1, (H, d)).transpose(1, 2) for y in qkv.split(H * d, -1))
    called = []

    def spy(owner, name):
        run = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: called.append(name) or run(*args, **kwargs))

    for owner, name in ((attention, "pair_attention"), (torch, "baddbmm"), (F, "scaled_dot_product_attention")):
        spy(owner, name)
    with avfkernels.backend(options.get("backend")):
        out = attention.attention(q[:, :, P:], k, v, 0.3)
    assert set(called) == {how}
    assert len(called) == (3 if "samples" in options else 1)
    scores = q[:, :, P:].double() @ k.double().transpose(2, 3) * 0.3
    bound = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    assert out.shape == (B, H, N, d)
    assert error(out, scores.softmax(-1) @ v.double()) < bound
