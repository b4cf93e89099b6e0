"""Measure a row, which gives a record; keep the records of a device in one JSON file, by row.

A record says where it was measured, what the row costs, the ceilings of the device, and for each contender its error,
its times and how near it came to the larger of the two floors: bytes over the measured copy rate, operations over the
measured matrix rate. What was not measured is there too, with the reason.
"""

import contextlib
import datetime
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import device as devices
import fallbacks
from row import OURS, USUAL, Contender, Outputs, Row
from tarflow.files import atomic_write

FOLDER = Path(__file__).parent / "results"
SECONDS = 1.0
LATE = "out of time; see --seconds"
NOT_COMPILED = "left out, since compiling takes a minute or two; see --compiled"
TIMING = "timing"
# Below this an error is rounding, and twice another's means nothing.
_ROUNDING = 1e-6

Record = dict[str, Any]


@dataclass
class Measurement:
    """A record and the times in seconds that its percentiles are of."""

    record: Record
    times: dict[str, list[float]] = field(default_factory=dict)


# Measuring ------------------------------------------------------------------------------------------------------------


@dataclass
class Past:
    """What happened to a row in processes that did not survive it.

    Attributes:
        level: that of the configurations of our kernels to begin with; see :mod:`fallbacks`.
        failed: why levels below failed, by their names.
        skipped: why contenders are left out, by their names.
    """

    level: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def measure(
    row: Row,
    device: torch.device,
    seconds: float = SECONDS,
    compiled: bool = True,
    past: Past | None = None,
    begun: Callable[[str], None] = lambda contender: None,
) -> Measurement:
    """Check all contenders of a row, then time those that are right, in turn.

    Where our kernels fail or are wrong, ever safer configurations of them are tried; the record says which one the
    times are of, and why the others failed.

    Args:
        row: the row.
        device: the device.
        seconds: how long the timing takes, about.
        compiled: whether to measure contenders that are compiled first, for a minute or two each.
        past: what happened to this row before.
        begun: a function that is called with the name of each contender before it first runs, then with ``TIMING``.
    """
    past = past or Past()
    torch.manual_seed(0)
    inputs = row.draw(device)
    expected = row.expect(inputs)
    contenders, runs = {}, {}
    for name, contender in row.contenders.items():
        if name.startswith("compiled") and not compiled:
            contenders[name] = {"unavailable": NOT_COMPILED}
        elif name in past.skipped:
            contenders[name] = {"unavailable": past.skipped[name]}
        else:
            begun(name)
            level = past.level if name in OURS else 0
            contenders[name], runs[name] = _prepare(_at(contender, level), inputs, expected)
    allowed = _allowed(contenders, row)
    for name, entry in contenders.items():
        _judge(entry, allowed[name])
    if "triton" in runs:
        begun("triton")
        _rescue(row, contenders["triton"], runs, inputs, expected, allowed["triton"], past)
    runs = {name: run for name, run in runs.items() if run is not None and "inaccurate" not in contenders[name]}
    begun(TIMING)
    if device.type == "cuda" and row.graph:
        runs = _captured(runs, row, contenders)
    times = devices.interleave(runs, device, seconds, row.flush, row.rounds)
    times = {name: [taken / row.launches for taken in times[name]] for name in times}
    record = _header(row, device) | {"contenders": contenders}
    for name, taken in times.items():
        contenders[name] |= _performance(taken, record, row)
    torch._dynamo.reset()
    return Measurement(record, times)


def attempt(row: Row, device: torch.device, compiled: bool = True, **options: Any) -> Measurement:
    """Measure a row, or say why it cannot be: for want of memory, perhaps."""
    try:
        return measure(row, device, compiled=compiled, **options)
    except Exception as failure:  # the other rows go on
        devices.require_alive(failure)
        return left_out(row, device, f"{type(failure).__name__}: {_reason(failure)}")


def left_out(row: Row, device: torch.device, reason: str) -> Measurement:
    """Say why a row was not measured."""
    return Measurement({**_identity(row), "machine": devices.describe(device), "not_measured": reason})


def relative_error(outputs: Outputs, expected: Outputs) -> float:
    """Return the largest of ``|out - expected| / |expected|`` over the outputs, in Euclidean norm."""
    return max(_relative_error(*pair) for pair in zip(outputs, expected, strict=True))


def _relative_error(output: Tensor | list[Tensor], expected: Tensor | list[Tensor]) -> float:
    if isinstance(output, Tensor):
        output, expected = [output], [expected]
    difference = sum((a.to(b.dtype) - b).square().sum() for a, b in zip(output, expected, strict=True))
    return (difference / sum(b.square().sum() for b in expected)).sqrt().item()


def _identity(row: Row) -> Record:
    return {
        "name": row.name,
        "op": row.op,
        "model": row.model,
        "shape": row.shape,
        "dtype": str(row.dtype).removeprefix("torch."),
        "bytes": row.bytes,
        "operations": row.operations,
        "note": row.note,
    }


def _header(row: Row, device: torch.device) -> Record:
    record = {
        **_identity(row),
        "measured": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": devices.describe(device),
        "ceilings": {
            "copy_bytes_per_second": devices.copy_rate(device),
            "matrix_operations_per_second": devices.matrix_rate(device, row.dtype),
        },
        "checked_against": row.exact,
    }
    limits = floors(record)
    return record | {"bound": max(limits, key=limits.get), "floor_seconds": max(limits.values())}


def _prepare(contender: Contender, inputs: Any, expected: Outputs) -> tuple[Record, devices.Timed | None]:
    """Return its error and what to time, or why it cannot run; and the configurations of our kernels in it."""
    with warnings.catch_warnings(record=True) as caught, fallbacks.noted() as configs:
        warnings.simplefilter("always")
        try:
            with contender.context():
                run = contender.prepare(inputs)
                entry, timed = {"error": relative_error(run(), expected)}, devices.Timed(run, contender.context)
            entry |= contender.facts(run)
        except Exception as failure:  # whatever a compiler or a driver may throw, the other contenders go on
            devices.require_alive(failure)
            entry, timed = {"unavailable": _reason(failure, caught)}, None
    level = fallbacks.known_level(configs)
    return entry | ({"configs": configs} if configs else {}) | ({"known_level": level} if level else {}), timed


def _at(contender: Contender, level: int) -> Contender:
    """Run a contender with safer configurations of our kernels."""
    if not level:
        return contender

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with fallbacks.at(level), contender.context():
            yield

    return replace(contender, context=context)


def _allowed(contenders: dict[str, Record], row: Row) -> dict[str, float]:
    """The errors that are no mistake: of ours, up to twice that of plain torch; of the others, ten times."""
    errors = [entry["error"] for entry in contenders.values() if "error" in entry]
    # Where plain torch could not run, say for want of memory, whoever came nearest shows what rounding does.
    plain = contenders[row.plain].get("error", min(errors, default=0.0))
    return {
        name: max((2 if name in OURS else 10) * plain, _ROUNDING) + row.contenders[name].allowance
        for name in contenders
    }


def _judge(entry: Record, allowed: float) -> None:
    """Mark a contender that is wrong."""
    if "error" in entry and not entry["error"] <= allowed:
        entry["inaccurate"] = f"error {entry['error']:.1e}, of which {allowed:.1e} is allowed"


def _rescue(
    row: Row,
    entry: Record,
    runs: dict[str, devices.Timed | None],
    inputs: Any,
    expected: Outputs,
    allowed: float,
    past: Past,
) -> None:
    """Try safer configurations of our kernels until one works, and say in the entry what failed first."""
    level, failed = past.level, dict(past.failed)
    while reason := why_untimed(entry):
        following = fallbacks.next_level(entry.get("configs", {}), level)
        if following is None:
            break
        failed[fallbacks.LEVELS[level]] = reason
        level = following
        found, runs["triton"] = _prepare(_at(row.contenders["triton"], level), inputs, expected)
        entry.clear()
        entry |= found
        _judge(entry, allowed)
    if failed:
        entry |= {"level": level, "failed": failed}


def _captured(runs: dict[str, devices.Timed], row: Row, contenders: dict[str, Record]) -> dict[str, devices.Timed]:
    """Capture each contender in a CUDA graph where it can be; who cannot says so."""
    graphs = {}
    for name, run in runs.items():
        if not row.contenders[name].graph:
            contenders[name]["note"] = "launched kernel by kernel, for want of a CUDA graph"
            graphs[name] = run
            continue
        try:
            graphs[name] = devices.captured(run)
        except Exception as failure:  # the others go on
            contenders[name]["unavailable"] = f"in a CUDA graph: {_reason(failure)}"
    return graphs


def _performance(times: list[float], record: Record, row: Row) -> Record:
    """Times and rates of a contender."""
    percentiles = devices.percentiles(times)
    median = percentiles["p50"]
    rates = {
        "percent_of_limit": 100 * record["floor_seconds"] / median,
        "gigabytes_per_second": row.bytes / median / 1e9,
        "teraflops": row.operations / median / 1e12,
    }
    images = {"images_per_second": row.images / median} if row.images else {}
    return {**percentiles, "rounds": len(times), **rates, **images}


def _reason(failure: Exception, warned: Iterable[warnings.WarningMessage] = ()) -> str:
    """The first sentence of an error, and what PyTorch warned of when a kernel does not fit."""
    lines = [line for line in (str(failure) or repr(failure)).splitlines() if line.strip()]
    # For each backend it warns that it is not used; of those that were never asked for, because they are disabled.
    texts = [str(warning.message).partition(" (Triggered")[0] for warning in warned]
    hints = [text for text in texts if not re.search("not used because|disabled", text)]
    return "; ".join([lines[0].partition(". ")[0], *hints[-1:]])[:300]


# Files ----------------------------------------------------------------------------------------------------------------


def path_of(device: torch.device, folder: Path = FOLDER) -> Path:
    """Name the file of a device."""
    return folder / f"{devices.slug(device)}.json"


def load(path: Path) -> Record:
    """Read what is known of a device: ``rows`` by name, and what else ``gpu.py`` found."""
    return json.loads(path.read_text()) if path.exists() else {"rows": {}}


def update(path: Path, records: Iterable[Record] = (), **others: Any) -> None:
    """Add records in place of those of the same rows; a row that is left out now keeps what it had."""
    known = load(path)
    for record in records:
        if "not_measured" not in record or "contenders" not in known["rows"].get(record["name"], {}):
            known["rows"][record["name"]] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(known | others, indent=1) + "\n")


# What records say -----------------------------------------------------------------------------------------------------


def three_digits(value: float) -> str:
    """Write a positive number as one reads it, never with a power of ten.

    >>> three_digits(1234.5), three_digits(12.345), three_digits(0.0012345)
    ('1234', '12.3', '0.00123')
    """
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def floors(record: Record) -> dict[str, float]:
    """The least time of a row in seconds: what copying its bytes takes, and what multiplying its operations takes."""
    ceilings = record["ceilings"]
    return {
        "copy": record["bytes"] / ceilings["copy_bytes_per_second"],
        "matrix": record["operations"] / ceilings["matrix_operations_per_second"],
    }


def timed(record: Record) -> dict[str, Record]:
    """The contenders that were timed."""
    return {name: result for name, result in record.get("contenders", {}).items() if "p50" in result}


def ours(record: Record) -> str | None:
    """The contender that a user of the device gets, where it was timed."""
    return next((name for name in USUAL if name in timed(record)), None)


def why_untimed(result: Record) -> str | None:
    """Why a contender has no times, if it has none."""
    return result.get("unavailable") or result.get("inaccurate")


def best_other(record: Record) -> str | None:
    """The fastest of the contenders that are not ours."""
    medians = {name: result["p50"] for name, result in timed(record).items() if name not in OURS}
    return min(medians, key=medians.get, default=None)


def reasons(records: Iterable[Record]) -> list[str]:
    """Why rows or contenders have no times, a line each."""
    lines = {}  # a set that keeps the order
    for record in records:
        if "not_measured" in record:
            lines[f"{record['name']}: {record['not_measured']}"] = None
        for name, result in record.get("contenders", {}).items():
            if reason := why_untimed(result):
                lines[f"{name}: {reason}"] = None
            for level, failure in result.get("failed", {}).items():
                lines[f"{name}, {level}, in {record['name']}: {failure}"] = None
    return list(lines)
