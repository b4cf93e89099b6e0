"""Tables and plots of what was measured, from ``benchmarks/results/*.json``.

    python benchmarks/report.py

Prints the tables as markdown, puts each between ``<!-- benchmarks:NAME -->`` and ``<!-- /benchmarks:NAME -->`` where a
file has such a pair, and draws ``docs/roofline-<device>.png``, ``docs/limits-<device>.png`` and
``docs/sampling-<device>.png``.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import plots
import records
from profiles import summary
from records import Record, three_digits
from targets import TARGETS, Target

ROOT = Path(__file__).resolve().parents[1]
MISSING = "not measured"
Results = dict[str, Record]


def main() -> None:
    """Read, print, splice, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=records.FOLDER)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the plots")
    pages = [ROOT / "README.md", ROOT / "kernels" / "README.md"]
    parser.add_argument("--pages", type=Path, nargs="*", default=pages, help="files that have markers")
    arguments = parser.parse_args()
    results = {path.stem: records.load(path) for path in sorted(arguments.results.glob("*.json"))}
    if not results:
        parser.error(f"--results: no *.json in {arguments.results}")
    tables = {name: table(results) for name, table in TABLES.items()}
    for name, text in tables.items():
        print(f"<!-- benchmarks:{name} -->\n{text}\n<!-- /benchmarks:{name} -->\n")
    for page in arguments.pages:
        page.write_text(splice(page.read_text(), tables))
    for device, result in results.items():
        measured = [row for row in measured_rows(result) if not _is_other_flow(row)]
        bounded, sampled = ([row for row in measured if _is_sampling(row) == kind] for kind in (False, True))
        if bounded:
            plots.roofline(bounded, arguments.docs / f"roofline-{device}.png")
            plots.limits(bounded, arguments.docs / f"limits-{device}.png")
        if plots.over_batch(sampled):
            plots.sampling(sampled, arguments.docs / f"sampling-{device}.png")


def splice(page: str, tables: dict[str, str]) -> str:
    """Put the tables between their markers.

    >>> print(splice("a <!-- benchmarks:x --> b <!-- /benchmarks:x --> c", {"x": "new", "y": "unused"}))
    a <!-- benchmarks:x -->
    new
    <!-- /benchmarks:x --> c
    """
    for name, table in tables.items():
        begin, end = f"<!-- benchmarks:{name} -->", f"<!-- /benchmarks:{name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        page = pattern.sub(lambda _, text=f"{begin}\n{table}\n{end}": text, page)
    return page


def measured_rows(result: Record) -> list[Record]:
    """The rows of a device in which something was timed."""
    return [row for row in result["rows"].values() if records.ours(row)]


# Tables ---------------------------------------------------------------------------------------------------------------


def ops(results: Results) -> str:
    """Each op: ours, how near it comes to the limit of the device, and the best other contender."""
    head = ("op", "shape", "ours", "20 % to 80 %", "rate", "of the limit", "best other", "ratio")
    return _by_device(results, head, _op_cells, lambda row: not _is_model(row))


def training(results: Results) -> str:
    """Steps of training: every contender that ran, and why the others did not."""
    head = ("", "contender", "median", "20 % to 80 %", "images/s", "of the limit", "ratio to best other")
    return _by_device(results, head, _training_cells, lambda row: row["op"] == "training step", _reasons)


def sampling(results: Results) -> str:
    """Every decoder: how long a batch takes, in how many passes; how many times as long others take."""
    head = ("", "contender", "median latency", "images/s", "passes / steps", "ratio to sequential", "to published")
    return _by_device(results, head, _sampling_cells, _is_sampling, _reasons)


def contenders(results: Results) -> str:
    """The medians of all contenders, and why some have none."""
    parts = []
    for result in results.values():
        rows = [row for row in result["rows"].values() if not _is_model(row)]
        names = list(dict.fromkeys(name for row in rows for name in row.get("contenders", ())))
        cells = [[f"{row['op']}, {_shape(row)}", *(_median(row, name) for name in names)] for row in rows]
        reasons = _reasons(rows)
        parts.append(
            f"{_where(rows or [*result['rows'].values()])}\n\n{_table(('median in ms', *names), cells)}{reasons}"
        )
    return "\n\n".join(parts)


def other_flows(results: Results) -> str:
    """The medians of other libraries' flows, as these run them and accelerated, and the ratios of the times."""
    ratios = ("ratio to library", "to best other", "of the limit")
    parts = []
    for result in results.values():
        rows = [row for row in result["rows"].values() if _is_other_flow(row)]
        names = [name.replace(_library(row), "library") for row in rows for name in row.get("contenders", ())]
        ways = list(dict.fromkeys(names))
        notes = "".join(f"; {note}" for note in dict.fromkeys(row["note"] for row in rows))
        head = (f"median in ms{notes}", "batch", *ways, *ratios)
        table = _table(head, [_other_flow_cells(row, ways) for row in rows])
        parts.append(f"{_where(rows or [*result['rows'].values()])}\n\n{table}{_reasons(rows)}")
    return "\n\n".join(parts)


def profiles(results: Results) -> str:
    """The most expensive kernels of a training step and of a decoding step."""
    parts = []
    for result in results.values():
        for name, profile in result.get("profiles", {}).items():
            if "unavailable" in profile:
                parts.append(f"{name}: {MISSING} ({profile['unavailable']})")
                continue
            cells = [
                (f"{kernel['share']:.1%}", _milliseconds(kernel["seconds"]), f"{kernel['calls']:.0f}", kernel["name"])
                for kernel in profile["kernels"]
            ]
            title = f"A {name} on {result['profiles_machine']['device']}, {summary(profile)}:"
            parts.append(f"{title}\n\n{_table(('share', 'time', 'calls', 'kernel'), cells)}")
    return "\n\n".join(parts) or MISSING


def targets(results: Results) -> str:
    """What is meant to be reached, on an H100 in bfloat16 or on a CPU, and what each device reaches."""
    devices = {_machine(result["rows"].values())["device"]: result for result in results.values()}
    if not any(map(_is_gpu, devices.values())):
        devices["H100"] = None
    cells = [
        [target.name, target.required, *(_verdict(target, devices[name]) for name in devices)] for target in TARGETS
    ]
    return _table(("target (GPU: bfloat16)", "required", *devices), cells)


TABLES: dict[str, Callable[[Results], str]] = {
    "targets": targets,
    "ops": ops,
    "training": training,
    "sampling": sampling,
    "contenders": contenders,
    "other-flows": other_flows,
    "profiles": profiles,
}


# Cells ----------------------------------------------------------------------------------------------------------------


def _by_device(
    results: Results,
    head: tuple[str, ...],
    cells: Callable[[Record], list],
    keep: Callable[[Record], bool],
    below: Callable[[list[Record]], str] = lambda rows: "",
) -> str:
    parts = []
    for result in results.values():
        rows = [row for row in result["rows"].values() if keep(row)]
        lines = [line for row in rows for line in cells(row)]
        parts.append(f"{_where(rows or [*result['rows'].values()])}\n\n{_table(head, lines)}{below(rows)}")
    return "\n\n".join(parts)


def _op_cells(row: Record) -> list[list[str]]:
    own = records.ours(row)
    if own is None:
        return [[row["op"], _shape(row), *[MISSING] * 6]]
    result, rival = row["contenders"][own], records.best_other(row, own)
    return [
        [
            row["op"],
            _shape(row),
            f"{_milliseconds(result['p50'])} ({own})",
            _spread(result),
            _rate(row, result),
            f"{result['percent_of_limit']:.0f} % ({row['bound']})",
            f"{_milliseconds(row['contenders'][rival]['p50'])} ({rival})" if rival else MISSING,
            f"{result['ratio_to_best_other']:.2f}" if rival else MISSING,
        ]
    ]


def _training_cells(row: Record) -> list[list[str]]:
    what = f"{row['op']}, {_shape(row)}{'; ' + row['note'] if row['note'] else ''}"
    if "contenders" not in row:
        return [[what, "", *[MISSING] * 5]]
    lines = []
    for name, result in row["contenders"].items():
        if "p50" not in result:
            continue
        ratio = result.get("ratio_to_best_other")
        cells = [
            _milliseconds(result["p50"]),
            _spread(result),
            three_digits(result["images_per_second"]),
            f"{result['percent_of_limit']:.0f} % ({row['bound']})",
            f"{ratio:.2f}" if ratio else MISSING,
        ]
        lines.append([what, name, *cells])
        what = ""
    return lines


def _sampling_cells(row: Record) -> list[list[str]]:
    what = f"{row['op']}, {_shape(row)}{'; ' + row['note'] if row['note'] else ''}"
    if "contenders" not in row:
        return [[what, "", *[MISSING] * 5]]
    medians = {name: result["p50"] for name, result in row["contenders"].items() if "p50" in result}
    lines = []
    for name, median in medians.items():
        result = row["contenders"][name]
        bases = [medians.get(base) for base in ("sequential", "published")]
        ratios = [f"{base / median:.2f}" if base else MISSING for base in bases]
        cells = [_milliseconds(median), three_digits(result["images_per_second"]), _passes(result), *ratios]
        lines.append([what, name, *cells])
        what = ""
    return lines


def _other_flow_cells(row: Record, ways: Iterable[str]) -> list[str]:
    """The medians of the ways; how many times as long the library and the best other take; what part of the limit."""
    library, own = _library(row), records.ours(row)
    cells = [
        f"{row['op']}, {row['model']}",
        f"{row['shape']['B']}",
        *(_median(row, way.replace("library", library)) for way in ways),
    ]
    if own is None:
        return [*cells, *[MISSING] * 3]
    result = row["contenders"][own]
    taken, rival = row["contenders"][library].get("p50"), result.get("ratio_to_best_other")
    return [
        *cells,
        f"{taken / result['p50']:.2f}" if taken else MISSING,
        f"{rival:.2f}" if rival else MISSING,
        f"{result['percent_of_limit']:.0f} % ({row['bound']})",
    ]


def _library(row: Record) -> str:
    return row["model"].partition(" ")[0]


def _passes(result: Record) -> str:
    """Of all blocks; a dash for what does not count them."""
    return f"{result['passes']} / {result['steps']}" if "passes" in result else "–"


def _verdict(target: Target, result: Record | None) -> str:
    """A dash where the target is one of other devices."""
    if result is None:
        return MISSING if "GPU" in target.devices else "–"
    if ("GPU" if _is_gpu(result) else "CPU") not in target.devices:
        return "–"
    return target.verdict(result["rows"].values()) or MISSING


def _reasons(rows: list[Record]) -> str:
    """Why contenders have no times, a line each."""
    found = {
        f"{name}: {reason}": None
        for row in rows
        for name, result in row.get("contenders", {}).items()
        if (reason := result.get("unavailable") or result.get("inaccurate"))
    } | {f"{row['name']}: {row['not_measured']}": None for row in rows if "not_measured" in row}
    return "\n\nNot measured:\n" + "".join(f"\n- {line}" for line in found) if found else ""


def _median(row: Record, name: str) -> str:
    """In milliseconds; a dash where the op has no such contender."""
    if "contenders" not in row:
        return MISSING
    if name not in row["contenders"]:
        return "–"
    taken = row["contenders"][name].get("p50")
    return three_digits(1e3 * taken) if taken else MISSING


def _milliseconds(seconds: float) -> str:
    return f"{three_digits(1e3 * seconds)} ms"


def _spread(result: Record) -> str:
    return f"{_milliseconds(result['p20'])[:-3]} to {_milliseconds(result['p80'])}"


def _rate(row: Record, result: Record) -> str:
    if row["bound"] == "copy":
        return f"{three_digits(result['gigabytes_per_second'])} GB/s"
    return f"{three_digits(result['teraflops'])} TFLOP/s"


def _shape(row: Record) -> str:
    sizes = " ".join(f"{key}={value}" for key, value in row["shape"].items())
    return f"{row['model']}, {sizes}, {row['dtype']}"


def _is_model(row: Record) -> bool:
    return row["op"] == "training step" or _is_sampling(row) or _is_other_flow(row)


def _is_sampling(row: Record) -> bool:
    return row["op"] in ("guided sampling", "sampling without guidance")


def _is_other_flow(row: Record) -> bool:
    return row["op"] in ("inverse", "density")


def _is_gpu(result: Record) -> bool:
    return _on_gpu(_machine(result["rows"].values()))


def _on_gpu(machine: Record) -> bool:
    return "threads" not in machine["driver"]


def _machine(rows: Iterable[Record]) -> Record:
    """Where rows were measured, the latest of them."""
    return max(rows, key=lambda row: row.get("measured", ""))["machine"]


def _where(rows: list[Record]) -> str:
    """The device, its software and its ceilings, and all commits that the rows are of."""
    rows = sorted(rows, key=lambda row: row.get("measured", ""))
    machine = _machine(rows)
    commits = list(dict.fromkeys(row["machine"]["commit"] for row in rows))
    text = (
        f"{machine['device']}, {'driver ' * _on_gpu(machine)}{machine['driver']}, torch {machine['torch']}, "
        f"triton {machine['triton']}, commit {', '.join(commits)}"
    )
    measured = [row for row in rows if "ceilings" in row]
    if not measured:
        return text
    copy = measured[-1]["ceilings"]["copy_bytes_per_second"] / 1e9
    matrices = {row["dtype"]: row["ceilings"]["matrix_operations_per_second"] / 1e12 for row in measured}
    rates = ", ".join(f"{dtype} {rate:.3g} TFLOP/s" for dtype, rate in matrices.items())
    return f"{text}. Measured limits: copy {copy:.4g} GB/s; matrices {rates}."


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    main()
