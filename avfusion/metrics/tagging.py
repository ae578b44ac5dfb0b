"""Tagging: clips with several labels, each heard, seen or both, as VGGSounder scores it.

    F1 at k         of the k classes with the highest scores of each clip against all of its labels
    confusion mu    the share of clips that one modality gets right and both together get wrong

A clip is a hit where one of its k classes is one of its labels. The oracle is the `vggsounder` package.

Source: Zverev et al., ICCV 2025, https://arxiv.org/abs/2508.08237.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, precision_score, recall_score
from torch import Tensor

# Which labels count, by how they are marked: A is heard, V is seen, AV is both.
SUBSETS = {"all": ("A", "V", "AV"), "A": ("A", "AV"), "V": ("V", "AV"), "AV": ("AV",)}


def top_k(scores: Tensor, k: int) -> np.ndarray:
    """[N, C] -> 1 for the k highest scores of each row, 0 for the others. Raises ValueError where C is less than k."""
    if scores.ndim != 2 or not 1 <= k <= scores.shape[1] or not scores.isfinite().all():
        raise ValueError(f"top_k: expected finite scores [clips, classes] of {k} classes or more, got "
                         f"{list(scores.shape)}")  # fmt: skip
    return torch.zeros_like(scores, dtype=torch.int64).scatter_(1, scores.topk(k).indices, 1).cpu().numpy()


def tagging_scores(scores: Tensor, labels: Tensor, ks: Sequence[int] = (1, 3, 5, 10)) -> dict[str, float]:
    """Scores [N, C] against labels [N, C], 0 or 1, for each k: "F1@1" and, of the same, "macro F1@1", "hits@1", ...

    F1, Jaccard, precision and recall count all clips and classes together (micro); "macro F1" is the mean over classes,
    in which a class that is neither there nor named counts 0; "accuracy" asks for exactly the labels. k that are more
    than the classes are left out.

    Raises ValueError for shapes that do not fit, and scores that are not finite.
    """
    truth, found = _truth(labels, scores), {}
    for k in (k for k in ks if k <= scores.shape[1]):
        named = top_k(scores, k)
        found |= {
            f"F1@{k}": f1_score(truth, named, average="micro", zero_division=0),
            f"macro F1@{k}": f1_score(truth, named, average="macro", zero_division=0),
            f"hits@{k}": (truth & named).any(1).mean(),
            f"precision@{k}": precision_score(truth, named, average="micro", zero_division=0),
            f"recall@{k}": recall_score(truth, named, average="micro", zero_division=0),
            f"Jaccard@{k}": jaccard_score(truth, named, average="micro", zero_division=0),
            f"accuracy@{k}": accuracy_score(truth, named),
        }
    return {name: float(value) for name, value in found.items()}


def modality_confusion(labels: Tensor, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """How often a model is distracted: clips that it gets right by one modality, and wrong by both together.

    Args:
        labels: [N, C], 0 or 1: all labels, whichever way they are marked.
        scores: by "both", "audio" and "image", what the model was given: [N, C] each.

    Returns "mu audio" and "mu image", the shares of clips for which that holds, and "mu either": where both modalities
    alone are right and both together wrong. A clip is right where the class with the highest score is a label.

    Raises ValueError for shapes that do not fit, and scores that are not finite.
    """
    hit = {name: (_truth(labels, x) & top_k(x, 1)).any(1) for name, x in scores.items()}
    lost = ~hit["both"]
    return {"mu audio": float((hit["audio"] & lost).mean()), "mu image": float((hit["image"] & lost).mean()),
            "mu either": float((hit["audio"] & hit["image"] & lost).mean())}  # fmt: skip


def _truth(labels: Tensor, scores: Tensor) -> np.ndarray:
    if labels.shape != scores.shape or not len(labels) or not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"labels must be 0 or 1 and have the shape {list(scores.shape)} of scores, one clip or more, "
                         f"got {list(labels.shape)}")  # fmt: skip
    return labels.long().cpu().numpy()
