"""Multi-head causal self-attention as a layer: all tokens at once, or a few new ones against a cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .arguments import check_floating, check_same_device
from .attention import causal_attention
from .decode import decode_attention

__all__ = ["CausalSelfAttention"]


class CausalSelfAttention(nn.Module):
    """Multi-head attention: ``proj(softmax(q k^T / (sqrt(D) temperature) + mask) v)``, where ``q, k, v = qkv(x)``.

    Output i sees inputs 0 to i. ``decode`` gives what ``forward`` would, a few tokens at a time against a cache.

    Args:
        channels: C, the width of inputs and outputs.
        num_heads: H, a divisor of C; each head has ``head_dim`` D = C / H channels.
        bias: whether the projections ``qkv`` (C to 3C: queries, keys, values, each head by head) and ``proj`` (C to C)
            have one.

    Raises:
        ValueError: ``num_heads`` does not divide ``channels``.

    >>> from tarflow_kernels import KVCache
    >>> layer, x = CausalSelfAttention(8, num_heads=2), torch.randn(3, 5, 8)
    >>> [(cache_k, cache_v)] = KVCache.allocate(1, 3, layer.num_heads, 5, layer.head_dim)  # one layer, 3 rows, 5 tokens
    >>> positions = torch.zeros(3, dtype=torch.int32)
    >>> one_by_one = [layer.decode(x[:, i : i + 1], cache_k, cache_v, positions + i) for i in range(5)]
    >>> torch.allclose(torch.cat(one_by_one, dim=1), layer(x), atol=1e-5)
    True
    """

    def __init__(self, channels: int, num_heads: int, *, bias: bool = True) -> None:
        super().__init__()
        if not 0 < num_heads <= channels or channels % num_heads:
            raise ValueError(f"num_heads: expected a divisor of channels {channels}; got {num_heads}")
        self.num_heads, self.head_dim = num_heads, channels // num_heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=bias)
        self.proj = nn.Linear(channels, channels, bias=bias)

    def forward(self, x: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
        """Attend over all tokens at once.

        Args:
            x: ``(B, N, C)``, in the dtype of the weights, or any floating point under autocast.
            temperature: tau, a positive number, or ``(B,)``, one for each row, on the device of x.

        Returns:
            ``(B, N, C)``. Differentiable in x, the weights and a tensor temperature.

        Raises:
            TypeError: another dtype of x; a temperature that is not floating point.
            ValueError: another shape or device of x; a temperature that is not positive and finite, or does not fit.
        """
        return self._join(causal_attention(*self._split(x), temperature=temperature))

    @torch.no_grad()
    def decode(
        self, x: Tensor, cache_k: Tensor, cache_v: Tensor, positions: Tensor, *, temperature: float | Tensor = 1.0
    ) -> Tensor:
        """Attend from G new tokens per row, which begin at ``positions[b]``, to themselves and all before them.

        Args:
            x: ``(B, G, C)`` for G >= 1, the new tokens, of a dtype as in ``forward``.
            cache_k, cache_v: ``(B, H, capacity, D)``, updated in place: a layer of a :class:`KVCache` in the dtype of
                the weights or of autocast.
            positions: int32 ``(B,)`` on the device of x. On a GPU, that they lie between 0 and ``capacity - G`` is the
                caller's promise, as in :func:`decode_attention`; rows may stand at different positions.
            temperature: as in ``forward``.

        Returns:
            ``(B, G, C)``. Not differentiable.

        Raises:
            TypeError, ValueError: as ``forward``; caches or positions that do not fit in shape, dtype or device; more
                new tokens than the capacity; on a CPU, positions beyond it.
        """
        q, k, v = self._split(x)
        if cache_k.dim() == 4 and x.shape[1] > cache_k.shape[2]:
            raise ValueError(f"x: expected no more new tokens than the capacity {cache_k.shape[2]}; got {x.shape[1]}")
        return self._join(decode_attention(q, k, v, cache_k, cache_v, positions, temperature=temperature))

    def _split(self, x: Tensor) -> list[Tensor]:
        """Project to queries, keys and values ``(B, H, N, D)``, views of one tensor."""
        weight = self.qkv.weight
        if x.dim() != 3 or x.shape[2] != weight.shape[1]:
            raise ValueError(f"x: expected shape (B, N, {weight.shape[1]}); got {tuple(x.shape)}")
        check_floating("x", x.dtype)
        check_same_device("weights", weight, "x", x)
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x: expected the dtype of the weights, {weight.dtype}; got {x.dtype}")
        qkv = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim)
        # Unbound before they are transposed, the three gradients are joined by one copy.
        return [part.transpose(1, 2) for part in qkv.unbind(2)]

    def _join(self, heads: Tensor) -> Tensor:
        return self.proj(heads.transpose(1, 2).flatten(2))
