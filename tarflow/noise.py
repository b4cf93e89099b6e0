"""Noise that makes 8-bit pixels continuous, and bits/dim, which count what it costs.

Three kinds of noise. *Uniform* noise spreads each pixel over its bin, so that the density of the model is a bound on
the probability of the 8-bit image, and bits/dim can be compared between models. *Variational* noise does so as well, in
whatever way a conditional flow has learned (:mod:`tarflow.flowpp.dequantizer`). *Gaussian* noise of a standard
deviation sigma well beyond a bin makes better samples (they are denoised afterwards), but the density is that of noisy
data: its bits/dim compare with nothing but themselves.

The first two put a pixel p anywhere in a bin, and Gaussian noise lies around a point, so that samples become 8-bit
pixels in different ways: :func:`to_pixels`.
"""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Quantization",
    "add_gaussian_noise",
    "add_uniform_noise",
    "bits_per_dim",
    "derive_seed",
    "levels_per_unit",
    "log_normal",
    "quantization",
    "to_image",
    "to_pixels",
]


def add_gaussian_noise(
    pixels: Tensor, sigma: float | Tensor, generator: torch.Generator | None = None, eps: Tensor | None = None
) -> Tensor:
    """Return ``pixels / 127.5 - 1 + sigma * eps``: uint8 (B, C, H, W) to float32; unless given, eps ~ N(0, 1).

    Latents, which are floating-point, are taken as they are. The standard deviation sigma is one for all images, or one
    for each, ``(B, 1, 1, 1)``.
    """
    x = pixels if pixels.is_floating_point() else pixels.float() / 127.5 - 1
    return x + sigma * (torch.randn(x.shape, generator=generator, device=x.device) if eps is None else eps)


def add_uniform_noise(pixels: Tensor, generator: torch.Generator | None = None, u: Tensor | None = None) -> Tensor:
    """Return ``2 (pixels + u) / 256 - 1``: uint8 (B, C, H, W) to float32 in [-1, 1); unless given, u ~ U[0, 1)."""
    u = torch.rand(pixels.shape, generator=generator, device=pixels.device) if u is None else u
    # Added to a pixel, u keeps 16 bits in float32; rounding up at the end of a bin would lead into the next bin.
    u = (u * 2**16).floor() / 2**16
    return to_image(pixels, u)


def to_image(pixels: Tensor, u: Tensor) -> Tensor:
    """Return ``(pixels + u) / 128 - 1``: 8-bit pixels and positions u in their bins [0, 1], mapped to [-1, 1]."""
    return (pixels + u) / 128 - 1


Quantization = Literal["round", "floor", "truncate"]


def quantization(sigma: float) -> Quantization:
    """Choose the quantization that fits a model trained with Gaussian noise of sigma or, if 0, with noise in bins."""
    return "round" if sigma else "floor"


def to_pixels(images: Tensor, quantization: Quantization) -> Tensor:
    """Convert images in [-1, 1] to 8-bit pixels, uint8; values beyond become 0 or 255, and nan becomes 0.

    ``"round"``: ``round((x + 1) 127.5)``, the nearest of the levels p/127.5 - 1 that Gaussian noise was added to.
    ``"floor"``: ``floor((x + 1) 128)``, the bin [p, p + 1)/128 - 1 that uniform or variational noise has filled.
    ``"truncate"``: ``floor((x + 1) 127.5)``, as published protocols do; half a level darker than ``"round"``.

    >>> to_pixels(torch.tensor([-1.0, -0.005, 0.0, 1.0]), "round")
    tensor([  0, 127, 128, 255], dtype=torch.uint8)
    """
    levels = (images.float() + 1) * (128 if quantization == "floor" else 127.5)
    levels = levels.round() if quantization == "round" else levels.floor()
    return levels.nan_to_num(0.0).clamp(0, 255).to(torch.uint8)


def derive_seed(seed: int, step: int, purpose: int = 0) -> int:
    """A seed for the random numbers of one step, unrelated to those of its neighbours and of other purposes."""
    return int(np.random.SeedSequence((seed, step, purpose)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def log_normal(z: Tensor) -> Tensor:
    """Return ``log N(z; 0, I)`` in nats, summed per sample, ``(B,)``."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)


def levels_per_unit(pixels: Tensor) -> int:
    """Return how many levels of a pixel are a unit of x: 128 of uint8 images; latents, which have none, have 1."""
    return 1 if pixels.is_floating_point() else 128


def bits_per_dim(log_prob: Tensor, num_dims: int, scale: int = 128) -> Tensor:
    """Return ``-(log p(x) - n ln scale) / (n ln 2)`` for n dimensions, scaled from 256 levels to [-1, 1] by 128.

    ``log_prob`` is in nats; ln 128 is the log-det, per dimension, of that scaling, of which latents have none, a scale
    of 1. It is the density of an image with uniform noise, or the density less the log-density ``log q(u)`` of other
    noise within the bins.

    >>> bits_per_dim(torch.tensor(0.0), 10)  # density 1 over a cube of side 2
    tensor(7.)
    """
    return (math.log(scale) - log_prob / num_dims) / math.log(2)
