"""Launches of every kernel on tensors as the published models have them, for :mod:`.tune` and :mod:`.resources`.

On the device ``"meta"``, whose tensors have no storage, a launch only shows what would be compiled.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .scales import EXP, Scale

__all__ = ["affine", "attention", "decoding", "embedding", "mixture", "normalization"]

Launch = Callable[[], object]
"""A launch, which returns what its kernel computed."""

HEADS, CAPACITY = 12, 1024


def attention(
    device: str, dtype: torch.dtype, rows: int, length: int, head_dim: int, *, tempered: bool = False
) -> tuple[Launch, Launch]:
    """Attention forward and backward, of queries, keys and values that a fused projection made."""
    from .triton.attention import causal_attention_backward, causal_attention_forward

    q, k, v = torch.randn(rows, length, 3, HEADS, head_dim, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    options = torch.ones(rows, device=device) if tempered else None, head_dim**-0.5
    forward = functools.partial(causal_attention_forward, q, k, v, *options)
    out, lse = forward()
    return forward, functools.partial(causal_attention_backward, out, q, k, v, out, lse, *options)


def decoding(
    device: str,
    dtype: torch.dtype,
    rows: int,
    new: int,
    head_dim: int,
    *,
    capacity: int = CAPACITY,
    tempered: bool = False,
) -> Launch:
    """Attention of new tokens, the last that fit into the cache."""
    from .triton.decode import decode_attention

    q, k, v = torch.randn(rows, new, 3, HEADS, head_dim, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    cache_k, cache_v = torch.randn(2, rows, HEADS, capacity, head_dim, device=device).to(dtype)
    positions = torch.full((rows,), capacity - new, dtype=torch.int32, device=device)
    temperature = torch.ones(rows, device=device) if tempered else None
    return functools.partial(decode_attention, q, k, v, cache_k, cache_v, positions, temperature, head_dim**-0.5)


def affine(
    device: str,
    dtype: torch.dtype,
    rows: int,
    length: int,
    token_dim: int,
    *,
    inverse: bool = False,
    scale: Scale = EXP,
) -> tuple[Launch, Launch]:
    """An affine map and its gradients; parameters are the halves of an output, and those of the token before."""
    from .triton.affine import affine_map, affine_map_backward

    x = torch.randn(rows, length, token_dim, device=device)
    alpha, mu = torch.randn(rows, length, 2 * token_dim, device=device).to(dtype).chunk(2, dim=-1)
    options = True, inverse, *scale
    forward = functools.partial(affine_map, x, mu, alpha, *options)
    z, logdet = forward()
    return forward, functools.partial(affine_map_backward, z, logdet, z, alpha, x.dtype, mu.dtype, *options)


def mixture(
    device: str, dtype: torch.dtype, rows: int, components: int, order: str, *, inverse: bool = False
) -> tuple[Launch, Launch]:
    """A mixture of logistics, forward or inverse, and its gradients, in a coupling of Flow++ for CIFAR-10.

    Parameters are parts of an output with two more channels. ``order`` says what lies next to each other in memory:
    "elements", as PyTorch has it, or "components".
    """
    from .triton.mixture import mixture_map, mixture_map_backward

    shape = rows, 3, 32, 16
    outputs = torch.randn(*shape, 2 + 3 * components, device=device).to(dtype)
    if order == "elements":
        outputs = outputs.movedim(-1, 2).contiguous().movedim(2, -1)
    x, (logits, means, log_scales) = torch.randn(shape, device=device), outputs[..., 2:].chunk(3, dim=-1)
    options = -7.0, inverse
    forward = functools.partial(mixture_map, x, logits, means, log_scales, *options)
    out, logdet = forward()
    return forward, functools.partial(
        mixture_map_backward, out, logdet, out, logits, means, log_scales, x.dtype, *options
    )


def embedding(
    device: str, dtype: torch.dtype, rows: int, length: int, token_dim: int, channels: int, *, guided: bool
) -> Launch:
    """The link between two passes of a decoding step; with guidance parameters are the quarters of an output."""
    from .triton.embed import embed_next

    x, z = torch.randn(2, rows, length, token_dim, device=device)
    halves = torch.randn(2 * rows, 2 * token_dim, device=device).to(dtype).chunk(2)
    (alpha, mu), (alpha_ref, mu_ref) = (half.chunk(2, dim=-1) for half in halves)
    others: tuple[Tensor | None, Tensor | None] = (mu_ref, alpha_ref) if guided else (None, None)
    weights = torch.ones(length, device=device) if guided else None
    all_rows = (1 + guided) * rows
    tables = (token_dim, channels), (length, channels), (all_rows, channels)
    positions, tickets = (torch.zeros(count, dtype=torch.int32, device=device) for count in (all_rows, rows))
    h = torch.empty(all_rows, channels, device=device)
    rest = positions, *(torch.randn(shape, device=device) for shape in tables), h, tickets
    return functools.partial(embed_next, x, z, mu, alpha, *others, weights, *rest)


def normalization(device: str, dtype: torch.dtype, rows: int, channels: int, *, residual: bool) -> Launch:
    """A layer norm between two products in low precision, with something to add or without."""
    from .triton.norm import residual_norm

    h, weight = torch.randn(rows, channels, device=device), torch.ones(channels, device=device)
    delta = torch.randn(rows, channels, device=device).to(dtype) if residual else None
    return functools.partial(residual_norm, h, delta, weight, weight, 1e-5, dtype)
