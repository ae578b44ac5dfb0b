"""cIoU and AUC against the definitions in plain NumPy, and what the maps without weights show."""

import numpy as np
import pytest
import torch
from sklearn.metrics import auc

from avfusion import DeepAVFusion, EncoderConfig
from avfusion.metrics.localization import (
    SIZE,
    consensus_iou,
    consensus_map,
    localization_scores,
    negative_audio_scores,
    universal_threshold,
)
from avfusion.models.heads.localization import attention_map, center_prior, similarity_map

SMALL = EncoderConfig(
    dim=32, depth=3, num_heads=2, image_size=(64, 48), audio_size=(32, 48),
    fusion_tokens=4, image_agg_tokens=2, audio_agg_tokens=3,
)  # fmt: skip


def random_boxes(rng, count):
    """Corners in 256ths, as people drew them; some boxes are empty."""
    corners = np.sort(rng.integers(0, 257, (count, 2, 2)), axis=1) / 256
    return [tuple(map(float, box.flatten())) for box in corners]


def consensus_by_votes(boxes, consensus):
    """Pixel by pixel in a box if floor(224 x0) <= x < floor(224 x1)."""
    pixel, votes = np.arange(SIZE), np.zeros((SIZE, SIZE))
    for x0, y0, x1, y1 in boxes:
        inside = [(pixel >= np.floor(SIZE * a)) & (pixel < np.floor(SIZE * b)) for a, b in ((y0, y1), (x0, x1))]
        votes += np.outer(*inside)
    return np.minimum(votes / consensus, 1)


def consensus_iou_by_sorting(pred, g):
    """As published: the half of the pixels from the upper median on is marked."""
    marked = (pred >= np.sort(pred.flatten())[pred.size // 2]).astype(float)
    return (marked * g).sum() / (g.sum() + (marked * (g == 0)).sum())


def test_consensus_iou_is_its_definition():
    rng = np.random.default_rng(0)
    empty = 0
    for _ in range(50):
        maps = rng.permuted(np.tile(np.arange(SIZE**2, dtype=np.float32), (20, 1)), axis=1).reshape(20, SIZE, SIZE)
        maps[::2] = np.sort(maps[::2], axis=rng.integers(1, 3))  # half of them have large regions
        consensus = int(rng.integers(1, 3))
        boxes = [random_boxes(rng, rng.integers(1, 4)) for _ in maps]
        truth = [consensus_by_votes(b, consensus) for b in boxes]
        found = torch.stack([consensus_map(b, consensus) for b in boxes])
        assert np.array_equal(found, truth)
        scores = consensus_iou(torch.tensor(maps), found)
        assert scores.dtype == torch.float64
        assert scores.tolist() == pytest.approx(
            [consensus_iou_by_sorting(m, g) for m, g in zip(maps, truth, strict=True)], abs=1e-12
        )
        empty += sum(g.max() == 0 for g in truth)
    assert empty  # an empty box is in some of them


def test_consensus_of_annotators():
    half, top = (0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 1.0, 0.5)
    three = consensus_map([half, top, top])
    assert [three[0, 0], three[0, -1], three[-1, 0], three[-1, -1]] == [1, 1, 0.5, 0]
    assert consensus_map([half])[-1, 0] == 0.5  # EZ-VSL: who annotates alone counts half
    assert consensus_map([half, top])[-1, 0] == 0.5
    union = consensus_map([half, top], consensus=1)
    assert [union[0, 0], union[0, -1], union[-1, 0], union[-1, -1]] == [1, 1, 1, 0]
    assert consensus_map([(0.26875, 1.0, 0.753125, 1.0)]).sum() == 0  # VGG-SS has such boxes
    assert consensus_map([(0.0, 0.0, 1.0, 1.0)], consensus=1).sum() == SIZE**2


def test_consensus_iou_by_hand():
    left = torch.linspace(1, 0, SIZE).expand(1, SIZE, SIZE)  # marks the left half
    for box, expected in (
        ((0, 0, 0.5, 1), 1.0),
        ((0.5, 0, 1, 1), 0.0),
        ((0, 0, 0.5, 0.5), 0.5),  # 1/4 of the picture, all found; 1/4 too much
        ((0, 0, 1, 1), 0.5),  # half of the picture found
        ((0.25, 0, 0.75, 1), 1 / 3),
        ((0.1, 0.2, 0.1, 0.2), 0.0),  # nothing to find
    ):
        assert consensus_iou(left, consensus_map([box], consensus=1)[None]).item() == pytest.approx(expected, abs=1e-12)
    for constant in (0.0, 0.1, -3e7, 1 / 196):
        for shape in ((1, 14, 14), (1, 7, 5), (1, 300, 300), (1, 1, 1)):
            assert consensus_iou(torch.full(shape, constant), torch.ones(1, SIZE, SIZE)).item() == 0.0
    assert consensus_iou(torch.zeros(1, 2, 2), torch.zeros(1, SIZE, SIZE)).item() == 0.0  # 0 / 0


def resized(x, size):
    """Bilinear, corners to corners: pixel i of n is at i / (n - 1)."""

    def weights(n):
        at = np.arange(size) * (n - 1) / (size - 1)
        return np.maximum(1 - np.abs(at[:, None] - np.arange(n)), 0)

    return weights(x.shape[0]) @ x @ weights(x.shape[1]).T


@pytest.mark.parametrize("shape", [(14, 14), (4, 3), (7, 20), (224, 224), (300, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_of_any_size_and_scale(shape, dtype):
    rng = np.random.default_rng(0)
    for _ in range(5):
        low = torch.tensor(rng.standard_normal(shape)).to(dtype)
        g = consensus_map(random_boxes(rng, 3))
        x, g_ = resized(low.double().numpy(), SIZE), g.numpy()
        median = np.sort(x.flatten())[(SIZE**2 - 1) // 2]
        marked, close = x > median + 1e-9, (abs(x - median) < 1e-9).sum()  # what is close may round to either side
        area = g_.sum() + (marked & (g_ == 0)).sum()
        assert close < 100
        for scale in (1, 4):
            found = consensus_iou(scale * low[None], g[None]).item()
            assert found == pytest.approx((marked * g_).sum() / area, abs=close / area)


def test_localization_scores_are_the_published_ones():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        ciou = rng.random(rng.integers(1, 20)) if rng.random() < 0.5 else rng.integers(0, 33, 10) / 32
        thresholds = [0.05 * i for i in range(21)]
        share = [np.mean(ciou >= t) for t in thresholds]
        found = localization_scores(torch.tensor(ciou))
        assert found["AUC"] == pytest.approx(auc(thresholds, share), abs=1e-12)
        assert found["cIoU@0.5"] == pytest.approx(np.mean(ciou >= 0.5), abs=1e-12)
    assert localization_scores(torch.tensor([1.0, 1.0])) == {"cIoU@0.5": 1.0, "AUC": pytest.approx(1.0)}
    assert localization_scores(torch.tensor([0.0])) == {"cIoU@0.5": 0.0, "AUC": pytest.approx(0.025)}
    assert localization_scores(torch.tensor([0.5]))["cIoU@0.5"] == 1.0


def test_metric_errors():
    truth = torch.ones(1, SIZE, SIZE)
    for maps in (torch.ones(2, 4, 4), torch.ones(4, 4), torch.ones(1, 0, 4)):
        with pytest.raises(ValueError, match=r"maps must be \[B, H, W\]"):
            consensus_iou(maps, truth)
    with pytest.raises(ValueError, match="not finite"):
        consensus_iou(torch.full((1, 2, 2), torch.nan), truth)
    with pytest.raises(ValueError, match="no boxes"):
        consensus_map([])
    for box in ((0, 0, 100, 100), (-0.1, 0, 1, 1), (0, 0, float("nan"), 1)):
        with pytest.raises(ValueError, match="not in fractions of the picture"):
            consensus_map([box])
    for values in (torch.zeros(0), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="N at least 1"):
            localization_scores(values)


def test_center_prior_marks_a_disc_of_half_the_picture():
    prior = center_prior()
    assert prior.shape == (SIZE, SIZE)
    assert all(torch.equal(prior, other) for other in (prior.flip(0), prior.flip(1), prior.T))
    marked = prior > prior.median()
    assert marked.double().mean().item() == pytest.approx(0.5, abs=1e-3)
    y, x = np.nonzero(marked.numpy())
    radius = SIZE * (0.5 / np.pi) ** 0.5
    assert np.hypot(y - (SIZE - 1) / 2, x - (SIZE - 1) / 2).max() == pytest.approx(radius, abs=1)
    assert center_prior((3, 5)).argmax() == 7


def build(**changes):
    torch.manual_seed(0)
    config = EncoderConfig(**{**vars(SMALL), **changes})
    return DeepAVFusion(config).eval(), torch.randn(2, 3, 64, 48), torch.randn(2, 1, 32, 48)


@pytest.mark.parametrize("fusion", ["factorized", "dense", "token"])
def test_attention_map_is_the_mean_marginal_over_image_patches(fusion):
    encoder, image, audio = build(fusion=fusion)
    maps = encoder.attention_maps(image, audio)
    for layers, chosen in ((None, (0, 1, 2)), ([1], (1,)), ((0, 2), (0, 2))):
        found = attention_map(encoder, image, audio, layers)
        assert found.shape == (2, 4, 3)
        for b in range(2):
            heads = [head for layer in chosen for head in maps[layer][1][b]]  # beta is over 12 image patches
            tokens = [token for head in heads for token in head]
            torch.testing.assert_close(found[b], torch.stack(tokens).mean(0).reshape(4, 3))
        if fusion != "token":
            torch.testing.assert_close(found.sum((1, 2)), torch.ones(2))


def test_attention_map_finds_the_patch_that_the_fusion_tokens_look_at():
    encoder, image, audio = build(fusion="token", depth=1)
    block = encoder.fusion_blocks["0"]
    with torch.no_grad():  # one key is along every query, those of all other patches are 0
        block.attn.kv.bias.zero_(), block.attn.q.weight.zero_(), block.attn.q.bias.fill_(5.0)
        block.attn.kv.weight[:8] = 1.0
    block.norm1_aud = torch.nn.Identity()  # of the visual tokens, in this kind of block
    for row, column in ((0, 0), (1, 2), (3, 1)):
        encoder.image.embed = lambda x, keep, at=row * 3 + column: torch.eye(12)[at, :, None].expand(2, -1, 32) * 10
        found = attention_map(encoder, image, audio)
        assert found.flatten(1).argmax(1).tolist() == [row * 3 + column] * 2
        assert found[0, row, column] > 0.9


def test_attention_map_errors():
    encoder, image, audio = build(fusion_layers="0-2")
    with pytest.raises(ValueError, match=r"expected some of \[0, 2\]"):
        attention_map(encoder, image, audio, [1])
    with pytest.raises(ValueError, match="expected some of"):
        attention_map(encoder, image, audio, [])
    encoder, image, audio = build(fusion="none")
    with pytest.raises(ValueError, match=r"layers = \[\]"):
        attention_map(encoder, image, audio)


def test_similarity_map_is_the_cosine_with_the_mean_sound():
    encoder, image, audio = build()
    x_image, x_audio, _ = encoder(image, audio)
    found = similarity_map(encoder, image, audio)
    assert found.shape == (2, 4, 3)
    assert not found.requires_grad
    for b in range(2):
        sound = x_audio[b].mean(0)
        for patch, x in enumerate(x_image[b]):
            expected = (x @ sound) / (x.norm() * sound.norm())
            assert found[b, patch // 3, patch % 3].item() == pytest.approx(expected.item(), abs=1e-5)


def test_similarity_map_lies_as_the_picture_does(monkeypatch):
    encoder, image, audio = build()
    monkeypatch.setattr("avfkernels.early_fusion", lambda *given, **_: (*given[3:], []))  # patches do not mix
    before = similarity_map(encoder, image, audio)
    image[:, :, 16:32, 32:48] += 1  # row 1, column 2
    changed = (similarity_map(encoder, image, audio) != before).nonzero().tolist()
    assert changed == [[0, 1, 2], [1, 1, 2]]


def test_negative_audio_by_hand():
    """Five pictures with their own sounds, four with others', of which one map marks half its picture."""
    positive = torch.tensor([0.9, 0.8, 0.7, 0.7, 0.2])[:, None, None] * torch.tensor([[1.0, 0.1], [0.1, 0.1]])
    negative = torch.tensor([0.6, 0.3, 0.1, 0.75])[:, None, None] * torch.tensor([[1.0, 0.99], [0.1, 0.1]])
    threshold = universal_threshold(positive, negative)
    assert threshold == pytest.approx(0.7)  # four of five reach it, and one of four
    found = negative_audio_scores(positive, negative, threshold)
    assert found == {"AUC negative": pytest.approx(15 / 20), "false alarms": 0.25, "false area": 2 / 16, "hits": 0.8}


def test_a_map_that_ignores_the_sound_cannot_tell_negative_audio():
    maps = torch.rand(50, 6, 6, generator=torch.Generator().manual_seed(0))
    assert negative_audio_scores(maps, maps, 0.5)["AUC negative"] == 0.5


@pytest.mark.parametrize("bad", [torch.zeros(0, 4), torch.full((2, 4), torch.nan), torch.zeros(3)])
def test_negative_audio_names_bad_maps(bad):
    with pytest.raises(ValueError, match="negative: expected finite maps"):
        negative_audio_scores(torch.ones(2, 4), bad, 0.5)
