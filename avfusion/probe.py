"""How good features are without training anything on them: the label of the nearest neighbour (the paper's Fig. 3)."""

import csv
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn

from avfusion.clips import Clip
from avfusion.data.loader import Batch, ClipLoader, Source
from avfusion.mae import AVMAE
from avfusion.model import DeepAVFusion

CHUNK = 4096  # rows compared at a time
PICTURED = 4  # clips whose reconstruction is drawn


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


class Selection:
    """At most `count` clips of a source that have one label, evenly spaced; all its clips where none has."""

    def __init__(self, source: Source, count: int):
        rows = [replace(row, label=row.labels[0]) if row.label is None and len(row.labels) == 1 else row
                for row in source.rows]  # fmt: skip
        labelled = [i for i, row in enumerate(rows) if row.label is not None] or range(len(rows))
        self.source, self.classes, self.sha256 = source, source.classes, source.sha256
        self.index = [labelled[i * len(labelled) // count] for i in range(count)] if len(labelled) > count else labelled
        self.rows = [rows[i] for i in self.index]

    @property
    def has_labels(self) -> bool:
        return sum(row.label is not None for row in self.rows) > 1

    def name(self, index: int) -> str:
        return self.source.name(self.index[index])

    def read(self, index: int, **window) -> Clip:
        return self.source.read(self.index[index], **window)


@dataclass
class Recorder:
    """Writes a run's probes.csv and probes.png, a line a probe, and reconstructions/step-*.png."""

    loader: ClipLoader  # over a `Selection`, for evaluation
    mel: nn.Module
    dtype: torch.dtype
    out: Path
    rows: list[dict[str, float]]  # of the curve so far

    @classmethod
    def resume(cls, loader: ClipLoader, mel: nn.Module, dtype: torch.dtype, out: Path, step: int) -> "Recorder":
        """For a run that stands at `step`: lines that are there from later steps are dropped."""
        path, rows = out / "probes.csv", []
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        return cls(loader, mel, dtype, out, [row for row in rows if row["step"] <= step])

    def write(self, model: AVMAE, step: int, epoch: float, *, main: bool) -> dict[str, float]:
        """Probe, and draw; every process has to call it. Returns the accuracies by name, none without labels."""
        probes, training = {}, model.training
        model.eval()
        if self.loader.source.has_labels:
            probes = probe(model.encoder, self.loader, self.mel, self.dtype)
        if main:
            from avfusion.plots import plot_probes, plot_reconstructions

            if probes:
                self.rows = [row for row in self.rows if row["step"] != step]
                self.rows.append({"step": step, "epoch": epoch} | probes)
                _write_csv(self.out / "probes.csv", self.rows)
                plot_probes(self.out / "probes.png", self.rows)
            (self.out / "reconstructions").mkdir(parents=True, exist_ok=True)
            plot_reconstructions(self.out / "reconstructions" / f"step-{step:08d}.png", *self._reconstruct(model))
        model.train(training)
        return probes

    def _reconstruct(self, model: AVMAE) -> tuple[Tensor, ...]:
        count, clips = len(self.loader.source.rows), self.loader.clips
        shown = min(PICTURED, count)
        batch, *_ = clips.collate([clips[0, i * count // shown] for i in range(shown)])
        device = model.encoder.fusion_tokens.device
        image, audio = batch.image.to(device), self.mel(batch.waveform.to(device))
        generator, grids = (
            torch.Generator().manual_seed(0),
            (model.encoder.config.image_grid, model.encoder.config.audio_grid),
        )
        noise = [torch.rand(len(image), rows * columns, generator=generator).to(device) for rows, columns in grids]
        return model.reconstruct(image, audio, *noise)


def _write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)
