"""The paper's optimisers and their schedule: AdamW for training and fine-tuning, LARS for linear probes."""

import math
import re
from collections.abc import Iterable

import torch
from timm.optim import Lars
from torch import nn

from avfusion.models.deepavfusion import DeepAVFusion


def adamw(
    model: nn.Module, *, weight_decay: float, betas: tuple[float, float], pretrained: Iterable[str] = ()
) -> torch.optim.AdamW:
    """AdamW in up to four groups: with decay or, for biases and norms, without; pre-trained or not.

    `pretrained` are prefixes of parameter names. The rate is 0 until `set_rate` sets it.
    """
    groups, pretrained = {}, tuple(pretrained)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (parameter.ndim > 1, name.startswith(pretrained) if pretrained else False)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": weight_decay * decays, "pretrained": started}
            for (decays, started), parameters in groups.items()
        ],
        lr=0.0,
        betas=betas,
    )


def layer_decay_groups(model: nn.Module, *, decay: float = 0.75, weight_decay: float = 0.05) -> list[dict]:
    """Parameter groups for fine-tuning: the deeper a layer of the encoder, the more of the learning rate it gets.

    The share is decay ** (depth - l) for layer l = 0, ..., depth - 1, the same for its image, audio and fusion block;
    decay ** (depth + 1) for patch embeddings and fusion tokens; 1 for final norms and for all that is not the
    encoder's. Biases and norms have no weight decay, and parameters that need no gradient are left out.

    `model` is a `DeepAVFusion`, or has one as `model.encoder`. The groups are for AdamW; `set_rate` reads `lr_scale`.
    Source: BEiT, https://arxiv.org/abs/2106.08254, as MAE fine-tunes.
    """
    prefix, encoder = ("", model) if isinstance(model, DeepAVFusion) else ("encoder.", model.encoder)
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            below = _layers_below(name.removeprefix(prefix), encoder.config.depth) if name.startswith(prefix) else 0
            groups.setdefault((below, parameter.ndim > 1), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay * decays, "lr_scale": decay**below}
        for (below, decays), parameters in groups.items()
    ]


def _layers_below(name: str, depth: int) -> int:
    """How many layers below the heads a parameter of the encoder lies."""
    if name.startswith(("image.patch_embed.", "audio.patch_embed.", "fusion_tokens")):
        return depth + 1
    block = re.match(r"(?:image\.|audio\.|fusion_)blocks\.(\d+)\.", name)
    return depth - int(block[1]) if block else 0


def lars(model: nn.Module, *, momentum: float = 0.9, trust_coefficient: float = 0.001) -> Lars:
    """LARS as in MAE's linear probe, for all parameters that need a gradient g:

        m = momentum * m + q * g,   w = w - lr * m,   q = trust_coefficient * |w| / |g|

    with q = 1 for biases and norms, and where |w| or |g| is 0. No weight decay. The rate is 0 until `set_rate` sets it.
    Source: You et al., https://arxiv.org/abs/1708.03888.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in parameters if (p.ndim > 1) == adapts], "always_adapt": adapts}
              for adapts in (True, False)]  # fmt: skip
    return Lars(groups, lr=0.0, momentum=momentum, trust_coeff=trust_coefficient, eps=0.0)


def rate(epoch: float, epochs: float, warmup: float) -> float:
    """The share of the full learning rate at a fractional epoch: linear warm-up, then half a cosine to 0."""
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1e-9)))


def rise(epoch: float, epochs: float) -> float:
    """What pre-trained weights get of that: from 0 to 1 by a cosine over the first half of the run, then 1."""
    return 0.5 * (1 - math.cos(math.pi * min(epoch / (epochs / 2), 1)))


def set_rate(optimizer: torch.optim.Optimizer, lr: float, epoch: float, epochs: float, warmup: float) -> float:
    """Set the groups' learning rates for a fractional epoch; returns the one of weights that start from scratch.

    Groups with `pretrained` rise slowly, and groups with `lr_scale` get that share.
    """
    lr *= rate(epoch, epochs, warmup)
    for group in optimizer.param_groups:
        share = rise(epoch, epochs) if group.get("pretrained") else 1.0
        wanted = lr * share * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], torch.Tensor):  # a CUDA graph reads it where it is
            group["lr"].fill_(wanted)
        else:
            group["lr"] = wanted
    return lr
