"""Pictures of a model and its training, fit for a paper.

:class:`Gallery` samples from a model and draws: a grid with a row per class, and the way from latent to image. Below it
are the pictures themselves: :func:`sample_grid`, :func:`trajectory` and, of training, :func:`curves`.
"""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor
from tqdm import tqdm

from .datasets import evenly_spaced
from .decoding import Decoder, ProgressCallback
from .denoising import Denoising
from .encoders import Autoencoder
from .files import atomic_write
from .guidance import Guidance
from .image_flow import ImageFlow
from .noise import Quantization, to_pixels
from .validation import not_finite

__all__ = ["Gallery", "curves", "sample_grid", "trajectory", "write_figure"]

DPI = 200
# Of a picture and of an image in it, in pixels: matplotlib draws at most 2^16 either way, titles included.
LARGEST_PICTURE, LARGEST_CELL = 60_000, 180
MAX_REDRAWS = 10

BLUE, ORANGE, GREEN, GRAY = "#0072b2", "#d55e00", "#009e73", "#555555"
STYLE: dict[Any, Any] = {
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


@dataclass(frozen=True)
class Gallery:
    """Settings with which samples are drawn, and what the rows of their picture are called.

    Args:
        class_names: names of the classes of a conditional model; classes beyond those named are numbered.
        guidance, denoise_sigma, decoder: as in :meth:`tarflow.TarFlow.sample`.
        seed: seed of the latents, which are the same however often and after however much training they are drawn.
        quantization: how samples become 8-bit pixels, see :func:`tarflow.noise.to_pixels`.
        on_nan: what to do about samples that are not finite: ``"fail"``, ``"redraw"`` from latents that the seed gives
            next, up to ten times, or ``"keep"``, with a line that says how many.
        denoising: as in :meth:`tarflow.TarFlow.sample`.
        autoencoder: what turns the samples of a model of latents into images.
    """

    class_names: Sequence[str] = ()
    guidance: Guidance | None = None
    denoise_sigma: float = 0.0
    decoder: str | Decoder = "auto"
    seed: int = 0
    quantization: Quantization = "floor"
    on_nan: Literal["fail", "redraw", "keep"] = "fail"
    denoising: Denoising | None = None
    autoencoder: Autoencoder | None = None

    def save_samples(
        self,
        model: ImageFlow,
        path: str | Path,
        title: str,
        num: int = 80,
        classes: Sequence[int] = (),
        progress: ProgressCallback = lambda statistics: None,
    ) -> None:
        """Draw ``num`` samples, in rows of eight; for a conditional model a row per class, ten of them or those given.

        ValueError where that is more than fits into a picture.
        """
        labels = self._row_labels(model, classes, rows=min(10, num))
        rows = -(-num // 8) if labels is None else len(labels)
        columns = min(8, num) if labels is None else -(-num // rows)
        most = LARGEST_PICTURE // max(LARGEST_CELL, model.config.image_size)
        if max(rows, columns) > most:
            raise ValueError(f"num: expected at most {most} rows and columns of a picture; got {rows} x {columns}")
        if labels is None:
            filled = torch.arange(rows * columns).view(rows, columns) < num
        else:  # as many of each class, or one more of the first
            filled = torch.arange(columns) < (num + rows - 1 - torch.arange(rows))[:, None] // rows
        labels_of_all = None if labels is None else labels.repeat_interleave(filled.sum(1))
        (images,) = self.draw_samples(model, num, labels_of_all, progress=progress)
        grid = images.new_ones(rows, columns, *images.shape[1:], device="cpu")
        grid[filled] = images.cpu()
        sample_grid(grid, path, f"{title}{self.description}", self._names(labels), self.quantization)

    def save_trajectory(self, model: ImageFlow, path: str | Path, title: str, classes: Sequence[int] = ()) -> None:
        """Draw the image after every stage of the model, and every step of iterative denoising.

        The latent is on the left, the sample on the right.
        """
        labels = self._row_labels(model, classes, rows=6)
        num = 6 if labels is None else len(labels)
        images, frames = self.draw_samples(model, num, labels, return_trajectory=True)
        columns = ["latent", *model.stages]
        if self.denoise_sigma:
            between = model.denoising_levels(self.denoise_sigma, self.denoising)[1:-1]
            by_level = [f"noise {level:.2g}" for level in between]
            again = ["denoised once", *(f"denoised {time} times" for time in range(2, len(between) + 1))][
                : len(between)
            ]
            columns += [*(by_level if model.noise_levels else again), "denoised"]
            frames = torch.cat((frames, images[None]))
        trajectory(frames.cpu(), path, f"{title}{self.description}", columns, self.quantization)

    @property
    def description(self) -> str:
        """The end of a title: what is done to the samples."""
        parts = []
        if self.guidance is not None:
            parts.append(f"guidance {self.guidance.weight:g} ({self.guidance.schedule})")
            if self.guidance.temperature != 1:
                parts.append(f"temperature {self.guidance.temperature:g}")
        if self.denoise_sigma:
            parts.append("denoised")
        return ", " + ", ".join(parts) if parts else ""

    def draw_samples(
        self,
        model: ImageFlow,
        num: int,
        labels: Tensor | None = None,
        return_trajectory: bool = False,
        progress: ProgressCallback = lambda statistics: None,
    ) -> tuple[Tensor, ...]:
        """Sample images ``(num, C, H, W)`` and, if asked for, their trajectory, as a tuple of one or two tensors.

        ValueError where samples are not finite, and are neither to be kept nor, ten times redrawn, any better.
        """
        generator = torch.Generator(model.device).manual_seed(self.seed)

        def sample(num: int, labels: Tensor | None) -> tuple[Tensor, ...]:
            settings = (self.guidance, self.denoise_sigma, self.decoder, generator, return_trajectory)
            drawn = model.sample(num, labels, *settings, progress=progress, denoising=self.denoising)
            images = drawn if isinstance(drawn, tuple) else (drawn,)
            return images if self.autoencoder is None else tuple(map(self.autoencoder.decode, images))

        drawn = sample(num, labels)
        bad = not_finite(drawn[0])
        if not len(bad):
            return drawn
        count = f"{len(bad)} of {num} samples are not finite"
        if self.on_nan == "fail":
            raise ValueError(f"{count}; --on-nan redraw draws others in their place, --on-nan keep keeps them")
        tqdm.write(f"{count} and are {'drawn anew' if self.on_nan == 'redraw' else 'kept; nan is drawn black'}")
        if self.on_nan == "keep":
            return drawn
        for _ in range(MAX_REDRAWS):
            others = sample(len(bad), None if labels is None else labels[bad])
            drawn[0][bad] = others[0]
            if return_trajectory:
                drawn[1][:, bad] = others[1]
            bad = bad[not_finite(others[0])]
            if not len(bad):
                return drawn
        raise ValueError(f"{len(bad)} of {num} samples are not finite after being drawn anew {MAX_REDRAWS} times")

    def _row_labels(self, model: ImageFlow, classes: Sequence[int], rows: int) -> Tensor | None:
        """The class of each row: those given, or at most ``rows`` of a conditional model."""
        if classes:
            return torch.tensor(classes)
        return evenly_spaced(model.config.num_classes, rows) if model.config.num_classes else None

    def _names(self, labels: Tensor | None) -> list[str] | None:
        if labels is None:
            return None
        names = dict(enumerate(self.class_names)) | {-1: "no label"}
        return [names.get(k, f"class {k}") for k in labels.tolist()]


def sample_grid(
    images: Tensor,
    path: str | Path,
    title: str,
    row_labels: Sequence[str] | None = None,
    quantization: Quantization = "round",
) -> None:
    """Draw images, float (rows, columns, C, H, W) in [-1, 1], clipped to it; a label stands left of its row.

    Where images are not finite, the title says how many. ValueError where images have another shape or type, or labels
    are not one a row.
    """
    _check_cells("images", "(rows, columns, C, H, W)", images)
    if row_labels is not None and len(row_labels) != len(images):
        raise ValueError(f"row_labels: expected {len(images)}, one a row, got {len(row_labels)}")
    values = _to_numpy(images)
    title = _counted(title, values, axis=(2, 3, 4))
    _write_grid(values, path, title, quantization, inches=0.56, left=row_labels or ())


def trajectory(
    frames: Tensor,
    path: str | Path,
    title: str,
    column_labels: Sequence[str],
    quantization: Quantization = "round",
) -> None:
    """Draw frames, float (steps, B, C, H, W): a row a sample, a column a step, its label above it.

    A latent reaches beyond [-1, 1], so each column shows, and names below it, the range [-m, m] that holds 99.5% of
    its finite values, m at least 1. Where samples are not finite, the title says how many. ValueError where frames have
    another shape or type, or labels are not one a step.
    """
    _check_cells("frames", "(steps, B, C, H, W)", frames)
    if len(column_labels) != len(frames):
        raise ValueError(f"column_labels: expected {len(frames)}, one a step, got {len(column_labels)}")
    values = _to_numpy(frames)
    title = _counted(title, values, axis=(0, 2, 3, 4))
    ranges = [_range(frame) for frame in values]
    scaled = np.stack([frame / m for frame, m in zip(values, ranges, strict=True)], axis=1)
    above = [textwrap.fill(label, 10) for label in column_labels]
    below = [f"[−{m:.3g}, {m:.3g}]" for m in ranges]
    _write_grid(scaled, path, title, quantization, inches=0.7, above=above, below=below)


def _check_cells(name: str, shape: str, cells: Tensor) -> None:
    if cells.ndim != 5 or cells.shape[2] not in (1, 3) or 0 in cells.shape or not cells.is_floating_point():
        raise ValueError(f"{name}: expected float {shape}, C 1 or 3, got {cells.dtype} {tuple(cells.shape)}")


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _counted(title: str, values: np.ndarray, axis: tuple[int, ...]) -> str:
    """Add to a title how many images, of which all values lie along the axis, are not finite."""
    finite = np.asarray(np.isfinite(values).all(axis=axis))
    return title if finite.all() else f"{title} ({(~finite).sum()} of {finite.size} not finite)"


def _range(frame: np.ndarray) -> float:
    """The smallest m, at least 1, such that [-m, m] holds 99.5% of the finite values."""
    finite = np.abs(frame[np.isfinite(frame)])
    return max(1.0, float(np.quantile(finite, 0.995))) if finite.size else 1.0


def _write_grid(cells, path, title, quantization, *, inches, left=(), above=(), below=()) -> None:
    """Draw cells (rows, columns, C, H, W), each about `inches` wide, in whole pixels, with labels on three sides."""
    zoom = max(1, round(inches * DPI / cells.shape[-1]))
    pixels = to_pixels(torch.from_numpy(cells), quantization).numpy()
    canvas, row_pitch, column_pitch = _mosaic(pixels.repeat(zoom, axis=3).repeat(zoom, axis=4), gap=4)
    with rc_context(STYLE):
        figure = Figure(figsize=(canvas.shape[1] / DPI, canvas.shape[0] / DPI))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(canvas, interpolation="nearest")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        # Names are the user's: a dollar sign in them is no formula.
        axes.set_yticks([(row + 0.5) * row_pitch for row in range(len(left))], left, parse_math=False)
        axes.set_xticks([(column + 0.5) * column_pitch for column in range(len(above))], above, parse_math=False)
        for column, label in enumerate(below):
            axes.text((column + 0.5) * column_pitch, len(canvas) + 8, label, color=GRAY, size=7, ha="center", va="top")
        axes.set_title(title, parse_math=False)
        write_figure(figure, path, bbox_inches="tight", pad_inches=0.03)


def _mosaic(cells: np.ndarray, gap: int) -> tuple[np.ndarray, int, int]:
    """Join one RGB picture of uint8 (rows, columns, C, H, W), ruled in white, and tell its pitches down and across."""
    rows, columns, _, height, width = cells.shape
    tiles = np.full((rows, height + gap, columns, width + gap, 3), 255, np.uint8)
    tiles[:, :height, :, :width] = cells.transpose(0, 3, 1, 4, 2)
    return tiles.reshape(rows * (height + gap), -1, 3)[:-gap, :-gap], height + gap, width + gap


def curves(metrics_path: str | Path, path: str | Path, title: str) -> None:
    """Draw the training rows and evaluations of a metrics.jsonl: one JSON object a line, any key but `step` optional.

    An unfinished last line, left by a killed run, is passed over; of two rows for a step the later counts.
    FileNotFoundError where there is no such file, ValueError where it holds no row or a line that is not one.
    """
    rows = _read_rows(Path(metrics_path))
    with rc_context(STYLE):
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
        write_figure(figure, path)


def _read_rows(path: Path) -> list[dict]:
    if not path.is_file():
        raise FileNotFoundError(f"metrics_path: expected a file of metrics, got {path}")
    text = path.read_text()
    rows = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        try:
            rows.append(json.loads(line))
            numbers = rows[-1]["step"], *rows[-1].values()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"metrics_path: expected JSON objects with a step in {path}, got {line!r:.200}") from error
        if not all(isinstance(number, int | float | None) for number in numbers):
            raise ValueError(f"metrics_path: expected rows of numbers in {path}, got {line!r:.200}")
    if not rows:
        raise ValueError(f"metrics_path: expected at least one row in {path}, got none")
    return rows


def _draw_likelihood(axes: Axes, rows: list[dict]) -> None:
    key, unit = ("bits_per_dim", "bits/dim") if any("bits_per_dim" in row for row in rows) else ("loss", "loss")
    axes.set_ylabel(unit)
    means = _draw_smoothed(axes, *_series(rows, key), BLUE, "train (running mean)")
    steps, values = _series(rows, f"eval_{key}")
    if len(steps):
        axes.plot(steps, values, color=ORANGE, marker="o", markersize=2.5, linewidth=0.8, label="evaluation")
    # The first steps, from far above, would flatten all that follows.
    if len(means) > 20:
        shown = np.concatenate([means[len(means) // 20 :], values])
        margin = 0.1 * np.ptp(shown) or 0.1
        axes.set_ylim(shown.min() - margin, shown.max() + margin)
    if axes.lines:
        axes.legend(frameon=False)


def _draw_optimization(axes: Axes, rows: list[dict]) -> None:
    axes.set_ylabel("gradient norm", color=GREEN)
    axes.set_yscale("log")
    steps, norms = _series(rows, "grad_norm")
    _draw_smoothed(axes, steps, norms, GREEN, None)
    narrow = len(norms) and norms.max() < 300 * norms.min()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    steps, rates = _series(rows, "learning_rate")
    if len(steps) and rates.max() > 0:
        exponent = int(np.floor(np.log10(rates.max())))
        twin = axes.twinx()
        twin.spines["right"].set_visible(True)
        twin.plot(steps, rates / 10.0**exponent, color=GRAY, marker=_marker(steps), linewidth=1)
        twin.set_ylabel(f"learning rate ($10^{{{exponent}}}$)", color=GRAY)


def _draw_smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str | None) -> np.ndarray:
    """Draw the values, pale, and their running means, each at its middle step; return the means."""
    if not len(values):
        return values
    width = max(1, len(values) // 50)
    means = np.convolve(values, np.full(width, 1 / width), "valid")
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.6)
    axes.plot(steps[(width - 1) // 2 :][: len(means)], means, color=color, marker=_marker(steps), label=label)
    return means


def _series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps at which the key has a finite value, ascending, and the values."""
    points = {row["step"]: row[key] for row in rows if row.get(key) is not None and np.isfinite(row[key])}
    steps = sorted(points)
    return np.array(steps), np.array([points[step] for step in steps])


def _marker(steps: np.ndarray) -> str | None:
    return "." if len(steps) < 3 else None  # a line through one point is invisible


def write_figure(figure: Figure, path: str | Path, *, vector: bool = False, dpi: int = DPI, **options: Any) -> None:
    """Write a figure in the format of the suffix, by default PNG; with ``vector`` as SVG too, beside it.

    The same figure makes the same file.
    """
    path = Path(path)
    for to in (path, path.with_suffix(".svg")) if vector else (path,):
        kind = to.suffix[1:] or "png"
        undated: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {}
        with atomic_write(to) as beside, rc_context({"svg.hashsalt": path.stem}):
            figure.savefig(beside, dpi=dpi, format=kind, **undated, **options)
