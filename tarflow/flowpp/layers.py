"""The maps of Flow++ between the halves of an image: normalization, pointwise products, couplings, and stacks of them.

A layer has two methods, ``forward(halves, context)`` and ``inverse(halves, context)``. Both return the halves and the
log-det of the map that they ran, in nats, ``(B,)``. Only couplings look at the context.

Source: Flow++ (arXiv 1902.00275).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tarflow_kernels import affine_forward, affine_inverse, mixture_logistic, mixture_logistic_inverse, scales

from ..validation import check_fields
from .networks import NUM_HEADS, Attention, Conditioner
from .splits import SPLITS, Halves, squeeze, unsqueeze

_TANH = scales.tanh(1.0)


@dataclass(frozen=True)
class CouplingConfig:
    """What the couplings of a flow are made of; names and errors as in :class:`tarflow.FlowPPConfig`."""

    coupling: Literal["mixture", "affine"] = "mixture"
    num_mixtures: int = 8
    filters: int = 32
    blocks_per_coupling: int = 2
    attention: Attention = "softmax"
    pointwise: bool = True
    elu_output: bool = False
    weight_norm: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        check_fields(self)
        if self.filters % NUM_HEADS:
            raise ValueError(f"filters: expected a multiple of the {NUM_HEADS} heads of attention; got {self.filters}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1); got {self.dropout}")


class Norm(nn.Module):
    """``y = x g + b`` with a gain and a bias for every value of both halves, set by the first batch to normalize it."""

    SMALLEST = 1e-10

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2, *shape))
        self.bias = nn.Parameter(torch.zeros(2, *shape))

    def forward(self, halves: Halves, context: Tensor | None = None) -> tuple[Halves, Tensor]:
        """``logdet = sum log g``."""
        gain = self.gain.clamp(min=self.SMALLEST)
        first, second = (x * g + b for x, g, b in zip(halves, gain, self.bias, strict=True))
        return (first, second), gain.log().sum().expand(first.shape[0])

    def inverse(self, halves: Halves, context: Tensor | None = None) -> tuple[Halves, Tensor]:
        """``x = (y - b) / g``."""
        gain = self.gain.clamp(min=self.SMALLEST)
        first, second = ((y - b) / g for y, g, b in zip(halves, gain, self.bias, strict=True))
        return (first, second), -gain.log().sum().expand(first.shape[0])

    def initialize(self, halves: Halves, context: Tensor | None = None) -> None:
        """Mean 0 and variance 1 over the batch, value by value."""
        variance, mean = torch.var_mean(torch.stack(halves), 1, correction=0)
        self.gain.copy_((variance + 1e-6).rsqrt())
        self.bias.copy_(-mean * self.gain)


class Pointwise(nn.Module):
    """``y = W x`` at every pixel, with a matrix of channels for each half, near the identity at first."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(channels) + 0.001 * torch.randn(2, channels, channels))

    def forward(self, halves: Halves, context: Tensor | None = None) -> tuple[Halves, Tensor]:
        """``logdet = H W sum log |det W|``."""
        return self._multiply(halves, self.weight), self._logdet(halves)

    def inverse(self, halves: Halves, context: Tensor | None = None) -> tuple[Halves, Tensor]:
        """``x = W^-1 y``."""
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
    """The first half, and the context, say how every value x of the second half is mapped.

    ``y = exp(a) logit(sum_k pi_k sigmoid((x - mu_k) exp(-s_k))) + b`` for a mixture, ``y = exp(a) x + b`` for an affine
    coupling, where a is the tanh of what the network says.
    """

    def __init__(self, config: CouplingConfig, half: tuple[int, int, int], context_channels: int = 0):
        super().__init__()
        channels, *size = half
        self.num_mixtures = config.num_mixtures if config.coupling == "mixture" else 0
        self.conditioner = Conditioner(
            channels,
            channels * (2 + 3 * self.num_mixtures),
            size,
            config.filters,
            config.blocks_per_coupling,
            context_channels,
            attention=config.attention,
            elu_output=config.elu_output,
            dropout=config.dropout,
            weight_norm=config.weight_norm,
        )

    def forward(self, halves: Halves, context: Tensor | None = None) -> tuple[Halves, Tensor]:
        """``logdet = sum (a + log dv/dx)``, where v is the logit of the mixture."""
        first, x = halves
        alpha, shift, mixture = self._condition(first, context)
        v, mixture_logdet = mixture_logistic(x, *mixture) if mixture else (x, 0.0)
        y, logdet = affine_inverse(v, shift, alpha, scale=_TANH)
        return (first, y), logdet + mixture_logdet

    def inverse(self, halves: Halves, context: Tensor | None = None) -> tuple[Halves, Tensor]:
        """The same with x found by Newton's method, in logits, not probabilities."""
        first, y = halves
        alpha, shift, mixture = self._condition(first, context)
        v, logdet = affine_forward(y, shift, alpha, scale=_TANH)
        x, mixture_logdet = mixture_logistic_inverse(v, *mixture) if mixture else (v, 0.0)
        return (first, x), logdet + mixture_logdet

    def _condition(self, first: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """a before its tanh and b, of the shape of the other half, and the K logits, means and log-scales of each."""
        out = self.conditioner(first, context).unflatten(1, (-1, 2 + 3 * self.num_mixtures)).movedim(2, -1)
        alpha, shift, *mixture = out.split([1, 1, *[self.num_mixtures] * (3 if self.num_mixtures else 0)], dim=-1)
        return alpha[..., 0], shift[..., 0], tuple(mixture)


class Stack(nn.Module):
    """A flow over images ``(B, C, H, W)``: levels of couplings between halves, with squeezes between levels.

    Args:
        stack: such as ``"stripe4 squeeze channel2"``: four steps on columns, a squeeze, two on channels. A step is a
            norm, a pointwise product where asked for, a coupling, and an exchange of the halves.
        shape: (C, H, W).
        context_channels: of a context ``(B, context_channels, H, W / 2)``, for a stack of columns alone; 0 for none.
    """

    def __init__(self, stack: str, shape: tuple[int, int, int], config: CouplingConfig, context_channels: int = 0):
        super().__init__()
        self.shape = shape
        self.context_channels = context_channels
        self.levels = [kind for kind, _, _ in parse(stack, shape)]
        self.steps = nn.ModuleList()
        for kind, number, (channels, height, width) in parse(stack, shape):
            half = (channels, height, width // 2) if kind == "stripe" else (channels // 2, height, width)
            self.steps.append(nn.ModuleList(self._step(config, half, context_channels) for _ in range(number)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to latent, ``(B, C', H', W')``, and the log-det ``(B,)``."""
        self._check_context(x, context)
        logdet = x.new_zeros(x.shape[0])
        for kind, steps in zip(self.levels, self.steps, strict=True):
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
        """Latent to data, and the log-det of that, ``(B,)``."""
        logdet = z.new_zeros(z.shape[0])
        x = z
        for x, level_logdet in self.trajectory(z, context):  # noqa: B007
            logdet = logdet + level_logdet
        return x, logdet

    def trajectory(self, z: Tensor, context: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """What :meth:`inverse` passes through: the image after each level, and the log-det of the level."""
        self._check_context(z, context)
        for kind, steps in zip(reversed(self.levels), reversed(self.steps), strict=True):
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

    @staticmethod
    def _step(config: CouplingConfig, half: tuple[int, int, int], context_channels: int) -> nn.ModuleList:
        pointwise = [Pointwise(half[0])] if config.pointwise else []
        return nn.ModuleList([Norm(half), *pointwise, Coupling(config, half, context_channels)])


def parse(stack: str, shape: tuple[int, int, int]) -> list[tuple[str, int, tuple[int, int, int]]]:
    """The levels of a stack: their kind, their number of steps, and the shape (C, H, W) that comes in.

    Raises:
        ValueError: a level that is not ``squeeze``, ``stripe<n>`` or ``channel<n>`` with n of at least 1, an odd number
            to be halved, or squeezes alone.

    >>> parse("stripe4 squeeze channel2", (1, 28, 28))
    [('stripe', 4, (1, 28, 28)), ('squeeze', 0, (1, 28, 28)), ('channel', 2, (4, 14, 14))]
    """
    levels = []
    for word in stack.split():
        kind = word.rstrip("0123456789")
        number = word.removeprefix(kind)
        if kind not in ("squeeze", *SPLITS) or bool(number) != (kind != "squeeze") or (number and int(number) < 1):
            raise ValueError(
                f"stack: expected words squeeze, stripe<n> and channel<n>, n at least 1; got {word!r} in {stack!r}"
            )
        channels, height, width = shape
        halved = {"squeeze": (height, width), "stripe": (width,), "channel": (channels,)}[kind]
        if any(size % 2 for size in halved):
            raise ValueError(f"stack: expected even sizes where {word} halves them; got (C, H, W) = {shape}")
        levels.append((kind, int(number or 0), shape))
        if kind == "squeeze":
            shape = (4 * channels, height // 2, width // 2)
    if all(kind == "squeeze" for kind, _, _ in levels):
        raise ValueError(f"stack: expected couplings, as in 'stripe4 squeeze channel2'; got {stack!r}")
    return levels


def count_couplings(stack: str, shape: tuple[int, int, int]) -> int:
    """The steps of all levels; errors are those of :func:`parse`."""
    return sum(number for _, number, _ in parse(stack, shape))
