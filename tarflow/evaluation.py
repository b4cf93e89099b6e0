"""Scores of a model: bounds on bits/dim, the density of noisy data, and classification by Bayes' rule.

A model is scored without dropout, in whichever mode it is.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .image_flow import ImageFlow, in_mode, log_mean_exp
from .model import TarFlow
from .noise import add_gaussian_noise
from .noise import bits_per_dim as to_bits_per_dim


@dataclass(frozen=True)
class Estimate:
    """A mean over images and its standard error."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: Tensor) -> "Estimate":
        """From one value per image, ``(B,)``."""
        values = values.double()
        error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(values.mean().item(), error)

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.standard_error:.4f}"


def bits_per_dim(
    model: ImageFlow,
    pixels: Tensor,
    labels: Tensor | None = None,
    draws: int = 1,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Bits/dim of 8-bit images, importance-weighted: the second number of :func:`bits_per_dim_of_images`."""
    _, weighted = bits_per_dim_of_images(model, pixels, labels, draws, batch_size, generator)
    return Estimate.of(weighted)


def bits_per_dim_of_images(
    model: ImageFlow,
    pixels: Tensor,
    labels: Tensor | None = None,
    draws: int = 1,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Two upper bounds on the bits/dim of each image, under the model's own dequantization, uniform or variational.

    With ``w_k = p(x + u_k) / q(u_k | x)`` for K draws u_k of noise: ``-mean_k log2 w_k / n``, the evidence lower bound,
    which takes one sample and has K for less variance; and ``-log2 (mean_k w_k) / n``, which falls to the exact number
    as K grows.

    Args:
        model: scored in float32, whatever autocast is in force.
        pixels: uint8 ``(B, C, H, W)``.
        labels: int64 ``(B,)``, or None for an unconditional model.
        draws: K.
        batch_size: images scored at a time.
        generator: of the noise, on the device of the model.

    Returns:
        both, one number an image, ``(B,)``, float64.
    """

    def score(pixels: Tensor, labels: Tensor | None) -> Tensor:
        bounds = model.importance_log_weights(pixels, labels, draws, generator)
        both = torch.stack((bounds.mean(0), log_mean_exp(bounds)), dim=1)
        return -both / (model.config.num_dims * math.log(2))

    one_sample, weighted = _map(model, score, pixels, labels, batch_size).unbind(1)
    return one_sample, weighted


def noisy_bits_per_dim(
    model: ImageFlow,
    pixels: Tensor,
    labels: Tensor | None = None,
    sigma: float = 0.0,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> Estimate:
    """``-log2`` of the density of images with Gaussian noise of standard deviation sigma, per dimension, plus 7.

    It is what training minimizes, in the units of bits/dim, but no code length of 8-bit images: comparable only between
    models of the same sigma. Arguments are those of :func:`bits_per_dim`.
    """

    def score(pixels: Tensor, labels: Tensor | None) -> Tensor:
        x = add_gaussian_noise(pixels, sigma, generator).to(model.dtype)
        return to_bits_per_dim(model.log_prob(x, labels), model.config.num_dims)

    return Estimate.of(_map(model, score, pixels, labels, batch_size))


@torch.no_grad()
def class_log_posterior(model: TarFlow, x: Tensor) -> Tensor:
    """Bayes' rule under a uniform prior over classes: ``log p(y | x) = log p(x | y) - log sum_y' p(x | y')``.

    Args:
        model: class-conditional.
        x: images with the noise of training, float ``(B, C, H, W)``.

    Returns:
        ``(B, num_classes)`` in nats; its argmax classifies.
    """
    classes = model.config.num_classes
    if not classes:
        raise ValueError("model: expected a class-conditional model; got one with num_classes=0")
    labels = torch.arange(classes, device=x.device)
    log_likelihoods = [model.log_prob(x, label.expand(len(x))) for label in labels]
    return torch.stack(log_likelihoods, dim=1).log_softmax(dim=1)


def accuracy(
    model: TarFlow,
    pixels: Tensor,
    labels: Tensor,
    sigma: float = 0.0,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Share of images that Bayes' rule classifies as labelled, given the noise of training (sigma 0: uniform)."""

    def score(pixels: Tensor, labels: Tensor) -> Tensor:
        x = add_gaussian_noise(pixels, sigma, generator) if sigma else model.dequantize(pixels, generator)[0]
        return (class_log_posterior(model, x.to(model.dtype)).argmax(1) == labels).float()

    return Estimate.of(_map(model, score, pixels, labels, batch_size))


def evaluate(
    model: ImageFlow, pixels: Tensor, labels: Tensor, sigma: float, draws: int = 4, batch_size: int = 64, seed: int = 0
) -> dict[str, Estimate]:
    """All scores that make sense for a model trained with Gaussian noise of sigma, or, where 0, with noise in bins."""
    generator = torch.Generator(model.device).manual_seed(seed)
    options = {"batch_size": batch_size, "generator": generator}
    conditions = labels if model.config.num_classes else None
    scores = {}
    if sigma:
        name = f"bits/dim of images with Gaussian noise of sigma {sigma:g} (a density, comparable at equal sigma only)"
        scores[name] = noisy_bits_per_dim(model, pixels, conditions, sigma, **options)
    noise = "uniform" if model.dequantizer is None else "variational"
    unseen = " (the model never saw such noise)" if sigma else ""
    one_sample, weighted = bits_per_dim_of_images(model, pixels, conditions, draws, **options)
    name = f"bits/dim of 8-bit images, {noise} dequantization"
    scores[f"{name}, one sample (the mean over {draws})" + unseen] = Estimate.of(one_sample)
    scores[f"{name}, {draws} importance-weighted draws" + unseen] = Estimate.of(weighted)
    if model.config.num_classes:
        scores["accuracy of classification by Bayes' rule"] = accuracy(model, pixels, labels, sigma, **options)
    return scores


@torch.no_grad()
def _map(
    model: ImageFlow, score: Callable[..., Tensor], pixels: Tensor, labels: Tensor | None, batch_size: int
) -> Tensor:
    """The scores of all images, batch by batch, in float32 and without dropout, on the device of the model."""
    device = model.device
    with torch.autocast(device.type, enabled=False), in_mode(model, training=False):
        return torch.cat([score(*batch).cpu() for batch in _batches(pixels, labels, batch_size, device)])


def _batches(
    pixels: Tensor, labels: Tensor | None, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, len(pixels), batch_size):
        chunk = slice(start, start + batch_size)
        yield pixels[chunk].to(device), None if labels is None else labels[chunk].to(device)
