"""Features on disk."""

import hashlib
import json
import os
from dataclasses import dataclass, field

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from avfusion.common import writing
from avfusion.media.clip import ClipError
from avfusion.models.deepavfusion import DeepAVFusion


@dataclass
class Features:
    """Features of N clips, float32 on the CPU, rows in the order of `clips`.

    The model's own outputs are kept whole, about 0.9 MB a clip for ViT-B; `pooled` is the compact summary.
    """

    x_image: Tensor  # [N, image patches, D]
    x_audio: Tensor  # [N, audio patches, D]
    x_fusion: Tensor  # [N, fusion tokens, D]
    clips: list[str]  # paths of the clips that could be read
    starts: list[float]  # where each clip's window begins, in seconds
    failed: list[ClipError]  # the clips that could not
    config: dict = field(default_factory=dict)  # of the model
    checkpoint: str | None = None  # None: the weights are random
    weights: str | None = None  # the `fingerprint` of the model; None: not known
    left: list[str] = field(default_factory=list)  # clips that were not reached when it was interrupted

    @property
    def pooled(self) -> Tensor:
        """[N, 3, D]: means over the image, the audio and the fusion tokens."""
        return torch.stack([self.x_image.mean(1), self.x_audio.mean(1), self.x_fusion.mean(1)], 1)

    def tensors(self) -> dict[str, Tensor]:
        """`x_image`, `x_audio`, `x_fusion` and `pooled` by name."""
        return {"x_image": self.x_image, "x_audio": self.x_audio, "x_fusion": self.x_fusion, "pooled": self.pooled}

    def save(self, path: str | os.PathLike) -> None:
        """Write the tensors to a safetensors file, everything else as JSON into its metadata.

        The file appears complete or not at all. Raises ValueError where there is no clip to save.
        """
        if not self.clips:
            raise ValueError(f"{path}: not written, since no clip could be read")
        names = ("clips", "starts", "config", "checkpoint", "weights", "left")
        facts = {name: getattr(self, name) for name in names} | {"failed": [error.args for error in self.failed]}
        with writing(path) as part:
            tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
            save_file(tensors, part, metadata={name: json.dumps(fact) for name, fact in facts.items()})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Features":
        """Read what `save` wrote."""
        with safe_open(path, "pt") as file:
            facts = {name: json.loads(fact) for name, fact in file.metadata().items()}
            tensors = {name: file.get_tensor(name) for name in ("x_image", "x_audio", "x_fusion")}
        return cls(**tensors, **facts | {"failed": [ClipError(*args) for args in facts["failed"]]})


def fingerprint(model: DeepAVFusion) -> str:
    """Tells encoders apart: a hash of the parameters that lie outside the layers, rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "blocks." not in name:
            digest.update(parameter.detach().cpu().bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
