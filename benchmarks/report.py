"""Draw what was measured, from ``benchmarks/results/*.json``: a page of tables and a few plots.

    python benchmarks/report.py

Writes ``docs/benchmarks.md``, ``docs/roofline-<device>.png``, ``docs/limits-<device>.png`` and
``docs/sampling-<device>.png``, and between the markers of ``docs/kernels/*.md`` what compilers make of an op and what
was measured of it, of ``docs/decoding.md`` how Jacobi decoders compare, and of ``docs/family.md`` how long iTarFlow's
code takes beside ours.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import cost
import gs_jacobi
import itarflow
import plots
import records
import starflow
from fallbacks import LEVELS
from profiles import summary
from records import Record, three_digits
from tarflow.files import atomic_write
from targets import TARGETS

ROOT = Path(__file__).resolve().parents[1]
KERNELS = Path(__file__).parent / "predictions" / "h100.json"
RESOURCES = ROOT / "tests" / "tarflow_kernels" / "resources.json"
INTRODUCTION = """# Benchmarks

`python benchmarks/report.py` writes this page from `benchmarks/results/*.json`. The contenders of a row took turns; the
limit is the measured copy or matrix rate of the device, whichever limits the row; the ratio is a contender's median
over that of ours, in bold: what a user of the device gets."""
HEAD = ("", "contender", "median", "20 % to 80 %", "rate", "of the limit", "ratio to ours")
OTHER_FLOWS = ("inverse", "density")
# The pages of docs/kernels: how the names of their kernels and rows begin.
OP_PAGES = {
    "causal_attention": ("causal_attention",),
    "decode_attention": ("decode_attention", "merge_splits"),
    "affine": ("affine",),
    "mixture_logistic": ("mixture",),
    "residual_norm": ("residual_norm",),
    "embed_next": ("embed_next",),
    "incremental_inverse": ("inverse",),
}
JACOBI_HEAD = (
    "decoder",
    "passes by block",
    "tokens",
    "median",
    "latents, largest",
    "latents, rms",
    "pixels, largest",
    "pixels, rms",
)
FAMILY_HEAD = ("", "published", "sequential", "auto", "ratios")
# The sections of a device, and which ops each holds; the rest are the ops of the kernels.
SECTIONS = {
    "Sampling": (*plots.SAMPLING, itarflow.DENOISED),
    "Jacobi decoders": tuple(gs_jacobi.OPS),
    "Training": ("training step",),
    "Flows of other libraries": OTHER_FLOWS,
}


def main() -> None:
    """Read, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=records.FOLDER)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page and the plots")
    arguments = parser.parse_args()
    results = {path.stem: records.load(path) for path in sorted(arguments.results.glob("*.json"))}
    if not results:
        parser.error(f"--results: no *.json in {arguments.results}")
    arguments.docs.mkdir(parents=True, exist_ok=True)
    with atomic_write(arguments.docs / "benchmarks.md") as beside:
        beside.write_text(page(results))
    for file in sorted(arguments.docs.glob("kernels/*.md")):
        text = op_page(file.read_text(), OP_PAGES.get(file.stem, ()), results)
        with atomic_write(file) as beside:
            beside.write_text(text)
    for name, write in PAGES.items():
        if (file := arguments.docs / name).exists():
            text = write(file.read_text(), results)
            with atomic_write(file) as beside:
                beside.write_text(text)
    for device, result in results.items():
        unplotted = (*OTHER_FLOWS, *gs_jacobi.OPS, itarflow.DENOISED)
        measured = [row for row in result["rows"].values() if records.ours(row) and row["op"] not in unplotted]
        bounded, sampled = (
            [row for row in measured if (row["op"] in plots.SAMPLING) == kind] for kind in (False, True)
        )
        if bounded:
            plots.roofline(bounded, arguments.docs / f"roofline-{device}.png")
            plots.limits(bounded, arguments.docs / f"limits-{device}.png")
        if plots.over_batch(sampled):
            plots.sampling(sampled, arguments.docs / f"sampling-{device}.png")


def page(results: dict[str, Record]) -> str:
    """Write the page: a chapter for each device, and the targets of a GPU where none was measured."""
    parts = [INTRODUCTION, *(part for result in results.values() for part in _chapter(result))]
    if not any(_is_gpu(_machine(result["rows"].values())) for result in results.values()):
        parts += ["## Targets of an H100 in bfloat16", _targets("GPU", [])]
    return "\n\n".join(parts) + "\n"


def op_page(text: str, names: tuple[str, ...], results: dict[str, Record]) -> str:
    """Write the tables of kernels and rows whose names begin so between the markers of a page."""
    measured = [
        part
        for result in results.values()
        if (rows := [row for row in result["rows"].values() if row["op"].startswith(names)])
        for part in (_where(rows), table(HEAD, (line for row in rows for line in _lines(row))))
    ]
    return _between_markers(_between_markers(text, "resources", [_resources(names)]), "measured", measured)


def decoding_page(text: str, results: dict[str, Record]) -> str:
    """Write how Jacobi decoders compare, a table for each row that was measured, between the markers of the page."""
    parts = []
    for result in results.values():
        rows = [row for row in result["rows"].values() if row["op"] in gs_jacobi.OPS and records.timed(row)]
        parts += [_where(rows)] if rows else []
        for row in rows:
            parts += [f"{row['op']}, batch {row['shape']['B']}:", table(JACOBI_HEAD, _jacobi_lines(row))]
    return _between_markers(text, "jacobi decoders", parts)


def family_page(text: str, results: dict[str, Record]) -> str:
    """Write how long the code of iTarFlow and of STARFlow takes beside ours, between the markers of the page."""
    for name, subject in (("itarflow", itarflow.TRAINED), ("starflow", starflow.SUBJECT)):
        parts = []
        for result in results.values():
            rows = [row for row in result["rows"].values() if row["model"] == subject.name]
            if lines := [_beside_published(row) for row in rows if "published" in records.timed(row)]:
                parts += [_where(rows), table(FAMILY_HEAD, lines)]
        text = _between_markers(text, name, parts)
    return text


PAGES = {"decoding.md": decoding_page, "family.md": family_page}


def _beside_published(row: Record) -> list[str]:
    """The medians of a row, and how many times as long the published code takes."""
    timed = records.timed(row)
    times = {name: timed[name]["p50"] for name in ("published", "sequential", "auto") if name in timed}
    ratios = [f"{times['published'] / times[name]:.1f}" for name in ("sequential", "auto") if name in times]
    cells = [_milliseconds(times[name]) if name in times else "–" for name in ("published", "sequential", "auto")]
    return [f"{row['op']}, batch {row['shape']['B']}", *cells, ", ".join(ratios)]


def _jacobi_lines(row: Record) -> Iterator[list[str]]:
    """A line for each decoder: what it took, and how far it is off."""
    for name, result in records.timed(row).items():
        by_block = " + ".join(entry.partition("/")[0] for entry in result["by_block"])
        distances = (f"{result[of][how]:.1e}" for of in ("latents", "pixels") for how in ("max", "rms"))
        yield [
            name,
            f"{by_block} = {result['passes']}",
            f"{result['tokens']:.0f}",
            _milliseconds(result["p50"]),
            *distances,
        ]


def _between_markers(text: str, marker: str, parts: Sequence[str]) -> str:
    """Replace what is between the markers of a page."""
    written = "\n\n".join(parts or ["Nothing has been measured yet."])
    pattern = rf"(<!-- {marker} -->\n).*(<!-- /{marker} -->)"
    return re.sub(pattern, lambda match: f"{match[1]}\n{written}\n\n{match[2]}", text, flags=re.DOTALL)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Write a table in markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def _chapter(result: Record) -> Iterator[str]:
    rows = list(result["rows"].values())
    yield f"## {_machine(rows)['device']}"
    yield "### Targets"
    yield _targets("GPU" if _is_gpu(_machine(rows)) else "CPU", rows)
    known = [op for ops in SECTIONS.values() for op in ops]
    sections = {"Ops": {row["op"] for row in rows}.difference(known)} | SECTIONS
    for title, ops in sections.items():
        if chosen := [row for row in rows if row["op"] in ops]:
            yield f"### {title}"
            yield _where(chosen)
            yield table(HEAD, (line for row in chosen for line in _lines(row)))
            if reasons := records.reasons(chosen):
                yield "Not measured:"
                yield "\n".join(f"- {reason}" for reason in reasons)
    yield from _predicted(rows)
    if "profiles" in result:
        yield "### Profiles"
    for name, profile in result.get("profiles", {}).items():
        yield from _profile(name, profile)


def _targets(kind: str, rows: list[Record]) -> str:
    lines = [(target.name, target.required, target.verdict(rows)) for target in TARGETS[kind]]
    return table(("target", "required", "measured"), lines)


def _lines(row: Record) -> Iterator[list[str]]:
    """A line for each contender that was timed."""
    sizes = " ".join(f"{key}={value}" for key, value in row["shape"].items())
    what = f"{row['op']}, {row['model']}, {sizes}, {row['dtype']}{'; ' + row['note'] if row['note'] else ''}"
    timed, own = records.timed(row), records.ours(row)
    for name, result in timed.items():
        yield [
            what,
            (f"**{name}**" if name == own else name) + _passes(result) + _configuration(result),
            _milliseconds(result["p50"]) + (_tuned(row) if name == own else ""),
            f"{_milliseconds(result['p20'])[:-3]} to {_milliseconds(result['p80'])}",
            _rate(row, result),
            f"{result['percent_of_limit']:.0f} % ({row['bound']})",
            f"{result['p50'] / timed[own]['p50']:.2f}" if own else "–",
        ]
        what = ""


def _resources(names: tuple[str, ...]) -> str:
    """A line for each kernel and shape."""
    compiler, compiled = json.loads(RESOURCES.read_text()).values()
    known = dict.fromkeys(case for target in compiled.values() for case in target if case.startswith(names))
    lines = (
        [*case.split(" ", 1), *(_taken(target[case]) if case in target else "–" for target in compiled.values())]
        for case in known
    )
    what = "registers of a thread, shared memory, the instruction for products, what is spilled"
    return f"By Triton {compiler}: {what}.\n\n{table(('kernel', 'parameters, shape', *compiled), lines)}"


def _taken(resources: Sequence[int | str]) -> str:
    registers, spilled, shared, instruction = resources
    memory = f"{shared / 1024:.3g} KB" if shared >= 1024 else f"{shared} B"
    said = [f"{registers}, {memory}", instruction.replace("-", ""), f"{spilled} B spilled" if spilled else ""]
    return "<br>".join(filter(None, said))


def _predicted(rows: list[Record]) -> Iterator[str]:
    """Compare kernels and decoders with what was predicted of them, on a device and for models that are known."""
    kernels = json.loads(KERNELS.read_text())["predictions"]
    lines = []
    for row in rows:
        if (kernel := kernels.get(_without_model(row))) and "H100" in row["machine"]["device"] and records.ours(row):
            times = kernel["microseconds"] / 1e6, row["contenders"][records.ours(row)]["p50"]
            lines.append(
                (_without_model(row), records.ours(row), *map(_milliseconds, times), f"{times[1] / times[0]:.2f}")
            )
        for name, predicted in cost.predict_record(row).items():
            what, measured = f"{row['op']}, {row['model']}, B={row['shape']['B']}", row["contenders"][name]["p50"]
            times = _milliseconds(predicted), _milliseconds(measured)
            lines.append((what, name, *times, f"{measured / predicted:.2f}"))
    if lines:
        yield "### Predicted and measured"
        yield "[What is predicted](predictions.md): kernels by their machine code, decoders for the passes they took."
        yield table(("", "contender", "predicted", "measured", "measured over predicted"), lines)


def _without_model(row: Record) -> str:
    """Name a row as the predictions of kernels do: by op, shape and dtype."""
    sizes = " ".join(f"{key}={value}" for key, value in row["shape"].items())
    return f"{row['op']}, {sizes}, {row['dtype']}"


def _profile(name: str, profile: Record) -> Iterator[str]:
    """The most expensive kernels of a step."""
    if "unavailable" in profile:
        yield f"{name}: not profiled ({profile['unavailable']})"
        return
    yield f"A {name}, {summary(profile)}:"
    lines = (
        (f"{kernel['share']:.1%}", _milliseconds(kernel["seconds"]), f"{kernel['calls']:.0f}", kernel["name"])
        for kernel in profile["kernels"]
    )
    yield table(("share", "time", "calls", "kernel"), lines)


def _passes(result: Record) -> str:
    """How many passes a decoder took, if it counted them."""
    return f", {result['passes']} passes for {result['steps']} steps" if "passes" in result else ""


def _configuration(result: Record) -> str:
    """Say which configuration of our kernels it is, if it is not the one that was chosen."""
    level = max(result.get("level", 0), result.get("known_level", 0))
    return f", {LEVELS[level]}" if level else ""


def _tuned(row: Record) -> str:
    """Say what it was before its kernels were tuned, if it was measured then."""
    return f" (before tuning {_milliseconds(row['before']['p50'])})" if "before" in row else ""


def _milliseconds(seconds: float) -> str:
    return f"{three_digits(1e3 * seconds)} ms"


def _rate(row: Record, result: Record) -> str:
    if "images_per_second" in result:
        return f"{three_digits(result['images_per_second'])} images/s"
    if row["bound"] == "copy":
        return f"{three_digits(result['gigabytes_per_second'])} GB/s"
    return f"{three_digits(result['teraflops'])} TFLOP/s"


def _is_gpu(machine: Record) -> bool:
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
        f"{machine['device']}, {'driver ' * _is_gpu(machine)}{machine['driver']}, torch {machine['torch']}, "
        f"triton {machine['triton']}, commit {', '.join(commits)}"
    )
    measured = [row for row in rows if "ceilings" in row]
    if not measured:
        return text
    copy = measured[-1]["ceilings"]["copy_bytes_per_second"] / 1e9
    matrices = {row["dtype"]: row["ceilings"]["matrix_operations_per_second"] / 1e12 for row in measured}
    rates = ", ".join(f"{dtype} {rate:.3g} TFLOP/s" for dtype, rate in matrices.items())
    return f"{text}. Measured limits: copy {copy:.4g} GB/s; matrices {rates}."


if __name__ == "__main__":
    main()
