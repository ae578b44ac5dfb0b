"""Segmentation metrics: against the definitions written out pixel by pixel, and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import fbeta_score, jaccard_score

from avfusion.metrics import segmentation
from avfusion.metrics.segmentation import BinarySegmentation, SemanticSegmentation, class_scores, f_curve

BETA = math.sqrt(0.3)


def frames(rng, batch):
    """Small frames with many kinds of degeneracy: empty and full truths, ties, sure and constant probabilities."""
    height, width = rng.integers(1, 6, 2)
    probability = rng.random((batch, height, width))
    probability = np.where(rng.random((batch, 1, 1)) < 0.3, probability.round(1), probability)
    probability = np.where(rng.random((batch, 1, 1)) < 0.2, probability.round(), probability)
    truth = (rng.random((batch, height, width)) < rng.choice([0, 0.1, 0.5, 0.9, 1], (batch, 1, 1))).astype(int)
    return torch.from_numpy(probability), torch.from_numpy(truth)


def benchmark_frame(probability, truth):
    marked = probability > 0.5
    if not truth.any():
        return (~marked).mean()
    return (marked & truth).sum() / (marked | truth).sum()


def curve(probability, truth, thresholds):
    out = []
    for t in np.linspace(0, 1 - 1e-10, thresholds):
        marked = probability >= t
        out.append(fbeta_score(truth.ravel(), marked.ravel(), beta=BETA, zero_division=0))
    return np.array(out)


def test_the_f_curve_is_scikit_learns_at_every_threshold():
    rng = np.random.default_rng(0)
    for _ in range(60):
        probability, truth = frames(rng, 1)
        if truth.any():
            got = f_curve(probability.flatten(1), truth.double().flatten(1), 17)[0]
            assert got.numpy() == pytest.approx(curve(probability.numpy(), truth.numpy().astype(bool), 17), abs=1e-8)


def test_binary_scores_on_three_hundred_frames():
    rng, metric, iou, ious, curves, best = np.random.default_rng(1), BinarySegmentation(), [], [], [], []
    by_video = []
    for video in range(60):
        probability, truth = frames(rng, 5)
        before = len(curves)
        cut = rng.integers(1, 5)  # a video may come in several batches
        names = [f"{video}"] * 5
        parts = [metric.update(probability[a:b], truth[a:b], names[a:b]) for a, b in ((0, cut), (cut, 5))]
        got = torch.cat(parts)
        for p, t, value in zip(probability.numpy(), truth.numpy().astype(bool), got, strict=True):
            iou.append(benchmark_frame(p, t))
            assert value.item() == pytest.approx(iou[-1], abs=1e-6)
            if t.any():
                marked = p > 0.5
                ious.append([_iou(~marked, ~t), _iou(marked, t)])
                for kept, number in ((curves, 255), (best, 256)):
                    at = np.linspace(0, 1 - 1e-10, number)[:, None]
                    reached, flat = p.ravel()[None] >= at, t.ravel()
                    right, marks = (reached & flat).sum(1), reached.sum(1)
                    f = 1.3 * right / np.maximum(0.3 * flat.sum() + marks, 1e-12)
                    kept.append(f if number == 255 else f.max())
        by_video.append(np.mean(curves[before:], 0).max() if len(curves) > before else 0.0)
    assert 0 in by_video  # all of its frames are silent
    expected = {"mIoU (benchmark)": np.mean(iou), "F (benchmark)": np.mean(by_video),
                "mIoU (release)": np.nanmean(np.nanmean(ious, 0)), "F (release)": np.mean(best),
                "F (ours)": np.mean(curves, 0).max()}  # fmt: skip
    assert metric.compute() == pytest.approx(expected, abs=1e-6)


def _iou(a, b):
    return (a & b).sum() / (a | b).sum() if (a | b).any() else np.nan


def test_semantic_scores_on_three_hundred_frames_are_scikit_learns():
    rng, classes, never = np.random.default_rng(2), 6, 1
    metric, per_frame = SemanticSegmentation(classes + never), []
    for _ in range(60):
        height, width = rng.integers(1, 5, 2)
        logits = rng.standard_normal((5, classes, height, width))
        truth = rng.integers(0, rng.integers(1, classes + 1), (5, height, width))
        unseen = np.full((5, never, height, width), -9.0)
        got = metric.update(torch.from_numpy(np.concatenate((logits, unseen), 1)), torch.from_numpy(truth))
        for line, t, value in zip(logits.argmax(1), truth, got, strict=True):
            present = np.union1d(line, t)
            iou, f = np.full(classes, np.nan), np.full(classes, np.nan)
            iou[present] = jaccard_score(t.ravel(), line.ravel(), labels=present, average=None, zero_division=0)
            f[present] = fbeta_score(t.ravel(), line.ravel(), beta=BETA, labels=present, average=None, zero_division=0)
            per_frame.append((t.any(), iou, f))
            assert value.item() == pytest.approx(np.nanmean(iou))
    found = metric.compute()
    for name, column in (("mIoU", 1), ("F", 2)):  # a class that is never there counts 0, and is the last
        mean = np.nanmean([x[column] for x in per_frame], axis=0)
        assert found[f"{name} (benchmark)"] == pytest.approx(mean.sum() / 7, abs=1e-8)
        assert found[f"{name} without background (benchmark)"] == pytest.approx(mean.mean(), abs=1e-8)
    for definition, kept in (("ours", per_frame), ("release", [x for x in per_frame if x[0]])):
        for name, column in (("mIoU", 1), ("F", 2)):
            mean = np.nanmean([x[column] for x in kept], axis=0)
            assert found[f"{name} ({definition})"] == pytest.approx(mean.mean(), abs=1e-8)
            assert found[f"{name} without background ({definition})"] == pytest.approx(mean[1:].mean(), abs=1e-8)


def test_one_class_and_empty_frames():
    metric = BinarySegmentation()
    metric.update(torch.zeros(2, 3, 3), torch.zeros(2, 3, 3), ["a", "a"])
    found = metric.compute()
    assert found["mIoU (benchmark)"] == pytest.approx(1)
    assert found["F (benchmark)"] == 0  # as the benchmark's code has it
    assert all(math.isnan(found[name]) for name in ("F (ours)", "mIoU (release)", "F (release)"))
    metric.update(torch.ones(1, 3, 3), torch.ones(1, 3, 3), ["a"])
    assert metric.compute() == pytest.approx(dict.fromkeys(found, 1.0))

    semantic = SemanticSegmentation(3)
    semantic.update(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2))  # a tie goes to the first class
    found = semantic.compute()
    assert found["mIoU (ours)"] == 1
    assert found["mIoU (benchmark)"] == pytest.approx(1 / 3)
    assert math.isnan(found["mIoU (release)"])
    iou, f = class_scores(torch.tensor([[1, 1]]), torch.tensor([[0, 0]]), 3)
    assert iou[0, :2].tolist() == [0, 0]
    assert f[0, :2].tolist() == [0, 0]
    assert iou[0, 2].isnan()


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"got \[1, 2, 2\] and \[1, 2, 3\]"):
        BinarySegmentation().update(torch.zeros(1, 2, 2), torch.zeros(1, 2, 3), ["a"])
    with pytest.raises(ValueError, match="probabilities in"):
        BinarySegmentation().update(torch.full((1, 2, 2), 1.5), torch.zeros(1, 2, 2), ["a"])
    with pytest.raises(ValueError, match="classes 0 to 2, got 0 to 3"):
        SemanticSegmentation(3).update(torch.zeros(1, 3, 1, 2), torch.tensor([[[0, 3]]]))
    with pytest.raises(ValueError, match=r"logits \[B, 3, H, W\]"):
        SemanticSegmentation(3).update(torch.zeros(1, 2, 1, 2), torch.zeros(1, 1, 2))


def test_what_several_processes_gathered_is_joined(monkeypatch):
    rng = np.random.default_rng(3)
    whole, parts = BinarySegmentation(), [BinarySegmentation(), BinarySegmentation()]
    for part, video in ((0, "a"), (1, "b"), (1, "a")):
        probability, truth = (torch.from_numpy(x) for x in (rng.random((2, 4, 4)), rng.integers(0, 2, (2, 4, 4))))
        whole.update(probability, truth, [video] * 2)
        parts[part].update(probability, truth, [video] * 2)
    states = [{name: getattr(part, name) for name in part.gathered} for part in parts]
    monkeypatch.setattr(segmentation.distributed, "gather", lambda own: states)
    assert parts[0].of_all_processes().compute() == pytest.approx(whole.compute(), abs=1e-12, nan_ok=True)
    assert len(parts[0].iou) == 1  # itself unchanged
