"""The causal transformer of a block: from the tokens up to position i to the affine parameters of token i + 1."""

import torch
from torch import Tensor, nn

from tarflow_kernels import causal_attention


class CausalTransformer(nn.Module):
    """Pre-norm transformer ``(B, N, D) -> (mu, alpha)``, each ``(B, N, D)``; row i of the output sees tokens 0 to i.

    The output projection starts at zero, so that an untrained block is the identity. With ``volume_preserving`` alpha
    is zero throughout. Tokens are in the order in which the block generates them. Under autocast the layers run in its
    precision, and the two projections at the ends in full.
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
        volume_preserving: bool = False,
    ):
        super().__init__()
        if channels % head_dim:
            raise ValueError(f"head_dim: expected a divisor of channels {channels}; got {head_dim}")
        self.volume_preserving = volume_preserving
        self.proj_in = nn.Linear(token_dim, channels)
        self.pos_embed = nn.Parameter(0.01 * torch.randn(num_tokens, channels))
        self.class_embed = nn.Parameter(0.01 * torch.randn(num_classes, channels)) if num_classes else None
        self.layers = nn.ModuleList(TransformerLayer(channels, head_dim, expansion) for _ in range(num_layers))
        self.proj_out = nn.Linear(channels, token_dim if volume_preserving else 2 * token_dim)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All positions at once, in training and scoring."""
        context = self.embed_classes(labels)
        with _full_precision(tokens):
            h = self.proj_in(tokens) + self.pos_embed
        if context is not None:
            h = h + context[:, None]
        for layer in self.layers:
            h = layer(h)
        return self.affine_parameters(h)

    def embed_classes(self, labels: Tensor | None) -> Tensor | None:
        """``(B, C)``: the embedding of each label; that of a dropped one (-1) is the mean over all classes."""
        if self.class_embed is None:
            return None
        table = torch.cat((self.class_embed, self.class_embed.mean(0, keepdim=True)))
        return table[labels]

    def affine_parameters(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """mu and alpha from the last activations."""
        with _full_precision(h):
            return self.split_output(self.proj_out(h))

    def split_output(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """mu and alpha, each ``(..., D)``, from the output of the last projection."""
        if self.volume_preserving:
            return out, torch.zeros_like(out)
        alpha, mu = out.chunk(2, dim=-1)
        return mu, alpha


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
        """``(B, N, C)`` to the same; row i of the output sees rows 0 to i."""
        batch, length, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, -1, self.head_dim)
        # Unbound before they are transposed, the three gradients are joined by one copy.
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        x = x + self.proj(causal_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1))
        return x + self.mlp(self.mlp_norm(x))


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Latents and affine parameters stay float32 under autocast: their rounding would break inversion."""
    return torch.autocast(tensor.device.type, enabled=False)
