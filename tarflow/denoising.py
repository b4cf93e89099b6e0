"""Denoising by the model's own score: Tweedie's formula, once, again, or along falling levels of noise."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MAX_STEPS", "Denoising", "denoise_by_levels", "tweedie"]

MAX_STEPS = 10_000
LEVELS = 10


@dataclass(frozen=True)
class Denoising:
    """How noise is removed, in steps of a forward and a backward pass each.

    A model that is conditioned on the level of noise goes down through as many levels. Any other applies Tweedie's
    formula at the sigma of training again and again, ``x <- E[x | y = x]``. TarFlow does so once; from the second time
    on these are steps of mean shift towards a mode of the density of noisy images, no more a posterior mean. The second
    removes specks that the first has left.

    Args:
        steps: number of steps; by default 10 with levels of noise, and 1 without.
        stochastic: whether each step replaces a part of the noise that is left by other noise.
        clip: whether estimates of the clean image are clipped to [-1, 1].

    Raises:
        ValueError: no or too many steps.

    Sources: TarFlow (arXiv 2412.06329), iTarFlow (arXiv 2604.20041); Comaniciu and Meer, *Mean shift* (2002).
    """

    steps: int | None = None
    stochastic: bool = False
    clip: bool = False

    def __post_init__(self):
        if self.steps is not None and (type(self.steps) is not int or not 1 <= self.steps <= MAX_STEPS):
            raise ValueError(f"steps: expected an integer from 1 to {MAX_STEPS}; got {self.steps!r}")

    def levels(self, first: float, last: float) -> list[float]:
        """Return equally spaced levels from the first to the last, and 0.

        >>> Denoising(steps=3).levels(0.5, 0.25)
        [0.5, 0.375, 0.25, 0.0]
        """
        steps = self.steps or LEVELS
        return [first + (last - first) * k / max(steps - 1, 1) for k in range(steps)] + [0.0]


def denoise_by_levels(
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    levels: list[float],
    denoising: Denoising,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield images as their noise falls from each level t to the next, t'.

    With the estimate x0 of the clean image, and v = (x - x0) / t of its noise, ``x <- x0 + t' v``, an Euler step of the
    flow along which densities of all levels agree. The stochastic variant replaces v by ``sqrt(a) v + sqrt(1 - a) eps``
    with ``a = (t' / t)^2`` and eps ~ N(0, 1).

    Args:
        denoise: images ``(B, C, H, W)`` and their level to x0.
        x: images with noise of the first level.
        levels: the levels, ending with 0.
        denoising: the variant.
        generator: source of eps.
    """
    for level, lower in itertools.pairwise(levels):
        clean = denoise(x, level)
        if denoising.clip:
            clean = clean.clamp(-1, 1)
        noise = (x - clean) / level
        if denoising.stochastic:
            kept = lower / level
            eps = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            noise = kept * noise + (1 - kept**2) ** 0.5 * eps
        x = clean + lower * noise
        yield x


def tweedie(log_prob: Callable[[Tensor], Tensor], y: Tensor, sigma: float) -> Tensor:
    """Return the posterior mean of clean data given noisy data, ``E[x | y] = y + sigma^2 * grad_y log p(y)``.

    Args:
        log_prob: ``(B, ...)`` to ``(B,)``, the log-density in nats of data with noise of standard deviation sigma.
        y: noisy data ``(B, ...)``.
        sigma: the standard deviation of the noise.

    Source: Robbins (1956); for TarFlow arXiv 2412.06329.

    >>> log_prob = lambda y: -y.square().sum(1) / (2 * (3**2 + 1**2))  # x ~ N(0, 3^2), noise of sigma = 1
    >>> tweedie(log_prob, torch.tensor([[2.0]]), sigma=1.0)
    tensor([[1.8000]])
    """
    with torch.inference_mode(False), torch.enable_grad():
        y = y.detach().clone().requires_grad_()
        (score,) = torch.autograd.grad(log_prob(y).sum(), y)
    return y.detach() + sigma**2 * score
