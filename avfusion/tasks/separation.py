"""Visually guided source separation: the sounds of two clips are added up, and each picture asks for its own back.

    mix = s_1 + s_2,   mask_k = sigmoid(UNet(features of mix | picture k)),   estimate_k = iSTFT(mask_k * STFT(mix))

Source: mix-and-separate of Zhao et al., ECCV 2018, https://arxiv.org/abs/1804.03160, as in the DeepAVFusion release.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfusion.data.loader import Batch, ClipLoader
from avfusion.data.samples import Mixed, Source
from avfusion.media.clip import Clip
from avfusion.metrics.separation import apply_mask, bss_eval, nmf, ratio_masks, rpca
from avfusion.models.heads.separation import Separator, separation_loss
from avfusion.tasks.downstream import SMALL, TRAINED, Downstream, Prediction, samples_of
from avfusion.training.task import Result, autocast, device_of, gathered
from avfusion.viz.plots import plot_clips

SOURCES = 2


PRESETS = {
    "paper": TRAINED | {"layout": "vggsound-music", "eval_split": "pairs", "epochs": 300, "warmup_epochs": 40.0},
    "tiny": SMALL | {"data": "data/tiny-separate", "layout": "vggsound-music", "eval_split": "pairs",
                     "synth_clips": 600, "epochs": 6, "batch_size": 4, "blr": 64e-3, "warmup_epochs": 1.0,
                     "layer_decay": 0.9, "crop_min": 0.8, "eval_epochs": 3, "eval_clips": 32},
}  # fmt: skip


def best_order(estimates: Tensor, truth: Tensor) -> Tensor:
    """Two estimates [2, samples], in the order that is nearer to the truth."""
    swapped = estimates.flip(0)
    return estimates if (estimates - truth).norm() <= (swapped - truth).norm() else swapped


class Separate(Downstream):
    name = "separate"
    measures = "SDR, SIR and SAR (BSS Eval v3), beside the mixture and the oracle mask"
    presets = PRESETS
    needs_labels = False

    def samples(self, source: Source, *, train: bool) -> Mixed:
        return Mixed(super().samples(source, train=train))

    def build(self, *, weights: bool = False) -> Separator:
        return Separator(self.build_encoder(weights=weights))

    def flop(self) -> int:
        return SOURCES * super().flop()  # each picture of a mixture is a pass of its own

    def mixed(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Images [2B, 3, H, W], waveforms [2B, 1, samples] of the sources, and of their mixtures, likewise.

        Sources of a mixture follow each other.
        """
        image, sources = batch.image.to(device).flatten(0, 1), batch.waveform.to(device)
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
        columns = dict(zip(names, values.T.tolist(), strict=True))
        samples = samples_of(source, index, columns["SDR"], **columns)
        return Result(dict(zip(names, values.nanmean(0).tolist(), strict=True)), samples)

    def draw(self, model: Separator, loader: ClipLoader, rows: list[int], path: Path) -> None:
        image, sources, mixture = self.mixed(loader.some(rows), device_of(model))
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
