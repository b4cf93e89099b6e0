"""Tiles in and out of memory, and the running softmax: the parts that the attention kernels share.

Strides come as tuples ``(batch, head, token, channel)``, and what they multiply is int64. Tiles have a power of two of
channels, COLUMNS; those beyond HEAD_DIM are zeros on the way in and masked on the way out. FULL promises that all
tokens of a tile lie before ``end``.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def accumulator(pointer_type):
    """The type of sums: float64 for float64 inputs, which only the interpreter takes, and float32 for all others."""
    return tl.float64 if pointer_type.element_ty == tl.float64 else tl.float32


@triton.jit
def head_of(pointer, strides, batch, head):
    """The pointer to the ``(N, D)`` matrix of a head."""
    return pointer + batch * strides[0] + head * strides[1]


@triton.jit
def logit_factor(Temperature, stride, batch, scale, ACC: tl.constexpr):
    """``scale / temperature`` of a row; without a tensor of temperatures, ``scale``."""
    factor = tl.full([], scale, ACC)
    if Temperature is not None:
        factor /= tl.load(Temperature + batch * stride).to(ACC)
    return factor


@triton.jit
def base_2(factor):
    """The factor of the same logits as exponents of 2: times log2(e), which as a literal takes the type of factor."""
    return factor * 1.4426950408889634


@triton.jit
def tile_pointers(head, strides, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to ``(ROWS, COLUMNS)`` elements of a head, from token ``start`` on."""
    tokens = (start + tl.arange(0, ROWS)).to(tl.int64)
    channels = tl.arange(0, COLUMNS).to(tl.int64)
    return head + tokens[:, None] * strides[2] + channels[None, :] * strides[3]


@triton.jit
def tile_mask(start, end, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, FULL: tl.constexpr):
    """The mask of the elements of a tile that exist, or None where all do."""
    tokens = (start + tl.arange(0, ROWS) < end)[:, None]
    channels = (tl.arange(0, COLUMNS) < HEAD_DIM)[None, :]
    if FULL and COLUMNS == HEAD_DIM:
        mask = None
    elif FULL:
        mask = channels
    elif COLUMNS == HEAD_DIM:
        mask = tokens
    else:
        mask = tokens & channels
    return mask


@triton.jit
def load_tile(
    head,
    strides,
    start,
    end,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FULL: tl.constexpr,
):
    """Load a tile, with zeros where there is nothing."""
    mask = tile_mask(start, end, ROWS, COLUMNS, HEAD_DIM, FULL)
    return tl.load(tile_pointers(head, strides, start, ROWS, COLUMNS), mask=mask, other=None if mask is None else 0.0)


@triton.jit
def store_tile(
    head,
    strides,
    tile,
    start,
    end,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FULL: tl.constexpr,
):
    """Store a tile in the type of the destination."""
    pointers = tile_pointers(head, strides, start, ROWS, COLUMNS)
    mask = tile_mask(start, end, ROWS, COLUMNS, HEAD_DIM, FULL)
    tl.store(pointers, tile.to(head.dtype.element_ty), mask=mask)


@triton.jit
def accumulate(acc, m, l, x, v, factor, PRECISION: tl.constexpr):
    """Take logits ``factor x`` in base 2 and their values into the softmax so far.

    ``m`` is the maximum of each row, ``l`` the sum of its weights and ``acc`` that of its weighted values, both
    relative to ``2^m``. A row must have seen a finite logit by the end of its first tile.
    """
    new_m = tl.maximum(m, tl.max(x, 1) * factor)
    p = tl.exp2(x * factor - new_m[:, None])
    shrink = tl.exp2(m - new_m)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION, out_dtype=acc.dtype)
    return acc, new_m, l * shrink + tl.sum(p, 1)
