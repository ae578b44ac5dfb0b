"""How good features are without training anything on them: the label of the nearest neighbour (the paper's Fig. 3)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn

from avfusion.data.loader import Batch
from avfusion.model import DeepAVFusion

CHUNK = 4096  # rows compared at a time


@torch.no_grad()
def pooled_features(
    encoder: DeepAVFusion, batches: Iterable[Batch], mel: nn.Module, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], Tensor]:
    """Features of labelled clips, in the order of the data set: name -> [N, D], and labels [N].

    `image`, `audio` and `fusion` are means over the encoder's tokens, each then of length 1; `joint` is all three side
    by side. Every process encodes its own batches, in autocast to `dtype`, and gets the features of all. Clips without
    a label are left out.
    """
    device, training = encoder.fusion_tokens.device, encoder.training
    encoder.eval()
    rows = []
    try:
        for batch in batches:
            image, audio = batch.image.to(device), mel(batch.waveform.to(device))
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                pooled = torch.stack([F.normalize(x.float().mean(1), dim=-1) for x in encoder(image, audio)], dim=1)
            rows.append((batch.index, batch.label, pooled.cpu()))
    finally:
        encoder.train(training)
    rows = gather_object(rows)
    if not rows:
        return dict.fromkeys(("image", "audio", "fusion", "joint"), torch.empty(0, 0)), torch.empty(0, dtype=torch.long)
    index, label, pooled = (torch.cat(column) for column in zip(*rows, strict=True))
    order = index.argsort()
    order = order[label[order] >= 0]
    pooled = pooled[order]
    names = ("image", "audio", "fusion")
    return dict(zip(names, pooled.unbind(1), strict=True)) | {"joint": pooled.flatten(1)}, label[order]


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


def probe(
    encoder: DeepAVFusion, batches: Iterable[Batch], mel: nn.Module, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Leave-one-out nearest-neighbour accuracy of image, audio, fusion and joint features, and that of chance.

    Raises ValueError where fewer than two clips have a label.
    """
    features, labels = pooled_features(encoder, batches, mel, dtype)
    if len(labels) < 2:
        raise ValueError(f"{len(labels)} labelled clips: a nearest-neighbour probe needs two or more")
    return {name: leave_one_out_accuracy(x, labels) for name, x in features.items()} | {"chance": chance(labels)}
