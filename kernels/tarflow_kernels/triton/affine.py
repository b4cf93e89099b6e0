"""Affine maps in one pass over memory: shift by a token, cast, map and log-det, and the same for the gradients.

With ``a`` the log-scale that the activation makes of the raw parameter, and ``g`` and ``l`` the gradients of the output
and of the log-det,

    forward    z = (x - mu) exp(-a)    dx = g exp(-a)    dmu = -dx    da = -g z - l
    inverse    x = z exp(a) + mu       dz = g exp(a)     dmu = g      da = dz z + l

so that both directions need z and alpha alone for their gradients. Each program writes the log-det of its part of a
sample and a second pass adds the parts in order, so results are the same from run to run.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .elements import cut, inner_size, load, log1p, offsets, tile, views_of

# The candidates of the tuner, by warps and elements for each thread.
CANDIDATES = [{"BLOCK": 32 * warps * each, "num_warps": warps} for warps in (2, 4, 8) for each in (4, 8, 16)]
FALLBACK = {"BLOCK": 1024, "num_warps": 4}


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
    row, index, inside, part, parts = tile(space, rows, ROWS, BLOCK)
    source, known = _source(space, index, inside)
    x = load(X, space, row, index, inside, ACC)
    mu = load(Mu, space, row, source, known, ACC)
    a, _ = _log_scale(load(Alpha, space, row, source, known, ACC), SCALE, FIRST, SECOND)
    a = tl.where(known, a, 0.0)
    if INVERSE:
        out = x * tl.exp(a) + mu
        logdet = tl.sum(a, 1)[:, None]
    else:
        out = (x - mu) * tl.exp(-a)
        logdet = -tl.sum(a, 1)[:, None]
    tl.store(Out.pointer + offsets(Out, space, row, index), out, mask=inside)
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
    row, index, inside, _, _ = tile(space, rows, ROWS, BLOCK)
    source, known = _source(space, index, inside)
    grad_out = load(GradOut, space, row, index, inside, ACC)
    grad_logdet = tl.load(GradLogdet + row * stride_logdet, mask=row < rows, other=0.0).to(ACC)
    z = load(Z, space, row, index, inside, ACC)
    a, slope = _log_scale(load(Alpha, space, row, source, known, ACC), SCALE, FIRST, SECOND)
    a = tl.where(known, a, 0.0)
    if INVERSE:
        grad_x = grad_out * tl.exp(a)
        grad_mu = grad_out
        grad_a = grad_x * z + grad_logdet
    else:
        grad_x = grad_out * tl.exp(-a)
        grad_mu = -grad_x
        grad_a = -(grad_out * z) - grad_logdet
    tl.store(GradX.pointer + offsets(GradX, space, row, index), grad_x, mask=inside)
    grad_mu_offsets = offsets(GradMu, space, row, source)
    grad_alpha_offsets = offsets(GradAlpha, space, row, source)
    tl.store(GradMu.pointer + grad_mu_offsets, grad_mu, mask=known)
    tl.store(GradAlpha.pointer + grad_alpha_offsets, grad_a * slope, mask=known)
    if space.token is not None:  # nothing depends on the parameters of the last token
        unused = inside & (index >= inner_size(space) - space.token * space.grain)
        zeros = tl.zeros_like(grad_x)
        tl.store(GradMu.pointer + offsets(GradMu, space, row, index), zeros, mask=unused)
        tl.store(GradAlpha.pointer + offsets(GradAlpha, space, row, index), zeros, mask=unused)


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
        scale = tl.maximum(t, 0.0) + log1p(tl.exp(-tl.abs(t))) + SECOND
        a = tl.log(scale)
        slope = _sigmoid(t) / scale
        if SECOND == 0:  # of t far below zero the scale is exp(t), which underflows
            a = tl.where(t < -40, t, a)
            slope = tl.where(t < -40, 1.0, slope)
    elif SCALE == "sigmoid":
        t = raw + FIRST
        scale = _sigmoid(t)
        if SECOND == 0:
            a = tl.minimum(t, 0.0) - log1p(tl.exp(-tl.abs(t)))
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


def affine_map(
    x: Tensor, mu: Tensor, alpha: Tensor, shift: bool, inverse: bool, scale: str, first: float, second: float
) -> tuple[Tensor, Tensor]:
    """Compute the map: the output, in the layout of x, and its log-det ``(B,)``, both float32 or the float64 of x."""
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    if not x.numel():
        return out, out.new_zeros(len(x))
    space, (out_view, *views) = views_of(out, x, mu, alpha, shift=shift)
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
    """Compute the gradients of the input of the map, of mu and of alpha."""
    grads = torch.empty_like(z, dtype=x_dtype), torch.empty_like(alpha, dtype=mu_dtype), torch.empty_like(alpha)
    if z.numel():
        space, views = views_of(*grads, grad_out, z, alpha, shift=shift)
        *grad_views, grad_out_view, z_view, alpha_view = views
        grid, options = _cut("affine_map_backward", alpha)
        _affine_backward_kernel[grid](
            grad_out_view, grad_logdet, grad_logdet.stride(0), z_view, alpha_view, *grad_views, space, len(z),
            INVERSE=inverse, SCALE=scale, FIRST=first, SECOND=second, **options,
        )  # fmt: skip
    return grads


def _cut(kernel: str, alpha: Tensor) -> tuple[tuple[int], dict[str, int]]:
    key = f"{configs.dtype_name(alpha.dtype)},n{configs.bucket(math.prod(alpha.shape[1:]))}"
    return cut(alpha, configs.choose(kernel, key, FALLBACK))
