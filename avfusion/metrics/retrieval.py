"""Retrieval of one modality by the other: recall at k and median rank.

Retrieval by label within one set of features is `avfusion.metrics.neighbours.leave_one_out_accuracy`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 512  # rows compared at a time: 200 MB for 50,000 pairs
TIE = 1e-12  # cosines that are closer are equal, and differ by how float64 was summed


def paired_ranks(queries: Tensor, gallery: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's partner comes, by cosine similarity, among all rows of the other side.

    Row i of `queries` [N, D] and row i of `gallery` [N, D] belong together. Returns the ranks, int64 [N], 1 the best:
    of row i of `gallery` for query i, and of row i of `queries` for gallery row i. Ties count against the pair:
    features that are all equal rank last. Computed in float64, by blocks of rows: N x N is never in memory.

    Raises ValueError for shapes that do not fit and features that are not finite.
    """
    if queries.ndim != 2 or queries.shape != gallery.shape or not len(queries):
        raise ValueError(f"paired_ranks: queries and gallery must both be [N, D] with N at least 1, got "
                         f"{list(queries.shape)} and {list(gallery.shape)}")  # fmt: skip
    for name, features in (("queries", queries), ("gallery", gallery)):
        if not features.isfinite().all():
            raise ValueError(f"paired_ranks: {name} has rows that are not finite")
    queries, gallery = F.normalize(queries.double(), dim=-1), F.normalize(gallery.double(), dim=-1)
    least = (queries * gallery).sum(-1) - TIE
    forward, backward = [], torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    for rows, bound in zip(queries.split(CHUNK), least.split(CHUNK), strict=True):
        similarity = rows @ gallery.T
        forward.append((similarity >= bound[:, None]).sum(1))
        backward += (similarity >= least).sum(0)
    return torch.cat(forward), backward


def retrieval_scores(audio: Tensor, image: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Cross-modal retrieval of paired rows, audio [N, D] and image [N, D], in both directions.

    Returns "audio_to_image_recall@1": the share of sounds whose own picture is the most similar one; likewise @5, @10
    and "image_to_audio_..."; and "..._median_rank" (1 the best; the mean of the middle two where N is even). Ties count
    against the pair, and errors are raised, as in `paired_ranks`.
    """
    scores = {}
    for name, ranks in zip(("audio_to_image", "image_to_audio"), paired_ranks(audio, image), strict=True):
        ranks = ranks.double()
        scores |= {f"{name}_recall@{k}": (ranks <= k).double().mean().item() for k in ks}
        scores[f"{name}_median_rank"] = ranks.quantile(0.5).item()
    return scores
