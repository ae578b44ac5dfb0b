"""Source separation: a U-Net on the mixture's audio features, conditioned on the picture of the wanted source.

    logits = UNet(LN(x_audio of five layers of the mixture) | mean(LN(x_image of the last layer)))

State-dict keys and numbers are those of the authors' release.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfusion.models.deepavfusion import DeepAVFusion
from avfusion.models.heads.unet import DoubleConv, Up, freeze_unread, grid, initialize, layers, spread

LEVELS = 5


class UNet(nn.Module):
    """From the coarsest level, 5, at the size of the patch grid, to level 1, sixteen times larger."""

    def __init__(self, dim: int):
        super().__init__()
        self.xv_norm = nn.LayerNorm(dim)
        self.xa_norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(LEVELS))
        self.top = DoubleConv(2 * dim, dim)
        for level in range(LEVELS, 0, -1):
            width = dim >> (LEVELS - level)
            self.add_module(f"cond{level}", nn.Linear(dim, width))
            if level < LEVELS:
                self.add_module(f"lat{level}", Up(dim, width, factor=2 ** (LEVELS - level)))
                self.add_module(f"up{level}", Up(2 * width, width, joined=2 * width))
        self.pred = nn.Conv2d(dim >> (LEVELS - 1), 1, 3, padding=1)
        initialize(self)

    def forward(self, x_audio: list[Tensor], x_image: Tensor, size: tuple[int, int]) -> Tensor:
        """x_audio: tokens [B, n_a, D] of five layers, the last first; x_image [B, n_v, D]; size: of the patch grid."""
        features = [grid(norm(x), size) for norm, x in zip(self.xa_norm, x_audio, strict=True)]
        picture = self.xv_norm(x_image).mean(1)
        x = self.top(torch.cat((features[-1], spread(self.cond5(picture), features[-1])), dim=1))
        for level in range(LEVELS - 1, 0, -1):
            lateral = getattr(self, f"lat{level}")(features[level - 1])
            condition = spread(getattr(self, f"cond{level}")(picture), lateral)
            x = getattr(self, f"up{level}")(x, lateral, condition)
        return self.pred(x)


class Separator(nn.Module):
    """An encoder and the U-Net.

    Raises ValueError where the encoder's patches are not 16 wide, since the U-Net ends sixteen times larger than their
    grid, or its width is no multiple of 16.
    """

    def __init__(self, encoder: DeepAVFusion):
        super().__init__()
        config = encoder.config
        if config.patch_size != 16 or config.dim % 16:
            raise ValueError(f"Separator: expected patches of 16 and a width of a multiple of 16, got patch_size = "
                             f"{config.patch_size}, dim = {config.dim}")  # fmt: skip
        self.encoder = encoder
        self.avss_decoder = UNet(config.dim)
        freeze_unread(encoder)

    def forward(self, image: Tensor, mixture: Tensor) -> Tensor:
        """image [B, 3, H, W], mixture [B, 1, mels, frames] (log10 of power) -> mask logits [B, 1, mels, frames]."""
        *_, embs = self.encoder(image, mixture, return_embs=True)
        config = self.encoder.config
        x_audio = [embs[layer][1] for layer in reversed(layers(LEVELS, config.depth))]
        return self.avss_decoder(x_audio, embs[-1][0], config.audio_grid)


def separation_loss(logits: Tensor, masks: Tensor, mixture: Tensor | None = None) -> Tensor:
    """Binary cross entropy of mask logits [B, 1, mels, frames], weighted by the mixture's power p: clamp(log(1 + p)).

    `masks` are targets in [0, 1], `mixture` is log10(p); without it all weigh alike. The weights are kept within
    [1e-3, 10].
    """
    weight = None if mixture is None else torch.log1p(10**mixture).clamp(1e-3, 10)
    return F.binary_cross_entropy_with_logits(logits, masks, weight)
