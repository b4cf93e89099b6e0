"""Pictures of what a model generates: a row per class, and the way from latent to image."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from . import pictures
from .decoding import Decoder, ProgressCallback
from .flowpp.model import FlowPP
from .guidance import Guidance
from .model import TarFlow
from .noise import Quantization

REDRAWS = 10

# In pixels: what matplotlib draws is smaller than 2^16 either way, titles included; a small image is drawn enlarged.
LARGEST_PICTURE, LARGEST_CELL = 60_000, 180


@dataclass(frozen=True)
class Gallery:
    """How the samples of a picture are drawn, and what its rows are called.

    Args:
        class_names: of a conditional model; classes beyond those named are numbered.
        guidance, denoise_sigma, decoder: as in :meth:`tarflow.TarFlow.sample`; a Flow++ has none of them.
        seed: of the latents, which are the same however often and after however much training they are drawn.
        quantization: of the pixels, see :func:`tarflow.noise.to_pixels`.
        on_nan: what to do about samples that are not finite: ``"fail"``, ``"redraw"`` from latents that the seed gives
            next, up to ten times, or ``"keep"``, with a line that says how many.
    """

    class_names: Sequence[str] = ()
    guidance: Guidance | None = None
    denoise_sigma: float = 0.0
    decoder: str | Decoder = "auto"
    seed: int = 0
    quantization: Quantization = "floor"
    on_nan: Literal["fail", "redraw", "keep"] = "fail"

    def samples(
        self,
        model: TarFlow | FlowPP,
        path: Path,
        title: str,
        num: int = 80,
        classes: Sequence[int] = (),
        progress: ProgressCallback = lambda statistics: None,
    ) -> None:
        """Draw ``num`` samples, in rows of eight; for a conditional model a row per class, ten of them or those given.

        ValueError where that is more than fits into a picture.
        """
        labels = self._labels(model, classes, rows=min(10, num))
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
        (images,) = self.draw(model, num, labels_of_all, progress=progress)
        grid = images.new_ones(rows, columns, *images.shape[1:], device="cpu")
        grid[filled] = images.cpu()
        pictures.sample_grid(grid, path, f"{title}{self.description}", self._names(labels), self.quantization)

    def trajectory(self, model: TarFlow | FlowPP, path: Path, title: str, classes: Sequence[int] = ()) -> None:
        """Draw the image after every block, from the latent on the left to the sample on the right."""
        labels = self._labels(model, classes, rows=6)
        images, frames = self.draw(model, 6 if labels is None else len(labels), labels, return_trajectory=True)
        columns = ["latent", *self._stations(model)]
        if self.denoise_sigma:
            frames, columns = torch.cat((frames, images[None])), [*columns, "denoised"]
        pictures.trajectory(frames.cpu(), path, f"{title}{self.description}", columns, self.quantization)

    @property
    def description(self) -> str:
        """What was done to the samples, as the end of a title."""
        parts = []
        if self.guidance is not None:
            parts.append(f"guidance {self.guidance.weight:g} ({self.guidance.schedule})")
            if self.guidance.temperature != 1:
                parts.append(f"temperature {self.guidance.temperature:g}")
        if self.denoise_sigma:
            parts.append("denoised")
        return ", " + ", ".join(parts) if parts else ""

    def draw(self, model: TarFlow | FlowPP, num: int, labels: Tensor | None, **options) -> tuple[Tensor, ...]:
        """What the model's ``sample`` returns under these settings, as a tuple; a Flow++ reports nothing.

        ValueError where samples are not finite, and are neither to be kept nor, ten times redrawn, any better.
        """
        options["generator"] = torch.Generator(model.device).manual_seed(self.seed)
        drawn = self._sample(model, num, labels, options)
        bad = _not_finite(drawn[0])
        if not len(bad):
            return drawn
        count = f"{len(bad)} of {num} samples are not finite"
        if self.on_nan == "fail":
            raise ValueError(f"{count}; --on-nan redraw draws others in their place, --on-nan keep keeps them")
        tqdm.write(f"{count} and are {'drawn anew' if self.on_nan == 'redraw' else 'kept; nan is drawn black'}")
        if self.on_nan == "keep":
            return drawn
        for _ in range(REDRAWS):
            again = self._sample(model, len(bad), None if labels is None else labels[bad], options)
            drawn[0][bad] = again[0]
            for frames, others in zip(drawn[1:], again[1:], strict=True):
                frames[:, bad] = others
            bad = bad[_not_finite(again[0])]
            if not len(bad):
                return drawn
        raise ValueError(f"{len(bad)} of {num} samples are not finite after being drawn anew {REDRAWS} times")

    def _sample(self, model: TarFlow | FlowPP, num: int, labels: Tensor | None, options: dict) -> tuple[Tensor, ...]:
        if isinstance(model, FlowPP):
            drawn = model.sample(num, labels, **{name: value for name, value in options.items() if name != "progress"})
        else:
            drawn = model.sample(num, labels, self.guidance, self.denoise_sigma, self.decoder, **options)
        return drawn if isinstance(drawn, tuple) else (drawn,)

    def _stations(self, model: TarFlow | FlowPP) -> list[str]:
        """What a sample passes after its latent."""
        if isinstance(model, FlowPP):
            kinds = [kind for kind in reversed(model.flow.levels) if kind != "squeeze"]
            return [*(f"after {kind} couplings" for kind in kinds), "image"]
        return [f"after block {t}" for t in range(model.config.num_blocks, 0, -1)]

    def _labels(self, model: TarFlow | FlowPP, classes: Sequence[int], rows: int) -> Tensor | None:
        if not model.config.num_classes:
            return torch.tensor(classes) if classes else None
        return torch.tensor(classes) if classes else spread(model.config.num_classes, rows)

    def _names(self, labels: Tensor | None) -> list[str] | None:
        if labels is None:
            return None
        names = dict(enumerate(self.class_names)) | {-1: "no label"}
        return [names.get(k, f"class {k}") for k in labels.tolist()]


def _not_finite(images: Tensor) -> Tensor:
    """Indices, on the CPU, of the images that hold a nan or an infinity."""
    return (~images.isfinite().flatten(1).all(1)).nonzero()[:, 0].cpu()


def spread(total: int, num: int) -> Tensor:
    """At most ``num`` indices, evenly spread over ``total``.

    >>> spread(10, 4)
    tensor([0, 2, 5, 7])
    """
    num = min(num, total)
    return torch.arange(num) * total // num
