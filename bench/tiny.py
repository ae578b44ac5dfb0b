"""What the `tiny` presets reach: `python -m bench.tiny FOLDER` writes bench/results/tiny.json.

Runs `avfusion pretrain tiny`, then `train tiny` and `eval` of every task on its weights, in FOLDER. What has been run
there already is not run again; an entry of the file whose commands have not been run stays. `--collect` runs nothing.
What the commands took is also written into the pages of docs/, between <!-- tiny: NAMES --> and <!-- /tiny -->.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import measure

PATH = Path(__file__).parent / "results" / "tiny.json"
TASKS = ("probe", "finetune", "retrieve", "localize", "separate", "segment")
DOCS = PATH.parents[2] / "docs"
PLACE = re.compile(r"(<!-- tiny: ([\w ]+) -->)\n.*?(<!-- /tiny -->)", re.DOTALL)
LOSSES = re.compile(r"epoch (\d+)/\d+: loss (.*)")


def run(folder: Path, name: str, *command: str) -> None:
    """Run an avfusion command in `folder`; its output goes to logs/NAME.log, what it took to logs/NAME.json."""
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    if (logs / f"{name}.json").exists():
        return
    print("avfusion", *command, flush=True)
    load, clock = os.getloadavg()[0], time.perf_counter()
    with open(logs / f"{name}.log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "avfusion", *command], cwd=folder, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)  # with what its workers used
    if status:
        raise SystemExit(f"avfusion {' '.join(command)} failed: {logs / name}.log says why")
    facts = {"command": f"avfusion {' '.join(command)}", "seconds": round(time.perf_counter() - clock),
             "CPU seconds": round(used.ru_utime + used.ru_stime), "peak MiB": round(used.ru_maxrss / 1024),
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
    fill(results)


def fill(results: dict) -> None:
    """Write what the commands took into the pages that have a place for it."""
    for page in DOCS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        filled = PLACE.sub(lambda found: f"{found[1]}\n{table(found[2].split(), results)}\n{found[3]}", text)
        if filled != text:
            page.write_text(filled, encoding="utf-8")


def table(names: list[str], results: dict) -> str:
    lines = ["| command | time | memory | on |", "|---|---|---|---|"]
    for ran in (ran for name in names for ran in results[name]["ran"]):
        memory = f"{ran['peak MiB'] / 1024:.1f} GiB" if "peak MiB" in ran else "not measured"
        lines.append(f"| `{ran['command']}` | {ran['seconds']} s | {memory} | {ran['device']} |")
    return "\n".join([*lines, "| any of them | not measured | not measured | a GPU |"])


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
