"""Variational dequantization: a flow that learns which noise to add to 8-bit pixels.

Uniform noise asks a density to be flat over each bin. Noise drawn from a conditional flow, ``u ~ q(u | pixels)``, can
be whatever suits the model, at the price of its own entropy:

    log P(pixels) >= E_q[log p(pixels + u) - log q(u | pixels)].

Source: Flow++ (arXiv 1902.00275).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..noise import log_normal, to_image
from .config import DequantizerConfig
from .layers import MultiScaleFlow
from .networks import DataInitConv2d, GatedBlock, concat_elu
from .splits import split_stripes

__all__ = ["ContextNetwork", "Dequantizer", "DequantizerConfig"]


class Dequantizer(nn.Module):
    """Noise for pixels ``(B, C, H, W)``, as a flow from normal noise of the same shape.

    ``u = sigmoid(flow(eps; pixels))`` with ``log q(u | pixels) = log N(eps; 0, I) - log |du / deps|``.

    >>> dequantizer = Dequantizer(DequantizerConfig(filters=8, stack="stripe2"), (1, 4, 4))
    >>> pixels = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    >>> x, log_q = dequantizer(pixels, torch.randn(3, 1, 4, 4))
    >>> torch.equal(((x + 1) * 128).floor(), pixels.float()), log_q.shape
    (True, torch.Size([3]))
    """

    def __init__(self, config: DequantizerConfig, shape: tuple[int, int, int]):
        super().__init__()
        channels, height, width = shape
        self.flow = MultiScaleFlow(config.stack, shape, config, context_channels=2 * config.context_filters)
        self.context = ContextNetwork(2 * channels, (height, width // 2), config)

    @classmethod
    def of(cls, config: DequantizerConfig | None, shape: tuple[int, int, int]) -> "Dequantizer | None":
        """Make the dequantizer of images of that shape; None without a configuration."""
        return None if config is None else cls(config, shape)

    def forward(self, pixels: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Add noise to pixels.

        Args:
            pixels: uint8 ``(B, C, H, W)``.
            eps: standard normal numbers, of the same shape and the dtype of the weights.

        Returns:
            the image ``(pixels + u) / 128 - 1`` and the log-density of u in nats, ``(B,)``.
        """
        context = self.context(torch.cat(split_stripes(pixels.to(eps.dtype) / 256 - 0.5), dim=1))
        t, logdet = self.flow(eps, context)
        # log sigmoid'(t) = -softplus(t) - softplus(-t)
        logdet = logdet - (F.softplus(t) + F.softplus(-t)).sum((1, 2, 3))
        return to_image(pixels, t.sigmoid()), log_normal(eps) - logdet


class ContextNetwork(nn.Module):
    """The network that reads the pixels, ``(B, inputs, H, W)``, for all couplings: to ``(B, 2 channels, H, W)``."""

    def __init__(self, inputs: int, size: tuple[int, int], config: DequantizerConfig):
        super().__init__()
        channels, config = config.context_filters, replace(config, attention=config.context_attention)
        self.proj_in = DataInitConv2d(inputs, channels, 3, weight_norm=config.weight_norm)
        has_attention = config.attention != "none"
        self.pos_embed = nn.Parameter(0.01 * torch.randn(channels, *size)) if has_attention else None
        self.blocks = nn.ModuleList(
            GatedBlock(channels, config, size=3, norm=config.context_norm) for _ in range(config.context_blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the context, after the concat-ELU with which the gated convolutions of all couplings begin."""
        h = self.proj_in(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            h = block(h, self.pos_embed)
        return concat_elu(h)
