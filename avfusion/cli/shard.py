"""`avfusion shard`: pack a data set for fast reading."""

import argparse
import os
import sys
from pathlib import Path

from avfusion.cli.options import RAW, add_timeout, check_folder, count, layout

DESCRIPTION = """\
Pack a data set into WebDataset shards: tar files of JPEG frames, 16 kHz sound and labels, with an index.

LAYOUT is vggsound, vggsound-music, vggsound-instruments, vggss, audioset, music, music-solo, music21, avsbench,
flickr-soundnet, stills (frames/ and audio/ with a list), or folder for any directory of videos. Clips that are missing
are counted; clips that cannot be read are left out and listed in OUT/failed.jsonl.
"""

EPILOG = """\
examples:
  avfusion shard vggsound /data/vggsound /data/shards --workers 16
  avfusion shard folder videos/ shards/

in Python:
  from avfusion.data import ClipLoader, Shards
  loader = ClipLoader(Shards("/data/shards", "train"), batch_size=64, train=True, num_workers=8)

An interrupted run goes on with the next shard when it is repeated.
exit status: 0 all clips packed, 3 some clips failed (the others are packed), 1 too many, 2 usage error
"""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description, parser.epilog, parser.formatter_class = DESCRIPTION, EPILOG, RAW
    add = parser.add_argument
    add("layout", type=layout, metavar="LAYOUT", help="how the data set lies on disk")
    add("root", type=Path, metavar="ROOT", help="its folder")
    add("out", type=Path, metavar="OUT", help="folder of the shards")
    add("--split", metavar="NAME", help="only this split, such as train (default: all)")
    add("--label-order", choices=["names", "folders"], default="names",
        help="number classes by their names, or as the release does, by its folders (default: names)")  # fmt: skip
    add("--frame-rate", type=float, default=4.0, metavar="HZ", help="frames a second to keep (default: %(default)s)")
    add("--size", type=int, default=256, metavar="PIXELS", help="short side of the frames (default: %(default)s)")
    add("--quality", type=int, default=90, metavar="Q", help="of the JPEG files, to 95 (default: %(default)s)")
    add("--sound", choices=["flac", "wav"], default="flac", help="wav is larger and faster to read (default: flac)")
    add("--clips-per-shard", type=count(1), default=256, metavar="N", help="default: %(default)s")
    add("--workers", type=count(0), default=os.cpu_count(), metavar="N", help="processes (default: one a core)")
    add_timeout(parser)
    add("--max-failed", type=float, default=0.05, metavar="SHARE",
        help="stop when more than this share of the clips has failed (default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=run, parser=parser, stopped="The same command goes on with the next shard.")


def run(args: argparse.Namespace) -> int:
    from avfusion.data import pack, read

    table = read(args.layout, args.root, args.split, label_order=args.label_order)
    print(table)
    check_folder(args.parser, "OUT", args.out)
    failed = pack(
        table, args.out, frame_rate=args.frame_rate, size=args.size, quality=args.quality, sound=args.sound,
        clips_per_shard=args.clips_per_shard, num_workers=args.workers, timeout=args.loader_timeout,
        max_failed=args.max_failed, progress=True,
    )  # fmt: skip
    print(f"{args.out}: {len(table) - len(failed):,} clips")
    if failed:
        print(f"{len(failed)} clips failed, see {args.out / 'failed.jsonl'}", file=sys.stderr)
    return 3 if failed else 0
