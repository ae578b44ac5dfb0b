"""`avfusion synth`: make a data set."""

import argparse
import os
from pathlib import Path

from avfusion.cli.options import RAW, count

PREVIEW_CLIPS = 12
DESCRIPTION = """\
Make an audio-visual data set with ground truth, in the files of a public one.

One to three textured objects move over a landscape or in a room; what sounds, shines and moves with its sound. There
are silent objects and sounds from off screen. Some layouts are close-ups, as their public sets are: two large objects,
one of which sounds (vggss, flickr-soundnet), or only what sounds (vggsound-music, vggsound-instruments, music). --task
decides what the labels of the annotation files mean:

  classes      what sounds: each class has a look and a timbre
  conjunction  (look + timbre) mod classes: neither picture nor sound tells anything of it, and the sum of both that
               fits best is constant
  synchrony    which of two look-alikes sounds, left or right

truth/<id>/ holds what the public sets lack: objects, boxes, instance masks and the waveform of every source.
"""

EPILOG = """\
examples:
  avfusion synth data/synth --layout vggsound --clips 2000 --workers 8
  avfusion synth data/pairs --task conjunction --classes 4 --preview     # also data/pairs/preview.html

The same settings give the same files. An interrupted run goes on where it stopped, and more --clips extend a set.
"""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description, parser.epilog, parser.formatter_class = DESCRIPTION, EPILOG, RAW
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="directory: new, empty, or made with the same settings")
    add("--layout", default="vggsound", help="whose files, see `avfusion shard --help` (default: %(default)s)")
    add("--clips", type=int, default=200, metavar="N", help="how many (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of everything random (default: %(default)s)")
    add("--task", choices=["classes", "conjunction", "synchrony"], default="classes", help="default: %(default)s")
    add("--classes", type=int, default=12, metavar="K", help="looks and timbres, 2 to 12 (default: %(default)s)")
    add("--size", type=int, default=224, metavar="PIXELS", help="height and width (default: %(default)s)")
    add("--seconds", type=float, metavar="T", help="length of a clip (default: 4; avsbench: always 5 or 10)")
    add("--fps", type=int, metavar="F", help="frames a second of the videos (default: 8)")
    add("--workers", type=count(1), default=os.cpu_count(), metavar="N", help="processes (default: one a core)")
    add("--preview", action="store_true", help=f"also write OUT/preview.html, a look at {PREVIEW_CLIPS} clips")
    parser.set_defaults(run=run, parser=parser, stopped="Clips that are made stay; the same command goes on.")


def run(args: argparse.Namespace) -> int:
    from avfusion.common import unknown
    from avfusion.synth.layouts import LAYOUTS
    from avfusion.synth.make import synthesize
    from avfusion.synth.scene import Settings

    if args.layout not in LAYOUTS:
        args.parser.error(unknown("layout", args.layout, LAYOUTS))
    if args.seconds is not None and args.layout == "avsbench":
        args.parser.error("--seconds: clips of --layout avsbench last 5 or 10 s, leave it out")
    if args.fps is not None and args.layout in ("avsbench", "flickr-soundnet"):
        args.parser.error(f"--fps: --layout {args.layout} holds pictures and no videos, leave it out")
    try:
        seconds, fps = (4.0 if args.seconds is None else args.seconds), (8 if args.fps is None else args.fps)
        settings = Settings(args.layout, args.clips, args.seed, args.task, args.classes, args.size, seconds, fps)
    except ValueError as error:
        args.parser.error(str(error))
    made = synthesize(args.out, settings, workers=args.workers, progress=True)
    print(f"{args.out}: {settings.clips} clips ({made} made now), {settings.layout}, {settings.task}")
    if args.preview:
        from avfusion.data import read
        from avfusion.viz.page import UNREADABLE, table_cards, write_page

        title = f"{args.out.name}: {settings.layout}, {settings.task}, seed {settings.seed}"
        cards = table_cards(read(settings.layout, args.out), PREVIEW_CLIPS)
        write_page(args.out / "preview.html", cards, title=title, empty=UNREADABLE)
        print(f"{args.out / 'preview.html'}: a look at it")
    return 0
