"""`avfusion export`: write an encoder as one file, for this package, the authors' trainer, or what knows neither."""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from avfusion.cli import options

if TYPE_CHECKING:
    from torch import Tensor

    from avfusion.models.deepavfusion import EncoderConfig

DESCRIPTION = """\
Write the encoder of a pre-training run as one file.

  safetensors     for `avfusion embed --checkpoint` and `load_encoder`
  authors         a file that the authors' trainer resumes
  onnx            one graph for onnxruntime: pixels [B, 3, 224, 224] uint8 and waveform [B, 48000] float32 in; x_image,
                  x_audio, x_fusion and pooled out. Normalisation and spectrogram are inside
  torch-export    the same for torch.export.load, which needs nothing but torch

The last two take an encoder's file, too. They are loaded again and compared with the encoder on a clip before they get
their name. docs/export.md shows how to run them.
"""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description, parser.formatter_class = DESCRIPTION, options.RAW
    parser.add_argument(
        "folder", type=Path, metavar="RUN", help="folder of a pre-training run; of programs also a file"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: RUN/encoder.safetensors, .pth, .onnx or .pt2"
    )
    parser.add_argument("--format", choices=["safetensors", "authors", "onnx", "torch-export"], default="safetensors",
                        help="see above (default: %(default)s)")  # fmt: skip
    parser.add_argument("--clip", type=Path, metavar="CLIP",
                        help="video to compare with the encoder on (default: a synthetic clip)")  # fmt: skip
    parser.set_defaults(run=run, parser=parser, stopped="Nothing is written; run it again.")


def run(args: argparse.Namespace) -> int:
    if args.format in ("safetensors", "authors"):
        if args.clip:
            args.parser.error(f"--clip is to compare programs on: --format {args.format} is none")
        from avfusion.training.export import export

        path, step = export(args.folder, args.out, authors=args.format == "authors")
        print(f"{path}: the encoder after step {step}")
        return 0

    from avfusion.models.checkpoint import load_encoder
    from avfusion.models.programs import SUFFIXES, export_program, missing_packages
    from avfusion.tasks.downstream import encoder_file

    if missing := missing_packages(args.format):
        args.parser.error(f"--format onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")
    suffix, folder = SUFFIXES[args.format], args.folder
    out = args.out or (folder / f"encoder{suffix}" if folder.is_dir() else folder.with_suffix(suffix))
    if out.suffix != suffix:
        args.parser.error(f"--out {out}: expected a name in {suffix}")
    options.check_folder(args.parser, "--out", out.parent)
    encoder = load_encoder(encoder_file(str(folder)))
    off = export_program(encoder, out, args.format, clip_for(encoder.config, args.clip))
    told = ", ".join(f"{name} {value:.0e}" for name, value in off.items())
    print(f"{out}: pixels and waveform to {', '.join(off)}; off the encoder by (norms) {told}")
    return 0


def clip_for(config: "EncoderConfig", path: Path | None) -> "tuple[Tensor, Tensor]":
    """Pixels and waveform of the middle of a clip; without one, of one of the synthetic world."""
    from avfusion.media.reader import read_clip
    from avfusion.media.transforms import image_pixels, preprocessing
    from avfusion.synth.layouts import clip_files
    from avfusion.synth.scene import Settings

    *_, window = preprocessing(config.image_size, config.audio_size)
    with tempfile.TemporaryDirectory() as made:
        if path is None:
            path = Path(made, "clip.mp4")
            path.write_bytes(
                next(data for name, data in clip_files(Settings(clips=1), 0).items() if name.endswith(".mp4"))
            )
        clip = read_clip(path, **window)
    return image_pixels(config.image_size)(clip.frame), clip.waveform[0]
