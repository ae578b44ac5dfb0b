"""The benchmark's plumbing: results files, their rendering, timing in turns, and the options of pytest."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import encoder, measure, report

ROOT = Path(__file__).parents[2]
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
    path = report.save(folder, "cpu-x", "CPU X", sections)
    report.render(path)
    return path


def test_files_of_a_run(tmp_path):
    path = written(tmp_path, {"encoder": ENCODER})
    text = path.with_suffix(".md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cpu-x.json", "cpu-x.md", "cpu-x.png"]
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
    for name, kept in {"dense, ours": None, "dense, compiled": "on CUDA", "dense, graphs": "on CUDA"}.items():
        assert encoder.ROWS[name].why_not(CPU, training=False) == kept
    cuda = torch.device("cuda")
    assert encoder.ROWS["dense, graphs"].why_not(cuda, training=True) == "inference only"
    assert encoder.ROWS["dense, graphs"].why_not(cuda, training=False) is None
    assert encoder.ROWS["dense, compiled"].why_not(cuda, training=True) is None


def test_a_run_replaces_only_its_sections(tmp_path):
    report.save(tmp_path, "cpu-x", "CPU X", {"a": ENCODER, "b": section("Op, old", OP_ROWS)})
    path = written(tmp_path, {"b": section("Op, new", OP_ROWS)})
    sections = json.loads(path.read_text())["sections"]
    assert sections == {"a": ENCODER, "b": section("Op, new", OP_ROWS)}
    text = path.with_suffix(".md").read_text()
    assert "Op, new" in text
    assert "Op, old" not in text
    assert "70 µs" in text
    assert "not built" in text


def test_rendering_again_gives_the_same(tmp_path):
    path = written(tmp_path, {"encoder": ENCODER})
    before = path.with_suffix(".md").read_text()
    path.with_suffix(".md").unlink()
    subprocess.run([sys.executable, "-m", "bench.report", str(path)], cwd=ROOT, check=True)
    assert path.with_suffix(".md").read_text() == before


def test_columns_line_up():
    lines = report.table(ENCODER["rows"]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1


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
import sys, torch
from bench import measure
function = {"resident": lambda call: measure.peak_memory(call, torch.device("cpu")), "sampled": measure._sampled_peak}
print(function[sys.argv[1]](lambda: torch.ones(2**24).sum()))
"""


@pytest.mark.parametrize("how", ["resident", "sampled"])
def test_peak_memory(how):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, how], cwd=ROOT, env=os.environ | measure.MALLOC_RETURNS_MEMORY,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) == pytest.approx(2**26, rel=0.1)


def test_a_pass_that_runs_out_of_memory_is_left_out(monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command[-len(encoder.PASSES) :] if not asked else command[-1:])
        line, code = ('["full", 1]\n', -signal.SIGKILL) if len(asked) == 1 else ('["training", 3]\n', 0)
        return subprocess.CompletedProcess(command, code, stdout=line, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    assert encoder.peak_memory_on_cpu(encoder.BASELINE, 4) == {"full": 1, "training": 3}
    assert asked == [["full", "masked", "training"], ["training"]]


def test_slug():
    assert measure.slug("NVIDIA H200") == "nvidia-h200"
    assert measure.slug("CPU AMD EPYC, 2 cores") == "cpu-amd-epyc-2-cores"
    assert measure.device_name(CPU).startswith("CPU ")


def test_benchmarks_skip_unless_asked():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench/", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "pytest bench/ --benchmark" in done.stdout
    assert "passed" not in done.stdout
