"""`pytest bench/ --benchmark`: measure Table 6, print it, and write bench/results/<device>.json, .md and .png.

Every benchmark takes its rows from a fixture `section`, whose params are names of sections of the results file. --full
measures all of them; one that was stopped is continued by the same command.
"""

from __future__ import annotations

import json
import shlex
import textwrap
import time
from pathlib import Path

import pytest
import torch

from bench import measure, report

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TABLE_6 = ("encoder_0_peers", "encoder_1_full", "encoder_2_masked")  # measured without --full
RUN = pytest.StashKey["Run"]()


class Run:
    """Which sections are measured, and where the run stands: each is written as soon as it is measured."""

    def __init__(self, command: str):
        self.command, self.device = command, measure.device_name(measure.DEVICE)
        self.path = RESULTS / f"{measure.slug(self.device)}.json"
        results = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.known, self.unfinished = results.get("sections", {}), results.get("unfinished", [])
        self.plan([], full=False)

    def plan(self, sections: list[str], full: bool) -> None:
        """Of `sections`, a full run keeps what it had measured when it was stopped, if nothing has changed since."""
        self.full = full
        self.sections = {name: self.known[name] for name in sections if full and self._kept(name)}
        self.left = [name for name in sections if name not in self.sections]
        took = {name: section["took"] for name, section in self.known.items() if "took" in section}
        self.recorded = took.keys() >= set(self.left)
        # Where nothing is recorded: about what it is on two CPU cores.
        self.expected = sum(took.get(name, 240 if name in TABLE_6 else 120) for name in self.left)
        self.begun = self.lap = time.perf_counter()

    def _kept(self, name: str) -> bool:
        now = measure.environment(measure.DEVICE)
        if name not in self.unfinished or str(now["commit"]).endswith("-dirty"):
            return False
        return all(self.known[name]["environment"][key] == now[key] for key in ("commit", "versions"))

    def add(self, name: str, section: dict) -> None:
        """Write a section that has been measured."""
        now = time.perf_counter()
        made = {"took": round(now - self.lap), "command": self.command,
                "environment": measure.environment(measure.DEVICE)}  # fmt: skip
        self.lap = now
        self.left.remove(name)
        self.sections[name] = section | made
        if self.full:
            self.unfinished = list(self.sections) if self.left else []
        report.save(self.path, self.device, {name: self.sections[name]}, self.unfinished)


def pytest_addoption(parser):
    group = parser.getgroup("bench", "benchmarks of avfkernels and avfusion (bench/)")
    group.addoption("--benchmark", action="store_true", help="run the benchmarks; without it those in bench/ skip")
    group.addoption(
        "--full", action="store_true",
        help="with --benchmark: not Table 6 alone but all, about an hour on two cores; continued if it was stopped",
    )  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist starts processes
def pytest_cmdline_main(config):
    config.option.benchmark_disable = not config.option.benchmark
    if config.option.benchmark:
        # Nothing runs beside what is timed, whatever addopts say; pytest-benchmark prints its table if asked for.
        config.option.numprocesses = 0
        config.option.benchmark_quiet = not config.option.benchmark_columns
    elif config.option.full:
        raise pytest.UsageError("--full says how much --benchmark measures: give both")


def pytest_configure(config):
    if config.getoption("--benchmark", False):  # not there for `pytest .`, which finds this file later
        config.stash[RUN] = Run(shlex.join(["pytest", *config.invocation_params.args]))


class RecordedClock:
    """Shows the time that recorded measurements took: by it pytest-benchmark reads what was timed in turns before."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = RecordedClock()


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config, items):
    ours = {item: item.callspec.params["section"] for item in items if item.path.is_relative_to(HERE)}
    for item in ours:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        if RUN not in config.stash:
            item.add_marker(pytest.mark.skip(reason="benchmarks run with: pytest bench/ --benchmark"))
    if RUN not in config.stash:
        return
    run, full = config.stash[RUN], config.option.full
    sections = [name for name in dict.fromkeys(ours.values()) if full or name in TABLE_6]
    if ours and not sections:
        raise pytest.UsageError("what is asked for is not of Table 6: it is measured with --benchmark --full")
    run.plan(sections, full)
    config.hook.pytest_deselected(items=[item for item, name in ours.items() if name not in run.left])
    items[:] = [item for item in items if item not in ours or ours[item] in run.left]


def pytest_report_collectionfinish(config):
    if RUN not in config.stash:
        return []
    run = config.stash[RUN]
    by = "as recorded on this device" if run.recorded else "as on two CPU cores; this device has no full record"
    minutes, count = max(1, round(run.expected / 60)), len(run.left)
    lines = [f"about {minutes} min ({by}); {count} section{'s'[: count != 1]}, each written when it is measured"]
    if run.sections:
        lines.append(f"continues a run that was stopped; measured already: {', '.join(run.sections)}")
    return [line for text in lines for line in textwrap.wrap(text, 100)]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return measure.DEVICE


@pytest.fixture(scope="session")
def planned(request) -> tuple[str, ...]:
    """The sections that are measured."""
    return tuple(request.config.stash[RUN].left)


@pytest.fixture(scope="session")
def progress(request):
    """progress(stage, detail): one line a stage, and on a terminal the detail below it, overwritten as it changes."""
    run = request.config.stash[RUN]
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    capture = request.config.pluginmanager.getplugin("capturemanager")
    shown = None

    def clock(seconds: float) -> str:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02}"

    def show(stage: str, detail: str = "") -> None:
        nonlocal shown
        with capture.global_and_fixture_disabled():
            if stage != shown:
                if reporter.isatty:
                    reporter.rewrite("", erase=True)
                    reporter.rewrite("")
                reporter.write_line(f"{clock(time.perf_counter() - run.begun)} of about {clock(run.expected)}  {stage}")
                shown = stage
            if detail and reporter.isatty:
                reporter.rewrite(f"  {detail}", erase=True)
            reporter.flush()

    return show


@pytest.fixture(scope="session")
def publish(request):
    """publish(name, section): written to the results file, and printed at the end of the run."""
    return request.config.stash[RUN].add


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


@pytest.hookimpl(trylast=True)  # what it shows stands last
def pytest_terminal_summary(terminalreporter, config):
    run = config.stash.get(RUN, None)
    if run is None or not run.sections:
        return
    terminalreporter.section(run.device)
    for section in run.sections.values():
        terminalreporter.write_line(report.terminal(section))
    for file in (run.path, *report.render(run.path)):
        terminalreporter.write_line(f"written: {file.relative_to(config.rootpath)}")
    for name, sentence in zip(TABLE_6, (report.peak_sentence, report.sentence), strict=False):
        if name in run.sections:
            terminalreporter.write_line("\n" + textwrap.fill(sentence(run.device, run.sections[name]), 100))
