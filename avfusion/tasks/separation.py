"""Visually guided source separation: the sounds of two clips are added up, and each picture asks for its own back.

    mix = s_1 + s_2,   mask_k = sigmoid(UNet(features of mix | picture k)),   estimate_k = iSTFT(mask_k * STFT(mix))

Source: mix-and-separate of Zhao et al., ECCV 2018, https://arxiv.org/abs/1804.03160, as in the DeepAVFusion release.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from avfusion.clips import Clip, read_clip
from avfusion.data.loader import Batch, ClipLoader, Source
from avfusion.heads.separation import Separator, separation_loss
from avfusion.metrics.separation import apply_mask, bss_eval, nmf, ratio_masks, rpca
from avfusion.plots import plot_clips
from avfusion.tasks.downstream import Downstream, Prediction
from avfusion.tasks.task import Result, Selection, autocast, clips_of, device_of, gathered

SOURCES = 2


class Mixtures:
    """A source of pairs of clips: frames as a tuple, waveforms as two channels.

    A row of a list of pairs names both. Otherwise the partner is drawn from torch's generator, which the loader seeds
    for each clip, among those of another class where classes are known.
    """

    def __init__(self, source: Source):
        self.source, self.rows, self.classes, self.sha256 = source, source.rows, source.classes, source.sha256
        self.sizes = getattr(source, "sizes", None)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def read(self, index: int, **window) -> Clip:
        row = self.rows[index]
        first = self.source.read(index, **window)
        if "path_2" in row.extra:
            second = read_clip(row.extra["path_2"], **window)
        else:
            second = self.source.read(self._partner(index), **window)
        return replace(first, frame=(first.frame, second.frame),
                       waveform=torch.cat((first.waveform, second.waveform)))  # fmt: skip

    def _partner(self, index: int) -> int:
        label = self.rows[index].label
        for _ in range(20):
            other = int(torch.randint(len(self.rows), ()))
            if other != index and (label is None or self.rows[other].label != label):
                return other
        return (index + 1) % len(self.rows)


class BothFrames:
    """A transform of one frame for two: [3 * 2, H, W]."""

    def __init__(self, transform: v2.Transform):
        self.transform = transform

    def __call__(self, frames: tuple) -> Tensor:
        return torch.cat([self.transform(frame) for frame in frames])


def best_order(estimates: Tensor, truth: Tensor) -> Tensor:
    """Two estimates [2, samples], in the order that is nearer to the truth."""
    swapped = estimates.flip(0)
    return estimates if (estimates - truth).norm() <= (swapped - truth).norm() else swapped


class Separate(Downstream):
    name = "separate"
    needs_labels = False

    def open(self, *, make: bool = False) -> Mixtures:
        return Mixtures(super().open(make=make))

    def open_evaluation(self) -> Selection:
        chosen = super().open_evaluation()
        chosen.source = Mixtures(chosen.source)
        return chosen

    def loader(self, source, batch_size, *, train, **options) -> ClipLoader:
        loader = super().loader(source, batch_size, train=train, **options)
        loader.clips.transform = BothFrames(loader.clips.transform)
        return loader

    def build(self, *, weights: bool = False) -> Separator:
        return Separator(self.build_encoder(weights=weights))

    def flop(self) -> int:
        return SOURCES * super().flop()  # each picture of a mixture is a pass of its own

    def mixed(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Images [2B, 3, H, W], waveforms [2B, 1, samples] of the sources, and of their mixtures, likewise.

        Sources of a mixture follow each other.
        """
        image = batch.image.to(device).unflatten(1, (SOURCES, 3)).flatten(0, 1)
        sources = batch.waveform.to(device)
        mixture = sources.sum(1, keepdim=True).expand_as(sources)
        return image, sources.reshape(-1, 1, sources.shape[-1]), mixture.reshape(-1, 1, sources.shape[-1])

    def prepare(self, batch: Batch, epoch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Images of the sources, spectrograms of their mixtures, and the shares that the sources have of these."""
        image, sources, mixture = self.mixed(batch, device)
        spectra, mel = self.mel(sources), self.mel(mixture)
        return image, mel, ratio_masks(spectra.unflatten(0, (-1, SOURCES))).flatten(0, 1)

    def losses(self, model: nn.Module, image: Tensor, mel: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"mask": separation_loss(model(image, mel).float(), target, mel)}

    @torch.no_grad()
    def separate(self, model: Separator, image: Tensor, mixture: Tensor) -> Tensor:
        """Estimates [N, samples] of what each picture [N, 3, H, W] sounds like in its mixture [N, 1, samples]."""
        mask = model(image, self.mel(mixture)).float().sigmoid()
        return apply_mask(mixture[:, 0], mask[:, 0], self.mel)

    @torch.no_grad()
    def evaluate(self, model: Separator, loader: ClipLoader, dtype: torch.dtype) -> Result:
        """Means over sources, of ours and of baselines: the mixture for both sources, the true ratio mask (oracle);
        after training also NMF and robust PCA, whose parts are given to the sources that they fit best.
        """
        rows, device, source = [], device_of(model), loader.source
        for batch in loader:
            image, sources, mixture = self.mixed(batch, device)
            mixture, truth = mixture[:, 0], sources[:, 0].unflatten(0, (-1, SOURCES))
            with autocast(device, dtype):
                found = {"": self.separate(model, image, mixture[:, None])}
            masks = ratio_masks(self.mel(sources).unflatten(0, (-1, SOURCES))).flatten(0, 1)
            found |= {" mixture": mixture, " oracle": apply_mask(mixture, masks[:, 0], self.mel)}
            found = {name: x.unflatten(0, (-1, SOURCES)) for name, x in found.items()}
            if self.thorough:
                pairs = [(mix, both) for mix, both in zip(found[" mixture"][:, 0], truth, strict=True)]
                found[" NMF"] = torch.stack([nmf(mix, both, self.mel) for mix, both in pairs])
                found[" RPCA"] = torch.stack([best_order(rpca(mix, self.mel), both) for mix, both in pairs])
            scores = torch.stack(bss_eval(truth, torch.stack(list(found.values()))), dim=-1)  # [methods, B, sources, 3]
            rows.append((batch.index, scores.mean(2).transpose(0, 1).flatten(1)))
        index, values = gathered(rows)
        methods = ("", " mixture", " oracle", " NMF", " RPCA")[: 5 if self.thorough else 3]
        names = [f"{score}{method}" for method in methods for score in ("SDR", "SIR", "SAR")]
        samples = [
            {"row": i, "clip": source.name(i), "score": line[0]} | dict(zip(names, line, strict=True))
            for i, line in zip(index.tolist(), values.tolist(), strict=True)
        ]
        return Result(dict(zip(names, values.nanmean(0).tolist(), strict=True)), samples)

    def draw(self, model: Separator, loader: ClipLoader, rows: list[int], path: Path) -> None:
        batch, device = clips_of(loader, rows), device_of(model)
        image, sources, mixture = self.mixed(batch, device)
        estimates = self.separate(model, image, mixture)
        titles = [f"source {1 + i % SOURCES}" for i in range(len(image))]
        sounds = {"its sound": self.mel(sources)[:, 0], "separated": self.mel(estimates[:, None])[:, 0]}
        plot_clips(path, image, self.mel(mixture), titles, sounds=sounds)

    def predict(self, model: Separator, clip: Clip) -> Prediction:
        """What the picture sounds like, and the rest of the clip's sound."""
        image, _ = self.inputs_of(clip, device_of(model))
        mixture = clip.waveform[None].to(image.device)
        estimate = self.separate(model, image, mixture)[0].cpu()
        estimate = F.pad(estimate, (0, clip.waveform.shape[-1] - len(estimate)))
        return Prediction(sounds={"of the picture": estimate, "the rest": clip.waveform[0] - estimate})
