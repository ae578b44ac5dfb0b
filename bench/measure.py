"""How the benchmarks measure: time in turns, peak memory, and what they ran on."""

from __future__ import annotations

import os
import platform
import random
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import torch

import avfkernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# glibc then gives every large block back as soon as it is freed, so that resident memory follows the live tensors.
# For processes in which memory, not time, is measured.
MALLOC_RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Effort:
    """How long a row is timed: until it has taken `seconds`, within the bounds on rounds."""

    seconds: float = 13.0
    min_rounds: int = 3
    max_rounds: int = 20


def seconds(call: Callable, device: torch.device, repeats: int = 1) -> float:
    """Time of one call, the mean of `repeats` in a row. On CUDA by events, with nothing else in flight."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def in_turns(
    calls: dict[str, Callable],
    device: torch.device,
    effort: Effort = Effort(),
    *,
    repeats: int = 1,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, list[float]]:
    """Times the calls in turns: every round, each call that still has time left runs once, in shuffled order.

    A machine that slows down slows the whole round, so ratios within a round hold. The first call is the baseline and
    takes part in every round; a slow call takes part in the first few.
    """
    times = {name: [] for name in calls}
    baseline = next(iter(calls))
    shuffle = random.Random(0)
    for turn in range(effort.max_rounds):
        due = [n for n, t in times.items() if turn < effort.min_rounds or sum(t) * repeats < effort.seconds]
        if not due:
            break
        due = list(dict.fromkeys([baseline, *due]))
        for name in shuffle.sample(due, len(due)):
            progress(f"round {turn + 1}: {name}")
            times[name].append(seconds(calls[name], device, repeats))
    return times


def quantiles(samples: list[float]) -> dict[str, float]:
    p20, median, p80 = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
    return {"median": median.item(), "p20": p20.item(), "p80": p80.item()}


def summarise(times: dict[str, list[float]]) -> dict[str, dict]:
    """For each call: quantiles of its seconds, and of its ratio to the baseline's time in the same round."""
    baseline = next(iter(times.values()))
    return {
        name: {
            "rounds": len(samples),
            "seconds": quantiles(samples),
            "time_ratio": quantiles([a / b for a, b in zip(samples, baseline, strict=False)]),
        }
        for name, samples in times.items()
    }


def peak_memory(call: Callable, device: torch.device) -> int:
    """Bytes that a call holds at its highest, above what is held before it.

    CUDA: tensors, by torch's allocator. CPU: resident memory of this process, by the kernel's own high-water mark where
    /proc/self/clear_refs can reset it (Linux), else sampled every millisecond. torch's CPU allocator is malloc: set
    MALLOC_RETURNS_MEMORY, or memory that malloc keeps for later hides the peak.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the high-water mark to what is resident now
    except OSError:
        return _sampled_peak(call)
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def run_module(name: str, *arguments: str, survives: tuple[int, ...] = (0,)) -> str:
    """What `python -m name arguments` prints: a process of its own, in which memory is measured.

    Raises RuntimeError, with what it wrote to stderr, for an exit status that is not among `survives`.
    """
    done = subprocess.run(
        [sys.executable, "-m", name, *arguments],
        cwd=Path(__file__).parent.parent,
        env=os.environ | MALLOC_RETURNS_MEMORY,
        capture_output=True,
        text=True,
    )
    if done.returncode not in survives:
        raise RuntimeError(f"python -m {name} {shlex.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def _resident(field: str) -> int:
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def _sampled_peak(call: Callable) -> int:
    import psutil

    process, stop = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def sample():
        nonlocal highest
        while not stop.wait(0.001):
            highest = max(highest, process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        call()
    finally:
        stop.set()
        thread.join()
    return highest - before


def device_name(device: torch.device) -> str:
    """Such as "NVIDIA H200" or "CPU AMD EPYC, 2 cores, AVX2"; its slug names the results file."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*: (.+)", cpuinfo.read_text())):
        model = match[1]
    model = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*", "", model)
    cores = torch.get_num_threads()
    isa = torch.backends.cpu.get_cpu_capability()  # one name of a model may stand for machines with and without AVX-512
    return f"CPU {' '.join(model.split())}, {cores} core{'s' if cores > 1 else ''}, {isa}"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(device: torch.device) -> dict:
    """What a measurement was made with, for the results file."""
    versions = {"avfkernels": avfkernels.__version__, "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        versions["cuda"] = torch.version.cuda
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": versions,
    }


@cache
def _commit() -> str | None:
    """The commit of this checkout, "-dirty" if tracked files differ from it; None outside a checkout.

    Results do not count: the run before this one has written some.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)bench/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
