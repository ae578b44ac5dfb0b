"""What docs/promises.md says of faults is what the files in bench/results hold."""

import json
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/promises.md").read_text(encoding="utf-8")


def results(name):
    return json.loads((ROOT / "bench/results" / f"{name}.json").read_text(encoding="utf-8"))


def test_faults():
    times = Counter()
    for row in results("chaos")["rows"]:
        assert row["result"].startswith("the same bits"), row
        times[row["fault"]] += row["times"]
    assert times["SIGKILL"] >= 100
    for fault, count in times.items():
        assert f"{count} x {fault}: the same bits" in TEXT, fault


def test_changed_inputs():
    rows = results("fuzz")["rows"]
    assert not any(row["findings"] for row in rows), "a finding is mended, and then it runs again"
    inputs, minutes = sum(row["inputs"] for row in rows), sum(row["seconds"] for row in rows) / 60
    assert f"{inputs:,} inputs in {minutes:.0f} minutes" in TEXT


def test_half_an_hour():
    for row in results("endure")["rows"]:
        if row["measure"] == "memory":
            assert f"`{row['command']}` {row['median']:.0f} MiB, {row['an hour adds']:+.0f} an hour" in TEXT
        else:
            assert abs(row["an hour adds"]) < max(0.1 * row["median"], 3), row
