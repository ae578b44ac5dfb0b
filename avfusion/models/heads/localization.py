"""Where in the picture the sound comes from: maps from the pre-trained encoder alone. They have no weights."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from avfusion.models.deepavfusion import DeepAVFusion


def attention_map(encoder: DeepAVFusion, image: Tensor, audio: Tensor, layers: Sequence[int] | None = None) -> Tensor:
    """How much the fusion tokens look at each image patch: the marginal of their attention over audio-image pairs.

    Mean over heads, fusion tokens and `layers` (None: all that have a fusion block). image [B, 3, H, W] and audio
    [B, 1, mels, frames] as in `DeepAVFusion` -> [B, rows, columns] of the image's patch grid.

    Raises ValueError where a layer has no fusion block.
    """
    maps = encoder.attention_maps(image, audio)
    layers = list(maps) if layers is None else layers
    if not layers or not maps.keys() >= set(layers):
        raise ValueError(f"attention_map: layers = {layers}: expected some of {list(maps)}, which have a fusion block")
    beta = torch.stack([maps[layer][1].mean((1, 2)) for layer in layers]).mean(0)
    return beta.unflatten(1, encoder.config.image_grid)


@torch.no_grad()
def similarity_map(encoder: DeepAVFusion, image: Tensor, audio: Tensor) -> Tensor:
    """Cosine similarity of each image patch with the mean of the audio tokens, both after the encoder's final norms.

    image [B, 3, H, W] and audio [B, 1, mels, frames] as in `DeepAVFusion` -> [B, rows, columns] of the image's patch
    grid, in [-1, 1].
    """
    x_image, x_audio, _ = encoder(image, audio)
    return F.cosine_similarity(x_image, x_audio.mean(1, keepdim=True), dim=-1).unflatten(1, encoder.config.image_grid)


def center_prior(size: tuple[int, int] = (224, 224)) -> Tensor:
    """The baseline that knows neither picture nor sound: minus the squared distance from the centre, [rows, columns].

    The half of the picture above its median is a disc in the middle (an ellipse, if the picture is not square).
    """
    y, x = ((2 * torch.arange(side) + 1 - side) / side for side in size)
    return -(y[:, None] ** 2 + x**2)
