"""Visually guided source separation: the sounds of clips are added up, and each picture asks for its own back.

    mix = sum_k s_k,   mask_k = sigmoid(UNet(features of mix | picture k)),   estimate_k = iSTFT(mask_k * STFT(mix))

Source: mix-and-separate of Zhao et al., ECCV 2018, https://arxiv.org/abs/1804.03160, as in the DeepAVFusion release.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfusion.common import setting
from avfusion.data.loader import Batch, ClipLoader
from avfusion.data.samples import Mixed, Source
from avfusion.media.clip import Clip
from avfusion.metrics.separation import (
    apply_mask,
    binary_masks,
    bss_eval,
    nmf,
    ratio_masks,
    released_masks,
    rpca,
)
from avfusion.models.heads.separation import Separator, separation_loss
from avfusion.tasks.downstream import SMALL, TRAINED, Downstream, DownstreamConfig, Prediction, samples_of
from avfusion.training.task import Result, autocast, device_of, gathered
from avfusion.viz.plots import plot_clips


@dataclass(frozen=True)
class SeparateConfig(DownstreamConfig):
    """Visually guided source separation."""

    sources: int = setting(2, "clips that are mixed, 2 to 4", least=2)
    target: str = setting("shares", "what masks are: a source's share of the power of all, or, as released, p / (p + "
                                    "power of the mixture)", choices=("shares", "released"))  # fmt: skip
    mask: str = setting("ratio", "ratio: shares; binary: 0 or 1", choices=("ratio", "binary"))
    weighted_loss: bool = setting(True, "weight the loss by the power of the mixture")

    def __post_init__(self):
        super().__post_init__()
        if self.sources > 4:
            raise ValueError(f"sources={self.sources}: expected 2 to 4")


PRESETS = {
    "paper": TRAINED | {"layout": "vggsound-music", "eval_split": "pairs", "epochs": 300, "accumulation": 8,
                        "warmup_epochs": 40.0, "gain_db": 0.0},
    "tiny": SMALL | {"data": "data/tiny-separate", "layout": "vggsound-music", "eval_split": "pairs",
                     "synth_clips": 600, "epochs": 6, "batch_size": 4, "blr": 64e-3, "warmup_epochs": 1.0,
                     "layer_decay": 0.9, "crop_min": 0.8, "eval_epochs": 3, "eval_clips": 32},
    "synth-small": SMALL | {"data": "data/synth-small-separate", "layout": "vggsound-music", "eval_split": "pairs",
                            "synth_clips": 1000, "synth_classes": 12, "epochs": 8, "batch_size": 4, "blr": 64e-3,
                            "warmup_epochs": 1.0, "layer_decay": 0.9, "crop_min": 0.8, "eval_epochs": 4,
                            "eval_clips": 32},
}  # fmt: skip


def best_order(estimates: Tensor, truth: Tensor) -> Tensor:
    """Two estimates [2, samples], in the order that is nearer to the truth."""
    swapped = estimates.flip(0)
    return estimates if (estimates - truth).norm() <= (swapped - truth).norm() else swapped


class Separate(Downstream):
    name = "separate"
    settings = SeparateConfig
    measures = "SDR, SIR and SAR (BSS Eval v3), beside the mixture and the oracle mask"
    presets = PRESETS
    needs_labels = False

    def samples(self, source: Source, *, train: bool) -> Mixed:
        return Mixed(super().samples(source, train=train), self.config.sources)

    def build(self, *, weights: bool = False) -> Separator:
        return Separator(self.build_encoder(weights=weights))

    def flop(self) -> int:
        return self.config.sources * super().flop()  # each picture of a mixture is a pass of its own

    def mixed(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Images [K B, 3, H, W], waveforms [K B, 1, samples] of the sources, and of their mixtures, likewise.

        Sources of a mixture follow each other.
        """
        image, sources = batch.image.to(device).flatten(0, 1), batch.waveform.to(device)
        mixture = sources.sum(1, keepdim=True).expand_as(sources)
        return image, sources.reshape(-1, 1, sources.shape[-1]), mixture.reshape(-1, 1, sources.shape[-1])

    def prepare(self, batch: Batch, epoch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Images of the sources, spectrograms of their mixtures, and the masks that give the sources."""
        image, sources, mixture = self.mixed(batch, device)
        mel = self.mel(mixture)
        return image, mel, self.masks(self.mel(sources), mel)

    def masks(self, sources: Tensor, mixture: Tensor) -> Tensor:
        """The true masks: spectrograms [K B, 1, mels, frames] twice -> as many, in [0, 1]."""
        binary = self.config.mask == "binary"
        if self.config.target == "released":
            return released_masks(sources, mixture, binary=binary)
        masks = binary_masks if binary else ratio_masks
        return masks(sources.unflatten(0, (-1, self.config.sources))).flatten(0, 1)

    def losses(self, model: nn.Module, image: Tensor, mel: Tensor, target: Tensor) -> dict[str, Tensor]:
        logits = model(image, mel).float()
        return {"mask": separation_loss(logits, target, mel if self.config.weighted_loss else None)}

    @torch.no_grad()
    def separate(self, model: Separator, image: Tensor, mixture: Tensor) -> Tensor:
        """Estimates [N, samples] of what each picture [N, 3, H, W] sounds like in its mixture [N, 1, samples]."""
        mask = model(image, self.mel(mixture)).float().sigmoid()
        return self.filtered(mixture[:, 0], mask[:, 0])

    def filtered(self, mixture: Tensor, mask: Tensor) -> Tensor:
        return apply_mask(mixture, mask, self.mel, released=self.config.target == "released")

    @torch.no_grad()
    def evaluate(self, model: Separator, loader: ClipLoader, dtype: torch.dtype) -> Result:
        """Means over sources, of ours and of baselines: the mixture for all sources, the true masks (oracle); after
        training also NMF and, of two sources, robust PCA, whose parts are given to the sources that they fit best.
        """
        rows, device, source, K = [], device_of(model), loader.source, self.config.sources
        for batch in loader:
            image, sources, mixture = self.mixed(batch, device)
            mixture, truth = mixture[:, 0], sources[:, 0].unflatten(0, (-1, K))
            with autocast(device, dtype):
                found = {"": self.separate(model, image, mixture[:, None])}
            masks = self.masks(self.mel(sources), self.mel(mixture[:, None]))
            found |= {" mixture": mixture, " oracle": self.filtered(mixture, masks[:, 0])}
            found = {name: x.unflatten(0, (-1, K)) for name, x in found.items()}
            if self.thorough:
                pairs = [(mix, both) for mix, both in zip(found[" mixture"][:, 0], truth, strict=True)]
                found[" NMF"] = torch.stack([nmf(mix, both, self.mel) for mix, both in pairs])
                if K == 2:
                    found[" RPCA"] = torch.stack([best_order(rpca(mix, self.mel), both) for mix, both in pairs])
            scores = torch.stack(bss_eval(truth, torch.stack(list(found.values()))), dim=-1)  # [methods, B, sources, 3]
            rows.append((batch.index, scores.mean(2).transpose(0, 1).flatten(1)))
        index, values = gathered(rows)
        methods = ["", " mixture", " oracle"]
        if self.thorough:
            methods += [" NMF", " RPCA"] if K == 2 else [" NMF"]
        names = [f"{score}{method}" for method in methods for score in ("SDR", "SIR", "SAR")]
        columns = dict(zip(names, values.T.tolist(), strict=True))
        samples = samples_of(source, index, columns["SDR"], **columns)
        return Result(dict(zip(names, values.nanmean(0).tolist(), strict=True)), samples)

    def draw(self, model: Separator, loader: ClipLoader, rows: list[int], path: Path) -> None:
        image, sources, mixture = self.mixed(loader.some(rows), device_of(model))
        estimates = self.separate(model, image, mixture)
        titles = [f"source {1 + i % self.config.sources}" for i in range(len(image))]
        sounds = {"its sound": self.mel(sources)[:, 0], "separated": self.mel(estimates[:, None])[:, 0]}
        plot_clips(path, image, self.mel(mixture), titles, sounds=sounds)

    def predict(self, model: Separator, clip: Clip) -> Prediction:
        """What the picture sounds like, and the rest of the clip's sound."""
        image, _ = self.inputs_of(clip, device_of(model))
        mixture = clip.waveform[None].to(image.device)
        estimate = self.separate(model, image, mixture)[0].cpu()
        estimate = F.pad(estimate, (0, clip.waveform.shape[-1] - len(estimate)))
        return Prediction(sounds={"of the picture": estimate, "the rest": clip.waveform[0] - estimate})
