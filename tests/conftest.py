"""Side by side (`pytest -n logical`): a file a process, one thread each, and what takes long first."""

import os
import signal
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as what a shell runs in its background inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported


def pytest_addoption(parser):
    group = parser.getgroup("faults")
    group.addoption("--seed", type=int, default=0, help="of what faults do at random (default: 0)")
    group.addoption("--minutes", type=float, default=0.0, help="of fuzzing, shared by all targets (-m fuzz)")
    group.addoption("--summary", type=Path, help="file for what -m chaos or -m fuzz has found: JSON, and .md beside it")


ROWS = []  # of the summary


def pytest_runtest_logreport(report):
    """Called for the tests of all processes in the first."""
    if report.when == "call":
        ROWS.extend(value for name, value in report.user_properties if name == "row")


def pytest_sessionfinish(session):
    path = session.config.getoption("--summary", None)
    if path and "PYTEST_XDIST_WORKER" not in os.environ:
        from summary import write

        write(path, session.config, ROWS)


def pytest_collection_modifyitems(items):
    """Files that take most of a minute, begun last, would be waited for."""
    long = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture
def one_thread():
    """As in the processes that tests start: sums depend on the number of threads."""
    import torch  # after OMP_NUM_THREADS

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
