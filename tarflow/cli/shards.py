"""Many samples, in a folder of files: drawn by one process or several, and gone on with after an interruption."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import processes
from ..decoding import ProgressCallback
from ..files import atomic_write, remove_abandoned
from ..image_flow import ImageFlow
from ..noise import derive_seed, to_pixels
from ..pictures import Gallery

__all__ = ["SHARD_SIZE", "Format", "draw_shards", "missing_shards", "save_arrays"]

Format = Literal["npz", "png"]
"""Files of a folder: one for each shard, or one for each image."""

SHARD_SIZE = 500
"""Images that one process draws at a time: a shard."""

RECORD = "samples.json"


def missing_shards(folder: Path, model: ImageFlow, settings: dict[str, Any], kind: Format) -> dict[int, Tensor]:
    """The shards that a folder of samples misses and this process is to draw: the numbers of the images in each.

    Args:
        folder: where the files are; it is made, or holds those of an earlier try.
        model: the model.
        settings: what the samples depend on, with their number, ``num``; they are recorded in the folder.
        kind: the files that hold the samples.

    Raises:
        ValueError: the folder holds samples of other settings or of another model.
    """

    def prepare() -> list[int]:
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        _record(folder, json.loads(json.dumps(settings | {"weights": _excerpt(model)}, default=str)))
        return [
            number
            for number, indices in enumerate(shards)
            if not all(path.exists() for path in _paths(folder, indices, kind))
        ]

    shards = [*torch.arange(settings["num"]).split(SHARD_SIZE)]
    missing = processes.of_main(prepare)
    return {number: shards[number] for number in missing[processes.rank() :: processes.num_ranks()]}


def draw_shards(
    gallery: Gallery,
    model: ImageFlow,
    folder: Path,
    shards: dict[int, Tensor],
    labels: Tensor | None,
    kind: Format,
    progress: ProgressCallback,
) -> None:
    """Write the shards of :func:`missing_shards`: ``00000.npz`` and so on, or ``000000.png`` and so on.

    The latents of a shard depend on (seed, its number) alone, so that the images are the same for any number of
    processes. ``labels`` are those of all samples; ``progress`` is called after every block.

    Raises:
        ValueError: samples are not finite.
    """
    with processes.together():
        for number, indices in shards.items():
            drawing = replace(gallery, seed=derive_seed(gallery.seed, number))
            classes = None if labels is None else labels[indices]
            (images,) = drawing.draw_samples(model, len(indices), classes, progress=progress)
            paths, pixels = _paths(folder, indices, kind), to_pixels(images, gallery.quantization)
            _save_pictures(paths, pixels) if kind == "png" else save_arrays(paths[0], pixels, classes)


def save_arrays(path: Path, pixels: Tensor, labels: Tensor | None) -> None:
    """Write images uint8 (num, H, W, C) and labels int64 (num,)."""
    arrays: dict[str, Any] = {"images": pixels.permute(0, 2, 3, 1).cpu().numpy()}
    if labels is not None:
        arrays["labels"] = labels.numpy()
    with atomic_write(path) as beside, beside.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _save_pictures(paths: list[Path], pixels: Tensor) -> None:
    """Write each of the images uint8 (num, C, H, W), of 1 or 3 channels, as PNG."""
    mode = {1: "L", 3: "RGB"}[pixels.shape[1]]
    for path, image in zip(paths, pixels.permute(0, 2, 3, 1).contiguous().cpu(), strict=True):
        with atomic_write(path) as beside:
            picture = Image.frombytes(mode, (image.shape[1], image.shape[0]), image.numpy().tobytes())
            picture.save(beside, "PNG")


def _paths(folder: Path, indices: Tensor, kind: Format) -> list[Path]:
    """The files of a shard, by the numbers of its images."""
    if kind == "png":
        return [folder / f"{index:06d}.png" for index in indices.tolist()]
    return [folder / f"{int(indices[0]) // SHARD_SIZE:05d}.npz"]


def _excerpt(model: ImageFlow) -> list[float]:
    """The first number of every weight, which tell a model from what it was some steps of training ago."""
    return [weight.flatten()[0].item() for weight in model.state_dict().values()]


def _record(folder: Path, settings: dict[str, Any]) -> None:
    """Write down the settings, or check that they are those of the samples that are there."""
    path = folder / RECORD
    if path.exists():
        before = json.loads(path.read_text())
        for name, value in settings.items():
            if before.get(name) != value:
                got = "another model" if name == "weights" else f"{name} {value}"
                raise ValueError(f"out: expected a new folder, or one with samples of these settings; got {got}")
        return
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(settings, indent=2) + "\n")
