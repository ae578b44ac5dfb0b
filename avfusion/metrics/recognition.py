"""Recognition: top-k accuracy where a clip has one label; average precision, AUC and d-prime where it has several.

Average precision and AUC are scikit-learn's.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor


def top_k_accuracy(scores: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """The share of clips whose class is among the k with the highest scores: "top-1", "top-5".

    Args:
        scores: [N, C], any floating-point type.
        labels: [N], the index of the class of each clip.

    Of classes with equal scores the last comes first, as in `sklearn.metrics.top_k_accuracy_score`.

    Raises ValueError for shapes that do not fit, scores that are not finite, and labels that are no class.
    """
    _check_scores("top_k_accuracy", scores)
    if labels.shape != scores.shape[:1] or labels.is_floating_point():
        raise ValueError(f"top_k_accuracy: labels must be integers [{len(scores)}], got {labels.dtype} "
                         f"{list(labels.shape)}")  # fmt: skip
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(f"top_k_accuracy: labels must be classes 0 to {scores.shape[1] - 1}, got "
                         f"{labels.min().item()} to {labels.max().item()}")  # fmt: skip
    label = labels.long()[:, None]
    own, classes = scores.gather(1, label), torch.arange(scores.shape[1], device=scores.device)
    ahead = ((scores > own) | ((scores == own) & (classes > label))).sum(1)
    return {f"top-{k}": (ahead < k).double().mean().item() for k in ks}


def multilabel_scores(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """How well scores rank the clips of each class, averaged over classes.

    Args:
        scores: [N, C], any floating-point type.
        labels: [N, C], 0 or 1 (bool, integers or floats).

    Returns:
        "mAP": the mean of the classes' average precision, sum_n (R_n - R_{n-1}) P_n over distinct scores;
        "AUC": the mean area under the ROC curve, in which a tie counts one half;
        "d_prime": sqrt(2) * Phi^-1(AUC), with the normal distribution's quantile function, of that mean;
        "left_out_mAP": how many classes have no positive clip, and "left_out_AUC": no positive or no negative one.
        These are left out of the mean; a mean of no classes is NaN.

    Raises ValueError for shapes that do not fit, scores that are not finite, and labels other than 0 and 1.
    """
    _check_scores("multilabel_scores", scores)
    if labels.shape != scores.shape:
        raise ValueError(f"multilabel_scores: labels must have the shape {list(scores.shape)} of scores, got "
                         f"{list(labels.shape)}")  # fmt: skip
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("multilabel_scores: labels must be 0 or 1")
    y, s = labels.bool().cpu().numpy(), scores.double().cpu().numpy()
    positives = y.sum(0)
    ranked = np.flatnonzero(positives)
    separable = np.flatnonzero((positives > 0) & (positives < len(y)))
    precision = _mean([average_precision_score(y[:, c], s[:, c]) for c in ranked])
    auc = _mean([roc_auc_score(y[:, c], s[:, c]) for c in separable])
    return {
        "mAP": precision,
        "AUC": auc,
        "d_prime": math.sqrt(2) * torch.special.ndtri(torch.tensor(auc, dtype=torch.float64)).item(),
        "left_out_mAP": y.shape[1] - len(ranked),
        "left_out_AUC": y.shape[1] - len(separable),
    }


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _check_scores(name: str, scores: Tensor) -> None:
    if scores.ndim != 2 or 0 in scores.shape or not scores.is_floating_point():
        raise ValueError(f"{name}: scores must be floating-point [clips, classes], at least one of each, got "
                         f"{scores.dtype} {list(scores.shape)}")  # fmt: skip
    if not scores.isfinite().all():
        raise ValueError(f"{name}: {(~scores.isfinite()).sum().item()} of the scores are not finite")
