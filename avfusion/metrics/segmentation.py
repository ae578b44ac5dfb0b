"""Audio-visual segmentation: mIoU and F score (beta^2 = 0.3), by three definitions in use.

Published numbers mix them, so results carry the definition in their name. Of what sounds (binary):

    benchmark   AVSBench's code. IoU of the foreground, a frame; F from curves over 255 thresholds, averaged over the
                frames of a video, then their best, then averaged over videos
    release     DeepAVFusion's. IoU of background and foreground, each averaged over frames, then both; F by the best of
                256 thresholds, a frame, then averaged. Frames that have no foreground are left out
    ours        F from curves over 255 thresholds, averaged over all frames that have foreground, then their best: one
                threshold for all

Of classes (semantic), IoU and F of each class are averaged over the frames where it is in the truth or predicted, and
then over classes:

    benchmark   over all classes, those that are never there count 0; "without background" leaves out the last class
    release     over the classes that are there, without frames that have no foreground
    ours        over the classes that are there

    F = (1 + beta^2) P R / (beta^2 P + R), with precision P and recall R of pixels

Source: Zhou et al., ECCV 2022, https://arxiv.org/abs/2207.05042, and the evaluation code of both.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from avfusion import distributed

BETA2 = 0.3
EPS = 1e-10


class _Frames:
    """What is gathered of frames: lists under the names in `gathered`."""

    gathered: tuple[str, ...]

    def __init__(self):
        for name in self.gathered:
            setattr(self, name, [])

    def of_all_processes(self) -> "_Frames":
        """The same metric with what every process has gathered; all of them have to call it."""
        everything = copy.copy(self)
        parts = distributed.gather([{name: getattr(self, name) for name in self.gathered}])
        for name in self.gathered:
            setattr(everything, name, [x for part in parts for x in part[name]])
        return everything


class BinarySegmentation(_Frames):
    """Gathers frames, probabilities [B, H, W] in [0, 1] and truth [B, H, W], 0 or 1, by `update`; `compute` ends it.

    Raises ValueError for shapes that do not fit and values out of range.
    """

    gathered = "iou", "curves", "classes", "best", "videos"

    def update(self, probability: Tensor, truth: Tensor, videos: Sequence[str]) -> Tensor:
        """`videos` says which one each frame is of. Returns the benchmark's IoU of each frame, [B]."""
        if probability.ndim != 3 or probability.shape != truth.shape:
            raise ValueError(f"BinarySegmentation: expected probabilities and truth [B, H, W], got "
                             f"{list(probability.shape)} and {list(truth.shape)}")  # fmt: skip
        if not ((truth == 0) | (truth == 1)).all() or not ((probability >= 0) & (probability <= 1)).all():
            raise ValueError("BinarySegmentation: truth must be 0 or 1, and probabilities in [0, 1]")
        probability, truth = probability.double().flatten(1).cpu(), truth.double().flatten(1).cpu()
        marked, sounds = (probability > 0.5).double(), truth.sum(1) > 0
        iou = benchmark_iou(marked, truth)
        self.iou.append(iou)
        self.curves.append(f_curve(probability, truth, 255).where(sounds[:, None], torch.nan))
        self.videos += videos
        self.classes.append(class_scores(marked[sounds].long(), truth[sounds].long(), 2)[0])
        self.best.append(f_curve(probability[sounds], truth[sounds], 256).amax(1))
        return iou

    def compute(self) -> dict[str, float]:
        """By name and definition; what leaves out every frame is NaN."""
        curves, classes = torch.cat(self.curves), torch.cat(self.classes)
        frames: dict[str, list[int]] = {}
        for frame, video in enumerate(self.videos):
            frames.setdefault(video, []).append(frame)
        # Of a video without foreground the benchmark's code makes 0.
        best = [curves[rows].nanmean(0).nan_to_num(0).max() for rows in frames.values()]
        return {
            "mIoU (benchmark)": torch.cat(self.iou).mean().item(),
            "F (benchmark)": torch.stack(best).mean().item(),
            "mIoU (release)": classes.nanmean(0).nanmean().item(),
            "F (release)": torch.cat(self.best).mean().item(),
            "F (ours)": curves.nanmean(0).max().item(),
        }


class SemanticSegmentation(_Frames):
    """Gathers frames, logits [B, C, H, W] and truth [B, H, W] in 0 ... C - 1, 0 the background; as above.

    Raises ValueError for shapes that do not fit and for a truth that is no class.
    """

    gathered = "iou", "f", "sounds"

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes

    def update(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Returns the mean IoU of each frame over its classes, [B]."""
        if logits.ndim != 4 or logits.shape[1] != self.num_classes or logits[:, 0].shape != truth.shape:
            raise ValueError(f"SemanticSegmentation: expected logits [B, {self.num_classes}, H, W] and truth [B, H, W]"
                             f", got {list(logits.shape)} and {list(truth.shape)}")  # fmt: skip
        if truth.min() < 0 or truth.max() >= self.num_classes:
            raise ValueError(f"SemanticSegmentation: truth must be classes 0 to {self.num_classes - 1}, got "
                             f"{truth.min().item()} to {truth.max().item()}")  # fmt: skip
        truth = truth.long().flatten(1).cpu()
        iou, f = class_scores(logits.argmax(1).flatten(1).cpu(), truth, self.num_classes)
        self.iou.append(iou)
        self.f.append(f)
        self.sounds.append((truth > 0).any(1))
        return iou.nanmean(1)

    def compute(self) -> dict[str, float]:
        """By name and definition, with and without the background; what leaves out every frame is NaN."""
        iou, f, sounds = torch.cat(self.iou), torch.cat(self.f), torch.cat(self.sounds)
        found = {}
        for name, values in (("mIoU", iou), ("F", f)):
            classes, sounding = values.nanmean(0), values[sounds].nanmean(0)
            for definition, whole, without in (
                ("benchmark", classes.nan_to_num(0), classes.nan_to_num(0)[:-1]),
                ("release", sounding, sounding[1:]),
                ("ours", classes, classes[1:]),
            ):
                found[f"{name} ({definition})"] = whole.nanmean().item()
                found[f"{name} without background ({definition})"] = without.nanmean().item()
        return found


def benchmark_iou(marked: Tensor, truth: Tensor) -> Tensor:
    """IoU of the foreground, [B, pixels] twice -> [B].

    A frame that has none counts by the share of pixels that are rightly not marked: the benchmark's rule.
    """
    both, either = (marked * truth).sum(1), (marked + truth).clamp(max=1).sum(1)
    empty = truth.sum(1) == 0
    both = torch.where(empty, ((1 - marked) * (1 - truth)).sum(1), both)
    return both / (torch.where(empty, float(truth.shape[1]), either) + 1e-7)


def f_curve(probability: Tensor, truth: Tensor, thresholds: int) -> Tensor:
    """F of each frame over evenly spaced thresholds from 0 to 1 - 1e-10: [B, pixels] twice -> [B, thresholds].

    A pixel is marked where its probability is at least the threshold.
    """
    at = torch.linspace(0, 1 - EPS, thresholds, dtype=torch.float64)
    reached = torch.bucketize(probability.contiguous(), at, right=True)  # so many thresholds
    right, marked = (
        torch.zeros(len(truth), thresholds + 1, dtype=torch.float64).scatter_add_(1, reached, weight)[:, 1:]
        .flip(1).cumsum(1).flip(1)
        for weight in (truth, torch.ones_like(truth))
    )  # fmt: skip
    return _f(right, marked, truth.sum(1, keepdim=True))


def class_scores(predicted: Tensor, truth: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """IoU and F of each class in each frame: int64 [B, pixels] twice -> [B, C] twice.

    NaN where a class is neither in the truth nor predicted.
    """
    cells = (truth * num_classes + predicted) + torch.arange(len(truth))[:, None] * num_classes**2
    counts = cells.flatten().bincount(minlength=len(truth) * num_classes**2).view(-1, num_classes, num_classes).double()
    right, in_truth, marked = counts.diagonal(dim1=1, dim2=2), counts.sum(2), counts.sum(1)
    either = in_truth + marked - right
    absent = torch.where(either > 0, 0.0, torch.nan)
    return right / either.clamp(min=1) + absent, _f(right, marked, in_truth) + absent


def _f(right: Tensor, marked: Tensor, in_truth: Tensor) -> Tensor:
    precision, recall = right / (marked + EPS), right / (in_truth + EPS)
    return (1 + BETA2) * precision * recall / (BETA2 * precision + recall + EPS)
