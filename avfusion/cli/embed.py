"""`avfusion embed`: turn video files, of any length and number, into features."""

import argparse
import os
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from avfusion.cli import options
from avfusion.common import Progress

if TYPE_CHECKING:
    import torch

    from avfusion.embedding.embed import Embedder
    from avfusion.models.deepavfusion import DeepAVFusion

DESCRIPTION = """\
Turn video files into audio-visual features, one row a window: three seconds of sound, and the frame in their middle.

Each file has one window, in its middle, or as --every, --at or --windows say. A file is decoded once, from front to
back, in memory that does not grow with its length. --out names a folder of Parquet (or safetensors) files, which are
written one after the other: killed at any moment, the same command goes on after the last of them. Columns (ViT-B):

  file, window, windows     the file; which of its windows, of how many
  start, end, frame_time    seconds from the file's beginning
  image, audio, fusion      [768] each: means over the tokens (--frames: over a window's frames, too)

and, with --tokens, all of them (1 MB a row in fp32):

  x_image    [196, 768]     one vector for each of the 14 x 14 image patches
  x_audio    [ 96, 768]     one for each of the 8 x 12 patches of the log-mel spectrogram
  x_fusion   [ 32, 768]     the fusion tokens, which have seen both (dense and token fusion: 16)

_manifest.json names the model, the settings, the files that are done, and those that failed and why.
"""

EPILOG = """\
examples:
  avfusion embed clip.mp4                                       # at once, by the small encoder in the package
  avfusion embed clip.mp4 --checkpoint deepavfusion.pth
  avfusion embed talk.mp4 --every 1.0 --checkpoint deepavfusion.pth --out talk       # a row a second
  avfusion embed videos/ @more.txt --checkpoint deepavfusion.pth --out s3://bucket/features --workers 8
  torchrun --nproc-per-node 8 -m avfusion embed videos/ --checkpoint deepavfusion.pth
  avfusion embed clip.mp4 --checkpoint deepavfusion.pth --out clip.npy               # [rows, 3, 768], and clip.csv

in Python:
  from avfusion import Features
  features = Features.load("features")       # or pandas.read_parquet("features"), pyarrow.dataset, polars, DuckDB, ...
  features.clips[0], features.starts[0], features.pooled[0]

exit status: 0 all files are done, 3 some failed (they are listed, all else is written), 1 nothing could be read or
written, 2 usage error, 130 or 143 stopped by Ctrl-C or SIGTERM (what is done is written; the same command goes on)
"""

DEFAULT = "synth-small"
FILES = (".safetensors", ".parquet", ".npy")


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description, parser.epilog, parser.formatter_class = DESCRIPTION, EPILOG, options.RAW
    add, which = parser.add_argument, parser.add_mutually_exclusive_group()
    add("clips", nargs="+", metavar="CLIP",
        help="video file, or folder of them, here or at s3://, gs://, hf://; @FILE: a list, one a line")  # fmt: skip
    add("--checkpoint", metavar="W", default=DEFAULT,
        help="trained weights: file, run or hf://org/name (default: %(default)s, which is in the package: a "
             "demonstration, trained on synthetic clips alone)")  # fmt: skip
    which.add_argument("--every", type=options.number, metavar="SECONDS", help="a window each so many seconds")
    which.add_argument("--at", type=options.numbers, metavar="T,T,...", help="windows that begin at these seconds")
    which.add_argument("--windows", type=options.count(1), metavar="N", help="so many a file, evenly spread")
    add("--frames", type=options.count(1), default=1, metavar="K", help="frames a window (default: %(default)s)")
    add("--keep-frames", action="store_true", help="a row for each frame of a window; otherwise their mean")
    add("--out", default="features", metavar="DIR|FILE",
        help="folder, or, for what fits in memory, .parquet, .safetensors or .npy (default: %(default)s)")  # fmt: skip
    add("--format", choices=["parquet", "safetensors"], help="of the files in the folder (default: parquet)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--pooled", action="store_true", help="keep means over tokens alone: the default")
    kind.add_argument("--tokens", action="store_true", help="keep all tokens, too")
    add("--store-dtype", choices=["fp32", "fp16", "bf16"], default="fp32",
        help="what features are stored in; Parquet knows no bf16 (default: %(default)s)")  # fmt: skip
    add("--shard-rows", type=options.count(1), metavar="N", help="rows a file of the folder (default: 64 MiB of them)")
    add("--plot", nargs="?", type=Path, const=True, metavar="DIR",
        help="draw windows and the fusion tokens' attention too (default DIR: <out>_plots)")  # fmt: skip
    add("--engine", choices=["local", "ray"], default="local",
        help="ray: spread over a cluster by Ray Data (default: %(default)s; torchrun spreads, too)")  # fmt: skip
    add("--address", metavar="A", help="of a Ray cluster, such as auto (default: this machine alone)")
    add("--batch-size", type=options.count(1), metavar="N", help="windows at a time (default: 8; on a GPU 128)")
    add("--workers", type=options.count(0), metavar="N",
        help="processes that decode ahead (default: with a GPU one a core, else one for four)")  # fmt: skip
    options.add_timeout(parser)
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile and CUDA graphs (default: on a GPU, once 200 windows have been seen)")  # fmt: skip
    add("--fusion-num-heads", type=options.count(1), metavar="N",
        help="heads of the checkpoint's fusion blocks, where it does not tell them")  # fmt: skip
    options.add_machine(parser, dtype="auto")
    parser.set_defaults(run=run, parser=parser, stopped="What is done is written; the same command goes on.")


def run(args: argparse.Namespace) -> int:
    plots, files = check(args), options.video_names(args)
    cluster = join(args) if args.engine == "ray" else None
    device = cluster or options.machine(args)
    dtype, single = options.dtype_of(args, device), args.out.endswith(FILES)

    from avfusion import distributed
    from avfusion.embedding.embed import Embedder
    from avfusion.embedding.engines import embed_files
    from avfusion.embedding.features import Features, facts_of
    from avfusion.embedding.store import Store

    if cluster is None:
        distributed.start(device, apart=True)
    windows = {"every": args.every, "at": args.at or (), "count": args.windows, "frames": args.frames}
    # On a CPU decoding takes an eighth of what the model does, and both want all cores.
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    size, workers = (128, cores) if device.type == "cuda" else (8, cores // 4)
    embedder = Embedder(
        load(args, device if cluster is None else "cpu"), windows=windows | {"batch_size": args.batch_size or size},
        dtype=dtype, pooled=not args.tokens, keep_frames=args.keep_frames, compile=args.compile,
    )  # fmt: skip
    check_space(args, embedder, files)
    made = {"checkpoint": args.checkpoint, "windows": windows, "tokens": args.tokens, "keep_frames": args.keep_frames,
            "computed": str(dtype).removeprefix("torch."), "stored": args.store_dtype}  # fmt: skip
    # What becomes one file is a folder beside it until then.
    out = str(Path(args.out).with_name(f".{Path(args.out).name}.parts")) if single else args.out
    own = "safetensors" if args.out.endswith(".safetensors") else "parquet"
    suffix, rank = args.format or own, distributed.rank()
    store = Store(out, facts_of(embedder.model) | made, suffix=suffix, shard_rows=args.shard_rows, rank=rank)
    distributed.barrier()  # the first has made the folder
    if store.whole or store.begun:
        distributed.say(f"{out}: goes on after {store.rows:,} rows of {len(store.whole) + len(store.begun):,} files")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        failed = embed_files(
            embedder, files, store, num_workers=workers if args.workers is None else args.workers,
            timeout=args.loader_timeout, cluster=cluster, progress=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, before)
        distributed.stop()
    if rank:
        return 0  # the first tells
    if not store.rows:
        print(f"no clip could be read: {args.out} has no features", file=sys.stderr)
    elif single:
        found = Features.load(out)
        found.save(args.out, args.store_dtype)
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in found.tensors().items())
        print(f"{args.out}: {shapes if not args.out.endswith('.npy') else f'pooled {list(found.pooled.shape)}'}")
    else:
        print(f"{args.out}: {store.rows:,} rows of {len(store.whole) + len(store.begun):,} files")
    if plots and store.rows:
        plot(args, embedder, out, plots)
    if single:
        shutil.rmtree(out)
    options.report_failed(failed, len(files))
    return (3 if store.rows else 1) if failed else 0


def check(args: argparse.Namespace) -> Path | None:
    """Finds out what cannot be meant, or written, before the long work; returns the folder of the pictures."""
    from avfusion.remote import is_remote

    error, single, out = args.parser.error, args.out.endswith(FILES), Path(args.out)
    if args.keep_frames and args.frames == 1:
        error("--keep-frames: a window has one frame; give --frames K")
    if args.address and args.engine != "ray":
        error("--address is of a Ray cluster: give --engine ray")
    if args.engine == "ray" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        error("--engine ray starts processes of its own: leave torchrun out")
    if args.engine == "ray" and (args.threads or args.workers is not None):
        error("--threads and --workers are of this machine: Ray decodes and embeds on all cores of its cluster")
    if args.engine == "ray" and args.device not in ("auto", "cpu", "cuda"):
        error(f"--device {args.device}: Ray gives each process its device: expected auto, cuda or cpu")
    if args.engine == "ray" and find_spec("ray") is None:
        error("--engine ray needs Ray Data: pip install 'avfusion[ray]'")
    suffix = out.suffix if single else f".{args.format or 'parquet'}"
    if args.store_dtype == "bf16" and suffix != ".safetensors":
        error(f"--store-dtype bf16: {suffix[1:]} knows no bfloat16: take fp16, or safetensors")
    if single and args.format:
        error(f"--format is of the files in a folder: --out {args.out} tells its own")
    if args.out.endswith(".npy") and args.tokens:
        error("--tokens: an .npy file holds one array, the means; write a folder, or .safetensors")
    try:
        remote = is_remote(args.out)
    except ValueError as wrong:
        error(f"--out {wrong}")
    if remote:
        if single or args.plot is True:
            error(f"--out {args.out}: at an address, write a folder of shards, and give --plot a folder here")
    elif single and out.is_dir():
        error(f"--out {args.out}: a directory, expected the name of a file")
    elif not single and (out.is_file() or out.suffix in (".pt", ".pth", ".csv", ".json", ".h5", ".npz")):
        error(f"--out {args.out}: expected a folder, or the name of a file in {', '.join(FILES)}")
    else:
        options.check_folder(args.parser, "--out", out.parent if single else out)
    plots = out.with_name(f"{out.stem if single else out.name}_plots") if args.plot is True else args.plot
    if plots and plots.is_file():
        error(f"--plot {plots}: a file, expected a directory; put the clips before --plot")
    if plots:
        options.check_folder(args.parser, "--plot", plots)
    return plots


def join(args: argparse.Namespace) -> "torch.device":
    """Joins Ray's cluster and returns where it computes; a usage error where that cannot be."""
    from avfusion.embedding.engines import join_cluster

    try:
        return join_cluster(args.address, args.device)
    except (ConnectionError, ValueError) as error:
        args.parser.error(f"--engine ray: {error}")


def check_space(args: argparse.Namespace, embedder: "Embedder", files: list[str]) -> None:
    """A usage error where the rows, by the length of some of the files, do not fit on the disk."""
    from avfusion.media.reader import length_of
    from avfusion.remote import is_remote

    if is_remote(args.out):
        return
    config, each = embedder.model.config, len(args.at or ()) or args.windows or 1
    if args.every:
        some = [length_of(file) for file in files[:: max(len(files) // 20, 1)]]
        each = sum(1 + (length or 0) / args.every for length in some) / len(some)
    rows = each * len(files) * (args.frames if args.keep_frames else 1)
    patches = sum(rows * columns for rows, columns in (config.image_grid, config.audio_grid))
    vectors = 3 + (patches + config.num_fusion_tokens) * args.tokens
    needed = rows * vectors * config.dim * (4 if args.store_dtype == "fp32" else 2)
    free = shutil.disk_usage(Path(args.out).absolute().parent).free
    if needed > free:
        args.parser.error(f"--out {args.out}: about {rows:,.0f} rows need {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} GB "
                          "are free: another disk, --store-dtype fp16, or without --tokens")  # fmt: skip


def load(args: argparse.Namespace, device: "torch.device | str") -> "DeepAVFusion":
    from avfusion.models.checkpoint import load_encoder
    from avfusion.tasks.downstream import encoder_file

    if args.checkpoint == DEFAULT:
        print(f"NOTE: {DEFAULT} has seen synthetic clips alone; for real ones give --checkpoint", file=sys.stderr)
    known = {"fusion_num_heads": args.fusion_num_heads} if args.fusion_num_heads else {}
    return load_encoder(encoder_file(args.checkpoint), **known).to(device)


def plot(args: argparse.Namespace, embedder: "Embedder", features: str, directory: Path) -> None:
    """Draw every window of the features in a folder into `directory`, with the last fusion layer's attention."""
    import torch

    from avfusion.embedding.store import parts
    from avfusion.media.reader import read_clip
    from avfusion.media.transforms import preprocessing
    from avfusion.viz.plots import plot_clip

    model = embedder.model
    transform, mel, window = preprocessing(model.config.image_size, model.config.audio_size)
    told = Path(args.checkpoint).name
    rows = [row for part in parts(features, ("file", "start"))
            for row in zip(part["file"].tolist(), part["start"].tolist(), strict=True)]  # fmt: skip
    taken = set()
    with Progress(len(rows), "plot") as shown:
        for done, (path, start) in enumerate(dict.fromkeys(rows), 1):
            clip = read_clip(path, start=start, **window)
            image, spectrogram = transform(clip.frame), mel(clip.waveform)
            with torch.inference_mode():
                weight = model.fusion_tokens
                batch = (x[None].to(weight.device, weight.dtype) for x in (image, spectrogram))
                maps = model.eval().attention_maps(*batch)
            layer = max(maps, default=None)
            audio, video = (attention[0] for attention in maps[layer]) if maps else (None, None)
            note = f"{told}  ·  layer {layer}" if maps else f"{told}  ·  no fusion layers"
            name = options.free_name(Path(path).stem, taken)
            plot_clip(directory / f"{name}.png", clip, image, spectrogram[0], video, audio, note=note)
            shown.update(done)
    print(f"{directory}: {len(taken)} pictures")
