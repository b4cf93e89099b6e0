"""Flow++: its configuration and the model over images.

Source: Flow++ (arXiv 1902.00275).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import hardware
from ..image_flow import ImageFlow, at_least_one, in_mode
from ..noise import log_normal
from ..validation import check_totals, describe_argument
from .dequantizer import Dequantizer, DequantizerConfig
from .layers import CouplingConfig, Stack, count_couplings, parse
from .splits import squeeze, unsqueeze


@dataclass(frozen=True)
class FlowPPConfig(CouplingConfig):
    """The shape of a Flow++.

    Args:
        image_size, in_channels: of the images.
        stack: the levels of the flow, see :class:`tarflow.flowpp.layers.Stack`.
        coupling: ``"mixture"`` of logistics, or ``"affine"``, its ablation.
        num_mixtures: K, logistics in the mixture of a value.
        filters, blocks_per_coupling: channels of the conditioners, and their gated blocks.
        attention: ``"softmax"``; ``"max"``, its ablation with the same parameters; ``"none"``.
        pointwise: whether a product with a matrix of channels stands before every coupling.
        elu_output: whether a concat-ELU stands before the last convolution of a conditioner.
        weight_norm: whether convolutions are weight-normalized.
        dropout: in training, within gated convolutions and attention.
        dequantizer: of variational dequantization; None for uniform.

    Raises:
        ValueError: a size that is no positive integer or beyond :mod:`tarflow.validation`, an unknown name, a stack
            that the image does not fit.
    """

    image_size: int = 28
    in_channels: int = 1
    stack: str = "squeeze stripe4 channel4"
    dequantizer: DequantizerConfig | None = field(default_factory=DequantizerConfig)

    def __post_init__(self):
        super().__post_init__()
        check_totals("stack", self.num_layers, self.image_shape)
        if self.dequantizer is not None:
            parse(self.dequantizer.stack, self.image_shape)

    @classmethod
    def fashion_mnist(cls) -> "FlowPPConfig":
        """A small one, for images of 28 x 28 that a CPU trains on."""
        return cls()

    @classmethod
    def cifar10(cls) -> "FlowPPConfig":
        """The published one: 31,443,440 parameters, 3.08 bits/dim."""
        own = {"filters": 96, "num_mixtures": 32, "dropout": 0.2}
        return cls(
            **own,
            blocks_per_coupling=10,
            image_size=32,
            in_channels=3,
            stack="stripe4 squeeze channel2 stripe3",
            dequantizer=DequantizerConfig(
                **own, blocks_per_coupling=2, attention="softmax", context_filters=32, context_blocks=3
            ),
        )

    @classmethod
    def imagenet32(cls) -> "FlowPPConfig":
        """The published one: 168,955,724 parameters, 3.86 bits/dim."""
        own = {"filters": 128, "num_mixtures": 32, "pointwise": False, "elu_output": True, "weight_norm": True}
        return cls(
            **own,
            blocks_per_coupling=20,
            image_size=32,
            in_channels=3,
            stack="stripe4 stripe3 squeeze channel3 stripe3",
            dequantizer=DequantizerConfig(
                **own,
                blocks_per_coupling=8,
                attention="softmax",
                stack="stripe4 stripe4",
                context_filters=32,
                context_blocks=8,
                context_norm=True,
                context_attention="softmax",
            ),
        )

    @classmethod
    def imagenet64(cls) -> "FlowPPConfig":
        """The published one: 73,489,960 parameters, 3.69 bits/dim."""
        own = {"filters": 96, "num_mixtures": 4, "pointwise": False, "elu_output": True}
        return cls(
            **own,
            blocks_per_coupling=16,
            image_size=64,
            in_channels=3,
            stack="squeeze stripe4 squeeze channel2 stripe2 squeeze channel2 stripe2",
            dequantizer=DequantizerConfig(
                **own,
                blocks_per_coupling=5,
                context_filters=32,
                context_blocks=5,
                context_norm=True,
            ),
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.in_channels, self.image_size, self.image_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C', H', W'), that of an image squeezed as often as the stack says."""
        side = 2 ** self.stack.split().count("squeeze")
        return self.in_channels * side**2, self.image_size // side, self.image_size // side

    @property
    def num_dims(self) -> int:
        """The number of values in an image."""
        return math.prod(self.image_shape)

    @property
    def summary(self) -> str:
        """In a line."""
        mixtures = f" of {self.num_mixtures}" if self.coupling == "mixture" else ""
        return (
            f"Flow++ {self.stack}, {self.coupling} couplings{mixtures}, {self.filters} filters, "
            f"{self.blocks_per_coupling} blocks each, {self.attention} attention"
        )

    @property
    def num_couplings(self) -> int:
        """In the stack, dequantizer apart."""
        return count_couplings(self.stack, self.image_shape)

    @property
    def num_layers(self) -> int:
        """Gated blocks of all couplings, dequantizer apart; each has weights of its own."""
        return self.num_couplings * self.blocks_per_coupling

    def activation_bytes(self, itemsize: int = 4) -> int:
        """Roughly what autograd keeps of one image: some 22 numbers per filter, block and pixel of a half."""
        levels = parse(self.stack, self.image_shape)
        pixels = sum(number * c * h * w // (2 * c if kind == "stripe" else c) for kind, number, (c, h, w) in levels)
        kept = pixels * self.filters * self.blocks_per_coupling
        if self.dequantizer is not None:
            d = self.dequantizer
            levels = parse(d.stack, self.image_shape)
            kept += sum(number * h * w // 2 for _, number, (_, h, w) in levels) * d.filters * d.blocks_per_coupling
        return 22 * kept * itemsize

    @property
    def num_classes(self) -> int:
        """Flow++ has no labels."""
        return 0


class FlowPP(ImageFlow):
    """Flow++ over images ``(B, C, H, W)``, float in [-1, 1]: the logit of an image, then a stack of couplings.

    The scales of convolutions and norms come from data: see :meth:`ImageFlow.initialize`, which training begins with.
    Without it a model is a flow like any other, but a bad start.

    In training mode :meth:`forward` has dropout, which no latent tells of: its inverse is that of evaluation mode.

    >>> model = FlowPP(FlowPPConfig(image_size=8, filters=8, blocks_per_coupling=1, num_mixtures=4, stack="stripe2"))
    >>> x = torch.rand(3, 1, 8, 8) * 2 - 1
    >>> z, logdet = model(x)
    >>> z.shape, logdet.shape
    (torch.Size([3, 1, 8, 8]), torch.Size([3]))
    >>> torch.allclose(model.inverse(z), x, atol=1e-5)
    True
    """

    config_class = FlowPPConfig
    # What images keep from 0 and 1, where there is no logit.
    MARGIN = 0.05

    def __init__(self, config: FlowPPConfig):
        super().__init__(config, Dequantizer.of(config.dequantizer, config.image_shape))
        self.flow = Stack(config.stack, config.image_shape, config)

    def forward(self, x: Tensor, labels: None = None) -> tuple[Tensor, Tensor]:
        """Image to latent: z ``(B, C', H', W')`` and the log-det of the map in nats, ``(B,)``, both float32.

        ``z = stack(logit(0.05 + 0.9 (x + 1) / 2))``. An image from outside [-1.1, 1.1] has no logit and becomes nan.
        """
        self._check_images(x, "x")
        check_no_labels(labels)
        p = self.MARGIN + (0.5 - self.MARGIN) * (x + 1)
        log_p, log_q = p.log(), (1 - p).log()
        z, logdet = self.flow(log_p - log_q)
        constant = self.config.num_dims * math.log(0.5 - self.MARGIN)
        return z, logdet - (log_p + log_q).sum((1, 2, 3)) + constant

    def inverse(self, z: Tensor, labels: None = None) -> Tensor:
        """Latent to image ``(B, C, H, W)``, within [-1.11, 1.11]: the inverse of :meth:`forward` without dropout."""
        check_no_labels(labels)
        if not isinstance(z, Tensor) or not z.is_floating_point():
            raise TypeError(f"z: expected a floating-point torch.Tensor; got {describe_argument(z)}")
        if z.shape[1:] != self.config.latent_shape:
            raise ValueError(f"z: expected shape (B, *{self.config.latent_shape}); got {tuple(z.shape)}")
        with in_mode(self, training=False):
            y, _ = self.flow.inverse(z)
        return self._squash(y)

    def log_prior(self, z: Tensor) -> Tensor:
        """The log-density of latents in nats, ``(B,)``: that of N(0, I)."""
        return log_normal(z)

    @torch.no_grad()
    def sample(
        self,
        num: int,
        labels: None = None,
        generator: torch.Generator | None = None,
        return_trajectory: bool = False,
        chunk_size: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw ``num`` images.

        Args:
            num: how many.
            generator: makes the samples reproducible, whatever the chunks.
            return_trajectory: whether to return what lies between latent and image too.
            chunk_size: images to sample at a time; by default what half of the free memory holds.

        Returns:
            images ``(num, C, H, W)``, within [-1.11, 1.11] and not clipped, and, if asked for, their trajectory
            ``(levels + 2, num, C, H, W)``: the latent, after each level of couplings, the image. Latents are drawn in
            the shape of images; all but the images are logits.

        Raises:
            ValueError, TypeError: num or chunk_size below 1 or no integer, more images than memory holds, labels.
        """
        num = self.check_num(num)
        check_no_labels(labels)
        eps = torch.randn(num, *self.config.image_shape, generator=generator, device=self.device, dtype=self.dtype)
        if chunk_size is None:
            chunk_size = hardware.chunk_size(self.config.activation_bytes() // self.config.num_couplings, eps.device)
        chunk_size = at_least_one("chunk_size", chunk_size)
        with in_mode(self, training=False):
            chunks = [self._decode(chunk) for chunk in eps.split(chunk_size)]
        images = torch.cat([self._squash(frames[-1]) for frames in chunks])
        if not return_trajectory:
            return images
        return images, torch.cat([torch.cat(chunks, dim=1), images[None]])

    def _decode(self, eps: Tensor) -> Tensor:
        """Normal numbers of the shape of images to logits: before the stack, and after each level of couplings."""
        z = eps
        for _ in range(self.flow.levels.count("squeeze")):
            z = squeeze(z)
        frames = [z]
        for kind, (x, _) in zip(reversed(self.flow.levels), self.flow.trajectory(z), strict=True):
            if kind != "squeeze":
                frames.append(x)
        return torch.stack([self._spread(frame) for frame in frames])

    def _spread(self, x: Tensor) -> Tensor:
        """Squeezed values where they belong in the image."""
        while x.shape[1] > self.config.in_channels:
            x = unsqueeze(x)
        return x

    def _squash(self, logits: Tensor) -> Tensor:
        return (logits.sigmoid() - self.MARGIN) / (0.5 - self.MARGIN) - 1


def check_no_labels(labels: None) -> None:
    """ValueError where there are any."""
    if labels is not None:
        raise ValueError(f"labels: expected None, since Flow++ is unconditional; got {type(labels).__name__}")
