"""`avfusion browse`: look at a data set."""

import argparse
from pathlib import Path

from avfusion.cli.options import check_folder, count, layout


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description = (
        "Write an HTML page with clips of a data set: frames, boxes and masks where there are any, spectrograms, "
        "players. It needs no other file."
    )
    add = parser.add_argument
    add("layout", type=layout, metavar="LAYOUT", help="how the data set lies on disk, see `avfusion shard --help`")
    add("root", type=Path, metavar="ROOT", help="its folder")
    add("--split", metavar="NAME", help="only this split, such as test (default: all)")
    add("--clips", type=count(1), default=12, metavar="N", help="how many to show (default: %(default)s)")
    add("--out", type=Path, default="browse.html", metavar="PAGE", help="output file (default: %(default)s)")
    parser.set_defaults(run=run, parser=parser, stopped="Nothing is written; run it again.")


def run(args: argparse.Namespace) -> int:
    from avfusion.data import read
    from avfusion.viz.page import UNREADABLE, table_cards, write_page

    check_folder(args.parser, "--out", args.out.parent)
    table = read(args.layout, args.root, args.split)
    shown = write_page(
        args.out,
        table_cards(table, args.clips),
        title=f"{args.root.name}: {table.layout}",
        lead=f"Of {len(table)} clips, some from all over the list; more by --clips N.",
        empty=UNREADABLE,
    )
    print(f"{args.out}: {shown} clips of {table}")
    return 0
