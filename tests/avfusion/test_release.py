"""What the released training code does, number by number: `tests/golden/recipe.json` and `.safetensors`."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from small import GOLDEN

from avfusion import AVMAE, DeepAVFusion, EncoderConfig, LogMel
from avfusion.metrics.neighbours import leave_one_out_accuracy
from avfusion.metrics.separation import apply_mask
from avfusion.models.heads.classifier import Classifier, class_loss, log_prior
from avfusion.tasks import task_class
from avfusion.tasks.recognition import mixed, smoothed
from avfusion.training.export import released_moments
from avfusion.training.optim import adamw, lars, layer_decay_groups, set_rate

RECIPE = json.loads((GOLDEN / "recipe.json").read_text())
with safe_open(GOLDEN / "recipe.safetensors", "pt") as file:
    TENSORS = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    SIZES = json.loads(file.metadata()["steps"])


def tensor(name):
    x = TENSORS[name]
    return x.double() if x.is_floating_point() else x


def pretraining():
    """The masked auto-encoder of the ten steps, with its weights."""
    fusion, image, audio = SIZES["fusion_tkns"]
    config = EncoderConfig(
        **{name: SIZES[name] for name in ("dim", "depth", "num_heads", "image_size", "audio_size")},
        fusion_tokens=fusion, image_agg_tokens=image, audio_agg_tokens=audio,
    )  # fmt: skip
    rest = {name: value for name, value in SIZES.items() if name.startswith(("decoder", "image_mask", "audio_mask"))}
    model = AVMAE(DeepAVFusion(config), **rest).double()
    prefix = "steps.param."
    model.load_state_dict({key.removeprefix(prefix): tensor(key) for key in TENSORS if key.startswith(prefix)})
    return model


def names_of(model, groups):
    """Names of parameters by group, in order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_learning_rates(kind):
    facts = RECIPE[f"schedule_{kind}"]
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "pretrained": started} for started in (False, True)]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    for epoch, *expected in facts.get("rows_epoch_lr_pretrained") or facts["rows_epoch_lr"]:
        set_rate(optimizer, facts["lr"], epoch, facts["epochs"], facts["warmup_epochs"])
        found = [group["lr"] for group in optimizer.param_groups][: len(expected)]
        assert found == pytest.approx(expected, rel=1e-12)


def test_groups_of_finetuning():
    model = Classifier(pretraining().encoder, 5, freeze_encoder=False)
    groups = layer_decay_groups(model, decay=0.75, weight_decay=0.05)
    found = {name: [group["lr_scale"], group["weight_decay"]]
             for group, names in zip(groups, names_of(model, groups), strict=True) for name in names}  # fmt: skip
    assert found == RECIPE["groups_finetune"]


def test_groups_of_pretraining():
    model = pretraining()
    groups = adamw(model, weight_decay=0.05, betas=(0.9, 0.95), pretrained=["encoder.image.", "encoder.audio."])
    groups = groups.param_groups
    found = {name: [group["weight_decay"], group["pretrained"]]
             for group, names in zip(groups, names_of(model, groups), strict=True) for name in names}  # fmt: skip
    assert found == RECIPE["groups_pretrain"]


def test_moments_are_exported_in_the_releases_groups_and_order():
    model, started = pretraining(), ["encoder.image.", "encoder.audio."]
    optimizer = adamw(model, weight_decay=0.05, betas=(0.9, 0.95), pretrained=started)
    groups = [group | {"params": names} for group, names in
              zip(optimizer.param_groups, names_of(model, optimizer.param_groups), strict=True)]  # fmt: skip
    moments = {"param_groups": groups, "state": {name: name for group in groups for name in group["params"]}}
    found = released_moments(moments, dict(model.named_parameters()), started)
    assert [group["params"] for group in found["param_groups"]][1][0] == len(found["param_groups"][0]["params"])
    order = {
        found["state"][number]: [group["weight_decay"], group["pretrained"]]
        for group in found["param_groups"]
        for number in group["params"]
    }
    assert list(order.items()) == list(RECIPE["groups_pretrain"].items())


def test_ten_steps_of_pretraining():
    facts, model = RECIPE["steps"], pretraining()
    optimizer = adamw(model, weight_decay=facts["weight_decay"], betas=facts["betas"], pretrained=facts["pretrained"])
    inputs = [tensor(f"steps.{name}") for name in ("image", "audio", "image_noise", "audio_noise")]
    for step, expected in enumerate(facts["losses_image_audio"]):
        set_rate(optimizer, facts["lr"], step / 2, facts["epochs"], facts["warmup_epochs"])
        losses = model(*inputs, predict=False)[:2]
        assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-12)
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()


def test_batches_are_mixed_by_a_share_of_each_clip():
    share = torch.tensor(RECIPE["mixup_lambda_per_element"], dtype=torch.float64)
    for name in ("image", "audio"):
        torch.testing.assert_close(
            mixed(tensor(f"mixup.{name}"), share), tensor(f"mixup.out_{name}"), rtol=0, atol=1e-6
        )
    target = smoothed(F.one_hot(tensor("mixup.label"), 5).double(), 0.1)
    torch.testing.assert_close(mixed(target, share), tensor("mixup.target"), rtol=0, atol=1e-6)
    share = torch.tensor(RECIPE["mixup_multi_lambda"], dtype=torch.float64)
    found = mixed(smoothed(tensor("mixup_multi.labels"), 0.1), share)
    torch.testing.assert_close(found, tensor("mixup_multi.target"), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "target"), [("single", "mixup.target"), ("multi", "mixup_multi.target")])
def test_losses_of_finetuning(kind, target):
    """One of the five classes is never shown."""
    share = tensor("loss.class_share")
    assert (share > 0).sum() == 4
    logits = tensor("loss.logits").requires_grad_()
    found = class_loss(logits, tensor(target), share, single=kind == "single")
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient.isfinite().all()
    assert gradient[:, share == 0].norm() == 0
    assert found.item() == pytest.approx(RECIPE[f"loss_{kind}"], rel=1e-12)
    assert log_prior(share)[-1].item() == pytest.approx(torch.tensor(1e-3 / 1.001).log().item(), abs=1e-6)


def test_five_steps_of_lars():
    head = torch.nn.Linear(48, 5).double()
    head.weight.data.copy_(tensor("lars.w0"))
    head.bias.data.zero_()
    optimizer = lars(head)
    for _ in range(5):
        set_rate(optimizer, 0.3, 0, 1, 0)
        optimizer.zero_grad()
        F.cross_entropy(head(tensor("lars.x")), tensor("mixup.label")).backward()
        optimizer.step()
    torch.testing.assert_close(head.weight.data, tensor("lars.w5"), rtol=0, atol=1e-14)
    torch.testing.assert_close(head.bias.data, tensor("lars.b5"), rtol=0, atol=1e-14)


def test_nearest_neighbours():
    features = {name: F.normalize(tensor(f"nn.{name}"), dim=-1) for name in ("image", "audio", "fusion")}
    features["all"] = torch.cat(list(features.values()), dim=1)  # the sum of the three cosines
    found = {name: leave_one_out_accuracy(x, tensor("nn.label")) for name, x in features.items()}
    assert found == pytest.approx(RECIPE["nn_accuracy"])


def test_a_mask_filters_a_mixture():
    """As released; ours, which divides by the filters' weights, leaves no bin of the spectrum out."""
    mask, mixture, mel = TENSORS["separate.mask_logits"].sigmoid(), TENSORS["separate.mixture"], LogMel()
    found = apply_mask(mixture, mask, mel, released=True)
    torch.testing.assert_close(found, TENSORS["separate.waveform"], rtol=0, atol=1e-6)
    assert (apply_mask(mixture, mask, mel) - found).norm() > 0.05 * found.norm()


COMMANDS = {"pretrain vggsound": ("pretrain", "paper-vggsound"), "pretrain audioset": ("pretrain", "paper-audioset"),
            "probe vggsound": ("probe", "paper"), "probe audioset-bal": ("probe", "paper-audioset"),
            "finetune vggsound": ("finetune", "paper"), "finetune audioset-bal": ("finetune", "paper-audioset"),
            "separate vggsound-music": ("separate", "paper"), "segment s4": ("segment", "paper-s4")}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_presets_are_the_published_commands(command):
    name, preset = COMMANDS[command]
    task = task_class(name)
    config = task.settings.of(**{"data": "x"} | ({} if name == "pretrain" else {"from_scratch": True})
                              | task.presets[preset])  # fmt: skip
    expected, found = dict(RECIPE["released_settings"][command]), config.flat()
    assert found["batch_size"] == expected.pop("batch")
    if name == "separate":
        assert found["weighted_loss"] is expected.pop("weighted_loss")
        assert (found["mask"] == "binary") is expected.pop("binary_mask")
    for setting, value in expected.items():
        assert found[setting] == value, setting
    betas = RECIPE["adamw_betas"]["pretrain" if name == "pretrain" else "finetune, segmentation, separation"]
    assert name == "probe" or list(found["betas"]) == betas
