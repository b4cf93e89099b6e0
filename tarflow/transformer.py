"""The causal transformer of a block: from the tokens up to position i to the parameters of the map of token i + 1."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarflow_kernels import causal_attention

from .transforms import AffineTransform, Parameters

__all__ = ["CausalTransformer", "NoiseEmbedding", "TransformerLayer"]


class CausalTransformer(nn.Module):
    """Pre-norm transformer of tokens ``(B, N, D)``; row i of the output sees tokens 0 to i.

    It returns the parameters of a transform (:mod:`tarflow.transforms`): mu and alpha, each ``(B, N, D)``, and the
    mixture if there is one. The weight of the output projection starts at zero and its bias as the transform asks, so
    that an untrained block is about the identity. Tokens are in the order in which the block generates them. Under
    autocast the layers run in its precision, and the two projections at the ends in full.
    """

    def __init__(
        self,
        num_tokens: int,
        token_dim: int,
        channels: int,
        num_layers: int,
        *,
        head_dim: int = 64,
        expansion: int = 4,
        num_classes: int = 0,
        takes_noise_level: bool = False,
        transform: AffineTransform,
    ):
        super().__init__()
        if channels % head_dim:
            raise ValueError(f"head_dim: expected a divisor of channels {channels}; got {head_dim}")
        self.transform = transform
        self.proj_in = nn.Linear(token_dim, channels)
        self.pos_embed = nn.Parameter(0.01 * torch.randn(num_tokens, channels))
        self.class_embed = nn.Parameter(0.01 * torch.randn(num_classes, channels)) if num_classes else None
        self.noise_embed = NoiseEmbedding(channels) if takes_noise_level else None
        self.layers = nn.ModuleList(TransformerLayer(channels, head_dim, expansion) for _ in range(num_layers))
        self.proj_out = nn.Linear(channels, transform.outputs * token_dim)
        nn.init.zeros_(self.proj_out.weight)
        transform.initialize(self.proj_out.bias.data)

    def forward(self, tokens: Tensor, labels: Tensor | None = None, noise_level: Tensor | None = None) -> Parameters:
        """Compute the parameters of all positions at once, in training and scoring."""
        context = self.embed_context(labels, noise_level)
        with _full_precision(tokens):
            h = self.proj_in(tokens) + self.pos_embed
        if context is not None:
            h = h + context[:, None]
        for layer in self.layers:
            h = layer(h)
        return self.project_out(h)

    def embed_context(self, labels: Tensor | None, noise_level: Tensor | None = None) -> Tensor | None:
        """Return what is added to all tokens of a sample, ``(B, C)``: embeddings of its label and of its noise level.

        None for a model that knows of neither.
        """
        classes = self.embed_classes(labels)
        if self.noise_embed is None:
            return classes
        assert noise_level is not None, "a flow that takes a noise level checks it"
        noise = self.noise_embed(noise_level)
        return noise if classes is None else classes + noise

    def embed_classes(self, labels: Tensor | None) -> Tensor | None:
        """Return the embedding of each label, ``(B, C)``; that of a dropped one (-1) is the mean over all classes."""
        if self.class_embed is None:
            return None
        assert labels is not None, "a flow with classes checks its labels"
        table = torch.cat((self.class_embed.mean(0, keepdim=True), self.class_embed))
        # A negative index would count from the end of the table; one beyond its end is an error.
        return table[torch.where(labels < -1, len(table), labels + 1)]

    def project_out(self, h: Tensor) -> Parameters:
        """Project the last activations ``(B, N, C)`` to the parameters of the transform."""
        with _full_precision(h):
            return self.transform.split(self.proj_out(h))


class NoiseEmbedding(nn.Sequential):
    """The embedding of noise levels t ``(B,)``, positive, as ``(B, C)``; in full precision under autocast.

    Sinusoids of log t, ``sin(f_k log t)`` and then ``cos(f_k log t)`` with ``f_k = 10000^(-2 k / C)``, pass through a
    hidden layer. Source: iTarFlow (arXiv 2604.20041).
    """

    def __init__(self, channels: int):
        super().__init__(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.channels = channels

    def forward(self, noise_level: Tensor) -> Tensor:
        """Embed each level."""
        half = self.channels // 2
        frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half).to(noise_level))
        angles = noise_level.log()[:, None] * frequencies
        sinusoids = torch.cat((angles.sin(), angles.cos()), dim=1).to(next(self.parameters()).dtype)
        with _full_precision(noise_level):
            return super().forward(F.pad(sinusoids, (0, self.channels - 2 * half)))


class TransformerLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, channels: int, head_dim: int, expansion: int):
        super().__init__()
        self.head_dim = head_dim
        self.attention_norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, expansion * channels), nn.GELU(), nn.Linear(expansion * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, N, C)`` to the same shape; row i of the output sees rows 0 to i."""
        batch, length, channels = x.shape
        # All sizes are given: PyTorch cannot infer one in an empty batch.
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, channels // self.head_dim, self.head_dim)
        # Unbinding before transposing lets autograd join the three gradients by one copy.
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        x = x + self.proj(causal_attention(q, k, v).transpose(1, 2).reshape(batch, length, channels))
        return x + self.mlp(self.mlp_norm(x))


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Switch autocast off: latents and parameters of a map stay float32, since rounding them would break inversion."""
    return torch.autocast(tensor.device.type, enabled=False)
