"""Batches of clips for training and evaluation: which clip comes when, what becomes of those that fail, how to resume.

Everything random about a clip (its window, its frame, its augmentation) is a function of (seed, epoch, index). So the
batches do not depend on the number of workers, and a resumed run sees what an uninterrupted one would have seen.
"""

import json
import multiprocessing.connection
import os
import re
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from avfusion.clips import Clip, ClipError, image_transform
from avfusion.data.table import Row

REPLACEMENTS = 10  # so many clips in a row must fail before training gives up
FLOOR = 200  # the share of failures is taken of at least so many clips, or of the whole set if that is smaller


class Source(Protocol):
    """What a loader reads from: a `Table` or `Shards`."""

    rows: "list[Row] | tuple[Row, ...]"
    classes: tuple[str, ...]
    sha256: str

    def name(self, index: int) -> str: ...

    def read(self, index: int, **window) -> Clip: ...


class Batch(NamedTuple):
    """B clips. `avfusion.LogMel` turns the waveforms into spectrograms, on whatever device they have been moved to."""

    image: Tensor  # [B, 3, H, W] float32, normalised
    waveform: Tensor  # [B, 1, samples] float32
    label: Tensor  # [B] int64, -1 where the clip has no single label
    labels: Tensor | None  # [B, classes] float32, 1 for each of a clip's labels; None where the set has none
    index: Tensor  # [B] int64, into the source's rows
    start: Tensor  # [B] float32, of the waveform in seconds


def random_seed(*numbers: int) -> int:
    """64 bits that depend on all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def order(count: int, seed: int, epoch: int, shards: list[int] | None = None, mix: int = 8) -> Tensor:
    """The permutation of `count` clips in an epoch.

    With the sizes of `shards`, whose clips follow each other, it stays local: the shards are shuffled, and then the
    clips within every `mix` of them. A reader over the network then needs few shards at a time.
    """
    generator = torch.Generator().manual_seed(random_seed(seed, epoch))
    if not shards:
        return torch.randperm(count, generator=generator)
    parts = torch.arange(count).split(shards)
    shuffled = [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]
    groups = [torch.cat(shuffled[i : i + mix]) for i in range(0, len(shuffled), mix)]
    return torch.cat([group[torch.randperm(len(group), generator=generator)] for group in groups])


class ClipSampler(Sampler):
    """Which clips a rank reads, as lists of (epoch, index), one a batch, from `consumed` clips of `epoch` on.

    Global batches are consecutive parts of the epoch's order, and rank r takes every `world_size`-th clip of them,
    beginning with the r-th. For training the order is shuffled and its last, incomplete global batch is left out, so
    that all ranks do the same number of steps: no clip comes twice in an epoch, and fewer than a global batch not at
    all. For evaluation the order is the table's and every clip comes exactly once, so ranks may differ by a clip.
    """

    def __init__(
        self, count: int, batch_size: int, *, train: bool, seed: int = 0, rank: int = 0, world_size: int = 1,
        shards: list[int] | None = None,
    ):  # fmt: skip
        self.count, self.batch_size, self.train, self.seed = count, batch_size, train, seed
        self.rank, self.world_size, self.shards = rank, world_size, shards
        self.epoch, self.consumed = 0, 0

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    def rest(self, consumed: int) -> range:
        """Where the global batches of an epoch begin in its order, for a run that stands at `consumed`."""
        # A run that resumes with other ranks or another batch size goes on in its own batches from where it stands.
        left = self.count - consumed
        return range(consumed, consumed + (left - left % self.global_batch if self.train else left), self.global_batch)

    def __len__(self) -> int:
        return len(self.rest(0))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, batches = self.epoch, self.rest(self.consumed)
        clips = order(self.count, self.seed, epoch, self.shards) if self.train else torch.arange(self.count)
        for at in batches:
            mine = clips[at : at + self.global_batch][self.rank :: self.world_size]
            yield [(epoch, index) for index in mine.tolist()]


class _Clips(Dataset):
    """(epoch, index) -> the clip there (None: it failed), the failures on the way, and how many were tried."""

    def __init__(self, source: Source, transform: Callable, *, train: bool, seed: int, gain_db: float, **window):
        self.source, self.transform, self.train, self.seed = source, transform, train, seed
        self.gain_db, self.window = gain_db, window
        self.multi_label = any(row.labels for row in source.rows)
        self.at_hand: Tensor | None = None  # [workers, 2], shared: the process of each worker, the clip it is reading

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple | None, list[ClipError], int]:
        epoch, index = key
        errors, attempts = [], REPLACEMENTS if self.train else 1
        with torch.random.fork_rng(devices=[]):
            # An evaluation that draws, such as partners to mix, draws the same each time.
            torch.default_generator.manual_seed(random_seed(self.seed, epoch if self.train else 0, index))
            for attempt in range(attempts):
                try:
                    return self._item(index), errors, attempt + 1
                except ClipError as error:
                    errors.append(error)
                index = random_seed(self.seed, epoch, key[1], attempt) % len(self.source.rows)
        return None, errors, attempts

    def _item(self, index: int) -> tuple:
        worker = get_worker_info()
        if worker is not None:
            self.at_hand[worker.id] = torch.tensor([os.getpid(), index])
        try:
            clip = self.source.read(index, **self.window)
            image, waveform = self.transform(clip.frame), clip.waveform
        except ClipError:
            raise
        except Exception as error:  # a bug, or a library's: it ends the run, and says at which clip
            raise RuntimeError(f"{self.source.name(index)}: {type(error).__name__} while reading this clip") from error
        if self.train and self.gain_db:
            waveform = waveform * 10 ** (torch.empty(()).uniform_(-self.gain_db, self.gain_db) / 20)
        return image, waveform, index, clip.start

    def collate(self, found: list) -> tuple[Batch | None, list[ClipError], int]:
        """A batch of the clips that could be read, None where there is none; all failures; how many were tried."""
        errors, tried = [error for _, errors, _ in found for error in errors], sum(tried for *_, tried in found)
        items = [item for item, *_ in found if item is not None]
        if not items:
            return None, errors, tried
        images, waveforms, index, start = zip(*items, strict=True)
        rows = [self.source.rows[i] for i in index]
        labels = None
        if self.multi_label:
            labels = torch.zeros(len(rows), len(self.source.classes))
            for line, row in zip(labels, rows, strict=True):
                line[list(row.labels)] = 1
        label = torch.tensor([-1 if row.label is None else row.label for row in rows])
        batch = Batch(torch.stack(images), torch.stack(waveforms), label, labels, torch.tensor(index),
                      torch.tensor(start, dtype=torch.float32))  # fmt: skip
        return batch, errors, tried


class ClipLoader:
    """Batches of a data set's clips, epoch after epoch; each `iter()` is an epoch, or what is left of one.

    For training, clips are shuffled; window and frame are random; the frame is cropped and mirrored
    (`avfusion.clips.image_transform`); the sound is louder or softer by up to `gain_db`. A clip that cannot be read is
    replaced by another, so that batches keep their size: which one is a function of (seed, epoch, index). For
    evaluation, window and frame are the middle ones, and a clip that cannot be read is left out of its batch.

    Args:
        source: a `Table` or `Shards`.
        batch_size: clips a batch, of this rank.
        train: see above.
        seed: of everything random.
        transform: PIL image -> tensor; may draw from torch's global generator. None: `image_transform(train=train)`.
        duration, sample_rate: of the window of sound, in seconds and Hz.
        min_duration: clips with less picture and sound, in seconds, count as failed; sound that is shorter than
            `duration` is reflected.
        gain_db: largest change of the volume, in decibels, for training.
        num_workers: processes that decode ahead.
        rank, world_size: this process of how many; None asks torch.distributed, where it is initialised.
        max_failed: the share of clips tried that may fail. It is taken of at least 200 clips (of the whole set if that
            is smaller), so that a bad one among the first does not end the run.
        report: a file to which each clip that failed is added once, a JSON object a line: path, stream, reason, epoch.
            With several ranks each writes its own, <name>.rank<r><suffix>.

    Iterating raises RuntimeError when too many clips have failed, and when a worker dies: then with the clip it was at.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        transform: Callable | None = None,
        duration: float = 3.0,
        sample_rate: int = 16000,
        min_duration: float = 1.0,
        gain_db: float = 6.0,
        num_workers: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        max_failed: float = 0.05,
        report: str | os.PathLike | None = None,
    ):
        if rank is None or world_size is None:
            there = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if there else 0
            world_size = torch.distributed.get_world_size() if there else 1
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: expected 0 to {world_size - 1}, since world_size={world_size}")
        count = len(source.rows)
        if train and count < batch_size * world_size:
            raise ValueError(
                f"batch_size={batch_size} on {world_size} ranks: the set has only {count} clips, take a smaller batch"
            )
        self.source, self.max_failed = source, max_failed
        self.sampler = ClipSampler(
            count, batch_size, train=train, seed=seed, rank=rank, world_size=world_size,
            shards=getattr(source, "sizes", None),
        )  # fmt: skip
        moment = {"start": "random", "frame": "random"} if train else {}
        self.clips = _Clips(
            source, transform or image_transform(train=train), train=train, seed=seed, gain_db=gain_db,
            duration=duration, sample_rate=sample_rate, min_duration=min_duration, **moment,
        )  # fmt: skip
        if num_workers:
            self.clips.at_hand = torch.full((num_workers, 2), -1).share_memory_()
            _LOADERS.add(self)
        self.batches = DataLoader(
            self.clips, batch_sampler=self.sampler, collate_fn=self.clips.collate, num_workers=num_workers,
            persistent_workers=num_workers > 0, pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # of the workers' seeds, which nothing uses: spares the global generator
        )  # fmt: skip
        self.epoch = self.consumed = self.tried = self.failed = 0
        self.report = Path(report) if report is not None else None
        if self.report and world_size > 1:
            self.report = self.report.with_name(f"{self.report.stem}.rank{rank}{self.report.suffix}")
        self._reported = _reported(self.report) if self.report else set()

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        if self.consumed and not self.sampler.rest(self.consumed):  # left after the last batch
            self.epoch, self.consumed = self.epoch + 1, 0
        self.sampler.epoch, self.sampler.consumed = self.epoch, self.consumed
        batches = iter(self.batches)
        _name_clips_of_dead_workers()
        while (found := self._next(batches)) is not None:
            batch, errors, tried = found
            self.consumed += self.sampler.global_batch
            self._count(errors, tried)
            if batch is not None:
                yield batch
        self.epoch, self.consumed = self.epoch + 1, 0

    def _next(self, batches: Iterator) -> tuple[Batch | None, list[ClipError], int] | None:
        try:
            return next(batches, None)
        except (OSError, EOFError) as error:  # a worker died while it was handing tensors over
            if not self.batches.num_workers:
                raise
            raise RuntimeError(_with_clips(f"DataLoader worker (pid unknown) is gone: {error!r}.")) from error
        except RuntimeError as error:
            if not DEAD_WORKER.match(str(error)):
                raise
            raise RuntimeError(_with_clips(str(error))) from error

    def _count(self, errors: list[ClipError], tried: int) -> None:
        self.tried += tried
        self.failed += len(errors)
        if self.report:
            new = {error.path: error for error in errors if error.path not in self._reported}
            self._reported.update(new)
            facts = (
                {"path": e.path, "stream": e.stream, "reason": e.reason, "epoch": self.epoch} for e in new.values()
            )
            with open(self.report, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(fact) + "\n" for fact in facts)
        if self.failed > self.max_failed * max(self.tried, min(FLOOR, len(self.source.rows))):
            raise RuntimeError(
                f"{self.failed} of {self.tried} clips have failed, more than max_failed={self.max_failed:.0%}; "
                + (f"the last is {errors[-1]}; " if errors else "")
                + (f"all are in {self.report}" if self.report else "report= lists them")
            )

    def state_dict(self) -> dict:
        """Where the run stands, as JSON can hold it. It is the same on all ranks, but for the counts of failures."""
        place = {"epoch": self.epoch, "consumed": self.consumed, "tried": self.tried, "failed": self.failed}
        return place | {"seed": self.sampler.seed, "sha256": self.source.sha256}

    def load_state_dict(self, state: dict) -> None:
        """Go on with the next clip after the last batch before `state_dict`, with any number of ranks and workers.

        Raises ValueError where the state is of another seed or another list of clips: their order differs.
        """
        for name, own in (("seed", self.sampler.seed), ("sha256", self.source.sha256)):
            if state[name] != own:
                raise ValueError(f"the state is of {name} {state[name]}, this loader's is {own}: its order is another")
        self.epoch, self.consumed = state["epoch"], state["consumed"]
        self.tried, self.failed = state["tried"], state["failed"]


# How torch begins its error when a worker dies, unless it names the clip already.
DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?!.* was reading )")
_LOADERS: "weakref.WeakSet[ClipLoader]" = weakref.WeakSet()  # those with workers


def _with_clips(error: str) -> str:
    """An error about dead workers, and what they were reading."""
    running = multiprocessing.active_children()
    at_hand = [(pid, loader.source.name(index)) for loader in _LOADERS for pid, index in loader.clips.at_hand.tolist()
               if pid >= 0]  # fmt: skip
    if {pid for pid, _ in at_hand} <= {child.pid for child in running}:  # one has closed its files and is about to end
        ended = multiprocessing.connection.wait([child.sentinel for child in running], timeout=5)
        for child in running:
            if child.sentinel in ended:
                child.join(timeout=5)  # the system closes its end of the sentinel before the process is gone
        running = multiprocessing.active_children()
    names = [name for pid, name in at_hand if pid not in {child.pid for child in running}]
    return f"{error.rstrip(' .')}. It was reading {', '.join(names) or 'nothing yet'}"


def _name_clips_of_dead_workers() -> None:
    """Have torch's handler of SIGCHLD name the clip: it raises wherever the main thread is, as in a training step."""
    torchs = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    main = threading.current_thread() is threading.main_thread()
    if not callable(torchs) or hasattr(torchs, "names_clips") or not main:
        return

    def handler(number: int, frame: FrameType | None) -> None:
        try:
            torchs(number, frame)
        except RuntimeError as error:
            raise RuntimeError(_with_clips(str(error))) from error

    handler.names_clips = True
    signal.signal(signal.SIGCHLD, handler)


def _reported(path: Path) -> set[str]:
    """The clips that a report names."""
    paths, text = set(), path.read_text(encoding="utf-8") if path.exists() else ""
    if text and not text.endswith("\n"):  # a run that was killed left its last line incomplete
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n")
    for line in text.splitlines():
        try:
            paths.add(json.loads(line)["path"])
        except ValueError:
            continue
    return paths
