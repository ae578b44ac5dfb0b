"""The parts of a U-Net on patch tokens, with the release's state-dict keys."""

import torch
from torch import Tensor, nn

from avfusion.models.deepavfusion import DeepAVFusion


class DoubleConv(nn.Module):
    """Twice convolution, batch norm, ReLU: [B, in, h, w] -> [B, out, h, w]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        layers = []
        for channels in (in_channels, out_channels):
            layers += [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels),
                       nn.ReLU(inplace=True)]  # fmt: skip
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Up(nn.Module):
    """`factor` times larger by a transposed convolution, joined with what has that size already, and convolved."""

    def __init__(self, in_channels: int, out_channels: int, *, factor: int = 2, joined: int = 0):
        super().__init__()
        inner = in_channels // factor
        self.up = nn.ConvTranspose2d(in_channels, inner, factor, stride=factor)
        self.conv = DoubleConv(inner + joined, out_channels)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.conv(torch.cat((self.up(x), *others), dim=1))


def grid(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, rows * columns, D] -> [B, D, rows, columns]."""
    return tokens.transpose(1, 2).unflatten(2, size)


def spread(vector: Tensor, like: Tensor) -> Tensor:
    """[B, D] -> [B, D, h, w], the same everywhere, as large as `like`."""
    return vector[:, :, None, None].expand(-1, -1, *like.shape[2:])


def layers(count: int, depth: int) -> list[int]:
    """`count` layers of `depth`, evenly spaced from the first to the last, rounded down."""
    return [i * (depth - 1) // (count - 1) for i in range(count)]


def freeze_unread(encoder: DeepAVFusion) -> None:
    """The heads read image and audio tokens before their final norms: what comes later gets no gradient.

    Fusion tokens are read by layers with a fusion block alone: what the last one makes of them, or, where there is
    none, the tokens themselves, nothing reads.
    """
    fused = encoder.config.layers_with_fusion
    unread = f"fusion_blocks.{fused[-1]}." if fused else "fusion_tokens"
    for name, parameter in encoder.named_parameters():
        if name.startswith(("image.norm.", "audio.norm.", "fusion_norm.", unread)):
            parameter.requires_grad_(False)


def initialize(module: nn.Module) -> None:
    """What the release does to its decoders' linear layers and convolutions."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
