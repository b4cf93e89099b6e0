"""``tarflow sample``: draw samples from a trained model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from matplotlib.backend_bases import FigureCanvasBase
from tqdm import tqdm

from ..decoding import BlockStatistics, Decoder, DecoderName, ProgressCallback
from ..files import atomic_write
from ..guidance import Guidance
from ..image_flow import ImageFlow, at_least_one
from ..noise import Quantization, quantization, to_pixels
from ..pictures import Gallery
from ..validation import check_sigma
from .parsing import parse
from .shared import autocast, check_file, check_guidance_weight, check_seed, check_tolerance, load_model

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
    guidance: float = 0.0
    """weight of guidance; 0 for none"""
    schedule: Literal["linear", "constant"] = "linear"
    """course of the weight over the tokens"""
    temperature: float = 1.0
    """temperature of the attention in the reference branch of guidance"""
    guide: Literal["both", "alpha", "mu"] = "both"
    """the parameters that are guided"""
    drop_label: bool = True
    """whether the reference branch drops the label"""
    sigma: float | None = None
    """standard deviation of the noise to remove; by default that of training, 0 leaves it"""
    quantization: Quantization | None = None
    """to 8-bit pixels: round (default after Gaussian noise), floor (default after others) or truncate, as published"""
    on_nan: Literal["fail", "redraw", "keep"] = "fail"
    """what to do about samples that are not finite"""
    trajectory: Path | None = None
    """also draw the image after every block, into this file"""
    decoder: DecoderName = "auto"
    """auto is the faster of the two for each block, where `tarflow calibrate` has timed them"""
    window: int | None = None
    """tokens of an image that the jacobi decoder updates at once; by default all of them"""
    tolerance: float | None = None
    """how much each latent of the jacobi decoder may differ from the one that was drawn; by default 0.01"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """number format of the transformers"""
    seed: int = 0
    device: str = "auto"


GUIDANCE_FLAGS = ("schedule", "temperature", "guide", "drop_label")


def run(arguments: Sequence[str]) -> None:
    """Draw samples and, if asked for, a trajectory; print how long the samples took."""
    command, flags = parse(Sample, arguments)
    given = {flag.removeprefix("--no-").removeprefix("--").replace("-", "_") for flag in flags}
    _check(command, given)
    decoder = Decoder(command.decoder, command.window)
    if command.tolerance is not None:
        decoder = check_tolerance(replace(decoder, tolerance=command.tolerance))
    guidance = Guidance(command.guidance, command.schedule, command.temperature, command.guide, command.drop_label)
    model, metadata = load_model(command.run, command.device)
    _check_usable(command, given, model)
    model.check_num(command.num)
    trained_sigma = metadata.get("sigma", 0.0)
    gallery = Gallery(
        metadata.get("class_names", ()),
        guidance if guidance.weight else None,
        trained_sigma if command.sigma is None else command.sigma,
        decoder,
        command.seed,
        command.quantization or quantization(trained_sigma),
        command.on_nan,
    )
    with autocast(model, command.precision, command.run):
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


def _check(command: Sample, given: set[str]) -> None:
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
    if command.sigma is not None:
        check_sigma("sigma", command.sigma)
    check_guidance_weight(command.guidance)
    for name in GUIDANCE_FLAGS:
        if name in given and "guidance" not in given:
            value = getattr(command, name)
            raise ValueError(f"{name}: expected none without --guidance, a part of which it is; got {value}")
    if "tolerance" in given and command.decoder == "sequential":
        raise ValueError(f"tolerance: expected none for the sequential decoder; got {command.tolerance}")
    if "labels" in given and not 0 < len(command.labels) <= command.num:
        raise ValueError(f"labels: expected 1 to {command.num} classes, as --num says; got {len(command.labels)}")


def _check_usable(command: Sample, given: set[str], model: ImageFlow) -> None:
    """Raise ValueError for a flag that the model has no use for, and for classes that it does not have."""
    useless: tuple[str, ...] = () if model.supports_guidance else ("sigma", "guidance", *GUIDANCE_FLAGS)
    useless += ("decoder", "window", "tolerance") if model.decoders == ("auto",) else ()
    for name in useless:
        if name in given:
            kind, value = type(model).__name__, getattr(command, name)
            raise ValueError(f"{name}: expected none for a {kind}, which has no use for it; got {value!r}")
    num_classes = model.config.num_classes
    if command.labels and not num_classes:
        got = ", ".join(map(str, command.labels))
        raise ValueError(f"labels: expected none for an unconditional model; got {got}")
    for label in command.labels:
        if not -1 <= label < num_classes:
            raise ValueError(f"labels: expected classes from 0 to {num_classes - 1}, or -1 for no label; got {label}")


class Progress:
    """A bar of images that moves with every block, and what decoding them took."""

    def __init__(self, num: int, num_blocks: int):
        self.num, self.num_blocks = num, num_blocks
        self.blocks: list[BlockStatistics] = []

    def __enter__(self) -> "Progress":
        layout = "{percentage:3.0f}%|{bar}| [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        self.bar = tqdm(total=self.num, unit=" images", dynamic_ncols=True, bar_format=layout)
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def note(self, statistics: BlockStatistics) -> None:
        """Move the bar, since a block is done."""
        self.blocks.append(statistics)
        self.bar.set_postfix_str(f"block {statistics.block + 1}: {statistics.decoder}, {statistics.passes} passes")
        self.bar.update(statistics.batch / self.num_blocks)

    def summary(self) -> str:
        """Such as ``80 images in 3.1 s, 26 images/s; 73 passes for 780 sequential steps (1/10.7): jacobi``."""
        seconds = self.bar.format_dict["elapsed"]
        if not self.blocks:  # a model that reports no passes
            return f"{self.num} images in {seconds:.3g} s, {self.num / seconds:.3g} images/s"
        images = sum(block.batch for block in self.blocks) / self.num_blocks
        passes = sum(block.passes for block in self.blocks)
        steps = sum(block.steps for block in self.blocks)
        decoders = {block.block: str(block.decoder) for block in self.blocks}
        how = ", ".join(f"{decoder} (block {t + 1})" for t, decoder in decoders.items())
        if len(set(decoders.values())) == 1:
            (how,) = set(decoders.values())
        return (
            f"{images:.0f} images in {seconds:.3g} s, {images / seconds:.3g} images/s; "
            f"{passes} passes for {steps} sequential steps (1/{steps / max(passes, 1):.3g}): {how}"
        )


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
