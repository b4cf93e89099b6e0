"""The networks of Flow++: gated convolutions and gated attention, whose scales the first batch sets.

A conditioner reads one half of an image (and a context) and writes what the coupling needs to know for every value of
the other half. Under autocast its layers run in low precision and its output in float32.

Source: Flow++ (arXiv 1902.00275).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import NUM_HEADS, CouplingConfig

__all__ = ["Conditioner", "DataInitConv2d", "GatedAttention", "GatedBlock", "GatedConv", "concat_elu", "gate"]


class DataInitConv2d(nn.Conv2d):
    """A convolution, ``(B, inputs, H, W)`` to ``(B, outputs, H, W)``, with zeros around the image.

    :meth:`initialize` sets it by data: for that batch every output channel has mean 0 and standard deviation
    ``init_scale``. With ``weight_norm`` the kernel of each output channel is ``gain * weight / ||weight||``.

    Source: weight normalization (arXiv 1602.07868).
    """

    bias: nn.Parameter

    def __init__(self, inputs: int, outputs: int, size: int, *, init_scale: float = 1.0, weight_norm: bool = False):
        super().__init__(inputs, outputs, size, padding=size // 2)
        self.init_scale = init_scale
        self.gain = nn.Parameter(torch.ones(outputs)) if weight_norm else None
        nn.init.normal_(self.weight, std=0.05)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(B, inputs, H, W)`` to ``(B, outputs, H, W)``."""
        weight = self.weight
        if self.gain is not None:
            weight = F.normalize(weight.flatten(1)).view_as(weight) * self.gain[:, None, None, None]
        return self._conv_forward(x, weight, self.bias)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Rescale the weights by the mean and variance of the outputs for x."""
        variance, mean = torch.var_mean(self.forward(x).float(), (0, 2, 3), correction=0)
        rate = self.init_scale / (variance + 1e-8).sqrt()
        if self.gain is None:
            self.weight.mul_(rate[:, None, None, None])
        else:
            self.gain.mul_(rate)
        self.bias.sub_(mean).mul_(rate)


class ChannelNorm(nn.LayerNorm):
    """Layer norm of every pixel over its channels, ``(B, C, H, W)`` to the same."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(B, C, H, W)``."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def concat_elu(x: Tensor) -> Tensor:
    """``ELU([x, -x])``, which doubles the channels."""
    return F.elu(torch.cat((x, -x), dim=1))


def gate(x: Tensor) -> Tensor:
    """``a sigmoid(b)`` for the two halves a, b of the channels, which halves them."""
    return F.glu(x, dim=1)


class GatedConv(nn.Module):
    """``x + gate(conv(dropout(celu(conv3x3(celu(x)) + conv1x1(context)))))``, ``(B, C, H, W)`` to the same.

    Args:
        channels: C.
        config: settings of dropout and weight normalization.
        context_channels: channels of the context ``(B, context_channels, H, W)``; 0 for none.
        size: side of the kernel of the second convolution.
    """

    def __init__(self, channels: int, config: CouplingConfig, context_channels: int = 0, size: int = 1):
        super().__init__()
        norm = config.weight_norm
        self.conv = DataInitConv2d(2 * channels, channels, 3, weight_norm=norm)
        self.context = DataInitConv2d(context_channels, channels, 1, weight_norm=norm) if context_channels else None
        self.dropout = nn.Dropout(config.dropout)
        self.out = DataInitConv2d(2 * channels, 2 * channels, size, init_scale=0.1, weight_norm=norm)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Add to x what the convolutions and the gate let through."""
        h = self.conv(concat_elu(x))
        if self.context is not None:
            h = h + self.context(context)
        return x + gate(self.out(self.dropout(concat_elu(h))))


class GatedAttention(nn.Module):
    """``x + gate(conv1x1(dropout(attention(x + positions))))``; every pixel attends to all, with four heads."""

    def __init__(self, channels: int, config: CouplingConfig):
        super().__init__()
        self.attention = config.attention
        self.qkv = DataInitConv2d(channels, 3 * channels, 1, weight_norm=config.weight_norm)
        self.dropout = nn.Dropout(config.dropout)
        self.out = DataInitConv2d(channels, 2 * channels, 1, init_scale=0.1, weight_norm=config.weight_norm)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Map x ``(B, C, H, W)``, with the embeddings of its positions, ``(C, H, W)``, to ``(B, C, H, W)``."""
        qkv = self.qkv(x + positions)
        attended = qkv.unflatten(1, (3, -1)).amax(1) if self.attention == "max" else _attend(qkv)
        return x + gate(self.out(self.dropout(attended)))


def _attend(qkv: Tensor) -> Tensor:
    """Softmax attention among the pixels of ``(B, 3 C, H, W)``, to ``(B, C, H, W)``."""
    tokens = qkv.flatten(2).transpose(1, 2).unflatten(2, (3, NUM_HEADS, -1))
    q, k, v = (part.transpose(1, 2) for part in tokens.unbind(2))
    if qkv.device.type == "cpu":  # whose attention of small heads is slower in bfloat16
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast(qkv.device.type, enabled=False):
        attended = F.scaled_dot_product_attention(q, k, v)
    attended = attended.transpose(1, 2).flatten(2).to(qkv.dtype)
    return attended.transpose(1, 2).unflatten(2, qkv.shape[2:])


class GatedBlock(nn.Module):
    """Gated convolution, layer norm, gated attention, layer norm; without attention or norms if so told.

    Arguments are those of :class:`GatedConv`, whose ``config`` has the kind of attention too, and ``norm``.
    """

    def __init__(
        self, channels: int, config: CouplingConfig, context_channels: int = 0, size: int = 1, norm: bool = True
    ):
        super().__init__()
        self.conv = GatedConv(channels, config, context_channels, size)
        self.conv_norm = ChannelNorm(channels) if norm else nn.Identity()
        self.attention = None
        if config.attention != "none":
            self.attention = GatedAttention(channels, config)
            self.attention_norm = ChannelNorm(channels) if norm else nn.Identity()

    def forward(self, x: Tensor, positions: Tensor | None, context: Tensor | None = None) -> Tensor:
        """Map x ``(B, C, H, W)``, with the embeddings of its positions, ``(C, H, W)``, to ``(B, C, H, W)``."""
        x = self.conv_norm(self.conv(x, context))
        return x if self.attention is None else self.attention_norm(self.attention(x, positions))


class Conditioner(nn.Module):
    """The network of a coupling: one half of an image, ``(B, inputs, H, W)``, to ``(B, outputs, H, W)``.

    Args:
        inputs, outputs: channels.
        size: (H, W).
        config: settings of its layers.
        context_channels: channels of a context ``(B, context_channels, H, W)``; 0 for none.
    """

    def __init__(
        self, inputs: int, outputs: int, size: tuple[int, int], config: CouplingConfig, context_channels: int = 0
    ):
        super().__init__()
        channels, self.elu_output = config.filters, config.elu_output
        self.proj_in = DataInitConv2d(inputs, channels, 3, weight_norm=config.weight_norm)
        # Without attention nothing reads it: it is there because the published model counts it, and is not trained.
        self.pos_embed = nn.Parameter(0.01 * torch.randn(channels, *size), requires_grad=config.attention != "none")
        self.blocks = nn.ModuleList(
            GatedBlock(channels, config, context_channels) for _ in range(config.blocks_per_coupling)
        )
        width = 2 * channels if config.elu_output else channels
        self.proj_out = DataInitConv2d(width, outputs, 3, init_scale=0.1, weight_norm=config.weight_norm)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Read one half of an image; the output is for every value of the other."""
        h = self.proj_in(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            h = block(h, self.pos_embed, context)
        h = concat_elu(h) if self.elu_output else h
        with torch.autocast(h.device.type, enabled=False):
            return self.proj_out(h.to(x.dtype))
