"""The regression guard: `pytest bench/ --benchmark --compare bench/results/<device>.json`.

What is compared are our ratios to the baseline of a table, measured in the same run, so that a machine that is slower
today does not count. Like is compared with like: one device, and one choice of versions, threads, batch and dtype.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bench import report

# The last words of the names of rows that are ours; those of others may change as they like.
OURS = ("ours", "accelerated", "automatic", "eager", "compiled", "graphs", "cpu", "triton", "cuda", "token", "late")


@dataclass(frozen=True)
class Change:
    """A ratio of a row, then and now; None: it is not measured any more."""

    table: str
    row: str
    ratio: str
    then: float
    now: float | None

    @property
    def growth(self) -> float:
        return float("inf") if self.now is None else self.now / self.then - 1


def load(path: Path, device: str) -> dict[str, dict]:
    """The sections of a results file. Raises ValueError if it is of another device, or not a results file."""
    try:
        results = json.loads(path.read_text())
        measured_on, sections = results["device"], results["sections"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"--compare {path}: not a results file of this benchmark: {error!r}") from None
    if measured_on != device:
        raise ValueError(f"--compare {path}: measured on {measured_on}; this is {device}: nothing would be comparable")
    return sections


def compare(then: dict[str, dict], now: dict[str, dict]) -> tuple[list[Change], list[str]]:
    """Every ratio of our rows that the sections of both runs have, and what cannot be compared, with the reason."""
    changes, apart = [], []
    for name, section in now.items():
        if name not in then:
            apart.append(f"{name}: not in the file")
        elif differing := _differing(_conditions(then[name]), _conditions(section)):
            apart.append(f"{name}: {differing}")
        else:
            rows = {row["name"]: ratios(row) for row in section["rows"]}
            changes += [
                Change(section["title"], row["name"], ratio, value, rows.get(row["name"], {}).get(ratio))
                for row in then[name]["rows"]
                if row["name"].rpartition(", ")[2] in OURS and row["name"] != section.get("baseline")
                for ratio, value in ratios(row).items()
            ]
    return changes, apart


def ratios(row: dict) -> dict[str, float]:
    """The ratios of a row to the baseline, medians; below 1 it is better."""
    timed = {"time": row} | {name: row.get(name, {}) for name in ("forward", "backward", "both")}
    found = {name: result["time_ratio"]["median"] for name, result in timed.items() if "time_ratio" in result}
    return found | ({"memory": row["memory_ratio"]} if "memory_ratio" in row else {})


def _conditions(section: dict) -> dict:
    """What a ratio depends on besides our code."""
    made = section["environment"]
    conditions = {name: section.get(name) for name in ("baseline", "batch", "dtype")} | {"threads": made["threads"]}
    return conditions | {name: version for name, version in made["versions"].items() if name != "avfkernels"}


def _differing(then: dict, now: dict) -> str:
    names = [name for name in then | now if then.get(name) != now.get(name)]
    return ", ".join(f"{name} {then.get(name)} in the file and {now.get(name)} here" for name in names)


def verdict(changes: list[Change], apart: list[str], margin: float) -> tuple[bool, str]:
    """Whether the run passes, and the text that says why: it fails if a ratio is worse, or if none was compared."""
    worse = sorted((c for c in changes if not c.growth <= margin), key=lambda change: -change.growth)
    lines = [f"not compared: {reason}" for reason in apart]
    if not changes:
        lines.append("Nothing was compared: no ratio of ours is in both, measured under the same conditions.")
    else:
        lines.append(f"{len(changes)} ratios compared, {len(worse)} worse by more than {margin:.0%}.")
    text = "\n".join(lines) + "\n"
    if worse:
        columns = {
            "table": [c.table for c in worse],
            "row": [c.row for c in worse],
            "ratio": [c.ratio for c in worse],
            "then": [f"{c.then:.3f}" for c in worse],
            "now": ["not measured" if c.now is None else f"{c.now:.3f}" for c in worse],
            "worse by": ["" if c.now is None else f"{c.growth:.0%}" for c in worse],
        }
        text += "\n" + report.aligned([[heading, *cells] for heading, cells in columns.items()])
    return bool(changes) and not worse, text
