"""Retrieval: which picture and which sound belong together. Localisation learns the same, and asks where.

Source: Mo & Morgado, CVPR 2024, https://arxiv.org/abs/2312.01017; the loss is `avfusion.models.heads.contrast`'s.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from avfusion import distributed
from avfusion.common import setting
from avfusion.data.loader import ClipLoader
from avfusion.embedding.embed import pooled_features
from avfusion.media.clip import Clip
from avfusion.metrics.neighbours import neighbour_scores
from avfusion.metrics.retrieval import paired_ranks, retrieval_scores
from avfusion.models.heads.contrast import Contrast, info_nce, similarity
from avfusion.tasks.downstream import SMALL, TRAINED, Downstream, DownstreamConfig, Prediction, samples_of
from avfusion.training.task import Result, autocast, device_of, gathered
from avfusion.viz.plots import plot_clips


@dataclass(frozen=True)
class ContrastConfig(DownstreamConfig):
    """Retrieval and localisation: the picture and the sound of a clip are to be alike."""

    contrast_dim: int = setting(256, "width of the space in which pictures and sounds are compared", least=1)
    temperature: float = setting(0.1, "of the softmax over clips")

    def check_new(self) -> None:
        if self.optim.accumulation != 1:
            raise ValueError(f"accumulation={self.optim.accumulation}: each clip is told from all others of its step, "
                             "which parts would not be; take a smaller batch, or more processes")  # fmt: skip


PRESETS = {
    "paper": TRAINED | {"batch_size": 128, "epochs": 30, "warmup_epochs": 3.0},
    "tiny": SMALL | {"data": "data/tiny", "synth_clips": 1000, "epochs": 8, "blr": 8e-3, "warmup_epochs": 1.0,
                     "contrast_dim": 64, "eval_epochs": 8},
}  # fmt: skip


def joined(x: Tensor) -> Tensor:
    """[B, ...] of each process -> those of all, one after the other, and gradients go back to whose they are.

    Each process then computes the same loss of all clips; gradients are summed here and averaged by DDP and FSDP.
    """
    return _Joined.apply(x) if distributed.world_size() > 1 else x


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.rows = slice(dist.get_rank() * len(x), (dist.get_rank() + 1) * len(x))
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.rows]


class Contrastive(Downstream):
    settings = ContrastConfig
    needs_labels = False

    def build(self, *, weights: bool = False) -> Contrast:
        return Contrast(self.build_encoder(weights=weights), self.config.contrast_dim)

    def losses(self, model: nn.Module, image: Tensor, audio: Tensor) -> dict[str, Tensor]:
        patches, sound = model(image, audio)
        # Own pictures with the sounds of all processes, and then the rows of all: [clips of the step, the same].
        alike = joined(similarity(patches.float(), joined(sound.float())))
        return {"contrast": info_nce(alike, self.config.temperature)}


class Retrieve(Contrastive):
    """Find the picture of a sound and the sound of a picture; and, by the encoder alone, neighbours of one label."""

    name = "retrieve"
    measures = "recall at 1, 5 and 10, median rank, and nearest neighbours of the same label"
    presets = PRESETS

    @torch.no_grad()
    def evaluate(self, model: Contrast, loader: ClipLoader, dtype: torch.dtype) -> Result:
        """Pictures are compared by the mean of their patches, so that a gallery holds one vector each."""
        rows, device, source = [], device_of(model), loader.source
        for batch in loader:
            with autocast(device, dtype):
                patches, sound = model(*self.inputs(batch, device))
            rows.append((batch.index, patches.float().mean(1), sound.float()))
        index, pictures, sounds = gathered(rows)
        summary, count = retrieval_scores(sounds, pictures), len(index)
        summary |= {"chance_recall@10": min(10 / count, 1.0), "chance_median_rank": (count + 1) / 2}
        if sum(bool(row.all_labels) for row in source.rows) > 1:
            found = neighbour_scores(*pooled_features(model.encoder, loader, self.mel, dtype))
            summary |= {f"nearest_neighbour_{name}": value for name, value in found.items()}
        of_image, of_audio = (ranks.tolist() for ranks in paired_ranks(sounds, pictures))
        scores = [-(a + b) / 2 for a, b in zip(of_image, of_audio, strict=True)]
        return Result(summary, samples_of(source, index, scores, rank_of_image=of_image, rank_of_audio=of_audio))

    def draw(self, model: Contrast, loader: ClipLoader, rows: list[int], path: Path) -> None:
        image, audio = self.inputs(loader.some(rows), device_of(model))
        with torch.no_grad():
            patches, sound = model(image, audio)
        alike = patches.mean(1) @ sound.T
        titles = [f"likes sound {alike[i].argmax().item() + 1} of these\n(own {i + 1})" for i in range(len(alike))]
        plot_clips(path, image, audio, titles)

    def predict(self, model: Contrast, clip: Clip) -> Prediction:
        """How alike the clip's picture and sound are, and their vectors."""
        patches, sound = model(*self.inputs_of(clip, device_of(model)))
        picture = F.normalize(patches.mean(1), dim=-1)
        vectors = {"picture": picture[0].tolist(), "sound": sound[0].tolist()}
        return Prediction({"similarity": (picture @ sound.T).item()} | vectors)
