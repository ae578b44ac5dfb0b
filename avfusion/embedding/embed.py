"""Clips to features: `embed_clips` for files, `pooled_features` for labelled clips of a data set."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfusion import distributed
from avfusion.common import Progress
from avfusion.data.loader import Batch, ClipLoader
from avfusion.data.samples import clips
from avfusion.data.table import Row, Table
from avfusion.embedding.store import Features, fingerprint
from avfusion.media.transforms import preprocessing
from avfusion.models.deepavfusion import DeepAVFusion


def embed_clips(
    model: DeepAVFusion,
    paths: Sequence[str | os.PathLike],
    *,
    device: torch.device | str | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    progress: bool = False,
    compile: bool | None = None,
    dtype: torch.dtype | None = None,
) -> Features:
    """Features of the middle frame and the sound around it, for each clip in `paths`.

    The window's length and the frame's size follow from the model's configuration (3 s and 224 x 224 by default). The
    model computes in its own dtype, or in autocast to `dtype`, and in evaluation mode, without gradients, on `device`
    (None: where it is; otherwise it is moved there). `num_workers` processes decode ahead; `progress` is shown on
    stderr. `compile` is `DeepAVFusion.compiled` while it runs: None compiles on a GPU once 200 clips have been seen,
    False never.

    Clips that cannot be read are left out of the rows and listed in `Features.failed`. Ctrl-C ends it with the rows
    that are done; the other clips are then in `Features.left`.
    """
    if device is not None:
        model.to(device)
    weight = model.fusion_tokens
    transform, mel, window = preprocessing(model.config.image_size, model.config.audio_size)
    mel.to(weight.device)
    files = Table("files", Path(), tuple(Row(os.fspath(path), Path(path)) for path in paths))
    items = clips(files, train=False, transform=transform, min_duration=0.0, **window)
    loader = ClipLoader(items, batch_size, train=False, num_workers=num_workers, rank=0, world_size=1, max_failed=1.0)

    rows, indices, starts, tried = [], [], [], 0
    with evaluating(model, compile), torch.inference_mode(), Progress(len(paths), "clip", show=progress) as shown:
        try:
            for batch in loader:
                audio = mel(batch.waveform.to(weight.device)).to(weight.dtype)
                with torch.autocast(weight.device.type, dtype, enabled=dtype not in (None, weight.dtype)):
                    x = model(batch.image.to(weight.device, weight.dtype), audio)
                rows.append([tokens.float().cpu() for tokens in x])
                indices += batch.index.tolist()
                starts += batch.start.tolist()
                tried = loader.tried
                shown.update(tried)
            tried = len(paths)
        except KeyboardInterrupt:
            if not rows:
                raise

    # Concatenated outside inference mode, they are ordinary tensors that a probe can be trained on.
    empty = torch.empty(0, 0, model.config.dim)
    x_image, x_audio, x_fusion = map(torch.cat, zip(*rows, strict=True)) if rows else (empty, empty, empty)
    names = [os.fspath(path) for path in paths]
    return Features(
        x_image, x_audio, x_fusion, [names[i] for i in indices], starts, list(loader.failures.values()),
        asdict(model.config), weights=fingerprint(model), left=names[tried:],
    )  # fmt: skip


@contextmanager
def evaluating(model: DeepAVFusion, compile: bool | None) -> Iterator[None]:
    """The model in evaluation mode; afterwards as it was."""
    modes, compiled = [(module, module.training) for module in model.modules()], model.compiled
    model.eval().compiled = compile
    try:
        yield
    finally:
        model.compiled = compiled
        for module, training in modes:
            module.training = training


@torch.no_grad()
def pooled_features(
    encoder: DeepAVFusion, batches: Iterable[Batch], mel: nn.Module, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], Tensor]:
    """Features of labelled clips, in the order of the data set: name -> [N, D], and labels.

    Labels are [N] where each clip has one, and [N, C], 0 or 1, where some have several.

    `image`, `audio` and `fusion` are means over the encoder's tokens, each then of length 1; `joint` is all three side
    by side. Every process encodes its own batches, in autocast to `dtype`, and gets the features of all. Clips without
    a label are left out.
    """
    device, names, rows = encoder.fusion_tokens.device, ("image", "audio", "fusion"), []
    with evaluating(encoder, encoder.compiled):
        for batch in batches:
            image, audio = batch.image.to(device), mel(batch.waveform.to(device))
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                pooled = torch.stack([F.normalize(x.float().mean(1), dim=-1) for x in encoder(image, audio)], dim=1)
            labels = torch.empty(len(batch.index), 0) if batch.labels is None else batch.labels
            rows.append((batch.index, batch.label, labels, pooled.cpu()))
    rows = distributed.gather(rows)
    if not rows:
        return dict.fromkeys((*names, "joint"), torch.empty(0, 0)), torch.empty(0, dtype=torch.long)
    index, label, labels, pooled = (torch.cat(column) for column in zip(*rows, strict=True))
    several = bool((labels.sum(1) > 1).any())
    order = index.argsort()
    order = order[(labels.sum(1) > 0)[order] if several else label[order] >= 0]
    pooled = pooled[order]
    features = dict(zip(names, pooled.unbind(1), strict=True)) | {"joint": pooled.flatten(1)}
    return features, labels[order] if several else label[order]
