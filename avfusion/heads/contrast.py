"""Retrieval and localisation: pictures and sounds in one space, where those of the same clip are alike.

    s[i, j] = max over patches p of cos(W_v x_image[i, p], W_a mean(x_audio[j])),   loss: InfoNCE over clips, both ways

so that the patch that decides is where the sound comes from.

Source: multiple-instance contrastive learning as in EZ-VSL, https://arxiv.org/abs/2203.09324.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfusion.model import DeepAVFusion, ViT


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
        x_image, x_audio = _alone(self.encoder.image, image), _alone(self.encoder.audio, audio)
        return F.normalize(self.image_proj(x_image), dim=-1), F.normalize(self.audio_proj(x_audio.mean(1)), dim=-1)


def _alone(vit: ViT, x: Tensor) -> Tensor:
    x = vit.embed(x, None)
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)


def similarity(patches: Tensor, sound: Tensor) -> Tensor:
    """[B, n_v, dim], [C, dim] -> [B, C]: of the best patch of each picture with each sound."""
    return torch.einsum("bpd,cd->bcp", patches, sound).amax(-1)


def info_nce(similarity: Tensor, temperature: float) -> Tensor:
    """Cross entropy of finding the own sound for each picture and the own picture for each sound; [B, B] -> scalar."""
    logits, own = similarity / temperature, torch.arange(len(similarity), device=similarity.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
