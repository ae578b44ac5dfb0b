"""Faults of all kinds, done to running commands: nothing hangs, is lost or differs by a bit from an undisturbed run.

    pytest -m chaos -n logical --dist load --seed=1 --summary=chaos.json

Without `-m chaos` one fault of each kind is done to one command. A fault that this machine does not allow (file systems
of a test's own need the right to mount) is done by limits instead, or skipped.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress

import psutil
import pytest
from commands import at_work, commands, finish, nothing_left_over, run, start, stop

NAMES = ("pretrain", "finetune", "embed", "shard", "synth")
TRAINING = ("pretrain", "finetune")
KILLS = 20  # of each command
pytestmark = pytest.mark.long


def some(*quick, names=NAMES):
    """All of the commands in the long form, and `quick` in the short one."""
    return pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in quick else pytest.mark.chaos)
                                            for name in names])  # fmt: skip


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The commands, and what each leaves undisturbed."""
    folder = tmp_path_factory.mktemp("world")
    return folder, commands(folder), {}


@pytest.fixture
def given(world, tmp_path, request, record_property):
    """A command, a folder, random numbers, and a judge of what lies there in the end."""
    folder, known, clean = world
    command, out = known[request.getfixturevalue("name")], tmp_path / "out"
    seed = request.config.getoption("--seed")
    chance, began = random.Random(f"{seed} {request.node.name}"), time.monotonic()

    def judge(fault, times=1, told=""):
        """Lets it end, and compares. `told` is what the command has said of the fault."""
        if command.name not in clean:
            reference = folder / "clean" / command.name
            code, said = run(command.arguments(reference))
            assert code == 0, said
            clean[command.name] = command.left(reference)
        code, said = run(command.arguments(out, again=True))
        assert code == 0, said
        assert "Traceback" not in said
        assert command.left(out) == clean[command.name]
        assert command.name == "synth" or nothing_left_over(out) == []  # two may make a set, and neither sweeps it
        note(fault, times, "the same bits", told)

    def note(fault, times, result, told=""):
        line = next((line for line in told.splitlines() if re.search(" error: | warning: |stopped by", line)), "")
        for place in (out, tmp_path, folder):
            line = line.replace(str(place), "...")
        row = {"command": command.name, "fault": fault, "times": times, "result": result, "says": line, "seed": seed}
        record_property("row", row | {"seconds": round(time.monotonic() - began, 1)})

    judge.note = note
    return command, out, chance, judge


def said_plainly(code, told, codes=(1,)):
    assert code in codes, told
    assert "Traceback" not in told, told


def kills(given, count):
    """SIGKILL at random, to all processes or to the first alone, until it was hit so often."""
    command, out, chance, judge = given
    hit = again = 0
    while hit < count:
        process = start(command.arguments(out, again=again > 0))
        if not at_work(process, out, chance):
            code, told = finish(process)
            assert code == 0, told
            shutil.rmtree(out)  # it has ended in time: from the beginning
            again = 0
            continue
        stop(process, all_of_it=chance.random() < 0.7)
        hit, again = hit + 1, again + 1
    judge("SIGKILL", hit)


@some("pretrain", "shard")
def test_one_kill(given, name):
    kills(given, 1)


@pytest.mark.chaos
@pytest.mark.parametrize("name", NAMES)
def test_many_kills(given, name):
    kills(given, KILLS)


@some("finetune")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.chaos)],
                         ids=["SIGINT", "SIGTERM"])  # fmt: skip
def test_signals_that_end_it(given, name, number):
    command, out, chance, judge = given
    process = start(command.arguments(out))
    at_work(process, out, chance, 0.3)
    os.killpg(process.pid, number) if process.poll() is None else None
    code, told = finish(process)
    said_plainly(code, told, (0, 128 + number, -number))
    judge(number.name, 1, told)


def mounts(*options):
    try:
        return subprocess.run(["unshare", "-m", "mount", *options], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


MAY_MOUNT = mounts("-t", "tmpfs", "tmpfs", "/mnt")
FULL = """
mount -t tmpfs -o size={small}k tmpfs {place} || exit 99
"$@"; code=$?
mount -o remount,size=1g {place}
"$@" {again} >/dev/null || exit 98
rm -rf {kept}; cp -a {out} {kept}
exit $code
"""


@some("shard")
def test_a_full_disk(given, name, tmp_path):
    """It fills while the command writes; with more room the same command goes on."""
    command, out, _, judge = given
    probe = tmp_path / "probe"
    assert run(command.arguments(probe))[0] == 0
    sizes = [path.stat().st_blocks // 2 for path in probe.rglob("*") if path.is_file()]  # kB
    shutil.rmtree(probe)
    if not MAY_MOUNT:
        largest = max(sizes) * 3 // 4 if name in TRAINING else 2
        code, told = run(["bash", "-c", f'ulimit -f {largest}; exec "$@"', "--", *command.arguments(out)])
    else:
        place = tmp_path / "disk"
        place.mkdir()
        small = sum(sizes) * (12 if name in TRAINING else 6) // 10  # a checkpoint, and not a second one
        script = FULL.format(small=max(small, 16), place=place, out=place / "out", kept=out,
                             again=" ".join(command.again))  # fmt: skip
        code, told = run(["unshare", "-m", "bash", "-c", script, "--", *command.arguments(place / "out")])
    said_plainly(code, told, (1, 2))
    assert "No space left" in told or "too large" in told or "are free" in told  # known before the long work
    assert str(tmp_path) in told  # the file is named
    judge("full disk", 1, told)


@some("shard")
def test_few_descriptors(given, name):
    command, out, _, judge = given
    code, told = run(["bash", "-c", 'ulimit -n 40; exec "$@"', "--", *command.arguments(out)])
    said_plainly(code, told, (0, 1))
    judge("40 descriptors", 1, told)


@some("shard", names=("pretrain", "finetune", "embed", "shard"))
def test_little_shared_memory(given, name):
    """As in tests/avfusion/data/test_workers.py, but so little that processes cannot even be started."""
    if not MAY_MOUNT:
        pytest.skip("no file systems of one's own here; tests/avfusion/data/test_workers.py limits files instead")
    command, out, _, judge = given
    script = 'mount -t tmpfs -o size=16k tmpfs /dev/shm && exec "$@"'
    code, told = run(["unshare", "-m", "bash", "-c", script, "--", *command.arguments(out)])
    said_plainly(code, told, (0,))
    assert "processes can share nothing here" in told
    judge("16 kB of shared memory", 1, told)


@some("shard")
def test_a_killed_worker(given, name):
    command, out, chance, judge = given
    process = start(command.arguments(out))
    workers = []
    while process.poll() is None and not workers:
        time.sleep(0.005)
        workers = [
            each for each in process.children() if line(each) == line(process) or "spawn_main" in str(line(each))
        ]
    time.sleep(chance.uniform(0, 0.1))
    for worker in workers:
        with suppress(psutil.NoSuchProcess):  # it has ended
            worker.kill()
    code, told = finish(process)
    said_plainly(code, told, (0, 1))
    assert workers
    assert code == 0 or "a worker " in told
    judge("killed worker", 1, told)


def line(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@some("shard")
def test_two_at_once(given, name):
    """The second is told who has the folder; of a synthetic set both make the same files."""
    command, out, _, judge = given
    while True:
        first, lock = start(command.arguments(out)), out / ("synth.json" if name == "synth" else ".lock")
        while first.poll() is None and not (lock.exists() and lock.read_text()):
            time.sleep(0.002)
        os.killpg(first.pid, signal.SIGSTOP)  # it lives, and does nothing
        if lock.read_text():
            break
        os.killpg(first.pid, signal.SIGCONT)  # it has just ended
        finish(first)
        shutil.rmtree(out)
    code, told = run(command.arguments(out))
    os.killpg(first.pid, signal.SIGCONT)
    said_plainly(*finish(first), (0,))
    said_plainly(code, told, (0 if name == "synth" else 1,))
    assert name == "synth" or f"{out}: in use by process {first.pid} on" in told
    judge("two at once", 1, told)


CLOCK = """
import time
real, began = time.time, time.time()
time.time = lambda: real() - (86400 if real() - began > {after} else 0)
"""


@some("shard")
def test_the_clock_is_set_back(given, name, tmp_path):
    """By a day, while it works."""
    command, out, _, judge = given
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "sitecustomize.py").write_text(CLOCK.format(after=4))
    path = os.pathsep.join([str(tmp_path / "early"), os.environ.get("PYTHONPATH", "")])
    code, told = run(command.arguments(out), environment={"PYTHONPATH": path})
    said_plainly(code, told, (0,))
    judge("clock set back a day", 1, told)


@some("shard")
def test_a_read_only_folder(given, name):
    if not MAY_MOUNT:
        pytest.skip("no file systems of one's own here")
    command, out, _, judge = given
    out.mkdir()
    script = f'mount --bind {out} {out} && mount -o remount,bind,ro {out} && exec "$@"'
    code, told = run(["unshare", "-m", "bash", "-c", script, "--", *command.arguments(out)])
    said_plainly(code, told, (1, 2))
    assert str(out) in told
    assert list(out.iterdir()) == []
    judge("read-only folder", 1, told)


@pytest.mark.chaos
@pytest.mark.parametrize("name", ["pretrain"])
def test_a_killed_rank(given, name, tmp_path):
    """The other ends, in seconds; the run goes on, and ends with the bits of an undisturbed one of two processes."""
    command, out, chance, judge = given

    def two(where, *more):
        words = command.arguments(where)[3:]
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        return [*launch, "-m", "avfusion", *words, *more]

    assert run(two(tmp_path / "clean"))[0] == 0
    process = start(two(out))
    assert at_work(process, out, chance)
    ranks = [each for each in process.children() if "avfusion" in line(each)]
    chance.choice(ranks).kill()
    began = time.monotonic()
    code, _ = finish(process)
    assert code != 0
    ended = time.monotonic() - began
    code, told = run(two(out, "--resume"))
    assert code == 0, told
    assert command.left(out) == command.left(tmp_path / "clean")
    judge.note("killed rank of two", 1, f"the same bits; the other ended after {ended:.0f} s")


SLEEPS = textwrap.dedent("""
    import sys, time
    from avfusion.data import table
    def read(self, index, **window):
        time.sleep(3600)
    table.Table.read = read
    from avfusion.cli import main
    sys.exit(main(sys.argv[1:]))
""")


@pytest.mark.chaos
@pytest.mark.parametrize("name", ["pretrain"])
def test_a_worker_that_hangs(given, name, tmp_path):
    command, out, _, judge = given
    words = command.arguments(out)[3:]
    code, told = run([sys.executable, "-c", SLEEPS, *words, "--loader-timeout", "10", "--eval-clips", "0"])
    said_plainly(code, told)
    assert "the 1 workers have given nothing for 10 s (--loader-timeout); they are at" in told
    assert ".mp4" in told
    judge("a worker that hangs", 1, told)
