"""Rows under pytest-benchmark: each is measured once, its contenders in turn, and shown as one group of tests.

What pytest-benchmark times is a replay of what was measured, so that its tables, its comparisons and its JSON hold the
interleaved times, on a GPU those of events. With ``--benchmark-only`` the records also go to ``results/<device>.json``.
Rows that come after ``--seconds`` are left out, and said to be.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import checkout
import device as devices
import records
import rows
from row import Row

DEVICE = devices.pick()


class Clock:
    """A timer that stands still until it is told how much time has passed."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


CLOCK = Clock()
LATE = "out of time; see --seconds"
MEASURED = pytest.StashKey[dict[str, records.Measurement]]()
BEGAN = pytest.StashKey[float]()


def pytest_addoption(parser):
    """How long all rows together may take, and where the published code is."""
    seconds = 240 if DEVICE.type == "cpu" else 600
    parser.addoption("--seconds", type=float, default=seconds, help="benchmarks: start no row later than this")
    parser.addoption("--published", type=Path, metavar="PATH", help=f"benchmarks: {checkout.HELP}")


def pytest_configure(config):
    """Nothing is measured yet."""
    checkout.use(config.getoption("published"))
    config.stash[MEASURED] = {}
    config.stash[BEGAN] = time.perf_counter()


def pytest_generate_tests(metafunc):
    """One test for each contender of each row: a test file says which rows are its own."""
    if "contender" in metafunc.fixturenames:
        cases = [(row, contender) for row in metafunc.module.rows_of(DEVICE) for contender in row.contenders]
        ids = [f"{row.name}, {contender}" for row, contender in cases]
        metafunc.parametrize(("row", "contender"), cases, ids=ids)


def pytest_collection_modifyitems(items):
    """The clock of a test that shows a measurement."""
    for item in items:
        if "show" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture
def show(benchmark, pytestconfig):
    """``show(row, contender)``: measure the row unless it was, and report this contender."""

    def show(row: Row, contender: str) -> None:
        measured = pytestconfig.stash[MEASURED]
        if row.name not in measured:
            late = time.perf_counter() - pytestconfig.stash[BEGAN] > pytestconfig.getoption("seconds")
            measured[row.name] = _left_out(row) if late else records.attempt(row, DEVICE)
        measurement = measured[row.name]
        reason = measurement.record.get("not_measured")
        if reason == LATE:
            pytest.skip(reason)
        assert reason is None, reason
        result = measurement.record["contenders"][contender]
        if "unavailable" in result:
            pytest.skip(result["unavailable"])
        assert "inaccurate" not in result, result["inaccurate"]
        benchmark.group = row.name
        benchmark.extra_info |= result
        times = iter(measurement.times[contender])
        rounds = len(measurement.times[contender])
        benchmark.pedantic(CLOCK.advance, setup=lambda: ((next(times),), {}), rounds=rounds)

    return show


def pytest_sessionfinish(session):
    """Keep what was measured: rows that did not run stay as they were."""
    measured = session.config.stash[MEASURED]
    if measured and session.config.getoption("benchmark_only", False):
        records.update(records.path_of(DEVICE), [measurement.record for measurement in measured.values()])


def pytest_terminal_summary(terminalreporter, config):
    """How many passes decoders took; what was left out, and why."""
    measured = config.stash[MEASURED]
    if not measured:
        return
    passes = list(_passes(measured))
    if passes:
        terminalreporter.section("passes / steps of each block, as they are generated")
    for line in passes:
        terminalreporter.line(line)
    terminalreporter.section("not measured")
    for what, why in {**rows.left_out(DEVICE), **_late(measured)}.items():
        terminalreporter.line(f"{what}: {why}")
    for (contender, why), count in _unavailable(measured).items():
        terminalreporter.line(f"{contender}, in {count} of {len(measured)} rows: {why}")
    if config.getoption("benchmark_only", False):
        terminalreporter.line(f"the rest is in {records.path_of(DEVICE)}")


def _left_out(row: Row) -> records.Measurement:
    return records.Measurement(records.not_measured(row, DEVICE, LATE))


def _late(measured: dict[str, records.Measurement]) -> dict[str, str]:
    reasons = {name: measurement.record.get("not_measured") for name, measurement in measured.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def _passes(measured: dict[str, records.Measurement]) -> Iterator[str]:
    """A line for each row and contender that counted them."""
    for name, measurement in measured.items():
        for contender, result in measurement.record.get("contenders", {}).items():
            if "passes" in result:
                blocks = "; ".join(result["by_block"])
                yield f"{name}: {contender}: {result['passes']}/{result['steps']} = {blocks}"


def _unavailable(measured: dict[str, records.Measurement]) -> dict[tuple[str, str], int]:
    """How many rows lack a contender, by contender and reason."""
    counts: dict[tuple[str, str], int] = {}
    for measurement in measured.values():
        for contender, result in measurement.record.get("contenders", {}).items():
            reason = result.get("unavailable") or result.get("inaccurate")
            if reason:
                counts[contender, reason] = counts.get((contender, reason), 0) + 1
    return counts
