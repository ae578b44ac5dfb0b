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


def number(text: str) -> float:
    """A number above zero."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them, none below zero."""
    found = tuple(map(float, text.split(",")))
    if not all(0 <= each < float("inf") for each in found):
        raise argparse.ArgumentTypeError(f"{text}: expected seconds such as 3.5,10")
    return found


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


def add_machine(parser: argparse.ArgumentParser, *, dtype: str | None = "fp32") -> None:
    """Add --device, --dtype with this default (None: it is a setting of the command) and --threads."""
    parser.add_argument("--device", default="auto",
                        help="auto (a GPU where there is one), cpu, cuda, cuda:1, ... (default: auto)")  # fmt: skip
    if dtype:
        parser.add_argument(
            "--dtype", choices=["auto", "fp32", "bf16", *["fp16"] * (dtype == "auto")], default=dtype,
            help="compute in it where it is safe; auto: bf16 where that is at least 1.5 times faster, on GPUs and on "
            "CPUs that multiply it fast (avx512_bf16 of AMD, AMX), fp16 on a GPU without, else fp32 (default: "
            "%(default)s)",
        )  # fmt: skip
    parser.add_argument("--threads", type=count(1), metavar="N", help="of a process on CPUs (default: torch's choice)")


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """Add --loader-timeout."""
    parser.add_argument("--loader-timeout", type=count(1), default=120, metavar="S",
                        help="seconds without anything from --workers that end it (default: %(default)s)")  # fmt: skip


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


def dtype_of(args: argparse.Namespace, device: "torch.device") -> "torch.dtype":
    """What to compute in; says what `auto` has chosen. A usage error where the device cannot."""
    import torch

    import avfkernels

    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    gpu = device.type == "cuda"  # or one of a cluster, which cannot be asked from here
    bf16 = not gpu or not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    if args.dtype == "bf16" and not bf16:
        args.parser.error(f"--dtype bf16: {torch.cuda.get_device_name(device)} has none; take fp16")
    if args.dtype != "auto":
        return known[args.dtype]
    fast = bf16 if gpu else device.type == "cpu" and avfkernels.multiplies_bf16()
    name = "bf16" if fast else "fp16" if gpu else "fp32"
    if not int(os.environ.get("RANK", 0)):
        print(f"computes in {name} (--dtype auto)", flush=True)
    return known[name]


def check_folder(parser: argparse.ArgumentParser, option: str, folder: Path) -> None:
    """Makes the folder of an output; a usage error where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{option}: cannot make the output directory: {error}")
    if not os.access(folder, os.W_OK):
        parser.error(f"{option}: the directory {folder} cannot be written to")


def video_files(args: argparse.Namespace) -> list[Path]:
    """`args.clips` as files of this machine."""
    return list(map(Path, video_names(args)))


def video_names(args: argparse.Namespace) -> list[str]:
    """`args.clips` as names: files and addresses as given, lists as what they name, folders as the videos in them."""
    from avfusion.remote import filesystem

    names = []
    for clip in map(str, args.clips):
        try:
            if clip.startswith("@") and not os.path.exists(clip):
                files, name = filesystem(clip[1:])
                lines = files.cat_file(name).decode("utf-8-sig").splitlines()
                for line in filter(None, map(str.strip, lines)):
                    names += _videos_in(line)
            else:
                names += _videos_in(clip)
        except (OSError, ValueError) as error:
            args.parser.error(f"{clip}: {error}")
    return list(dict.fromkeys(names))


def _videos_in(clip: str) -> list[str]:
    from avfusion.data.table import VIDEO_SUFFIXES
    from avfusion.remote import filesystem, is_remote

    remote = is_remote(clip)
    if remote and clip.lower().endswith(VIDEO_SUFFIXES):  # each question to a store takes its time
        return [clip]
    files, name = filesystem(clip)
    if not files.isdir(name):
        return [clip]
    found = [path for path in files.find(name) if path.lower().endswith(VIDEO_SUFFIXES)]
    if not found:
        raise ValueError(f"no video files ({' '.join(VIDEO_SUFFIXES)}) under this directory")
    if remote:
        return list(map(files.unstrip_protocol, found))
    return [os.path.join(clip, os.path.relpath(path, name)) for path in found]


def report_failed(failed: list, total: int, what: str = "clips") -> int:
    """Lists what failed on stderr; returns the exit status: 0, 3 where some failed, 1 where all did."""
    if failed:
        print(f"{len(failed)} of {total} {what} failed:", file=sys.stderr)
        for error in failed:
            print(f"  {error}", file=sys.stderr)
    return (1 if len(failed) == total else 3) if failed else 0


def free_name(stem: str, taken: set[str]) -> str:
    """`stem`, with a number where a clip of another directory has that name; then it is taken."""
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name
