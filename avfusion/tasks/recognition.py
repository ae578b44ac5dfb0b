"""Recognition: which classes a clip shows, by a linear probe of the frozen encoder or by fine-tuning.

Source: Mo & Morgado, CVPR 2024, https://arxiv.org/abs/2312.01017; probe and fine-tuning as in MAE.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfusion.clips import Clip
from avfusion.data.loader import Batch, ClipLoader, random_seed
from avfusion.heads.classifier import Classifier
from avfusion.metrics.recognition import multilabel_scores, top_k_accuracy
from avfusion.optim import lars
from avfusion.plots import plot_clips
from avfusion.tasks.downstream import Downstream, Prediction
from avfusion.tasks.task import Result, autocast, clips_of, device_of, gathered


class Recognition(Downstream):
    """What probe and fine-tuning share. Clips with one label count by cross entropy, with several by a binary one."""

    freeze_encoder: bool

    def build(self, *, weights: bool = False) -> Classifier:
        return Classifier(self.build_encoder(weights=weights), len(self.classes), freeze_encoder=self.freeze_encoder)

    def targets(self, batch: Batch) -> tuple[Tensor, bool]:
        """[B, C], and whether each clip has exactly one label."""
        if batch.labels is not None:
            return batch.labels, False
        if (batch.label < 0).any():
            row = batch.index[batch.label < 0][0].item()
            raise ValueError(f"row {row} of the training data has no label")
        return F.one_hot(batch.label, len(self.classes)).to(batch.image.dtype), True

    def prepare(self, batch: Batch, epoch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, bool]:
        """Image, spectrogram, targets [B, C], and whether each clip has exactly one label."""
        target, single = self.targets(batch)
        target = target.to(device, non_blocking=True)
        return *self.mix(*self.inputs(batch, device), target, batch.index, epoch, single), single

    def losses(self, model: nn.Module, image: Tensor, audio: Tensor, target: Tensor, single: bool) -> dict[str, Tensor]:
        logits = model(image, audio, average=True).float()
        if single:
            return {"class": F.cross_entropy(logits, target)}
        return {"class": F.binary_cross_entropy_with_logits(logits, target)}

    def mix(self, image: Tensor, audio: Tensor, target: Tensor, index: Tensor, epoch: int, single: bool):
        return image, audio, target

    @torch.no_grad()
    def evaluate(self, model: Classifier, loader: ClipLoader, dtype: torch.dtype) -> Result:
        rows, device = [], device_of(model)
        for batch in loader:
            with autocast(device, dtype):
                logits = model(*self.inputs(batch, device), average=True)
            target = F.one_hot(batch.label.clamp(min=0), len(self.classes)) if batch.labels is None else batch.labels
            rows.append((batch.index, logits.float(), target.float()))
        index, logits, target = gathered(rows)
        single, source = not loader.clips.multi_label, loader.source
        if single:
            label = target.argmax(1)
            summary = top_k_accuracy(logits, label, tuple(k for k in (1, 5) if k <= len(self.classes)))
            counts = target.mean(0)
            summary["chance"] = counts.max().item()  # of always naming the most frequent class
        else:
            summary = multilabel_scores(logits, target)
            summary["chance"] = target.mean(0)[target.sum(0) > 0].mean().item()  # mAP of random scores
        chance = logits.softmax(1) if single else logits.sigmoid()
        score = (chance * target).sum(1) / target.sum(1).clamp(min=1)
        samples = [
            {"row": i, "clip": source.name(i), "score": round(s, 6), "labels": self._names(t > 0),
             "predicted": self.classes[g]}
            for i, s, t, g in zip(index.tolist(), score.tolist(), target, logits.argmax(1).tolist(), strict=True)
        ]  # fmt: skip
        return Result(summary, samples)

    def _names(self, which: Tensor) -> str:
        return "; ".join(self.classes[i] for i in which.nonzero().flatten().tolist())

    def draw(self, model: Classifier, loader: ClipLoader, rows: list[int], path: Path) -> None:
        batch, device = clips_of(loader, rows), device_of(model)
        image, audio = self.inputs(batch, device)
        with torch.no_grad():
            logits = model(image, audio, average=True).float()
        titles = []
        for i, scores in zip(batch.index.tolist(), logits, strict=True):
            row = loader.source.rows[i]
            labels = row.labels or (() if row.label is None else (row.label,))
            titles.append(f"is {'; '.join(self.classes[c] for c in labels)}\nsaid {self.classes[scores.argmax()]}")
        plot_clips(path, image, audio, titles)

    @torch.no_grad()
    def predict(self, model: Classifier, clip: Clip) -> Prediction:
        """The five most likely classes: name -> softmax of the averaged logits."""
        chance = model(*self.inputs_of(clip, device_of(model)), average=True)[0].float().softmax(0)
        best = zip(*(x.tolist() for x in chance.topk(min(5, len(self.classes)))), strict=True)
        return Prediction({"classes": {self.classes[i]: round(p, 6) for p, i in best}})


class Probe(Recognition):
    """Linear classifiers on the frozen encoder's pooled features, trained by LARS."""

    name = "probe"
    freeze_encoder = True

    def optimizer(self, model: Classifier) -> torch.optim.Optimizer:
        return lars(model)


class Finetune(Recognition):
    """All weights trained: layer-wise rates, stochastic depth, mixup of pictures and sounds, label smoothing."""

    name = "finetune"
    freeze_encoder = False

    def mix(self, image: Tensor, audio: Tensor, target: Tensor, index: Tensor, epoch: int, single: bool):
        """Mix each clip with the one at the other end of the batch by one share lambda ~ Beta(mixup, mixup).

        The share is a function of (seed, epoch, first clip).
        """
        if single:
            target = target * (1 - self.config.smoothing) + self.config.smoothing / target.shape[1]
        if self.config.mixup:
            rng = np.random.default_rng(random_seed(self.config.seed, epoch, int(index[0])))
            share = rng.beta(self.config.mixup, self.config.mixup)
            image, audio, target = (share * x + (1 - share) * x.flip(0) for x in (image, audio, target))
        return image, audio, target
