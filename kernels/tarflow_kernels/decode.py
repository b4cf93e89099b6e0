"""Attention of new tokens against a key-value cache that they extend: one step of incremental decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, reference
from .arguments import (
    autocast,
    check_floating,
    check_scale,
    check_temperature,
    check_tensors,
    fold_temperature,
    has_attention_kernel,
    scale_queries,
)

__all__ = ["KVCache", "decode_attention"]


@dataclass(frozen=True)
class KVCache:
    """Preallocated keys and values of every layer; iterating gives them by layer.

    It holds no positions: whoever decodes says where each row stands, so that rows may move independently and a
    rewound position simply overwrites what was there.

    Attributes:
        keys, values: ``(L, R, H, capacity, D)``, L layers of R rows and H heads.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(
        cls,
        num_layers: int,
        rows: int,
        num_heads: int,
        capacity: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """Allocate a cache without writing to it: contents are only ever read at positions that were written."""
        shape = (num_layers, rows, num_heads, capacity, head_dim)
        return cls(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over layers: ``(cache_k, cache_v)``, each ``(R, H, capacity, D)``."""
        return zip(self.keys.unbind(), self.values.unbind())


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    positions: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    scale: float | None = None,
) -> Tensor:
    """Append G new tokens per row to the cache, then attend: ``softmax(q K^T * scale / temperature) V``.

    Row b writes its G keys and values into ``cache_*[b, :, positions[b] : positions[b] + G]`` in place; its query g
    then sees the cached positions 0 to ``positions[b] + g``, and nothing later is read.

    Args:
        q, k, v: ``(B, H, G, D)`` for G >= 1, of one dtype. Under autocast they are cast to the dtype of the cache.
        cache_k, cache_v: ``(B, H, capacity, D)``, updated in place.
        positions: int32 ``(B,)`` on the device of q; rows may stand at different positions. On a GPU its values are
            never brought to the host: that they lie between 0 and ``capacity - G`` is the caller's promise. Where it is
            broken the row's output means nothing, but no memory beside the cache is touched.
        temperature: tau, a positive number, or ``(B,)``, one for each row.
        scale: a positive number, 1 / sqrt(D) by default.

    Returns:
        ``(B, H, G, D)`` in the dtype of q. Not differentiable.

    Raises:
        TypeError: dtypes that are not floating point or differ; positions that are not int32.
        ValueError: shapes or devices that do not fit each other; a temperature or scale that is not positive and
            finite; on a CPU, positions beyond the capacity.
    """
    q, k, v = autocast(q, k, v)
    shape, dtype = q.shape, q.dtype
    check_floating("q", dtype)
    if len(shape) != 4 or not shape[3]:
        raise ValueError(f"q: expected shape (B, H, G, D), D at least 1; got {tuple(shape)}")
    (rows, heads, new, head_dim), given = shape, cache_k.shape
    if len(given) != 4:
        raise ValueError(f"cache_k: expected shape ({rows}, {heads}, capacity, {head_dim}); got {tuple(given)}")
    capacity = given[2]
    cached = rows, heads, capacity, head_dim
    check_tensors(
        "q",
        q,
        ("k", k, shape, dtype),
        ("v", v, shape, dtype),
        ("cache_k", cache_k, cached, dtype),
        ("cache_v", cache_v, cached, dtype),
        ("positions", positions, (rows,), torch.int32),
    )
    if new > capacity:
        raise ValueError(f"q: expected no more new tokens than the capacity of the cache, {capacity}; got {new}")
    check_temperature(temperature, q)
    check_scale(scale)
    return dispatch.call(
        "decode_attention", q, k, v, cache_k, cache_v, positions, *fold_temperature(q, temperature, scale)
    )


def _reference(q, k, v, cache_k, cache_v, positions, temperature, scale):
    temperature = 1.0 if temperature is None else temperature
    return reference.decode_attention(q, k, v, cache_k, cache_v, positions, temperature=temperature, scale=scale)


def _torch(q, k, v, cache_k, cache_v, positions, temperature, scale):
    q = scale_queries(q, temperature)
    if q.device.type != "cpu" or not q.shape[0]:
        return _torch_scattered(q, k, v, cache_k, cache_v, positions, scale, clean=False)
    values, new = positions.tolist(), q.shape[2]
    first, last = min(values), max(values)
    if first < 0 or last + new > cache_k.shape[2]:
        raise ValueError(f"positions: expected 0 to capacity {cache_k.shape[2]} - G; got {first} to {last}")
    # Nothing behind the last row's tokens need be read.
    cache_k, cache_v = cache_k[:, :, : last + new], cache_v[:, :, : last + new]
    if first == last:
        return _torch_aligned(q, k, v, cache_k, cache_v, first, scale)
    # Reading what only some rows have written costs far less than copying everything.
    clean = all(torch.linalg.vector_norm(cache[:, :, first + new :]) < 1e6 for cache in (cache_k, cache_v))
    return _torch_scattered(q, k, v, cache_k, cache_v, positions, scale, clean)


def _torch_aligned(q, k, v, cache_k, cache_v, start, scale):
    """Decode rows that stand at one position, known to the host: by slices, and the cache is read in place."""
    cache_k[:, :, start:] = k
    cache_v[:, :, start:] = v
    seen = None
    if q.shape[2] > 1:
        seen = torch.ones(q.shape[2], cache_k.shape[2], dtype=torch.bool, device=q.device).tril(diagonal=start)
    return F.scaled_dot_product_attention(q, cache_k, cache_v, attn_mask=seen, scale=scale)


def _torch_scattered(q, k, v, cache_k, cache_v, positions, scale, clean):
    """Decode rows that stand anywhere; ``clean``: the caches hold moderate numbers throughout, whoever wrote them."""
    index = positions[:, None].long() + torch.arange(q.shape[2], device=q.device)
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    cache_k[rows, :, index] = k.transpose(1, 2)
    cache_v[rows, :, index] = v.transpose(1, 2)
    seen = torch.arange(cache_k.shape[2], device=q.device) <= index[:, None, :, None]
    if not clean:
        # A mask is added to logits: it hides neither a NaN nor an overflow in memory that was never written.
        written = seen[:, :, -1, :, None]
        cache_k, cache_v = cache_k.masked_fill(~written, 0), cache_v.masked_fill(~written, 0)
    out = F.scaled_dot_product_attention(q, cache_k, cache_v, attn_mask=seen, scale=scale)
    # The layout that compilers were told of, and that a CPU's attention has anyway.
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _fake(q, k, v, cache_k, cache_v, positions, temperature, scale):
    batch, heads, new, head_dim = q.shape
    return q.new_empty(batch, new, heads, head_dim).transpose(1, 2)


dispatch.register(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor positions,"
    " Tensor? temperature, float scale) -> Tensor",
    fake=_fake,
    serves=has_attention_kernel,
    reference=_reference,
    torch=_torch,
    triton=dispatch.launcher("decode", "decode_attention"),
)
