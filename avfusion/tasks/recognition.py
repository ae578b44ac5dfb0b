"""Recognition: which classes a clip shows, by a linear probe of the frozen encoder or by fine-tuning.

Source: Mo & Morgado, CVPR 2024, https://arxiv.org/abs/2312.01017; probe and fine-tuning as in MAE.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfusion.common import setting
from avfusion.data.loader import Batch, ClipLoader, multi_label
from avfusion.data.sampler import random_seed
from avfusion.media.clip import Clip
from avfusion.metrics.recognition import multilabel_scores, top_k_accuracy
from avfusion.models.heads.classifier import Classifier
from avfusion.tasks.downstream import SMALL, TRAINED, Downstream, DownstreamConfig, Prediction, samples_of
from avfusion.training.config import leaves
from avfusion.training.optim import lars
from avfusion.training.task import Result, autocast, device_of, gathered
from avfusion.viz.plots import plot_clips


@dataclass(frozen=True)
class ProbeConfig(DownstreamConfig):
    """A linear probe: the encoder stays as it is. LARS, without weight decay."""

    def check_new(self) -> None:
        defaults = {name: item.default for name, _, item in leaves(type(self))}
        for name, given in self.flat().items():
            if name in ("weight_decay", "betas", "layer_decay", "drop_path") and given != defaults[name]:
                raise ValueError(f"{name}={given}: a probe trains no encoder, and its heads by LARS without decay")


@dataclass(frozen=True)
class FinetuneConfig(DownstreamConfig):
    """Recognition with all weights trained."""

    mixup: float = setting(1.0, "alpha of the Beta distribution by which clips are mixed; 0: they are not")
    smoothing: float = setting(0.1, "label smoothing, where clips have one label each")


PROBE_PRESETS = {
    "paper": {"epochs": 60, "batch_size": 256, "blr": 0.3, "warmup_epochs": 10.0},
    "tiny": SMALL | {"data": "data/tiny", "synth_clips": 1000, "epochs": 8, "blr": 16.0, "warmup_epochs": 1.0,
                     "eval_epochs": 5},
}  # fmt: skip


FINETUNE_PRESETS = {
    "paper": TRAINED | {"epochs": 100, "warmup_epochs": 20.0, "drop_path": 0.2},
    "tiny": SMALL | {"data": "data/tiny", "synth_clips": 1000, "epochs": 8, "blr": 8e-3, "warmup_epochs": 1.0,
                     "drop_path": 0.1, "mixup": 0.2, "eval_epochs": 4},
}  # fmt: skip


class Recognition(Downstream):
    """What probe and fine-tuning share. Clips with one label count by cross entropy, with several by a binary one."""

    measures = "top-1 and top-5 accuracy; for several labels a clip mAP, AUC and d-prime"
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
        single, source = not multi_label(loader.source), loader.source
        if single:
            summary = top_k_accuracy(logits, target.argmax(1), tuple(k for k in (1, 5) if k <= len(self.classes)))
            summary["chance"] = target.mean(0).max().item()  # of always naming the most frequent class
        else:
            summary = multilabel_scores(logits, target)
            summary["chance"] = target.mean(0)[target.sum(0) > 0].mean().item()  # mAP of random scores
        chance = logits.softmax(1) if single else logits.sigmoid()
        score = (chance * target).sum(1) / target.sum(1).clamp(min=1)
        labels = ["; ".join(self.classes[i] for i in row.nonzero().flatten().tolist()) for row in target > 0]
        predicted = [self.classes[i] for i in logits.argmax(1).tolist()]
        scores = [round(s, 6) for s in score.tolist()]
        return Result(summary, samples_of(source, index, scores, labels=labels, predicted=predicted))

    def draw(self, model: Classifier, loader: ClipLoader, rows: list[int], path: Path) -> None:
        batch, device = loader.some(rows), device_of(model)
        image, audio = self.inputs(batch, device)
        with torch.no_grad():
            logits = model(image, audio, average=True).float()
        titles = []
        for i, scores in zip(batch.index.tolist(), logits, strict=True):
            row = loader.source.rows[i]
            labels = row.labels or (() if row.label is None else (row.label,))
            titles.append(f"is {'; '.join(self.classes[c] for c in labels)}\nsaid {self.classes[scores.argmax()]}")
        plot_clips(path, image, audio, titles)

    def predict(self, model: Classifier, clip: Clip) -> Prediction:
        """The five most likely classes and how likely they are, by the averaged logits.

        Where clips have one label each, probabilities add up to 1 (softmax); where they may have several, each is of
        that class being there (sigmoid).
        """
        logits = model(*self.inputs_of(clip, device_of(model)), average=True)[0].float()
        chance = logits.sigmoid() if self.multi_label else logits.softmax(0)
        best = zip(*(x.tolist() for x in chance.topk(min(5, len(self.classes)))), strict=True)
        return Prediction({"classes": {self.classes[i]: round(p, 6) for p, i in best}})


class Probe(Recognition):
    """Linear classifiers on the frozen encoder's pooled features, trained by LARS."""

    name = "probe"
    settings = ProbeConfig
    presets = PROBE_PRESETS
    freeze_encoder = True

    def optimizer(self, model: Classifier) -> torch.optim.Optimizer:
        return lars(model)


class Finetune(Recognition):
    """All weights trained: layer-wise rates, stochastic depth, mixup of pictures and sounds, label smoothing."""

    name = "finetune"
    settings = FinetuneConfig
    presets = FINETUNE_PRESETS
    freeze_encoder = False

    def mix(self, image: Tensor, audio: Tensor, target: Tensor, index: Tensor, epoch: int, single: bool):
        """Mix each clip with the one at the other end of the batch by one share lambda ~ Beta(mixup, mixup).

        The share is a function of (seed, epoch, first clip).
        """
        if single:
            target = target * (1 - self.config.smoothing) + self.config.smoothing / target.shape[1]
        if self.config.mixup:
            rng = np.random.default_rng(random_seed(self.config.optim.seed, epoch, int(index[0])))
            share = rng.beta(self.config.mixup, self.config.mixup)
            image, audio, target = (share * x + (1 - share) * x.flip(0) for x in (image, audio, target))
        return image, audio, target
