"""Runs as their folders tell of them: how each stands, what its steps and evaluations have found."""

import csv
import json
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

SILENT = 600.0  # seconds without a line of log.jsonl after which a run on another machine is not taken for running


@dataclass(frozen=True)
class RunStatus:
    """How a run stands.

    `state` is running, finished, stopped (by a signal, with a checkpoint), failed, died (its process is gone) or silent
    (on another machine, and nothing was heard of it for ten minutes).
    """

    folder: Path
    task: str
    state: str
    step: int
    total: int
    left: float | None  # seconds, while it runs
    loss: dict[str, float]
    evaluation: dict[str, float]  # the last
    why: str = ""  # it failed

    @classmethod
    def of(cls, folder: Path) -> "RunStatus":
        """Raises ValueError where the folder holds no run."""
        try:
            task = json.loads((folder / "run.json").read_text(encoding="utf-8"))["task"]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / 'run.json'}: not of a run ({type(error).__name__}: {error})") from error
        lines, found = read_log(folder), read_evaluations(folder)
        mark = next((line for line in reversed(lines) if "state" in line), {"state": "of an older version"})
        begun = next((line for line in reversed(lines) if "total" in line), {"step": 0, "total": 0})
        steps = [line for line in lines if "loss" in line]
        state = mark["state"]
        if state == "running" and mark["host"] == socket.gethostname():
            state = "running" if _lives(mark["pid"]) else "died"
        elif state == "running" and time.time() - lines[-1]["time"] > SILENT:
            state = "silent"
        return cls(
            folder, task, state, steps[-1]["step"] if steps else begun["step"], begun["total"],
            lines[-1].get("left") if state == "running" else None, steps[-1]["loss"] if steps else {},
            {name: x for name, x in found[-1].items() if name not in ("step", "epoch")} if found else {},
            mark.get("why", ""),
        )  # fmt: skip

    def cells(self) -> list[str]:
        """What a table shows of it, in the order of `COLUMNS`."""
        share = f"{100 * self.step // self.total} %" if self.total else ""
        left = "" if self.left is None else str(timedelta(seconds=round(self.left)))
        shown = (_facts(self.loss), self.why or _facts(self.evaluation))
        return [str(self.folder), self.task, self.state, f"{self.step}/{self.total}", share, left, *shown]


COLUMNS = ("run", "task", "state", "step", "", "left", "loss", "last evaluation")


def find_runs(root: Path) -> list[Path]:
    """The folders of runs under a folder, itself among them, the last to be touched first."""
    found = [path.parent for path in root.rglob("run.json")]
    return sorted(found, key=lambda run: -max((run / "run.json").stat().st_mtime, _touched(run / "log.jsonl")))


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl, without those of steps that were taken again. A line that was cut off is left out."""
    lines: list[dict[str, Any]] = []
    if not (run / "log.jsonl").exists():
        return lines
    for text in (run / "log.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if not isinstance(line, dict):
            continue
        if line.get("state") == "running":
            lines = [old for old in lines if "loss" not in old or old["step"] <= line["step"]]
        lines.append(line)
    return lines


def read_evaluations(run: Path) -> list[dict[str, float]]:
    """The rows of evaluations.csv."""
    if not (run / "evaluations.csv").exists():
        return []
    with open(run / "evaluations.csv", newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _facts(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def _touched(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
