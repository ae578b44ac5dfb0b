"""Sound source localisation: where in the picture the sound comes from, the patches that are most like it.

Source: Senocak et al., CVPR 2018, https://arxiv.org/abs/1803.03849; what is learnt is what retrieval learns.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from avfusion.data.loader import Batch, ClipLoader
from avfusion.data.samples import Selection, Source
from avfusion.media.clip import Clip
from avfusion.media.transforms import whole_frame
from avfusion.metrics.localization import (
    consensus_iou,
    consensus_map,
    localization_scores,
    negative_audio_scores,
    universal_threshold,
)
from avfusion.models.heads.contrast import Contrast
from avfusion.models.heads.localization import attention_map, center_prior, similarity_map
from avfusion.tasks.downstream import SMALL, TRAINED, Prediction, samples_of
from avfusion.tasks.retrieval import Contrastive
from avfusion.training.task import Result, autocast, device_of, gathered
from avfusion.viz.plots import plot_clips

PRESETS = {
    "paper": TRAINED | {"batch_size": 128, "layout": "flickr-soundnet", "epochs": 30, "warmup_epochs": 3.0},
    "tiny": SMALL | {"data": "data/tiny-localize", "layout": "flickr-soundnet", "synth_clips": 1000,
                     "epochs": 10, "blr": 8e-3, "layer_decay": 1.0, "warmup_epochs": 1.0, "contrast_dim": 64,
                     "eval_epochs": 5},
    "synth-small": SMALL | {"data": "data/synth-small-localize", "layout": "flickr-soundnet", "synth_clips": 3000,
                            "synth_classes": 12, "epochs": 10, "blr": 8e-3, "layer_decay": 1.0, "warmup_epochs": 1.0,
                            "contrast_dim": 64, "eval_epochs": 5},
}  # fmt: skip


UNSEEN = ("silence", "noise", "other sound")


class Localize(Contrastive):
    name = "localize"
    measures = (
        "cIoU@0.5 and AUC, beside the pre-trained encoder's own maps and the centre of the picture; in `eval` also "
        "false alarms, where nothing that is seen makes the sound"
    )
    presets = PRESETS

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
            raise ValueError(f"{self.config.data.eval_data or self.config.data.path}: no clip of the split "
                             f"{self.config.data.eval_split} has boxes; use flickr-soundnet or vggss")  # fmt: skip
        return boxed

    def truth(self, source: Selection, index: list[int]) -> Tensor:
        """[B, 224, 224] as the metric wants it: in the part of the frame that the model sees."""
        annotators = 2 if source.source.layout == "flickr-soundnet" else 1
        return torch.stack([consensus_map(source.rows[i].extra["boxes"], annotators) for i in index])

    def transform(self, *, train: bool) -> Callable:
        """Boxes are in fractions of the whole frame, so evaluation does not crop."""
        return super().transform(train=True) if train else whole_frame(self.encoder_config.image_size)

    def unseen(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """Spectrograms of what nothing in the picture makes: silence, and white noise as loud as the clip's sound."""
        waveform = batch.waveform.to(device)
        rows = [
            torch.randn(waveform.shape[1:], generator=torch.Generator().manual_seed(i)) for i in batch.index.tolist()
        ]
        level = waveform.square().mean(-1, keepdim=True).sqrt()
        return {
            "silence": self.mel(torch.zeros_like(waveform)),
            "noise": self.mel(torch.stack(rows).to(device) * level),
        }

    def with_unseen(self, model: Contrast, batch: Batch, device: torch.device) -> Tensor:
        """Learnt maps [B, 4, rows, columns] with the clip's own sound, silence, noise and another clip's sound."""
        patches, own = model(*self.inputs(batch, device))
        sounds = [own, *(model.sound(x) for x in self.unseen(batch, device).values()), own.roll(1, 0)]
        maps = torch.einsum("bpd,kbd->bkp", patches, torch.stack(sounds))
        return maps.unflatten(2, self.encoder_config.image_grid).float().cpu()

    @torch.no_grad()
    def evaluate(self, model: Contrast, loader: ClipLoader, dtype: torch.dtype) -> Result:
        rows, device, source, more = [], device_of(model), loader.source, []
        for batch in loader:
            with autocast(device, dtype):
                maps = self.maps(model, *self.inputs(batch, device))
                if self.thorough:
                    more.append((batch.index, self.with_unseen(model, batch, device)))
            truth = self.truth(source, batch.index.tolist())
            rows.append((batch.index, torch.stack([consensus_iou(x, truth) for x in maps.values()], dim=1)))
        index, ciou = gathered(rows)
        columns = dict(zip(self.methods(), ciou.unbind(1), strict=True))
        summary = {
            f"{score} {name}": value
            for name, column in columns.items()
            for score, value in localization_scores(column).items()
        }
        if self.thorough and len(index) > 1:
            summary |= unseen_scores(gathered(more)[1])
        values = {f"cIoU {name}": column.tolist() for name, column in columns.items()}
        return Result(summary, samples_of(source, index, ciou[:, 0].tolist(), **values))

    def draw(self, model: Contrast, loader: ClipLoader, rows: list[int], path: Path) -> None:
        batch = loader.some(rows)
        image, audio = self.inputs(batch, device_of(model))
        with torch.no_grad():
            maps = self.maps(model, image, audio)
        truth = self.truth(loader.source, batch.index.tolist())
        values = consensus_iou(maps["contrast"], truth)
        plot_clips(path, image, audio, [f"cIoU {v:.2f}" for v in values.tolist()], {"annotated": truth} | maps)

    def predict(self, model: Contrast, clip: Clip) -> Prediction:
        """The learnt map [rows, columns] over the whole frame, cosines."""
        image, audio = self.inputs_of(clip, device_of(model), whole=True)
        return Prediction(maps={"sound source": self.maps(model, image, audio)["contrast"][0]})


def unseen_scores(maps: Tensor) -> dict[str, float]:
    """`negative_audio_scores` of each of `UNSEEN`, of maps [N, 4, rows, columns]: the clips' own sounds, and these.

    One threshold for all three is chosen on every other clip; the rest are scored.
    """
    chosen, scored = maps[::2].unbind(1), maps[1::2].unbind(1)
    threshold = universal_threshold(chosen[0], torch.cat(chosen[1:]))
    found = {"threshold": threshold}
    for name, negative in zip(UNSEEN, scored[1:], strict=True):
        scores = negative_audio_scores(scored[0], negative, threshold)
        found["hits"] = scores.pop("hits")  # the same each time
        found |= {f"{score} {name}": value for score, value in scores.items()}
    return found
