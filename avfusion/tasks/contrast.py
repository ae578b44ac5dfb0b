"""Retrieval and sound source localisation: both learn which picture and which sound belong together."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avfusion.clips import Clip
from avfusion.data.loader import ClipLoader, Source
from avfusion.heads.contrast import Contrast, info_nce, similarity
from avfusion.heads.localization import attention_map, center_prior, similarity_map
from avfusion.metrics.localization import consensus_iou, consensus_map, localization_scores
from avfusion.metrics.retrieval import paired_ranks, retrieval_scores
from avfusion.plots import plot_clips
from avfusion.probe import chance, leave_one_out_accuracy, pooled_features
from avfusion.tasks.downstream import Downstream, Prediction
from avfusion.tasks.task import Result, Selection, autocast, clips_of, device_of, gathered, whole_frame


def joined(x: Tensor) -> Tensor:
    """[B, ...] of each process -> those of all, one after the other, and gradients go back to whose they are.

    Each process then computes the same loss of all clips; gradients are summed here and averaged by DDP and FSDP.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    return _Joined.apply(x)


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

    @torch.no_grad()
    def evaluate(self, model: Contrast, loader: ClipLoader, dtype: torch.dtype) -> Result:
        """Pictures are compared by the mean of their patches, so that a gallery holds one vector each."""
        rows, device = [], device_of(model)
        for batch in loader:
            with autocast(device, dtype):
                patches, sound = model(*self.inputs(batch, device))
            rows.append((batch.index, patches.float().mean(1), sound.float()))
        index, pictures, sounds = gathered(rows)
        count, source = len(index), loader.source
        summary = retrieval_scores(sounds, pictures)
        summary |= {"chance_recall@10": min(10 / count, 1.0), "chance_median_rank": (count + 1) / 2}
        if source.has_labels:
            features, labels = pooled_features(model.encoder, loader, self.mel, dtype)
            summary |= {f"nearest_neighbour_{name}": leave_one_out_accuracy(x, labels) for name, x in features.items()}
            summary["nearest_neighbour_chance"] = chance(labels)
        ranks = paired_ranks(sounds, pictures)
        samples = [
            {"row": i, "clip": source.name(i), "score": -(a + b) / 2, "rank_of_image": a, "rank_of_audio": b}
            for i, a, b in zip(index.tolist(), *(r.tolist() for r in ranks), strict=True)
        ]
        return Result(summary, samples)

    def draw(self, model: Contrast, loader: ClipLoader, rows: list[int], path: Path) -> None:
        batch, device = clips_of(loader, rows), device_of(model)
        image, audio = self.inputs(batch, device)
        with torch.no_grad():
            patches, sound = model(image, audio)
        alike = patches.mean(1) @ sound.T
        titles = [f"likes sound {alike[i].argmax().item() + 1} of these\n(own {i + 1})" for i in range(len(alike))]
        plot_clips(path, image, audio, titles)

    @torch.no_grad()
    def predict(self, model: Contrast, clip: Clip) -> Prediction:
        """How alike the clip's picture and sound are, and their vectors."""
        patches, sound = model(*self.inputs_of(clip, device_of(model)))
        picture = torch.nn.functional.normalize(patches.mean(1), dim=-1)
        vectors = {"picture": picture[0].tolist(), "sound": sound[0].tolist()}
        return Prediction({"similarity": (picture @ sound.T).item()} | vectors)


class Localize(Contrastive):
    """Where in the picture the sound comes from: the patches that are most like it."""

    name = "localize"

    def methods(self) -> list[str]:
        """The learnt map, the same for the sound of another clip of the batch, the encoder's own two, the centre."""
        attention = ["attention"] if self.encoder_config.layers_with_fusion else []
        return ["contrast", "other sound", "similarity", *attention, "center"]

    def maps(self, model: Contrast, image: Tensor, audio: Tensor) -> dict[str, Tensor]:
        """Maps [B, rows, columns] of the `methods`, in their order."""
        patches, sound = model(image, audio)
        grid, encoder = self.encoder_config.image_grid, model.encoder
        sounds = {"contrast": sound, "other sound": sound.roll(1, 0)}
        maps = {name: torch.einsum("bpd,bd->bp", patches, x).unflatten(1, grid) for name, x in sounds.items()}
        maps["similarity"] = similarity_map(encoder, image, audio)
        if self.encoder_config.layers_with_fusion:
            maps["attention"] = attention_map(encoder, image, audio)
        maps["center"] = center_prior(grid).expand(len(image), -1, -1)
        return {name: maps[name].float().cpu() for name in self.methods()}

    def evaluated(self, source: Source) -> Sequence[int]:
        """Clips with boxes."""
        boxed = [i for i, row in enumerate(source.rows) if row.extra.get("boxes")]
        if not boxed:
            raise ValueError(f"{self.config.eval_data or self.config.data}: no clip of the split "
                             f"{self.config.eval_split} has boxes; use flickr-soundnet or vggss")  # fmt: skip
        return boxed

    def truth(self, source: Selection, index: list[int]) -> Tensor:
        """[B, 224, 224] as the metric wants it: in the part of the frame that the model sees."""
        annotators = 1 if source.source.layout == "vggss" else 2
        return torch.stack([consensus_map(source.rows[i].extra["boxes"], annotators) for i in index])

    def loader(self, source, batch_size, *, train, **options) -> ClipLoader:
        # Boxes are in fractions of the whole frame, so evaluation must not crop.
        loader = super().loader(source, batch_size, train=train, **options)
        if not train:
            loader.clips.transform = whole_frame(self.encoder_config.image_size)
        return loader

    @torch.no_grad()
    def evaluate(self, model: Contrast, loader: ClipLoader, dtype: torch.dtype) -> Result:
        rows, device, source = [], device_of(model), loader.source
        for batch in loader:
            with autocast(device, dtype):
                maps = self.maps(model, *self.inputs(batch, device))
            truth = self.truth(source, batch.index.tolist())
            rows.append((batch.index, torch.stack([consensus_iou(x, truth) for x in maps.values()], dim=1)))
        index, ciou = gathered(rows)
        summary = {
            f"{score} {name}": value
            for name, column in zip(self.methods(), ciou.unbind(1), strict=True)
            for score, value in localization_scores(column).items()
        }
        samples = [
            {"row": i, "clip": source.name(i), "score": values[0]}
            | {f"cIoU {name}": v for name, v in zip(self.methods(), values, strict=True)}
            for i, values in zip(index.tolist(), ciou.tolist(), strict=True)
        ]
        return Result(summary, samples)

    def draw(self, model: Contrast, loader: ClipLoader, rows: list[int], path: Path) -> None:
        batch = clips_of(loader, rows)
        image, audio = self.inputs(batch, device_of(model))
        with torch.no_grad():
            maps = self.maps(model, image, audio)
        truth = self.truth(loader.source, batch.index.tolist())
        values = consensus_iou(maps["contrast"], truth)
        plot_clips(path, image, audio, [f"cIoU {v:.2f}" for v in values.tolist()], {"annotated": truth} | maps)

    @torch.no_grad()
    def predict(self, model: Contrast, clip: Clip) -> Prediction:
        """The learnt map [rows, columns] over the whole frame, cosines."""
        image = whole_frame(self.encoder_config.image_size)(clip.frame)[None].to(device_of(model))
        _, audio = self.inputs_of(clip, image.device)
        return Prediction(maps={"sound source": self.maps(model, image, audio)["contrast"][0]})
