"""`avfusion demo`: all of it once, on clips that are made on the spot, by the models in the package."""

import argparse
import sys
import time
import webbrowser
from pathlib import Path

from avfusion.cli import options

EPILOG = """\
It runs four commands and shows each before it does: clips with ground truth are made, embedded, searched, and one of
them is reported on: where in its picture the sound comes from, the sound of the picture apart from one that comes from
elsewhere, clips that are like it. The models are small and have seen synthetic clips alone; the cards beside them,
avfusion/models/weights/*.md, say what they can do.
"""
CLIPS, SEED = 8, 3  # of the first clip one object sounds in the picture, one outside, and one that is seen is silent
SYNTH = "synth {out}/clips --layout audioset --clips {clips} --seed {seed} --size 192 --preview --workers 1"
COMMANDS = (
    "embed {out}/clips --out {out}/features --plot {out}/attention",
    "search {out}/features --clip {clip} --top 3 --out {out}/search.html",
    "report {clip} --localize synth-small-localize --separate synth-small-separate --encoder synth-small "
    "--collection {out}/features --out {out}",
)


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description = (
        "Make a few clips, embed, search, localise and separate them, and show what comes out as pages."
    )
    parser.epilog, parser.formatter_class = EPILOG, options.RAW
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder of what it makes (default: %(default)s)")
    add("--seed", type=options.count(0), default=SEED, help="of the clips; others are others (default: %(default)s)")
    add("--open", action=argparse.BooleanOptionalAction, default=sys.stdout.isatty(),
        help="open the page in a browser (default: on a terminal)")  # fmt: skip
    parser.set_defaults(run=run, parser=parser, stopped="The same command goes on.")


def run(args: argparse.Namespace) -> int:
    from avfusion.cli import main

    options.check_folder(args.parser, "--out", args.out)
    began, status, clip = time.perf_counter(), 0, None
    for line in (SYNTH, *COMMANDS):
        # Names are put in after the line is split: folders may have spaces.
        words = [word.format(out=args.out, clips=CLIPS, seed=args.seed, clip=clip) for word in line.split()]
        print(f"\n$ avfusion {' '.join(words)}", flush=True)
        status = status or main(words)
        clip = clip or min((args.out / "clips").rglob("*.mp4"))
    page = args.out / f"{clip.stem}.html"
    print(f"\n{page}: what the models make of a clip. All of this took {time.perf_counter() - began:.0f} s; "
          "next: the same commands with a video of yours, or `avfusion pretrain tiny`")  # fmt: skip
    if args.open:
        webbrowser.open(page.resolve().as_uri())
    return status
