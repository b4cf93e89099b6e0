"""``tarflow evaluate``: score a trained model on test images."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from .. import datasets, evaluation
from ..files import atomic_write
from ..image_flow import at_least_one
from ..training.config import MAX_IMPORTANCE_SAMPLES, DataConfig
from ..training.folder import check_scored, read_data
from .parsing import parse
from .shared import check_seed, check_writable, load_model

__all__ = ["Evaluate", "run"]


@dataclass(frozen=True)
class Evaluate:
    """Score a trained model on test images: bits/dim, and accuracy of classification by Bayes' rule."""

    run: tyro.conf.Positional[Path]
    """folder of a run"""
    num_images: int = 1000
    """test images to score, evenly spread over the split"""
    importance_samples: int = 4
    """importance-weighted samples of dequantization noise for each image"""
    batch_size: int = 64
    dataset: str | None = None
    """dataset of the test images; by default that of training"""
    data_dir: Path | None = None
    """folder with its files; by default that of training"""
    image_size: int | None = None
    """side to which a folder's images are resized and cropped; by default that of training"""
    resize: datasets.Resize | None = None
    """filter that resizes the images of a folder; by default that of training"""
    seed: int = 0
    device: str = "auto"


def run(arguments: Sequence[str]) -> None:
    """Print the scores and write them to ``evaluation.json`` in the run's folder."""
    command, _ = parse(Evaluate, arguments)
    _check(command)
    model, metadata = load_model(command.run, command.device)
    dataset = _load_test_images(command, read_data(command.run, metadata))
    if model.config.num_classes and not dataset.num_classes:
        raise ValueError(f"dataset: expected labels for a model that is conditional on them; got {dataset.source}")
    if (shape := (dataset.in_channels, *[dataset.image_size] * 2)) != model.config.image_shape:
        raise ValueError(f"dataset: expected images of shape {model.config.image_shape}; got {shape}: {dataset.source}")
    chosen = command.dataset is not None or command.data_dir is not None or command.image_size is not None
    check_scored(metadata.get("data"), dataset, chosen)
    scores = evaluation.evaluate(
        model,
        *dataset.get_batch(datasets.evenly_spaced(len(dataset), command.num_images)),
        sigma=metadata.get("sigma", 0.0),
        num_samples=command.importance_samples,
        batch_size=command.batch_size,
        seed=command.seed,
    )
    print(f"{dataset.source}; {min(command.num_images, len(dataset)):,} of them, mean ± standard error over images")
    for name, estimate in scores.items():
        print(f"{estimate}   {name}")
    rows = {name: asdict(estimate) for name, estimate in scores.items()}
    record = {"data": dataset.source, "settings": asdict(command), "scores": rows}
    with atomic_write(command.run / "evaluation.json") as path:
        path.write_text(json.dumps(record, indent=2, default=str))


def _check(command: Evaluate) -> None:
    """Raise ValueError or OSError for what no model can be asked for, before one is read."""
    at_least_one("num_images", command.num_images)
    at_least_one("importance_samples", command.importance_samples)
    at_least_one("batch_size", command.batch_size)
    if command.importance_samples > MAX_IMPORTANCE_SAMPLES:
        most, got = MAX_IMPORTANCE_SAMPLES, command.importance_samples
        raise ValueError(f"importance_samples: expected at most {most}; got {got}")
    check_seed(command.seed)
    check_writable("run", command.run)


def _load_test_images(command: Evaluate, trained: DataConfig) -> datasets.ImageDataset | datasets.ImageFolder:
    """The test images of the flags, or else of the data of training."""
    name = trained.dataset if command.dataset is None else command.dataset
    if command.resize and not name.startswith(("folder", "hub:")):
        raise ValueError(
            f"resize: expected with a folder or a hub alone, whose images are resized; got {command.resize}"
        )
    return datasets.load(
        name,
        "test",
        command.data_dir or trained.data_dir,
        trained.image_size if command.image_size is None else command.image_size,
        command.resize or trained.resize,
    )
