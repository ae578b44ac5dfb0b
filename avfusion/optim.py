"""The paper's optimiser: AdamW whose rate follows the epoch, and rises slowly for pre-trained weights."""

import math
from collections.abc import Iterable

import torch
from torch import nn


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


def rate(epoch: float, epochs: float, warmup: float) -> float:
    """The share of the full learning rate at a fractional epoch: linear warm-up, then half a cosine to 0."""
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(epochs - warmup, 1e-9)))


def rise(epoch: float, epochs: float) -> float:
    """What pre-trained weights get of that: from 0 to 1 by a cosine over the first half of the run, then 1."""
    return 0.5 * (1 - math.cos(math.pi * min(epoch / (epochs / 2), 1)))


def set_rate(optimizer: torch.optim.Optimizer, lr: float, epoch: float, epochs: float, warmup: float) -> float:
    """Set the groups' learning rates for a fractional epoch; returns the one of weights that start from scratch."""
    lr *= rate(epoch, epochs, warmup)
    for group in optimizer.param_groups:
        group["lr"] = lr * rise(epoch, epochs) if group["pretrained"] else lr
    return lr
