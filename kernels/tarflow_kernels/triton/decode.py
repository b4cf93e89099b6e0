"""Attention of G new tokens per row against a key-value cache that the same launch extends.

A program owns the queries of one head of one row. It walks over the cached keys before the row's position, then over
the new ones, which it reads from the inputs, so that nobody waits for what it writes to the cache. Where rows and heads
are too few to fill the card, the cache is split: every split leaves a normalized output and its log-sum-exp, and a
second kernel merges them. Grid and splits follow from the shapes, never from positions, so that one CUDA graph serves
every step; a split with nothing to read weighs nothing.

Bytes to move: the cached keys and values once, ``2 B H n D`` elements at position n, and little else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import Config
from .tiles import (
    accumulate,
    accumulator,
    base_2,
    head_of,
    load_tile,
    logit_factor,
    store_tile,
    tile_mask,
    tile_pointers,
)


@triton.jit(do_not_specialize=["new"])  # a kernel for G = 1 alone would take more registers
def _decode_attention_kernel(
    Q,
    K,
    V,
    CacheK,
    CacheV,
    Positions,
    Temperature,
    Out,
    Lse,
    q_strides,
    k_strides,
    v_strides,
    cache_k_strides,
    cache_v_strides,
    out_strides,
    position_stride,
    temperature_stride,
    heads,
    new,
    capacity,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    split = (index % SPLITS).to(tl.int32)
    block = (index // SPLITS % tl.cdiv(new, BLOCK_G)).to(tl.int32)
    row_and_head = index // SPLITS // tl.cdiv(new, BLOCK_G)
    batch, head = row_and_head // heads, row_and_head % heads
    Q = head_of(Q, q_strides, batch, head)
    K = head_of(K, k_strides, batch, head)
    V = head_of(V, v_strides, batch, head)
    CacheK = head_of(CacheK, cache_k_strides, batch, head)
    CacheV = head_of(CacheV, cache_v_strides, batch, head)
    position = tl.load(Positions + batch * position_stride)
    ACC: tl.constexpr = accumulator(Q.dtype)
    factor = base_2(logit_factor(Temperature, temperature_stride, batch, scale, ACC))

    start_g = block * BLOCK_G
    q = load_tile(Q, q_strides, start_g, new, BLOCK_G, BLOCK_D, HEAD_DIM, False)
    m = tl.full([BLOCK_G], float("-inf"), ACC)
    l = tl.zeros([BLOCK_G], ACC)
    acc = tl.zeros([BLOCK_G, BLOCK_D], ACC)
    # Tiles go to the splits in turn, so that none idles while the cache is half full.
    end = tl.minimum(position, capacity)
    for start_n in tl.range(split * BLOCK_N, end, SPLITS * BLOCK_N):
        k = load_tile(CacheK, cache_k_strides, start_n, end, BLOCK_N, BLOCK_D, HEAD_DIM, False)
        v = load_tile(CacheV, cache_v_strides, start_n, end, BLOCK_N, BLOCK_D, HEAD_DIM, False)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        x = tl.where((start_n + tl.arange(0, BLOCK_N) < end)[None, :], x, float("-inf"))
        acc, m, l = accumulate(acc, m, l, x, v, factor, PRECISION)
    if split == SPLITS - 1:
        queries = start_g + tl.arange(0, BLOCK_G)
        for start_n in tl.range(0, start_g + BLOCK_G, BLOCK_G):
            k = load_tile(K, k_strides, start_n, new, BLOCK_G, BLOCK_D, HEAD_DIM, False)
            v = load_tile(V, v_strides, start_n, new, BLOCK_G, BLOCK_D, HEAD_DIM, False)
            x = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
            seen = queries[:, None] >= start_n + tl.arange(0, BLOCK_G)[None, :]
            acc, m, l = accumulate(acc, m, l, tl.where(seen, x, float("-inf")), v, factor, PRECISION)
        _append(CacheK, cache_k_strides, K, k_strides, position, start_g, new, capacity, BLOCK_G, BLOCK_D, HEAD_DIM)
        _append(CacheV, cache_v_strides, V, v_strides, position, start_g, new, capacity, BLOCK_G, BLOCK_D, HEAD_DIM)

    if SPLITS == 1:
        Out = head_of(Out, out_strides, batch, head)
        store_tile(Out, out_strides, acc * (1 / l)[:, None], start_g, new, BLOCK_G, BLOCK_D, HEAD_DIM, False)
    else:
        # Partial results are (B H, SPLITS, G, D); a split without keys has l = 0.
        part = row_and_head * SPLITS + split
        acc *= (1 / tl.where(l == 0, 1.0, l))[:, None]
        Out += part * new * HEAD_DIM
        store_tile(Out, (0, 0, HEAD_DIM, 1), acc, start_g, new, BLOCK_G, BLOCK_D, HEAD_DIM, False)
        rows = start_g + tl.arange(0, BLOCK_G)
        tl.store(Lse + part * new + rows, m + tl.log2(l), mask=rows < new)


@triton.jit
def _append(
    Cache,
    cache_strides,
    New,
    new_strides,
    position,
    start,
    new,
    capacity,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Write a tile of new tokens behind ``position``; what lies outside the cache is not written."""
    tile = load_tile(New, new_strides, start, new, ROWS, COLUMNS, HEAD_DIM, False)
    places = position + start + tl.arange(0, ROWS)
    inside = (places >= 0) & (places < capacity)
    mask = tile_mask(start, new, ROWS, COLUMNS, HEAD_DIM, False) & inside[:, None]
    tl.store(tile_pointers(Cache, cache_strides, position + start, ROWS, COLUMNS), tile, mask=mask)


@triton.jit
def _merge_splits_kernel(
    Partial,
    Lse,
    Out,
    out_strides,
    heads,
    new,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """``sum_s 2^(lse_s - lse) out_s`` for one query, where ``2^lse = sum_s 2^lse_s``."""
    index = tl.program_id(0).to(tl.int64)
    row_and_head, token = index // new, index % new
    parts = row_and_head * SPLITS + tl.arange(0, BLOCK_S)
    exists = tl.arange(0, BLOCK_S) < SPLITS
    channels = tl.arange(0, BLOCK_D)
    lse = tl.load(Lse + parts * new + token, mask=exists, other=float("-inf"))
    weights = tl.exp2(lse - tl.max(lse, 0))
    pointers = Partial + (parts * new + token)[:, None] * HEAD_DIM + channels[None, :]
    partial = tl.load(pointers, mask=exists[:, None] & (channels < HEAD_DIM)[None, :], other=0.0)
    out = tl.sum(partial * weights[:, None], 0) / tl.sum(weights, 0)
    Out = head_of(Out, out_strides, row_and_head // heads, row_and_head % heads) + token * out_strides[2]
    tl.store(Out + channels * out_strides[3], out.to(Out.dtype.element_ty), mask=channels < HEAD_DIM)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    positions: Tensor,
    temperature: Tensor | None,
    scale: float,
) -> Tensor:
    """Append keys and values to the cache and attend; the output ``(B, H, G, D)`` is laid out as ``(B, G, H, D)``."""
    batch, heads, new, head_dim = q.shape
    out = q.new_empty(batch, new, heads, head_dim).transpose(1, 2)
    if not q.numel():
        return out
    capacity = cache_k.shape[2]
    block_d = configs.block_of(head_dim)
    block_g = min(max(triton.next_power_of_2(new), 16), 64 if q.element_size() == 2 and block_d <= 128 else 16)
    key = configs.attention_key(q, capacity)
    config = configs.choose("decode_attention", key, fallback(q.element_size(), block_d))
    blocks = batch * heads * triton.cdiv(new, block_g)
    splits = count_splits(blocks, capacity)
    partial, lse = out, None
    if splits > 1:
        dtype = torch.promote_types(q.dtype, torch.float32)
        partial = q.new_empty(batch * heads, splits, new, head_dim, dtype=dtype)
        lse = q.new_empty(batch * heads, splits, new, dtype=dtype)
    _decode_attention_kernel[(blocks * splits,)](
        q,
        k,
        v,
        cache_k,
        cache_v,
        positions,
        temperature,
        partial,
        lse,
        q.stride(),
        k.stride(),
        v.stride(),
        cache_k.stride(),
        cache_v.stride(),
        out.stride(),
        positions.stride(0),
        0 if temperature is None else temperature.stride(0),
        heads,
        new,
        capacity,
        scale,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_G=block_g,
        SPLITS=splits,
        PRECISION=configs.dot_precision(q.dtype),
        **config,
    )
    if splits > 1:
        _merge_splits_kernel[(batch * heads * new,)](
            partial,
            lse,
            out,
            out.stride(),
            heads,
            new,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            SPLITS=splits,
            BLOCK_S=triton.next_power_of_2(splits),
            num_warps=4,
        )
    return out


def count_splits(blocks: int, capacity: int) -> int:
    """The number of parts of the cache that makes two programs per multiprocessor, none with fewer than 128 tokens.

    A power of two, at most 32; 1 where the rows and heads fill the card by themselves.
    """
    wanted = triton.cdiv(2 * configs.num_multiprocessors(), blocks) if blocks < configs.num_multiprocessors() else 1
    return min(triton.next_power_of_2(wanted), triton.next_power_of_2(max(capacity // 128, 1)), 32)


def fallback(itemsize: int, block_d: int) -> Config:
    """The configuration where nobody has tuned: it fits 99 KB of shared memory on sm_80 and spills nowhere on sm_90.

    >>> fallback(itemsize=2, block_d=64)
    {'BLOCK_N': 64, 'num_warps': 4, 'num_stages': 3}
    """
    if itemsize > 2 and block_d > 64:
        return {"BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    # With two stages a copy is waited for as soon as it was asked for; float32 has no room for three.
    stages = 3 if itemsize == 2 else 2
    return {"BLOCK_N": max(16, min(64, 8192 // block_d)), "num_warps": 4, "num_stages": stages}


CANDIDATES = [
    {"BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    for n in (32, 64, 128)
    for warps in (2, 4, 8)
    for stages in (2, 3, 4)
]
