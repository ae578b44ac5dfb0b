"""`avfusion search`: find the windows most like a clip, a sound or a picture."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from avfusion.cli import options

if TYPE_CHECKING:
    from avfusion.embedding.decode import Batch
    from avfusion.viz.page import Card

EPILOG = """\
examples:
  avfusion search features --clip query.mp4 --at 12.5
  avfusion search features --sound bark.wav --checkpoint deepavfusion.pth
  avfusion search s3://bucket/features --image dog.jpg --top 20

exit status: 0 found, 1 a file cannot be read, or the features are another encoder's, 2 usage error
"""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description = (
        "Find, in the features that `avfusion embed` wrote, the windows most like a clip, a sound or a picture: a "
        "table with times, and an HTML page with players. Every row is compared. A sound is asked for beside a picture "
        "of one colour, a picture beside silence."
    )
    parser.epilog, parser.formatter_class = EPILOG, options.RAW
    add, query = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    add("features", metavar="FEATURES", help="folder, address or file that `avfusion embed` wrote")
    query.add_argument("--clip", type=Path, metavar="VIDEO", help="like this clip: its middle, or the window --at")
    query.add_argument("--sound", type=Path, metavar="WAV", help="like this sound (the middle three seconds)")
    query.add_argument("--image", type=Path, metavar="JPG", help="like this picture")
    add("--at", type=options.numbers, metavar="T", help="with --clip: where the window begins, in seconds")
    add("--by", choices=["joint", "image", "audio", "fusion"],
        help="features to compare (default: joint, all three; of a sound audio, of a picture image)")  # fmt: skip
    add("--top", type=options.count(1), default=10, metavar="N", help="how many (default: %(default)s)")
    add("--checkpoint", metavar="W", help="the encoder's weights (default: the file that FEATURES names)")
    add("--out", type=Path, default=Path("search.html"), metavar="PAGE", help="output file (default: %(default)s)")
    options.add_machine(parser)
    parser.set_defaults(run=run, parser=parser, stopped="Nothing is written; run it again.")


def run(args: argparse.Namespace) -> int:
    error = args.parser.error
    if args.at and (args.clip is None or len(args.at) > 1):
        error("--at is one time, of --clip")
    options.check_folder(args.parser, "--out", args.out.parent)
    device = options.machine(args)
    dtype = options.dtype_of(args, device)

    from avfusion.embedding.embed import Embedder
    from avfusion.embedding.search import Collection, ask_clip, ask_image, ask_sound
    from avfusion.embedding.store import read_rows, shards
    from avfusion.models.checkpoint import load_encoder
    from avfusion.tasks.downstream import encoder_file
    from avfusion.viz.page import write_page
    from avfusion.viz.report import hit_card

    weights = args.checkpoint or read_rows(shards(args.features)[0], ("file",))[1].get("checkpoint")
    if weights is None:
        error(f"{args.features} names no checkpoint: give --checkpoint, with the weights that made it")
    embedder = Embedder(load_encoder(encoder_file(weights)), device=device, dtype=dtype)
    collection = Collection(args.features, embedder)
    if args.clip:
        found, query = ask_clip(embedder, args.clip, *args.at or ())
    else:
        found, query = ask_sound(embedder, args.sound) if args.sound else ask_image(embedder, args.image)
    by = args.by or ("joint" if args.clip else "audio" if args.sound else "image")
    hits, name = collection.nearest(found, args.top, by), args.clip or args.sound or args.image
    for rank, hit in enumerate(hits, 1):
        print(f"{rank:3}  {hit.similarity:.3f}  {hit.start:9.2f} s - {hit.end:9.2f} s  {hit.file}")
    write_page(
        args.out,
        [query_card(query, name), *map(hit_card, hits)],
        title=f"{name.name} by {by}",
        lead=f"The {len(hits)} windows of {args.features} whose {by} features are most like it."
        if hits else f"{args.features} holds no other window: embed more clips into it by `avfusion embed`.",
        empty="",
    )  # fmt: skip
    print(f"{args.out}: {len(hits)} windows most like {name}, by {by}")
    return 0


def query_card(query: "Batch", name: Path) -> "Card":
    from avfusion.viz.page import Card

    frames = query["pixels"][0].transpose(0, 2, 3, 1)
    return Card(name.name, f"what is asked for, from {query['start'][0]:.1f} s", frames, query["start"],
                query["waveform"][0])  # fmt: skip
