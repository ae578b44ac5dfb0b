"""`avfusion demo`: all of it once, on clips that are made on the spot, by the models in the package."""

import argparse
import sys
import time
import webbrowser
from pathlib import Path

from avfusion.cli import options

EPILOG = """\
It runs four commands and shows each before it does. Clips with ground truth are made, embedded and searched; and one
more, whose picture makes one of its two sounds, is reported on: where the sound comes from, that sound apart from the
other, clips that are like it. The models are small and have seen synthetic clips alone; the cards beside them,
avfusion/models/weights/*.md, say how often they are right: on other seeds than the default they are not always.
"""
CLIPS, SIZE = 8, 192
SYNTH = "synth {out}/clips --layout audioset --clips {clips} --seed {seed} --size {size} --preview --workers 1"
COMMANDS = (
    "embed {out}/clips --out {out}/features --plot {out}/attention",
    "search {out}/features --clip {out}/mixed.mp4 --top 3 --out {out}/search.html",
    "report {out}/mixed.mp4 --localize synth-small-localize --separate synth-small-separate --encoder synth-small "
    "--collection {out}/features --out {out}",
)


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description = (
        "Make a few clips, embed, search, localise and separate them, and show what comes out as pages."
    )
    parser.epilog, parser.formatter_class = EPILOG, options.RAW
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder of what it makes (default: %(default)s)")
    add("--seed", type=options.count(0), default=0, help="of the clips (default: %(default)s)")
    add("--open", action=argparse.BooleanOptionalAction, default=sys.stdout.isatty(),
        help="open the page in a browser (default: on a terminal)")  # fmt: skip
    parser.set_defaults(run=run, parser=parser, stopped="The same command goes on.")


def run(args: argparse.Namespace) -> int:
    options.check_folder(args.parser, "--out", args.out)
    began, mixed = time.perf_counter(), args.out / "mixed.mp4"

    from avfusion.cli import main
    from avfusion.synth.make import mixture
    from avfusion.synth.scene import Settings

    mixture(mixed, Settings("flickr-soundnet", seed=args.seed, size=SIZE))
    print(f"{mixed}: two things are seen and one of them sounds, and so does something that is not seen")
    for line in (SYNTH, *COMMANDS):
        # Names are put in after the line is split: folders may have spaces.
        words = [word.format(out=args.out, clips=CLIPS, seed=args.seed, size=SIZE) for word in line.split()]
        print(f"\n$ avfusion {' '.join(words)}", flush=True)
        if status := main(words):
            return status
    page = args.out / "mixed.html"
    print(f"\n{page}: what the models make of it. All of this took {time.perf_counter() - began:.0f} s; next: the same "
          "commands with a video of yours, or `avfusion pretrain tiny`")  # fmt: skip
    if args.open:
        webbrowser.open(page.resolve().as_uri())
    return 0
