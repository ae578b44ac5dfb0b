"""AVMAE: the authors' numbers, each saving against the plain formula, masks, errors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import assert_accurate
from safetensors import safe_open
from safetensors.torch import load_file
from small import golden_config

import avfkernels
from avfusion import AVMAE, DeepAVFusion, EncoderConfig
from avfusion.models.mae import patch_statistics, patchify, unpatchify

GOLDEN = Path(__file__).parents[2] / "golden"
SMALL = EncoderConfig(
    dim=32, depth=2, num_heads=2, image_size=(64, 48), audio_size=(32, 80),
    fusion_tokens=4, image_agg_tokens=2, audio_agg_tokens=3,
)  # fmt: skip
FUSIONS = ("factorized", "dense", "token", "none")


def build(dtype=torch.float32, decoder_depth=2, norm_loss=True, **changes):
    torch.manual_seed(0)
    encoder = DeepAVFusion(replace(SMALL, **changes))
    return AVMAE(encoder, 16, decoder_depth, 2, norm_loss=norm_loss).to(dtype)


def inputs(B=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = ((B, 3, 64, 48), (B, 1, 32, 80))
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes] + [
        torch.rand(B, n, generator=g) for n in (12, 10)
    ]


def golden_mae(kind):
    with safe_open(GOLDEN / f"avmae_{kind}.safetensors", "pt") as file:
        arguments = file.metadata()
    tensors = load_file(GOLDEN / f"encoder_{kind}.safetensors") | load_file(GOLDEN / f"avmae_{kind}.safetensors")
    golden = {key: value.double() for key, value in tensors.items()}
    decoder = [int(arguments[f"decoder_{name}"]) for name in ("dim", "depth", "num_heads")]
    ratios = [float(arguments[f"{name}_mask_ratio"]) for name in ("image", "audio")]
    model = AVMAE(DeepAVFusion(golden_config(kind, arguments)), *decoder, *ratios).double()
    model.load_state_dict({k.removeprefix("param."): v for k, v in golden.items() if k.startswith("param.")})
    return model, golden


@pytest.mark.parametrize("predict", [True, False])
@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("kind", ["token", "dense", "factorized"])
def test_golden_losses_predictions_and_gradients_of_the_release(kind, backend, predict):
    model, golden = golden_mae(kind)
    noise = (golden["image_noise"], golden["audio_noise"])
    with avfkernels.backend(backend):
        *losses, pred_image, pred_audio = model(golden["image"], golden["audio"], *noise, predict=predict)
        sum(losses).backward()
    for name, loss in zip(("image", "audio"), losses, strict=True):
        assert loss.item() == pytest.approx(golden[f"loss_{name}"].item(), rel=1e-5)
    if predict:
        for pred, expected in ((pred_image, golden["pred_image"]), (pred_audio, golden["pred_audio"])):
            assert ((pred - expected).abs().max() / expected.abs().max()).item() < 1e-5
    else:
        assert pred_image is pred_audio is None
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert {f"gradnorm.{name}" for name in gradients} == {key for key in golden if key.startswith("gradnorm.")}
    for name, gradient in gradients.items():
        assert gradient.norm().item() == pytest.approx(golden[f"gradnorm.{name}"].item(), rel=1e-5, abs=1e-12), name
        assert gradient.sum().item() == pytest.approx(golden[f"gradsum.{name}"].item(), rel=1e-5, abs=1e-9), name


def as_released(model, image, audio, image_noise, audio_noise):
    """The losses by the release's plain formula: unshuffle, whole blocks on all tokens, mask the loss."""
    ids = [noise.argsort(1) for noise in (image_noise, audio_noise)]
    kept = [i[:, : model.visible[name]] for i, name in zip(ids, ("image", "audio"), strict=True)]
    *tokens, x_fusion = model.encoder(image, audio, *kept)
    losses = []
    for name, x, raw, order in zip(("image", "audio"), tokens, (image, audio), ids, strict=True):
        embed, mask_token, positions, blocks, norm, pred = (
            getattr(model, f"{name}_decoder_{part}")
            for part in ("embed", "mask_token", "pos_embed", "blocks", "norm", "pred")
        )
        B, n = order.shape
        filled = torch.cat([embed(x), mask_token.expand(B, n - x.shape[1], -1)], 1)
        filled = filled.gather(1, order.argsort(1)[..., None].expand(-1, -1, filled.shape[-1])) + positions
        y = torch.cat([embed(x_fusion), filled], 1)
        for block in blocks:
            y = block(y)
        y = pred(norm(y))[:, x_fusion.shape[1] :]
        target = patchify(raw, 16)
        if model.norm_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        hidden = (order.argsort(1) >= x.shape[1]).to(y.dtype)
        losses.append((((y - target) ** 2).mean(-1) * hidden).sum() / hidden.sum())
    return losses


@pytest.mark.parametrize("norm_loss", [True, False])
@pytest.mark.parametrize("decoder_depth", [1, 3])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_is_left_out_changes_neither_losses_nor_gradients(fusion, decoder_depth, norm_loss):
    model, batch = build(torch.float64, decoder_depth, norm_loss, fusion=fusion), inputs(dtype=torch.float64)
    parameters = list(model.parameters())
    results = []
    for losses in (as_released(model, *batch), model(*batch)[:2], model(*batch, predict=False)[:2]):
        results.append([*losses, *torch.autograd.grad(sum(losses), parameters, allow_unused=fusion == "none")])
    for expected, *ours in zip(*results, strict=True):
        for got in ours:
            assert (got is None) == (expected is None)
            if got is not None:
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def saved_bytes(compute, parameters=()):
    """What autograd keeps for the backward pass: each storage once, parameters left out."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in parameters}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    return sum(storage.nbytes() for storage in kept.values()), result


def test_the_loss_keeps_one_tensor_of_the_size_of_what_is_hidden():
    model, (image, _, noise, _) = build(), inputs()
    ids = noise.argsort(1)
    pred = torch.randn(3, 9, 768, requires_grad=True)
    kept, _ = saved_bytes(lambda: model._loss("image", pred, image, ids))
    assert kept == pred.nbytes


def test_training_keeps_less_than_the_plain_formula():
    model, batch = build(), inputs()
    parameters = list(model.parameters())
    ours, _ = saved_bytes(lambda: model(*batch, predict=False), parameters)
    released, _ = saved_bytes(lambda: as_released(model, *batch), parameters)
    assert ours < 0.9 * released


def test_noise_decides_the_mask_and_hidden_patches_do_not_matter_to_the_encoder():
    model, (image, audio, image_noise, audio_noise) = build(), inputs()
    hidden = image_noise.argsort(1).argsort(1) >= 3
    changed = unpatchify(patchify(image, 16) + 5 * hidden[..., None], (4, 3), 16)
    first, other = (model(x, audio, image_noise, audio_noise) for x in (image, changed))
    torch.testing.assert_close(first[2], other[2])
    assert torch.equal(first[1], other[1])
    torch.testing.assert_close(first[0], other[0], msg="a shift of a whole patch is normalised away")
    assert not torch.equal(model(image, audio)[2], model(image, audio)[2])  # drawn anew


def test_patches_are_flattened_row_column_channel_and_back():
    x = torch.arange(2 * 3 * 32 * 48.0).view(2, 3, 32, 48)
    patches = patchify(x, 16)
    assert patches.shape == (2, 6, 768)
    assert torch.equal(patches[1, 4].view(16, 16, 3), x[1, :, 16:32, 16:32].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, (2, 3), 16), x)


def test_reconstructions_show_input_hidden_and_predicted_in_the_inputs_own_units():
    model, batch = build(), inputs()
    shown = model.reconstruct(*batch)
    for name, x, noise, group in (("image", batch[0], batch[2], shown[:3]), ("audio", batch[1], batch[3], shown[3:])):
        original, masked, filled = (patchify(t, 16) for t in group)
        hidden = noise.argsort(1).argsort(1) >= model.visible[name]
        assert torch.equal(group[0], x)
        assert torch.equal(masked.isnan().all(-1), hidden)
        assert torch.equal(filled[~hidden], original[~hidden])
        mean, deviation = patch_statistics(original)
        pred = model(*batch)[2 if name == "image" else 3]
        torch.testing.assert_close(filled[hidden], (pred * deviation + mean)[hidden])


# Traces encoder and decoders, forward and backward: ten seconds.
def test_compiles_whole_forward_and_backward():
    torch._dynamo.reset()
    model, exact = build(depth=1, decoder_depth=1), build(torch.float64, depth=1, decoder_depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run, own, dtype in (
        (compiled, model, torch.float32),
        (exact, exact, torch.float64),
        (model,) * 2 + (torch.float32,),
    ):
        losses = run(*inputs(dtype=dtype), predict=False)[:2]
        results.append((*losses, *torch.autograd.grad(sum(losses), [own.encoder.fusion_tokens])))
    for triple in zip(*results, strict=True):
        assert_accurate(*triple, times=3)


def test_runs_under_autocast_with_losses_in_float32():
    with torch.autocast("cpu", torch.bfloat16):
        losses = build()(*inputs(), predict=False)[:2]
    for got, exact in zip(losses, build(torch.float64)(*inputs(dtype=torch.float64))[:2], strict=True):
        assert got.dtype == torch.float32
        assert abs(got - exact) < torch.finfo(torch.bfloat16).eps * exact  # a mean over patches of rounded predictions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_mask_ratio": 1.0}, r"image_mask_ratio = 1\.0 leaves 0 of 12 patches visible"),
        ({"audio_mask_ratio": 0.0}, r"audio_mask_ratio = 0\.0 leaves 10 of 10 patches visible"),
        ({"decoder_dim": 20, "decoder_num_heads": 3}, "decoder_dim = 20 must be a multiple of decoder_num_heads = 3"),
        ({"decoder_depth": 0}, "decoder_depth = 0 at least 1"),
    ],
)
def test_a_model_that_cannot_be_built_names_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        AVMAE(DeepAVFusion(SMALL), **arguments)


def test_noise_of_another_shape_is_refused():
    image, audio, image_noise, audio_noise = inputs()
    with pytest.raises(ValueError, match=r"image_noise must have shape \[B, patches\] = \[3, 12\], got \[3, 10\]"):
        build()(image, audio, audio_noise, audio_noise)
    with pytest.raises(ValueError, match=r"audio must have shape \[B, 1, 32, 80\]"):
        build()(image, image, image_noise, audio_noise)
