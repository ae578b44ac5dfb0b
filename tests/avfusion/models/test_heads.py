"""The separation and segmentation heads: the authors' numbers, where the golden files are; shapes and what is read."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from avfusion import DeepAVFusion, EncoderConfig
from avfusion.models.heads.segmentation import Segmenter, segmentation_loss
from avfusion.models.heads.separation import Separator, separation_loss
from avfusion.models.heads.unet import layers

GOLDEN = Path(__file__).parents[4] / "shared" / "golden"
SMALL = EncoderConfig(
    dim=32, depth=3, num_heads=2, image_size=(32, 48), audio_size=(32, 64), fusion_tokens=4, image_agg_tokens=2,
    audio_agg_tokens=3,
)  # fmt: skip


def golden(name):
    path = GOLDEN / f"head_{name}.safetensors"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    with safe_open(path, "pt") as file:
        facts, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    tokens, image_agg, audio_agg = json.loads(facts["fusion_tkns"])
    config = EncoderConfig(
        dim=int(facts["dim"]), depth=int(facts["depth"]), num_heads=int(facts["num_heads"]),
        image_size=json.loads(facts["image_size"]), audio_size=json.loads(facts["audio_size"]),
        fusion_tokens=tokens, image_agg_tokens=image_agg, audio_agg_tokens=audio_agg,
        fusion_attn_ratio=float(facts["fusion_attn_ratio"]), fusion_mlp_ratio=float(facts["fusion_mlp_ratio"]),
    )  # fmt: skip
    weights = {key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")}
    return DeepAVFusion(config), weights, tensors


def close(actual, expected):
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def test_golden_separation():
    encoder, weights, tensors = golden("separation")
    model = Separator(encoder).double().eval()
    model.load_state_dict(weights)
    logits = model(tensors["image"], tensors["audio"])
    close(logits, tensors["logits"])
    close(separation_loss(logits, tensors["gt_masks"], tensors["audio"]), tensors["loss"])


def test_golden_segmentation():
    encoder, weights, tensors = golden("segmentation")
    model = Segmenter(encoder, tensors["logits"].shape[1]).double().eval()
    model.load_state_dict(weights)
    logits = model(tensors["image"], tensors["audio"])
    close(logits, tensors["logits"])
    close(segmentation_loss(logits, tensors["target"]), tensors["loss"])


def test_layers_are_those_of_the_paper():
    assert layers(5, 12) == [0, 2, 5, 8, 11]
    assert layers(4, 12) == [0, 3, 7, 11]
    assert layers(5, 4) == [0, 0, 1, 2, 3]


@pytest.mark.parametrize("fusion", [{}, {"fusion": "none"}, {"fusion_layers": "none"}, {"fusion_layers": "0-1"},
                                    {"fusion_layers": "late", "fusion": "dense"}])  # fmt: skip
@pytest.mark.parametrize("classes", [None, 1, 5])
def test_every_weight_that_wants_a_gradient_gets_one(classes, fusion):
    """Otherwise several processes could not train it, nor could a run resume."""
    torch.manual_seed(0)
    encoder = DeepAVFusion(replace(SMALL, **fusion))
    model = Separator(encoder) if classes is None else Segmenter(encoder, classes)
    out = model(torch.randn(2, 3, 32, 48), torch.randn(2, 1, 32, 64))
    assert out.shape == ((2, 1, 32, 64) if classes is None else (2, classes, 32, 48))
    out.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad != (p.grad is not None)] == []


def test_losses_written_out():
    g = torch.Generator().manual_seed(0)
    logits, masks, mixture = (torch.randn(2, 1, 3, 4, generator=g) for _ in range(3))
    masks, p = masks.sigmoid(), logits.sigmoid()
    cross = -(masks * p.log() + (1 - masks) * (1 - p).log())
    expected = (cross * (1 + 10**mixture).log().clamp(1e-3, 10)).mean()
    torch.testing.assert_close(separation_loss(logits, masks, mixture), expected)
    logits, truth = torch.randn(2, 3, 2, 2, generator=g), torch.randint(3, (2, 2, 2), generator=g)
    expected = -logits.log_softmax(1).gather(1, truth[:, None]).mean()
    torch.testing.assert_close(segmentation_loss(logits, truth), expected)
    binary = torch.randn(2, 1, 2, 2, generator=g)
    both = torch.cat((torch.zeros_like(binary), binary), dim=1)
    torch.testing.assert_close(segmentation_loss(binary, truth > 0), segmentation_loss(both, truth > 0))


def test_encoders_that_do_not_fit_are_refused():
    encoder = DeepAVFusion(EncoderConfig(dim=24, depth=1, num_heads=2, image_size=(32, 32), audio_size=(32, 32)))
    with pytest.raises(ValueError, match=r"patch_size = 16, dim = 24"):
        Separator(encoder)
    encoder = DeepAVFusion(EncoderConfig(dim=32, depth=1, num_heads=2, patch_size=8, image_size=(32, 32),
                                         audio_size=(32, 32)))  # fmt: skip
    with pytest.raises(ValueError, match=r"patch_size = 8"):
        Segmenter(encoder, 2)
