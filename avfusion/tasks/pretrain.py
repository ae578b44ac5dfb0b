"""Masked audio-visual pre-training (Eqs. 12-14) as a task: `AVMAE`, probed by nearest neighbours on the way."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from avfusion.checkpoint import load_unimodal
from avfusion.config import PretrainConfig
from avfusion.data.loader import Batch, ClipLoader, Source
from avfusion.mae import AVMAE
from avfusion.model import DeepAVFusion
from avfusion.optim import adamw
from avfusion.plots import plot_reconstructions
from avfusion.probe import probe
from avfusion.tasks.task import Result, Task, clips_of, one_label


class Pretrain(Task):
    name = "pretrain"

    def __init__(self, config: PretrainConfig):
        super().__init__(config, config.encoder())
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
        return adamw(model, weight_decay=self.config.weight_decay, betas=self.config.betas, pretrained=started)

    def prepare(self, batch: Batch, epoch: int, device: torch.device) -> tuple[Tensor, ...]:
        """Image, spectrogram and the noise that decides masks."""
        noise = (x.to(device, non_blocking=True) for x in self.mask_noise(epoch, batch.index))
        return *self.inputs(batch, device), *noise

    def losses(self, model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
        loss_image, loss_audio, *_ = model(*inputs, predict=False)
        return {"image": loss_image, "audio": loss_audio}

    def outputs(self, model: AVMAE, image: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        return model(image, audio, predict=False)[:2]

    def mask_noise(self, epoch: int, index: Tensor) -> list[Tensor]:
        """What decides the masks of clips `index` [B]: uniform [B, image patches] and [B, audio patches].

        It is a function of (seed, epoch, clip): a counter-based generator is placed there.
        """
        sizes, key = [rows * columns for rows, columns in self.grids], [self.config.seed, epoch]
        rows = [
            np.random.Generator(np.random.Philox(key=key, counter=[0, clip, 0, 0])).random(sum(sizes))
            for clip in index.tolist()
        ]
        return list(torch.from_numpy(np.stack(rows)).split(sizes, dim=1))

    def evaluated(self, source: Source) -> Sequence[int]:
        """Clips with one label, whose neighbours can be compared; where none has, any, to draw."""
        return [i for i, row in enumerate(source.rows) if one_label(row) is not None] or range(len(source.rows))

    def evaluate(self, model: AVMAE, loader: ClipLoader, dtype: torch.dtype) -> Result:
        """Leave-one-out nearest neighbours of labelled clips (the paper's Fig. 3); nothing where none has a label."""
        return Result(probe(model.encoder, loader, self.mel, dtype) if loader.source.has_labels else {})

    def draw(self, model: AVMAE, loader: ClipLoader, rows: list[int], path: Path) -> None:
        """Input, masked and reconstructed frames and spectrograms."""
        batch = clips_of(loader, rows)
        image, audio = self.inputs(batch, model.encoder.fusion_tokens.device)
        generator = torch.Generator().manual_seed(0)
        noise = (
            torch.rand(len(image), rows * columns, generator=generator).to(image.device) for rows, columns in self.grids
        )
        plot_reconstructions(path, *model.reconstruct(image, audio, *noise))
