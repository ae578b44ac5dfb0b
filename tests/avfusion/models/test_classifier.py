"""The classifier head: the authors' numbers, what is frozen and what is trained; and the optimisers that train it."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from avfusion import DeepAVFusion, EncoderConfig
from avfusion.models.heads.classifier import MODALITIES, Classifier
from avfusion.training.optim import lars, layer_decay_groups, rate, set_rate

GOLDEN = Path(__file__).parents[2] / "golden" / "head_classifier.safetensors"
SMALL = EncoderConfig(
    dim=32, depth=2, num_heads=2, image_size=(32, 32), audio_size=(32, 48),
    fusion_tokens=4, image_agg_tokens=2, audio_agg_tokens=3, drop_path=0.5,
)  # fmt: skip


def build(freeze_encoder, dtype=torch.float32, classes=5):
    torch.manual_seed(0)
    return Classifier(DeepAVFusion(SMALL), classes, freeze_encoder=freeze_encoder).to(dtype)


def batch(B=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(B, 3, 32, 32, generator=g).to(dtype), torch.randn(B, 1, 32, 48, generator=g).to(dtype)


def test_golden_logits_of_the_release():
    """The release's heads and logits; x_* is what its encoder's weights give here, in place of 5 MB of them."""
    with safe_open(GOLDEN, "pt") as file:
        arguments, golden = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tokens, image_agg, audio_agg = json.loads(arguments["fusion_tkns"])
    config = EncoderConfig(
        dim=int(arguments["dim"]), depth=1, num_heads=int(arguments["num_heads"]),
        image_size=json.loads(arguments["image_size"]), audio_size=json.loads(arguments["audio_size"]),
        fusion_tokens=tokens, image_agg_tokens=image_agg, audio_agg_tokens=audio_agg,
    )  # fmt: skip
    model = Classifier(DeepAVFusion(config), 7, freeze_encoder=True).double().eval()
    state = {key: value for key, value in model.state_dict().items() if key.startswith("encoder.")}
    head = {key.removeprefix("param."): value for key, value in golden.items() if key.startswith("param.")}
    model.load_state_dict(state | head)  # strict: no key of the head is missing, or new
    model.encoder.forward = lambda image, audio: tuple(golden[f"x_{name}"].double() for name in MODALITIES)
    expected = [golden[f"logits_{name}"].double() for name in MODALITIES]
    for logits, right in zip(model(None, None), expected, strict=True):
        assert ((logits - right).abs().max() / right.abs().max()).item() < 1e-6
    torch.testing.assert_close(model(None, None, average=True), sum(expected) / 3, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_probe_normalises_pooled_features_by_the_batch_and_then_by_its_memory(training):
    model, (image, audio) = build(True, torch.float64).train(training), batch(8, torch.float64)
    pooled = [x.mean(1) for x in model.encoder(image, audio)]
    for name, x in zip(MODALITIES, pooled, strict=True):
        norm = getattr(model, f"{name}_norm")
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
        mean, variance = (x.mean(0), x.var(0, correction=0)) if training else (norm.running_mean, norm.running_var)
        head = getattr(model, f"{name}_head")
        expected = ((x - mean) / (variance + 1e-6).sqrt()) @ head.weight.T + head.bias
        with torch.no_grad():
            torch.testing.assert_close(model(image, audio)[MODALITIES.index(name)], expected)


def test_probe_trains_the_heads_and_nothing_else():
    model, inputs = build(True), batch()
    assert model.train() is model
    assert all(module.training for module in (model, model.image_norm, model.image_head))
    assert not any(module.training for module in model.encoder.modules())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits = model(*inputs, average=True)
    torch.testing.assert_close(logits, torch.stack(model(*inputs)).mean(0))  # nothing is dropped
    logits.sum().backward()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names == [f"{name}_head.{kind}" for name in MODALITIES for kind in ("weight", "bias")]
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    optimizer = lars(model)
    set_rate(optimizer, 1.0, 1, 10, 1)
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {*names} | {f"{name}_norm.{buffer}" for name in MODALITIES for buffer in
                                  ("running_mean", "running_var", "num_batches_tracked")}  # fmt: skip
    assert not any(tokens.requires_grad for tokens in model.encoder(*inputs))


def test_fine_tuning_trains_everything_and_has_no_norms():
    model, inputs = build(False).train(), batch()
    assert all(module.training for module in model.modules())
    assert not any("norm.running" in key for key in model.state_dict())
    sum(logits.square().sum() for logits in model.eval()(*inputs)).backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not unused
    pooled = model.encoder(*inputs)[2].mean(1)
    torch.testing.assert_close(model(*inputs)[2], model.fusion_head(pooled))


def test_heads_start_as_released():
    model = build(False, classes=1000)
    for name in MODALITIES:
        head = getattr(model, f"{name}_head")
        assert not head.bias.any()
        assert head.weight.abs().max() <= (6 / 1032) ** 0.5 < 1.001 * head.weight.abs().max()


def test_a_probe_learns_what_can_be_told_apart():
    torch.manual_seed(0)
    model, (image, audio) = build(True, classes=2).train(), batch(16)
    labels = torch.arange(16) % 2
    image += 3 * labels[:, None, None, None]
    optimizer = lars(model)
    for epoch in range(60):
        set_rate(optimizer, 3.0, epoch, 60, 5)
        F.cross_entropy(model(image, audio, average=True), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model(image, audio)[0].argmax(1) == labels).all()


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.zero, self.still = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(3, 2, bias=False)
        nn.init.zeros_(self.zero.weight)


@pytest.mark.parametrize("foreach", [True, False])
def test_lars_is_that_of_mae(foreach):
    """Against MAE's rule written out: ratio of norms for matrices only, momentum after it."""
    model = Plain().double()
    optimizer = lars(model, momentum=0.8, trust_coefficient=0.01)
    for group in optimizer.param_groups:
        group["foreach"] = foreach
    mine = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    momentum = {name: torch.zeros_like(parameter) for name, parameter in mine.items()}
    g = torch.Generator().manual_seed(0)
    for step in range(1000):
        lr = set_rate(optimizer, 0.3, step, 1000, 100)
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            gradient *= 0.0 if name == "still.weight" or step % 7 == 0 else 10.0 ** (step % 5 - 2)
            parameter.grad = gradient.clone()
            if gradient.ndim > 1:
                w, size = mine[name].norm(), gradient.norm()
                gradient = gradient * (0.01 * w / size if w > 0 and size > 0 else 1.0)
            momentum[name] = 0.8 * momentum[name] + gradient
            mine[name] = mine[name] - lr * momentum[name]
        optimizer.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), mine[name], rtol=1e-9, atol=1e-12)
    assert torch.equal(model.still.weight, Plain().double().still.weight)


def test_layers_learn_the_more_the_deeper_they_are():
    model = build(False)
    model.audio_head.weight.requires_grad_(False)
    groups = layer_decay_groups(model, decay=0.75, weight_decay=0.05)
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    set_rate(optimizer, 1e-3, 2, 10, 4)
    expected = {
        "encoder.image.patch_embed.proj.weight": 0.75**3,
        "encoder.audio.patch_embed.proj.bias": 0.75**3,
        "encoder.fusion_tokens": 0.75**3,
        "encoder.image.blocks.0.attn.qkv.weight": 0.75**2,
        "encoder.audio.blocks.0.mlp.fc1.bias": 0.75**2,
        "encoder.fusion_blocks.0.attn.q.weight": 0.75**2,
        "encoder.image.blocks.1.norm1.weight": 0.75,
        "encoder.audio.blocks.1.attn.proj.weight": 0.75,
        "encoder.fusion_blocks.1.norm1_mm.bias": 0.75,
        "encoder.image.norm.weight": 1.0,
        "encoder.fusion_norm.bias": 1.0,
        "fusion_head.weight": 1.0,
        "audio_head.bias": 1.0,
    }
    names, seen = {id(parameter): name for name, parameter in model.named_parameters()}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen[name] = group["lr_scale"]
            assert group["weight_decay"] == (0.0 if name.endswith("bias") or "norm" in name else 0.05), name
            assert group["lr"] == pytest.approx(1e-3 * rate(2, 10, 4) * group["lr_scale"])
    assert seen.keys() == set(names.values()) - {"audio_head.weight"}
    assert {name: seen[name] for name in expected} == pytest.approx(expected)
    assert len(groups) == 2 * (SMALL.depth + 2)
    for layer in range(SMALL.depth):
        shares = {share for name, share in seen.items() if f"blocks.{layer}." in name}
        assert len(shares) == 1

    alone = layer_decay_groups(model.encoder, decay=0.75, weight_decay=0.05)
    shares = {names[id(parameter)]: group["lr_scale"] for group in alone for parameter in group["params"]}
    assert shares == {name: share for name, share in seen.items() if name.startswith("encoder.")}


def test_a_probe_has_nothing_but_heads_to_group():
    assert [group["lr_scale"] for group in layer_decay_groups(build(True))] == [1.0, 1.0]
