"""`avfusion pretrain`: pre-train an encoder. What every command that trains has in common is here, too."""

import argparse
import signal
from pathlib import Path

from avfusion import distributed
from avfusion.cli.options import RAW, add_machine, machine, one_of
from avfusion.tasks import task_class
from avfusion.training.config import TrainConfig, leaves

DESCRIPTION = """\
Pre-train a DeepAVFusion encoder by masked auto-encoding of pictures and sound.

PRESET is where the settings start from; every option below overrides one of them.

  tiny             a small encoder on synthetic clips, which are made on first use: minutes on two CPU cores
  synth-small      the encoder in the package, on 4,000 synthetic clips: most of an hour
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

A run is a folder: run.json (settings, code, data), checkpoints/, evaluations.csv, log.jsonl, run.html, pictures/,
TensorBoard's logs, failed.jsonl and skipped.jsonl. After Ctrl-C, SIGTERM or a crash, the same command with --resume
goes on.
exit status: 0 finished, 1 the run had to end, 2 usage error, 130 or 143 stopped by Ctrl-C or SIGTERM, saved
"""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    parser.description, parser.epilog, parser.formatter_class = DESCRIPTION, EPILOG, RAW
    add_training(parser, name, "runs/PRESET")


def add_training(parser: argparse.ArgumentParser, name: str, folder: str) -> None:
    """Add the arguments of a command that trains the task of this name; `folder` is where its runs go by default."""
    task = task_class(name)
    parser.add_argument("preset", metavar="PRESET", type=one_of("preset", task.presets),
                        help="where the settings start from: " + " | ".join(task.presets))  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="RUN", help=f"folder of the run (default: {folder})")
    parser.add_argument("--resume", action="store_true", help="go on from RUN's last checkpoint, if there is one")
    add_machine(parser, dtype=None)
    add_settings(parser, task.settings)
    parser.set_defaults(run=train, parser=parser, task=name, folder=folder,
                        stopped="Nothing is lost up to the last checkpoint; --resume goes on.")  # fmt: skip


def add_settings(parser: argparse.ArgumentParser, cls: type[TrainConfig]) -> None:
    """Add an option for each setting; options that are not given are absent from the namespace."""
    groups = {}
    for name, group, item in leaves(cls):
        if group not in groups:
            title = f"{cls.titles[group]} (defaults are of what the preset does not set)"
            groups[group] = parser.add_argument_group(title)
        default, told, choices = item.default, item.metadata["help"], item.metadata.get("choices")
        if default not in ("", None) and not isinstance(default, bool) and "(default" not in told:
            told += f" (default: {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
        options = {"help": told, "default": argparse.SUPPRESS, "dest": name}
        number = {int: "N", float: "FLOAT"}.get(type(default[0] if isinstance(default, tuple) else default))
        if default is None or isinstance(default, bool):
            options |= {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, tuple):
            options |= {"type": type(default[0]), "nargs": len(default), "metavar": number}
        elif choices:
            options |= {"choices": choices}
        else:
            options |= {"type": type(default), "metavar": number}
        groups[group].add_argument(f"--{name.replace('_', '-')}", **options)


def train(args: argparse.Namespace) -> int:
    """Train a task; returns the exit status."""
    from avfusion.training import loop

    cls, device = task_class(args.task), machine(args)
    try:
        given = {name: getattr(args, name) for name, *_ in leaves(cls.settings) if hasattr(args, name)}
        config = cls.settings.of(**cls.presets[args.preset] | given)
        config.check_new()
    except ValueError as error:
        args.parser.error(str(error))
    out = args.out or Path(args.folder.replace("PRESET", args.preset))
    done = loop.train(cls(config), out, resume=args.resume, device=device)
    distributed.stop()
    return 0 if done else 128 + (loop.STOP.received or signal.SIGTERM)
