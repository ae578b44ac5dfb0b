"""bench/gpu.sh without a GPU: every section at toy size, what becomes of failures, and the tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import report
from bench.gpu.rows import Rows

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.long


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    return Rows("part", 60.0)


# All that it measures on a GPU, with torch.compile and a run of pytest: half a minute.
def test_every_section_runs_at_toy_size_and_the_tables_are_drawn(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", "bench/gpu.sh", "--rehearse"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.jsonl")
    found = report.load(path)
    earlier = {"prefix_attention"}  # in tables of rows that are kept
    assert {row["section"] for row in found} == report.COLUMNS.keys() - earlier
    assert [row for row in found if "error" in row] == []
    for row in found:
        assert row.keys() >= {"part", "device", "commit", "date", "torch", "triton"}
        if row["section"] in ("encoder", "pretrain", "accelerate"):
            assert row.keys() >= {"fusion", "batch", "dtype", "way", "ms", "ms_p20", "ms_p80", "error_norm"}
    measured = {(row["fusion"], row["way"], row["masked"]) for row in found if row["section"] == "encoder"}
    for fusion in ("none", "dense", "factorized"):
        for way in ("eager", "graph", "captured"):
            assert {(fusion, way, True), (fusion, way, False)} <= measured
    subprocess.run([sys.executable, "-m", "bench.report", str(path)], cwd=ROOT, check=True)
    text = path.with_suffix(".md").read_text()
    assert all(f"## {title}" in text for name, title in report.TITLES.items() if name not in earlier)
    assert "What failed" not in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_failure_and_a_lack_of_memory_and_of_time_are_rows_and_the_next_is_measured(rows):
    with rows.measuring("encoder", fusion="dense"):
        raise ValueError("of one\nand another line")
    with rows.measuring("encoder", fusion="token"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with rows.measuring("encoder", 1000.0, fusion="none") as row:
        assert row is None
    with rows.measuring("encoder", fusion="factorized") as row:
        row["ms"] = 1.0
    found = report.load(rows.path)
    errors = [row.get("error") for row in found]
    assert errors[:2] == ["ValueError: of one", "out of memory"]
    assert "s of this part are left" in errors[2]
    assert (found[3]["ms"], errors[3]) == (1.0, None)
    report.render(rows.path)
    assert "- encoder (fusion token): out of memory" in rows.path.with_suffix(".md").read_text()


def test_a_row_that_was_cut_off_by_a_kill_is_left_out_and_damage_elsewhere_is_named(rows):
    rows.add("tests", tests=1)
    whole = rows.path.read_text()
    rows.path.write_text(whole + '{"section": "enc')
    assert len(report.load(rows.path)) == 1
    report.render(rows.path)
    rows.path.write_text("damage\n" + whole)
    with pytest.raises(ValueError, match="line 1: not a row of JSON"):
        report.load(rows.path)


def test_ratios_are_to_no_fusion_in_the_same_process_run_in_the_same_way():
    def row(fusion, ms, **others):
        return {"section": "encoder", "part": "a", "batch": 1, "way": "eager", "fusion": fusion, "ms": ms} | others

    made = [row("none", 2.0), row("none", 4.0, part="b"), row("none", 1.0, way="graph"), row("dense", 3.0),
            row("dense", 3.0, part="b"), row("dense", 3.0, way="compiled"), row("dense", 3.0, way="graph")]  # fmt: skip
    assert [row.get("ratio") for row in report.with_ratios(made)] == [1.0, 1.0, 1.0, 1.5, 0.75, None, 3.0]


def test_the_committed_tables_are_those_of_the_committed_rows(tmp_path):
    for path in (ROOT / "bench" / "results").glob("*-gpu.jsonl"):
        copy = tmp_path / path.name
        copy.write_bytes(path.read_bytes())
        assert json.loads(copy.read_text().splitlines()[0])["device"]
        report.render(copy)
        assert copy.with_suffix(".md").read_text() == path.with_suffix(".md").read_text()
