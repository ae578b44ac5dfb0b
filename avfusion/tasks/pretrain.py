"""Masked audio-visual pre-training (Eqs. 12-14): `AVMAE`, probed by nearest neighbours on the way.

Source: Mo & Morgado, CVPR 2024, https://arxiv.org/abs/2312.01017.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from avfusion import distributed
from avfusion.common import setting
from avfusion.data.loader import Batch, ClipLoader
from avfusion.data.samples import Selection, Source
from avfusion.embedding.embed import pooled_features
from avfusion.metrics.neighbours import neighbour_scores
from avfusion.models.checkpoint import load_unimodal
from avfusion.models.deepavfusion import DeepAVFusion, EncoderConfig
from avfusion.models.mae import AVMAE
from avfusion.training.config import TrainConfig
from avfusion.training.optim import adamw
from avfusion.training.task import Result, Task
from avfusion.viz.plots import plot_reconstructions
from avfusion.viz.run_page import show_run


@dataclass(frozen=True)
class PretrainConfig(TrainConfig):
    """A pre-training run: the encoder, the decoders, the masks."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder_dim: int = setting(512, "width of the decoders")
    decoder_depth: int = setting(8, "their layers")
    decoder_num_heads: int = setting(16, "their heads")
    image_mask_ratio: float = setting(0.75, "share of image patches that is hidden")
    audio_mask_ratio: float = setting(0.8, "share of spectrogram patches that is hidden")
    norm_loss: bool = setting(True, "normalise each target patch")
    image_weights: str = setting("", "pre-trained image ViT to start from: a file, or a name such as "
                                     "vit_base_patch16_224.mae that timm fetches")  # fmt: skip
    audio_weights: str = setting("", "pre-trained audio ViT to start from, likewise")


PRESETS = {
    "paper-vggsound": {"dtype": "bf16"},
    "paper-audioset": {"layout": "audioset", "split": "unbalanced_train", "eval_split": "eval", "batch_size": 2048,
                       "accumulation": 4, "fusion_attn_ratio": 1.0, "fusion_mlp_ratio": 4.0, "dtype": "bf16"},
    "tiny": {"data": "data/tiny", "synth_clips": 1000, "synth_classes": 6, "workers": 2, "dim": 96, "depth": 4,
             "num_heads": 4, "image_size": (64, 64), "fusion_tokens": 8, "image_agg_tokens": 4,
             "audio_agg_tokens": 4, "decoder_dim": 64, "decoder_depth": 2, "decoder_num_heads": 4, "epochs": 12,
             "batch_size": 32, "blr": 8e-3, "warmup_epochs": 2.0, "eval_epochs": 4},
    "synth-small": {"data": "data/synth-small", "synth_clips": 4000, "workers": 2, "dim": 128, "depth": 4,
                    "num_heads": 4, "image_size": (96, 96), "fusion": "dense", "decoder_dim": 64, "decoder_depth": 2,
                    "decoder_num_heads": 4, "epochs": 40, "batch_size": 32, "blr": 8e-3, "warmup_epochs": 2.0,
                    "eval_epochs": 10},
}  # fmt: skip


class Pretrain(Task):
    name = "pretrain"
    settings = PretrainConfig
    presets = PRESETS

    def __init__(self, config: PretrainConfig):
        super().__init__(config, config.encoder)
        self.grids = self.encoder_config.image_grid, self.encoder_config.audio_grid

    def build(self, *, weights: bool = False) -> AVMAE:
        """With `weights`, the ViTs start from what the settings name."""
        config, encoder = self.config, DeepAVFusion(self.encoder_config)
        for name in ("image", "audio"):
            if weights and getattr(config, f"{name}_weights"):
                load_unimodal(getattr(encoder, name), getattr(config, f"{name}_weights"))
        names = ("decoder_dim", "decoder_depth", "decoder_num_heads", "image_mask_ratio", "audio_mask_ratio",
                 "norm_loss")  # fmt: skip
        return AVMAE(encoder, **{name: getattr(config, name) for name in names})

    def optimizer(self, model: AVMAE) -> torch.optim.Optimizer:
        started = [f"encoder.{name}." for name in ("image", "audio") if getattr(self.config, f"{name}_weights")]
        optim = self.config.optim
        return adamw(model, weight_decay=optim.weight_decay, betas=optim.betas, pretrained=started)

    def prepare(self, batch: Batch, epoch: int, device: torch.device) -> tuple[Tensor, ...]:
        """Image, spectrogram and the noise that decides masks."""
        noise = (x.to(device, non_blocking=True) for x in self.mask_noise(epoch, batch.index))
        return *self.inputs(batch, device), *noise

    def mask_noise(self, epoch: int, index: Tensor) -> list[Tensor]:
        """What decides the masks of clips `index` [B]: uniform [B, image patches] and [B, audio patches].

        It is a function of (seed, epoch, clip): a counter-based generator is placed there.
        """
        sizes, key = [rows * columns for rows, columns in self.grids], [self.config.optim.seed, epoch]
        rows = [
            np.random.Generator(np.random.Philox(key=key, counter=[0, clip, 0, 0])).random(sum(sizes))
            for clip in index.tolist()
        ]
        return list(torch.from_numpy(np.stack(rows)).split(sizes, dim=1))

    def losses(self, model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
        loss_image, loss_audio, *_ = model(*inputs, predict=False)
        return {"image": loss_image, "audio": loss_audio}

    def outputs(self, model: AVMAE, image: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        return model(image, audio, predict=False)[:2]

    def open_evaluation(self) -> Selection:
        chosen = super().open_evaluation()
        if not _labelled(chosen):
            config = self.config.data
            distributed.say(
                f"{config.eval_data or config.path}: no labels, so that nearest neighbours are not compared"
            )
        return chosen

    def evaluated(self, source: Source) -> Sequence[int]:
        """Clips with labels, whose neighbours can be compared; where none has, any, to draw."""
        return [i for i, row in enumerate(source.rows) if row.all_labels] or range(len(source.rows))

    def evaluate(self, model: AVMAE, loader: ClipLoader, dtype: torch.dtype) -> Result:
        """Leave-one-out nearest neighbours of labelled clips (the paper's Fig. 3); nothing where none has a label."""
        return Result(self.neighbours(model.encoder, loader, dtype) if _labelled(loader.source) else {})

    def neighbours(self, encoder: DeepAVFusion, loader: ClipLoader, dtype: torch.dtype) -> dict[str, float]:
        """`neighbour_scores` of image, audio, fusion and joint features."""
        return neighbour_scores(*pooled_features(encoder, loader, self.mel, dtype))

    def draw(self, model: AVMAE, loader: ClipLoader, rows: list[int], path: Path) -> None:
        """Input, masked and reconstructed frames and spectrograms."""
        image, audio = self.inputs(loader.some(rows), model.encoder.fusion_tokens.device)
        generator = torch.Generator().manual_seed(0)
        noise = (
            torch.rand(len(image), rows * columns, generator=generator).to(image.device) for rows, columns in self.grids
        )
        plot_reconstructions(path, *model.reconstruct(image, audio, *noise))

    show_run = staticmethod(show_run)


def _labelled(source: Source) -> bool:
    """Whether nearest neighbours can be compared: several clips have labels."""
    return sum(bool(row.all_labels) for row in source.rows) > 1
