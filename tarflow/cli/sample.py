"""``tarflow sample``: draw samples from a trained model."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from matplotlib.backend_bases import FigureCanvasBase

from ..decoding import ProgressCallback
from ..files import atomic_write
from ..image_flow import ImageFlow, at_least_one
from ..noise import Quantization, quantization, to_pixels
from ..pictures import Gallery
from .drawing import Drawing, Progress
from .parsing import Flat, fields_of, parse
from .shared import autocast, check_file, check_seed, load_model

__all__ = ["Sample", "run"]

TRAJECTORY_ROWS = 10


@dataclass(frozen=True)
class Sample:
    """Draw samples from a trained model: a picture with a row per class, or the images themselves."""

    run: tyro.conf.Positional[Path]
    """folder of a run or of a saved model, or the name of one on the Hugging Face hub"""
    out: Path = Path("samples.png")
    """a picture (.png) or uint8 images with their labels (.npz)"""
    num: int = 80
    """images to draw; a picture has them in a row for each class, or in rows of eight"""
    labels: tuple[int, ...] = ()
    """classes to draw, -1 for no label; by default all of them in turn, in a picture ten at most"""
    drawing: Flat[Drawing] = Drawing()  # noqa: RUF009 (it is frozen)
    quantization: Quantization | None = None
    """to 8-bit pixels: round (default after Gaussian noise), floor (default after others) or truncate, as published"""
    on_nan: Literal["fail", "redraw", "keep"] = "fail"
    """what to do about samples that are not finite"""
    trajectory: Path | None = None
    """also draw the image after every block, into this file"""
    seed: int = 0
    device: str = "auto"


def run(arguments: Sequence[str]) -> None:
    """Draw samples and, if asked for, a trajectory; print how long the samples took."""
    command, flags = parse(Sample, arguments)
    given, drawing = fields_of(flags), command.drawing
    _check(command, given)
    decoder, guidance = drawing.make_decoder(), drawing.make_guidance()
    model, metadata = load_model(command.run, command.device)
    drawing.check_usable(given, model)
    _check_labels(command.labels, model.config.num_classes)
    model.check_num(command.num)
    gallery = Gallery(
        metadata.get("class_names", ()),
        guidance,
        drawing.denoise_sigma(metadata),
        decoder,
        command.seed,
        command.quantization or quantization(metadata.get("sigma", 0.0)),
        command.on_nan,
    )
    with autocast(model, drawing.precision, command.run):
        with Progress(command.num, len(model.stages)) as progress:
            if command.out.suffix == ".png":
                title = f"Samples of {command.run.resolve().name}"
                gallery.save_samples(model, command.out, title, command.num, command.labels, progress.note)
            else:
                _save_arrays(gallery, model, command, progress.note)
        print(progress.summary())
        if command.trajectory:
            classes = command.labels[:TRAJECTORY_ROWS]
            gallery.save_trajectory(model, command.trajectory, "From latent to image", classes)
    print(f"wrote {', '.join(str(path) for path in (command.out, command.trajectory) if path)}")


def _check(command: Sample, given: Collection[str]) -> None:
    """Raise ValueError or OSError for what no model can be asked for, before one is read."""
    if command.out.suffix not in (".png", ".npz"):
        raise ValueError(f"out: expected a .png or .npz file; got {command.out}")
    check_file("out", command.out)
    if command.trajectory is not None:
        formats = FigureCanvasBase.get_supported_filetypes()
        if command.trajectory.suffix[1:] not in formats:
            raise ValueError(f"trajectory: expected a picture ({', '.join(formats)}); got {command.trajectory}")
        if command.trajectory.resolve() == command.out.resolve():
            raise ValueError(f"trajectory: expected another file than --out; got {command.trajectory} for both")
        check_file("trajectory", command.trajectory)
    at_least_one("num", command.num)
    check_seed(command.seed)
    command.drawing.check(given)
    if "labels" in given and not 0 < len(command.labels) <= command.num:
        raise ValueError(f"labels: expected 1 to {command.num} classes, as --num says; got {len(command.labels)}")


def _check_labels(labels: Sequence[int], num_classes: int) -> None:
    """Raise ValueError for classes that the model does not have."""
    if labels and not num_classes:
        raise ValueError(f"labels: expected none for an unconditional model; got {', '.join(map(str, labels))}")
    for label in labels:
        if not -1 <= label < num_classes:
            raise ValueError(f"labels: expected classes from 0 to {num_classes - 1}, or -1 for no label; got {label}")


def _save_arrays(gallery: Gallery, model: ImageFlow, command: Sample, progress: ProgressCallback) -> None:
    """Write images uint8 (num, H, W, C) and labels int64 (num,), the classes in turn."""
    labels = None
    if model.config.num_classes:
        classes = torch.tensor(command.labels or range(model.config.num_classes))
        labels = classes.repeat(-(-command.num // len(classes)))[: command.num]
    (images,) = gallery.draw_samples(model, command.num, labels, progress=progress)
    arrays: dict[str, Any] = {"images": to_pixels(images, gallery.quantization).permute(0, 2, 3, 1).cpu().numpy()}
    if labels is not None:
        arrays["labels"] = labels.numpy()
    with atomic_write(command.out) as path, path.open("wb") as file:
        np.savez_compressed(file, **arrays)
