"""How good features are without training anything on them: the label of the nearest neighbour (the paper's Fig. 3).

The oracle of `nearest` is scikit-learn's NearestNeighbors by cosine.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from avfusion.metrics.recognition import multilabel_scores

CHUNK = 4096  # rows compared at a time


def nearest(queries: Tensor, gallery: Tensor, k: int = 1, *, leave_one_out: bool = False) -> tuple[Tensor, Tensor]:
    """The k rows of `gallery` [M, D] most similar by cosine to each of `queries` [N, D], the best first.

    `leave_one_out` means that both are the same set, and no row is its own neighbour. Returns similarities and row
    numbers, both [N, k]. Raises ValueError where the gallery has fewer than k others.
    """
    if not 1 <= k <= len(gallery) - leave_one_out:
        raise ValueError(f"k={k}: the gallery has {len(gallery) - leave_one_out} rows to choose from")
    queries, gallery = F.normalize(queries, dim=-1), F.normalize(gallery, dim=-1)
    found = []
    for at in range(0, len(queries), CHUNK):
        similarity = queries[at : at + CHUNK] @ gallery.T
        if leave_one_out:
            similarity.diagonal(at).fill_(-torch.inf)
        found.append(similarity.topk(k, dim=-1))
    values, rows = zip(*found, strict=True)
    return torch.cat(values), torch.cat(rows)


def leave_one_out_accuracy(features: Tensor, labels: Tensor) -> float:
    """The share of rows [N, D] whose nearest other row by cosine has the same label [N]."""
    _, neighbour = nearest(features, features, leave_one_out=True)
    return (labels[neighbour[:, 0]] == labels).float().mean().item()


def chance(labels: Tensor) -> float:
    """The expected accuracy of a neighbour drawn at random from the other rows."""
    counts = torch.bincount(labels).double()
    return (counts * (counts - 1)).sum().item() / (len(labels) * (len(labels) - 1))


def neighbour_scores(features: Mapping[str, Tensor], labels: Tensor) -> dict[str, float]:
    """How well the nearest other row tells labels, of each of several features of the same clips, by name [N, D].

    `labels` [N], one a clip: the accuracy of each, and "chance". Or [N, C], 0 or 1: "... AP" and "... AUC", means over
    the classes that are there, where a clip's scores are its neighbour's labels times their cosine (as the release
    scores AudioSet); and "chance AP", of random scores.

    Raises ValueError where there are fewer than two rows.
    """
    if len(labels) < 2:
        raise ValueError(f"{len(labels)} labelled clips: a nearest-neighbour probe needs two or more")
    if labels.ndim == 1:
        return {name: leave_one_out_accuracy(x, labels) for name, x in features.items()} | {"chance": chance(labels)}
    found = {}
    for name, x in features.items():
        cosine, neighbour = nearest(x, x, leave_one_out=True)
        scores = multilabel_scores(labels[neighbour[:, 0]] * cosine.to(labels.dtype), labels)
        found |= {f"{name} AP": scores["mAP"], f"{name} AUC": scores["AUC"]}
    there = labels[:, labels.sum(0) > 0]
    return found | {"chance AP": there.double().mean().item()}
