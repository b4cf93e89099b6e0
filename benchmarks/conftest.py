"""Options of the rows under pytest, what was measured so far, and a summary of it.

With ``--benchmark-only`` the records also go to ``results/<device>.json``. Rows that come after ``--seconds`` are left
out, and the summary says so.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

import checkout
import device as devices
import records
import rows
from row import Row
from tarflow.hardware import keep_freed_memory

# It needs Triton, and has nothing to be collected.
collect_ignore = ["rehearsal.py"]
DEVICE = devices.pick()
MEASURED = pytest.StashKey[dict[str, records.Measurement]]()
BEGAN = pytest.StashKey[float]()


def pytest_addoption(parser):
    """How long all rows together may take, and where published code is."""
    seconds = 240 if DEVICE.type == "cpu" else 600
    parser.addoption("--seconds", type=float, default=seconds, help="benchmarks: start no row later than this")
    for code in checkout.CODES:
        parser.addoption(code.option, type=Path, metavar="PATH", help=f"benchmarks: {code.help}")


def pytest_configure(config):
    """Keep freed memory, as every command of tarflow does, and start the clock."""
    keep_freed_memory()
    checkout.use(config.option)
    config.stash[MEASURED] = {}
    config.stash[BEGAN] = time.perf_counter()


@pytest.fixture
def measure(pytestconfig) -> Callable[[Row], records.Measurement]:
    """``measure(row)`` returns the measurement of a row, which is made once, unless the time is up."""

    def measure(row: Row) -> records.Measurement:
        measured = pytestconfig.stash[MEASURED]
        if row.name not in measured:
            late = time.perf_counter() - pytestconfig.stash[BEGAN] > pytestconfig.getoption("seconds")
            measured[row.name] = records.left_out(row, DEVICE, records.LATE) if late else records.attempt(row, DEVICE)
        return measured[row.name]

    return measure


def pytest_sessionfinish(session):
    """Keep what was measured: rows that did not run stay as they were."""
    measured = session.config.stash[MEASURED]
    if measured and session.config.getoption("benchmark_only", False):
        records.update(records.path_of(DEVICE), [measurement.record for measurement in measured.values()])


def pytest_terminal_summary(terminalreporter, config):
    """Say how many passes decoders took, what was left out, and why."""
    found = [measurement.record for measurement in config.stash[MEASURED].values()]
    if not found:
        return
    passes = [
        f"{record['name']}: {contender}: {result['passes']}/{result['steps']} = {'; '.join(result['by_block'])}"
        for record in found
        for contender, result in records.timed(record).items()
        if "passes" in result
    ]
    missing = [f"{what}: {why}" for what, why in rows.left_out(DEVICE).items()] + records.reasons(found)
    sections = {"passes / steps of each block, as they are generated": passes, "not measured": missing}
    for title, lines in sections.items():
        if lines:
            terminalreporter.section(title)
            terminalreporter.line("\n".join(lines))
    if config.getoption("benchmark_only", False):
        terminalreporter.line(f"the rest is in {records.path_of(DEVICE)}")
