"""Views of tensors ``(B, ...)`` in any strides for kernels that go element by element.

A sample is a run of elements, counted by one flat index, and a program owns a tile of several short samples or a part
of a long one.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import SymInt, Tensor


class Space(NamedTuple):
    """The elements of a sample, in as few dimensions as the strides of all tensors allow, innermost first.

    A load takes several elements at once only where Triton can tell that they lie together and are aligned, and of an
    argument it knows no more than whether 16 divides it. So numbers are given in grains: powers of two that divide
    them, known when the kernel is compiled.
    """

    grain: tl.constexpr
    sizes: tuple[tl.constexpr | int, ...]  # in elements; the first is known to the compiler too
    token: int | None  # the size of a token, in grains, where parameters are those of the token before


class View(NamedTuple):
    """A tensor over a space; its start and all strides but the first are in its own grains."""

    pointer: Tensor
    grain: tl.constexpr
    start: int
    strides: tuple[int, ...]  # of the dimensions of the space, then of the batch


@triton.jit
def tile(space, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The samples ``(ROWS, 1)`` and indices ``(1, BLOCK)`` of a tile, which exist, and the part of how many it is."""
    inner = inner_size(space)
    parts = tl.cdiv(inner, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    part = program % parts
    row = (program // parts * ROWS + tl.arange(0, ROWS))[:, None]
    index = (part * BLOCK + tl.arange(0, BLOCK))[None, :]
    return row, index, (row < rows) & (index < inner), part, parts


@triton.jit
def inner_size(space):
    """The number of elements of a sample."""
    inner = tl.cast(1, tl.int64)
    for k in tl.static_range(len(space.sizes)):
        inner *= space.sizes[k]
    return inner


@triton.jit
def load(view, space, row, index, mask, ACC: tl.constexpr):
    """The elements of a tile in the type of sums; zeros where the mask is off."""
    return tl.load(view.pointer + offsets(view, space, row, index), mask=mask, other=0.0).to(ACC)


@triton.jit
def offsets(view, space, row, index):
    """The offsets of elements, in int64 as ``row`` and ``index`` are."""
    last: tl.constexpr = len(space.sizes) - 1
    grain: tl.constexpr = view.grain
    places = row * view.strides[last + 1] * grain + view.start * grain + index % space.sizes[0] * view.strides[0]
    index = index // space.sizes[0]
    for k in tl.static_range(1, last):
        places += index % space.sizes[k] * view.strides[k] * grain
        index = index // space.sizes[k]
    return places + index * view.strides[last] * grain


@triton.jit
def log1p(y):
    """``log(1 + y)`` for y from 0 to 1, with the rounding of the sum made good."""
    total = 1 + y
    lost = y - (total - 1)
    return tl.log(total) + lost / total


def cut(tensor: Tensor, config: dict[str, int]) -> tuple[tuple[int], dict[str, int]]:
    """Cut samples into tiles: the grid and options for BLOCK elements of a sample, and as many samples as fit."""
    rows, inner = len(tensor), math.prod(tensor.shape[1:])
    block = min(triton.next_power_of_2(inner), config["BLOCK"])
    rows_each = config["BLOCK"] // block
    grid = triton.cdiv(rows, rows_each) * triton.cdiv(inner, block)
    return (grid,), config | {"ROWS": rows_each, "BLOCK": block}


def views_of(*tensors: Tensor, shift: bool = False) -> tuple[Space, list[View]]:
    """View tensors of one shape ``(B, ...)`` as kernels take them, in the order of elements of the first in memory."""
    strides = tuple(tensor.stride() for tensor in tensors)
    # A kernel takes several elements at once only from an aligned pointer: what is before the first becomes ``start``.
    starts = tuple(tensor.storage_offset() % (16 // tensor.element_size()) for tensor in tensors)
    (grain, sizes, token), places = _lay_out(tensors[0].shape, strides, starts, shift)
    space = Space(tl.constexpr(grain), (tl.constexpr(sizes[0]), *sizes[1:]), token)
    return space, [
        View(_aligned(tensor, before), tl.constexpr(grain), start, steps)
        for tensor, before, (grain, start, steps) in zip(tensors, starts, places)
    ]


def _aligned(tensor: Tensor, before: int | SymInt) -> Tensor:
    return tensor.as_strided((), (), tensor.storage_offset() - before) if before else tensor


@functools.lru_cache(maxsize=1024)
def _lay_out(shape, strides, starts, shift):
    """Compute the numbers of the :class:`Space` of tensors and of the :class:`View` of each.

    Dimensions merge where they lie one after the other in all tensors. Here the second tensor is the right half of one
    twice as wide, which keeps tokens and channels apart; then there is but one dimension, which is cut into grains:

    >>> _lay_out((2, 49, 12), ((588, 12, 1), (1176, 24, 1)), (0, 4), False)
    ((4, (12, 49), None), ((4, 0, (1, 3, 147)), (4, 1, (1, 6, 294))))
    >>> _lay_out((2, 49, 12), ((588, 12, 1),), (0,), True)
    ((4, (4, 147), 3), ((4, 0, (1, 1, 147)),))
    """
    inner = [k for k in range(1, len(shape)) if shape[k] != 1]
    if not shift:  # where the token before is not asked for, any order of elements will do
        inner.sort(key=lambda k: -strides[0][k])
    sizes, steps = [], []
    for k in reversed(inner):
        step = [stride[k] for stride in strides]
        if sizes and step == [sizes[-1] * stride for stride in steps[-1]]:
            sizes[-1] *= shape[k]
        else:
            sizes.append(shape[k])
            steps.append(step)
    sizes, steps = sizes or [1], steps or [[0] * len(strides)]
    token = math.prod(shape[2:]) if shift else 0
    grain = math.gcd(16, sizes[0], token)
    if len(sizes) == 1:
        sizes = [grain, sizes[0] // grain]
        steps.append([grain * stride for stride in steps[0]])
    steps.append([stride[0] if shape[0] > 1 else 0 for stride in strides])

    def place(start, first, *others):
        unit = math.gcd(16, start, *others)
        return unit, start // unit, (first, *(stride // unit for stride in others))

    space = grain, tuple(sizes), token // grain if shift else None
    return space, tuple(map(place, starts, *steps))
