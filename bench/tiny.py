"""What the `tiny` presets reach: `python -m bench.tiny FOLDER` writes bench/results/tiny.json.

Runs `avfusion pretrain tiny`, then `train tiny` and `eval` of every task on its weights, in FOLDER. What has been run
there already is not run again; an entry of the file whose commands have not been run stays. `--collect` runs nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import measure

PATH = Path(__file__).parent / "results" / "tiny.json"
TASKS = ("probe", "finetune", "retrieve", "localize", "separate", "segment")
LOSSES = re.compile(r"epoch (\d+)/\d+: loss (.*)")


def run(folder: Path, name: str, *command: str) -> None:
    """Run an avfusion command in `folder`; its output goes to logs/NAME.log, what it took to logs/NAME.json."""
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    if (logs / f"{name}.json").exists():
        return
    print("avfusion", *command, flush=True)
    load, before, clock = os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with open(logs / f"{name}.log", "w") as log:
        subprocess.run([sys.executable, "-m", "avfusion", *command], cwd=folder, stdout=log, stderr=log, check=True)
    wall, after = time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    facts = {"command": f"avfusion {' '.join(command)}", "seconds": round(wall), "CPU seconds": round(cpu),
             "load before": round(load, 1), "device": measure.device_name(torch.device("cpu"))}  # fmt: skip
    facts |= measure.environment(torch.device("cpu"))
    (logs / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")


def pretraining(folder: Path) -> dict:
    """Loss of the first and the last epoch, and nearest-neighbour accuracies over the run."""
    epochs = LOSSES.findall((folder / "logs/pretrain.log").read_text())
    first, last = ({name: float(value) for name, value in map(str.split, epochs[at][1].split(", "))} for at in (0, -1))
    with open(folder / "runs/tiny/evaluations.csv", newline="") as file:
        rows = [{name: round(float(value), 4) for name, value in row.items()} for row in csv.DictReader(file)]
    return {"loss of the first epoch": first, "loss of the last epoch": last, "evaluations": rows}


def evaluation(folder: Path, name: str) -> dict:
    found = json.loads((folder / f"runs/{name}-tiny/eval/summary.json").read_text())
    summary = {score: round(value, 4) for score, value in found["summary"].items()}
    return {"clips": found["clips"], "sha256": found["sha256"], "summary": summary}


def collect(folder: Path) -> None:
    """Replace in the file what has been run in `folder`."""
    results = json.loads(PATH.read_text()) if PATH.exists() else {}
    for name in ("pretrain", *TASKS):
        commands = ["pretrain"] if name == "pretrain" else [f"{name}-train", f"{name}-eval"]
        logs = [folder / f"logs/{command}.json" for command in commands]
        if all(log.exists() for log in logs):
            found = pretraining(folder) if name == "pretrain" else evaluation(folder, name)
            results[name] = found | {"ran": [json.loads(log.read_text()) for log in logs]}
    results = {name: results[name] for name in ("pretrain", *TASKS) if name in results}
    PATH.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="data, runs and logs go there")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=TASKS, help="default: all")
    parser.add_argument("--collect", action="store_true", help="only write down what has been run there")
    args = parser.parse_args()
    if not args.collect:
        run(args.folder, "pretrain", "pretrain", "tiny")
        for name in args.tasks:
            run(args.folder, f"{name}-train", name, "train", "tiny", "--encoder", "runs/tiny")
            tags = ("--tags", "data/tiny/annotations/vggsounder.csv") if name == "finetune" else ()
            run(args.folder, f"{name}-eval", name, "eval", f"runs/{name}-tiny", *tags)
    collect(args.folder)


if __name__ == "__main__":
    main()
