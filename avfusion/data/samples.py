"""From the clips of a data set to what a loader batches: data sets of typed samples that wrap each other.

    Windows(source)      a window of each clip
    Views(windows)       several of it, evenly spread
    Masked(windows)      with the mask of its frame
    Mixed(windows)       with other clips, to be told apart from it
    Tensors(any of them) as tensors

Random choices come from torch's global generator, in the order in which a sample is made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from avfusion.data.pictures import read_mask
from avfusion.data.table import Row
from avfusion.media.clip import Clip
from avfusion.media.reader import read_clip
from avfusion.media.transforms import image_transform
from avfusion.media.windows import View


class Source(Protocol):
    """The clips of a data set: a `Table`, `Shards`, or some of either."""

    rows: "list[Row] | tuple[Row, ...]"
    classes: tuple[str, ...]
    sha256: str

    def name(self, index: int) -> str: ...

    def read(self, index: int, **window) -> Clip: ...


class Selection:
    """Some clips of a source, by their rows. In a multi-label set too, a clip with one label has it as its `label`."""

    def __init__(self, source: Source, index: Sequence[int]):
        self.source, self.classes, self.sha256, self.index = source, source.classes, source.sha256, list(index)
        self.rows = [replace(source.rows[i], label=one_label(source.rows[i])) for i in self.index]

    def name(self, index: int) -> str:
        return self.source.name(self.index[index])

    def read(self, index: int, **window) -> Clip:
        return self.source.read(self.index[index], **window)


def one_label(row: Row) -> int | None:
    """The label of a clip that has exactly one."""
    return row.labels[0] if row.label is None and len(row.labels) == 1 else row.label


@dataclass(frozen=True)
class Sample:
    """What one sample holds."""

    clip: Clip
    mask: np.ndarray | None = None  # of the clip's frame, [H, W] uint8: indices of classes
    others: tuple[Clip, ...] = ()  # further windows of it, or clips whose sound is added to it


class Windows(Dataset):
    """A window of each clip of a source, by its row. `window` are arguments of `avfusion.read_clip`."""

    def __init__(self, source: Source, **window):
        self.source, self.window = source, window

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.source.read(index, **self.window))


class Masked(Dataset):
    """Samples with the masks of their frames: those of rows whose `extra["mask"]` names a file.

    `listed`: pixels of classes that the clip's own list, `extra["listed"]`, does not name are background.
    """

    def __init__(self, windows: Windows, *, listed: bool = False):
        self.windows, self.source, self.listed = windows, windows.source, listed

    def __getitem__(self, index: int) -> Sample:
        extra = self.source.rows[index].extra
        mask = read_mask(extra["mask"])
        if self.listed:
            mask = np.where(np.isin(mask, extra["listed"]), mask, 0)
        return replace(self.windows[index], mask=mask)


class Views(Dataset):
    """Samples of `count` windows of a clip, evenly spread over `span` seconds in its middle."""

    def __init__(self, windows: Windows, count: int, span: float = 10.0):
        self.windows, self.source, self.count, self.span = windows, windows.source, count, span

    def __getitem__(self, index: int) -> Sample:
        first, *others = (
            self.source.read(index, **self.windows.window | {"start": View(number, self.count, self.span)})
            for number in range(self.count)
        )
        return Sample(first, others=tuple(others))


class Mixed(Dataset):
    """Samples of `count` clips each. A row of a list of pairs names both of two.

    Otherwise the partners are drawn, each among clips of other classes than the ones before where classes are known.
    """

    def __init__(self, windows: Windows, count: int = 2):
        self.windows, self.source, self.count = windows, windows.source, count

    def __getitem__(self, index: int) -> Sample:
        sample, pair = self.windows[index], self.source.rows[index].extra.get("path_2")
        if pair and self.count == 2:
            return replace(sample, others=(read_clip(pair, **self.windows.window),))
        chosen = [index]
        while len(chosen) < self.count:
            chosen.append(self._partner(chosen))
        return replace(sample, others=tuple(self.windows[row].clip for row in chosen[1:]))

    def _partner(self, chosen: list[int]) -> int:
        rows = self.source.rows
        labels = {rows[row].label for row in chosen} - {None}
        for _ in range(20):
            other = int(torch.randint(len(rows), ()))
            if other not in chosen and rows[other].label not in labels:
                return other
        return next((row % len(rows) for row in range(chosen[0] + 1, chosen[0] + len(rows))
                     if row % len(rows) not in chosen), chosen[0])  # fmt: skip


class Item(NamedTuple):
    """A sample as tensors."""

    image: Tensor  # [3, H, W] float32, normalised; of several clips [K, 3, H, W]
    waveform: Tensor  # [1, samples] float32; of several clips [K, samples]
    index: int
    start: float  # of the waveform in seconds
    mask: Tensor | None = None  # [H, W]


class Tensors(Dataset):
    """Samples as tensors.

    Args:
        samples: a data set of them.
        transform: PIL frame -> tensor; of samples with masks (frame, mask) -> two tensors.
        gain_db: the sound becomes louder or softer by up to so many decibels, and is clipped to [-1, 1].
    """

    def __init__(self, samples: Any, transform: Callable, *, gain_db: float = 0.0):
        self.samples, self.source, self.transform, self.gain_db = samples, samples.source, transform, gain_db

    def __getitem__(self, index: int) -> Item:
        sample, mask = self.samples[index], None
        clip, every = sample.clip, (sample.clip, *sample.others)
        if sample.mask is not None:
            image, mask = self.transform(clip.frame, sample.mask)
        elif sample.others:
            image = torch.stack([self.transform(each.frame) for each in every])
        else:
            image = self.transform(clip.frame)
        waveform = torch.cat([each.waveform for each in every])
        if self.gain_db:
            gain = 10 ** (torch.empty(()).uniform_(-self.gain_db, self.gain_db) / 20)
            waveform = (waveform * gain).clamp(-1, 1)
        return Item(image, waveform, index, clip.start, mask)


def clips(
    source: Source,
    *,
    train: bool,
    transform: Callable | None = None,
    duration: float = 3.0,
    sample_rate: int = 16000,
    min_duration: float = 1.0,
    gain_db: float = 6.0,
) -> Tensors:
    """The clips of a source as tensors: for training random windows, frames, crops, volumes, else the middle ones.

    Args:
        transform: of frames; None: `image_transform(train=train)`.
        duration, sample_rate: of the window of sound, in seconds and Hz.
        min_duration: clips with less picture and sound, in seconds, count as failed; sound that is shorter than
            `duration` is reflected.
        gain_db: largest change of the volume for training, in decibels.
    """
    windows = Windows(source, **window(train, duration, sample_rate, min_duration))
    return Tensors(windows, transform or image_transform(train=train), gain_db=gain_db if train else 0.0)


def window(train: bool, duration: float, sample_rate: int, min_duration: float = 1.0) -> dict:
    """Arguments of `avfusion.read_clip`: random moments for training, else those in the middle."""
    moments = {"start": "random", "frame": "random"} if train else {}
    return {"duration": duration, "sample_rate": sample_rate, "min_duration": min_duration} | moments
