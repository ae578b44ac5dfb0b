"""Audio-visual segmentation: which pixels sound, and, for AVSS, of which class.

Source: Zhou et al., ECCV 2022, https://arxiv.org/abs/2207.05042 (AVSBench); head and training as in the DeepAVFusion
release.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from avfusion.clips import IMAGENET_MEAN, IMAGENET_STD, Clip
from avfusion.data.layouts import mask_files, read_mask
from avfusion.data.loader import Batch, ClipLoader
from avfusion.data.stills import read_stills
from avfusion.data.table import Table
from avfusion.heads.localization import center_prior
from avfusion.heads.segmentation import Segmenter, segmentation_loss
from avfusion.metrics.segmentation import BinarySegmentation, SemanticSegmentation
from avfusion.plots import plot_clips
from avfusion.tasks.downstream import Downstream, Prediction
from avfusion.tasks.task import Result, autocast, clips_of, device_of, gathered, whole_frame


class Frames:
    """A source of single annotated frames of AVSBench: the frame's fourth channel is its mask of class indices."""

    def __init__(self, table: Table, subset: str):
        self.table, self.classes, self.sha256 = table, table.classes, table.sha256
        self.rows, self.masks = [], []
        for row in table.rows:
            if row.extra.get("subset") == subset:
                files = mask_files(row)
                self.masks += files.values()
                self.rows += [replace(row, id=f"{row.id}/{i}", path=row.path / f"{i}.jpg") for i in files]
        if not self.rows:
            raise ValueError(f"{table.root}: no annotated frame of the subset {subset} in this split")

    def name(self, index: int) -> str:
        return str(self.rows[index].path)

    def read(self, index: int, *, duration: float, start=None, frame=None, **window) -> Clip:
        """The frame, and the sound around the middle of its second."""
        row = self.rows[index]
        start = max(int(row.path.stem) + 0.5 - duration / 2, 0.0)
        clip = read_stills(row.path, row.audio, start=start, duration=duration, **window)
        mask = read_mask(self.masks[index])
        pixels = np.asarray(clip.frame.resize(mask.shape[::-1]))
        return replace(clip, frame=Image.fromarray(np.dstack((pixels, mask)), "RGBA"))


class WithMask:
    """RGBA frame -> [4, H, W]: the normalised image, and the mask as numbers, moved together."""

    def __init__(self, geometry: v2.Transform):
        self.geometry = geometry

    def __call__(self, frame: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)
        image, mask = self.geometry(tv_tensors.Image(pixels[:3]), tv_tensors.Mask(pixels[3:]))
        image = v2.functional.normalize(image.float() / 255, IMAGENET_MEAN, IMAGENET_STD)
        return torch.cat((image, mask.float())).as_subclass(Tensor)


class Segment(Downstream):
    name = "segment"

    def read(self, where: str, split: str) -> Frames:
        table = super().read(where, split)
        if self.config.layout != "avsbench":
            raise ValueError(f"{where}: the layout {self.config.layout} has no masks; segment reads avsbench")
        return Frames(table, self.config.subset)

    def loader(self, source, batch_size, *, train, **options) -> ClipLoader:
        loader = super().loader(source, batch_size, train=train, **options)
        size, geometry = self.encoder_config.image_size, v2.Resize(self.encoder_config.image_size, antialias=True)
        if train:
            crop = v2.RandomResizedCrop(size, scale=(self.config.crop_min, 1.0), antialias=True)
            geometry = v2.Compose([crop, v2.RandomHorizontalFlip()])
        loader.clips.transform = WithMask(geometry)
        return loader

    def build(self, *, weights: bool = False) -> Segmenter:
        return Segmenter(self.build_encoder(weights=weights), len(self.classes) if self.config.semantic else 1)

    def split(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Image, spectrogram, and truth [B, H, W]: classes, or 1 where something sounds."""
        pixels, audio = self.inputs(batch, device)
        truth = pixels[:, 3].long()
        return pixels[:, :3], audio, truth if self.config.semantic else (truth > 0).long()

    def prepare(self, batch: Batch, epoch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Image, spectrogram and truth."""
        return self.split(batch, device)

    def losses(self, model: nn.Module, image: Tensor, audio: Tensor, truth: Tensor) -> dict[str, Tensor]:
        return {"mask": segmentation_loss(model(image, audio).float(), truth)}

    @torch.no_grad()
    def evaluate(self, model: Segmenter, loader: ClipLoader, dtype: torch.dtype) -> Result:
        """`... center` are the scores of a disc in the middle of the frame, a guess that looks at nothing."""
        rows, device, source, size = [], device_of(model), loader.source, self.encoder_config.image_size
        middle = (center_prior(size) > center_prior(size).median()).double().to(device)
        classes, ours, center = SemanticSegmentation(len(self.classes)), BinarySegmentation(), BinarySegmentation()
        for batch in loader:
            image, audio, truth = self.split(batch, device)
            with autocast(device, dtype):
                logits = model(image, audio).float()
            foreground = 1 - logits.softmax(1)[:, 0] if self.config.semantic else logits.sigmoid()[:, 0]
            sounds = (truth > 0).double()
            score = ours.update(foreground.double().clamp(0, 1), sounds)
            center.update(middle.expand_as(sounds), sounds)
            if self.config.semantic:
                score = classes.update(logits, truth)
            rows.append((batch.index, score))
        index, scores = gathered(rows)
        summary = classes.of_all_processes().compute() if self.config.semantic else {}
        prefix = "foreground " if self.config.semantic else ""
        for suffix, metric in (("", ours), (" center", center)):
            found = metric.of_all_processes().compute()
            summary |= {f"{prefix}{name}{suffix}": value for name, value in found.items()}
        samples = [{"row": i, "clip": source.name(i), "score": round(s, 6)}
                   for i, s in zip(index.tolist(), scores.tolist(), strict=True)]  # fmt: skip
        return Result(summary, samples)

    def draw(self, model: Segmenter, loader: ClipLoader, rows: list[int], path: Path) -> None:
        image, audio, truth = self.split(clips_of(loader, rows), device_of(model))
        with torch.no_grad():
            logits = model(image, audio).float()
        predicted = logits.argmax(1) if self.config.semantic else (logits[:, 0] > 0).long()
        plot_clips(path, image, audio, [""] * len(image), {"annotated": truth, "predicted": predicted})

    @torch.no_grad()
    def predict(self, model: Segmenter, clip: Clip) -> Prediction:
        """How likely each pixel sounds, over the whole frame; and which classes take what share of it."""
        image = whole_frame(self.encoder_config.image_size)(clip.frame)[None].to(device_of(model))
        _, audio = self.inputs_of(clip, image.device)
        logits = model(image, audio)[0].float()
        if not self.config.semantic:
            return Prediction({}, {"sounding": logits[0].sigmoid()})
        share = logits.argmax(0).flatten().bincount(minlength=len(self.classes)).double() / logits[0].numel()
        named = {self.classes[i]: round(share[i].item(), 4) for i in share.nonzero().flatten().tolist()}
        return Prediction({"share of the frame": named}, {"sounding": 1 - logits.softmax(0)[0]})
