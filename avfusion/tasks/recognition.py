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
from avfusion.data.samples import Selection, Source, Tensors, Views
from avfusion.data.tags import Tags, tag_matrix
from avfusion.media.clip import Clip
from avfusion.metrics.recognition import multilabel_scores, top_k_accuracy
from avfusion.metrics.tagging import SUBSETS, modality_confusion, tagging_scores
from avfusion.models.heads.classifier import MODALITIES, Classifier, class_loss, log_prior
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
    smoothing: float = setting(0.1, "label smoothing")


# The part of AudioSet with about as many clips of each class.
AUDIOSET = {"layout": "audioset", "split": "balanced_train", "eval_split": "eval"}
PROBE_PRESETS = {
    "paper": {"epochs": 60, "batch_size": 1024, "accumulation": 4, "blr": 0.3, "warmup_epochs": 10.0},
    "paper-audioset": AUDIOSET | {"epochs": 300, "batch_size": 512, "blr": 0.3, "warmup_epochs": 20.0},
    "tiny": SMALL | {"data": "data/tiny", "synth_clips": 1000, "epochs": 8, "blr": 16.0, "warmup_epochs": 1.0,
                     "eval_epochs": 5},
}  # fmt: skip


FINETUNE_PRESETS = {
    "paper": TRAINED | {"epochs": 100, "accumulation": 4, "warmup_epochs": 20.0, "drop_path": 0.2},
    "paper-audioset": TRAINED | AUDIOSET | {"epochs": 200, "accumulation": 4, "warmup_epochs": 20.0, "drop_path": 0.2},
    "tiny": SMALL | {"data": "data/tiny", "synth_clips": 1000, "epochs": 8, "blr": 8e-3, "warmup_epochs": 1.0,
                     "drop_path": 0.1, "mixup": 0.2, "eval_epochs": 4},
}  # fmt: skip


class Recognition(Downstream):
    """What probe and fine-tuning share. Clips with one label count by cross entropy, with several by a binary one."""

    measures = "top-1 and top-5 accuracy; for several labels a clip mAP, AUC and d-prime; of each modality too"
    freeze_encoder: bool
    views = 0  # windows spread over 10 s of a clip, whose logits an evaluation averages beside the middle one's
    tags: Tags | None = None  # what is heard and what is seen, for an evaluation

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

    def evaluate(self, model: Classifier, loader: ClipLoader, dtype: torch.dtype) -> Result:
        index, logits, target = self.logits(model, loader, dtype)
        single, source = not multi_label(loader.source), loader.source
        summary = self.scores(logits, target, single)
        # Of always naming the most frequent class; of random scores.
        summary["chance"] = (target.mean(0).max() if single else target.mean(0)[target.sum(0) > 0].mean()).item()
        if self.views:
            windows = Views(self.samples(source, train=False), self.views)
            batch = max(loader.sampler.batch_size // self.views, 1)
            spread = ClipLoader(Tensors(windows, self.transform(train=False)), batch, train=False,
                                num_workers=self.config.data.workers)  # fmt: skip
            index, logits, target = self.logits(model, spread, dtype)
            found = self.scores(logits, target, single)
            summary |= {f"{score} ({self.views} views)": value for score, value in found.items()}
        if self.tags is not None:
            summary |= self.tagging(model, source, loader.sampler.batch_size, dtype)
        chance = logits.mean(1).softmax(1) if single else logits.mean(1).sigmoid()
        score = (chance * target).sum(1) / target.sum(1).clamp(min=1)
        labels = ["; ".join(self.classes[i] for i in row.nonzero().flatten().tolist()) for row in target > 0]
        predicted = [self.classes[i] for i in logits.mean(1).argmax(1).tolist()]
        scores = [round(s, 6) for s in score.tolist()]
        return Result(summary, samples_of(source, index, scores, labels=labels, predicted=predicted))

    @torch.no_grad()
    def logits(self, model: Classifier, loader: ClipLoader, dtype: torch.dtype) -> list[Tensor]:
        """Of every clip: its row, the logits of each modality [N, 3, C], averaged over its windows, targets [N, C]."""
        rows, device = [], device_of(model)
        for batch in loader:
            image, audio = self.inputs(batch, device)
            windows = 1
            if image.ndim == 5:
                windows, image, audio = image.shape[1], image.flatten(0, 1), audio.flatten(0, 1)[:, None]
            with autocast(device, dtype):
                logits = torch.stack(model(image, audio), dim=1)
            target = F.one_hot(batch.label.clamp(min=0), len(self.classes)) if batch.labels is None else batch.labels
            rows.append((batch.index, logits.float().unflatten(0, (-1, windows)).mean(1), target.float()))
        return gathered(rows)

    def scores(self, logits: Tensor, target: Tensor, single: bool) -> dict[str, float]:
        """Of the averaged logits, and the first of these scores of each modality."""
        if single:
            ks = tuple(k for k in (1, 5) if k <= len(self.classes))
            found, each = top_k_accuracy(logits.mean(1), target.argmax(1), ks), ("top-1",)
        else:
            found, each = multilabel_scores(logits.mean(1), target), ("mAP", "AUC")
        for name, own in zip(MODALITIES, logits.unbind(1), strict=True):
            of_one = top_k_accuracy(own, target.argmax(1), (1,)) if single else multilabel_scores(own, target)
            found |= {f"{score} {name}": of_one[score] for score in each}
        return found

    def tagged(self, source: Source) -> Selection:
        """The clips that have tags. Raises ValueError where none has."""
        chosen = [i for i, row in enumerate(source.rows) if row.id in self.tags]
        if not chosen:
            raise ValueError(f"--tags: none of its {len(self.tags)} clips is among the {len(source.rows)} evaluated")
        return Selection(source, chosen)

    def open_evaluation(self) -> Selection:
        chosen = super().open_evaluation()
        if self.tags is not None:  # told before the long work
            tag_matrix(self.tags, self.tagged(chosen).rows, self.classes, SUBSETS["all"])
        return chosen

    @torch.no_grad()
    def tagging(self, model: Classifier, source: Source, batch_size: int, dtype: torch.dtype) -> dict[str, float]:
        """`tagging_scores` and `modality_confusion` of the clips that have tags, as VGGSounder measures.

        "both" is told all, "audio" the sound and a picture that is the mean of ImageNet's, "image" the picture and
        silence; each is scored against the labels that it can know, AV, A and V.
        """
        given, device, source = ("both", "audio", "image"), device_of(model), self.tagged(source)
        truth = {name: tag_matrix(self.tags, source.rows, self.classes, marks) for name, marks in SUBSETS.items()}
        found = []
        for batch in self.loader(source, batch_size, train=False):
            image, audio = self.inputs(batch, device)
            silence = self.mel(torch.zeros_like(batch.waveform, device=device))
            inputs = (image, audio), (torch.zeros_like(image), audio), (image, silence)
            with autocast(device, dtype):
                logits = torch.stack([model(*pair, average=True) for pair in inputs], dim=1)
            found.append((batch.index, logits.float()))
        index, logits = gathered(found)
        truth = {name: labels[index] for name, labels in truth.items()}  # clips that fail are left out
        scores, summary = dict(zip(given, logits.unbind(1), strict=True)), {"tagged clips": len(logits)}
        for name, subset in zip(given, ("AV", "A", "V"), strict=True):
            told = truth[subset].sum(1) > 0
            scored = tagging_scores(scores[name][told], truth[subset][told]) if told.any() else {}
            summary |= {f"{score} {name}": value for score, value in scored.items()}
        return summary | modality_confusion(truth["all"], scores)

    def draw(self, model: Classifier, loader: ClipLoader, rows: list[int], path: Path) -> None:
        batch, device = loader.some(rows), device_of(model)
        image, audio = self.inputs(batch, device)
        with torch.no_grad():
            logits = model(image, audio, average=True).float()
        titles = []
        for i, scores in zip(batch.index.tolist(), logits, strict=True):
            labels = loader.source.rows[i].all_labels
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
    """All weights trained: layer-wise rates, stochastic depth, mixup of pictures and sounds, label smoothing.

    Biases of the heads start at the classes' log priors; classes that the training list never shows count for nothing,
    and the others by `class_loss`.
    """

    name = "finetune"
    settings = FinetuneConfig
    presets = FINETUNE_PRESETS
    freeze_encoder = False
    share: Tensor | None = None  # of each class in the labels of the training list, [C]: known once that is open

    def open(self, *, make: bool = False) -> Source:
        source = super().open(make=make)
        self.share = class_share(source)
        return source

    def build(self, *, weights: bool = False) -> Classifier:
        model = super().build(weights=weights)
        if self.share is not None:
            for name in MODALITIES:
                getattr(model, f"{name}_head").bias.data.copy_(log_prior(self.share))
        return model

    def prepare(self, batch: Batch, epoch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, bool]:
        self.share = self.share.to(device)
        return super().prepare(batch, epoch, device)

    def losses(self, model: nn.Module, image: Tensor, audio: Tensor, target: Tensor, single: bool) -> dict[str, Tensor]:
        logits = model(image, audio, average=True).float()
        return {"class": class_loss(logits, target, self.share, single=single)}

    def mix(self, image: Tensor, audio: Tensor, target: Tensor, index: Tensor, epoch: int, single: bool):
        """Mix each clip with the one at the other end of the batch, by a share lambda ~ Beta(mixup, mixup) of its own.

        The share is a function of (seed, epoch, clip).
        """
        target = smoothed(target, self.config.smoothing)
        if self.config.mixup:
            seed, alpha = self.config.optim.seed, self.config.mixup
            draws = [np.random.default_rng(random_seed(seed, epoch, clip)).beta(alpha, alpha)
                     for clip in index.tolist()]  # fmt: skip
            share = torch.tensor(draws, dtype=image.dtype).to(image.device, non_blocking=True)
            image, audio, target = (mixed(x, share) for x in (image, audio, target))
        return image, audio, target


def class_share(source: Source) -> Tensor:
    """The share that each class has in all labels of a list, [C] float32."""
    labels = [label for row in source.rows for label in row.all_labels]
    if not labels:
        raise ValueError("none of the clips to train on has a label")
    return torch.bincount(torch.tensor(labels), minlength=len(source.classes)).float() / len(labels)


def smoothed(target: Tensor, smoothing: float) -> Tensor:
    """Targets [B, C], 0 or 1 -> smoothing / C, or 1 - smoothing + smoothing / C."""
    return target * (1 - smoothing) + smoothing / target.shape[1]


def mixed(x: Tensor, share: Tensor) -> Tensor:
    """x [B, ...] and its reverse along the batch, by the share [B] of each clip."""
    share = share.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return share * x + (1 - share) * x.flip(0)
