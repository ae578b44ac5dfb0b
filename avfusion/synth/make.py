"""Makes a synthetic data set, in parallel and resumably."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from avfusion.common import Progress, end_with_parent, unknown, without_signals
from avfusion.files import write_json, writing
from avfusion.synth.layouts import LAYOUTS, annotations, clip_files, scene
from avfusion.synth.render import mp4, render_frames, render_sources
from avfusion.synth.scene import Settings

FORMAT = 3  # raise it when the same settings make other clips than before


def synthesize(out: str | os.PathLike, settings: Settings, *, workers: int = 1, progress: bool = False) -> int:
    """Make the data set in the directory `out`; clips that are there already are kept. Returns how many were made.

    The annotation files are written last: a set that has them is complete.

    Raises:
        ValueError: the directory holds something else, or a set with other settings.
        OSError: a file cannot be written.
        BrokenProcessPool: a worker process was killed.
    """
    out = Path(out)
    if settings.layout not in LAYOUTS:
        raise ValueError(unknown("layout", settings.layout, LAYOUTS))
    _claim(out, settings)
    truths = [out / "truth" / scene(settings, index).id / "truth.json" for index in range(settings.clips)]
    todo = [index for index, truth in enumerate(truths) if not _complete(out, truth)]
    done = _in_processes(partial(_make, str(out), settings), todo, min(workers, len(todo)))
    before = len(truths) - len(todo)
    with Progress(len(truths), "clip", initial=before, show=progress) as shown:
        for number, _ in enumerate(done, before + 1):
            shown.update(number)
    for path, data in annotations(settings, [json.loads(truth.read_bytes()) for truth in truths]).items():
        _write(out / path, data)
    return len(todo)


def mixture(path: str | os.PathLike, settings: Settings) -> None:
    """Write a video (MP4): the picture of the first scene of a set, and the sounds of the first two, equally loud."""
    seen, heard = scene(settings, 0), scene(settings, 1)
    frames, _ = render_frames(seen, settings.size, np.arange(round(seen.seconds * settings.fps)) / settings.fps)
    own, other = (render_sources(each).sum(0) // 2 for each in (seen, heard))
    _write(Path(path), mp4(frames, settings.fps, (own + other).astype(np.int16)))


def _claim(out: Path, settings: Settings) -> None:
    """Write down what `out` is for, or check that it is for this."""
    marker, ours = out / "synth.json", {"format": FORMAT} | asdict(settings)
    if marker.exists():
        try:
            theirs = json.loads(marker.read_bytes())
        except ValueError as error:
            raise ValueError(f"{marker}: not the settings of a data set ({error}); choose another directory") from error
        differences = [
            f"{name} is {theirs.get(name)!r} there, {value!r} here"
            for name, value in ours.items()
            if theirs.get(name) != value and not (name == "clips" and theirs.get(name, value) < value)
        ]
        if differences:
            raise ValueError(f"{out}: holds a set with other settings ({'; '.join(differences)}); "
                             "use the same, or another directory")  # fmt: skip
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out}: not empty, and not made by synth (no synth.json in it); choose another directory")
    write_json(marker, ours, indent=1)


def _complete(out: Path, truth: Path) -> bool:
    """Whether a clip is there. Its truth.json is written last, so that with it everything else is."""
    return truth.exists() and (out / json.loads(truth.read_bytes())["path"]).exists()


def _make(out: str, settings: Settings, index: int) -> None:
    for path, data in clip_files(settings, index).items():
        _write(Path(out, path), data)


def _write(path: Path, data: bytes) -> None:
    with writing(path) as part:
        part.write_bytes(data)


def _in_processes(task: Callable[[int], None], indices: list[int], workers: int) -> Iterator[None]:
    if workers <= 1:
        yield from map(task, indices)
        return
    # Spawned: forking a process that has threads is unsafe, and this loads numpy and PyAV only.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        try:
            with without_signals(signal.SIGINT):
                done = pool.map(task, indices, chunksize=4)
            yield from done
        except BrokenProcessPool as error:
            raise BrokenProcessPool("a worker was killed, out of memory perhaps: use fewer --workers and run it again, "
                                    "it goes on where it stopped") from error  # fmt: skip
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and let no worker outlive a parent that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
