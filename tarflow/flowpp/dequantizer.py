"""Variational dequantization: a flow that learns which noise to add to 8-bit pixels.

Uniform noise asks a density to be flat over each bin. Noise drawn from a conditional flow, ``u ~ q(u | pixels)``, can
be whatever suits the model, at the price of its own entropy:

    log P(pixels) >= E_q[log p(pixels + u) - log q(u | pixels)].

Source: Flow++ (arXiv 1902.00275).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..noise import log_normal, to_image
from ..validation import check_totals
from .layers import CouplingConfig, Stack, count_couplings
from .networks import NUM_HEADS, Attention, ContextNetwork
from .splits import split_stripes


@dataclass(frozen=True)
class DequantizerConfig(CouplingConfig):
    """The shape of a dequantizer; by default a small one.

    Args:
        stack: the levels of its flow, all of them on columns.
        context_filters, context_blocks: channels and gated blocks of the network that reads the pixels.
        context_norm, context_attention: whether and which of them these blocks have.

    The other fields are those of :class:`tarflow.FlowPPConfig`, for the couplings of the dequantizer.

    Raises:
        ValueError: as FlowPPConfig; a stack that has other levels.
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


class Dequantizer(nn.Module):
    """Noise for pixels ``(B, C, H, W)``, as a flow from normal noise of the same shape."""

    def __init__(self, config: DequantizerConfig, shape: tuple[int, int, int]):
        super().__init__()
        channels, height, width = shape
        self.flow = Stack(config.stack, shape, config, context_channels=2 * config.context_filters)
        self.context = ContextNetwork(
            2 * channels,
            (height, width // 2),
            config.context_filters,
            config.context_blocks,
            attention=config.context_attention,
            norm=config.context_norm,
            dropout=config.dropout,
            weight_norm=config.weight_norm,
        )

    @classmethod
    def of(cls, config: DequantizerConfig | None, shape: tuple[int, int, int]) -> "Dequantizer | None":
        """Make the dequantizer of images of that shape; None without a configuration."""
        return None if config is None else cls(config, shape)

    def forward(self, pixels: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """``u = sigmoid(flow(eps; pixels))`` and ``log q(u | pixels) = log N(eps; 0, I) - log |du / deps|``.

        Args:
            pixels: uint8 ``(B, C, H, W)``.
            eps: standard normal, of the same shape and the dtype of the weights.

        Returns:
            the image ``(pixels + u) / 128 - 1`` and the log-density of u in nats, ``(B,)``.
        """
        context = self.context(torch.cat(split_stripes(pixels.to(eps.dtype) / 256 - 0.5), dim=1))
        t, logdet = self.flow(eps, context)
        # log sigmoid'(t) = -softplus(t) - softplus(-t)
        logdet = logdet - (F.softplus(t) + F.softplus(-t)).sum((1, 2, 3))
        return to_image(pixels, t.sigmoid()), log_normal(eps) - logdet
