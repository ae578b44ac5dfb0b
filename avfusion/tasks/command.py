"""`avfusion pretrain` and `avfusion export`: the presets and the command line."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from avfusion.config import PretrainConfig, add_settings, given_settings

if TYPE_CHECKING:  # imported where it is needed: `--help` loads nothing heavy
    from avfusion.tasks.task import Task

HELP = """\
Pre-train a DeepAVFusion encoder by masked auto-encoding of pictures and sound.

PRESET is where the settings start from; every option below overrides one of them.

  tiny             a small encoder on synthetic clips, which are made on first use: minutes on two CPU cores
  paper-vggsound   the paper's recipe: ViT-B, 200 epochs, batch 512
  paper-audioset   likewise, batch 2048
"""

EPILOG = """\
examples:
  avfusion pretrain tiny
  avfusion pretrain paper-vggsound --data /data/vggsound --image-weights vit_base_patch16_224.mae \\
      --audio-weights audiomae.pth --out runs/vggsound
  torchrun --nproc-per-node 8 -m avfusion pretrain paper-vggsound --data /data/vggsound --out runs/vggsound --resume
  avfusion export runs/vggsound

A run is a folder: run.json (settings, code, data), checkpoints/, evaluations.csv and .png, pictures/,
TensorBoard's logs, failed.jsonl and skipped.jsonl. After SIGTERM, or a crash, the same command with --resume goes on.
exit status: 0 finished, 1 the run had to end, 2 usage or data set error, 143 stopped by SIGTERM, saved
"""

EXPORT_HELP = """\
Write the encoder of a pre-training run as one file that `avfusion embed --checkpoint` and `load_encoder` read.
"""


PRESETS = {
    "paper-vggsound": {"mixed_precision": "bf16"},
    "paper-audioset": {"layout": "audioset", "split": "unbalanced_train", "eval_split": "eval", "batch_size": 2048,
                       "mixed_precision": "bf16"},
    "tiny": {"data": "data/tiny", "synth_clips": 1000, "synth_classes": 6, "workers": 2, "dim": 96, "depth": 4,
             "num_heads": 4, "image_size": (64, 64), "fusion_tokens": 8, "image_agg_tokens": 4, "audio_agg_tokens": 4,
             "decoder_dim": 64, "decoder_depth": 2, "decoder_num_heads": 4, "epochs": 12, "batch_size": 32,
             "blr": 8e-3, "warmup_epochs": 2.0, "eval_epochs": 4},
}  # fmt: skip


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add `pretrain` and `export` to the command line's commands."""
    parser = commands.add_parser(
        "pretrain", help="pre-train an encoder", description=HELP, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("preset", metavar="PRESET", choices=PRESETS, help=" | ".join(PRESETS))
    parser.add_argument("--out", type=Path, metavar="RUN", help="folder of the run (default: runs/PRESET)")
    parser.add_argument("--resume", action="store_true", help="go on from RUN's last checkpoint, if there is one")
    add_settings(parser, PretrainConfig)
    parser.set_defaults(run=_pretrain, parser=parser)

    parser = commands.add_parser("export", help="write the encoder of a run as one file", description=EXPORT_HELP)
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="folder of a pre-training run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/encoder.safetensors, or .pth")
    parser.add_argument("--format", choices=["safetensors", "authors"], default="safetensors",
                        help="authors: their checkpoint file, decoders included (default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=_export, parser=parser)


def _pretrain(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        config = PretrainConfig(**PRESETS[args.preset] | given_settings(args, PretrainConfig))
        config.encoder()
    except ValueError as error:
        parser.error(str(error))

    from avfusion.tasks.pretrain import Pretrain

    return run(parser, lambda: Pretrain(config), args.out or Path("runs") / args.preset, resume=args.resume)


def run(parser: argparse.ArgumentParser, task: Callable[[], "Task"], out: Path, *, resume: bool) -> int:
    """Train a task; returns the exit status, and ends the process with a message where the run cannot go on."""
    from accelerate import PartialState

    from avfusion.runs import RunError
    from avfusion.train import train

    try:
        done = train(task(), out, resume=resume)
    except RunError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    PartialState().destroy_process_group()
    return 0 if done else 143


def _export(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from avfusion.runs import export

    try:
        path, step = export(args.run_folder, args.out, authors=args.format == "authors")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{path}: the encoder after step {step}")
    return 0
