"""Compare the speed of two checkouts of this project, row by row.

    python benchmarks/compare.py OTHER_CHECKOUT
    python benchmarks/compare.py OTHER_CHECKOUT --rounds 4 -k "sampling or training" --seconds 600

The rows of the other checkout and of this one run in turn, in fresh processes; arguments that are not ours go to
pytest. Prints how long a user waits in each row, there and here, and the ratio of the medians with its range over the
rounds. Ends with an error where a row takes longer here than ``--allow`` times what it takes there. Results that the
checkouts keep are left alone.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from row import USUAL

HERE = Path(__file__).resolve().parents[1]
# The seconds of each contender of each row, in one run.
Run = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Comparison:
    """The medians of a row in seconds, over all rounds, and the ratio of each round."""

    name: str
    there: float
    here: float
    ratios: list[float]

    @property
    def ratio(self) -> float:
        """How many times as long it takes here."""
        return self.here / self.there


def main(arguments: list[str] | None = None) -> int:
    """Run both checkouts in turn, and print a line for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="folder of the checkout to compare with, such as the commit before")
    parser.add_argument("--rounds", type=int, default=2, help="how often each checkout runs")
    parser.add_argument("--allow", type=float, default=1.03, help="the largest ratio that is no error")
    options, rest = parser.parse_known_args(arguments)
    theirs, ours = [], []
    for _ in range(options.rounds):
        theirs.append(run_rows(options.other.resolve(), rest))
        ours.append(run_rows(HERE, rest))
    compared = list(compare(theirs, ours))
    print(f"{'there':>12}{'here':>12}{'ratio':>7}  its range over {options.rounds} rounds")
    for row in compared:
        spread = f"{min(row.ratios):.2f} to {max(row.ratios):.2f}"
        slower = "  SLOWER" if row.ratio > options.allow else ""
        print(f"{1e3 * row.there:9.3f} ms{1e3 * row.here:9.3f} ms{row.ratio:7.3f}  {spread}  {row.name}{slower}")
    for row in sorted(theirs[0].keys() ^ ours[0].keys()):
        print(f"only {'there' if row in theirs[0] else 'here'}: {row}")
    return int(any(row.ratio > options.allow for row in compared))


def run_rows(checkout: Path, arguments: list[str]) -> Run:
    """Measure the rows of a checkout in a process of its own.

    Raises:
        RuntimeError: nothing was measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        # Without --benchmark-only, with which the rows are kept in results/ too.
        command = [sys.executable, "-m", "pytest", "-q", "benchmarks", f"--benchmark-json={path}", *arguments]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(checkout), str(checkout / "kernels")))}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        # A contender that is wrong fails its test; the others are measured all the same.
        if not path.exists() or not path.stat().st_size:
            raise RuntimeError(f"{checkout}: nothing was measured:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return read_times(path)


def read_times(path: Path) -> Run:
    """Read the times that pytest-benchmark kept."""
    rows: Run = {}
    for test in json.loads(path.read_text())["benchmarks"]:
        rows.setdefault(test["group"], {})[test["params"]["contender"]] = test["stats"]["data"]
    return rows


def compare(theirs: list[Run], ours: list[Run]) -> Iterator[Comparison]:
    """Compare the rows that all runs measured, by the contender that a user of the device gets."""
    for row in ours[0]:
        contenders = set.intersection(*(set(run.get(row, ())) for run in (*theirs, *ours)))
        name = next((name for name in USUAL if name in contenders), None)
        if name is None:
            continue
        there, here = ([run[row][name] for run in runs] for runs in (theirs, ours))
        medians = (statistics.median(itertools.chain(*times)) for times in (there, here))
        ratios = [statistics.median(b) / statistics.median(a) for a, b in zip(there, here, strict=True)]
        yield Comparison(f"{row}, {name}", *medians, ratios)


if __name__ == "__main__":
    sys.exit(main())
