"""``tarflow calibrate``: time the decoders of a model on this device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import tyro

from .. import hardware
from ..decoding import TOLERANCE, Decoder, calibration
from ..flow import TokenFlow
from ..guidance import Guidance
from ..image_flow import ImageFlow
from ..training.folder import read_run
from .parsing import parse
from .shared import autocast, check_guidance_weight, check_tolerance, check_writable, load_model

__all__ = ["Calibrate", "run"]


@dataclass(frozen=True)
class Calibrate:
    """Time the decoders on every block of a model, so that `--decoder auto` takes the faster one from now on."""

    run: tyro.conf.Positional[Path]
    """folder of a run or of a saved model, where calibration.json is written"""
    guidance: float | None = None
    """weight of guidance; by default the guidance is that of the samples in training, or 2 for a model with classes"""
    temperature: float | None = None
    """temperature of the attention in the reference branch of guidance; by default that in training, or 1"""
    tolerance: float = TOLERANCE
    """tolerance of the jacobi decoder"""
    batches: tuple[int, ...] = calibration.BATCHES
    """numbers of images that are decoded at a time"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """number format of the transformers"""
    device: str = "auto"


def run(arguments: Sequence[str]) -> None:
    """Print the timings and write them beside the weights."""
    command, _ = parse(Calibrate, arguments)
    if not command.batches or min(command.batches) < 1:
        raise ValueError(f"batches: expected positive numbers; got {command.batches}")
    if command.guidance is not None:
        check_guidance_weight(command.guidance)
    check_writable("run", command.run)
    check_tolerance(Decoder("jacobi", tolerance=command.tolerance))
    model, metadata = load_model(command.run, command.device)
    if model.decoders == ("auto",):
        kind = type(model).__name__
        raise ValueError(f"run: expected a TarFlow, whose decoders there are to time; {command.run} holds a {kind}")
    guidance = _guidance(command, model, metadata)
    largest = max(command.batches)
    hardware.check_memory(largest * model.config.decoding_bytes(), model.device, f"batches of {largest}")
    print("rows  block  decoder              passes    seconds")

    def show(timing: calibration.Timing) -> None:
        decoder = Decoder(timing.decoder, timing.window)
        print(
            f"{timing.rows:4}  {timing.block + 1:5}  {decoder!s:20} {timing.passes:6} {timing.seconds:10.4f}",
            flush=True,
        )

    with autocast(model, command.precision, command.run):
        timings = calibration.calibrate(
            cast(TokenFlow, model.flow),
            guidance,
            command.tolerance,
            command.batches,
            show,
            noise_level=model.noise_levels and model.noise_levels[1],  # that at which samples are drawn
        )
    calibration.save(command.run, timings)
    print(f"wrote {command.run / calibration.FILE}")


def _guidance(command: Calibrate, model: ImageFlow, metadata: dict[str, Any]) -> Guidance:
    """The guidance of the flags, or else that of the samples in training; ValueError where it can have no effect."""
    if metadata.get("train"):
        guidance = read_run(command.run).sample_guidance or Guidance(0.0)
    else:
        guidance = Guidance(2.0 if model.config.num_classes else 0.0)
    guidance = replace(
        guidance,
        weight=guidance.weight if command.guidance is None else command.guidance,
        temperature=guidance.temperature if command.temperature is None else command.temperature,
    )
    guidance.check(model.config.num_classes)
    return guidance
