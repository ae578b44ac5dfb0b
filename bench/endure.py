"""Long work on small data: is what it takes flat? `python -m bench.endure` writes bench/results/endure.{json,md,png}.

`avfusion embed` and `avfusion pretrain tiny`, side by side, each with a worker, for so many minutes. Every five seconds
the processes of each are asked for memory that they have allocated (`RssAnon`: that of libraries depends on who else
has loaded them), descriptors, threads and segments of shared memory. What an hour adds is a line through the samples
after the first third.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from matplotlib.figure import Figure

from avfusion.files import write_json, write_text, writing
from avfusion.synth.make import synthesize
from avfusion.synth.scene import Settings
from bench import measure

RESULTS = Path(__file__).parent / "results"
EVERY = 5.0  # seconds
MEASURES = {"memory": "MiB", "descriptors": "", "threads": "", "shared memory": "segments", "processes": ""}


def sample(process: psutil.Process) -> dict[str, float]:
    """What a process and its children hold."""
    found = dict.fromkeys(MEASURES, 0.0)
    for each in [process, *process.children(recursive=True)]:
        try:
            status = Path(f"/proc/{each.pid}/status").read_text()
            found["memory"] += int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024
            found["descriptors"] += each.num_fds()
            found["threads"] += each.num_threads()
            found["shared memory"] += len({m.path for m in each.memory_maps() if "/torch_" in m.path})
            found["processes"] += 1
        except (psutil.Error, OSError, TypeError):  # it has just ended
            continue
    return found


def growth(seconds: list[float], values: list[float]) -> dict[str, float]:
    """What an hour adds, and the share of the middle value that it is, by the samples after the first third."""
    later = [(at, x) for at, x in zip(seconds, values, strict=True) if at >= seconds[-1] / 3]
    at, x = np.array(later).T
    hour = float(np.polyfit(at, x, 1)[0]) * 3600
    facts = {"median": np.median(x), "least": x.min(), "most": x.max(), "an hour adds": hour}
    return {name: round(float(value), 1) for name, value in facts.items()}


def jobs(folder: Path) -> dict[str, list[str]]:
    """The commands; clips enough for hours, by links."""
    clips = folder / "clips"
    synthesize(folder / "made", Settings(layout="vggsound", clips=24, classes=4, size=96, fps=4), workers=2)
    clips.mkdir()
    files = sorted((folder / "made").rglob("*.mp4"))
    for number in range(60_000):
        os.link(files[number % len(files)], clips / f"{number:06d}.mp4")
    base = [sys.executable, "-m", "avfusion"]
    return {
        "embed": [*base, "embed", str(clips), "--every", "0.5", "--workers", "1", "--threads", "1", "--shard-rows",
                  "2000", "--out", str(folder / "features")],
        "pretrain": [*base, "pretrain", "tiny", "--data", str(folder / "made"), "--synth-clips", "0", "--split", "all",
                     "--eval-split", "all",
                     "--epochs", "1000000", "--batch-size", "12", "--eval-epochs", "50", "--save-steps", "50",
                     "--workers", "1", "--threads", "1", "--out", str(folder / "run")],
    }  # fmt: skip


def main() -> None:
    about = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench.endure", description=about[0], epilog=about[1])
    parser.add_argument("--minutes", type=float, default=30.0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the three files (default: bench/results)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        lines, began = jobs(Path(name)), time.monotonic()
        running = {}
        for job, line in lines.items():
            with open(Path(name, f"{job}.log"), "w") as log:
                running[job] = psutil.Popen(line, stdout=subprocess.DEVNULL, stderr=log)
        samples: dict[str, list[dict]] = {job: [] for job in running}
        while (now := time.monotonic() - began) < 60 * args.minutes:
            for job, process in running.items():
                if process.poll() is not None:
                    told = Path(name, f"{job}.log").read_text()[-500:]
                    raise SystemExit(f"{job} ended after {now:.0f} s with {process.returncode}: {told}")
                samples[job].append({"seconds": round(now, 1)} | sample(process))
            time.sleep(EVERY)
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        ended = {job: process.wait(120) for job, process in running.items()}
    rows = []
    for job, found in samples.items():
        seconds = [row["seconds"] for row in found]
        rows += [{"command": f"avfusion {job}", "measure": name, "unit": unit, "exit": ended[job]}
                 | growth(seconds, [row[name] for row in found]) for name, unit in MEASURES.items()]  # fmt: skip
    facts = {
        "command": f"python -m bench.endure --minutes {args.minutes:g}",
        "device": measure.device_name(torch.device("cpu")),
    }
    facts |= measure.environment(torch.device("cpu")) | {"rows": rows, "samples": samples}
    write_json(args.out / "endure.json", facts)
    write_text(args.out / "endure.md", markdown(facts))
    draw(facts, args.out / "endure.png")
    print(markdown(facts))


def markdown(facts: dict) -> str:
    where = f"{facts['device']}, commit {facts['commit']}, torch {facts['versions']['torch']}"
    lines = [f"`{facts['command']}` on {where}.", "",
             "| command | measure | median | least | most | an hour adds |", "|---|---|--:|--:|--:|--:|"]  # fmt: skip
    for row in facts["rows"]:
        name = f"{row['measure']}, {row['unit']}" if row["unit"] else row["measure"]
        lines.append(f"| `{row['command']}` | {name} | {row['median']:g} | {row['least']:g} | {row['most']:g} | "
                     f"{row['an hour adds']:+g} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(facts: dict, path: Path) -> None:
    names = [name for name in MEASURES if name != "processes"]
    figure = Figure(figsize=(4 * len(facts["samples"]), 2 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(facts["samples"]), sharex=True, squeeze=False)
    for column, (job, samples) in enumerate(facts["samples"].items()):
        for row, name in enumerate(names):
            each = axes[row][column]
            each.plot([s["seconds"] / 60 for s in samples], [s[name] for s in samples], color="#3a87c8", linewidth=1)
            each.set_ylim(bottom=0)
            each.set_ylabel(f"{name}, {MEASURES[name]}" if MEASURES[name] else name)
        axes[0][column].set_title(f"avfusion {job}")
        axes[-1][column].set_xlabel("minutes")
    with writing(path) as part:
        figure.savefig(part, format="png", dpi=110)


if __name__ == "__main__":
    main()
