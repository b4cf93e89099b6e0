"""The maps of Flow++ between the halves of an image, and the flow that is made of them.

A layer has two methods, ``forward(halves, context)`` and ``inverse(halves, context)``, for two halves of one shape
``(B, C, H, W)``. Both return halves and the log-det of the map that they ran, in nats, ``(B,)``. Only couplings look at
the context.

Source: Flow++ (arXiv 1902.00275).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tarflow_kernels import affine_forward, affine_inverse, mixture_logistic, mixture_logistic_inverse, scales

from .config import CouplingConfig
from .networks import Conditioner
from .splits import SPLITS, Halves, parse_stack, squeeze, unsqueeze

__all__ = ["ActNorm", "Coupling", "InvertibleConv1x1", "MultiScaleFlow"]

_TANH = scales.tanh(1.0)


class ActNorm(nn.Module):
    """Activation normalization: ``y = g x + b`` with a gain and a bias for every value of both halves.

    Source: Glow (arXiv 1807.03039), which has them for every channel instead.

    >>> norm = ActNorm((1, 2, 2))
    >>> norm.initialize((5 + torch.randn(9, 1, 2, 2), torch.rand(9, 1, 2, 2)))
    >>> y, logdet = norm((torch.ones(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)))
    >>> torch.allclose(logdet, norm.gain.log().sum())
    True
    """

    SMALLEST_GAIN = 1e-10

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2, *shape))
        self.bias = nn.Parameter(torch.zeros(2, *shape))

    def forward(self, halves: Halves, context: Tensor | None = None) -> tuple[Halves, Tensor]:
        """Normalize: ``y = g x + b`` and ``logdet = sum log g``."""
        gain = self.gain.clamp(min=self.SMALLEST_GAIN)
        first, second = (x * g + b for x, g, b in zip(halves, gain, self.bias, strict=True))
        return (first, second), gain.log().sum().expand(first.shape[0])

    def inverse(self, halves: Halves, context: Tensor | None = None) -> tuple[Halves, Tensor]:
        """Invert :meth:`forward`: ``x = (y - b) / g``."""
        gain = self.gain.clamp(min=self.SMALLEST_GAIN)
        first, second = ((y - b) / g for y, g, b in zip(halves, gain, self.bias, strict=True))
        return (first, second), -gain.log().sum().expand(first.shape[0])

    @torch.no_grad()
    def initialize(self, halves: Halves, context: Tensor | None = None) -> None:
        """Set gain and bias so that every value has mean 0 and variance 1 over this batch."""
        variance, mean = torch.var_mean(torch.stack(halves), 1, correction=0)
        self.gain.copy_((variance + 1e-6).rsqrt())
        self.bias.copy_(-mean * self.gain)


class InvertibleConv1x1(nn.Module):
    """Invertible 1x1 convolution: ``y = W x`` at every pixel, with a ``(C, C)`` matrix for each half.

    It begins near the identity. Source: Glow (arXiv 1807.03039).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(channels) + 0.001 * torch.randn(2, channels, channels))

    def forward(self, halves: Halves, context: Tensor | None = None) -> tuple[Halves, Tensor]:
        """Mix the channels: ``y = W x`` and ``logdet = H W sum log |det W|``."""
        return self._multiply(halves, self.weight), self._logdet(halves)

    def inverse(self, halves: Halves, context: Tensor | None = None) -> tuple[Halves, Tensor]:
        """Invert :meth:`forward`: ``x = W^-1 y``."""
        inverse, _ = torch.linalg.inv_ex(self.weight.double())  # which does not wait to see whether there is one
        return self._multiply(halves, inverse.to(self.weight.dtype)), -self._logdet(halves)

    def _multiply(self, halves: Halves, weight: Tensor) -> Halves:
        with torch.autocast(weight.device.type, enabled=False):
            first, second = (torch.einsum("ij,bjhw->bihw", w, x) for w, x in zip(weight, halves, strict=True))
        return first, second

    def _logdet(self, halves: Halves) -> Tensor:
        batch, _, height, width = halves[0].shape
        logdet = torch.linalg.slogdet(self.weight.double()).logabsdet.sum()
        return (height * width * logdet).to(self.weight.dtype).expand(batch)


class Coupling(nn.Module):
    """A coupling: the first half, and the context, decide how every value x of the second half is mapped.

    ``y = exp(a) v + b`` with ``v = logit(sum_k pi_k sigmoid((x - mu_k) exp(-s_k)))``, a mixture of logistics, or with
    ``v = x`` in an affine coupling. A conditioner tells ``tanh^-1 a`` and b, and K logits, means mu and log-scales s.

    Args:
        config: settings.
        half: (C, H, W) of a half.
        context_channels: channels of a context ``(B, context_channels, H, W)``; 0 for none.

    >>> coupling = Coupling(CouplingConfig(filters=8, num_mixtures=3), (1, 4, 2))
    >>> halves = torch.randn(2, 3, 1, 4, 2).unbind()
    >>> (first, y), logdet = coupling(halves)
    >>> torch.equal(first, halves[0]), torch.allclose(coupling.inverse((first, y))[0][1], halves[1], atol=1e-4)
    (True, True)
    """

    def __init__(self, config: CouplingConfig, half: tuple[int, int, int], context_channels: int = 0):
        super().__init__()
        channels, height, width = half
        self.num_mixtures = config.num_mixtures if config.coupling == "mixture" else 0
        outputs = channels * (2 + 3 * self.num_mixtures)
        self.conditioner = Conditioner(channels, outputs, (height, width), config, context_channels)

    def forward(self, halves: Halves, context: Tensor | None = None) -> tuple[Halves, Tensor]:
        """Map the second half; ``logdet = sum (a + log dv/dx)``."""
        first, x = halves
        alpha, shift, mixture = self._condition(first, context)
        v, mixture_logdet = mixture_logistic(x, *mixture) if mixture else (x, 0.0)
        y, logdet = affine_inverse(v, shift, alpha, scale=_TANH)
        return (first, y), logdet + mixture_logdet

    def inverse(self, halves: Halves, context: Tensor | None = None) -> tuple[Halves, Tensor]:
        """Invert :meth:`forward`; x is found by Newton's method, on v and not on probabilities."""
        first, y = halves
        alpha, shift, mixture = self._condition(first, context)
        v, logdet = affine_forward(y, shift, alpha, scale=_TANH)
        x, mixture_logdet = mixture_logistic_inverse(v, *mixture) if mixture else (v, 0.0)
        return (first, x), logdet + mixture_logdet

    def _condition(self, first: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return a before its tanh and b, in the shape of a half, and K logits, means and log-scales of every value."""
        out = self.conditioner(first, context).unflatten(1, (-1, 2 + 3 * self.num_mixtures)).movedim(2, -1)
        alpha, shift, *mixture = out.split([1, 1, *[self.num_mixtures] * (3 if self.num_mixtures else 0)], dim=-1)
        return alpha[..., 0], shift[..., 0], tuple(mixture)


class MultiScaleFlow(nn.Module):
    """A flow over images ``(B, C, H, W)``: levels of couplings between halves, with squeezes between the levels.

    Args:
        stack: levels such as ``"stripe4 squeeze channel2"``: four steps between even and odd columns, a squeeze, two
            steps between halves of the channels. A step is an :class:`ActNorm`, an :class:`InvertibleConv1x1` where
            asked for, a :class:`Coupling`, and an exchange of the halves.
        shape: (C, H, W).
        config: settings of the couplings.
        context_channels: channels of a context ``(B, context_channels, H, W / 2)``, for a stack of stripes alone; 0 for
            none.

    Source: multi-scale flows, RealNVP (arXiv 1605.08803); no part of the image leaves early here.

    >>> flow = MultiScaleFlow("stripe2 squeeze channel2", (1, 4, 4), CouplingConfig(filters=8, num_mixtures=3))
    >>> x = torch.randn(3, 1, 4, 4)
    >>> z, logdet = flow(x)
    >>> z.shape, logdet.shape, torch.allclose(flow.inverse(z)[0], x, atol=1e-4)
    (torch.Size([3, 4, 2, 2]), torch.Size([3]), True)
    """

    def __init__(self, stack: str, shape: tuple[int, int, int], config: CouplingConfig, context_channels: int = 0):
        super().__init__()
        self.shape = shape
        self.context_channels = context_channels
        self.levels: list[str] = []
        self.steps = nn.ModuleList()
        for kind, number, (channels, height, width) in parse_stack(stack, shape):
            half = (channels, height, width // 2) if kind == "stripe" else (channels // 2, height, width)
            self.levels.append(kind)
            self.steps.append(nn.ModuleList(self._step(config, half, context_channels) for _ in range(number)))

    @staticmethod
    def _step(config: CouplingConfig, half: tuple[int, int, int], context_channels: int) -> nn.ModuleList:
        convolution = [InvertibleConv1x1(half[0])] if config.pointwise else []
        return nn.ModuleList([ActNorm(half), *convolution, Coupling(config, half, context_channels)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map data to latents ``(B, C', H', W')``, and return the log-det ``(B,)``."""
        self._check_context(x, context)
        logdet = x.new_zeros(x.shape[0])
        levels: Any = zip(self.levels, self.steps, strict=True)
        for kind, steps in levels:
            if kind == "squeeze":
                x = squeeze(x)
                continue
            split, merge = SPLITS[kind]
            halves = split(x)
            for step in steps:
                for layer in step:
                    halves, layer_logdet = layer(halves, context)
                    logdet = logdet + layer_logdet
                halves = halves[::-1]
            x = merge(*halves)
        return x, logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map latents to data, and return the log-det of that, ``(B,)``."""
        x, logdet = z, z.new_zeros(z.shape[0])
        for x, level_logdet in self.trajectory(z, context):  # noqa: B007
            logdet = logdet + level_logdet
        return x, logdet

    def trajectory(self, z: Tensor, context: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what :meth:`inverse` passes through: the image after each level, and the log-det of the level."""
        self._check_context(z, context)
        levels: Any = zip(reversed(self.levels), reversed(self.steps), strict=True)
        for kind, steps in levels:
            logdet = z.new_zeros(z.shape[0])
            if kind == "squeeze":
                z = unsqueeze(z)
            else:
                split, merge = SPLITS[kind]
                halves = split(z)
                for step in reversed(steps):
                    halves = halves[::-1]
                    for layer in reversed(step):
                        halves, layer_logdet = layer.inverse(halves, context)
                        logdet = logdet + layer_logdet
                z = merge(*halves)
            yield z, logdet

    def _check_context(self, x: Tensor, context: Tensor | None) -> None:
        _, height, width = self.shape
        expected = (x.shape[0], self.context_channels, height, width // 2) if self.context_channels else None
        shape = None if context is None else tuple(context.shape)
        if shape != expected:
            raise ValueError(f"context: expected a tensor of shape {expected}, or None for None; got {shape}")
