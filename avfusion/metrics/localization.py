"""Sound source localisation: consensus IoU (cIoU) and AUC, as on Flickr-SoundNet and VGG-SS.

Source: Senocak et al., CVPR 2018, https://arxiv.org/abs/1803.03849, as the evaluation code of LVS
(https://github.com/hche11/Localizing-Visual-Sounds-the-Hard-Way) and EZ-VSL (https://github.com/stoneMo/EZ-VSL)
computes it. Both count `>=` at every threshold of cIoU, and so does this file. Where a map has no ties at its median,
all three mark the same half of the picture (LVS one pixel less); a map without contrast marks nothing, as in LVS.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

SIZE = 224  # side of the picture that everything is compared on, in pixels


def consensus_map(boxes: Sequence[Sequence[float]], consensus: int = 2) -> Tensor:
    """g = min(number of boxes over a pixel / consensus, 1): float32 [224, 224].

    Args:
        boxes: (x0, y0, x1, y1) in fractions of the width and height, as in `row.extra["boxes"]`; corners are rounded
            down to pixels, and a box may be empty.
        consensus: how many annotators have to agree for full weight: 2 of Flickr-SoundNet's three, also where only one
            has annotated (who then counts half), 1 for VGG-SS, whose boxes are one annotation: their union.

    Raises ValueError where there are no boxes (leave out clips that nobody has annotated), or one leaves the picture.
    """
    if not len(boxes):
        raise ValueError("consensus_map: no boxes; leave out clips that have no annotation")
    count = torch.zeros(SIZE, SIZE)
    for box in boxes:
        if not all(0 <= corner <= 1 for corner in box):
            raise ValueError(f"consensus_map: the box {tuple(box)} is not in fractions of the picture")
        x0, y0, x1, y1 = (int(SIZE * corner) for corner in box)
        count[y0:y1, x0:x1] += 1
    return (count / consensus).clamp(max=1)


def consensus_iou(maps: Tensor, truth: Tensor) -> Tensor:
    """Consensus IoU of predicted maps: sum(p g) / (sum(g) + sum(p [g = 0])), where p marks the pixels above the median.

    Args:
        maps: [B, H, W], any size and scale; resized to 224 x 224 bilinearly, corners to corners, as EZ-VSL does.
        truth: [B, 224, 224] by `consensus_map`.

    Returns float64 [B] in [0, 1]; 0 where neither map marks anything. The median is the lower of the middle two.

    Raises ValueError for shapes that do not fit and maps that are not finite.
    """
    if maps.ndim != 3 or not maps.numel() or truth.shape != (len(maps), SIZE, SIZE):
        raise ValueError(f"consensus_iou: maps must be [B, H, W] and truth [B, {SIZE}, {SIZE}], got "
                         f"{list(maps.shape)} and {list(truth.shape)}")  # fmt: skip
    if not maps.isfinite().all():
        raise ValueError("consensus_iou: a map is not finite")
    maps, truth = maps.double(), truth.double()
    maps = maps - maps.amin((1, 2), keepdim=True)  # so that resizing rounds nothing where a map has no contrast
    maps = F.interpolate(maps[:, None], (SIZE, SIZE), mode="bilinear", align_corners=True).flatten(1)
    marked, truth = maps > maps.median(1, keepdim=True).values, truth.flatten(1)
    area = truth.sum(1) + (marked & (truth == 0)).sum(1)
    return (marked * truth).sum(1) / area.where(area > 0, 1)


def localization_scores(ciou: Tensor) -> dict[str, float]:
    """Of cIoU [N]: "cIoU@0.5", the share that is at least 0.5, and "AUC".

    AUC is the area, by trapezoids, under the share that is at least t over the 21 thresholds t = 0, 0.05, ..., 1.

    Raises ValueError where there is no clip.
    """
    if ciou.ndim != 1 or not len(ciou):
        raise ValueError(f"localization_scores: expected cIoU [N] with N at least 1, got {list(ciou.shape)}")
    thresholds = torch.arange(21, dtype=torch.float64, device=ciou.device) / 20
    share = (ciou[:, None] >= thresholds).double().mean(0)
    return {"cIoU@0.5": share[10].item(), "AUC": torch.trapezoid(share, thresholds).item()}


def universal_threshold(positive: Tensor, negative: Tensor) -> float:
    """The threshold of a map's maximum that best tells sounds of something seen from sounds of nothing seen.

    `positive` and `negative` are maps [N, ...] and [M, ...] of data that is not evaluated on. The threshold is where
    the share of positive maps that reach it, less that of negative ones, is largest (Youden's J).

    Source: one threshold for all pictures, whatever is heard, is what Juanola et al. ask for, see
    `negative_audio_scores`.
    """
    tops, labels = _tops(positive, negative)
    false, true, thresholds = roc_curve(labels, tops)
    return float(thresholds[1:][(true - false)[1:].argmax()])


def negative_audio_scores(positive: Tensor, negative: Tensor, threshold: float) -> dict[str, float]:
    """What a localiser does where nothing that is seen makes the sound: silence, noise, something off screen.

    Args:
        positive, negative: maps [N, ...] with the pictures' own sounds, and [M, ...] with sounds of nothing seen.
        threshold: a map marks what reaches it, the same for all pictures (`universal_threshold`).

    Returns:
        "AUC negative": of telling both apart by the maps' maxima; 0.5 is chance, 1 is perfect.
        "false alarms": the share of negative maps that mark anything; "hits": of positive ones.
        "false area": the mean share of the picture that negative maps mark.

    Raises ValueError for maps that are empty or not finite.

    Source: the questions are those of Juanola et al., https://arxiv.org/abs/2410.01020: whether a map's maximum tells
    negative audio, and how much of the picture is marked under it by one threshold for all.
    """
    tops, labels = _tops(positive, negative)
    marked = negative.flatten(1) >= threshold
    return {
        "AUC negative": float(roc_auc_score(labels, tops)),
        "false alarms": marked.any(1).double().mean().item(),
        "false area": marked.double().mean().item(),
        "hits": (positive.flatten(1) >= threshold).any(1).double().mean().item(),
    }


def _tops(positive: Tensor, negative: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The maximum of every map, and 1 for those of `positive`."""
    for name, maps in (("positive", positive), ("negative", negative)):
        if maps.ndim < 2 or not maps.numel() or not maps.isfinite().all():
            raise ValueError(f"{name}: expected finite maps [N, ...] with N at least 1, got {list(maps.shape)}")
    tops = torch.cat([maps.flatten(1).amax(1) for maps in (positive, negative)]).double().cpu().numpy()
    return tops, np.repeat([1, 0], [len(positive), len(negative)])
