"""Audio-visual segmentation: which pixels sound, and, for AVSS, of which class.

Source: Zhou et al., ECCV 2022, https://arxiv.org/abs/2207.05042 (AVSBench); head and training as in the DeepAVFusion
release.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from avfusion.common import setting
from avfusion.data.loader import Batch, ClipLoader
from avfusion.data.pictures import mask_files
from avfusion.data.samples import Masked, Source
from avfusion.data.table import Table
from avfusion.media.clip import Clip
from avfusion.media.stills import length_of_sound, read_stills
from avfusion.media.transforms import masked_transform
from avfusion.metrics.segmentation import BinarySegmentation, SemanticSegmentation
from avfusion.models.heads.localization import center_prior
from avfusion.models.heads.segmentation import Segmenter, segmentation_loss
from avfusion.tasks.downstream import SMALL, TRAINED, Downstream, DownstreamConfig, Prediction, samples_of
from avfusion.training.task import Result, autocast, device_of, gathered
from avfusion.viz.plots import plot_clips


@dataclass(frozen=True)
class SegmentConfig(DownstreamConfig):
    """Audio-visual segmentation."""

    subset: str = setting("all", "part of AVSBench: v1s (S4), v1m (MS3), v2, or all (AVSS)",
                          choices=("v1s", "v1m", "v2", "all"))  # fmt: skip
    semantic: bool = setting(True, "predict classes; otherwise whether a pixel sounds")
    listed: bool = setting(False, "background is what the masks show and the clip's own list of classes does not name")
    repeat: int = setting(1, "times that an epoch goes over the frames", least=1)


RELEASED = TRAINED | {"layout": "avsbench", "eval_split": "val", "epochs": 100, "accumulation": 8,
                      "warmup_epochs": 20.0, "listed": True}  # fmt: skip
PRESETS = {
    "paper": RELEASED,
    "paper-s4": RELEASED | {"subset": "v1s", "semantic": False, "blr": 2e-4, "repeat": 10},
    "tiny": SMALL | {"data": "data/tiny-segment", "layout": "avsbench", "synth_clips": 300, "epochs": 3,
                     "batch_size": 16, "blr": 16e-3, "warmup_epochs": 0.5, "subset": "v2", "eval_epochs": 3,
                     "eval_clips": 100},
}  # fmt: skip


class Frames:
    """The annotated frames of AVSBench as a source: a row each, whose `extra["mask"]` is the file of its mask."""

    def __init__(self, table: Table, subset: str):
        self.classes, self.sha256 = table.classes, table.sha256
        self.rows = [
            replace(row, id=f"{row.id}/{second}", path=row.path / f"{second}.jpg",
                    extra=row.extra | {"mask": mask, "second": second, "video": row.id})
            for row in table.rows
            if subset in ("all", row.extra.get("subset"))
            for second, mask in mask_files(row).items()
        ]  # fmt: skip
        if not self.rows:
            raise ValueError(f"{table.root}: no annotated frame of the subset {subset} in this split")

    def name(self, index: int) -> str:
        return str(self.rows[index].path)

    def read(self, index: int, *, duration: float, start=None, frame=None, **window) -> Clip:
        """The frame, and the sound around the middle of its second, kept inside the clip.

        In training (`start` is "random") that is up to a third of the window earlier or later.
        """
        row = self.rows[index]
        middle = row.extra["second"] + 0.5
        if start == "random":
            middle += torch.empty(()).uniform_(-0.33, 0.33).item() * duration
        start = max(min(middle - duration / 2, length_of_sound(row.audio) - duration), 0.0)
        return read_stills(row.path, row.audio, start=start, duration=duration, **window)


class Segment(Downstream):
    name = "segment"
    settings = SegmentConfig
    measures = "mIoU and F score (beta^2 = 0.3), by the three definitions in use"
    presets = PRESETS

    def read(self, where: str, split: str) -> Frames:
        if self.config.data.layout != "avsbench":
            raise ValueError(f"{where}: the layout {self.config.data.layout} has no masks; segment reads avsbench")
        return Frames(super().read(where, split), self.config.subset)

    def open(self, *, make: bool = False) -> Frames:
        source = super().open(make=make)
        source.rows *= self.config.repeat
        return source

    def samples(self, source: Source, *, train: bool) -> Masked:
        return Masked(super().samples(source, train=train), listed=self.config.listed)

    def transform(self, *, train: bool) -> Callable:
        return masked_transform(self.encoder_config.image_size, train=train, crop_min=self.config.data.crop_min)

    def build(self, *, weights: bool = False) -> Segmenter:
        return Segmenter(self.build_encoder(weights=weights), len(self.classes) if self.config.semantic else 1)

    def prepare(self, batch: Batch, epoch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Image, spectrogram, and truth [B, H, W]: classes, or 1 where something sounds."""
        truth = batch.mask.to(device, non_blocking=True).long()
        return *self.inputs(batch, device), truth if self.config.semantic else (truth > 0).long()

    def losses(self, model: nn.Module, image: Tensor, audio: Tensor, truth: Tensor) -> dict[str, Tensor]:
        return {"mask": segmentation_loss(model(image, audio).float(), truth)}

    @torch.no_grad()
    def evaluate(self, model: Segmenter, loader: ClipLoader, dtype: torch.dtype) -> Result:
        """`... center` are the scores of a disc in the middle of the frame, a guess that looks at nothing."""
        rows, device, source, size = [], device_of(model), loader.source, self.encoder_config.image_size
        middle = (center_prior(size) > center_prior(size).median()).double().to(device)
        classes, ours, center = SemanticSegmentation(len(self.classes)), BinarySegmentation(), BinarySegmentation()
        for batch in loader:
            image, audio, truth = self.prepare(batch, 0, device)
            with autocast(device, dtype):
                logits = model(image, audio).float()
            foreground = 1 - logits.softmax(1)[:, 0] if self.config.semantic else logits.sigmoid()[:, 0]
            sounds = (truth > 0).double()
            videos = [source.rows[i].extra["video"] for i in batch.index.tolist()]
            score = ours.update(foreground.double().clamp(0, 1), sounds, videos)
            center.update(middle.expand_as(sounds), sounds, videos)
            if self.config.semantic:
                score = classes.update(logits, truth)
            rows.append((batch.index, score))
        index, scores = gathered(rows)
        summary = classes.of_all_processes().compute() if self.config.semantic else {}
        prefix = "foreground " if self.config.semantic else ""
        for suffix, metric in (("", ours), (" center", center)):
            found = metric.of_all_processes().compute()
            summary |= {f"{prefix}{name}{suffix}": value for name, value in found.items()}
        return Result(summary, samples_of(source, index, [round(s, 6) for s in scores.tolist()]))

    def draw(self, model: Segmenter, loader: ClipLoader, rows: list[int], path: Path) -> None:
        image, audio, truth = self.prepare(loader.some(rows), 0, device_of(model))
        with torch.no_grad():
            logits = model(image, audio).float()
        predicted = logits.argmax(1) if self.config.semantic else (logits[:, 0] > 0).long()
        plot_clips(path, image, audio, [""] * len(image), {"annotated": truth, "predicted": predicted})

    def predict(self, model: Segmenter, clip: Clip) -> Prediction:
        """How likely each pixel sounds, over the whole frame; and which classes take what share of it."""
        logits = model(*self.inputs_of(clip, device_of(model), whole=True))[0].float()
        if not self.config.semantic:
            return Prediction({}, {"sounding": logits[0].sigmoid()})
        share = logits.argmax(0).flatten().bincount(minlength=len(self.classes)).double() / logits[0].numel()
        named = {self.classes[i]: round(share[i].item(), 4) for i in share.nonzero().flatten().tolist()}
        return Prediction({"share of the frame": named}, {"sounding": 1 - logits.softmax(0)[0]})
