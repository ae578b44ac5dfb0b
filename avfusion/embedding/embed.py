"""Windows to features: `Embedder`, which all engines call; `embed_clips` for files; `pooled_features` for data sets."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfusion import distributed
from avfusion.common import Progress
from avfusion.data.loader import Batch
from avfusion.embedding import decode
from avfusion.embedding.features import Features, facts_of
from avfusion.embedding.store import FACTS, POOLED, TOKENS, Rows
from avfusion.media.transforms import normalize, preprocessing
from avfusion.models.checkpoint import load_encoder
from avfusion.models.deepavfusion import DeepAVFusion


class Embedder:
    """Features of batches of windows, or of files: what every engine calls.

        embedder = avfusion.Embedder(model, windows={"every": 1.0})
        rows = embedder({"file": ["talk.mp4"]})  # rows["file"], ["start"], ..., ["fusion"] [N, D]

    Args:
        model: an encoder, or the path of its checkpoint. It computes in evaluation mode, without gradients.
        windows: which windows of files, as arguments of `avfusion.embedding.decode.Decoder`: every, at, count, frames,
            batch_size.
        device: to move the model to; None: where it is.
        dtype: of autocast; None: the model's own.
        pooled: means over the tokens alone; False: all tokens, too.
        keep_frames: a row for each frame of a window; otherwise a window's features are means over its frames.
        compile: `DeepAVFusion.compiled` while it computes: None compiles on a GPU once 200 windows have been seen.
    """

    def __init__(
        self, model: DeepAVFusion | str | os.PathLike, *, windows: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, pooled: bool = True,
        keep_frames: bool = False, compile: bool | None = None,
    ):  # fmt: skip
        self.model = model if isinstance(model, nn.Module) else load_encoder(model)
        if device is not None:
            self.model.to(device)
        self.dtype, self.pooled, self.keep_frames, self.compile = dtype, pooled, keep_frames, compile
        config, self.device = self.model.config, self.model.fusion_tokens.device
        self.decoder = decode.Decoder(config, **windows or {})
        _, mel, _ = preprocessing(config.image_size, config.audio_size)
        self.mel = mel.to(self.device)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> Rows:
        """A batch of `avfusion.embedding.decode`, or one of files by `file`, to a row a window, arrays by name.

        `file`, `window`, `windows`, `start`, `end`, `frame_time`, `stream`, `reason` as there. `image`, `audio` and
        `fusion` [B, D] are means over tokens; with all tokens also `x_image`, `x_audio` and `x_fusion` [B, tokens, D].
        All float32. Of what cannot be read there is a row with the `reason`, whose features are not numbers.
        """
        if "pixels" not in batch:
            rows = [self(windows) for windows in self.decoder(batch)]
            return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]} if rows else {}
        facts, good = {name: np.asarray(batch[name]) for name in FACTS}, np.asarray(batch["reason"]) == ""
        frames = facts["frame_time"].shape[1]
        if self.keep_frames:
            facts = {n: np.repeat(x, frames, 0) if x.ndim == 1 else x.reshape(-1) for n, x in facts.items()}
            good = np.repeat(good, frames)
        else:
            facts["frame_time"] = facts["frame_time"].mean(1)
        features, every = self._features(batch["pixels"], batch["waveform"]), good.all()
        for name, x in features.items():
            found = x.cpu().numpy()
            facts[name] = found if every else np.where(good.reshape(-1, *[1] * (found.ndim - 1)), found, np.nan)
        return facts

    def arguments(self) -> dict[str, Any]:
        """Of another like it, elsewhere: its model is a copy on the CPU."""
        return {"model": deepcopy(self.model).cpu(), "dtype": self.dtype, "pooled": self.pooled,
                "keep_frames": self.keep_frames, "compile": self.compile}  # fmt: skip

    @torch.inference_mode()
    def _features(self, pixels: np.ndarray, waveform: np.ndarray) -> dict[str, Tensor]:
        weight, frames = self.model.fusion_tokens, pixels.shape[1]
        seen, heard = (torch.from_numpy(np.require(x, requirements="W")).to(self.device) for x in (pixels, waveform))
        image, audio = normalize(seen.flatten(0, 1)).to(weight.dtype), self.mel(heard[:, None]).to(weight.dtype)
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype not in (None, weight.dtype))
        with evaluating(self.model, self.compile), autocast:
            tokens = self.model(image, audio.repeat_interleave(frames, 0))
        found = dict(zip(POOLED, (x.float().mean(1) for x in tokens), strict=True))
        if not self.pooled:
            found |= zip(TOKENS, (x.float() for x in tokens), strict=True)
        return found if self.keep_frames else {n: x.unflatten(0, (-1, frames)).mean(1) for n, x in found.items()}


def embed_clips(
    model: DeepAVFusion,
    paths: Sequence[str | os.PathLike],
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    progress: bool = False,
    windows: Mapping[str, Any] | None = None,
    **how,
) -> Features:
    """All tokens of windows of files, in memory: of each file in `paths` one in the middle, or as `windows` says.

    `windows` and `how` are arguments of `Embedder`; `num_workers` processes decode ahead; `progress` goes to stderr.
    Rows are in the order of the files. Those that cannot be read are listed in `Features.failed`.

    A row is 1 MB for ViT-B: `avfusion embed` writes many to a folder as it goes.
    """
    windows = {"batch_size": batch_size} | dict(windows or {})
    embedder = Embedder(model, windows=windows, **{"pooled": False} | how)
    names = [os.fspath(path) for path in paths]
    rows = []
    with Progress(len(names), "clip", show=progress) as shown:
        for batch in decode.decoded(embedder.decoder, names, num_workers):
            rows.append(embedder(batch))
            shown.update(shown.done + files_ended(batch))
    return Features.of(rows, facts_of(embedder.model), names)


def files_ended(rows: Rows) -> int:
    """How many files end in a batch."""
    ended = (rows["reason"] != "") | (rows["window"] == rows["windows"] - 1)
    return len(set(rows["file"][ended]))


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
