"""The fusion blocks: the authors' numbers, the equations, the traps of the release, and what users get wrong."""

import copy
import json
from pathlib import Path

import pytest
import torch
from oracle import assert_accurate
from safetensors import safe_open
from torch._dynamo.testing import CompileCounterWithBackend

import avfkernels
from avfkernels import DenseFusion, FactorizedFusion, TokenFusion, attentions

GOLDEN = Path(__file__).parents[1] / "golden"
BLOCKS = {"token": TokenFusion, "dense": DenseFusion, "factorized": FactorizedFusion}
INPUTS = ("x_fusion", "x_visual", "x_audio")


def build(kind, dim=64, heads=4, **options):
    torch.manual_seed(0)
    if kind == "factorized":
        options.setdefault("fusion_tkns", (5, 3, 4))
    return BLOCKS[kind](dim, heads, **options)


def tokens(fusion=12, visual=13, audio=7, dim=64, batch=2, dtype=torch.float32, grad=False):
    g = torch.Generator().manual_seed(0)
    shapes = [(batch, n, dim) for n in (fusion, visual, audio)]
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_(grad) for shape in shapes]


def relative_error(got, expected):
    """By norm."""
    norm = expected.norm()
    return ((got - expected).norm() / norm).item() if norm > 1e-9 else got.norm().item()


def exact_copies(block, tensors):
    """Of a block and its inputs, in float64."""
    return copy.deepcopy(block).double(), [t.detach().double().requires_grad_() for t in tensors]


def with_gradients(block, inputs):
    out = block(*inputs)
    return (out, *torch.autograd.grad(out.to(inputs[0].dtype).sin().sum(), inputs))


@pytest.mark.parametrize("backend", ["reference", "eager", None])
@pytest.mark.parametrize("kind", BLOCKS)
def test_golden_outputs_and_gradients_of_the_release(kind, backend):
    with safe_open(GOLDEN / f"block_{kind}.safetensors", "pt") as file:
        arguments, golden = file.metadata(), {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118
    options = {"fusion_tkns": json.loads(arguments["fusion_tkns"])} if kind == "factorized" else {}
    block = BLOCKS[kind](
        int(arguments["dim"]), int(arguments["num_heads"]), float(arguments["attn_ratio"]),
        float(arguments["mlp_ratio"]), dtype=torch.float64, **options,
    )  # fmt: skip
    block.load_state_dict({k.removeprefix("param."): v for k, v in golden.items() if k.startswith("param.")})
    inputs = [golden[name].clone().requires_grad_() for name in INPUTS]
    with avfkernels.backend(backend):
        out = block(*inputs)
    out.backward(golden["grad_out"])
    assert relative_error(out, golden["out"]) < 1e-7
    for name, tensor in zip(INPUTS, inputs, strict=True):
        assert relative_error(tensor.grad, golden[f"d{name}"]) < 1e-7, name
    for name, parameter in block.named_parameters():
        assert relative_error(parameter.grad, golden[f"grad.{name}"]) < 1e-7, name


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(("visual", "audio"), [(1, 1), (1, 40), (40, 1), (196, 96)])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "attn_ratio": 0.5, "mlp_ratio": 2.0}])
def test_fast_path_equals_the_materialised_equations(kind, visual, audio, options):
    block = build(kind, **options).double()
    inputs = tokens(visual=visual, audio=audio, dtype=torch.float64, grad=True)
    results = []
    for backend in ("reference", "eager"):
        with avfkernels.backend(backend):
            out = block(*inputs)
        results.append((out, *torch.autograd.grad(out.sin().sum(), [*inputs, *block.parameters()])))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fast_path_is_as_accurate_as_the_materialised_one_in_every_dtype(kind, dtype):
    block, inputs = build(kind).to(dtype), tokens(dtype=dtype, grad=True)
    exact = with_gradients(*exact_copies(block, inputs))
    results = []
    for backend in (None, "reference"):
        with avfkernels.backend(backend):
            results.append(with_gradients(block, inputs))
    for got, expected, plain in zip(results[0], exact, results[1], strict=True):
        assert_accurate(got, expected, plain)


@pytest.mark.parametrize(("latents", "absorbed"), [(3, True), (15, True), (16, False)])
def test_r2_is_taken_where_latents_times_heads_are_fewer_than_features(latents, absorbed, monkeypatch):
    attention = attentions.LatentCrossAttention(64, 4, True, 0.0, 0.0)
    calls, run = [], attentions.absorbed_attention
    monkeypatch.setattr(attentions, "absorbed_attention", lambda *a: calls.append(1) or run(*a))
    tokens = attentions.Tokens(torch.randn(1, 5, 64), attention.kv.weight, attention.kv.bias)
    attention(torch.randn(1, latents, 64), tokens)
    assert bool(calls) == absorbed


MASKS = [(True, True), (True, False), (False, True)]


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize(("visual", "audio"), MASKS)
@pytest.mark.parametrize("kind", [*BLOCKS, "product"])
def test_clips_of_several_lengths_in_one_batch_give_what_each_gives_alone(kind, visual, audio, backend):
    """Output, maps and every gradient; behind the end of a clip there is NaN."""
    block = build("dense", interaction="product") if kind == "product" else build(kind)
    block = block.double()
    x_fusion, x_visual, x_audio = tokens(dtype=torch.float64, batch=3)
    lengths = [(13, 7), (5 if visual else 13, 7), (1 if visual else 13, 2 if audio else 7)]
    masks = [torch.arange(n) < torch.tensor([clip[i] for clip in lengths])[:, None] for i, n in enumerate((13, 7))]
    padded = [x.masked_fill(~mask[..., None], float("nan")) for x, mask in zip((x_visual, x_audio), masks, strict=True)]
    padded = [x.requires_grad_() for x in (x_fusion, *padded)]
    given = {"visual_mask": masks[0] if visual else None, "audio_mask": masks[1] if audio else None}
    parameters = list(block.parameters())
    with avfkernels.backend(backend):
        out, alpha, beta = block(*padded, return_attention=True, **given)
        torch.testing.assert_close(block(*padded, **given), out)
        grads = torch.autograd.grad(out.sin().sum(), [*padded, *parameters])
        expected = [0.0] * len(parameters)
        for i, (n_v, n_a) in enumerate(lengths):
            own = [x[i : i + 1, :n].detach().requires_grad_() for x, n in zip(padded, (12, n_v, n_a), strict=True)]
            alone, alone_alpha, alone_beta = block(*own, return_attention=True)
            torch.testing.assert_close(out[i : i + 1], alone)
            torch.testing.assert_close(alpha[i : i + 1, ..., :n_a], alone_alpha)
            torch.testing.assert_close(beta[i : i + 1, ..., :n_v], alone_beta)
            assert not alpha[i, ..., n_a:].any()
            assert not beta[i, ..., n_v:].any()
            found = torch.autograd.grad(alone.sin().sum(), [*own, *parameters])
            for grad, of_own, n in zip(grads, found, (12, n_v, n_a), strict=False):
                torch.testing.assert_close(grad[i : i + 1, :n], of_own)
                assert not grad[i, n:].any()
            expected = [total + g for total, g in zip(expected, found[3:], strict=True)]
    torch.testing.assert_close(list(grads[3:]), expected)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("kind", [*BLOCKS, "product"])
def test_a_clip_without_any_token_of_a_modality_is_finite(kind, backend):
    block = build("dense", interaction="product") if kind == "product" else build(kind)
    inputs = tokens(grad=True)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1] = False
    with avfkernels.backend(backend):
        out, alpha, beta = block(*inputs, return_attention=True, audio_mask=mask)
        torch.testing.assert_close(out[:1], block(*(x[:1] for x in inputs)))
        grads = torch.autograd.grad(out.sin().sum(), [*inputs, *block.parameters()])
    assert all(bool(x.isfinite().all()) for x in (out, alpha, beta, *grads))
    assert not alpha[1].any()


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("kind", BLOCKS)
def test_return_attention_gives_the_same_output_and_marginal_distributions(kind, backend):
    block, inputs = build(kind).double(), tokens(dtype=torch.float64)
    with avfkernels.backend(backend):
        out, alpha, beta = block(*inputs, return_attention=True)
        torch.testing.assert_close(out, block(*inputs))
    queries = 5 if kind == "factorized" else 12
    assert alpha.shape == (2, 4, queries, 7)
    assert beta.shape == (2, 4, queries, 13)
    sums = alpha.sum(-1), beta.sum(-1)
    ones = torch.ones_like(sums[0])
    if kind == "token":
        torch.testing.assert_close(sums[0] + sums[1], ones)
    else:
        torch.testing.assert_close(sums, (ones, ones))


@pytest.mark.parametrize("interaction", ["sum", "product"])
def test_marginals_are_those_of_the_attention_over_pairs(interaction):
    block = build("dense", interaction=interaction).double()
    x_fusion, x_visual, x_audio = tokens(dtype=torch.float64)
    attn = block.attn
    q = attn.q(block.norm1_mm(x_fusion)).view(2, 12, 4, 4)
    w_audio, w_visual = attn.kv.weight[:16].split(64, 1)
    bias = attn.kv.bias[:16]
    k_a = (block.norm1_aud(x_audio) @ w_audio.T + (bias if interaction == "product" else 0)).view(2, 7, 4, 4)
    k_v = (block.norm1_img(x_visual) @ w_visual.T + bias).view(2, 13, 4, 4)
    pairs = torch.add if interaction == "sum" else torch.mul
    k = pairs(k_a[:, :, None], k_v[:, None])
    scores = torch.einsum("bfhd,bijhd->bhfij", q, k) * attn.scale
    joint = scores.flatten(3).softmax(-1).view_as(scores)
    _, alpha, beta = block(x_fusion, x_visual, x_audio, return_attention=True)
    torch.testing.assert_close(alpha, joint.sum(4))
    torch.testing.assert_close(beta, joint.sum(3))


def test_product_interactions_equal_the_reference_and_differ_from_sums():
    inputs = tokens()
    product, total = build("dense", interaction="product"), build("dense")
    product.load_state_dict(total.state_dict())
    assert not torch.allclose(product(*inputs), total(*inputs))
    with avfkernels.backend("reference"):
        expected = product(*inputs)
    torch.testing.assert_close(product(*inputs), expected)


@pytest.mark.parametrize("kind", ["dense", "product", "factorized"])
def test_attention_dropout_in_training_keeps_no_pair_and_is_exact(kind, monkeypatch):
    """Two runs that draw the same seeds agree: one on the automatic backend, one with all pairs in memory."""
    options = {"interaction": "product"} if kind == "product" else {}
    block = build("dense" if kind == "product" else kind, attn_drop=0.5, **options).train()
    inputs = [x.requires_grad_() for x in tokens()]
    monkeypatch.setattr(attentions, "_pairs", None)  # what would build them
    results = []
    for forced, case in ((None, (block, inputs)), ("reference", exact_copies(block, inputs)),
                         ("reference", (block, inputs))):  # fmt: skip
        # The reference backend of the op, not of the module: that one follows the paper's equations.
        monkeypatch.setattr(attentions, "materialises", lambda: False)
        torch.manual_seed(0)
        with avfkernels.backend(forced):
            results.append(with_gradients(*case))
    for triple in zip(*results, strict=True):
        assert_accurate(*triple)
    assert not torch.equal(block(*inputs), block(*inputs))
    block.eval()
    torch.testing.assert_close(block(*inputs), build("dense" if kind == "product" else kind, **options)(*inputs))


def test_attention_dropout_of_token_fusion_drops_weights():
    block, inputs = build("token", attn_drop=0.5).train(), tokens()
    assert not torch.equal(block(*inputs), block(*inputs))
    torch.testing.assert_close(block.eval()(*inputs), build("token")(*inputs))


def test_attention_maps_survive_dropout():
    block = build("dense", attn_drop=0.5)
    _, alpha, _ = block(*tokens(), return_attention=True)
    torch.testing.assert_close(alpha.sum(-1), torch.ones(2, 4, 12))


def test_drop_path_drops_whole_samples_and_rescales_the_rest():
    block = build("dense", drop_path=0.25)
    x = torch.ones(2000, 3, 4)
    dropped = block.drop_path(x)
    per_sample = dropped[:, 0, 0]
    assert set(per_sample.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(dropped, per_sample[:, None, None].expand_as(x))
    assert abs((per_sample > 0).float().mean().item() - 0.75) < 0.05
    assert block.eval().drop_path(x) is x


def test_token_fusion_normalises_with_the_swapped_norms_of_the_release():
    block = build("token")
    torch.nn.init.zeros_(block.norm1_aud.weight)  # in the release this one sees the visual tokens
    x_fusion, x_visual, x_audio = tokens()
    torch.testing.assert_close(block(x_fusion, x_visual, x_audio), block(x_fusion, 3 * x_visual + 1, x_audio))
    assert not torch.allclose(block(x_fusion, x_visual, x_audio), block(x_fusion, x_visual, 2 * x_audio**3))


def test_scales_are_those_of_the_release():
    """Full head width for dense and factorized, the narrow width for token."""
    assert build("dense").attn.scale == build("factorized").attn.scale == 16**-0.5
    assert build("token").attn.scale == 4**-0.5


@pytest.mark.parametrize("kind", BLOCKS)
def test_initialisation_is_xavier_with_zero_biases(kind):
    for name, parameter in build(kind).named_parameters():
        if name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name
        elif "norm" not in name:
            bound = (6 / sum(parameter.shape)) ** 0.5
            assert parameter.abs().max() <= bound, name
            assert parameter.std() > 0.4 * bound, name


# Traces a block on two backends, forward and backward.
@pytest.mark.parametrize("kind", BLOCKS)
def test_compiles_whole_forward_and_backward(kind):
    torch._dynamo.reset()
    block, inputs = build(kind), tokens(grad=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    exact = with_gradients(*exact_copies(block, inputs))
    for forced in (None, "reference"):
        with avfkernels.backend(forced):
            got, plain = with_gradients(compiled, inputs), with_gradients(block, inputs)
        for triple in zip(got, exact, plain, strict=True):
            assert_accurate(*triple)


@pytest.mark.parametrize("kind", [*BLOCKS, "product"])
def test_compiles_once_for_all_batches_and_token_counts(kind):
    torch._dynamo.reset()
    block = build("dense", interaction="product") if kind == "product" else build(kind)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    compiles = set()
    for sizes in ({}, {"visual": 40, "audio": 9, "batch": 3}, {"visual": 17, "audio": 21, "batch": 5}):
        inputs = tokens(**sizes)
        with torch.set_grad_enabled(kind == "dense"):  # tracing backward takes as long again
            torch.testing.assert_close(compiled(*inputs), block(*inputs))
        compiles.add(counter.frame_count)
    assert len(compiles) == 1


@pytest.mark.parametrize("kind", BLOCKS)
def test_runs_under_autocast_and_on_meta_tensors(kind):
    block, inputs = build(kind), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        out = block(*inputs)
    exact, doubles = exact_copies(block, inputs)
    plain = copy.deepcopy(block).bfloat16()(*(x.bfloat16() for x in inputs))
    assert_accurate(out.to(plain.dtype), exact(*doubles), plain)
    assert BLOCKS[kind](64, 4, device="meta", **({"fusion_tkns": (5, 3, 4)} if kind == "factorized" else {}))(
        *(x.to("meta") for x in inputs)
    ).shape == (2, 12, 64)


def test_constructor_errors_name_the_argument():
    with pytest.raises(ValueError, match="multiples of num_heads = 5"):
        DenseFusion(64, 5)
    with pytest.raises(ValueError, match=r"int\(dim \* attn_ratio\) = 0"):
        TokenFusion(64, 4, attn_ratio=0.01)
    with pytest.raises(ValueError, match="fusion_tkns must be three positive counts"):
        FactorizedFusion(64, 4, fusion_tkns=(16, 8))
    with pytest.raises(ValueError, match="interaction must be one of"):
        DenseFusion(64, 4, interaction="max")
    with pytest.raises(ValueError, match=r"drop_path must be in \[0, 1\)"):
        DenseFusion(64, 4, drop_path=1.0)


def test_forward_errors_name_the_argument_and_the_shape():
    block, (x_fusion, x_visual, x_audio) = build("factorized"), tokens()
    with pytest.raises(ValueError, match=r"sum\(fusion_tkns\) = 12 tokens .* got \[2, 11, 64\]"):
        block(x_fusion[:, 1:], x_visual, x_audio)
    with pytest.raises(ValueError, match=r"x_audio must have shape \[B, N, 64\].*got \[2, 7, 32\]"):
        block(x_fusion, x_visual, x_audio[..., :32])
    with pytest.raises(ValueError, match="x_visual must have shape"):
        block(x_fusion, x_visual[:1], x_audio)
    with pytest.raises(ValueError, match=r"x_audio \[2, 7, 64\] is torch.float64, x_fusion .* is torch.float32; cast"):
        block(x_fusion, x_visual, x_audio.double())
    with pytest.raises(ValueError, match=r"x_audio .* is torch.float64"):  # bug: a device that knows no autocast
        block.to("meta")(x_fusion.to("meta"), x_visual.to("meta"), x_audio.double().to("meta"))
    block = build("factorized")
    with pytest.raises(ValueError, match=r"FactorizedFusion: audio_mask must .* = \[2, 7\], got \[2, 8\]"):
        block(x_fusion, x_visual, x_audio, audio_mask=torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="visual_mask must be a bool tensor"):
        block(x_fusion, x_visual, x_audio, visual_mask=torch.ones(2, 13))


def test_products_with_an_empty_side_have_maps_of_nothing():
    block = DenseFusion(64, 4, interaction="product")
    x_fusion, x_visual, x_audio = torch.randn(2, 3, 64), torch.randn(2, 5, 64), torch.randn(2, 0, 64)
    _, alpha, beta = block(x_fusion, x_visual, x_audio, return_attention=True)
    assert alpha.shape == (2, 4, 3, 0)
    assert torch.equal(beta, torch.zeros(2, 4, 3, 5))
