"""How good features are without training anything on them: the label of the nearest neighbour (the paper's Fig. 3).

The oracle of `nearest` is scikit-learn's NearestNeighbors by cosine.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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
