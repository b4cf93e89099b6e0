"""Affine maps in one pass over memory: shift by a token, cast, map and log-det, and the same for the gradients.

With ``a`` the log-scale that the activation makes of the raw parameter, and ``g`` and ``l`` the gradients of the output
and of the log-det,

    forward    z = (x - mu) exp(-a)    dx = g exp(-a)    dmu = -dx    da = -g z - l
    inverse    x = z exp(a) + mu       dz = g exp(a)     dmu = g      da = dz z + l

so that both directions need z and alpha alone for their gradients. A sample is a run of elements, counted by one flat
index, and a program owns a tile of several short samples or a part of a long one. Each program writes the log-det of
its part and a second pass adds the parts in order, so results are the same from run to run.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs

# What a tuner may try, by warps and elements for each thread.
CANDIDATES = [{"BLOCK": 32 * warps * each, "num_warps": warps} for warps in (2, 4, 8) for each in (4, 8, 16)]
FALLBACK = {"BLOCK": 1024, "num_warps": 4}


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
    """A tensor over a space; the start and all strides but the first are in its own grains."""

    pointer: Tensor
    grain: tl.constexpr
    start: int
    strides: tuple[int, ...]  # of the dimensions of the space, then of the batch


@triton.jit
def _affine_kernel(
    X,
    Mu,
    Alpha,
    Out,
    Logdet,
    space,
    rows,
    INVERSE: tl.constexpr,
    SCALE: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = Out.pointer.dtype.element_ty
    row, index, inside, part, parts = _tile(space, rows, ROWS, BLOCK)
    source, known = _source(space, index, inside)
    x = _load(X, space, row, index, inside, ACC)
    mu = _load(Mu, space, row, source, known, ACC)
    a, _ = _log_scale(_load(Alpha, space, row, source, known, ACC), SCALE, FIRST, SECOND)
    a = tl.where(known, a, 0.0)
    if INVERSE:
        out = x * tl.exp(a) + mu
        logdet = tl.sum(a, 1)[:, None]
    else:
        out = (x - mu) * tl.exp(-a)
        logdet = -tl.sum(a, 1)[:, None]
    tl.store(Out.pointer + _offsets(Out, space, row, index), out, mask=inside)
    tl.store(Logdet + row * parts + part, logdet, mask=row < rows)


@triton.jit
def _affine_backward_kernel(
    GradOut,
    GradLogdet,
    stride_logdet,
    Z,
    Alpha,
    GradX,
    GradMu,
    GradAlpha,
    space,
    rows,
    INVERSE: tl.constexpr,
    SCALE: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = Z.pointer.dtype.element_ty if Z.pointer.dtype.element_ty == tl.float64 else tl.float32
    row, index, inside, _, _ = _tile(space, rows, ROWS, BLOCK)
    source, known = _source(space, index, inside)
    grad_out = _load(GradOut, space, row, index, inside, ACC)
    grad_logdet = tl.load(GradLogdet + row * stride_logdet, mask=row < rows, other=0.0).to(ACC)
    z = _load(Z, space, row, index, inside, ACC)
    a, slope = _log_scale(_load(Alpha, space, row, source, known, ACC), SCALE, FIRST, SECOND)
    a = tl.where(known, a, 0.0)
    if INVERSE:
        grad_x = grad_out * tl.exp(a)
        grad_mu = grad_out
        grad_a = grad_x * z + grad_logdet
    else:
        grad_x = grad_out * tl.exp(-a)
        grad_mu = -grad_x
        grad_a = -(grad_out * z) - grad_logdet
    tl.store(GradX.pointer + _offsets(GradX, space, row, index), grad_x, mask=inside)
    grad_mu_offsets = _offsets(GradMu, space, row, source)
    grad_alpha_offsets = _offsets(GradAlpha, space, row, source)
    tl.store(GradMu.pointer + grad_mu_offsets, grad_mu, mask=known)
    tl.store(GradAlpha.pointer + grad_alpha_offsets, grad_a * slope, mask=known)
    if space.token is not None:  # nothing depends on the parameters of the last token
        unused = inside & (index >= _inner(space) - space.token * space.grain)
        zeros = tl.zeros_like(grad_x)
        tl.store(GradMu.pointer + _offsets(GradMu, space, row, index), zeros, mask=unused)
        tl.store(GradAlpha.pointer + _offsets(GradAlpha, space, row, index), zeros, mask=unused)


@triton.jit
def _guided_affine_kernel(
    Z,
    Mu,
    Alpha,
    MuRef,
    AlphaRef,
    Weight,
    weight,
    Out,
    space,
    rows,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = Out.pointer.dtype.element_ty
    row, index, inside, _, _ = _tile(space, rows, ROWS, BLOCK)
    z = _load(Z, space, row, index, inside, ACC)
    mu = _load(Mu, space, row, index, inside, ACC)
    a = _load(Alpha, space, row, index, inside, ACC)
    mu_ref = _load(MuRef, space, row, index, inside, ACC)
    a_ref = _load(AlphaRef, space, row, index, inside, ACC)
    w = weight if Weight is None else _load(Weight, space, row, index, inside, ACC)
    mu += w * (mu - mu_ref)
    a += w * (a - a_ref)
    tl.store(Out.pointer + _offsets(Out, space, row, index), z * tl.exp(a) + mu, mask=inside)


@triton.jit
def _tile(space, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Samples ``(ROWS, 1)``, indices ``(1, BLOCK)``, which of them exist, and the part of how many this tile is."""
    inner = _inner(space)
    parts = tl.cdiv(inner, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    part = program % parts
    row = (program // parts * ROWS + tl.arange(0, ROWS))[:, None]
    index = (part * BLOCK + tl.arange(0, BLOCK))[None, :]
    return row, index, (row < rows) & (index < inner), part, parts


@triton.jit
def _inner(space):
    """The number of elements of a sample."""
    inner = tl.cast(1, tl.int64)
    for k in tl.static_range(len(space.sizes)):
        inner *= space.sizes[k]
    return inner


@triton.jit
def _source(space, index, inside):
    """The indices of the parameters of elements, and whether they have any."""
    if space.token is None:
        source = index
        known = inside
    else:
        source = index - space.token * space.grain
        known = inside & (source >= 0)
    return source, known


@triton.jit
def _load(view, space, row, index, mask, ACC: tl.constexpr):
    return tl.load(view.pointer + _offsets(view, space, row, index), mask=mask, other=0.0).to(ACC)


@triton.jit
def _offsets(view, space, row, index):
    """Where elements lie, in int64 as ``row`` and ``index`` are."""
    last: tl.constexpr = len(space.sizes) - 1
    grain: tl.constexpr = view.grain
    offsets = row * view.strides[last + 1] * grain + view.start * grain + index % space.sizes[0] * view.strides[0]
    index = index // space.sizes[0]
    for k in tl.static_range(1, last):
        offsets += index % space.sizes[k] * view.strides[k] * grain
        index = index // space.sizes[k]
    return offsets + index * view.strides[last] * grain


@triton.jit
def _log_scale(raw, SCALE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """The log-scale and its derivative, as :mod:`..scales` defines them."""
    if SCALE == "exp":
        a = raw
        slope = 1.0
    elif SCALE == "softclip":
        shrink = 1 / (1 + tl.abs(raw) / FIRST)
        a = raw * shrink
        slope = shrink * shrink
    elif SCALE == "softplus":
        t = raw + FIRST
        scale = tl.maximum(t, 0.0) + _log1p(tl.exp(-tl.abs(t))) + SECOND
        a = tl.log(scale)
        slope = _sigmoid(t) / scale
    elif SCALE == "sigmoid":
        t = raw + FIRST
        scale = _sigmoid(t)
        if SECOND == 0:
            a = tl.minimum(t, 0.0) - _log1p(tl.exp(-tl.abs(t)))
            slope = _sigmoid(-t)
        else:
            a = tl.log(scale + SECOND)
            slope = _sigmoid(-t) * scale / (scale + SECOND)
    elif SCALE == "clamp":
        low = tl.full([1, 1], FIRST, raw.dtype)
        high = tl.full([1, 1], SECOND, raw.dtype)
        a = tl.where(raw < low, low, tl.where(raw > high, high, raw))
        slope = 1.0
    elif SCALE == "tanh":
        decay = tl.exp(-2 * tl.abs(raw) / FIRST)
        size = FIRST * (1 - decay) / (1 + decay)
        a = tl.where(raw < 0, -size, size)
        slope = 4 * decay / ((1 + decay) * (1 + decay))
    return a, slope


@triton.jit
def _sigmoid(t):
    decay = tl.exp(-tl.abs(t))
    return tl.where(t < 0, decay, 1.0) / (1 + decay)


@triton.jit
def _log1p(y):
    """``log(1 + y)`` for y from 0 to 1, with the rounding of the sum made good."""
    total = 1 + y
    lost = y - (total - 1)
    return tl.log(total) + lost / total


def affine_map(
    x: Tensor, mu: Tensor, alpha: Tensor, shift: bool, inverse: bool, scale: str, first: float, second: float
) -> tuple[Tensor, Tensor]:
    """The output of the map, in the layout of x, and its log-det ``(B,)``, both float32 or the float64 of x."""
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    if not x.numel():
        return out, out.new_zeros(len(x))
    space, (out_view, *views) = _views(out, x, mu, alpha, shift=shift)
    grid, options = _cut("affine_map", alpha)
    parts = triton.cdiv(math.prod(x.shape[1:]), options["BLOCK"])
    logdet = torch.empty(len(x), parts, dtype=out.dtype, device=x.device)
    _affine_kernel[grid](
        *views, out_view, logdet, space, len(x), INVERSE=inverse, SCALE=scale, FIRST=first, SECOND=second, **options
    )
    return out, logdet.view(-1) if parts == 1 else logdet.sum(1)


def affine_map_backward(
    grad_out: Tensor,
    grad_logdet: Tensor,
    z: Tensor,
    alpha: Tensor,
    x_dtype: torch.dtype,
    mu_dtype: torch.dtype,
    shift: bool,
    inverse: bool,
    scale: str,
    first: float,
    second: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the input of the map, of mu and of alpha."""
    grads = torch.empty_like(z, dtype=x_dtype), torch.empty_like(alpha, dtype=mu_dtype), torch.empty_like(alpha)
    if z.numel():
        space, views = _views(*grads, grad_out, z, alpha, shift=shift)
        *grad_views, grad_out_view, z_view, alpha_view = views
        grid, options = _cut("affine_map_backward", alpha)
        _affine_backward_kernel[grid](
            grad_out_view, grad_logdet, grad_logdet.stride(0), z_view, alpha_view, *grad_views, space, len(z),
            INVERSE=inverse, SCALE=scale, FIRST=first, SECOND=second, **options,
        )  # fmt: skip
    return grads


def guided_affine_map(
    z: Tensor,
    mu: Tensor,
    alpha: Tensor,
    mu_ref: Tensor,
    alpha_ref: Tensor,
    per_token: Tensor | None,
    weight: float,
    out: Tensor,
) -> None:
    """Write the inverse map under guidance to ``out``; ``per_token``, if any, broadcasts to z and is the weight."""
    if not z.numel():
        return
    if per_token is None and out.dtype == torch.float64:
        per_token = out.new_full((), weight)  # a number reaches a kernel in float32
    weights = [] if per_token is None else [per_token.expand(z.shape)]
    space, (out_view, *views) = _views(out, z, mu, alpha, mu_ref, alpha_ref, *weights)
    *views, weight_view = views if weights else (*views, None)
    grid, options = _cut("guided_affine_map", alpha)
    _guided_affine_kernel[grid](*views, weight_view, weight, out_view, space, len(z), **options)


def _cut(kernel: str, alpha: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid and the options of a kernel: BLOCK elements of a sample and as many samples as a tile takes."""
    rows, inner = len(alpha), math.prod(alpha.shape[1:])
    key = f"{configs.dtype_name(alpha.dtype)},n{configs.bucket(inner)}"
    config = configs.choose(kernel, key, FALLBACK)
    block = min(triton.next_power_of_2(inner), config["BLOCK"])
    rows_each = config["BLOCK"] // block
    grid = triton.cdiv(rows, rows_each) * triton.cdiv(inner, block)
    return (grid,), config | {"ROWS": rows_each, "BLOCK": block}


def _views(*tensors: Tensor, shift: bool = False) -> tuple[Space, list[View]]:
    """Tensors of one shape ``(B, ...)`` as kernels take them; the memory of the first decides the order of elements."""
    strides = tuple(tensor.stride() for tensor in tensors)
    # A kernel takes several elements at once only from an aligned pointer: what is before the first becomes ``start``.
    starts = tuple(tensor.storage_offset() % (16 // tensor.element_size()) for tensor in tensors)
    (grain, sizes, token), places = _lay_out(tensors[0].shape, strides, starts, shift)
    space = Space(tl.constexpr(grain), (tl.constexpr(sizes[0]), *sizes[1:]), token)
    return space, [
        View(_aligned(tensor, before), tl.constexpr(grain), start, steps)
        for tensor, before, (grain, start, steps) in zip(tensors, starts, places, strict=True)
    ]


def _aligned(tensor: Tensor, before: int) -> Tensor:
    return tensor.as_strided((), (), tensor.storage_offset() - before) if before else tensor


@functools.lru_cache(maxsize=1024)
def _lay_out(shape, strides, starts, shift):
    """The numbers of the :class:`Space` of tensors and of the :class:`View` of each.

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
    return space, tuple(itertools.starmap(place, zip(starts, *steps, strict=True)))
