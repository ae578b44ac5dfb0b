"""`pytest bench/ --benchmark`: measure, print the tables, and write bench/results/<device>.json, .md and .png."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from bench import compare, measure, report

HERE = Path(__file__).parent
SECTIONS = pytest.StashKey[dict]()  # measured in this run: name -> section of the results file
KNOWN = pytest.StashKey[dict]()  # those of the file that --compare names
VERDICT = pytest.StashKey[tuple]()  # of the comparison: whether the run passes, and why
DEVICE = pytest.StashKey[str]()  # what the results file is named after, as it is before a benchmark changes threads


def pytest_addoption(parser):
    group = parser.getgroup("bench", "benchmarks of avfkernels and avfusion (bench/)")
    group.addoption("--benchmark", action="store_true", help="run the benchmarks; without it those in bench/ skip")
    group.addoption("--quick", action="store_true", help="batch 1 and one round; prints the tables, writes no results")
    group.addoption(
        "--no-compile", action="store_true", help="leave out rows under torch.compile, minutes of compiling"
    )
    group.addoption("--batch-size", type=int, help="videos in a batch of the encoder tables: 4 on a CPU, 64 on CUDA")
    group.addoption(
        "--compare", type=Path, metavar="FILE",
        help="fail, and write no results, if one of our ratios is worse than in this results file of the same device",
    )  # fmt: skip
    group.addoption("--compare-margin", type=float, default=0.1, help="how much worse is still good: 0.1 is 10 %%")


def pytest_configure(config):
    config.stash[SECTIONS] = {}
    config.stash[DEVICE] = measure.device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if path := config.getoption("--compare", None):
        if not config.getoption("--benchmark"):
            raise pytest.UsageError("--compare compares what --benchmark measures: give both")
        try:
            config.stash[KNOWN] = compare.load(path, config.stash[DEVICE])
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None


def write(config, sections: dict[str, dict]) -> Path:
    name = config.stash[DEVICE]
    return report.save(HERE / "results", measure.slug(name), name, sections)


class RecordedClock:
    """Shows the time that recorded measurements took: by it pytest-benchmark reads what was timed in turns before."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = RecordedClock()


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--benchmark", False)
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
            if not wanted:
                item.add_marker(pytest.mark.skip(reason="benchmarks run with: pytest bench/ --benchmark"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def effort(request) -> measure.Effort:
    return measure.QUICK if request.config.getoption("--quick") else measure.FULL


@pytest.fixture(scope="session")
def batch_size(request, device) -> int:
    default = 1 if request.config.getoption("--quick") else 64 if device.type == "cuda" else 4
    return request.config.getoption("--batch-size") or default


@pytest.fixture(scope="session")
def progress(request):
    """progress(stage, detail): one line a stage, and on a terminal the detail beside it, overwritten as it changes."""
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    capture = request.config.pluginmanager.getplugin("capturemanager")
    shown = None

    def show(stage: str, detail: str = "") -> None:
        nonlocal shown
        with capture.global_and_fixture_disabled():
            if stage != shown:
                if reporter.isatty:
                    reporter.rewrite("", erase=True)
                    reporter.rewrite("")
                reporter.write_line(stage)
                shown = stage
            if detail and reporter.isatty:
                reporter.rewrite(f"  {detail}", erase=True)

    return show


@pytest.fixture(scope="session")
def publish(request, device):
    """publish(name, section): printed at the end of the run, and written to the results.

    Written at once, so that a run that is killed keeps what it measured; with --compare at the end, if it passes; with
    --quick never.
    """
    config = request.config
    command = shlex.join(["pytest", *config.invocation_params.args])
    at_once = not config.getoption("--quick") and KNOWN not in config.stash

    def add(name: str, section: dict) -> None:
        section = section | {"command": command, "environment": measure.environment(device)}
        config.stash[SECTIONS][name] = section
        if at_once:
            write(config, {name: section})

    return add


@pytest.fixture
def replay(benchmark):
    """replay(row, times, group): hands the recorded times of a row to pytest-benchmark; skips a row that has none."""

    def run(row: dict, times: list[float], group: str) -> None:
        if not times:
            pytest.skip(row["note"])
        benchmark.group = group
        benchmark.extra_info.update(row)
        tape = iter(times)
        benchmark.pedantic(lambda: CLOCK.advance(next(tape)), rounds=len(times))

    return run


def pytest_sessionfinish(session):
    stash = session.config.stash
    if KNOWN in stash:
        passes, _ = stash[VERDICT] = compare.verdict(
            *compare.compare(stash[KNOWN], stash[SECTIONS]), session.config.getoption("--compare-margin")
        )
        if not passes and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    sections = config.stash[SECTIONS]
    passes, why = config.stash.get(VERDICT, (True, None))
    if sections:
        terminalreporter.section(config.stash[DEVICE])
    for section in sections.values():
        terminalreporter.write(report.markdown(section) + "\n")
    if why:
        terminalreporter.section(f"compared with {config.getoption('--compare')}")
        terminalreporter.write(why)
    if sections and (config.getoption("--quick") or not passes):
        terminalreporter.write_line(f"{'--quick' if passes else '--compare failed'}: nothing is written")
    elif sections:
        path = write(config, sections)
        report.render(path)
        terminalreporter.write_line(f"written: {path.relative_to(config.rootpath)}, and drawn from it .md and .png")
