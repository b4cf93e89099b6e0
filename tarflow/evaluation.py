"""Scores of a model: bounds on bits/dim, the density of noisy data, and classification by Bayes' rule.

A model is scored without dropout, whether it is in training or in evaluation mode, and in float32, whatever autocast is
in force. These arguments are the same for every score:

    model        any flow over images
    pixels       8-bit images, uint8 (B, C, H, W)
    labels       int64 (B,), or None for an unconditional model
    batch_size   images scored at a time
    generator    source of the noise, on the device of the model
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from . import processes
from .compatibility import renamed_arguments, renamed_attributes
from .image_flow import ImageFlow, in_mode, log_mean_exp
from .noise import add_gaussian_noise, derive_seed, levels_per_unit
from .noise import bits_per_dim as to_bits_per_dim

__all__ = [
    "Estimate",
    "accuracy",
    "bits_per_dim",
    "class_log_likelihoods",
    "class_log_posterior",
    "dequantized_bits_per_dim",
    "evaluate",
    "evaluate_batches",
    "noisy_bits_per_dim",
]


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its standard error."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: Tensor) -> "Estimate":
        """Average one value per image, ``(B,)``."""
        values = values.double()
        error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(values.mean().item(), error)

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.standard_error:.4f}"


@renamed_arguments(draws="num_samples")
def evaluate(
    model: ImageFlow,
    pixels: Tensor,
    labels: Tensor,
    sigma: float,
    num_samples: int = 4,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Compute all scores that make sense for a model trained with Gaussian noise of sigma, or, for 0, noise in bins.

    A model with noise levels is one of noisy images alone: its bits/dim are those at its smallest and largest level,
    and it classifies images with noise of sigma.
    """
    batches = zip(pixels.split(batch_size), labels.split(batch_size), strict=True)
    own = islice(batches, processes.rank(), None, processes.num_ranks())
    return evaluate_batches(model, own, sigma, num_samples, seed)


def evaluate_batches(
    model: ImageFlow, batches: Iterable[tuple[Tensor, Tensor]], sigma: float, num_samples: int = 4, seed: int = 0
) -> dict[str, Estimate]:
    """Compute the scores of :func:`evaluate` of images in batches, of several processes the share of each.

    The noise of a batch depends on (seed, number of the batch), so that the scores are the same for any number of
    processes.

    Args:
        model, sigma, num_samples, seed: as in :func:`evaluate`.
        batches: (pixels, labels) of this process, which has every ``num_ranks()``-th batch from ``rank()`` on.

    Returns:
        the scores of the images of all processes.

    Raises:
        ValueError: there are no images.
    """
    generator, parts = Generator(model.device), []
    with processes.together():
        for place, batch in enumerate(batches):
            number = processes.rank() + place * processes.num_ranks()
            generator.manual_seed(derive_seed(seed, number))
            if len(batch[0]):
                parts.append(_all_scores(model, *batch, sigma, num_samples, generator))
    parts = processes.in_turn(parts)
    if not parts:
        raise ValueError("pixels: expected at least one image to score; got none")
    return {name: Estimate.of(torch.cat([part[name] for part in parts])) for name in parts[0]}


def _all_scores(
    model: ImageFlow, pixels: Tensor, labels: Tensor, sigma: float, num_samples: int, generator: Generator
) -> dict[str, Tensor]:
    """Compute the scores of a batch, one number an image, ``(B,)``."""
    conditions, size, scores = labels if model.config.num_classes else None, len(pixels), {}
    check_scored_noise(model, pixels, sigma)
    kind = "latents" if pixels.is_floating_point() else "images"
    for level in model.noise_levels or ([sigma] if sigma else []):
        name = f"bits/dim of {kind} with Gaussian noise of sigma {level:g} (a density, comparable at equal sigma only)"
        scores[name] = _noisy_bits(model, pixels, conditions, level, size, generator)
    if model.noise_levels is None and kind == "images":
        one_sample, weighted = dequantized_bits_per_dim(model, pixels, conditions, num_samples, size, generator)
        noise = "uniform" if model.dequantizer is None else "variational"
        name = f"bits/dim of 8-bit images, {noise} dequantization"
        unseen = " (the model never saw such noise)" if sigma else ""
        scores[f"{name}, one sample (the mean over {num_samples})" + unseen] = one_sample
        scores[f"{name}, {num_samples} importance-weighted draws" + unseen] = weighted
    if model.config.num_classes:
        scores["accuracy of classification by Bayes' rule"] = _hits(model, pixels, labels, sigma, size, generator)
    return scores


def check_scored_noise(model: ImageFlow, pixels: Tensor, sigma: float) -> None:
    """Raise ValueError for latents without the noise under which a model scores them: they fill no bins."""
    if pixels.is_floating_point() and not sigma and model.noise_levels is None:
        raise ValueError(f"sigma: expected that of training, more than 0, to score latents; got {sigma:g}")


@renamed_arguments(draws="num_samples")
def bits_per_dim(
    model: ImageFlow,
    pixels: Tensor,
    labels: Tensor | None = None,
    num_samples: int = 1,
    batch_size: int = 64,
    generator: Generator | None = None,
) -> Estimate:
    """Average the importance-weighted bound of :func:`dequantized_bits_per_dim` over images."""
    _, weighted = dequantized_bits_per_dim(model, pixels, labels, num_samples, batch_size, generator)
    return Estimate.of(weighted)


@renamed_arguments(draws="num_samples")
def dequantized_bits_per_dim(
    model: ImageFlow,
    pixels: Tensor,
    labels: Tensor | None = None,
    num_samples: int = 1,
    batch_size: int = 64,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Bound the bits/dim of each 8-bit image from above, under the model's own dequantization.

    With importance weights ``w_k = p(x + u_k) / q(u_k | x)`` for K samples u_k of noise, there are two bounds:
    ``-mean_k log2 w_k / n``, the evidence lower bound, that of one sample with the variance of K; and
    ``-log2 (mean_k w_k) / n``, which falls to the exact number as K, ``num_samples``, grows.

    Returns:
        the two bounds, one number an image, ``(B,)``, float64.
    """

    def score(pixels: Tensor, labels: Tensor | None) -> Tensor:
        log_weights = model.importance_log_weights(pixels, labels, num_samples, generator)
        bounds = torch.stack((log_weights.mean(0), log_mean_exp(log_weights)), dim=1)
        return -bounds / (model.config.num_dims * math.log(2))

    one_sample, weighted = _score_batches(model, score, pixels, labels, batch_size).unbind(1)
    return one_sample, weighted


def noisy_bits_per_dim(
    model: ImageFlow,
    pixels: Tensor,
    labels: Tensor | None = None,
    sigma: float = 0.0,
    batch_size: int = 64,
    generator: Generator | None = None,
) -> Estimate:
    """Average ``-log2 p / n + 7`` for the density p of images with Gaussian noise of standard deviation sigma.

    Training with such noise minimizes it. In spite of its unit, bits/dim, it is no code length of 8-bit images, and
    comparable only between models of the same sigma. Of a model with noise levels it is the density of that level. Of
    latents, which are not scaled from 256 levels, it is ``-log2 p / n``.
    """
    return Estimate.of(_noisy_bits(model, pixels, labels, sigma, batch_size, generator))


def _noisy_bits(
    model: ImageFlow, pixels: Tensor, labels: Tensor | None, sigma: float, batch_size: int, generator: Generator | None
) -> Tensor:
    def score(pixels: Tensor, labels: Tensor | None) -> Tensor:
        x = add_gaussian_noise(pixels, sigma, generator).to(model.dtype)
        level = sigma if model.noise_levels else None
        log_prob = model.log_prob(x, labels, noise_level=level)
        return to_bits_per_dim(log_prob, model.config.num_dims, levels_per_unit(pixels))

    return _score_batches(model, score, pixels, labels, batch_size)


def accuracy(
    model: ImageFlow,
    pixels: Tensor,
    labels: Tensor,
    sigma: float = 0.0,
    batch_size: int = 64,
    generator: Generator | None = None,
) -> Estimate:
    """Average how often Bayes' rule finds the label of an image, given the noise of training (for sigma 0, in bins)."""
    return Estimate.of(_hits(model, pixels, labels, sigma, batch_size, generator))


def _hits(
    model: ImageFlow, pixels: Tensor, labels: Tensor, sigma: float, batch_size: int, generator: Generator | None
) -> Tensor:
    def score(pixels: Tensor, labels: Tensor) -> Tensor:
        x = add_gaussian_noise(pixels, sigma, generator) if sigma else model.dequantize(pixels, generator)[0]
        level = sigma if model.noise_levels else None
        return (class_log_posterior(model, x.to(model.dtype), level).argmax(1) == labels).float()

    return _score_batches(model, score, pixels, labels, batch_size)


@torch.no_grad()
def class_log_likelihoods(model: ImageFlow, x: Tensor, noise_level: float | None = None) -> Tensor:
    """Return ``log p(x | y)`` of every class y, ``(B, num_classes)``, in nats.

    Arguments and errors are those of :func:`class_log_posterior`.
    """
    classes = model.config.num_classes
    if not classes:
        raise ValueError("model: expected a class-conditional model; got one with num_classes=0")
    labels = torch.arange(classes, device=x.device)
    log_likelihoods = [model.log_prob(x, label.expand(len(x)), noise_level=noise_level) for label in labels]
    return torch.stack(log_likelihoods, dim=1)


def class_log_posterior(model: ImageFlow, x: Tensor, noise_level: float | None = None) -> Tensor:
    """Apply Bayes' rule under a uniform prior: ``log p(y | x) = log p(x | y) - log sum_y' p(x | y')``.

    Args:
        model: a class-conditional model.
        x: images with the noise of training, float ``(B, C, H, W)``.
        noise_level: that of the images, for a model with noise levels.

    Returns:
        ``(B, num_classes)`` in nats; its argmax classifies.

    Raises:
        ValueError: the model has no classes.
    """
    return class_log_likelihoods(model, x, noise_level).log_softmax(dim=1)


@torch.no_grad()
def _score_batches(
    model: ImageFlow, score: Callable[..., Tensor], pixels: Tensor, labels: Tensor | None, batch_size: int
) -> Tensor:
    """Score all images, batch by batch, on the device of the model, in float32 and without dropout."""
    device, scores = model.device, []
    with torch.autocast(device.type, enabled=False), in_mode(model, training=False):
        for start in range(0, len(pixels), batch_size):
            batch = slice(start, start + batch_size)
            batch_labels = None if labels is None else labels[batch].to(device)
            scores.append(score(pixels[batch].to(device), batch_labels).cpu())
    return torch.cat(scores)


if not TYPE_CHECKING:
    __getattr__ = renamed_attributes(globals(), bits_per_dim_of_images="dequantized_bits_per_dim")
