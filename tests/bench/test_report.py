"""The benchmark's plumbing: results files, their rendering, timing in turns, peak memory."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import encoder, measure, report

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "bench/results").glob("cpu-*.json"))
CPU = torch.device("cpu")


def row(name, seconds, memory, **others):
    spread = {"p20": seconds * 0.9, "median": seconds, "p80": seconds * 1.1}
    return {
        "name": name, "rounds": 5, "seconds": spread, "time_ratio": spread, "per_second": 4 / seconds,
        "peak_memory": memory * 2**20, "memory_ratio": memory / 100, "flop": 51e9, "flop_ratio": 1.25, **others,
    }  # fmt: skip


def section(title, rows):
    return {
        "title": title, "batch": 4, "dtype": "float32", "baseline": "no fusion", "rows": rows,
        "notes": ["A note."], "command": "pytest bench/ --benchmark",
        "environment": {
            "date": "2026-01-02T03:04:05+00:00", "commit": "abc1234", "threads": 2, "cores": 2,
            "versions": {"torch": "2.14.1"},
        },
    }  # fmt: skip


PAPER = {"per_second": 4.3, "memory_gb": 31.6, "time_ratio": 3.37, "memory_ratio": 3.07}
ENCODER = section(
    "Encoder",
    [
        row("no fusion", 1.0, 100),
        row("dense, materialised", 12.0, 2100, paper=PAPER),
        row("dense, ours", 1.1, 105),
        {"name": "factorized, ours", "flop": 57e9, "flop_ratio": 1.1, "note": "out of memory"},
    ],
)
OP_ROWS = [
    {"name": "eager", "rounds": 3, "seconds": {"median": 7e-5}, "time_ratio": {"p20": 0.9, "median": 1, "p80": 1.1}},
    {"name": "cpu", "note": "not built"},
]


def written(folder, sections):
    path = folder / "cpu-x.json"
    report.save(path, "CPU X", sections, [])
    drawn = report.render(path)
    assert set(folder.iterdir()) == {path, *drawn}
    return path


def test_files_of_a_run(tmp_path):
    path = written(tmp_path, {"encoder": ENCODER})
    text = path.with_suffix(".md").read_text()
    for expected in ("peak memory, MiB", "videos/s", "GFLOP/video", "**12.00 ×**", "31.6 GB", "3.37 ×", "out of memory",
                     "`pytest bench/ --benchmark`", "commit abc1234", "A note.", "cpu-x.png", "1.250 ×"):  # fmt: skip
        assert expected in text
    image = path.with_suffix(".png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 20_000


def test_curves_are_drawn(tmp_path):
    rows = [
        row(f"batch {x}: {line}", 1.0 + x / 10, 100, line=line, x=x)
        for line in ("no fusion", "dense, ours", "dense, materialised")
        for x in (1, 4)
    ]
    rows.append({"name": "batch 16: dense, materialised", "line": "dense, materialised", "x": 16, "note": "left out"})
    path = written(tmp_path, {"scaling": section("The batch", rows) | {"x": "batch"}})
    assert "cpu-x-scaling.png" in path.with_suffix(".md").read_text()
    assert len((tmp_path / "cpu-x-scaling.png").read_bytes()) > 20_000


def test_rows_that_need_cuda_say_so():
    for name, kept in {"dense, ours": None, "dense, compiled": "on CUDA"}.items():
        assert encoder.ROWS[name].why_not(CPU) == kept
        assert encoder.ROWS[name].why_not(torch.device("cuda")) is None


def test_a_run_replaces_only_its_sections(tmp_path):
    report.save(tmp_path / "cpu-x.json", "CPU X", {"a": ENCODER, "b": section("Op, old", OP_ROWS)}, ["b"])
    path = written(tmp_path, {"b": section("Op, new", OP_ROWS)})
    new = {"a": ENCODER, "b": section("Op, new", OP_ROWS)}
    assert json.loads(path.read_text()) == {"device": "CPU X", "sections": new}
    text = path.with_suffix(".md").read_text()
    assert "Op, new" in text
    assert "Op, old" not in text
    assert "70 µs" in text
    assert "not built" in text


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_rendering_again_gives_the_same(path):
    assert report.text(json.loads(path.read_text()), path.stem) == path.with_suffix(".md").read_text()


def test_command_line(tmp_path, monkeypatch, capsys):
    path = written(tmp_path, {"op": section("Op", OP_ROWS)})
    before = path.with_suffix(".md").read_text()
    path.with_suffix(".md").unlink()
    monkeypatch.setattr(sys, "argv", ["bench.report", str(path)])
    report.main()
    assert path.with_suffix(".md").read_text() == before

    monkeypatch.setattr(sys, "argv", ["bench.report", "no.json"])
    with pytest.raises(SystemExit):
        report.main()
    assert "no.json: no such file" in capsys.readouterr().err


def test_columns_line_up():
    lines = report.table(ENCODER["rows"]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_terminal_shows_every_section_in_100_columns(path):
    sections = json.loads(path.read_text())["sections"]
    assert sections.keys() >= {"encoder_1_full", "encoder_2_masked"}
    for section in sections.values():
        lines = report.terminal(section).splitlines()
        assert max(map(len, lines)) <= 100
        rows = lines[-len(section["rows"]) :]
        assert all(shown.startswith(row["name"]) for row, shown in zip(section["rows"], rows, strict=True))
        assert lines[-len(rows) - 1].startswith(" ")  # the headings


def test_a_terminal_shows_all_of_table_6():
    lines = report.terminal(ENCODER).splitlines()
    assert lines[:2] == ["Encoder", "Batch 4, float32; ratios are to no fusion."]
    assert lines[2].split() == ["time", "ratio", "(p20–p80)", "floor", "GFLOP", "MiB", "ratio", "paper's", "ratios"]
    shown = ["12 s", "12.00 (10.80–13.20)", "1.25", "51.0", "2,100", "21.00", "3.37, 3.07"]
    assert re.split("  +", lines[4]) == ["dense, materialised", *shown]
    assert len(lines[2]) == len(lines[4])
    assert lines[6] == "factorized, ours     out of memory"
    assert report.terminal(ENCODER, width=50).splitlines()[4].split("  ")[-1] == "12.00 (10.80–13.20)"


SLOWER = "dense interactions take 1.10 times as long as no fusion (floor 1.25)"


@pytest.mark.parametrize(
    ("materialised", "shown"),
    [
        (12.0, f"{SLOWER} and are 10.91 times faster than materialised (12.00; the paper: 3.37)"),
        (0.55, f"{SLOWER} and are 2.00 times slower than materialised (0.55; the paper: 3.37)"),
        (1.104, f"{SLOWER} and are as fast as materialised (1.10; the paper: 3.37)"),
        (None, f"{SLOWER} and were not measured materialised (out of memory)"),
    ],
)
def test_the_sentence_is_true_whatever_comes_out(materialised, shown):
    made = copy.deepcopy(ENCODER)
    if materialised is None:
        made["rows"][1] = {"name": "dense, materialised", "note": "out of memory"}
    else:
        made["rows"][1]["time_ratio"]["median"] = materialised
    made["rows"].append({"name": "factorized, materialised", "note": "out of memory"})
    sentence = report.sentence("CPU X", made)
    assert sentence == f"On CPU X, {shown}; factorized interactions were not measured (out of memory)."


def test_rounds_are_paired_with_the_baseline():
    """A slow call takes part in the first rounds only, and is compared with the baseline of those."""
    order = []
    calls = {name: lambda name=name: order.append(name) for name in ("baseline", "other")}
    effort = measure.Effort(seconds=1e9, min_rounds=2, max_rounds=4)
    times = measure.in_turns(calls, CPU, effort)
    assert {name: len(samples) for name, samples in times.items()} == {"baseline": 4, "other": 4}
    assert all(set(order[i : i + 2]) == set(calls) for i in range(0, 8, 2))
    assert len(measure.in_turns(calls, CPU, measure.Effort(0.0, 2, 4))["other"]) == 2

    summary = measure.summarise({"baseline": [1.0, 2.0, 4.0], "slow": [3.0, 6.0]})
    assert summary["slow"]["time_ratio"] == {"median": 3.0, "p20": 3.0, "p80": 3.0}
    assert summary["baseline"]["seconds"]["median"] == 2.0
    assert summary["slow"]["rounds"] == 2


MEASURE = """
import torch
from bench import measure
call = lambda: torch.ones(2**24).sum()
print(measure.peak_memory(call, torch.device("cpu")), measure._sampled_peak(call))
"""


def test_peak_memory():
    """Both ways, in a process of their own: it imports torch."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], cwd=ROOT, env=os.environ | measure.MALLOC_RETURNS_MEMORY,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert [int(peak) for peak in done.stdout.split()] == pytest.approx([2**26, 2**26], rel=0.1)


def test_a_row_that_runs_out_of_memory_is_left_out(monkeypatch):
    runs, asked = [("full", "token"), ("full", "late"), ("masked", "token")], []

    def run(command, **_):
        asked.append(command[-2:])
        printed, code = ("7\n", -signal.SIGKILL) if len(asked) == 1 else ("9\n", 0)
        return subprocess.CompletedProcess(command, code, stdout=printed, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    assert encoder.peak_memory_on_cpu(runs, 4) == {("full", "token"): 7, ("masked", "token"): 9}
    assert [json.loads(runs) for _, runs in asked] == [[["full", "token"], ["full", "late"], ["masked", "token"]],
                                                       [["masked", "token"]]]  # fmt: skip


def test_a_process_that_fails_says_why(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no such row")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"python -m bench.encoder 4 '\[\[\]\]' failed:\nno such row"):
        encoder.peak_memory_on_cpu([[]], 4)


def test_slug():
    assert measure.slug("NVIDIA H200") == "nvidia-h200"
    assert measure.slug("CPU AMD EPYC, 2 cores") == "cpu-amd-epyc-2-cores"
    assert measure.device_name(CPU).startswith("CPU ")
