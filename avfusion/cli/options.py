"""What commands have in common: parsers that suggest, kinds of arguments, where a model computes."""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from avfusion.common import meant, unknown

if TYPE_CHECKING:  # imported where they are needed: `--help` loads nothing heavy
    import torch

RAW = argparse.RawDescriptionHelpFormatter


class Parser(argparse.ArgumentParser):
    """Says which option may be meant where one is misspelt."""

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            leaf = getattr(found, "parser", self)
            wrong = next((word for word in rest if word.startswith("-")), None)
            options = [name for name in leaf._option_string_actions if name.startswith("--")]
            hint = meant(wrong.split("=")[0], options) if wrong else ""
            leaf.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return found


def count(least: int):
    """A whole number that is at least `least`."""

    def count(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    return count


def one_of(what: str, options: Iterable[str]):
    """One of some names."""
    names = list(options)

    def name(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(unknown(what, text, names))
        return text

    return name


def layout(text: str) -> str:
    """The name of a layout of data sets."""
    from avfusion.data import LAYOUTS

    return one_of("layout", LAYOUTS)(text)


def add_machine(parser: argparse.ArgumentParser, *, dtype: bool = True) -> None:
    """Add --device, --dtype (unless it is a setting of the command) and --threads."""
    parser.add_argument("--device", default="auto",
                        help="auto (a GPU where there is one), cpu, cuda, cuda:1, ... (default: auto)")  # fmt: skip
    if dtype:
        parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32",
                            help="bf16: compute in bfloat16 where it is safe (default: fp32)")  # fmt: skip
    parser.add_argument("--threads", type=count(1), metavar="N", help="of a process on CPUs (default: torch's choice)")


def machine(args: argparse.Namespace) -> "torch.device":
    """Sets the number of threads and returns the device; a usage error where there is none of that name."""
    import torch

    from avfusion.distributed import own_device

    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        return torch.empty(0, device=own_device(args.device)).device
    except (RuntimeError, AssertionError) as error:  # what torch raises for unknown and for missing devices
        args.parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")


def dtype_of(args: argparse.Namespace) -> "torch.dtype":
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]


def check_folder(parser: argparse.ArgumentParser, option: str, folder: Path) -> None:
    """Makes the folder of an output; a usage error where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{option}: cannot make the output directory: {error}")
    if not os.access(folder, os.W_OK):
        parser.error(f"{option}: the directory {folder} cannot be written to")


def video_files(args: argparse.Namespace) -> list[Path]:
    """`args.clips`: files as given, directories as the video files under them; each once."""
    from avfusion.data.table import VIDEO_SUFFIXES, find_videos

    paths = []
    for clip in args.clips:
        found = find_videos(clip) if clip.is_dir() else [clip]
        if not found:
            args.parser.error(f"{clip}: no video files ({' '.join(VIDEO_SUFFIXES)}) under this directory")
        paths += found
    return list(dict.fromkeys(paths))


def report_failed(failed: list, total: int) -> int:
    """Lists clips that failed on stderr; returns the exit status."""
    if failed:
        print(f"{len(failed)} of {total} clips failed:", file=sys.stderr)
        for error in failed:
            print(f"  {error}", file=sys.stderr)
    return 1 if failed else 0


def free_name(stem: str, taken: set[str]) -> str:
    """`stem`, with a number where a clip of another directory has that name; then it is taken."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name
