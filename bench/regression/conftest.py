"""Timing of the benchmarks (the fixture `against`) and their report; see README.md in this folder."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from bench.regression import ratios
from minimind.utils.device import describe_device

# CPU time, which does not count the time of other processes on the same cores.
CLOCK = time.process_time
WARMUP, LEAST, MOST, SECONDS = 3, 10, 200, 1.0  # rounds; seconds of timing for each benchmark


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.has_plugin("benchmark"):
        raise pytest.UsageError("bench/regression needs pytest-benchmark: pip install -e '.[dev]'")
    group = parser.getgroup("ratios of bench/regression")
    group.addoption("--rewrite-baseline", action="store_true", help="write the measured ratios to baseline.json")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Runs before pytest-benchmark's own hook, which would look for a saved run of this machine to compare with."""
    # One thread, since the time that threads wait for each other depends on the load.
    os.environ["RAYON_NUM_THREADS"] = "1"  # for the tokenizers library
    torch.set_num_threads(1)
    held = config.getoption("benchmark_compare") is True
    if held:
        config.option.benchmark_compare = []
    config.option.benchmark_quiet = True  # hides its table of times; --benchmark-verbose shows it
    rewrite = config.getoption("rewrite_baseline", False)
    config.pluginmanager.register(Report(held and not rewrite, rewrite), Report.__name__)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "against" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


class Report:
    """Collects the measurements, and at the end compares, prints and rewrites them."""

    def __init__(self, held: bool, rewrite: bool) -> None:
        self.held, self.rewrite = held, rewrite
        self.measured: dict[str, ratios.Measurement] = {}
        self.rows: list[ratios.RatioRow] = []

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.measured:
            return
        if self.rewrite:
            ratios.rewrite(ratios.BASELINE, self.measured, describe_device(torch.device("cpu")))
        self.rows = ratios.compare(self.measured, ratios.read())
        if self.held and ratios.failures(self.rows) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.rows:
            return
        terminalreporter.section(f"ratios on {describe_device(torch.device('cpu'))}")
        for line in ratios.table(self.rows):
            terminalreporter.write_line(line)
        for row in ratios.failures(self.rows):
            outcome = "FAILED" if self.held else "with --benchmark-compare this fails"
            terminalreporter.write_line(f"{row.name}: {row.verdict}; {outcome}", red=True)
        if self.rewrite:
            terminalreporter.write_line(f"written: {ratios.BASELINE}")


@pytest.fixture
def against(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[ratios.Against]:
    """against(name of the reference, subject, reference) times the two alternately; pytest-benchmark times the subject.
    variant: a condition that the ratio depends on; each variant has its own entry."""
    name = request.node.name.removeprefix("test_")
    report = request.config.pluginmanager.get_plugin(Report.__name__)
    assert isinstance(report, Report)

    def run(said: str, subject: Callable[[], Any], reference: Callable[[], Any], variant: str = "") -> None:
        rounds = _rounds(subject, reference)
        beside: list[float] = []
        benchmark.pedantic(
            subject, setup=lambda: beside.append(_seconds(reference)), rounds=rounds, warmup_rounds=WARMUP
        )
        if benchmark.disabled:
            return
        new = ratios.measurement(said, benchmark.stats.stats.data, beside[-rounds:])
        benchmark.extra_info |= {"reference": said, "ratio": new.ratio}
        report.measured[f"{name} {variant}".strip()] = new

    gc.collect()
    gc.disable()  # a collection would count for one of the two only
    yield run
    gc.enable()


def _rounds(subject: Callable[[], Any], reference: Callable[[], Any]) -> int:
    subject(), reference()  # the first calls, which may set something up, are not timed
    return max(LEAST, min(MOST, int(SECONDS / (_seconds(subject) + _seconds(reference)))))


def _seconds(function: Callable[[], Any]) -> float:
    start = CLOCK()
    function()
    return CLOCK() - start
