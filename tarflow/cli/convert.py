"""``tarflow convert``: read a published checkpoint, write a folder that the other commands read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..published import load_published
from ..validation import NoiseLevels, check_sigma
from .parsing import parse
from .shared import check_new_folder

__all__ = ["Convert", "run"]


@dataclass(frozen=True)
class Convert:
    """Convert a checkpoint of the paper's code (.pth) to a folder that all commands and from_pretrained read."""

    checkpoint: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    in_channels: int | None = None
    """channels of the images, which the weights do not tell: by default 3, or of a STARFlow all values of a token"""
    sigma: float = 0.0
    """standard deviation of the noise in training, the last number in the name of a published TarFlow"""
    noise_levels: NoiseLevels = None
    """smallest and largest noise in the training of an iTarFlow; by default the published ones of its image size"""


def run(arguments: Sequence[str]) -> None:
    """Convert a checkpoint."""
    command, _ = parse(Convert, arguments)
    check_sigma("sigma", command.sigma)
    check_new_folder("out", command.out)
    if (command.out / "config.json").exists():
        raise FileExistsError(f"out: {command.out} already holds a model; choose another folder")
    model = load_published(command.checkpoint, command.in_channels, noise_levels=command.noise_levels)
    if model.noise_levels and command.sigma:
        raise ValueError(f"sigma: expected none for an iTarFlow, which has noise levels; got {command.sigma}")
    sigma = model.noise_levels[1] if model.noise_levels else command.sigma
    model.save_pretrained(command.out, sigma=sigma)
    print(f"wrote {command.out}: {model.config}")
