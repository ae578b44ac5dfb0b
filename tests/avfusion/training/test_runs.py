"""How runs are listed: their states, what a resumed run took back, and that a log which was cut off is read."""

import json
import os
import socket
import subprocess
import sys

import pytest

from avfusion.cli import main
from avfusion.training.runs import RunStatus, find_runs, read_log

BEGUN = {"time": 0, "state": "running", "step": 0, "total": 10, "pid": os.getpid(), "host": socket.gethostname()}


def step(number, loss=1.0):
    return {"time": 0, "step": number, "left": 90, "loss": {"image": loss}, "lr": 0.1}


@pytest.fixture
def made(tmp_path):
    """made(name, *lines) writes the folder of a run."""

    def made(name, *lines, evaluations=""):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"task": "pretrain"}))
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if evaluations:
            (run / "evaluations.csv").write_text(evaluations)
        return run

    return made


def test_a_run_that_runs_tells_how_far_it_is(made):
    run = made("a", BEGUN, step(2), step(4, 0.5), evaluations="step,epoch,fusion\n0,0.0,0.25\n4,1.0,0.5\n")
    status = RunStatus.of(run)
    assert (status.state, status.step, status.total, status.left) == ("running", 4, 10, 90)
    assert (status.loss, status.evaluation) == ({"image": 0.5}, {"fusion": 0.5})
    assert status.cells()[2:] == ["running", "4/10", "40 %", "0:01:30", "image 0.5", "fusion 0.5"]


def test_states(made):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    died = BEGUN | {"pid": gone.pid}
    for name, lines, state, left in [
        ("died", [died, step(2)], "died", None),
        ("silent", [BEGUN | {"host": "elsewhere"}, step(2)], "silent", None),
        ("finished", [BEGUN, step(10), {"time": 0, "state": "finished"}], "finished", None),
        ("stopped", [BEGUN, step(3), {"time": 0, "state": "stopped"}], "stopped", None),
        ("resumed", [died, step(3), {"time": 0, "state": "stopped"}, BEGUN | {"step": 3}, step(5)], "running", 90),
    ]:
        status = RunStatus.of(made(name, *lines))
        assert (status.state, status.left) == (state, left), name
    failed = RunStatus.of(made("failed", BEGUN, step(2), {"time": 0, "state": "failed", "why": "RunError: step 3"}))
    assert (failed.state, failed.cells()[-1]) == ("failed", "RunError: step 3")


def test_steps_that_are_taken_again_count_once(made):
    run = made("a", BEGUN, step(2), step(4), step(6), BEGUN | {"step": 4}, step(5))
    assert [line["step"] for line in read_log(run) if "loss" in line] == [2, 4, 5]


def test_a_line_that_was_cut_off_is_left_out(made):
    run = made("a", BEGUN, step(2))
    with open(run / "log.jsonl", "a") as file:
        file.write('7\n{"step": 4, "lo')
    assert RunStatus.of(run).step == 2


def test_a_run_without_a_log_is_listed(made):
    status = RunStatus.of(made("a"))
    assert (status.state, status.step, status.total) == ("of an older version", 0, 0)


def test_the_last_that_moved_is_first(made, tmp_path):
    for number, name in enumerate(["old", "new", "middle"]):
        os.utime(made(name) / "log.jsonl", (0, [100, 300, 200][number]))
        os.utime(tmp_path / "runs" / name / "run.json", (0, 0))
    assert [run.name for run in find_runs(tmp_path)] == ["new", "middle", "old"]


def test_command(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["runs"])
    assert "runs: no such folder" in capsys.readouterr().err
    (tmp_path / "runs").mkdir()
    assert main(["runs"]) == 0
    assert "`avfusion pretrain tiny` starts one" in capsys.readouterr().out
    (made("a", BEGUN, step(4)) / "run.html").touch()
    assert main(["runs"]) == 0
    head, row, _, page = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "task", "state", "step"]
    assert row.split()[:4] == ["runs/a", "pretrain", "running", "4/10"]
    assert page.startswith("runs/a/run.html")
    assert main(["runs", "runs/a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == {"image": 1.0}
    (tmp_path / "runs/a/run.json").write_text("{}")
    assert main(["runs"]) == 1
    assert "run.json: not of a run" in capsys.readouterr().err
    made("b", BEGUN, step(4))
    assert main(["runs"]) == 3  # one that is broken hides no other
    told = capsys.readouterr()
    assert "runs/b" in told.out
    assert "runs/a/run.json: not of a run" in told.err
