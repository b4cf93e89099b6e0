"""``tarflow statistics``: compute what samples are compared with, once for many runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from .. import datasets, processes
from ..features import load_extractor
from ..image_flow import at_least_one
from ..reference import Reference
from .parsing import parse
from .shared import check_file, check_resize, check_seed

__all__ = ["Statistics", "run"]


@dataclass(frozen=True)
class Statistics:
    """Write the statistics of a dataset's features, for `tarflow evaluate --samples --statistics`."""

    dataset: tyro.conf.Positional[str]
    """its name, as `tarflow train --dataset` takes it"""
    out: Path
    """the file, of safetensors"""
    split: Literal["train", "test"] = "train"
    """the split, in published protocols that of training"""
    data_dir: Path | None = None
    """folder with its files"""
    image_size: int | None = None
    """side to which a folder's images are resized and cropped"""
    resize: datasets.Resize | None = None
    """filter that resizes the images of a folder, by default lanczos"""
    flip: bool | None = None
    """whether half of the images are mirrored; None where a mirrored image of the dataset means the same"""
    weights: Path | None = None
    """weights of torch-fidelity's Inception; without them the features are those of a classifier of Fashion-MNIST"""
    batch_size: int = 64
    seed: int = 0
    device: str = "auto"


def run(arguments: Sequence[str]) -> None:
    """Compute the statistics of all images, and write them."""
    command, _ = parse(Statistics, arguments)
    check_file("out", command.out)
    check_resize(command.dataset, command.resize)
    if command.dataset == "latents":
        raise ValueError("dataset: expected images, whose features are compared; got latents")
    check_seed(command.seed)
    batch_size = at_least_one("batch_size", command.batch_size)
    with processes.connected(command.device):
        with processes.together():
            dataset = datasets.load(
                command.dataset, command.split, command.data_dir, command.image_size, command.resize or "lanczos"
            )
            extractor = load_extractor(command.weights, dataset.class_names, processes.pick_device(command.device))
        flip = dataset.flip if command.flip is None else command.flip
        reference = Reference.of(dataset, extractor, flip, batch_size, command.seed)
        processes.by_main(lambda: _write(reference, command.out))


def _write(reference: Reference, out: Path) -> None:
    reference.save(out)
    for name, value in reference.about.items():
        print(f"{name.replace('_', ' '):18} {value}")
    print(f"wrote {out}")
