"""Plots fit for a paper: the roofline of a device, how near each op comes to its limit, sampling over batches.

And what is predicted: time per image over batches, and the check of the predictions.
"""

import textwrap
from collections.abc import Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

import records
from records import Record
from row import UNCALIBRATED
from tarflow.pictures import write_figure

SAMPLING = ("guided sampling", "sampling without guidance")
DPI = 200
_BLUE, _ORANGE, _GRAY = "#0072b2", "#d55e00", "#777777"
_STYLE = {
    "font.size": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
# The contenders of sampling.
_COLORS = {
    "auto": _BLUE,
    UNCALIBRATED: "#f0e442",
    "jacobi": "#009e73",
    "jacobi, window 64": "#cc79a7",
    "sequential": "#56b4e9",
    "eager": _GRAY,
    "published": _ORANGE,
}
_STROKES = dict(zip(SAMPLING, ("-", (0, (4, 2))), strict=True))
_MARKERS = "osD^v<>Ph*Xpd"


@rc_context(_STYLE)
def roofline(rows: list[Record], path: Path) -> None:
    """Plot operations per second over operations per byte: ours, the best other contender, the measured ceilings."""
    rows = _one_per_op(rows)
    figure = Figure(figsize=(6.8, 4.0), layout="constrained")
    axes = figure.subplots()
    _draw_ceilings(axes, rows)
    for row, marker in zip(rows, _MARKERS, strict=False):
        intensity, own, rival = row["operations"] / row["bytes"], records.ours(row), records.best_other(row)
        rate = row["contenders"][own]["teraflops"]
        if rival:
            other = row["contenders"][rival]["teraflops"]
            axes.plot([intensity] * 2, [rate, other], color=_GRAY, linewidth=0.6, zorder=2)
            axes.plot(intensity, other, marker, color="white", markeredgecolor=_ORANGE, markersize=4.5, zorder=3)
        axes.plot(intensity, rate, marker, color=_BLUE, markersize=4.5, zorder=4, label=_label(row))
    axes.plot([], [], "o", color="white", markeredgecolor=_ORANGE, markersize=4.5, label="best other (open)")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
    axes.set_title(_title(rows), fontsize=8)
    figure.legend(frameon=False, loc="outside right center")
    _write(figure, path)


@rc_context(_STYLE)
def limits(rows: list[Record], path: Path) -> None:
    """Draw bars of the percentage of the larger of the two limits."""
    rows = _one_per_op(rows)[::-1]
    figure = Figure(figsize=(6.8, 0.7 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        _draw_bar(axes, place + 0.19, row, records.ours(row), _BLUE)
        if rival := records.best_other(row):
            _draw_bar(axes, place - 0.19, row, rival, _ORANGE)
    figure.legend(axes.patches[:2], ["ours", "best other"], frameon=False, ncols=2, loc="outside lower center")
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.axvline(100, color=_GRAY, linewidth=0.6, linestyle=(0, (4, 3)), zorder=0)
    longest = max(bar.get_width() for bar in axes.patches)
    axes.set(xlim=(0, 1.25 * max(100, longest)), ylim=(-0.5, len(rows) - 0.5))
    axes.set(xlabel="percent of the measured copy or matrix rate, whichever limits")
    axes.set_title(_title(rows), fontsize=8)
    _write(figure, path)


@rc_context(_STYLE)
def sampling(rows: list[Record], path: Path) -> None:
    """Plot images per second over the batch, a panel for each model that was measured with several."""
    models = over_batch(rows)
    columns = min(len(models), 3)
    figure = Figure(figsize=(6.8, 0.7 + 2.9 * -(-len(models) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(models) // columns), columns, squeeze=False).flat
    for axes, (model, measured) in zip(panels, models.items(), strict=False):
        _draw_batches(axes, measured)
        axes.set_title(textwrap.fill(model, 32), fontsize=8)
    for axes in panels[len(models) :]:
        axes.set_visible(False)
    figure.supylabel("images/s", fontsize=8)
    figure.suptitle(_title([row for measured in models.values() for row in measured]), fontsize=8)
    figure.legend(handles=_keys(rows), frameon=False, ncols=4, loc="outside lower center")
    _write(figure, path)


@rc_context(_STYLE)
def prediction(
    models: Mapping[str, Mapping[str, Mapping[int, float]]],
    reported: Mapping[str, tuple[int, float]],
    title: str,
    path: Path,
) -> None:
    """Plot predicted seconds per image over the batch, a panel for each model.

    Args:
        models: for each model the seconds per image by batch, of each decoder and of the ``limit``.
        reported: for some models a batch, and the seconds per image that the published code is said to take on an A100.
    """
    figure = Figure(figsize=(6.8, 3.0), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    colors = _COLORS | {"limit": "black"}
    for axes, (model, curves) in zip(panels, models.items(), strict=True):
        for name, times in curves.items():
            label = "limit of sequential decoding" if name == "limit" else name
            axes.plot(times.keys(), times.values(), color=colors[name], linewidth=1.2, label=label)
        if model in reported:
            axes.plot(
                *reported[model], "D", color=_COLORS["published"], markersize=4, label="published, A100, as reported"
            )
        batches = [1, 4, 16, 64, 256]
        axes.set(xscale="log", yscale="log", xlabel="batch", xticks=batches, xticklabels=map(str, batches))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", color="0.9", linewidth=0.5)
        axes.set_title(textwrap.fill(model, 32), fontsize=8)
    figure.supylabel("seconds per image", fontsize=8)
    figure.suptitle(title, fontsize=8)
    keys = {key.get_label(): key for axes in panels for key in axes.lines}
    figure.legend(keys.values(), keys.keys(), frameon=False, ncols=3, loc="outside lower center")
    _write(figure, path)


@rc_context(_STYLE)
def agreement(points: list[Record], title: str, path: Path) -> None:
    """Plot measured over predicted times: a colour for each decoder, a marker for the size that is varied."""
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.subplots()
    decoders, varied = (list(dict.fromkeys(point[key] for point in points)) for key in ("decoder", "varied"))
    colors = dict(zip(decoders, (_BLUE, _ORANGE, _GRAY), strict=False))
    markers = dict(zip(varied, _MARKERS, strict=False))
    for point in points:
        marker, color = markers[point["varied"]], colors[point["decoder"]]
        axes.plot(1e3 * point["predicted"], 1e3 * point["measured"], marker, color=color, markersize=3.5)
    ends = [1e3 * pick(point["predicted"] for point in points) for pick in (min, max)]
    axes.plot(ends, ends, color="black", linewidth=0.8, zorder=0)
    keys = [Line2D([], [], color=color, linewidth=3, label=decoder) for decoder, color in colors.items()]
    keys += [
        Line2D([], [], color="black", linestyle="", marker=marker, markersize=3.5, label=f"{name} varied")
        for name, marker in markers.items()
    ]
    keys.append(Line2D([], [], color="black", linewidth=0.8, label="as predicted"))
    axes.set(xscale="log", yscale="log", xlabel="predicted, ms", ylabel="measured, ms")
    axes.set_title(title, fontsize=8)
    figure.legend(handles=keys, frameon=False, loc="outside right center")
    _write(figure, path)


def over_batch(rows: list[Record]) -> dict[str, list[Record]]:
    """The rows of the models that were measured with more than one batch, by ascending batch."""
    models: dict[str, list[Record]] = {}
    for row in sorted(rows, key=lambda row: row["shape"]["B"]):
        models.setdefault(row["model"], []).append(row)
    return {name: measured for name, measured in models.items() if len({row["shape"]["B"] for row in measured}) > 1}


def _draw_ceilings(axes: Axes, rows: list[Record]) -> None:
    """The latest copy rate as a slope up to the fastest matrix rate, in terabytes and TFLOP/s."""
    copy = max(rows, key=lambda row: row["measured"])["ceilings"]["copy_bytes_per_second"] / 1e12
    matrix = max(row["ceilings"]["matrix_operations_per_second"] for row in rows) / 1e12
    intensities = [row["operations"] / row["bytes"] for row in rows]
    ridge, left, right = matrix / copy, min(intensities) / 3, max(*intensities, matrix / copy) * 3
    axes.plot([left, ridge, right], [copy * left, matrix, matrix], color="black", linewidth=1)
    axes.text(right, matrix * 1.08, f"matrices {matrix:.3g} TFLOP/s", ha="right", va="bottom", fontsize=7.5)
    slope = {"xy": (ridge / 6, matrix / 6), "xytext": (-6, 4), "textcoords": "offset points"}
    axes.annotate(f"copy {1e3 * copy:.4g} GB/s", **slope, ha="right", fontsize=7.5)


def _draw_bar(axes: Axes, height: float, row: Record, contender: str, color: str) -> None:
    percent = row["contenders"][contender]["percent_of_limit"]
    axes.barh(height, percent, 0.34, color=color)
    axes.annotate(
        f"{percent:.0f} %  {contender}",
        (percent, height),
        xytext=(3, -0.5),
        textcoords="offset points",
        va="center",
        fontsize=6.5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )


def _draw_batches(axes: Axes, rows: list[Record]) -> None:
    """Draw a line for each contender and for the floor; guided solid, not guided dashed."""
    batches = sorted({row["shape"]["B"] for row in rows})
    for op, style in _STROKES.items():
        of_op = [row for row in rows if row["op"] == op]
        for name, color in _COLORS.items():
            rates = _rates(of_op, name)
            axes.plot(rates.keys(), rates.values(), "o", linestyle=style, color=color, linewidth=1, markersize=3)
        floor = {row["shape"]["B"]: row["shape"]["B"] / records.floors(row)["copy"] for row in of_op}
        axes.plot(floor.keys(), floor.values(), linestyle=style, color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="batch", xlim=(batches[0] / 1.4, batches[-1] * 1.4))
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="0.9", linewidth=0.5)


def _rates(rows: list[Record], name: str) -> dict[int, float]:
    """Images per second of a contender by batch."""
    timed = [row for row in rows if name in records.timed(row)]
    return {row["shape"]["B"]: row["contenders"][name]["images_per_second"] for row in timed}


def _keys(rows: list[Record]) -> list[Line2D]:
    """The legend of the colours and strokes that occur."""
    names = [name for name in _COLORS if any(name in records.timed(row) for row in rows)]
    contenders = [Line2D([], [], color=_COLORS[name], marker="o", markersize=3, label=name) for name in names]
    strokes = [
        Line2D([], [], color=_GRAY, linewidth=1, linestyle=style, label=label)
        for (op, style), label in zip(_STROKES.items(), ("guided", "not guided"), strict=True)
        if any(row["op"] == op for row in rows)
    ]
    return [*contenders, Line2D([], [], color="black", linewidth=1, label="floor of sequential decoding"), *strokes]


def _one_per_op(rows: list[Record]) -> list[Record]:
    """The first row of each op, as the table of rows orders them; decoding once for each number of new tokens."""
    return list({_label(row): row for row in reversed(rows)}.values())[::-1]


def _label(row: Record) -> str:
    """Name an op as one reads it: ``decode attention, 16 new``."""
    op = row["op"].replace("_", " ").replace("affine forward backward", "affine backward")
    return f"{op}, {row['shape']['G']} new" if "G" in row["shape"] else op


def _title(rows: list[Record]) -> str:
    machines = [row["machine"] for row in sorted(rows, key=lambda row: row["measured"])]
    commits, dtypes = dict.fromkeys(machine["commit"] for machine in machines), sorted({row["dtype"] for row in rows})
    latest = machines[-1]
    return f"{latest['device']}, {', '.join(dtypes)}, torch {latest['torch']}, commit {', '.join(commits)}"


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(figure, path, vector=True, dpi=DPI)
