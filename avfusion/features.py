"""Clips to features: `embed` for one video file, `embed_clips` for many, `Features` to keep them on disk."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm import tqdm

from avfusion.clips import ClipDataset, ClipError, LogMel, collate_clips, image_transform
from avfusion.model import DeepAVFusion, EncoderConfig


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
        facts = {
            "clips": self.clips,
            "starts": self.starts,
            "failed": [error.args for error in self.failed],
            "config": self.config,
            "checkpoint": self.checkpoint,
            "weights": self.weights,
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
            save_file(tensors, part, metadata={name: json.dumps(fact) for name, fact in facts.items()})
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

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


def preprocessing(config: EncoderConfig) -> tuple[v2.Transform, LogMel, dict[str, float]]:
    """What turns clips into inputs of a model: its image transform, its spectrogram, and the window for `read_clip`.

    A model of 128 x 192 spectrograms takes 3 s windows at 16 kHz.
    """
    n_mels, frames = config.audio_size
    mel = LogMel(n_mels=n_mels)
    window = {"duration": frames * mel.hop / mel.sample_rate, "sample_rate": mel.sample_rate}
    return image_transform(config.image_size), mel, window


def embed_clips(
    model: DeepAVFusion,
    paths: Sequence[str | os.PathLike],
    *,
    device: torch.device | str | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    progress: bool = False,
    compile: bool | None = None,
) -> Features:
    """Features of the middle frame and the sound around it, for each clip in `paths`.

    The window's length and the frame's size follow from the model's configuration (3 s and 224 x 224 by default). The
    model computes in its own dtype and in evaluation mode, without gradients, on `device` (None: where it is; otherwise
    it is moved there). `num_workers` processes decode ahead; `progress` shows a bar on stderr. `compile` is
    `DeepAVFusion.compiled` while it runs: None compiles on a GPU once 200 clips have been seen, False never.

    Clips that cannot be read are left out of the rows and listed in `Features.failed`.
    """
    if device is not None:
        model.to(device)
    weight = next(model.parameters())
    transform, mel, window = preprocessing(model.config)
    mel.to(weight.device)
    dataset = ClipDataset(paths, transform, **window)
    loader = DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=collate_clips)

    rows, indices, starts, failed = [], [], [], []
    modes, compiled = [(module, module.training) for module in model.modules()], model.compiled
    model.eval()
    model.compiled = compile
    try:
        with torch.inference_mode(), tqdm(total=len(dataset), unit="clip", disable=not progress) as bar:
            for batch, errors in loader:
                failed += errors
                if batch:
                    image = batch.image.to(weight.device, weight.dtype)
                    audio = mel(batch.waveform.to(weight.device)).to(weight.dtype)
                    rows.append([x.float().cpu() for x in model(image, audio)])
                    indices += batch.index.tolist()
                    starts += batch.start.tolist()
                bar.update(len(errors) + (len(batch.index) if batch else 0))
    finally:
        model.compiled = compiled
        for module, training in modes:
            module.training = training

    # Concatenated outside inference mode, they are ordinary tensors that a probe can be trained on.
    empty = torch.empty(0, 0, model.config.dim)
    x_image, x_audio, x_fusion = map(torch.cat, zip(*rows, strict=True)) if rows else (empty, empty, empty)
    clips = [os.fspath(paths[index]) for index in indices]
    return Features(x_image, x_audio, x_fusion, clips, starts, failed, asdict(model.config), weights=fingerprint(model))


def embed(model: DeepAVFusion, path: str | os.PathLike) -> dict[str, Tensor]:
    """Features of one clip: `x_image`, `x_audio`, `x_fusion` [tokens, D] and `pooled` [3, D], float32 on the CPU.

    Raises `ClipError` where the clip cannot be read.
    """
    features = embed_clips(model, [path])
    if features.failed:
        raise features.failed[0]
    return {name: tensor[0] for name, tensor in features.tensors().items()}
