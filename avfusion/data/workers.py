"""Processes that read ahead: what they hand over, and an end with a reason where a run would wait for them for ever.

What a worker has read goes to the process that wants it through shared memory. Where that is used up, as in a container
with 64 MB of it, or cannot be had, it goes through a pipe, which is slower.
"""

import atexit
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from avfusion.common import end_with_parent, why, without_signals

LOOK = 5.0  # seconds from one look at whether workers live to the next
TIMEOUT = 120.0  # seconds without a batch that end a run


TABLES: list[tuple[int, Any]] = []  # of all Workers, with the process that they are of


class Workers:
    """The processes of a loader, and what each reads: the number of an item, or -1.

    `wanted` are so many; `count` is 0, with a warning, where processes can share nothing at all.
    """

    def __init__(self, wanted: int):
        self.count = wanted if wanted and _can_share(wanted) else 0
        self.table = RawArray("q", [-1] * (2 * wanted)) if self.count else []  # process and item of each
        TABLES.append((os.getpid(), self.table))

    def started(self, worker: int) -> None:
        """Called in each, with its number."""
        self.table[2 * worker] = os.getpid()
        end_with_parent()  # torch's own wait for what they have read to be taken

    def reads(self, item: int) -> None:
        """Called in each, as it begins with an item."""
        if self.count and (worker := get_worker_info()) is not None:
            self.table[2 * worker.id + 1] = item

    def at_hand(self) -> list[int]:
        """What they read, or read last."""
        return [item for item in self.table[1::2] if item >= 0]

    def held_by_dead(self, wait: float = 0.0) -> list[int] | None:
        """What workers were reading when they died; None where all live.

        `wait` seconds for one that has closed its files and is about to end.
        """
        workers = {pid: item for pid, item in zip(self.table[::2], self.table[1::2], strict=True) if pid >= 0}
        living = {child.pid: child for child in multiprocessing.active_children() if child.pid in workers}
        if wait and len(living) == len(workers):
            for sentinel in multiprocessing.connection.wait([child.sentinel for child in living.values()], wait):
                # The system closes its end of the sentinel before the process is gone.
                next(child for child in living.values() if child.sentinel == sentinel).join(wait)
            living = {child.pid for child in multiprocessing.active_children()}
        dead = [item for pid, item in workers.items() if pid not in living]
        return [item for item in dead if item >= 0] if dead else None


def kill(table: Iterable[int]) -> None:
    """Ends what lives of the workers of a table. They know no SIGTERM, by which torch ends those that hang."""
    pids = set(table[::2])
    for child in multiprocessing.active_children():
        if child.pid in pids:
            child.kill()


@atexit.register  # registered after multiprocessing's own, it runs before that, which waits for every child
def _kill_all() -> None:
    for owner, table in TABLES:
        if owner == os.getpid():  # and not one that was forked from it
            kill(table)


@cache
def _can_share(workers: int) -> bool:
    try:  # a loader has a queue for each, and some of its own
        found = [torch.multiprocessing.get_context().Queue() for _ in range(workers + 3)], RawArray("q", 2 * workers)
        del found
    except OSError as error:
        warnings.warn(f"processes can share nothing here ({why(error)}): this one reads for itself, which is slower; "
                      "give it a /dev/shm that can be written", stacklevel=4)  # fmt: skip
        return False
    return True


def reading(dataset: Dataset, workers: Workers, **options: Any) -> DataLoader:
    """A loader of the dataset by these workers; `batches` iterates over it."""
    if workers.count:
        options |= {"num_workers": workers.count, "worker_init_fn": workers.started, "timeout": LOOK}
        options |= {"persistent_workers": not isinstance(dataset, IterableDataset)}
    # A generator of the workers' seeds, which nothing uses: spares the global one.
    return DataLoader(dataset, generator=torch.Generator(), **options)


def batches(loader: DataLoader, workers: Workers, name: Callable[[int], str], timeout: float) -> Iterator[Any]:
    """What a loader of `reading` gives.

    Raises RuntimeError where a worker has died, and where nothing has come for `timeout` seconds: with the `name` of
    what they were at.
    """
    each, waited = _iterator(loader), 0.0
    while True:
        try:
            batch = next(each, each)  # it is none of its own batches
        except (RuntimeError, OSError, EOFError) as error:
            if not workers.count:
                raise
            closing = 0.0 if isinstance(error, RuntimeError) else 5.0  # it has died while it was handing tensors over
            dead = workers.held_by_dead(closing)
            if dead is None and _looked(error) and (waited := waited + LOOK) < timeout:
                continue
            told = _explained(error, dead, workers, name, waited)
            if dead is None and _looked(error):  # they hang
                kill(workers.table)
            if told is None:
                raise
            raise RuntimeError(told) from error
        if batch is each:
            return
        waited = 0.0
        yield batch


def _looked(error: Exception) -> bool:
    """Whether the loader has only waited for `LOOK` seconds; it can be asked again."""
    return str(error).startswith("DataLoader timed out after")


def _explained(
    error: Exception, dead: list[int] | None, workers: Workers, name: Callable[[int], str], waited: float
) -> str | None:
    """What an error of a loader means; None where it tells that itself."""
    if dead is not None:
        return (f"a worker has died while it was reading {', '.join(map(name, dead)) or 'nothing yet'} "
                f"({why(error)}); where memory ran out, take fewer workers")  # fmt: skip
    if _looked(error):
        return (f"the {workers.count} workers have given nothing for {waited:.0f} s (--loader-timeout); they are at "
                f"{', '.join(map(name, workers.at_hand())) or 'nothing yet'}. Where that is slow to be read, allow "
                "more; else what they have printed says what failed")  # fmt: skip
    if "Too many open files" in str(error) or "ancdata" in str(error):
        return f"too many files are open ({why(error)}): allow more by ulimit -n, or take fewer workers"
    return None


def _iterator(loader: DataLoader) -> Iterator:
    """`iter(loader)` without torch's handler of dead workers.

    It raises wherever this process is, and names no clip: a death is found where a batch is missing.
    """
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    with without_signals(signal.SIGINT, signal.SIGTERM):
        each = iter(loader)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return each


def handed_over(tensors: Iterable[Tensor | None]) -> list[Any]:
    """In a worker, tensors as they can leave it: in shared memory or, where none is left, as arrays."""
    tensors = list(tensors)
    if get_worker_info() is None:
        return tensors
    try:  # here, and not as they are sent: a failure there would only be printed, by a thread
        return [None if x is None else x.share_memory_() for x in tensors]
    except RuntimeError:  # no space, too many files, or files must not be so large
        return [None if x is None else x.numpy() for x in tensors]


def received(tensors: Iterable[Any]) -> list[Any]:
    """What `handed_over` gave, as tensors again."""
    tensors = list(tensors)
    if any(isinstance(x, np.ndarray) for x in tensors):
        _warn_of_pipes()
    return [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in tensors]


@cache
def _warn_of_pipes() -> None:
    warnings.warn("there is too little shared memory (df /dev/shm), or none can be had (ulimit -a), for what workers "
                  "read: it comes through pipes, which is slower; docker run --shm-size=8g gives a container more",
                  stacklevel=4)  # fmt: skip
