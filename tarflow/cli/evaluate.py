"""``tarflow evaluate``: score a trained model on test images and, if asked to, its samples."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from .. import datasets, evaluation, hardware, processes
from ..datasets import ImageDataset, ImageFolder
from ..denoising import Denoising
from ..encoders import Autoencoder
from ..features import Extractor, load_extractor
from ..files import atomic_write
from ..image_flow import ImageFlow, at_least_one
from ..pretrained import weights_digest
from ..reference import LEAST_IMAGES, Reference
from ..samples import LABELS, QUANTIZATION, Protocol, Sampler, distance_range, draw_labels, score_samples
from ..training.config import MAX_IMPORTANCE_SAMPLES, DataConfig
from ..training.folder import check_scored, read_data
from .drawing import Drawing, Progress
from .parsing import Flat, fields_of, parse
from .shared import autocast, check_image_channels, check_resize, check_seed, check_writable, load_model

__all__ = ["Evaluate", "run"]


@dataclass(frozen=True)
class Evaluate:
    """Score a trained model: bits/dim and classification of test images and, with `--samples`, how samples look."""

    run: tyro.conf.Positional[Path]
    """folder of a run"""
    num_images: int = 1000
    """test images to score, evenly spread over the split"""
    importance_samples: int = 4
    """importance-weighted samples of dequantization noise for each image"""
    samples: int = 0
    """samples to draw and to compare with training images; 0 for none"""
    protocol: Protocol = "tarflow"
    """tarflow, as published (labels drawn uniformly, truncated to 8 bits), or balanced (labels in turn, rounded)"""
    statistics: Path | None = None
    """file of `tarflow statistics` to compare samples with; by default those of the training images are computed"""
    weights: Path | None = None
    """weights of torch-fidelity's Inception; without them the features are those of a classifier of Fashion-MNIST"""
    drawing: Flat[Drawing] = Drawing()  # noqa: RUF009 (it is frozen)
    batch_size: int = 64
    """images that are scored, and samples that are drawn, at a time"""
    dataset: str | None = None
    """dataset of the images; by default that of training"""
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
    command, flags = parse(Evaluate, arguments)
    _check(command, flags)
    with processes.connected(command.device):
        processes.check_same("settings", str(command))
        with processes.together():
            model, metadata = load_model(command.run, str(processes.pick_device(command.device)))
            trained = read_data(command.run, metadata)
            dataset = _load_images(command, trained, "test")
            _check_images(dataset, model, metadata.get("sigma", 0.0))
        chosen = command.dataset is not None or command.data_dir is not None or command.image_size is not None
        processes.by_main(lambda: check_scored(metadata.get("data"), dataset, chosen))
        settings = asdict(command)
        record: dict[str, Any] = {"data": dataset.source, "weights": weights_digest(command.run), "settings": settings}
        if command.samples:
            with processes.together():
                command.drawing.check_usable(fields_of(flags), model)
                autoencoder = Autoencoder.of(metadata, model.device)
                check_image_channels(model, autoencoder)
                extractor = load_extractor(command.weights, dataset.class_names, model.device)
            reference = _reference(command, trained, extractor)
            record["samples"] = _score_samples(command, model, metadata, autoencoder, extractor, reference)
        scores = _score_images(command, model, metadata, dataset)
        record["scores"] = {name: asdict(estimate) for name, estimate in scores.items()}
        processes.by_main(lambda: _write(record, command.run / "evaluation.json"))


def _check_images(dataset: ImageDataset | ImageFolder, model: ImageFlow, sigma: float) -> None:
    """Raise ValueError for images that the model cannot score."""
    if isinstance(dataset, ImageDataset):
        evaluation.check_scored_noise(model, dataset.images, sigma)
    if model.config.num_classes and not dataset.num_classes:
        raise ValueError(f"dataset: expected labels for a model that is conditional on them; got {dataset.source}")
    if (shape := (dataset.in_channels, *[dataset.image_size] * 2)) != model.config.image_shape:
        raise ValueError(f"dataset: expected images of shape {model.config.image_shape}; got {shape}: {dataset.source}")


def _write(record: dict[str, Any], path: Path) -> None:
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(record, indent=2, default=str))


def _score_images(
    command: Evaluate, model: ImageFlow, metadata: dict[str, Any], dataset: ImageDataset | ImageFolder
) -> dict[str, evaluation.Estimate]:
    """Score test images, of several processes each its share, and print the scores."""
    indices = datasets.evenly_spaced(len(dataset), command.num_images)
    own = indices.split(command.batch_size)[processes.rank() :: processes.num_ranks()]
    with contextlib.closing(datasets.read(dataset, own, processes.num_readers())) as batches:
        sigma = metadata.get("sigma", 0.0)
        scores = evaluation.evaluate_batches(model, batches, sigma, command.importance_samples, command.seed)
    if processes.is_main():
        print(f"{dataset.source}; {len(indices):,} of them, mean ± standard error over images")
        for name, estimate in scores.items():
            print(f"{estimate}   {name}")
    return scores


def _check(command: Evaluate, flags: Mapping[str, str]) -> None:
    """Raise ValueError or OSError for what no model can be asked for, before one is read."""
    at_least_one("num_images", command.num_images)
    at_least_one("importance_samples", command.importance_samples)
    at_least_one("batch_size", command.batch_size)
    if command.importance_samples > MAX_IMPORTANCE_SAMPLES:
        most, got = MAX_IMPORTANCE_SAMPLES, command.importance_samples
        raise ValueError(f"importance_samples: expected at most {most}; got {got}")
    check_seed(command.seed)
    _check_samples(command, flags)
    check_writable("run", command.run)


def _check_samples(command: Evaluate, flags: Mapping[str, str]) -> None:
    """Raise ValueError for a number of samples that cannot be scored, and for flags of samples where there are none."""
    if command.samples and command.samples < LEAST_IMAGES:
        raise ValueError(f"samples: expected at least {LEAST_IMAGES}, or 0 for none; got {command.samples}")
    hardware.check_memory(16 * command.samples, torch.device("cpu"), f"samples = {command.samples}")  # their labels
    of_samples = {"protocol", "statistics", "weights", *(field.name for field in fields(Drawing))}
    for flag, argument in flags.items():
        (name,) = fields_of([flag])
        if name in of_samples and not command.samples:
            raise ValueError(f"{name}: expected with --samples alone, which has a use for it; got {argument}")
    command.drawing.check(fields_of(flags))
    command.drawing.make_decoder()
    command.drawing.make_guidance()


def _load_images(command: Evaluate, trained: DataConfig, split: str) -> ImageDataset | ImageFolder:
    """Load the images of the flags, or else of the data of training."""
    name = trained.dataset if command.dataset is None else command.dataset
    check_resize(name, command.resize)
    return datasets.load(
        name,
        split,
        command.data_dir or trained.data_dir,
        trained.image_size if command.image_size is None else command.image_size,
        command.resize or trained.resize,
    )


def _reference(command: Evaluate, trained: DataConfig, extractor: Extractor) -> Reference:
    """Read the statistics of the flags, or else compute those of the training images, mirrored as in training."""
    with processes.together():
        if command.statistics is not None:
            return Reference.load(command.statistics, extractor)
        if trained.dataset == "latents" and command.dataset is None:
            raise ValueError("statistics: expected those of images, which `tarflow statistics` writes; got None")
        dataset = _load_images(command, trained, "train")
    flip = dataset.flip if trained.flip is None else trained.flip
    return Reference.of(dataset, extractor, flip, command.batch_size, command.seed)


def _score_samples(
    command: Evaluate,
    model: ImageFlow,
    metadata: dict[str, Any],
    autoencoder: Autoencoder | None,
    extractor: Extractor,
    reference: Reference,
) -> dict[str, Any]:
    """Draw samples, print their scores with the protocol of these, and return both."""
    drawing, num, config = command.drawing, command.samples, model.config
    decoder, guidance, sigma = drawing.make_decoder(), drawing.make_guidance(), drawing.denoise_sigma(metadata)
    denoising = drawing.make_denoising(metadata) if model.supports_guidance else None
    generator = torch.Generator(model.device)
    labels = draw_labels(command.protocol, num, config.num_classes, command.seed)
    share = sum(map(len, torch.arange(num).split(command.batch_size)[:: processes.num_ranks()]))  # the main one's
    with Progress(share, len(model.stages), shown=processes.is_main()) as progress:

        def draw(num: int, labels: Tensor | None) -> Tensor:
            with autocast(model, drawing.precision, command.run):
                drawn = model.sample(
                    num, labels, guidance, sigma, decoder, generator, progress=progress.note, denoising=denoising
                )
            assert isinstance(drawn, Tensor)
            return drawn if autoencoder is None else autoencoder.decode(drawn)

        sampler = Sampler(draw, QUANTIZATION[command.protocol], generator, command.seed)
        batches = sampler.batches(num, labels, command.batch_size)
        scores = score_samples(batches, extractor, reference, command.seed)
    shape = config.image_shape if autoencoder is None else autoencoder.image_shape(config.image_shape)
    scores |= distance_range(num, shape, extractor, reference, command.seed)
    protocol = {
        "protocol": command.protocol,
        "samples": num,
        "not finite, drawn anew": int(processes.total(torch.tensor(sampler.not_finite))),
        "labels": f"{LABELS[command.protocol]} from {config.num_classes} classes" if config.num_classes else "none",
        "quantization": sampler.quantization,
        "guidance": None if guidance is None else asdict(guidance),
        "denoising": _denoising(model, sigma, denoising) if sigma else "none",
        "decoder": str(decoder),
        "precision": drawing.precision,
        "batch size": command.batch_size,
        "seed": command.seed,
        "device": str(model.device) if processes.num_ranks() == 1 else f"{processes.num_ranks()} x {model.device.type}",
        "features": f"{extractor.name}, weights of SHA-256 {extractor.digest}",
        "resize": extractor.resize,
        "reference": reference.about,
        "versions": {name: version(name) for name in ("tarflow", "torch")},
    }
    if processes.is_main():
        for name, value in protocol.items():
            print(f"{name:22} {value}")
        for name, score in scores.items():
            print(f"{score:.4g}   {name}")
    return {"protocol": protocol, "scores": scores}


def _denoising(model: ImageFlow, sigma: float, denoising: Denoising | None) -> str:
    """Describe how noise is removed, such as ``Tweedie at sigma 0.1, 0.1`` for two steps."""
    levels = ", ".join(f"{level:g}" for level in model.denoising_levels(sigma, denoising)[:-1])
    ways = [way for way in ("stochastic", "clip") if getattr(denoising, way, False)]
    return "; ".join([f"Tweedie at sigma {levels}", *ways])
