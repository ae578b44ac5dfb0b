"""Five commands on small data, which faults are done to: how each is started, and what it leaves, bit for bit."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from avfusion import DeepAVFusion, EncoderConfig, Features, save_encoder
from avfusion.synth.make import synthesize
from avfusion.synth.scene import Settings
from avfusion.training.run_folder import FILES, checkpoints

LIMIT = 240  # seconds that nothing here takes; what hangs does
ENCODER = EncoderConfig(
    dim=32, depth=2, num_heads=2, image_size=(64, 64), audio_size=(32, 64), fusion_tokens=2, image_agg_tokens=2,
    audio_agg_tokens=2,
)  # fmt: skip
MAKE = Settings(clips=24, classes=2, size=64, seconds=1.5, fps=4)


@dataclass(frozen=True)
class Command:
    """`line` names the folder OUT; `left` is what counts of what it leaves there, by name."""

    name: str
    line: tuple[str, ...]
    left: Callable[[Path], dict[str, str]]
    again: tuple[str, ...] = ()  # to go on

    def arguments(self, out: Path, *, again: bool = False) -> list[str]:
        words = [str(out) if word == "OUT" else word for word in (*self.line, *(self.again if again else ()))]
        return [sys.executable, "-m", "avfusion", *words]


def checkpoint(out: Path) -> dict[str, str]:
    """The last one, and the list of what evaluations have found."""
    last = checkpoints(out)[-1]
    return {f"{last.name}/{name}": digest((last / name).read_bytes()) for name in FILES}


def files(out: Path) -> dict[str, str]:
    """Every file, but for who has it."""
    return {
        path.relative_to(out).as_posix(): digest(path.read_bytes())
        for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock"
    }  # fmt: skip


def features(out: Path) -> dict[str, str]:
    """Every row, whichever file it is in."""
    found = Features.load(out)
    facts = json.dumps([[Path(clip).name for clip in found.clips], found.starts, found.ends, found.frame_times])
    return {"rows": facts, "features": digest(found.pooled.numpy().tobytes())}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def commands(world: Path) -> dict[str, Command]:
    """Makes what they read in `world`."""
    synthesize(world / "set", MAKE)
    shutil.copytree(world / "set", world / "videos", ignore=lambda _, names: [n for n in names if n.endswith(".json")])
    torch.manual_seed(0)
    save_encoder(DeepAVFusion(ENCODER), world / "encoder.safetensors")
    training = (
        "--data", str(world / "set"), "--synth-clips", "0", "--workers", "1", "--batch-size", "4", "--epochs", "3",
        "--eval-clips", "6", "--eval-split", "all", "--eval-epochs", "3", "--save-steps", "1", "--keep", "1",
        "--tracker", "none", "--threads", "1", "--out", "OUT",
    )  # fmt: skip
    small = ("--dim", "32", "--depth", "2", "--num-heads", "2", "--image-size", "64", "64", "--audio-size", "32", "64",
             "--fusion-tokens", "2", "--image-agg-tokens", "2", "--audio-agg-tokens", "2", "--decoder-dim", "16",
             "--decoder-depth", "1", "--decoder-num-heads", "2")  # fmt: skip
    found = [
        Command("pretrain", ("pretrain", "tiny", *small, *training), checkpoint, ("--resume",)),
        Command("finetune", ("finetune", "train", "tiny", "--encoder", str(world / "encoder.safetensors"), *training),
                checkpoint, ("--resume",)),
        # A window at a time: sums of other batches are rounded otherwise.
        Command("embed", ("embed", str(world / "videos"), "--checkpoint", str(world / "encoder.safetensors"), "--every",
                          "0.2", "--shard-rows", "10", "--batch-size", "1", "--workers", "1", "--threads", "1", "--out",
                          "OUT"), features),
        Command("shard", ("shard", "vggsound", str(world / "set"), "OUT", "--clips-per-shard", "2", "--workers", "1"),
                files),
        Command("synth", ("synth", "OUT", "--clips", "24", "--classes", "2", "--size", "64", "--seconds", "1.5",
                          "--fps", "4", "--workers", "2"), files),
    ]  # fmt: skip
    return {command.name: command for command in found}


def start(line: list[str], *, prefix: tuple[str, ...] = (), **options) -> psutil.Popen:
    """In a group of its own, with what it prints in files of its own beside; `prefix` are words before it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("environment", {})
    return psutil.Popen([*prefix, *line], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                        start_new_session=True, **options)  # fmt: skip


def finish(process: psutil.Popen) -> tuple[int, str]:
    """How it ends, and what it has said. What does not end is a failure."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        stop(process)
        raise AssertionError(f"a hang: {process.args}") from None
    return process.returncode, out + err


def run(line: list[str], **options) -> tuple[int, str]:
    return finish(start(line, **options))


def stop(process: psutil.Popen, *, all_of_it: bool = True) -> None:
    """SIGKILL to it, or to all of its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL) if all_of_it else process.kill()
    try:  # what they have printed is whole when none lives
        process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"its workers outlive it: {process.args}") from None


def at_work(process: psutil.Popen, out: Path, chance: random.Random, within: float = 1.0) -> bool:
    """Waits until something new lies in `out`, and a random time more; False where the process has ended before."""
    before, deadline = _seen(out), time.monotonic() + LIMIT
    while process.poll() is None and _seen(out) == before and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, within))
    return process.poll() is None


def _seen(out: Path) -> set[str]:
    """What is there, without the lock, and with what is only begun."""
    try:
        return {entry.path for folder in (out, out / "checkpoints", out / "truth") if folder.is_dir()
                for entry in os.scandir(folder) if entry.name != ".lock"}  # fmt: skip
    except FileNotFoundError:  # a folder that has just gone
        return set()


def nothing_left_over(out: Path) -> list[str]:
    """Half files, which no command leaves when it has ended well."""
    return [path.name for path in out.rglob("*.part")]
