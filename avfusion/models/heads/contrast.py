"""Retrieval and localisation: pictures and sounds in one space, where those of the same clip are alike.

    c[i, p, j] = cos(W_v x_image[i, p], W_a mean(x_audio[j])),   s[i, j] = (max over p of c + mean over p of c) / 2
    loss: InfoNCE of s over clips, both ways

so that the patch that decides is where the sound comes from. The mean gives every patch a gradient: with the maximum
alone, training hardly begins.

Source: multiple-instance contrastive learning as in EZ-VSL, https://arxiv.org/abs/2203.09324, which takes the maximum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfusion.models.deepavfusion import DeepAVFusion, ViT


class Contrast(nn.Module):
    """An encoder, and a projection of each modality. Each clip's picture and sound are encoded without the other.

    The fusion tokens would tell either modality about the other one, and every pair would be alike.
    """

    def __init__(self, encoder: DeepAVFusion, dim: int):
        super().__init__()
        self.encoder = encoder
        self.image_proj = nn.Linear(encoder.config.dim, dim)
        self.audio_proj = nn.Linear(encoder.config.dim, dim)
        for part in (encoder.fusion_blocks, encoder.fusion_norm):
            part.requires_grad_(False)
        encoder.fusion_tokens.requires_grad_(False)

    def forward(self, image: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """image [B, 3, H, W], audio [B, 1, mels, frames] -> unit vectors: patches [B, n_v, dim], sound [B, dim]."""
        return F.normalize(self.image_proj(alone(self.encoder.image, image)), dim=-1), self.sound(audio)

    def sound(self, audio: Tensor) -> Tensor:
        """The sounds alone: unit vectors [B, dim]."""
        return F.normalize(self.audio_proj(alone(self.encoder.audio, audio).mean(1)), dim=-1)


def alone(vit: ViT, x: Tensor) -> Tensor:
    """One modality's tokens [B, N, D] by its own blocks, which see no fusion tokens."""
    x = vit.embed(x, None)
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)


def similarity(patches: Tensor, sound: Tensor) -> Tensor:
    """[B, n_v, dim], [C, dim] -> [B, C]: of each picture with each sound, its best patch and the mean one together."""
    cosines = torch.einsum("bpd,cd->bcp", patches, sound)
    return (cosines.amax(-1) + cosines.mean(-1)) / 2


def info_nce(similarity: Tensor, temperature: float) -> Tensor:
    """Cross entropy of finding the own sound for each picture and the own picture for each sound; [B, B] -> scalar."""
    logits, own = similarity / temperature, torch.arange(len(similarity), device=similarity.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
