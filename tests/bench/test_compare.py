"""The regression guard: what it compares, what it refuses to compare, and how pytest ends."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import measure
from bench.compare import compare, load, ratios, verdict

ROOT = Path(__file__).parents[2]


def timed(ratio):
    return {"time_ratio": {"p20": 0.9 * ratio, "median": ratio, "p80": 1.1 * ratio}}


def section(*rows, **changes):
    made = {
        "title": "Encoder", "batch": 4, "dtype": "float32", "baseline": "no fusion", "notes": [], "rows": list(rows),
        "environment": {"date": "2026-01-02", "threads": 2, "versions": {"torch": "2.14.1", "avfkernels": "0.1.0"}},
    }  # fmt: skip
    return made | changes


KNOWN = {
    "encoder": section(
        {"name": "no fusion", "memory_ratio": 1.0} | timed(1.0),
        {"name": "dense, ours", "memory_ratio": 1.02} | timed(1.10),
        {"name": "dense, materialised", "memory_ratio": 21.0} | timed(8.9),
    ),
    "op": section(
        {"name": "two SDPA", "forward": timed(1.0), "both": timed(1.0)},
        {"name": "automatic", "forward": timed(0.30), "both": timed(0.50), "peak_memory": 5},
        {"name": "cuda", "note": "no CUDA device"},
        title="Pair attention",
        baseline="two SDPA",
    ),
    "growth": section({"name": "eager", "both": {"seconds": {"median": 1.0}}}, baseline=None),
}


def measured(**changes):
    """The same measured again, with other values at "section.row.key" paths."""
    now = copy.deepcopy(KNOWN)
    for path, value in changes.items():
        name, row, key = path.split("__")
        row = now[name]["rows"][int(row[1:])]
        row[key] = timed(value) if key in ("forward", "both") else value
        if key == "time":
            row |= timed(value)
    return now


def worse(now, margin=0.1, then=KNOWN):
    changes, _ = compare(then, now)
    return [(c.table, c.row, c.ratio) for c in changes if c.growth > margin]


def test_ratios_of_our_rows_and_of_no_others():
    changes, apart = compare(KNOWN, measured())
    assert {(c.row, c.ratio): c.then for c in changes} == {
        ("dense, ours", "time"): 1.10, ("dense, ours", "memory"): 1.02,
        ("automatic", "forward"): 0.30, ("automatic", "both"): 0.50,
    }  # fmt: skip
    assert apart == []
    assert all(change.growth == 0 for change in changes)
    assert ratios(KNOWN["growth"]["rows"][0]) == ratios(KNOWN["op"]["rows"][2]) == {}
    assert worse(measured(encoder__r2__time=99.0, encoder__r0__memory_ratio=2.0, op__r0__forward=3.0)) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"encoder__r1__time": 1.22}, ("Encoder", "dense, ours", "time")),
        ({"encoder__r1__memory_ratio": 1.2}, ("Encoder", "dense, ours", "memory")),
        ({"op__r1__forward": 0.34}, ("Pair attention", "automatic", "forward")),
        ({"op__r1__both": 0.56}, ("Pair attention", "automatic", "both")),
    ],
)
def test_each_kind_of_ratio_is_guarded(change, found):
    assert worse(measured(**change)) == [found]
    passes, text = verdict(*compare(KNOWN, measured(**change)), 0.1)
    assert not passes
    assert "4 ratios compared, 1 worse by more than 10%" in text
    assert all(f" {cell} |" in text for cell in found)


def test_the_margin_is_a_bound_on_the_growth():
    now = measured(encoder__r1__time=1.2)  # 9 % more than 1.10
    assert worse(now, 0.1) == []
    assert worse(now, 0.05) == [("Encoder", "dense, ours", "time")]
    assert verdict(*compare(KNOWN, now), 0.1)[0]
    assert not verdict(*compare(KNOWN, now), 0.05)[0]
    assert verdict(*compare(KNOWN, measured(encoder__r1__time=0.1)), 0.0)[0]


def test_the_worst_comes_first_and_the_table_lines_up():
    _, text = verdict(*compare(KNOWN, measured(encoder__r1__time=1.3, op__r1__both=5.0)), 0.1)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert "900%" in lines[2]
    assert "1.100" in lines[3]
    assert "1.300" in lines[3]
    assert "18%" in lines[3]


def test_a_ratio_that_is_not_measured_any_more_fails():
    now = measured()
    now["encoder"]["rows"][1] = {"name": "dense, ours", "note": "out of memory"}
    del now["op"]["rows"][1]
    passes, text = verdict(*compare(KNOWN, now), 0.1)
    assert not passes
    assert text.count("not measured") == 4
    nan = measured(encoder__r1__time=float("nan"))
    assert not verdict(*compare(KNOWN, nan), 0.1)[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"batch": 1}, "batch 4 in the file and 1 here"),
        ({"dtype": "bfloat16"}, "dtype float32 in the file and bfloat16 here"),
        ({"baseline": "late"}, "baseline no fusion in the file and late here"),
        ({"environment": {"threads": 8, "versions": {"torch": "2.14.1"}}}, "threads 2 in the file and 8 here"),
        (
            {"environment": {"threads": 2, "versions": {"torch": "2.15", "cuda": "13.0"}}},
            "torch 2.14.1 in the file and 2.15 here, cuda None in the file and 13.0 here",
        ),
    ],
)
def test_other_conditions_are_named_and_never_compared(changes, reason):
    now = measured(encoder__r1__time=50.0, op__r1__both=0.4)
    now["encoder"] |= changes
    passes, text = verdict(*compare(KNOWN, now), 0.1)
    assert passes  # what is left
    assert f"not compared: encoder: {reason}\n" in text
    assert "2 ratios compared, 0 worse" in text
    passes, text = verdict(*compare(KNOWN, {"encoder": now["encoder"]}), 0.1)
    assert not passes
    assert "Nothing was compared" in text


def test_a_new_version_of_ours_is_what_is_under_test():
    now = measured(encoder__r1__time=2.0)
    now["encoder"]["environment"]["versions"]["avfkernels"] = "0.2.0"
    assert worse(now) == [("Encoder", "dense, ours", "time")]


def test_a_new_table_is_named():
    now = measured() | {"new": KNOWN["op"]}
    assert compare(KNOWN, now)[1] == ["new: not in the file"]
    assert not verdict([], [], 0.1)[0]


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"device": "CPU X"}', '"device"'])
def test_a_file_that_is_no_results_file(tmp_path, text):
    path = tmp_path / "some.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=r"--compare .*some\.json: not a results file"):
        load(path, "CPU X")


PUBLISH = """
import json, os
from pathlib import Path
import bench.conftest
from bench.conftest import *

bench.conftest.HERE = Path(__file__).parent

def test_measures(publish):
    publish("encoder", json.loads(Path("now.json").read_text()))
    if "KILLED" in os.environ:
        os._exit(9)
"""


def pytest_of(tmp_path, now, *arguments, **environment):
    """Runs pytest with the hooks of bench/, results beside it, on a benchmark that "measures" the section `now`."""
    (tmp_path / "test_made_up.py").write_text("from conftest import test_measures\n")
    (tmp_path / "conftest.py").write_text(PUBLISH)
    (tmp_path / "now.json").write_text(json.dumps(now))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path, *arguments],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True,
    )  # fmt: skip


def slower():
    now = {k: v for k, v in measured(encoder__r1__time=1.5)["encoder"].items() if k != "environment"}
    return now | {"rows": [r | {"per_second": 1.0, "seconds": {"median": 1.0}, "rounds": 1} for r in now["rows"]]}


def test_pytest_fails_on_a_regression_and_says_which(tmp_path):
    now = slower()
    file, device = tmp_path / "known.json", torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sections = {"encoder": KNOWN["encoder"] | {"environment": measure.environment(device)}}
    file.write_text(json.dumps({"device": measure.device_name(device), "sections": sections}))

    arguments = ("--benchmark", "--compare", "known.json", "--compare-margin", "0.2")
    done = pytest_of(tmp_path, now, *arguments)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout
    assert "1 passed" in done.stdout
    assert "2 ratios compared, 1 worse by more than 20%" in done.stdout
    assert "36%" in done.stdout
    assert "nothing is written" in done.stdout
    assert not (tmp_path / "results").exists()

    file.write_text(json.dumps({"device": "another", "sections": sections}))
    done = pytest_of(tmp_path, now, *arguments)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"measured on another; this is {measure.device_name(device)}" in done.stderr


def test_results_are_there_as_soon_as_they_are_measured(tmp_path):
    assert pytest_of(tmp_path, slower(), "--benchmark", KILLED="1").returncode == 9
    (path,) = (tmp_path / "results").iterdir()
    assert list(json.loads(path.read_text())["sections"]) == ["encoder"]

    assert pytest_of(tmp_path, slower(), "--benchmark").returncode == 0
    assert {made.suffix for made in (tmp_path / "results").iterdir()} == {".json", ".md"}


def test_quick_runs_write_nothing(tmp_path):
    done = pytest_of(tmp_path, slower(), "--benchmark", "--quick")
    assert "--quick: nothing is written" in done.stdout
    assert not (tmp_path / "results").exists()


def test_compare_without_benchmark_is_a_usage_error(tmp_path):
    done = pytest_of(tmp_path, {}, "--compare", "known.json")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--compare compares what --benchmark measures" in done.stderr
