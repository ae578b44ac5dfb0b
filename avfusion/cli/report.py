"""`avfusion report`: what trained models make of your clips, as pages."""

import argparse
from pathlib import Path

from avfusion.cli import options

RUNS = ("localize", "segment", "separate", "finetune", "probe")


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description = (
        "Write one HTML page a clip, which needs no other file: where its sound comes from, what sounds, separated "
        "sounds to play, likely classes, clips that are like it; as far as you name runs for them. Of a clip that is "
        "longer than ten minutes the page plays those in the middle."
    )
    add = parser.add_argument
    add("clips", nargs="+", type=Path, metavar="CLIP", help="video files, or directories to search for them")
    for task in RUNS:
        add(f"--{task}", type=Path, metavar="RUN", help=f"run of `avfusion {task} train`")
    add("--encoder", metavar="RUN|FILE", help="encoder to compare clips by; needs --collection")
    add("--collection", type=Path, metavar="FEATURES",
        help="clips to compare with: the folder or file that `avfusion embed` wrote")  # fmt: skip
    add("--neighbours", type=options.count(1), metavar="N", help="how many of them to show (default: 3)")
    add("--out", type=Path, default=Path("reports"), metavar="DIR", help="folder of the pages (default: %(default)s)")
    options.add_machine(parser)
    parser.set_defaults(run=run, parser=parser, stopped="The pages that are listed are whole.")


def run(args: argparse.Namespace) -> int:
    paths, device = options.video_files(args), options.machine(args)
    if (args.encoder is None) != (args.collection is None):
        args.parser.error("neighbours need both: --encoder, and --collection that `avfusion embed` wrote with it")
    if args.neighbours and args.encoder is None:
        args.parser.error("--neighbours needs --encoder and --collection, to compare with")
    options.check_folder(args.parser, "--out", args.out)

    from avfusion.embedding.embed import Embedder
    from avfusion.embedding.search import Collection
    from avfusion.media.clip import ClipError
    from avfusion.models.checkpoint import load_encoder
    from avfusion.tasks.downstream import encoder_file, load_run, predict
    from avfusion.viz.report import Reporter

    asked, dtype = {}, options.dtype_of(args, device)
    for name in RUNS:
        if getattr(args, name):
            task, model = load_run(getattr(args, name), name)
            model.to(device)
            asked[name] = task.window, lambda clip, task=task, model=model: predict(task, model, clip, dtype)
    collection = None
    if args.encoder is not None:
        encoder = load_encoder(encoder_file(args.encoder)).to(device)
        try:
            collection = Collection(args.collection, Embedder(encoder))
        except ValueError as error:
            raise ValueError(f"{error} than {args.encoder}: embed the collection with it") from error
    reporter, failed, taken = Reporter(asked, collection, args.neighbours or 3), [], set()
    for path in paths:
        page = args.out / f"{options.free_name(path.stem, taken)}.html"
        try:
            reporter.write(path, page)
        except ClipError as error:
            failed.append(error)
        else:
            print(page)
    return options.report_failed(failed, len(paths))
