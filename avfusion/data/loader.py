"""Batches of clips for training, evaluation and embedding: what becomes of clips that fail, and how to resume.

Everything random about a clip (its window, its frame, its augmentation) is a function of (seed, epoch, index). So the
batches do not depend on the number of workers, and a resumed run sees what an uninterrupted one would have seen.
"""

import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from avfusion import distributed
from avfusion.data.sampler import ClipSampler, random_seed
from avfusion.data.samples import Item, Source, Tensors, clips
from avfusion.data.workers import TIMEOUT, Workers, batches, handed_over, reading, received
from avfusion.files import append_lines
from avfusion.media.clip import ClipError

REPLACEMENTS = 10  # so many clips in a row must fail before training gives up
FLOOR = 200  # the share of failures is taken of at least so many clips, or of the whole set if that is smaller


class Batch(NamedTuple):
    """B clips. `avfusion.LogMel` turns the waveforms into spectrograms, on whatever device they have been moved to."""

    image: Tensor  # [B, 3, H, W] float32, normalised; of K clips each [B, K, 3, H, W]
    waveform: Tensor  # [B, 1, samples] float32; of K clips each [B, K, samples]
    label: Tensor  # [B] int64, -1 where the clip has no single label
    labels: Tensor | None  # [B, classes] float32, 1 for each of a clip's labels; None where the set has none
    index: Tensor  # [B] int64, into the source's rows
    start: Tensor  # [B] float64, of the waveform in seconds
    mask: Tensor | None = None  # [B, H, W], where samples have masks


class Attempt(NamedTuple):
    """What came of a clip: the item (None: it failed), the failures on the way, and how many clips were tried."""

    item: Item | None
    errors: list[ClipError]
    tried: int


class _Attempts(Dataset):
    """(epoch, index) -> `Attempt`. In training a clip that fails is replaced by another."""

    def __init__(self, items: Tensors, *, train: bool, seed: int, workers: Workers):
        self.items, self.source, self.train, self.seed = items, items.source, train, seed
        self.workers = workers

    def __getitem__(self, key: tuple[int, int]) -> Attempt:
        epoch, index = key
        errors, attempts = [], REPLACEMENTS if self.train else 1
        with torch.random.fork_rng(devices=[]):
            # An evaluation that draws, such as partners to mix, draws the same each time.
            torch.default_generator.manual_seed(random_seed(self.seed, epoch if self.train else 0, index))
            for attempt in range(attempts):
                self.workers.reads(index)
                try:
                    return Attempt(self.items[index], errors, attempt + 1)
                except ClipError as error:
                    errors.append(error)
                except Exception as error:  # a bug, or a library's: it ends the run, and says at which clip
                    what = f"{type(error).__name__} while reading this clip"
                    raise RuntimeError(f"{self.source.name(index)}: {what}") from error
                index = random_seed(self.seed, epoch, key[1], attempt) % len(self.source.rows)
        return Attempt(None, errors, attempts)


def collate(source: Source, attempts: list[Attempt]) -> tuple[Batch | None, list[ClipError], int]:
    """A batch of the clips that could be read, None where there is none; all failures; how many were tried."""
    errors, tried = [error for attempt in attempts for error in attempt.errors], sum(a.tried for a in attempts)
    items = [attempt.item for attempt in attempts if attempt.item is not None]
    if not items:
        return None, errors, tried
    images, waveforms, index, start, masks = zip(*items, strict=True)
    rows, labels = [source.rows[i] for i in index], None
    if multi_label(source):
        labels = torch.zeros(len(rows), len(source.classes))
        for line, row in zip(labels, rows, strict=True):
            line[list(row.labels)] = 1
    label = torch.tensor([-1 if row.label is None else row.label for row in rows])
    batch = (torch.stack(images), torch.stack(waveforms), label, labels, torch.tensor(index),
             torch.tensor(start, dtype=torch.float64), None if masks[0] is None else torch.stack(masks))  # fmt: skip
    return Batch(*handed_over(batch)), errors, tried


def check_failures(failed: int, tried: int, total: int, max_failed: float, last: list[ClipError], where: str) -> None:
    """Raises RuntimeError when too many clips have failed."""
    if failed > max_failed * max(tried, min(FLOOR, total)):
        latest = "".join(f"the last is {error}; " for error in last)
        raise RuntimeError(
            f"{failed} of {tried} clips have failed, more than max_failed={max_failed:.0%}; {latest}{where}"
        )


def rows_by_class(source: Source) -> list[list[int]]:
    """The rows of each class that has some. Raises ValueError where none has a label."""
    rows: dict[int, list[int]] = {}
    for index, row in enumerate(source.rows):
        for label in row.all_labels:
            rows.setdefault(label, []).append(index)
    if not rows:
        raise ValueError("balanced: no clip has a label")
    return [rows[label] for label in sorted(rows)]


def multi_label(source: Source) -> bool:
    """Whether clips may have several labels."""
    return any(row.labels for row in source.rows)


class ClipLoader:
    """Batches of a data set's clips, epoch after epoch; each `iter()` is an epoch, or what is left of one.

    For training, clips are shuffled, and one that cannot be read is replaced by another, so that batches keep their
    size: which one is a function of (seed, epoch, index). For evaluation, clips come in order, and one that cannot be
    read is left out of its batch.

    Args:
        items: the clips as tensors, by `avfusion.data.clips` or a composition of `avfusion.data.samples`; or their
            source, a `Table` or `Shards`, of which the defaults of `clips` are taken.
        batch_size: clips a batch, of this rank.
        train: see above.
        seed: of everything random.
        balanced: for training, draw a class and then a clip of it, instead of going over all clips.
        num_workers: processes that decode ahead.
        timeout: seconds without a batch of theirs that end the iteration.
        rank, world_size: this process of how many; None asks torch.distributed, where it is initialised.
        max_failed: the share of clips tried that may fail. It is taken of at least 200 clips (of the whole set if that
            is smaller), so that a bad one among the first does not end the run.
        report: a file to which each clip that failed is added once, a JSON object a line: path, stream, reason, epoch.
            With several ranks each writes its own, <name>.rank<r><suffix>.

    `failures` are the clips that have failed, each once, by path. Iterating raises RuntimeError when too many have, and
    when a worker dies or none gives anything: then with the clips that they were at.
    """

    def __init__(
        self,
        items: Tensors | Source,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        balanced: bool = False,
        num_workers: int = 0,
        timeout: float = TIMEOUT,
        rank: int | None = None,
        world_size: int | None = None,
        max_failed: float = 0.05,
        report: str | os.PathLike | None = None,
    ):
        if rank is None or world_size is None:
            rank, world_size = distributed.rank(), distributed.world_size()
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank}: expected 0 to {world_size - 1}, since world_size={world_size}")
        items = items if isinstance(items, Tensors) else clips(items, train=train)
        self.source, self.max_failed, count = items.source, max_failed, len(items.source.rows)
        if train and count < batch_size * world_size:
            raise ValueError(
                f"batch_size={batch_size} on {world_size} ranks: the set has only {count} clips, take a smaller batch"
            )
        self.sampler = ClipSampler(
            count, batch_size, train=train, seed=seed, rank=rank, world_size=world_size,
            shards=getattr(self.source, "sizes", None), classes=rows_by_class(self.source) if balanced else None,
        )  # fmt: skip
        self.workers, self.timeout = Workers(num_workers), timeout
        self.attempts = _Attempts(items, train=train, seed=seed, workers=self.workers)
        self.batches = reading(
            self.attempts, self.workers, batch_sampler=self.sampler, collate_fn=partial(collate, self.source),
            pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        self.epoch = self.consumed = self.tried = self.failed = 0
        self.report = Path(report) if report is not None else None
        if self.report and world_size > 1:
            self.report = self.report.with_name(f"{self.report.stem}.rank{rank}{self.report.suffix}")
        self.failures: dict[str, ClipError] = _reported(self.report) if self.report else {}

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        if self.consumed and not self.sampler.rest(self.consumed):  # left after the last batch
            self.epoch, self.consumed = self.epoch + 1, 0
        self.sampler.epoch, self.sampler.consumed = self.epoch, self.consumed
        for batch, errors, tried in batches(self.batches, self.workers, self.source.name, self.timeout):
            self.consumed += self.sampler.global_batch
            self._count(errors, tried)
            if batch is not None:
                yield Batch(*received(batch))
        self.epoch, self.consumed = self.epoch + 1, 0

    def some(self, rows: list[int]) -> Batch:
        """A batch of the clips in these rows, read in this process; those that cannot be read are left out.

        Raises ValueError where none can be read.
        """
        batch, errors, _ = collate(self.source, [self.attempts[0, row] for row in rows])
        if batch is None:
            raise ValueError(f"none of the clips can be read, for instance: {errors[0] if errors else 'no clips'}")
        return batch

    def _count(self, errors: list[ClipError], tried: int) -> None:
        self.tried += tried
        self.failed += len(errors)
        new = {error.path: error for error in errors if error.path not in self.failures}
        self.failures |= new
        if self.report:
            facts = (
                {"path": e.path, "stream": e.stream, "reason": e.reason, "epoch": self.epoch} for e in new.values()
            )
            append_lines(self.report, map(json.dumps, facts))
        where = f"all are in {self.report}" if self.report else "`failures` lists them"
        check_failures(self.failed, self.tried, len(self.source.rows), self.max_failed, errors[-1:], where)

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


def _reported(path: Path) -> dict[str, ClipError]:
    """The clips that a report names."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = {}
    for line in text.splitlines():
        try:
            fact = json.loads(line)
            found[fact["path"]] = ClipError(fact["path"], fact["stream"], fact["reason"])
        except (ValueError, KeyError):
            continue
    return found
