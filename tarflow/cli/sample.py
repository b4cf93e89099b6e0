"""``tarflow sample``: draw samples from a trained model."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from matplotlib.backend_bases import FigureCanvasBase
from torch import Tensor

from .. import processes
from ..encoders import Autoencoder, TextEncoder
from ..image_flow import ImageFlow, at_least_one
from ..model import TarFlow
from ..noise import Quantization, quantization, to_pixels
from ..pictures import Gallery
from .drawing import Drawing, Progress
from .parsing import Flat, fields_of, parse
from .shards import SHARD_SIZE, Format, draw_shards, missing_shards, save_arrays
from .shared import autocast, check_file, check_image_channels, check_new_folder, check_seed, load_model

__all__ = ["Sample", "run"]

TRAJECTORY_ROWS = 10


@dataclass(frozen=True)
class Sample:
    """Draw samples from a trained model: a picture with a row per class, or the images themselves."""

    run: tyro.conf.Positional[Path]
    """folder of a run or of a saved model, or the name of one on the Hugging Face hub"""
    out: Path = Path("samples.png")
    """a picture (.png, .pdf, .svg), uint8 images with their labels (.npz), or a folder of files, which may be gone on
    with"""
    format: Format = "npz"
    """files of a folder: npz, of 500 images with their labels, or png, an image each"""
    num: int = 80
    """images to draw; a picture has them in a row for each class, or in rows of eight"""
    labels: tuple[int, ...] = ()
    """classes to draw, -1 for no label; by default all of them in turn, in a picture ten at most"""
    prompt: tuple[str, ...] = ()
    """texts to draw in turn (--prompt "a coat" "a bag"), in place of the classes of a model conditioned on text"""
    text_encoder: str | None = None
    """what encodes them, of transformers; by default that of training"""
    autoencoder: str | None = None
    """what decodes the samples of a model of latents, of diffusers; by default that of training"""
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
    with processes.connected(command.device):
        with processes.together():
            if processes.num_ranks() > 1 and command.out.suffix:
                raise ValueError(f"out: expected a folder, to which several processes write; got {command.out}")
            model, metadata = load_model(command.run, str(processes.pick_device(command.device)))
        drawing.check_usable(given, model)
        if command.prompt:
            _set_prompts(model, command, metadata)
        elif isinstance(model, TarFlow) and (own := model.flow.class_prefixes) is not None and not own.any():
            raise ValueError("prompt: expected texts, since the model has none of its own; got none")
        if command.autoencoder is not None:
            metadata["autoencoder"] = command.autoencoder
        autoencoder = Autoencoder.of(metadata, model.device)
        check_image_channels(model, autoencoder)
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
            drawing.make_denoising(metadata) if model.supports_guidance else None,
            autoencoder,
        )
        with autocast(model, drawing.precision, command.run):
            _draw(command, gallery, model) if command.out.suffix else _draw_folder(command, gallery, model)


def _set_prompts(model: ImageFlow, command: Sample, metadata: dict[str, Any]) -> None:
    """Make texts the classes of a model; ValueError for one that is not conditioned on text."""
    if not isinstance(model, TarFlow) or not model.config.prefix_dim:
        raise ValueError(f"prompt: expected none for a model that is not conditioned on text; got {command.prompt}")
    source = command.text_encoder or metadata.get("text_encoder")
    if source is None:
        raise ValueError("text_encoder: expected the one of training, which config.json does not tell; got None")
    encode = TextEncoder(source, model.config.prefix_length, model.device)
    model.set_prefixes(encode(["", *command.prompt]))
    metadata["class_names"] = list(command.prompt)


def _draw(command: Sample, gallery: Gallery, model: ImageFlow) -> None:
    """Draw a picture of samples, or a file of them, and a trajectory."""
    with Progress(command.num, len(model.stages)) as progress:
        if command.out.suffix != ".npz":
            title = f"Samples of {command.run.resolve().name}"
            gallery.save_samples(model, command.out, title, command.num, command.labels, progress.note)
        else:
            labels = _labels_in_turn(command, model)
            (images,) = gallery.draw_samples(model, command.num, labels, progress=progress.note)
            save_arrays(command.out, to_pixels(images, gallery.quantization), labels)
    print(progress.summary())
    if command.trajectory:
        classes = command.labels[:TRAJECTORY_ROWS]
        gallery.save_trajectory(model, command.trajectory, "From latent to image", classes)
    print(f"wrote {', '.join(str(path) for path in (command.out, command.trajectory) if path)}")


def _draw_folder(command: Sample, gallery: Gallery, model: ImageFlow) -> None:
    """Draw the samples that a folder misses, each process its share."""
    settings = {
        "num": command.num,
        "labels": command.labels,
        **({"prompt": command.prompt} if command.prompt else {}),
        **({"autoencoder": gallery.autoencoder.source} if gallery.autoencoder else {}),
        "seed": command.seed,
        "quantization": gallery.quantization,
        "on_nan": command.on_nan,
        **asdict(command.drawing),
        "sigma": gallery.denoise_sigma,
        "denoising_steps": gallery.denoising and gallery.denoising.steps,
    }
    shards = missing_shards(command.out, model, settings, command.format)
    num = sum(map(len, shards.values()))
    with Progress(num, len(model.stages), shown=processes.is_main()) as progress:
        labels = _labels_in_turn(command, model)
        draw_shards(gallery, model, command.out, shards, labels, command.format, progress.note)
    if processes.is_main():
        if num:
            print(f"{progress.summary()}; by one of {processes.num_ranks()} processes")
        kind = f"in files of {SHARD_SIZE}" if command.format == "npz" else "as PNG"
        print(f"wrote {command.out}, {command.num} images {kind}")


def _check(command: Sample, given: Collection[str]) -> None:
    """Raise ValueError or OSError for what no model can be asked for, before one is read."""
    kinds = ".png", ".pdf", ".svg", ".npz"
    if command.out.suffix not in (*kinds, "") or command.out.name in kinds:
        raise ValueError(f"out: expected a file of {', '.join(kinds)}, or a folder; got {command.out}")
    if command.out.suffix:
        check_file("out", command.out)
        if "format" in given:
            raise ValueError(f"format: expected with a folder alone; got {command.format} and the file {command.out}")
    else:
        check_new_folder("out", command.out)
        if command.trajectory is not None:
            raise ValueError(f"trajectory: expected none with a folder of samples; got {command.trajectory}")
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
    if command.prompt and command.labels:
        raise ValueError(f"labels: expected none with --prompt, whose texts are the classes; got {command.labels}")
    if len(command.prompt) > command.num:
        raise ValueError(f"prompt: expected at most {command.num} texts, as --num says; got {len(command.prompt)}")
    if "labels" in given and not 0 < len(command.labels) <= command.num:
        raise ValueError(f"labels: expected 1 to {command.num} classes, as --num says; got {len(command.labels)}")


def _check_labels(labels: Sequence[int], num_classes: int) -> None:
    """Raise ValueError for classes that the model does not have."""
    if labels and not num_classes:
        raise ValueError(f"labels: expected none for an unconditional model; got {', '.join(map(str, labels))}")
    for label in labels:
        if not -1 <= label < num_classes:
            raise ValueError(f"labels: expected classes from 0 to {num_classes - 1}, or -1 for no label; got {label}")


def _labels_in_turn(command: Sample, model: ImageFlow) -> Tensor | None:
    """The class of each image, the classes in turn; None for a model without."""
    if not model.config.num_classes:
        return None
    classes = torch.tensor(command.labels or range(model.config.num_classes))
    return classes.repeat(-(-command.num // len(classes)))[: command.num]
