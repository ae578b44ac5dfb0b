"""Processes that read ahead where they cannot hand over, share nothing, die or hang."""

import subprocess
import sys
import textwrap

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from avfusion.data import workers as module
from avfusion.data.workers import Workers, batches, handed_over, reading, received


def in_namespace(*mount):
    """Whether this process may give others file systems of their own."""
    return subprocess.run(["unshare", "-m", "mount", *mount], capture_output=True).returncode == 0


SMALL_SHM = "mount -t tmpfs -o size=200k tmpfs /dev/shm"
LIMITS = {"files of 200 kB": "ulimit -f 200"}
try:
    if in_namespace("-t", "tmpfs", "-o", "size=200k", "tmpfs", "/dev/shm"):
        LIMITS["200 kB of shared memory"] = f'unshare -m bash -c \'{SMALL_SHM} && exec "$@"\' -- "$@"; exit'
except FileNotFoundError:
    pass

READ = """
import sys, torch
from avfusion.data.workers import Workers, batches, handed_over, reading, received

class Large(torch.utils.data.Dataset):
    def __len__(self): return 6
    def __getitem__(self, i): return torch.full((100_000,), float(i))

def collate(items): return handed_over([torch.stack(items), None])

workers = Workers(2)
loader = reading(Large(), workers, batch_size=2, collate_fn=collate)
for batch in batches(loader, workers, str, 60):
    x, nothing = received(batch)
    assert nothing is None
    print(x[:, -1].tolist(), x.shape, x.dtype)
"""


@pytest.mark.parametrize("limit", LIMITS)
def test_bug_a_loader_waited_for_ever_where_shared_memory_could_not_be_written(limit):
    line = ["bash", "-c", LIMITS[limit] if "exec" in LIMITS[limit] else f'{LIMITS[limit]}; exec "$@"', "--"]
    done = subprocess.run([*line, sys.executable, "-c", READ], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"[{i}.0, {i + 1}.0] torch.Size([2, 100000]) torch.float32" for i in (0, 2, 4)]
    assert done.stderr.count("too little shared memory (df /dev/shm), or none can be had (ulimit -a)") == 1


def test_with_room_it_is_shared_and_nothing_is_said():
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 3


class Stuck(Dataset):
    """Its fifth item is never read."""

    def __init__(self, workers):
        self.workers = workers

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.workers.reads(index)
        if index == 5:
            torch.multiprocessing.get_context().Event().wait()
        return index


def test_a_worker_that_gives_nothing_ends_the_run_with_what_it_is_at(monkeypatch):
    monkeypatch.setattr(module, "LOOK", 0.2)
    workers = Workers(2)
    each = batches(reading(Stuck(workers), workers, batch_size=None), workers, "clip {}.mp4".format, 1.0)
    found = [next(each) for _ in range(5)]
    with pytest.raises(RuntimeError, match=r"2 workers have given nothing for 1 s .--loader-timeout.; they .*clip 5"):
        next(each)
    assert found == [0, 1, 2, 3, 4]


ORPHANS = """
import os, signal
from avfusion.data.workers import Workers, batches, reading

class Large(list):  # more than a pipe holds, which no one empties
    def __getitem__(self, index):
        return bytes(1_000_000)

workers = Workers(2)
each = batches(reading(Large(range(100)), workers, batch_size=None), workers, str, 60)
next(each), next(each)
print(*workers.table[::2], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_bug_workers_outlived_a_process_that_was_killed():
    done = subprocess.run([sys.executable, "-c", ORPHANS], capture_output=True, text=True, timeout=120)
    pids = list(map(int, done.stdout.split()))
    assert len(pids) == 2
    assert not psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=30)[1]


SIGNALLED = """
import os, signal, time
from avfusion.data.workers import Workers, batches, reading

signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGINT, lambda *_: None)

class Slow(list):
    def __getitem__(self, index):
        time.sleep(0.05)
        return index

workers = Workers(2)
for number in batches(reading(Slow(range(12)), workers, batch_size=None), workers, str, 60):
    print(number, flush=True)
    os.killpg(0, signal.SIGTERM if number % 2 else signal.SIGINT)
"""


def test_bug_a_scheduler_that_signals_all_processes_killed_the_workers():
    """The first has handled it by then, and cannot go on to the end of its step."""
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=120,
                          start_new_session=True)  # fmt: skip
    assert done.stdout.split() == list(map(str, range(12))), done.stderr
    assert (done.returncode, done.stderr) == (0, "")


HANGS = """
import time
from avfusion.data import workers as module
module.LOOK = 0.2
class Stuck(list):
    def __getitem__(self, index):
        time.sleep(3600)
workers = module.Workers(2)
next(module.batches(module.reading(Stuck(range(9)), workers, batch_size=None), workers, str, 0.5))
"""


def test_what_hangs_is_not_waited_for_at_the_end():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "have given nothing for" in done.stderr


class Unlucky(Stuck):
    def __getitem__(self, index):
        if index == 2:
            raise OSError("the read timed out")
        return index


def test_what_times_out_in_a_worker_is_its_error_and_no_wait(monkeypatch):
    """A batch would be lost without a word."""
    workers = Workers(1)
    each = batches(reading(Unlucky(workers), workers, batch_size=None), workers, str, 60.0)
    assert [next(each), next(each)] == [0, 1]
    with pytest.raises(OSError, match="the read timed out"):
        next(each)


class Slow(Stuck):
    def __getitem__(self, index):
        torch.multiprocessing.get_context().Event().wait(0.2)
        return index


def test_slow_is_not_stuck(monkeypatch):
    """Each takes longer than a look at the workers, and less than the limit."""
    monkeypatch.setattr(module, "LOOK", 0.05)
    workers = Workers(1)
    assert list(batches(reading(Slow(workers), workers, batch_size=None), workers, str, 60.0)) == list(range(8))


def test_where_processes_can_share_nothing_this_one_reads(monkeypatch):
    class NoQueues:
        def Queue(self):
            raise OSError(38, "Function not implemented")

    module._can_share.cache_clear()
    monkeypatch.setattr(torch.multiprocessing, "get_context", NoQueues)
    with pytest.warns(
        UserWarning, match="can share nothing here .OSError: .Errno 38. Function not implemented.: this one"
    ):
        workers = Workers(2)
    module._can_share.cache_clear()
    assert (workers.count, workers.at_hand(), workers.held_by_dead()) == (0, [], None)
    workers.reads(1)
    monkeypatch.undo()
    loader = reading(Stuck(workers), workers, batch_size=2, sampler=[0, 1, 2, 3])
    assert [x.tolist() for x in batches(loader, workers, str, 1)] == [[0, 1], [2, 3]]


def test_here_nothing_is_handed_over():
    tensors = [torch.ones(2), None]
    assert handed_over(tensors)[0] is tensors[0]
    assert received(tensors)[0] is tensors[0]


FEW = textwrap.dedent("""
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
""")


def test_few_descriptors_end_it_with_the_remedy():
    held = READ.replace("for batch in", "kept = []\nfor batch in").replace("assert nothing is None", "kept.append(x)")
    held = held.replace("return 6", "return 200").replace("100_000", "10")
    done = subprocess.run([sys.executable, "-c", FEW + held], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "RuntimeError: too many files are open (" in done.stderr
    assert "allow more by ulimit -n, or take fewer workers" in done.stderr
