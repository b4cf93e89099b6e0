"""The table of rows under pytest-benchmark: a group of tests for each row, one for each of its contenders.

The contenders of a row are measured together, in turn. What pytest-benchmark times is a replay of these measurements,
so that its tables, its comparisons and its JSON hold the interleaved times, on a GPU those of events.
"""

import pytest

import device as devices
import records
from rows import all_rows


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
CASES = [(row, contender) for row in all_rows(devices.pick()) for contender in row.contenders]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("row", "contender"), CASES, ids=[f"{row.name}, {contender}" for row, contender in CASES])
def test_row(benchmark, measure, row, contender):
    """Check one contender of a row, and replay its times."""
    measurement = measure(row)
    reason = measurement.record.get("not_measured")
    if reason == records.LATE:
        pytest.skip(reason)
    assert reason is None, reason
    result = measurement.record["contenders"][contender]
    if "unavailable" in result:
        pytest.skip(result["unavailable"])
    assert "inaccurate" not in result, result["inaccurate"]
    benchmark.group = row.name
    benchmark.extra_info |= result
    times = measurement.times[contender]
    replay = iter(times)
    benchmark.pedantic(CLOCK.advance, setup=lambda: ((next(replay),), {}), rounds=len(times))
