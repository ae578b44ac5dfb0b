"""The command line, `avfusion COMMAND`: embed and report on clips; make, pack or browse data sets; train."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import avfusion
from avfusion.data import command as shard
from avfusion.data.table import VIDEO_SUFFIXES, find_videos
from avfusion.synth import command as synth
from avfusion.tasks import command as pretrain
from avfusion.tasks import downstream_command as downstream

if TYPE_CHECKING:  # imported where they are needed: `--help` loads nothing heavy
    from avfusion.features import Features
    from avfusion.model import DeepAVFusion

EMBED_HELP = """\
Turn video clips into audio-visual features.

Of each clip the model sees three seconds of sound around the middle and the frame there. The output is a safetensors
file with one row for each clip that could be read, float32 (the shapes are those of ViT-B):

  x_image    [N, 196, 768]   one vector for each of the 14 x 14 image patches
  x_audio    [N,  96, 768]   one for each of the 8 x 12 patches of the log-mel spectrogram
  x_fusion   [N,  32, 768]   the fusion tokens, which have seen both (dense and token fusion: 16)
  pooled     [N,   3, 768]   means over the tokens: image, audio, fusion

Its metadata lists the clips of the rows, where their windows start, the clips that failed, and the model.
"""

EMBED_EPILOG = """\
examples:
  avfusion embed clip.mp4 --checkpoint deepavfusion.pth
  avfusion embed videos/ --checkpoint deepavfusion.pth --out videos.safetensors --workers 4
  avfusion embed clip.mp4 --checkpoint deepavfusion.pth --plot      # also features_plots/clip.png

in Python:
  from avfusion.features import Features
  features = Features.load("features.safetensors")
  features.clips[0], features.pooled[0]

exit status: 0 all clips embedded, 1 some clips failed (the others are written), 2 usage or checkpoint error
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line on `argv` (None: the process's own) and return its exit status; usage errors exit with 2."""
    missing = avfusion._missing()
    parser = argparse.ArgumentParser(
        prog="avfusion", description="DeepAVFusion: early fusion of picture and sound.",
        epilog=f"`avfusion COMMAND --help` explains a command. {missing or ''}",
    )  # fmt: skip
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_embed(commands)
    synth.add_parser(commands)
    shard.add_parser(commands)
    _add_browse(commands)
    _add_report(commands)
    pretrain.add_parser(commands)
    downstream.add_parsers(commands)
    args = parser.parse_args(argv)
    if missing:
        parser.error(missing)
    return args.run(args, args.parser)


def _add_embed(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "embed", help="turn video clips into features", description=EMBED_HELP, epilog=EMBED_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("clips", nargs="+", type=Path, metavar="CLIP", help="video file, or directory to search for video files")
    add("--checkpoint", metavar="W", help="trained weights; without them the features are random numbers")
    add("--out", type=Path, default="features.safetensors", help="output file (default: %(default)s)")
    add("--plot", nargs="?", type=Path, const=True, metavar="DIR",
        help="draw clips and the fusion tokens' attention too (default DIR: <out stem>_plots by --out)")  # fmt: skip
    add("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1, ... (default: auto)")
    add("--batch-size", type=_count(1), default=8, metavar="N", help="clips at a time (default: %(default)s)")
    add("--workers", type=_count(0), default=0, metavar="N", help="processes that decode ahead (default: %(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile and CUDA graphs (default: on a GPU, once 200 clips have been seen)")  # fmt: skip
    add("--fusion", choices=["factorized", "dense", "token", "none"],
        help="only without --checkpoint: the kind of fusion (default: factorized)")  # fmt: skip
    add("--seed", type=int, help="only without --checkpoint: seed of the random weights (default: 0)")
    parser.set_defaults(run=_embed, parser=parser)


def _count(least: int):
    def count(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return count


def _embed(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    paths = _video_files(args.clips, parser)
    if args.checkpoint and (args.fusion or args.seed is not None):
        parser.error("--fusion and --seed describe random weights: leave them out, the checkpoint decides")
    plots = args.out.with_name(f"{args.out.stem}_plots") if args.plot is True else args.plot
    if plots and plots.is_file():
        parser.error(f"--plot {plots}: a file, expected a directory; put the clips before --plot")
    if args.out.is_dir():
        parser.error(f"--out {args.out}: a directory, expected the name of a file")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if plots:
            plots.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot make the output directory: {error}")

    model = _model(args, parser)

    from avfusion.features import embed_clips

    progress = sys.stderr.isatty()
    options = {"batch_size": args.batch_size, "num_workers": args.workers, "compile": args.compile}
    features = embed_clips(model, paths, progress=progress, **options)
    features.checkpoint = args.checkpoint
    if features.clips:
        features.save(args.out)
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in features.tensors().items())
        print(f"{args.out}: {shapes}")
        if plots:
            _plot(model, features, plots, progress)
            print(f"{plots}: {len(features.clips)} pictures")
    else:
        print(f"no clip could be read: {args.out} is not written", file=sys.stderr)
    if features.failed:
        print(f"{len(features.failed)} of {len(paths)} clips failed:", file=sys.stderr)
        for error in features.failed:
            print(f"  {error}", file=sys.stderr)
    return 1 if features.failed else 0


def _video_files(clips: Iterable[Path], parser: argparse.ArgumentParser) -> list[Path]:
    """Files as given, directories as the video files under them; each once."""
    paths = []
    for clip in clips:
        found = [clip]
        if clip.is_dir():
            found = find_videos(clip)
        if not found:
            parser.error(f"{clip}: no video files ({' '.join(VIDEO_SUFFIXES)}) under this directory")
        paths += found
    return list(dict.fromkeys(paths))


def _model(args: argparse.Namespace, parser: argparse.ArgumentParser) -> "DeepAVFusion":
    import torch

    from avfusion.model import DeepAVFusion, EncoderConfig

    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # what torch raises for unknown and for missing devices
        parser.error(f"--device {name}: {str(error).splitlines()[0]}")

    if args.checkpoint:
        from avfusion.checkpoint import CheckpointError, load_encoder

        try:
            return load_encoder(args.checkpoint).to(device)
        except CheckpointError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
    print("WARNING: no --checkpoint: the weights are RANDOM and the features mean nothing", file=sys.stderr)
    torch.manual_seed(args.seed or 0)
    return DeepAVFusion(EncoderConfig(fusion=args.fusion or "factorized")).to(device)


def _plot(model: "DeepAVFusion", features: "Features", directory: Path, progress: bool) -> None:
    """Draw every clip of `features` into `directory`, with the last fusion layer's attention."""
    import torch
    from tqdm import tqdm

    from avfusion.clips import read_clip
    from avfusion.features import preprocessing
    from avfusion.plots import plot_clip

    weight = next(model.parameters())
    transform, mel, window = preprocessing(model.config)
    weights = Path(features.checkpoint).name if features.checkpoint else "random weights: the attention means nothing"
    taken = set()
    rows = zip(features.clips, features.starts, strict=True)
    for path, start in tqdm(rows, total=len(features.clips), unit="plot", disable=not progress):
        clip = read_clip(path, start=start, **window)
        image, spectrogram = transform(clip.frame), mel(clip.waveform)
        with torch.inference_mode():
            batch = (x[None].to(weight.device, weight.dtype) for x in (image, spectrogram))
            maps = model.eval().attention_maps(*batch)
        layer = max(maps, default=None)
        audio, video = (attention[0] for attention in maps[layer]) if maps else (None, None)
        note = f"{weights}  ·  layer {layer}" if maps else f"{weights}  ·  no fusion layers"

        name, number = Path(path).stem, 1
        while name in taken:  # clips of one name in several directories
            number += 1
            name = f"{Path(path).stem}-{number}"
        taken.add(name)
        plot_clip(directory / f"{name}.png", clip, image, spectrogram[0], video, audio, note=note)


def _add_browse(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "browse", help="look at a data set",
        description="Write an HTML page with clips of a data set: frames, boxes and masks where there are any, "
        "spectrograms, players. It needs no other file.",
    )  # fmt: skip
    add = parser.add_argument
    add("layout", metavar="LAYOUT", help="how the data set lies on disk, see `avfusion shard --help`")
    add("root", type=Path, metavar="ROOT", help="its folder")
    add("--split", metavar="NAME", help="only this split, such as test (default: all)")
    add("--clips", type=_count(1), default=12, metavar="N", help="how many to show (default: %(default)s)")
    add("--out", type=Path, default="browse.html", metavar="PAGE", help="output file (default: %(default)s)")
    parser.set_defaults(run=_browse, parser=parser)


def _browse(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from avfusion.browse import table_cards, write_page
    from avfusion.data import read

    try:
        table = read(args.layout, args.root, args.split)
        shown = write_page(args.out, table_cards(table, args.clips), title=f"{args.root.name}: {table.layout}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.out}: {shown} clips of {table}")
    return 0


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report", help="what trained models make of your clips, as pages",
        description="Write one HTML page a clip, which needs no other file: where its sound comes from, what sounds, "
        "separated sounds to play, likely classes, clips that are like it; as far as you name runs for them.",
    )  # fmt: skip
    add = parser.add_argument
    add("clips", nargs="+", type=Path, metavar="CLIP", help="video files, or directories to search for them")
    for name in ("localize", "segment", "separate", "finetune", "probe"):
        add(f"--{name}", type=Path, metavar="RUN", help=f"run of `avfusion {name} train`")
    add("--encoder", metavar="RUN|FILE", help="encoder to compare clips by; needs --collection")
    add("--collection", type=Path, metavar="FILE", help="clips to compare with: what `avfusion embed` wrote")
    add("--neighbours", type=_count(1), default=3, metavar="N", help="how many of them to show (default: %(default)s)")
    add("--out", type=Path, default=Path("reports"), metavar="DIR", help="folder of the pages (default: %(default)s)")
    parser.set_defaults(run=_report, parser=parser)


def _report(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    paths = _video_files(args.clips, parser)
    from avfusion.clips import ClipError
    from avfusion.report import Reporter, page_name

    runs = {name: getattr(args, name) for name in ("localize", "segment", "separate", "finetune", "probe")}
    try:
        reporter = Reporter.load({name: run for name, run in runs.items() if run}, args.encoder, args.collection,
                                 args.neighbours)  # fmt: skip
    except (ValueError, OSError) as error:
        parser.error(str(error))
    failed, taken = 0, set()
    for path in paths:
        page = args.out / page_name(path, taken)
        try:
            reporter.write(path, page)
        except ClipError as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            failed += 1
        else:
            print(page)
    return 1 if failed else 0
