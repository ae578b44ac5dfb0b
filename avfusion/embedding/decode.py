"""Files to batches of windows, in bounded memory whatever the files' length: what every engine decodes with.

A batch is a dictionary of arrays, a row a window:

    file                the path or address                         window, windows     its number, and of how many
    start, end          of the window, seconds from the beginning   frame_time          [B, K], of its frames
    pixels              [B, K, 3, H, W] uint8                       waveform            [B, samples] float32
    stream, reason      empty; of a row that stands for a file which cannot be read, or not to its end: what failed
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from avfusion.data.workers import TIMEOUT, Workers, batches, handed_over, reading, received
from avfusion.media.clip import ClipError
from avfusion.media.reader import Excerpt, read_windows
from avfusion.media.transforms import image_pixels, preprocessing
from avfusion.media.windows import Plan
from avfusion.models.deepavfusion import EncoderConfig

Batch = dict[str, np.ndarray]
LARGE = ("pixels", "waveform")


class Decoder:
    """Decodes files for a model: `decoder(batch)` gives batches of windows of the files in `batch["file"]`.

    A callable for one process, and for Ray Data: `ds.map_batches(Decoder(config, every=1.0), batch_size=1)`.

    Args:
        config: of the model; the window's length (3 s by default) and the pictures' size follow from it.
        every, at, count: which windows, as `avfusion.media.windows.Plan` takes them; none: one in the middle.
        frames: K, how many of each window, evenly spread.
        batch_size: windows a batch.
        skip: file -> numbers of windows to leave out.

    A file that cannot be read, or not to its end, ends in a row with its `stream` and `reason`, and stops no other.
    """

    def __init__(
        self, config: EncoderConfig, *, every: float | None = None, at: Sequence[float] = (), count: int | None = None,
        frames: int = 1, batch_size: int = 8, skip: Mapping[str, Collection[int]] | None = None,
    ):  # fmt: skip
        for name, value in (("frames", frames), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"Decoder: {name}={value}: expected at least 1")
        self.config, self.plan = config, Plan(every, tuple(at), count)
        self.frames, self.batch_size, self.skip = frames, batch_size, skip or {}

    def __call__(self, batch: Mapping[str, Iterable]) -> Iterator[Batch]:
        return self.batches(map(os.fspath, batch["file"]))

    def batches(self, files: Iterable[str]) -> Iterator[Batch]:
        """Batches of the windows of `files`, in their order; the last one may be smaller."""
        rows = []
        for row in self._rows(files):
            rows.append(row)
            if len(rows) == self.batch_size:
                yield _stacked(rows)
                rows = []
        if rows:
            yield _stacked(rows)

    def _rows(self, files: Iterable[str]) -> Iterator[dict]:
        (height, width), transform = self.config.image_size, image_pixels(self.config.image_size)
        *_, window = preprocessing(self.config.image_size, self.config.audio_size)
        samples = round(window["duration"] * window["sample_rate"])
        for file in files:
            known = {"transform": transform, "frames": self.frames, "skip": self.skip.get(file, ())}
            last = None
            try:
                for last in read_windows(file, self.plan, **known, **window):
                    yield _row(file, last)
            except ClipError as error:
                nothing = Excerpt(-1, last.count if last else -1, np.nan, np.nan, torch.zeros(1, samples),
                                  [torch.zeros(3, height, width, dtype=torch.uint8)] * self.frames,
                                  [np.nan] * self.frames)  # fmt: skip
                yield _row(file, nothing, error.stream, error.reason)


def _row(file: str, found: Excerpt, stream: str = "", reason: str = "") -> dict:
    return {
        "file": file, "window": found.number, "windows": found.count, "start": found.start, "end": found.end,
        "frame_time": found.frame_times, "pixels": torch.stack(found.frames), "waveform": found.waveform[0],
        "stream": stream, "reason": reason,
    }  # fmt: skip


def _stacked(rows: list[dict]) -> Batch:
    """Rows as columns."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: torch.stack(values).numpy() if isinstance(values[0], Tensor)
        else np.array(values, object if isinstance(values[0], str) else None)
        for name, values in columns.items()
    }  # fmt: skip


class _Files(IterableDataset):
    """Batches of files that the processes of a loader take one after the other, each as it is free."""

    def __init__(self, decoder: Decoder, files: Sequence[str], workers: Workers):
        self.decoder, self.files, self.workers = decoder, files, workers
        self.next = torch.multiprocessing.get_context().Value("q", 0) if workers.count else None

    def __iter__(self) -> Iterator[tuple[Batch, list]]:
        for batch in self.decoder.batches(self._own()):
            # What is large goes to the other process through shared memory.
            large = handed_over(torch.from_numpy(batch.pop(name)) for name in LARGE)
            yield batch, large

    def _own(self) -> Iterator[str]:
        if self.next is None:
            yield from self.files
            return
        while True:
            with self.next.get_lock():
                number = self.next.value
                self.next.value += 1
            if number >= len(self.files):
                return
            self.workers.reads(number)
            yield self.files[number]


def _as_it_is(batch: tuple[Batch, list]) -> tuple[Batch, list]:
    return batch


def decoded(decoder: Decoder, files: Sequence[str], num_workers: int = 0, timeout: float = TIMEOUT) -> Iterator[Batch]:
    """Batches of the windows of `files`, decoded in this process or ahead in `num_workers` others.

    Windows of a file come in order, files as they are done. Raises RuntimeError where a worker dies, or nothing comes
    for `timeout` seconds, with the files that were read.
    """
    workers = Workers(num_workers)
    source = _Files(decoder, files, workers)
    loader = reading(source, workers, batch_size=None, in_order=False, collate_fn=_as_it_is)
    for batch, large in batches(loader, workers, lambda number: files[number], timeout):
        yield batch | {name: x.numpy() for name, x in zip(LARGE, received(large), strict=True)}
