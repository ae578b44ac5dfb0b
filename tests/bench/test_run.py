"""`pytest bench/ --benchmark`: what it runs, writes, continues and prints. The benchmark here measures nothing."""

import json
import re
import subprocess
from pathlib import Path

import matplotlib.figure  # noqa: F401 (pytester forgets what is imported while it runs, which this does not survive)
import pytest

from bench import conftest, measure

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results/cpu-amd-epyc-2-cores-avx2.json"
SECTIONS = ("encoder_1_full", "encoder_2_masked", "pretrain_dense", "pretrain_factorized")
BENCHMARK = f"""
import json
from pathlib import Path
import pytest

@pytest.fixture(scope="module", params={SECTIONS})
def section(request, progress, publish, planned):
    progress(f"measuring {{request.param}} of {{len(planned)}}")
    if Path("stop").exists() and Path("stop").read_text() == request.param:
        raise KeyboardInterrupt
    publish(request.param, json.loads(Path("made.json").read_text())[request.param])
    return {{"note": "none"}}, [1.0, 2.0]

@pytest.mark.parametrize("row", ["a", "b"])
def test_made_up(section, row, replay):
    replay(*section, group="made up")
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Not as a process of pytest-xdist, where pytest-benchmark does nothing."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.fixture
def run(pytester, monkeypatch):
    """run(arguments): pytest in a folder with that benchmark, and with results/ beside it."""
    made = json.loads(RESULTS.read_text())["sections"]
    known = ("command", "environment")
    made = {name: {key: value for key, value in made[name].items() if key not in known} for name in SECTIONS}
    (pytester.path / "made.json").write_text(json.dumps(made))
    pytester.makepyfile(conftest="from bench.conftest import *", test_benchmark=BENCHMARK)
    monkeypatch.setattr(conftest, "HERE", pytester.path)
    monkeypatch.setattr(conftest, "RESULTS", pytester.path / "results")
    monkeypatch.setattr(measure, "_commit", lambda: "abc1234")
    plain = ("-p", "no:hypothesispytest")  # which takes a second to say nothing
    return lambda *arguments: pytester.runpytest_inprocess(*plain, *arguments, no_reraise_ctrlc=True)


def results(pytester):
    (path,) = (pytester.path / "results").glob("*.json")
    return json.loads(path.read_text())


def measured(result):
    return re.findall(r"measuring (\S+) of", result.stdout.str())


def test_table_6_alone_is_measured_written_and_shown(run, pytester):
    result = run("--benchmark", "-n", "2", "--dist", "loadgroup")
    result.assert_outcomes(passed=4, deselected=4)
    assert list(results(pytester)) == ["device", "sections"]
    sections = results(pytester)["sections"]
    assert list(sections) == list(SECTIONS[:2])
    assert {"took", "command", "environment"} < sections["encoder_1_full"].keys()
    assert sections["encoder_1_full"]["command"].endswith(" --benchmark -n 2 --dist loadgroup")

    text = result.stdout.str()
    assert "about 8 min (as on two CPU cores; this device has no full record); 2 sections, each" in text
    result.stdout.fnmatch_lines(["0:00 of about 8:00  measuring encoder_1_full of 2"])
    assert "dense, materialised       20.2 s  6.14 (6.13–6.17)   6.36  326.9   560  21.33      3.37, 3.07" in text
    assert f"On {results(pytester)['device']}, dense interactions take 1.10 times as long" in " ".join(text.split())
    for shown in ("written: results/", ".png"):
        assert shown in text
    assert "Name (time in" not in text  # pytest-benchmark's own table
    assert max(map(len, text[text.index("ViT-B") :].splitlines())) <= 100

    result = run("--benchmark", "--benchmark-columns=min", "-k", "masked")
    result.assert_outcomes(passed=2, deselected=6)
    assert "as recorded on this device" in result.stdout.str()
    assert "Name (time in" in result.stdout.str()


def test_a_full_run_that_is_stopped_is_continued(run, pytester, monkeypatch):
    stop = pytester.path / "stop"
    stop.write_text("pretrain_dense")
    result = run("--benchmark", "--full")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert measured(result) == list(SECTIONS[:3])
    assert results(pytester)["unfinished"] == list(results(pytester)["sections"]) == list(SECTIONS[:2])

    stop.unlink()
    monkeypatch.setattr(measure, "_commit", lambda: "abc1234-dirty")
    assert not conftest_run(SECTIONS).sections
    monkeypatch.setattr(measure, "_commit", lambda: "def5678")
    assert not conftest_run(SECTIONS).sections
    monkeypatch.setattr(measure, "_commit", lambda: "abc1234")
    assert conftest_run(SECTIONS).left == list(SECTIONS[2:])

    assert measured(run("--benchmark")) == list(SECTIONS[:2])  # Table 6 is always measured, and changes nothing else
    result = run("--benchmark", "--full")
    assert measured(result) == list(SECTIONS[2:])
    assert "continues a run that was stopped; measured already: encoder_1_full, encoder_2_masked" in result.stdout.str()
    assert "20.2 s  6.14" in result.stdout.str()  # what was measured before is shown too
    assert "unfinished" not in results(pytester)
    assert list(results(pytester)["sections"]) == list(SECTIONS)
    assert conftest_run(SECTIONS).left == list(SECTIONS)  # the next begins anew


def conftest_run(sections):
    run = conftest.Run("pytest")
    run.plan(list(sections), full=True)
    return run


def test_how_long_it_takes_is_what_it_took(tmp_path, monkeypatch):
    monkeypatch.setattr(conftest, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "_commit", lambda: "abc1234-dirty")  # a clean one would be continued
    run = conftest_run(SECTIONS)
    assert (run.recorded, run.expected) == (False, 2 * 240 + 2 * 120)
    run.lap -= 1000
    run.add("pretrain_dense", {})
    assert conftest_run(SECTIONS[:3]).expected == 2 * 240 + 1000
    assert (conftest_run(SECTIONS[2:3]).recorded, conftest_run(SECTIONS[2:3]).expected) == (True, 1000)


def test_what_is_asked_for_wrongly_is_said(run):
    result = run("--full")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--full says how much --benchmark measures: give both"])
    result = run("--benchmark", "-k", "pretrain")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*is not of Table 6: it is measured with --benchmark --full"])
    run("-rs").assert_outcomes(skipped=8)


def test_every_benchmark_of_the_repository_is_of_a_section(pytester):
    """More than 5 s where nothing is imported yet: it imports whatever is measured."""
    bench = ("--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), str(ROOT / "bench"), "--collect-only", "-q")
    result = pytester.runpytest_inprocess(*bench, "--benchmark", "--full")
    assert result.ret == 0
    assert "; 34 sections, each written" in result.stdout.str()
    peers, *tables = conftest.TABLE_6
    assert f"bench/test_peers.py::test_peers[{peers}-ours, dense, float32]" in result.outlines
    for section in tables:
        assert f"bench/test_encoder.py::test_encoder[{section}-dense, ours]" in result.outlines


def test_a_commit_is_dirty_by_its_code_not_by_its_results(tmp_path, monkeypatch):
    code, written = tmp_path / "bench/measure.py", tmp_path / "bench/results/a.json"
    written.parent.mkdir(parents=True)
    written.write_text("1")
    code.write_text("1")
    monkeypatch.setattr(measure, "__file__", str(code))
    commit = measure._commit.__wrapped__
    assert commit() is None

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "a")
    clean = commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    written.write_text("2")
    assert commit() == clean
    code.write_text("2")
    assert commit() == f"{clean}-dirty"
