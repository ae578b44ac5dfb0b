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
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from avfusion.data.loader import iterator_of
from avfusion.media.clip import ClipError
from avfusion.media.reader import Excerpt, read_windows
from avfusion.media.transforms import image_pixels, preprocessing
from avfusion.media.windows import Plan
from avfusion.models.deepavfusion import EncoderConfig

Batch = dict[str, np.ndarray]


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

    def __init__(self, decoder: Decoder, files: Sequence[str], workers: int):
        self.decoder, self.files = decoder, files
        self.next = torch.multiprocessing.get_context().Value("q", 0)
        self.at_hand = torch.full((max(workers, 1),), -1).share_memory_()  # which file each worker reads

    def __iter__(self) -> Iterator[dict]:
        for batch in self.decoder.batches(self._own()):
            # Tensors go to the other process through shared memory, where arrays are copied.
            yield {name: x if x.dtype == object else torch.from_numpy(x) for name, x in batch.items()}

    def _own(self) -> Iterator[str]:
        worker = get_worker_info()
        while True:
            with self.next.get_lock():
                number = self.next.value
                self.next.value += 1
            if number >= len(self.files):
                return
            self.at_hand[worker.id if worker else 0] = number
            yield self.files[number]


def decoded(decoder: Decoder, files: Sequence[str], num_workers: int = 0) -> Iterator[Batch]:
    """Batches of the windows of `files`, decoded in this process or ahead in `num_workers` others.

    Windows of a file come in order, files as they are done. Raises RuntimeError where a worker dies, with the files
    that were read.
    """
    source = _Files(decoder, files, num_workers)
    spared = torch.Generator()  # not the global generator
    loader = DataLoader(source, batch_size=None, num_workers=num_workers, in_order=False, generator=spared)
    batches = iterator_of(loader)
    while True:
        try:
            batch = next(batches, None)
        except (RuntimeError, OSError, EOFError) as error:
            if not num_workers:
                raise
            held = ", ".join(files[number] for number in source.at_hand.tolist() if number >= 0)
            raise RuntimeError(
                f"a worker has died, or could not go on ({error}), while these were read: {held or 'none yet'}; where "
                "memory ran out, take fewer workers"
            ) from error
        if batch is None:
            return
        yield {name: x if isinstance(x, np.ndarray) else x.numpy() for name, x in batch.items()}
