"""What every part uses: names that are not known, errors in a line, fields with help, progress, workers' ends."""

import difflib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import field
from datetime import timedelta
from typing import Any


def meant(name: object, options: Iterable[str]) -> str:
    """Which of the options may be meant, as a question; nothing where none is like it."""
    part = [option for option in options if str(name) and str(name) in option]
    close = difflib.get_close_matches(str(name), options, 1) or part
    return f"; did you mean {close[0]}?" if close else ""


def unknown(what: str, name: object, options: Iterable[str]) -> str:
    """What to say of a name that is none of the options."""
    options = list(map(str, options))
    some = f"one of {', '.join(options)}" if len(options) > 1 else "".join(options)
    return f"{what}={name!r}: expected {some}{meant(name, options)}"


@contextmanager
def without_signals(*numbers: int) -> Iterator[None]:
    """Processes that are started here never see these signals: what terminals and schedulers send is their parent's."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Called in a worker process: it ends when its parent does, however that ends, and whatever it waits for."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def why(error: BaseException) -> str:
    """An error in a line: its kind and the first line of what it says, never nothing."""
    told = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {told}" if told else type(error).__name__


def setting(default: Any, text: str, **metadata) -> Any:
    """A field of a dataclass with what `--help` prints for it.

    `choices` it has, `least` value it takes, and its `name` on the command line and in run.json if that is another.
    """
    return field(default=default, metadata={"help": text, **metadata})


class Progress:
    """How far long work is: a bar on a terminal, elsewhere a line every 30 s, both on stderr. `total` may change.

    with Progress(total, "clip", show=True) as progress:
        progress.update(done, loss=0.3)
    """

    def __init__(self, total: int, unit: str, *, initial: int = 0, show: bool = True, every: float = 30.0):
        self.total, self.unit, self.initial, self.done, self.every = total, unit, initial, initial, every
        self.began = self.told = time.monotonic()
        self.show, self.bar = show, None
        if show and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=initial, unit=unit)

    def update(self, done: int, **facts: object) -> None:
        """`done` of the total so far, and facts to show."""
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.set_postfix(facts, refresh=False)
            self.bar.update(done - self.done)
        self.done, now = done, time.monotonic()
        if self.show and self.bar is None and now - self.told >= self.every:
            self.told, pace = now, (now - self.began) / max(done - self.initial, 1)
            told = "".join(f", {name} {fact}" for name, fact in facts.items())
            left = timedelta(seconds=round(pace * (self.total - done)))
            print(f"{self.unit} {done}/{self.total}{told}, {left} left", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        if self.bar is not None:
            self.bar.close()
