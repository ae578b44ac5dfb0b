"""`avfusion synth`: make a data set, in parallel and resumably."""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where they are needed: `--help` loads nothing heavy
    from avfusion.synth.scene import Settings

FORMAT = 3  # raise it when the same settings make other clips than before
PREVIEW_CLIPS = 12
LAYOUTS = (
    "vggsound", "vggsound-music", "vggsound-instruments", "vggss", "audioset", "music", "avsbench", "flickr-soundnet",
    "folder",
)  # fmt: skip

HELP = """\
Make an audio-visual data set with ground truth, in the files of a public one.

One to three textured objects move over a landscape or in a room; what sounds, shines and moves with its sound. There
are silent objects and sounds from off screen. Some layouts are close-ups, as their public sets are: two large objects,
one of which sounds (vggss, flickr-soundnet), or only what sounds (vggsound-music, vggsound-instruments, music). --task
decides what the labels of the annotation files mean:

  classes      what sounds: each class has a look and a timbre
  conjunction  (look + timbre) mod classes: neither picture nor sound, nor any sum of both, tells the label
  synchrony    which of two look-alikes sounds, left or right

truth/<id>/ holds what the public sets lack: objects, boxes, instance masks and the waveform of every source.
"""

EPILOG = """\
examples:
  avfusion synth data/synth --layout vggsound --clips 2000 --workers 8
  avfusion synth data/pairs --task conjunction --classes 4 --preview     # also data/pairs/preview.html

The same settings give the same files. An interrupted run goes on where it stopped, and more --clips extend a set.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `synth` to the command line's commands."""
    parser = commands.add_parser(
        "synth", help="make a data set with ground truth", description=HELP, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="directory: new, empty, or made with the same settings")
    add("--layout", choices=LAYOUTS, default="vggsound", help="whose files (default: %(default)s)")
    add("--clips", type=int, default=200, metavar="N", help="how many (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of everything random (default: %(default)s)")
    add("--task", choices=["classes", "conjunction", "synchrony"], default="classes", help="default: %(default)s")
    add("--classes", type=int, default=12, metavar="K", help="looks and timbres, 2 to 12 (default: %(default)s)")
    add("--size", type=int, default=224, metavar="PIXELS", help="height and width (default: %(default)s)")
    add("--seconds", type=float, metavar="T", help="length of a clip (default: 4; avsbench: always 5 or 10)")
    add("--fps", type=int, metavar="F", help="frames a second of the videos (default: 8)")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: one a core)")
    add("--preview", action="store_true", help=f"also write OUT/preview.html, a look at {PREVIEW_CLIPS} clips")
    parser.set_defaults(run=_run, parser=parser)


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from avfusion.synth.scene import Settings

    if args.seconds is not None and args.layout == "avsbench":
        parser.error("--seconds: clips of --layout avsbench last 5 or 10 s, leave it out")
    if args.fps is not None and args.layout in ("avsbench", "flickr-soundnet"):
        parser.error(f"--fps: --layout {args.layout} holds pictures and no videos, leave it out")
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: expected at least 1")
    try:
        seconds, fps = (4.0 if args.seconds is None else args.seconds), (8 if args.fps is None else args.fps)
        settings = Settings(args.layout, args.clips, args.seed, args.task, args.classes, args.size, seconds, fps)
        made = synthesize(args.out, settings, workers=args.workers, progress=sys.stderr.isatty())
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except BrokenProcessPool as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(f"{args.out}: {settings.clips} clips ({made} made now), {settings.layout}, {settings.task}")
    if args.preview:
        from avfusion.browse import table_cards, write_page
        from avfusion.data import read

        title = f"{args.out.name}: {settings.layout}, {settings.task}, seed {settings.seed}"
        write_page(args.out / "preview.html", table_cards(read(settings.layout, args.out), PREVIEW_CLIPS), title=title)
        print(f"{args.out / 'preview.html'}: a look at it")
    return 0


def synthesize(out: str | os.PathLike, settings: "Settings", *, workers: int = 1, progress: bool = False) -> int:
    """Make the data set in the directory `out`; clips that are there already are kept. Returns how many were made.

    The annotation files are written last: a set that has them is complete.

    Raises:
        ValueError: the directory holds something else, or a set with other settings.
        OSError: a file cannot be written.
        BrokenProcessPool: a worker process was killed.
    """
    from tqdm import tqdm

    from avfusion.synth.layouts import annotations, scene

    out = Path(out)
    if settings.layout not in LAYOUTS:
        raise ValueError(f"layout={settings.layout!r}: expected one of {', '.join(LAYOUTS)}")
    _claim(out, settings)
    truths = [out / "truth" / scene(settings, index).id / "truth.json" for index in range(settings.clips)]
    todo = [index for index, truth in enumerate(truths) if not _complete(out, truth)]
    done = _in_processes(partial(_make, str(out), settings), todo, min(workers, len(todo)))
    for _ in tqdm(done, total=len(truths), initial=len(truths) - len(todo), unit="clip", disable=not progress):
        pass
    for path, data in annotations(settings, [json.loads(truth.read_bytes()) for truth in truths]).items():
        _write(out / path, data)
    return len(todo)


def _claim(out: Path, settings: "Settings") -> None:
    """Write down what `out` is for, or check that it is for this."""
    from dataclasses import asdict

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
    _write(marker, (json.dumps(ours, indent=1) + "\n").encode())


def _complete(out: Path, truth: Path) -> bool:
    """Whether a clip is there. Its truth.json is written last, so that with it everything else is."""
    return truth.exists() and (out / json.loads(truth.read_bytes())["path"]).exists()


def _make(out: str, settings: "Settings", index: int) -> None:
    from avfusion.synth.layouts import clip_files

    for path, data in clip_files(settings, index).items():
        _write(Path(out, path), data)


def _write(path: Path, data: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def _in_processes(task: Callable[[int], None], indices: list[int], workers: int) -> Iterator[None]:
    if workers <= 1:
        yield from map(task, indices)
        return
    # Spawned: forking a process that has threads is unsafe, and this loads numpy and PyAV only.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        try:
            yield from pool.map(task, indices, chunksize=4)
        except BrokenProcessPool as error:
            raise BrokenProcessPool("a worker was killed, out of memory perhaps: use fewer --workers and run it again, "
                                    "it goes on where it stopped") from error  # fmt: skip
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and let no worker outlive a parent that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
