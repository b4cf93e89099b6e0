"""The stages of ``gpu.py``: each starts processes, listens to them, and writes what they tell into the results at once.

A process that crashes or hangs costs what it was at, which is named; the next goes on behind it. All that is known is
in the results, so that a later call can go on where an earlier one was cut off.
"""

import functools
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import device as devices
import fallbacks
import processes
import profiles
import records
from processes import Ended
from records import Past, Record
from rows import all_rows
from smoke import cases

ROOT = Path(__file__).resolve().parents[1]
# Those that only a card can run come first, in case time runs out.
TESTS = tuple(
    ROOT / f"tests/tarflow_kernels/test_{name}.py" for name in ("gpu", "triton", "ops", "mixture", "dispatch", "scales")
)
# How many seconds a case, a contender, a test or a problem may be silent before it counts as hung.
SILENCE = {"smoke": 45, "rows": 90, "check": 120, "tune": 60, "profile": 60}
COMPILING = 240


@dataclass
class Run:
    """One call of ``gpu.py``.

    Attributes:
        device: the device.
        path: the file of the results, which is also the state of the run.
        script: the command that does a task, but for the task.
        compiled: whether to measure contenders that are compiled first.
        named: measure rows whose names contain one of these alone; all, where it is empty.
        go_on: whether rows that an earlier call has measured at this commit are left out.
        tests: the files with the tests.
        silence: how long a process of a stage may be silent, in seconds.
    """

    device: torch.device
    path: Path
    script: list[str]
    compiled: bool = False
    named: tuple[str, ...] = ()
    go_on: bool = False
    tests: tuple[Path, ...] = field(default_factory=lambda: TESTS)
    silence: dict[str, float] = field(default_factory=lambda: dict(SILENCE))

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def cpus(self) -> int:
        """The number of processors."""
        return os.cpu_count() or 1

    def results(self) -> Record:
        """Read the results so far."""
        return records.load(self.path)

    def keep(self, rows: Iterable[Record] = (), **entries: Any) -> None:
        """Write rows, and other entries, into the results."""
        with self._lock:
            records.update(self.path, rows, **entries)

    def add(self, entry: str, **findings: Any) -> None:
        """Write findings into an entry of the results, beside those that are there."""
        with self._lock:
            records.update(self.path, **{entry: records.load(self.path).get(entry, {}) | findings})

    def do(
        self,
        task: str,
        seconds: float,
        hear: Callable[[Record], None] = lambda message: None,
        show: Callable[[str], None] | None = None,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> Ended:
        """Do a task in a process of its own."""
        job = {"task": task, "device": self.device.type, "known": known_levels(self.results()), **options}
        label = options.get("case", task)
        silence = self.silence.get(task, math.inf)
        return processes.run(
            [*self.script, json.dumps(job)],
            seconds,
            hear,
            show or (lambda line: print(f"[{label}] {line}", end="", flush=True)),
            silence=max(silence, COMPILING) if self.compiled else silence,
            environment=_environment() | (environment or {}),
        )


def _environment() -> dict[str, str]:
    """Where our code is, and which commit it is of, which need not be asked again."""
    folders = (ROOT / "kernels", ROOT, ROOT / "benchmarks", os.environ.get("PYTHONPATH", ""))
    commit = devices.describe(torch.device("cpu"))["commit"]
    return {"PYTHONPATH": os.pathsep.join(map(str, folders)), "TARFLOW_COMMIT": commit, "PYTHONUNBUFFERED": "1"}


def known_levels(results: Record) -> dict[str, int]:
    """Find the levels at which kernels work, by family, from cases that passed and rows that were timed.

    A kernel that brought its process down, and passed nowhere, is launched at levels that were not tried, if there are
    any, else no more.
    """
    levels: dict[str, int] = {}
    rows = [row for row in results["rows"].values() if row["machine"] == results.get("machine")]
    entries = [entry for row in rows for entry in records.timed(row).values()]
    for entry in (*entries, *(case for case in results.get("smoke", {}).values() if case["passed"])):
        for name in entry.get("configs", ()):
            family = fallbacks.family(name)
            levels[family] = max(entry.get("level", 0), levels.get(family, 0))
    for case in results.get("smoke", {}).values():
        if "safe_from" in case:
            levels = dict.fromkeys(map(fallbacks.family, case["configs"]), case["safe_from"]) | levels
    return levels


# Smoke ----------------------------------------------------------------------------------------------------------------


def smoke(run: Run, seconds: float) -> bool:
    """Run every case, several side by side, and one that fails again with ever safer configurations."""
    deadline = time.monotonic() + seconds
    left = [case for case in cases(run.device) if case not in run.results().get("smoke", {})]
    processes.side_by_side(lambda case: _run_case(run, case, deadline), left, max(2, min(8, run.cpus // 2)))
    found = run.results().get("smoke", {})
    print(f"smoke: {sum(case['passed'] for case in found.values())} of {len(cases(run.device))} cases passed")
    return found.keys() >= set(cases(run.device))


def _run_case(run: Run, case: str, deadline: float) -> None:
    """Run a case until it passes at some level."""
    level: int | None = 0
    failed: dict[str, str] = {}
    while level is not None and (left := deadline - time.monotonic()) > 0:
        configs: dict[str, fallbacks.Config] = {}
        found: dict[str, list[float]] = {}
        hear = functools.partial(_hear_case, configs, found)
        ended = run.do("smoke", left, hear, case=case, level=level)
        if ended.stopped == "out of time":
            print(f"{case}: out of time after {configs or 'no configuration'}", flush=True)
            return
        entry = {"passed": not ended.failure, "level": level, "configs": configs, "errors": found}
        following = None
        if ended.failure:
            failed[fallbacks.LEVELS[level]] = ended.failure
            following = _next_level(configs, level, ended)
            # What is merely wrong, or raises an error, is left to the rows, which judge it again.
            if ended.stopped or ended.exit < 0 or devices.LOST in ended.failure:
                entry["safe_from"] = len(fallbacks.LEVELS) if following is None else following
        run.add("smoke", **{case: entry | ({"failed": failed} if failed else {})})
        print(f"{case}: {_outcome(entry, failed)}  [{ended.seconds:.0f} s]", flush=True)
        level = following


def _next_level(configs: dict[str, fallbacks.Config], level: int, ended: Ended) -> int | None:
    """The level to try next; since a hang costs much time, the last resort comes next then."""
    last = len(fallbacks.LEVELS) - 1
    return fallbacks.next_level(configs, max(level, last - 1) if ended.stopped else level)


def _hear_case(configs: dict, found: dict, message: Record) -> None:
    if "launching" in message:
        configs[message["launching"]] = message["config"]
    else:
        found[message["found"]] = [message["error"], message["allowed"]]


def _outcome(entry: Record, failed: dict[str, str]) -> str:
    level = fallbacks.LEVELS[entry["level"]]
    if entry["passed"]:
        return "passed" + (f" with {level}; failed {', '.join(failed)}" if failed else "")
    return f"FAILED {level}, in {json.dumps(entry['configs'])}: {failed[level]}"


# Rows -----------------------------------------------------------------------------------------------------------------


def rows(run: Run, seconds: float) -> bool:
    """Measure the rows, those left that an earlier call has measured at this commit where this one goes on."""
    known = run.results()["rows"]
    wanted = [
        row.name
        for row in all_rows(run.device)
        if _is_wanted(run, row.name) and not (run.go_on and _is_measured(run, known.get(row.name)))
    ]
    return _measure(run, wanted, seconds)


def again(run: Run, seconds: float) -> bool:
    """Measure those rows again whose kernels were tuned since, and keep what there was before."""
    return _measure(run, rows_to_repeat(run), seconds, repeated=True)


def rows_to_repeat(run: Run) -> list[str]:
    """The rows that were timed with other configurations than those that are tuned by now."""
    best = {f"{kernel}:{key}": config for kernel, table in tuned().items() for key, config in table.items()}
    return [
        name
        for name, row in run.results()["rows"].items()
        if _is_measured(run, row) and _is_wanted(run, name)
        for entry in [records.timed(row).get(records.ours(row) or "", {})]
        if not entry.get("level")
        and any(best.get(kernel, config) != config for kernel, config in entry.get("configs", {}).items())
    ]


def _is_wanted(run: Run, name: str) -> bool:
    return not run.named or any(part in name for part in run.named)


def _is_measured(run: Run, record: Record | None) -> bool:
    """Whether a row has been measured here and now, or has failed to be."""
    if record is None or record["machine"] != devices.describe(run.device):
        return False
    left_out = [entry.get("unavailable") for entry in record.get("contenders", {}).values()]
    return record.get("not_measured") != records.LATE and not (run.compiled and records.NOT_COMPILED in left_out)


@dataclass
class _Position:
    """Where a process that measures stands: the row, its contender, and what was launched for that row."""

    row: str = ""
    contender: str = ""
    configs: dict[str, fallbacks.Config] = field(default_factory=dict)


def _measure(run: Run, names: list[str], seconds: float, repeated: bool = False) -> bool:
    """Measure rows, in processes that are replaced when a kernel brings one down."""
    deadline = time.monotonic() + seconds
    pending = {name: Past() for name in names}
    table = {row.name: row for row in all_rows(run.device)}
    while pending and (left := deadline - time.monotonic()) > 0:
        at = _Position()
        ended = run.do(
            "rows",
            left,
            functools.partial(_hear_row, run, pending, at, repeated),
            pasts={name: asdict(past) for name, past in pending.items()},
            compiled=run.compiled,
        )
        if not ended.failure or ended.stopped == "out of time":
            break
        print(f"lost at {at.row or 'the start'}, {at.contender}: {ended.failure}", flush=True)
        if at.row not in pending:  # no row is to blame, and another process would fare no better
            return False
        if reason := _blame(pending[at.row], at, ended, "triton" in table[at.row].contenders):
            run.keep([records.left_out(table[at.row], run.device, reason).record])
            del pending[at.row]
    run.keep([records.left_out(table[name], run.device, records.LATE).record for name in pending])
    return not pending


def _hear_row(run: Run, pending: dict[str, Past], at: _Position, repeated: bool, message: Record) -> None:
    if "row" in message:
        at.row, at.contender, at.configs = message["row"], "", {}
        print(f"-- {at.row}", flush=True)
    elif "contender" in message:
        at.contender = message["contender"]
    elif "launching" in message:
        at.configs[message["launching"]] = message["config"]
    else:
        record = message["record"]
        if repeated:
            record["before"] = _before(run.results()["rows"][record["name"]])
        run.keep([record])
        pending.pop(record["name"], None)
        print(summary(record), flush=True)


def _before(record: Record) -> Record:
    """What is kept of a measurement that another one replaces."""
    name = records.ours(record)
    return {"measured": record["measured"], "contender": name, **records.timed(record)[name]}


def _blame(past: Past, at: _Position, ended: Ended, has_triton: bool) -> str | None:
    """Put down what brought a process down, so that the next does without; or return why the row is given up."""
    if not at.contender or (at.contender == records.TIMING and ("triton" in past.skipped or not has_triton)):
        return ended.failure
    if at.contender not in ("triton", records.TIMING):
        past.skipped[at.contender] = ended.failure
        return None
    past.failed[fallbacks.LEVELS[past.level]] = ended.failure
    level = _next_level(at.configs, past.level, ended)
    if level is None:
        past.skipped["triton"] = "; ".join(f"{level}: {reason}" for level, reason in past.failed.items())
    else:
        past.level = level
    return None


def summary(record: Record) -> str:
    """Write a row in a line: the medians in milliseconds, and what is wrong."""
    if "not_measured" in record:
        return record["not_measured"]
    times = [
        f"{name} {records.three_digits(1e3 * result['p50'])} ms ({result['percent_of_limit']:.0f} %)"
        for name, result in records.timed(record).items()
    ]
    if before := record.get("before"):
        times.append(f"before {records.three_digits(1e3 * before['p50'])} ms")
    wrong = [f"{name}: {why}" for name, e in record["contenders"].items() if (why := e.get("inaccurate"))]
    return "; ".join([", ".join(times) or "nothing timed", *wrong])


# Check ----------------------------------------------------------------------------------------------------------------


def check(run: Run, seconds: float) -> bool:
    """Run the tests of the kernels, a share in each process; one that is lost goes on behind its last test."""
    shares = max(1, min(12, run.cpus - 2))
    found = _Tests(run)
    with tempfile.TemporaryDirectory() as folder:
        deadline = time.monotonic() + seconds
        processes.side_by_side(
            lambda share: _run_share(run, found, f"{share}/{shares}", Path(folder) / str(share), deadline),
            range(shares),
            shares,
        )
    found.write()
    print(f"check: {', '.join(f'{count} {outcome}' for outcome, count in found.counts.items()) or 'no test ran'}")
    return not found.cut_off


class _Tests:
    """How tests ended: counted, and those that failed by name, with the reason."""

    def __init__(self, run: Run) -> None:
        self.run, self.lock, self.written = run, threading.Lock(), 0.0
        self.counts: Counter[str] = Counter()
        self.failed: dict[str, str] = {}
        self.cut_off: list[str] = []

    def note(self, test: str, outcome: str, why: str) -> None:
        """Note how a test ended, and write what is news."""
        with self.lock:
            self.counts[outcome] += 1
            if outcome not in ("passed", "skipped"):
                self.failed[test] = why
                print(f"{outcome.upper()} {test}", flush=True)
        if why or time.monotonic() > self.written + 10:
            self.write()

    def write(self) -> None:
        """Write all of it into the results."""
        with self.lock:
            self.written = time.monotonic()
            self.run.keep(check={"counts": self.counts, "failed": self.failed, "cut_off": self.cut_off})


def _run_share(run: Run, found: _Tests, share: str, ended_tests: Path, deadline: float) -> None:
    """Run a share of the tests, in a new process after each one that was lost."""
    ended_tests.touch()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "told", "-p", "no:cacheprovider", "--no-header"]
    command += ["-o", "faulthandler_timeout=60", *map(str, run.tests)]
    while (left := deadline - time.monotonic()) > 0:
        current = ""

        def hear(message: Record) -> None:
            nonlocal current
            if "test" in message:
                current = message["test"]
            else:
                found.note(message["ended"], message["outcome"], message["why"])
                with ended_tests.open("a") as file:
                    file.write(message["ended"] + "\n")

        where = {"TARFLOW_SHARE": share, "TARFLOW_ENDED": str(ended_tests)}
        ended = processes.run(
            command, left, hear, silence=run.silence.get("check", math.inf), environment=_environment() | where
        )
        if ended.exit in (0, 1, 5) and not ended.stopped:  # all passed, some failed, there were none
            return
        if ended.stopped == "out of time":
            found.cut_off.append(current)
            return
        found.note(current or f"share {share}", "lost", ended.failure)
        if not current:
            return
        with ended_tests.open("a") as file:
            file.write(current + "\n")


# Tune -----------------------------------------------------------------------------------------------------------------


def tune(run: Run, seconds: float) -> bool:
    """Tune what the worst rows need, then all else; a problem that brings its process down is left as it is."""
    deadline = time.monotonic() + seconds
    found: dict[str, str] = run.results().get("tune", {})
    left = [name for name in problems_in_order(run.results()) if name not in found]
    while left and (seconds := deadline - time.monotonic()) > 0:
        before = len(found)
        hear = functools.partial(_hear_tuner, run, left, found)
        options = {"problems": left, "budget": 0.9 * seconds, "workers": max(1, run.cpus - 2)}
        ended = run.do("tune", seconds, show=hear, **options)
        lost = len(found) > before and ended.failure and ended.stopped != "out of time"
        if lost:
            found[list(found)[-1]] = f"lost: {ended.failure}"
        run.keep(tune=found, tuned=tuned())
        left = [name for name in left if name not in found]
        if not lost:
            if ended.failure:
                print(f"tune: {ended.failure}", flush=True)
            break
    return not left


def _hear_tuner(run: Run, problems: list[str], found: dict[str, str], line: str) -> None:
    print(line, end="", flush=True)
    name, _, outcome = line.partition(" ")
    if name in problems and "out of time" not in outcome:
        found[name] = outcome.strip()
        run.keep(tune=found, tuned=tuned())


def problems_in_order(results: Record) -> list[str]:
    """Name the problems of the tuner: those of the worst rows first, the ops in turn, then all others."""
    from tarflow_kernels import tune as tuner

    problems = {problem.name: problem for problem in tuner.problems()}
    shares = {
        kernel: result["percent_of_limit"]
        for row in results["rows"].values()
        for result in records.timed(row).values()
        for kernel in result.get("configs", ())
    }
    worst = sorted(shares.keys() & problems.keys(), key=lambda name: shares[name])
    others = [name for name in problems if name not in shares]
    return [p.name for names in (worst, others) for p in tuner.in_turn(problems[name] for name in names)]


def tuned() -> dict[str, dict[str, fallbacks.Config]]:
    """Read what has been tuned for the device at hand, by kernel."""
    from tarflow_kernels.triton import configs

    tables = sorted(configs.FOLDER.glob(f"*,{configs.device_name()}.json"))
    return {path.name.partition(",")[0]: json.loads(path.read_text()) for path in tables}


def restore(results: Record) -> None:
    """Put what an earlier call has tuned where launchers look, if it was made elsewhere."""
    if not results.get("tuned"):
        return
    from tarflow_kernels import tune as tuner
    from tarflow_kernels.triton import configs

    present = tuned()
    for kernel, table in results["tuned"].items():
        for key in table.keys() - present.get(kernel, {}).keys():
            tuner.save(configs.FOLDER, kernel, str(configs.device_name()), key, table[key])


# Profile and compilation ----------------------------------------------------------------------------------------------


def profile(run: Run, seconds: float) -> bool:
    """Find where whole steps spend their time, one process for each."""
    deadline = time.monotonic() + seconds
    results = run.results()
    fresh = results.get("profiles_machine") == devices.describe(run.device)
    tables = results.get("profiles", {}) if fresh else {}
    for name in [name for name in profiles.PROFILES if name not in tables]:
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        told: list[Record] = []
        ended = run.do("profile", left, told.append, names=[name])
        if ended.stopped == "out of time":
            return False
        tables[name] = told[0]["table"] if told else {"unavailable": ended.failure[-300:]}
        print(f"{name}: {tables[name].get('unavailable') or profiles.summary(tables[name])}", flush=True)
        run.keep(profiles=tables, profiles_machine=devices.describe(run.device))
    return True


def compile_ahead(run: Run, seconds: float) -> None:
    """Start processes that compile what will be measured, and leave some processors to what is measured meanwhile."""
    if not (run.on_gpu or os.environ.get("TRITON_INTERPRET") == "1"):
        return
    parts = max(1, min(6, run.cpus // 3))
    for part in range(parts):
        options = {"part": part, "parts": parts, "environment": {"TRITON_INTERPRET": "0"}}
        work = functools.partial(run.do, "warm", seconds, **options)
        threading.Thread(target=work, daemon=True).start()
