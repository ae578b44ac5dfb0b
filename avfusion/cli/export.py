"""`avfusion export`: write the encoder of a run as one file."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description = (
        "Write the encoder of a pre-training run as one file, which `avfusion embed --checkpoint` and `load_encoder` "
        "read."
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of a pre-training run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/encoder.safetensors, or .pth")
    parser.add_argument("--format", choices=["safetensors", "authors"], default="safetensors",
                        help="authors: a file that their trainer resumes (default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=run, parser=parser, stopped="Nothing is written; run it again.")


def run(args: argparse.Namespace) -> int:
    from avfusion.training.export import export

    path, step = export(args.folder, args.out, authors=args.format == "authors")
    print(f"{path}: the encoder after step {step}")
    return 0
