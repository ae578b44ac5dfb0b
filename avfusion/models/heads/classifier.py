"""Recognition: a linear classifier on each of the encoder's three outputs, for probing and for fine-tuning.

    logits[m] = Linear_m(Norm_m(mean over tokens of x[m]))        m in {image, audio, fusion}

State-dict keys and numbers are those of the authors' release.

Source: Mo & Morgado, CVPR 2024, https://arxiv.org/abs/2312.01017.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfusion.models.deepavfusion import DeepAVFusion

MODALITIES = ("image", "audio", "fusion")


class Classifier(nn.Module):
    """Three linear heads on pooled features; the encoder's weights are kept (a linear probe) or trained too.

    Args:
        encoder: is part of the module, not copied.
        num_classes: C, the number of classes.
        freeze_encoder: the encoder stays in eval mode and records no gradient, and a batch norm without affine weights
            normalises each pooled feature (`image_norm`, ...), as in MAE's linear probe. Fine-tuning has none.
    """

    def __init__(self, encoder: DeepAVFusion, num_classes: int, *, freeze_encoder: bool):
        super().__init__()
        self.encoder, self.freeze_encoder, dim = encoder, freeze_encoder, encoder.config.dim
        for name in MODALITIES:
            head = nn.Linear(dim, num_classes)
            nn.init.xavier_uniform_(head.weight)
            nn.init.zeros_(head.bias)
            self.add_module(f"{name}_head", head)
            if freeze_encoder:
                self.add_module(f"{name}_norm", nn.BatchNorm1d(dim, affine=False, eps=1e-6))
        if freeze_encoder:
            encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def forward(self, image: Tensor, audio: Tensor, average: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """image [B, 3, H, W], audio [B, 1, mels, frames] -> logits of image, audio and fusion features, each [B, C].

        With `average`, their mean [B, C]: what the release trains on and predicts by.
        """
        logits = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            features = self.encoder(image, audio)
        for name, x in zip(MODALITIES, features, strict=True):
            pooled = x.mean(1)
            if self.freeze_encoder:
                pooled = getattr(self, f"{name}_norm")(pooled)
            logits.append(getattr(self, f"{name}_head")(pooled))
        return torch.stack(logits).mean(0) if average else tuple(logits)


def log_prior(share: Tensor) -> Tensor:
    """What biases of the heads start at in fine-tuning: log((p + 1e-3) / (1 - p + 1e-3)) of a class's share p, [C]."""
    return torch.log((share + 1e-3) / (1 - share + 1e-3))


def class_loss(logits: Tensor, target: Tensor, share: Tensor, *, single: bool) -> Tensor:
    """The loss of fine-tuning, over the classes that the training list shows, by their share of it.

        single     mean over clips of the cross entropy,   times the mean over classes of 1 / share
        several    mean over clips and classes of the binary cross entropy / share

    Args:
        logits, target: [B, C]; targets are shares, mixed and smoothed.
        share: [C], of each class in the labels of the list; classes with a share of 0 count for nothing.
        single: clips have one label each.

    Source: the DeepAVFusion release. Where clips have one label, 1 / share is a factor that AdamW divides out again.
    """
    seen = share > 0
    weight = torch.where(seen, 1 / share, 0.0)
    if single:
        logits = logits.masked_fill(~seen, -torch.inf)
        log_p = logits.log_softmax(1).masked_fill(~seen, 0.0)  # a target may be smoothed over all classes
        return -(target * log_p).sum(1).mean() * weight.sum() / seen.sum()
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (loss * weight).sum(1).mean() / seen.sum()
