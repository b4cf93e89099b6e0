"""Attention of new tokens against a key-value cache that they extend: one step of incremental decoding."""

from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, reference
from .attention import autocast, fold_temperature, scale_queries, serves
from .checks import check_attention, check_positions, check_same_device, check_scale, check_temperature


@dataclass(frozen=True)
class KVCache:
    """Preallocated keys and values of every layer, ``(L, R, H, capacity, D)`` each; iterating gives them by layer.

    It holds no positions: whoever decodes says where each row stands, so that rows may move independently and a
    rewound position simply overwrites what was there.
    """

    keys: Tensor
    values: Tensor

    @classmethod
    def allocate(cls, num_layers, rows, num_heads, capacity, head_dim, *, device=None, dtype=None) -> "KVCache":
        """An uninitialized cache; its contents are only ever read at positions that were written."""
        shape = (num_layers, rows, num_heads, capacity, head_dim)
        return cls(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))

    def __iter__(self):
        """``(cache_k, cache_v)``, each ``(R, H, capacity, D)``, for each layer."""
        return zip(self.keys.unbind(), self.values.unbind(), strict=True)


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
    # One comparison when all is well: this runs once per layer and token.
    shape, dtype = q.shape, q.dtype
    fits = (
        len(shape) == 4
        and shape[3] > 0
        and k.shape == shape == v.shape
        and cache_k.dim() == 4
        and cache_k.shape == cache_v.shape == (shape[0], shape[1], cache_k.shape[-2], shape[3])
        and dtype.is_floating_point
        and k.dtype == v.dtype == cache_k.dtype == cache_v.dtype == dtype
        and positions.shape == shape[:1]
        and positions.dtype == torch.int32
        and shape[2] <= cache_k.shape[2]
        and q.device == k.device == v.device == cache_k.device == cache_v.device == positions.device
    )
    if not fits:
        _explain(q, k, v, cache_k, cache_v, positions)
    check_temperature(temperature, q)
    check_scale(scale)
    return dispatch.call(
        "decode_attention", q, k, v, cache_k, cache_v, positions, *fold_temperature(q, temperature, scale)
    )


def _explain(q, k, v, cache_k, cache_v, positions) -> NoReturn:
    """Raise the error of the argument that does not fit."""
    check_attention(q=q, k=k, v=v)
    rows, heads, new, head_dim = q.shape
    check_positions(positions, rows)
    check_same_device(q=q, cache_k=cache_k, cache_v=cache_v, positions=positions)
    for name, cache in (("cache_k", cache_k), ("cache_v", cache_v)):
        if cache.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}; got {cache.dtype}")
        if cache.dim() != 4 or (*cache.shape[:2], cache.shape[3]) != (rows, heads, head_dim):
            raise ValueError(
                f"{name}: expected shape ({rows}, {heads}, capacity, {head_dim}); got {tuple(cache.shape)}"
            )
    if new > cache_k.shape[2]:
        raise ValueError(
            f"q: expected no more new tokens than the capacity of the cache, {cache_k.shape[2]}; got {new}"
        )
    raise ValueError(f"cache_v: expected the shape of cache_k, {tuple(cache_k.shape)}; got {tuple(cache_v.shape)}")


def _reference(q, k, v, cache_k, cache_v, positions, temperature, scale):
    temperature = 1.0 if temperature is None else temperature
    return reference.decode_attention(q, k, v, cache_k, cache_v, positions, temperature=temperature, scale=scale)


def _torch(q, k, v, cache_k, cache_v, positions, temperature, scale):
    q = scale_queries(q, temperature)
    if q.device.type != "cpu" or not q.shape[0]:
        return _torch_scattered(q, k, v, cache_k, cache_v, positions, scale, clean=False)
    standing, new = positions.tolist(), q.shape[2]
    first, last = min(standing), max(standing)
    if first < 0 or last + new > cache_k.shape[2]:
        raise ValueError(f"positions: expected 0 to capacity {cache_k.shape[2]} - G; got {first} to {last}")
    # What no row has reached yet need not be read.
    cache_k, cache_v = cache_k[:, :, : last + new], cache_v[:, :, : last + new]
    if first == last:
        return _torch_abreast(q, k, v, cache_k, cache_v, first, scale)
    # To look at what only some rows have written costs far less than to copy everything.
    clean = all(torch.linalg.vector_norm(cache[:, :, first + new :]) < 1e6 for cache in (cache_k, cache_v))
    return _torch_scattered(q, k, v, cache_k, cache_v, positions, scale, clean)


def _torch_abreast(q, k, v, cache_k, cache_v, start, scale):
    """All rows stand at one position, known to the host: slices instead of indices, and the cache is read in place."""
    cache_k[:, :, start:] = k
    cache_v[:, :, start:] = v
    seen = None
    if q.shape[2] > 1:
        seen = torch.ones(q.shape[2], cache_k.shape[2], dtype=torch.bool, device=q.device).tril(diagonal=start)
    return F.scaled_dot_product_attention(q, cache_k, cache_v, attn_mask=seen, scale=scale)


def _torch_scattered(q, k, v, cache_k, cache_v, positions, scale, clean):
    """Rows stand anywhere; ``clean`` where the caches hold moderate numbers throughout, whoever wrote them."""
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
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # as a compiler was told, and CPUs have it anyway


def _fake(q, k, v, cache_k, cache_v, positions, temperature, scale):
    batch, heads, new, head_dim = q.shape
    return q.new_empty(batch, new, heads, head_dim).transpose(1, 2)


dispatch.register(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor positions,"
    " Tensor? temperature, float scale) -> Tensor",
    fake=_fake,
    serves=serves,
    reference=_reference,
    torch=_torch,
    triton=dispatch.launcher("decode", "decode_attention"),
)
