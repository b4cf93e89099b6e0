"""Pictures of a run, fit for a paper: grids of samples, trajectories from latent to image, training curves."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from .files import atomic_write
from .noise import Quantization, to_pixels

DPI = 200
_BLUE, _ORANGE, _GREEN, _GRAY = "#0072b2", "#d55e00", "#009e73", "#555555"
_STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 9,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.2,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
}


def sample_grid(
    images: Tensor,
    path: str | Path,
    title: str,
    row_labels: Sequence[str] | None = None,
    quantization: Quantization = "round",
) -> None:
    """Draws images, float (rows, columns, C, H, W) in [-1, 1], clipped to it; a label stands left of its row.

    Where images are not finite, the title says how many. ValueError where the images are of another kind or the labels
    are not one a row.
    """
    _check_cells("images", "(rows, columns, C, H, W)", images)
    if row_labels is not None and len(row_labels) != len(images):
        raise ValueError(f"row_labels: expected {len(images)}, one a row, got {len(row_labels)}")
    images = _to_numpy(images)
    title = _counted(title, np.isfinite(images).all(axis=(2, 3, 4)))
    _write_grid(images, path, title, quantization, inches=0.56, left=row_labels or ())


def trajectory(
    frames: Tensor,
    path: str | Path,
    title: str,
    column_labels: Sequence[str],
    quantization: Quantization = "round",
) -> None:
    """Draws frames, float (steps, B, C, H, W): a row a sample, a column a step, its label above it.

    A latent reaches beyond [-1, 1], so each column shows, and names below it, the range [-m, m] that holds 99.5% of
    its finite values, m at least 1. Where samples are not finite, the title says how many. ValueError where the frames
    are of another kind or the labels are not one a step.
    """
    _check_cells("frames", "(steps, B, C, H, W)", frames)
    if len(column_labels) != len(frames):
        raise ValueError(f"column_labels: expected {len(frames)}, one a step, got {len(column_labels)}")
    frames = _to_numpy(frames)
    title = _counted(title, np.isfinite(frames).all(axis=(0, 2, 3, 4)))
    bounds = [_reach(frame) for frame in frames]
    scaled = np.stack([frame / bound for frame, bound in zip(frames, bounds, strict=True)], axis=1)
    above = [textwrap.fill(label, 10) for label in column_labels]
    below = [f"[−{m:.3g}, {m:.3g}]" for m in bounds]
    _write_grid(scaled, path, title, quantization, inches=0.7, above=above, below=below)


def _reach(frame: np.ndarray) -> float:
    """The m, at least 1, such that [-m, m] holds 99.5% of the finite values."""
    finite = np.abs(frame[np.isfinite(frame)])
    return max(1.0, float(np.quantile(finite, 0.995))) if finite.size else 1.0


def curves(metrics_path: str | Path, path: str | Path, title: str) -> None:
    """Draws the training rows and evaluations of a metrics.jsonl: one JSON object a line, any key but `step` optional.

    An unfinished last line, left by a killed run, is passed over; of two rows for a step the later counts.
    FileNotFoundError where there is no such file, ValueError where it holds no row or a line that is not one.
    """
    rows = _read_rows(Path(metrics_path))
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.6, 2.4), layout="constrained")
        left, right = figure.subplots(1, 2, sharex=True)
        figure.suptitle(title, parse_math=False)
        _draw_likelihood(left, rows)
        _draw_optimization(right, rows)
        for axes in (left, right):
            axes.set_xlabel("training step")
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10), integer=True, min_n_ticks=1))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.grid(color="0.92", linewidth=0.5)
        _write(figure, path)


def _check_cells(name: str, shape: str, cells: Tensor) -> None:
    if cells.ndim != 5 or cells.shape[2] not in (1, 3) or 0 in cells.shape or not cells.is_floating_point():
        raise ValueError(f"{name}: expected float {shape}, C 1 or 3, got {cells.dtype} {tuple(cells.shape)}")


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _counted(title: str, finite: np.ndarray) -> str:
    return title if finite.all() else f"{title} ({(~finite).sum()} of {finite.size} not finite)"


def _write_grid(cells, path, title, quantization, *, inches, left=(), above=(), below=()) -> None:
    """cells: (rows, columns, C, H, W), each drawn about `inches` wide, in whole pixels; labels on three sides."""
    zoom = max(1, round(inches * DPI / cells.shape[-1]))
    pixels = to_pixels(torch.from_numpy(cells), quantization).numpy()
    canvas, row_pitch, column_pitch = _mosaic(pixels.repeat(zoom, axis=3).repeat(zoom, axis=4), gap=4)
    with rc_context(_STYLE):
        figure = Figure(figsize=(canvas.shape[1] / DPI, canvas.shape[0] / DPI))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(canvas, interpolation="nearest")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        # Names are the user's: a dollar sign in them is no formula.
        axes.set_yticks([(row + 0.5) * row_pitch for row in range(len(left))], left, parse_math=False)
        axes.set_xticks([(column + 0.5) * column_pitch for column in range(len(above))], above, parse_math=False)
        for column, label in enumerate(below):
            axes.text((column + 0.5) * column_pitch, len(canvas) + 8, label, color=_GRAY, size=7, ha="center", va="top")
        axes.set_title(title, parse_math=False)
        _write(figure, path, bbox_inches="tight", pad_inches=0.03)


def _mosaic(cells: np.ndarray, gap: int) -> tuple[np.ndarray, int, int]:
    """One RGB picture of uint8 (rows, columns, C, H, W), ruled in white; its pitches down and across, in pixels."""
    rows, columns, _, height, width = cells.shape
    tiles = np.full((rows, height + gap, columns, width + gap, 3), 255, np.uint8)
    tiles[:, :height, :, :width] = cells.transpose(0, 3, 1, 4, 2)
    return tiles.reshape(rows * (height + gap), -1, 3)[:-gap, :-gap], height + gap, width + gap


def _draw_likelihood(axes: Axes, rows: list[dict]) -> None:
    key, unit = ("bits_per_dim", "bits/dim") if any("bits_per_dim" in row for row in rows) else ("loss", "loss")
    axes.set_ylabel(unit)
    means = _draw_smoothed(axes, *_series(rows, key), _BLUE, "train (running mean)")
    steps, values = _series(rows, f"eval_{key}")
    if len(steps):
        axes.plot(steps, values, color=_ORANGE, marker="o", markersize=2.5, linewidth=0.8, label="evaluation")
    # The first steps, from far above, would flatten all that follows.
    if len(means) > 20:
        shown = np.concatenate([means[len(means) // 20 :], values])
        margin = 0.1 * np.ptp(shown) or 0.1
        axes.set_ylim(shown.min() - margin, shown.max() + margin)
    if axes.lines:
        axes.legend(frameon=False)


def _draw_optimization(axes: Axes, rows: list[dict]) -> None:
    axes.set_ylabel("gradient norm", color=_GREEN)
    axes.set_yscale("log")
    steps, norms = _series(rows, "grad_norm")
    _draw_smoothed(axes, steps, norms, _GREEN, None)
    narrow = len(norms) and norms.max() < 300 * norms.min()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    steps, rates = _series(rows, "learning_rate")
    if len(steps) and rates.max() > 0:
        exponent = int(np.floor(np.log10(rates.max())))
        twin = axes.twinx()
        twin.spines["right"].set_visible(True)
        twin.plot(steps, rates / 10.0**exponent, color=_GRAY, marker=_marker(steps), linewidth=1)
        twin.set_ylabel(f"learning rate ($10^{{{exponent}}}$)", color=_GRAY)


def _draw_smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str | None) -> np.ndarray:
    """The values, pale, and their running means, each at its middle step; returns the means."""
    if not len(values):
        return values
    width = max(1, len(values) // 50)
    means = np.convolve(values, np.full(width, 1 / width), "valid")
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.6)
    axes.plot(steps[(width - 1) // 2 :][: len(means)], means, color=color, marker=_marker(steps), label=label)
    return means


def _marker(steps: np.ndarray) -> str | None:
    return "." if len(steps) < 3 else None  # a line through one point is invisible


def _read_rows(path: Path) -> list[dict]:
    if not path.is_file():
        raise FileNotFoundError(f"metrics_path: expected a file of metrics, got {path}")
    text = path.read_text()
    rows = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        try:
            rows.append(json.loads(line))
            rows[-1]["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"metrics_path: expected JSON objects with a step in {path}, got {line!r}") from error
    if not rows:
        raise ValueError(f"metrics_path: expected at least one row in {path}, got none")
    return rows


def _series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps that have a finite value, ascending, and the values."""
    points = {row["step"]: row[key] for row in rows if row.get(key) is not None and np.isfinite(row[key])}
    steps = sorted(points)
    return np.array(steps), np.array([points[step] for step in steps])


def _write(figure: Figure, path: str | Path, **options) -> None:
    with atomic_write(path) as beside:
        figure.savefig(beside, dpi=DPI, format=Path(path).suffix[1:] or "png", **options)
