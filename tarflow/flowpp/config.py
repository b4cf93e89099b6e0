"""The settings of Flow++ and of its dequantizer.

Source: Flow++ (arXiv 1902.00275).
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..validation import check_fields, check_totals
from .splits import count_couplings, parse_stack

__all__ = ["NUM_HEADS", "Attention", "CouplingConfig", "DequantizerConfig", "FlowPPConfig"]

Attention = Literal["softmax", "max", "none"]
"""Kind of attention among pixels: ``"max"``, its ablation, takes the largest of query, key and value instead."""

NUM_HEADS = 4


@dataclass(frozen=True)
class CouplingConfig:
    """The settings of the couplings of a flow; fields and errors are those of :class:`tarflow.FlowPPConfig`."""

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


@dataclass(frozen=True)
class DequantizerConfig(CouplingConfig):
    """The settings of a dequantizer; by default of a small one.

    Args:
        stack: levels of its flow, all of them ``stripe<n>``.
        context_filters: channels of the network that reads the pixels.
        context_blocks: its gated blocks.
        context_norm: whether these blocks have layer norms.
        context_attention: the attention that they have.

    The other fields are those of :class:`tarflow.FlowPPConfig`, for the couplings of the dequantizer.

    Raises:
        ValueError: as FlowPPConfig; a stack with other levels.
    """

    filters: int = 16
    blocks_per_coupling: int = 1
    attention: Attention = "none"
    stack: str = "stripe4"
    context_filters: int = 16
    context_blocks: int = 1
    context_norm: bool = False
    context_attention: Attention = "none"

    def __post_init__(self):
        super().__post_init__()
        if self.context_attention != "none" and self.context_filters % NUM_HEADS:
            raise ValueError(
                f"context_filters: expected a multiple of the {NUM_HEADS} heads of attention; "
                f"got {self.context_filters}"
            )
        if any(not word.startswith("stripe") for word in self.stack.split()):
            raise ValueError(f"stack: expected levels stripe<n> alone in a dequantizer; got {self.stack!r}")
        check_totals("stack", self.blocks_per_coupling * count_couplings(self.stack, (1, 2, 2)))


@dataclass(frozen=True)
class FlowPPConfig(CouplingConfig):
    """The settings of a Flow++.

    Args:
        image_size, in_channels: side and channels of the images.
        stack: levels of the flow: couplings of columns (stripe<n>) or channels (channel<n>), and squeezes.
        coupling: a mixture of logistics for each value, or an affine map, its ablation.
        num_mixtures: logistics in the mixture of a value.
        filters: channels of a conditioner.
        blocks_per_coupling: gated blocks of a conditioner.
        attention: of pixels to each other; max is its ablation with the same parameters.
        pointwise: whether an invertible 1x1 convolution comes before every coupling.
        elu_output: whether a concat-ELU comes before the last convolution of a conditioner.
        weight_norm: whether convolutions are weight-normalized.
        dropout: probability in training, within gated convolutions and attention.
        dequantizer: settings of variational dequantization; None for uniform.

    Raises:
        ValueError: a size that is no positive integer or beyond :mod:`tarflow.validation`, an unknown name, a stack
            that does not fit the images.
    """

    image_size: int = 28
    in_channels: int = 1
    stack: str = "squeeze stripe4 channel4"
    dequantizer: DequantizerConfig | None = field(default_factory=DequantizerConfig)

    def __post_init__(self):
        super().__post_init__()
        check_totals("stack", self.num_layers, self.image_shape)
        if self.dequantizer is not None:
            parse_stack(self.dequantizer.stack, self.image_shape)

    @classmethod
    def fashion_mnist(cls) -> "FlowPPConfig":
        """Return the settings of a small model, for images of 28 x 28, that a CPU trains."""
        return cls()

    @classmethod
    def cifar10(cls) -> "FlowPPConfig":
        """Return the published settings for CIFAR-10: 31,443,440 parameters, 3.08 bits/dim."""
        own: dict[str, Any] = {"filters": 96, "num_mixtures": 32, "dropout": 0.2}
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
        """Return the published settings for ImageNet 32x32: 168,955,724 parameters, 3.86 bits/dim."""
        own: dict[str, Any] = {
            "filters": 128,
            "num_mixtures": 32,
            "pointwise": False,
            "elu_output": True,
            "weight_norm": True,
        }
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
        """Return the published settings for ImageNet 64x64: 73,489,960 parameters, 3.69 bits/dim."""
        own: dict[str, Any] = {"filters": 96, "num_mixtures": 4, "pointwise": False, "elu_output": True}
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

    def for_data(self, image_size: int, in_channels: int, num_classes: int) -> "FlowPPConfig":
        """Return a copy for other images; ValueError for data with classes, or where the stack does not fit."""
        if num_classes:
            raise ValueError(f"num_classes: expected 0, since Flow++ is unconditional; got {num_classes}")
        return replace(self, image_size=image_size, in_channels=in_channels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.in_channels, self.image_size, self.image_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C', H', W'): the shape of an image that is squeezed as often as the stack says."""
        side = 2 ** self.stack.split().count("squeeze")
        return self.in_channels * side**2, self.image_size // side, self.image_size // side

    @property
    def num_dims(self) -> int:
        """The number of values in an image."""
        return math.prod(self.image_shape)

    @property
    def num_classes(self) -> int:
        """Always 0: Flow++ has no labels."""
        return 0

    @property
    def num_couplings(self) -> int:
        """The number of couplings, without those of the dequantizer."""
        return count_couplings(self.stack, self.image_shape)

    @property
    def num_layers(self) -> int:
        """The number of gated blocks, each with weights of its own, without those of the dequantizer."""
        return self.num_couplings * self.blocks_per_coupling

    @property
    def summary(self) -> str:
        """The settings in one line."""
        mixtures = f" of {self.num_mixtures}" if self.coupling == "mixture" else ""
        return (
            f"Flow++ {self.stack}, {self.coupling} couplings{mixtures}, {self.filters} filters, "
            f"{self.blocks_per_coupling} blocks each, {self.attention} attention"
        )

    def activation_bytes(self, itemsize: int = 4) -> int:
        """Estimate what autograd keeps of one image: some 22 numbers per filter, gated block and pixel of a half."""
        kept = 0
        for part in (self, self.dequantizer) if self.dequantizer is not None else (self,):
            levels = parse_stack(part.stack, self.image_shape)
            pixels = sum(n * height * width // (2 if kind == "stripe" else 1) for kind, n, (_, height, width) in levels)
            kept += pixels * part.filters * part.blocks_per_coupling
        return 22 * kept * itemsize
