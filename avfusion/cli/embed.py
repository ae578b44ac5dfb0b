"""`avfusion embed`: turn video clips into features."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from avfusion.cli import options
from avfusion.common import Progress

if TYPE_CHECKING:
    import torch

    from avfusion.embedding.store import Features
    from avfusion.models.deepavfusion import DeepAVFusion

DESCRIPTION = """\
Turn video clips into audio-visual features.

Of each clip the model sees three seconds of sound around the middle and the frame there. The output is a safetensors
file with one row for each clip that could be read, float32 (the shapes are those of ViT-B):

  x_image    [N, 196, 768]   one vector for each of the 14 x 14 image patches
  x_audio    [N,  96, 768]   one for each of the 8 x 12 patches of the log-mel spectrogram
  x_fusion   [N,  32, 768]   the fusion tokens, which have seen both (dense and token fusion: 16)
  pooled     [N,   3, 768]   means over the tokens: image, audio, fusion

Its metadata lists the clips of the rows, where their windows start, the clips that failed, and the model.
"""

EPILOG = """\
examples:
  avfusion embed clip.mp4 --checkpoint deepavfusion.pth
  avfusion embed videos/ --checkpoint deepavfusion.pth --out videos.safetensors --workers 4
  avfusion embed clip.mp4 --checkpoint deepavfusion.pth --plot      # also features_plots/clip.png

in Python:
  from avfusion import Features
  features = Features.load("features.safetensors")
  features.clips[0], features.pooled[0]

exit status: 0 all clips embedded, 1 some clips failed (the others are written), 2 usage error, 130 Ctrl-C (what is done
is written, the other clips are listed beside it)
"""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description, parser.epilog, parser.formatter_class = DESCRIPTION, EPILOG, options.RAW
    add = parser.add_argument
    add("clips", nargs="+", type=Path, metavar="CLIP",
        help="video file, or directory to search for them; @FILE: a file that lists them, one a line")  # fmt: skip
    add("--checkpoint", metavar="W", help="trained weights; without them the features are random numbers")
    add("--out", type=Path, default="features.safetensors", metavar="FILE", help="default: %(default)s")
    add("--plot", nargs="?", type=Path, const=True, metavar="DIR",
        help="draw clips and the fusion tokens' attention too (default DIR: <out stem>_plots by --out)")  # fmt: skip
    add("--batch-size", type=options.count(1), default=8, metavar="N", help="clips at a time (default: %(default)s)")
    add("--workers", type=options.count(0), default=0, metavar="N",
        help="processes that decode ahead (default: %(default)s)")  # fmt: skip
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile and CUDA graphs (default: on a GPU, once 200 clips have been seen)")  # fmt: skip
    add("--fusion", choices=["factorized", "dense", "token", "none"],
        help="only without --checkpoint: the kind of fusion (default: factorized)")  # fmt: skip
    add("--fusion-num-heads", type=options.count(1), metavar="N",
        help="heads of the checkpoint's fusion blocks, where it does not tell them")  # fmt: skip
    add("--seed", type=int, help="only without --checkpoint: seed of the random weights (default: 0)")
    options.add_machine(parser)
    parser.set_defaults(run=run, parser=parser, stopped="No batch of clips was done: nothing is written.")


def run(args: argparse.Namespace) -> int:
    paths, parser = options.video_files(args), args.parser
    if args.checkpoint and (args.fusion or args.seed is not None):
        parser.error("--fusion and --seed describe random weights: leave them out, the checkpoint decides")
    if args.fusion_num_heads and not args.checkpoint:
        parser.error("--fusion-num-heads is of a checkpoint: give --checkpoint")
    plots = args.out.with_name(f"{args.out.stem}_plots") if args.plot is True else args.plot
    if plots and plots.is_file():
        parser.error(f"--plot {plots}: a file, expected a directory; put the clips before --plot")
    if args.out.is_dir() or args.out.suffix != ".safetensors":
        what = "a directory, " if args.out.is_dir() else ""
        parser.error(f"--out {args.out}: {what}expected the name of a file in .safetensors, the format that is written")
    options.check_folder(parser, "--out", args.out.parent)
    if plots:
        options.check_folder(parser, "--plot", plots)
    model, dtype = load(args, options.machine(args)), options.dtype_of(args)

    from avfusion.embedding.embed import embed_clips

    how = {"batch_size": args.batch_size, "num_workers": args.workers, "compile": args.compile, "dtype": dtype}
    features = embed_clips(model, paths, progress=True, **how)
    features.checkpoint = args.checkpoint
    if features.clips:
        features.save(args.out)
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in features.tensors().items())
        print(f"{args.out}: {shapes}")
        if plots and not features.left:
            plot(model, features, plots)
            print(f"{plots}: {len(features.clips)} pictures")
    else:
        print(f"no clip could be read: {args.out} is not written", file=sys.stderr)
    status = options.report_failed(features.failed, len(paths))
    if features.left:
        rest = args.out.with_suffix(".left.txt")
        rest.write_text("".join(f"{path}\n" for path in features.left), encoding="utf-8")
        print(
            f"stopped by Ctrl-C: {len(features.left)} of {len(paths)} clips are left, listed in {rest}", file=sys.stderr
        )
        print(f"to go on: avfusion embed @{rest} --out {args.out.stem}-2.safetensors ...", file=sys.stderr)
        return 130
    return status


def load(args: argparse.Namespace, device: "torch.device") -> "DeepAVFusion":
    import torch

    from avfusion.models.checkpoint import load_encoder
    from avfusion.models.deepavfusion import DeepAVFusion, EncoderConfig

    if args.checkpoint:
        known = {"fusion_num_heads": args.fusion_num_heads} if args.fusion_num_heads else {}
        return load_encoder(args.checkpoint, **known).to(device)
    print("WARNING: no --checkpoint: the weights are RANDOM and the features mean nothing", file=sys.stderr)
    torch.manual_seed(args.seed or 0)
    return DeepAVFusion(EncoderConfig(fusion=args.fusion or "factorized")).to(device)


def plot(model: "DeepAVFusion", features: "Features", directory: Path) -> None:
    """Draw every clip of `features` into `directory`, with the last fusion layer's attention."""
    import torch

    from avfusion.media.reader import read_clip
    from avfusion.media.transforms import preprocessing
    from avfusion.viz.plots import plot_clip

    weight = model.fusion_tokens
    transform, mel, window = preprocessing(model.config.image_size, model.config.audio_size)
    weights = Path(features.checkpoint).name if features.checkpoint else "random weights: the attention means nothing"
    taken = set()
    shown = Progress(len(features.clips), "plot")
    for done, (path, start) in enumerate(zip(features.clips, features.starts, strict=True), 1):
        clip = read_clip(path, start=start, **window)
        image, spectrogram = transform(clip.frame), mel(clip.waveform)
        with torch.inference_mode():
            batch = (x[None].to(weight.device, weight.dtype) for x in (image, spectrogram))
            maps = model.eval().attention_maps(*batch)
        layer = max(maps, default=None)
        audio, video = (attention[0] for attention in maps[layer]) if maps else (None, None)
        note = f"{weights}  ·  layer {layer}" if maps else f"{weights}  ·  no fusion layers"

        name = options.free_name(Path(path).stem, taken)
        plot_clip(directory / f"{name}.png", clip, image, spectrogram[0], video, audio, note=note)
        shown.update(done)
