"""The encoder: the authors' numbers, the reference backend, masks, layers with fusion, compile, errors."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from oracle import assert_accurate
from small import SMALL, batch, build, golden_encoder, masks
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import avfkernels
from avfusion import DeepAVFusion, EncoderConfig
from avfusion.models.deepavfusion import sincos_position_embedding

FUSIONS = ("factorized", "dense", "token", "none")


@pytest.mark.parametrize("backend", ["reference", "eager", None])
@pytest.mark.parametrize("kind", ["token", "dense", "factorized"])
def test_golden_outputs_of_the_release_after_every_layer(kind, backend):
    model, golden = golden_encoder(kind)
    with avfkernels.backend(backend), torch.no_grad():
        *out, embs = model(golden["image"], golden["audio"], return_embs=True)
    names = ("image", "audio", "fusion")
    pairs = [(got, golden[f"full_{name}"]) for got, name in zip(out, names, strict=True)]
    for layer, layer_out in enumerate(embs):
        pairs += [(got, golden[f"emb{layer}.{name}"]) for got, name in zip(layer_out, names, strict=True)]
    assert len(pairs) == 9
    for got, expected in pairs:
        assert ((got - expected).norm() / expected.norm()).item() < 1e-5


def test_the_fixed_positions_are_those_of_the_release():
    model, golden = golden_encoder("dense")
    for name, branch, grid in (("image", model.image, (4, 4)), ("audio", model.audio, (2, 3))):
        expected = golden[f"param.encoder.{name}.pos_embed"]
        torch.testing.assert_close(sincos_position_embedding(64, grid).double(), expected, rtol=0, atol=1e-6)
        assert branch.pos_embed.shape == expected.shape


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_outputs_and_gradients_equal_the_materialising_reference(fusion, masked):
    model = build(torch.float64, fusion=fusion)
    inputs, keep = batch(dtype=torch.float64), masks() if masked else ()
    results = []
    for backend in ("reference", None):
        with avfkernels.backend(backend):
            out = model(*inputs, *keep)
        loss = sum(o.sin().sum() for o in out)
        results.append((*out, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=fusion == "none")))
    for expected, got in zip(*results, strict=True):
        assert (expected is None) == (got is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


# Twelve layers of full width are made and run, in float64.
@pytest.mark.parametrize("fusion", ["dense", "factorized"])
def test_vit_b_in_float64_differs_from_the_reference_by_less_than_1e_10(fusion):
    torch.manual_seed(0)
    model = DeepAVFusion(EncoderConfig(fusion=fusion, image_size=(64, 64), audio_size=(32, 64))).double().eval()
    inputs = batch(model.config, B=1, dtype=torch.float64)
    with torch.no_grad():
        ours = model(*inputs)
        with avfkernels.backend("reference"):
            exact = model(*inputs)
    assert max((a - b).abs().max().item() for a, b in zip(ours, exact, strict=True)) < 1e-10


def test_masks_keep_the_named_patches():
    model = build(fusion="none")
    inputs, keep = batch(), masks()
    x_image, x_audio, _ = model(*inputs, *keep, return_embs=True)[3][0]
    assert x_image.shape[1] == 5
    assert x_audio.shape[1] == 2
    everything = [torch.arange(n).expand(2, -1) for n in (12, 6)]
    torch.testing.assert_close(model(*inputs, *everything), model(*inputs))
    tokens = model.image.embed(inputs[0], None)
    torch.testing.assert_close(model.image.embed(inputs[0], keep[0])[1, 3], tokens[1, keep[0][1, 3]])


@pytest.mark.parametrize(
    ("fusion_layers", "depth", "layers"),
    [
        ("all", 3, (0, 1, 2)),
        ("none", 3, ()),
        ("late", 3, (2,)),
        ("mid", 6, (2, 3, 4, 5)),
        ("mid", 2, (0, 1)),
        ("0-2", 3, (0, 2)),
        ("1", 3, (1,)),
    ],
)
def test_fusion_layers(fusion_layers, depth, layers):
    model = build(fusion="dense", depth=depth, fusion_layers=fusion_layers)
    assert model.config.layers_with_fusion == layers
    keys = {int(key.split(".")[1]) for key in model.state_dict() if key.startswith("fusion_blocks.")}
    assert keys == set(layers)
    assert model(*batch())[2].shape == (2, 5, 64)


def test_without_fusion_the_branches_do_not_see_each_other():
    model, (image, audio) = build(fusion="none"), batch()
    x_image, x_audio, x_fusion = model(image, audio)
    other = model(image, 2 * audio)
    assert torch.equal(x_image, other[0])
    assert not torch.allclose(x_audio, other[1])
    torch.testing.assert_close(x_fusion, model.fusion_norm(model.fusion_tokens).expand(2, -1, -1))
    fused = build(fusion="dense")
    assert not torch.allclose(fused(image, audio)[0], fused(image, 2 * audio)[0])


def test_state_dict_keys_are_those_of_the_release():
    for kind in ("token", "dense", "factorized"):
        model, golden = golden_encoder(kind)
        assert set(model.state_dict()) == {k.removeprefix("param.encoder.") for k in golden if k.startswith("param.")}
    assert "image.pos_embed" not in dict(model.named_parameters())


def test_layer_norm_eps_is_1e_6_in_the_vits_and_1e_5_elsewhere():
    for name, module in build().named_modules():
        if isinstance(module, nn.LayerNorm):
            assert module.eps == (1e-6 if name.startswith(("image.", "audio.")) else 1e-5), name


@pytest.mark.parametrize("fusion", ["factorized", "dense", "token"])
def test_attention_maps_are_distributions_over_patches(fusion):
    model = build(fusion=fusion, depth=3, fusion_layers="0-2")
    maps = model.attention_maps(*batch())
    assert list(maps) == [0, 2]
    for alpha, beta in maps.values():
        assert alpha.shape == (2, 4, 5, 6)
        assert beta.shape == (2, 4, 5, 12)
        total = alpha.sum(-1) + beta.sum(-1)
        torch.testing.assert_close(total, torch.full_like(total, 1.0 if fusion == "token" else 2.0))


def test_attention_maps_are_those_of_the_tokens_that_enter_the_layer():
    model, inputs = build(fusion="dense"), batch()
    embs = model(*inputs, return_embs=True)[3]
    x_image, x_audio, x_fusion = embs[0]
    _, alpha, beta = model.fusion_blocks["1"](x_fusion, x_image, x_audio, return_attention=True)
    torch.testing.assert_close(model.attention_maps(*inputs)[1], (alpha, beta))
    assert build(fusion="none").attention_maps(*inputs) == {}


# Traces a layer, forward and backward, of each fusion, and of one for both kinds of input: half a minute in all.
@pytest.mark.parametrize(("fusion", "kinds"), [("factorized", 2), ("dense", 1), ("token", 1), ("none", 1)])
def test_compiles_whole_once_for_full_and_once_for_masked_input_forward_and_backward(fusion, kinds):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, graphs = build(fusion=fusion, depth=1), CompileCounterWithBackend("aot_eager")
    compiled, exact = torch.compile(model, fullgraph=True, backend=graphs), copy.deepcopy(model).double()
    for keep in (masks(), (), masks(seed=2), ()) if kinds == 2 else (masks(), masks(seed=2)):
        results = []
        for run, own in ((compiled, model), (exact, exact), (model, model)):
            own.zero_grad()
            outputs = run(*batch(dtype=torch.float64 if own is exact else torch.float32), *keep)
            sum(o.sin().sum() for o in outputs).backward()
            grads = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
            results.append(dict(zip(("image", "audio", "fusion"), outputs, strict=True)) | grads)
        assert results[0].keys() == results[2].keys()
        # A key's bias moves all scores alike: its gradient is the sum of those of the keys, and cancels.
        sizes = {name: results[1][name.replace("k.bias", "k.weight")].norm().item() for name in results[0]}
        for name, got in results[0].items():  # of a bias of 16 numbers the error is chance
            assert_accurate(got, results[1][name], results[2][name], name, times=3, roundings=4, size=sizes[name])
        whole = [torch.cat([x[name].flatten() / sizes[name] for name in sizes]) for x in results]
        assert_accurate(*whole)
    assert graphs.frame_count == kinds
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_graph_of_the_forward_pass_needs_cuda():
    with pytest.raises(RuntimeError, match=r"graphed: CUDA graphs need .* a CUDA device; torch finds none"):
        build().graphed(*batch())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_graph_of_the_forward_pass_repeats_it_on_other_batches(fusion, masked):
    model = build(fusion=fusion).cuda().eval()
    inputs = [x.cuda() for x in (*batch(), *(masks() if masked else ()))]
    run = model.graphed(*inputs)
    first = run(*inputs)
    others = [x.flip(-1) for x in inputs]
    with torch.no_grad():
        for got, expected in ((first, model(*inputs)), (run(*others), model(*others)), (first, model(*inputs))):
            torch.testing.assert_close(got, expected)
    assert not torch.equal(first[0], run(*others)[0])
    with pytest.raises(ValueError, match="graphed: recorded for a batch of the shapes"):
        run(*(x[:1] for x in inputs))


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor compiles with a C++ compiler")
def test_inductor_compiles_the_encoder_whole():
    """Minutes of g++; that the encoder is one graph which computes the same is the test above, without inductor."""
    torch._dynamo.reset()
    model = build(fusion="factorized", depth=1).eval()
    with torch.no_grad():
        results = (
            torch.compile(model, fullgraph=True)(*batch()),
            copy.deepcopy(model).double()(*batch(dtype=torch.float64)),
            model(*batch()),
        )
    for triple in zip(*results, strict=True):
        assert_accurate(*triple)


def test_runs_in_bfloat16_under_autocast_and_on_meta_tensors():
    model, inputs, half = build(), batch(), torch.bfloat16
    with torch.no_grad():
        with torch.autocast("cpu", half):
            got = model(*inputs)
        exact, plain = (build(dtype)(*batch(dtype=dtype)) for dtype in (torch.float64, half))
    for out, *others in zip(got, exact, plain, strict=True):
        assert_accurate(out.to(half), *others)
    assert model.to("meta")(*(x.to("meta") for x in inputs))[2].shape == (2, 12, 64)


def test_drop_path_reaches_every_block_and_rests_in_eval():
    model = build(drop_path=0.5)
    assert not torch.equal(model(*batch())[2], model(*batch())[2])
    model.eval()
    torch.testing.assert_close(model(*batch()), build().eval()(*batch()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": "early"}, "fusion must be one of"),
        ({"interaction": "product"}, "interaction='product' belongs to fusion='dense', not 'factorized'"),
        ({"fusion": "dense", "interaction": "max"}, "interaction must be 'sum' or 'product'"),
        ({"num_heads": 5}, "dim = 64 must be a multiple of num_heads = 5"),
        ({"image_size": (60, 64)}, r"image_size = \(60, 64\) must be two multiples of patch_size 16"),
        ({"fusion_layers": "0-7"}, "each below depth = 2; got '0-7'"),
        ({"fusion_layers": "early"}, "got 'early'"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"audio_agg_tokens": 0}, "audio_agg_tokens must be at least 1"),
    ],
)
def test_a_config_that_cannot_be_built_names_the_field(changes, message):
    with pytest.raises(ValueError, match=f"EncoderConfig: .*{message}"):
        replace(SMALL, **changes)


def test_forward_errors_name_the_argument_and_the_shape():
    model, (image, audio) = build(), batch()
    with pytest.raises(ValueError, match=r"image must have shape \[B, 3, 64, 48\].*got \[2, 3, 64, 64\]"):
        model(torch.zeros(2, 3, 64, 64), audio)
    with pytest.raises(ValueError, match=r"audio must have shape \[B, 1, 32, 48\]"):
        model(image, audio[:1])
