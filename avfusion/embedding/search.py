"""What is most like a clip, a sound or a picture, among the windows that `avfusion embed` has seen."""

import heapq
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from avfusion.embedding.decode import Batch
from avfusion.embedding.embed import Embedder
from avfusion.embedding.features import fingerprint
from avfusion.embedding.store import POOLED, Rows, parts, read_rows, shards
from avfusion.media.reader import read_clip
from avfusion.media.stills import read_picture, read_sound
from avfusion.media.transforms import IMAGENET_MEAN, image_pixels, preprocessing

SPARE = 20  # candidates for each window that is wanted: overlapping ones are left out


class Hit(NamedTuple):
    """A window of the collection, and its cosine similarity to what was asked for."""

    similarity: float
    file: str
    start: float
    end: float


class Collection:
    """The features in a folder or file, with the encoder that made them. Raises ValueError where another one did."""

    def __init__(self, path: str | os.PathLike, embedder: Embedder):
        self.path, self.embedder = os.fspath(path), embedder
        _, made = read_rows(shards(path)[0], ("file",))
        other = made.get("weights") not in (None, fingerprint(embedder.model))
        if other or made["config"]["dim"] != embedder.model.config.dim:
            raise ValueError(f"{path}: features of another encoder")

    def nearest(
        self, query: Rows, count: int = 10, by: str = "joint", *, other_than: Path | None = None
    ) -> list[Hit]:  # fmt: skip
        """The windows most like the first row of `query`, the best first; of those that overlap, the best alone.

        Windows of the file `other_than` are left out.

        By cosine of their `image`, `audio` or `fusion` features, or, "joint", by the mean of the three. Exact: every
        row is compared, shard by shard, so that a collection need not fit into memory.
        """
        names = POOLED if by == "joint" else (by,)
        query, best, duration = _joint(query, names)[0], [], _preprocessing(self.embedder)[2]["duration"]
        for rows in parts(self.path, ("file", "start", "end", *names)):
            similarity = _joint(rows, names) @ query
            if other_than is not None:
                own = [name for name in set(rows["file"]) if os.path.exists(name) and other_than.samefile(name)]
                similarity[np.isin(rows["file"], own)] = -torch.inf
            values, index = similarity.topk(min(SPARE * count, len(similarity)))
            ends = rows.get("end", np.full(len(similarity), np.nan))
            ends = np.where(np.isnan(ends), rows["start"] + duration, ends)  # files of version 0.1 tell none
            best += [
                Hit(value, rows["file"][row], float(rows["start"][row]), float(ends[row]))
                for value, row in zip(values.tolist(), index.tolist(), strict=True)
                if value > -np.inf
            ]
            best = heapq.nlargest(SPARE * count, best)
        found: list[Hit] = []
        for hit in best:
            if not any(hit.file == one.file and hit.start < one.end and one.start < hit.end for one in found):
                found.append(hit)
            if len(found) == count:
                break
        return found


def _joint(rows: Rows, names: tuple[str, ...]) -> Tensor:
    """Features of length 1, side by side, so that products are the mean of their cosines."""
    unit = [F.normalize(torch.from_numpy(rows[name]), dim=-1) for name in names]
    return torch.cat(unit, 1) / len(names) ** 0.5


def ask_clip(embedder: Embedder, path: Path, start: float | None = None) -> tuple[Rows, Batch]:
    """The features of the window of a video that begins at `start` (None: in the middle), and the window."""
    *_, window = _preprocessing(embedder)
    clip = read_clip(path, start=start, **window)
    return _ask(embedder, image_pixels(embedder.model.config.image_size)(clip.frame), clip.waveform, clip.start)


def ask_sound(embedder: Embedder, path: Path) -> tuple[Rows, Batch]:
    """Those of the middle of a sound file, with a picture of one colour, the mean of all pictures."""
    waveform, start = read_sound(path, **_preprocessing(embedder)[2])
    mean = torch.tensor(IMAGENET_MEAN).mul(255).round().to(torch.uint8)
    return _ask(embedder, mean[:, None, None].expand(3, *embedder.model.config.image_size), waveform, start)


def ask_image(embedder: Embedder, path: Path) -> tuple[Rows, Batch]:
    """Those of a picture, with silence."""
    *_, window = _preprocessing(embedder)
    pixels = image_pixels(embedder.model.config.image_size)(read_picture(os.fspath(path), path))
    return _ask(embedder, pixels, torch.zeros(1, round(window["duration"] * window["sample_rate"])), 0.0)


def _preprocessing(embedder: Embedder) -> tuple:
    return preprocessing(embedder.model.config.image_size, embedder.model.config.audio_size)


def _ask(embedder: Embedder, pixels: Tensor, waveform: Tensor, start: float) -> tuple[Rows, Batch]:
    nothing, place = np.array([""], object), np.array([0])
    batch = {
        "file": nothing, "window": place, "windows": place + 1, "start": np.array([start]), "end": np.array([start]),
        "frame_time": np.array([[start]]), "stream": nothing, "reason": nothing,
        "pixels": pixels[None, None].numpy(), "waveform": waveform.numpy(),
    }  # fmt: skip
    return embedder(batch), batch
