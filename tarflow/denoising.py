"""Denoising by the model's own score: Tweedie's formula."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["tweedie"]


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
