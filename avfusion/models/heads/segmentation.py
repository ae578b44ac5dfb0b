"""Audio-visual segmentation: a U-Net on image features of four layers, conditioned on pooled audio features.

    logits = UNet(LN(x_image of four layers) | mean(LN(W x_audio of the last layer)))      [B, classes, H, W]

State-dict keys and numbers are those of the authors' release.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfusion.models.deepavfusion import DeepAVFusion
from avfusion.models.heads.unet import DoubleConv, Up, freeze_unread, grid, initialize, layers, spread

LEVELS = 4


class Segmenter(nn.Module):
    """An encoder and the U-Net; `num_classes` counts the background, and is 1 where there is only "sounds".

    Raises ValueError where the encoder's patches are not 16 wide, since the U-Net ends sixteen times larger than their
    grid.
    """

    def __init__(self, encoder: DeepAVFusion, num_classes: int):
        super().__init__()
        config, dim = encoder.config, encoder.config.dim
        if config.patch_size != 16:
            raise ValueError(f"Segmenter: expected patches of 16, got patch_size = {config.patch_size}")
        self.encoder = encoder
        widths = [max(128, dim >> level) for level in range(LEVELS)]
        self.normv = nn.ModuleList(nn.LayerNorm(dim) for _ in widths)
        self.proja = nn.ModuleList(nn.Linear(dim, width) for width in widths)
        self.norma = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.top = DoubleConv(dim + widths[0], dim)
        self.lat = nn.ModuleList(Up(dim, width, factor=2**i) for i, width in enumerate(widths[1:], 1))
        inputs = [dim, *widths[1:-1]]
        self.up = nn.ModuleList(Up(i, o, joined=2 * o) for i, o in zip(inputs, widths[1:], strict=True))
        enlarge = nn.Upsample(scale_factor=2, mode="bilinear")
        self.predictor = nn.Sequential(nn.Conv2d(widths[-1], 128, 3, padding=1), enlarge,
                                       nn.Conv2d(128, num_classes, 3, padding=1))  # fmt: skip
        for part in (self.proja, self.top, self.lat, self.up, self.predictor):
            initialize(part)
        freeze_unread(encoder)

    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        """image [B, 3, H, W], audio [B, 1, mels, frames] -> logits [B, num_classes, H, W]."""
        *_, embs = self.encoder(image, audio, return_embs=True)
        config = self.encoder.config
        x_image = [grid(norm(embs[layer][0]), config.image_grid)
                   for norm, layer in zip(self.normv, layers(LEVELS, config.depth), strict=True)]  # fmt: skip
        sound = [norm(proj(embs[-1][1])).mean(1) for norm, proj in zip(self.norma, self.proja, strict=True)]
        x = self.top(torch.cat((x_image[0], spread(sound[0], x_image[0])), dim=1))
        for i in range(LEVELS - 1):
            lateral = self.lat[i](x_image[i + 1])
            x = self.up[i](x, lateral, spread(sound[i + 1], lateral))
        return self.predictor(x)


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross entropy of logits [B, C, H, W] and class indices [B, H, W]; with C = 1 the binary one, masks 0 or 1."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], masks.to(logits.dtype))
    return F.cross_entropy(logits, masks.long())
