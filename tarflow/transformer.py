"""The causal transformer of a block: from the tokens up to position i to the parameters of the map of token i + 1."""

import math
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tarflow_kernels import causal_attention

from .transforms import AffineTransform, Parameters

__all__ = [
    "NO_CONTEXT",
    "UNCONDITIONAL",
    "CausalTransformer",
    "Condition",
    "Context",
    "NoiseEmbedding",
    "RotaryPositions",
    "TransformerLayer",
    "rotate",
]


class Condition(NamedTuple):
    """Conditions of the samples of a batch, each part where the flow is made for it."""

    labels: Tensor | None = None
    """classes, int64 ``(B,)``, -1 for a dropped one"""
    noise_level: Tensor | None = None
    """standard deviations of the noise, ``(B,)``"""
    prefix: Tensor | None = None
    """embeddings that come before the tokens, such as those of a text, ``(B, L, E)``"""


class Context(NamedTuple):
    """A condition as a block takes it in; the parts are None where there are none.

    In decoding, ``...`` are the branches of guidance.
    """

    added: Tensor | None = None
    """what is added to all tokens of a sample, ``(B, ..., C)``"""
    prefix: Tensor | None = None
    """what comes before the tokens of a sample, ``(B, ..., L, C)``"""

    def select(self, samples: Tensor | slice) -> Self:
        """Return the context of some samples."""
        return self._replace(**{name: part[samples] for name, part in self._asdict().items() if part is not None})


UNCONDITIONAL = Condition()
NO_CONTEXT = Context()


class CausalTransformer(nn.Module):
    """Pre-norm transformer of tokens ``(B, N, D)``; row i of the output sees tokens 0 to i.

    It returns the parameters of a transform (:mod:`tarflow.transforms`): mu and alpha, each ``(B, N, D)``, and the
    mixture if there is one. The weight of the output projection starts at zero and its bias as the transform asks, so
    that an untrained block is about the identity. Tokens are in the order in which the block generates them. Under
    autocast the layers run in its precision, and the two projections at the ends in full.

    Args:
        num_tokens, token_dim: N and D.
        channels, num_layers, head_dim, expansion: the size of the layers.
        num_classes: number of embedded classes.
        takes_noise_level: whether noise levels are embedded.
        positions: how the layers know where a token is: ``"learned"``, an embedding of each position, or ``"rotary"``,
            see :class:`RotaryPositions`.
        final_norm: whether the last activations are normalized: ``(1 + w) h / sqrt(mean(h^2) + 1e-6)``.
        start_token: whether a learned token precedes the first, so that row i sees tokens 0 to i - 1.
        prefix_length: L, the number of embeddings that come before the tokens of any block of the flow.
        prefix_dim: E, their size; 0 for a block that sees none.
        transform: the map whose parameters are computed.

    Source: TarFlow (arXiv 2412.06329); rotary positions, the last norm and the prefix STARFlow (arXiv 2506.06276).
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
        positions: str = "learned",
        final_norm: bool = False,
        start_token: bool = False,
        prefix_length: int = 0,
        prefix_dim: int = 0,
        transform: AffineTransform,
    ):
        super().__init__()
        if channels % head_dim:
            raise ValueError(f"head_dim: expected a divisor of channels {channels}; got {head_dim}")
        self.transform = transform
        self.start_token = nn.Parameter(torch.randn(token_dim)) if start_token else None
        self.proj_in = nn.Linear(token_dim, channels)
        rotary = positions == "rotary"
        self.pos_embed = None if rotary else nn.Parameter(0.01 * torch.randn(num_tokens, channels))
        self.rotary = RotaryPositions(num_tokens, head_dim, prefix_length) if rotary else None
        self.class_embed = nn.Parameter(0.01 * torch.randn(num_classes, channels)) if num_classes else None
        self.noise_embed = NoiseEmbedding(channels) if takes_noise_level else None
        self.proj_prefix = nn.Linear(prefix_dim, channels) if prefix_dim else None
        self.layers = nn.ModuleList(TransformerLayer(channels, head_dim, expansion) for _ in range(num_layers))
        self.final_norm = nn.Parameter(torch.zeros(channels)) if final_norm else None
        self.proj_out = nn.Linear(channels, transform.outputs * token_dim)
        nn.init.zeros_(self.proj_out.weight)
        transform.initialize(self.proj_out.bias.data)

    def forward(self, tokens: Tensor, condition: Condition = UNCONDITIONAL) -> Parameters:
        """Compute the parameters of all positions at once, in training and scoring."""
        added, prefix = self.embed_context(condition)
        if self.start_token is not None:
            tokens = self.prepend_start(tokens[:, :-1])
        with _full_precision(tokens):
            h = self.proj_in(tokens)
        if self.pos_embed is not None:
            h = h + self.pos_embed
        if added is not None:
            h = h + added[:, None]
        before = 0
        if prefix is not None:
            h, before = torch.cat((prefix, h), dim=1), prefix.shape[1]
        rotation = None if self.rotary is None else self.rotary.table(h, before)
        for layer in self.layers:
            h = layer(h, rotation)
        return self.project_out(h[:, before:])

    def prepend_start(self, tokens: Tensor) -> Tensor:
        """Put the start token before tokens ``(B, N, D)``, if there is one."""
        if self.start_token is None:
            return tokens
        start = self.start_token.to(tokens.dtype).expand(tokens.shape[0], 1, -1)
        return torch.cat((start, tokens), dim=1)

    def embed_context(self, condition: Condition) -> Context:
        """Embed the label of each sample and its noise level, and project its prefix."""
        labels, noise_level, prefix = condition
        added = self.embed_classes(labels)
        if self.noise_embed is not None:
            assert noise_level is not None, "a flow that takes a noise level checks it"
            noise = self.noise_embed(noise_level)
            added = noise if added is None else added + noise
        if self.proj_prefix is None:
            return Context(added)
        assert prefix is not None, "a flow that takes a prefix checks it"
        with _full_precision(prefix):
            return Context(added, self.proj_prefix(prefix.to(self.proj_prefix.weight.dtype)))

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
            if self.final_norm is not None:
                h = F.rms_norm(h, h.shape[-1:], 1 + self.final_norm, eps=1e-6)
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


class RotaryPositions:
    """Angles by which the channels of queries and keys turn, in neighbouring pairs: those of a prefix and of a grid.

    Tokens lie on a grid of N = S^2 or, where N is no square, in a row; token i of the *order of generation* is at row
    i // S and column i % S. Pairs 0 to P/2 - 1 of a head turn by ``row 10000^(-2k/P)``, the next P/2 by the column
    likewise. Where there is a prefix of L embeddings, P is 8 less than half of the size of a head, and the last 8 pairs
    turn by ``10000^(-k/8)`` times j sqrt(N) / L, for embedding j, and not at all for tokens, as the first do not for
    the prefix. Source: STARFlow (arXiv 2506.06276) and its release.

    Args:
        num_tokens: N.
        head_dim: size of a head, a multiple of 4.
        prefix_length: L, 0 without a prefix.

    Raises:
        ValueError: a size of a head that has no such pairs.
    """

    PREFIX_PAIRS = 8

    def __init__(self, num_tokens: int, head_dim: int, prefix_length: int = 0):
        last = self.PREFIX_PAIRS if prefix_length else 0
        if head_dim % 4 or head_dim // 2 <= last:
            least = 2 * last + 4
            raise ValueError(f"head_dim: expected a multiple of 4 from {least} on, to be rotary; got {head_dim}")
        self.num_tokens, self.head_dim, self.prefix_length = num_tokens, head_dim, prefix_length

    def table(self, like: Tensor, prefix: int, num_tokens: int | None = None) -> Tensor:
        """Return cosines and sines of the angles, ``(2, prefix + N, head_dim / 2)``, as float32 or float64.

        The ``prefix`` is L, or 0 for a block that does not see it. There are as many tokens as ``num_tokens`` says, of
        the same grid, where a start token comes before them.
        """
        side = math.isqrt(self.num_tokens)
        width = side if side**2 == self.num_tokens else self.num_tokens
        dtype = torch.promote_types(like.dtype, torch.float32)
        tokens = torch.arange(num_tokens or self.num_tokens, device=like.device, dtype=torch.float64)
        last = self.PREFIX_PAIRS if self.prefix_length else 0
        pairs = self.head_dim // 2 - last
        frequencies = 10_000 ** (-2 * torch.arange(pairs // 2).to(tokens) / pairs)
        rows, columns = tokens.div(width, rounding_mode="floor"), tokens % width
        angles = [place[:, None] * frequencies for place in (rows, columns)]
        of_tokens = F.pad(torch.cat(angles, dim=1), (0, last))
        if not prefix:
            return torch.stack((of_tokens.cos(), of_tokens.sin())).to(dtype)
        text = torch.arange(prefix).to(tokens) * (self.num_tokens**0.5 / self.prefix_length)
        of_prefix = F.pad(text[:, None] * 10_000 ** (-torch.arange(last).to(tokens) / last), (pairs, 0))
        both = torch.cat((of_prefix, of_tokens))
        return torch.stack((both.cos(), both.sin())).to(dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn pairs of neighbouring channels of x ``(..., D)`` by angles, given as cosines and sines ``(2, ..., D / 2)``.

    ``(x_0 cos - x_1 sin, x_0 sin + x_1 cos)`` for each pair, in the dtype of x.
    """
    cos, sin = rotation.to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


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

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """Map ``(B, N, C)`` to the same shape; row i of the output sees rows 0 to i.

        Queries and keys are turned by the rotation, ``(2, N, head_dim / 2)``, if there is one: see :func:`rotate`.
        """
        batch, length, channels = x.shape
        # All sizes are given: PyTorch cannot infer one in an empty batch.
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, channels // self.head_dim, self.head_dim)
        # Unbinding before transposing lets autograd join the three gradients by one copy.
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        x = x + self.proj(causal_attention(q, k, v).transpose(1, 2).reshape(batch, length, channels))
        return x + self.mlp(self.mlp_norm(x))


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Switch autocast off: latents and parameters of a map stay float32, since rounding them would break inversion."""
    return torch.autocast(tensor.device.type, enabled=False)
