"""Mixtures of logistics, their gradients and their inverse, each in one launch; parameters are read where they lie.

With ``z_k = (x - mu_k) exp(-s_k)`` and ``w`` the exponentials of the logits, three sums over the components,

    F = sum_k w sigmoid(z)    S = sum_k w sigmoid(-z)    T = sum_k w sigmoid(z) sigmoid(-z) exp(-s)

make ``v = log F - log S`` and ``d = log dv/dx = log T - log F - log S + log(F + S)``, and the shares of the components
in them, P, Q and R, all gradients. Given those of v and d, ``g`` and ``h``,

    dz = g (P sigmoid(-z) + Q sigmoid(z)) + h ((R - P) sigmoid(-z) + (Q - R) sigmoid(z))
    dx = sum_k dz exp(-s)    dmu = -dz exp(-s)    ds = -z dz - h R    dlogit = g (P - Q) + h (R - P - Q + pi)

A program owns a tile of elements and goes through their components, BLOCK_K at a time, keeping each sum relative to its
largest term so far. Where elements lie next to each other, as in channels-first images, threads walk along them; where
components do, a tile takes all of them and its threads walk along these. The gradients and the inverse go through the
components more than once; all but the first reads find them in the cache.

Bytes to move: forward 3K + 2 numbers for each element, backward 6K + 3, inverse 3K + 2.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..mixture import MAX_EVALUATIONS, ROUNDING
from . import configs
from .elements import cut, load, log1p, offsets, tile, views_of

# How far loads run ahead: a block of components is little to wait with for the next.
STAGES: tl.constexpr = tl.constexpr(4)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


def candidates(order: str, padded: int) -> list[dict[str, int]]:
    """The candidates of the tuner for so many components, padded, that lie next to each other or by elements."""
    if order == "components":
        return [
            {"BLOCK": max(numbers // padded, 1), "BLOCK_K": padded, "num_warps": warps}
            for numbers in (512, 1024, 2048)
            for warps in (2, 4, 8)
        ]
    return [
        {"BLOCK": block, "BLOCK_K": at_once, "num_warps": warps}
        for block in (128, 256, 512)
        for at_once in (1, 4, 8)
        if at_once <= padded
        for warps in (2, 4)
    ]


def fallback(order: str, padded: int) -> dict[str, int]:
    """The configuration where nobody has tuned."""
    if order == "components":
        return {"BLOCK": 512 // padded, "BLOCK_K": padded, "num_warps": 4}
    return {"BLOCK": 256, "BLOCK_K": 1, "num_warps": 4}


@triton.jit
def _mixture_kernel(
    Logits,
    Means,
    LogScales,
    X,
    Out,
    Logdet,
    steps,
    space,
    rows,
    K: tl.constexpr,
    FLOOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = Out.pointer.dtype.element_ty
    row, index, inside, part, parts = tile(space, rows, ROWS, BLOCK)
    pointers = _pointers(Logits, Means, LogScales, space, row, index)
    x = load(X, space, row, index, inside, ACC)
    v, d, _ = _map(pointers, steps, inside, x, K, FLOOR, BLOCK_K)
    tl.store(Out.pointer + offsets(Out, space, row, index), v, mask=inside)
    tl.store(Logdet + row * parts + part, tl.sum(tl.where(inside, d, 0.0), 1)[:, None], mask=row < rows)


@triton.jit
def _mixture_inverse_kernel(
    Logits,
    Means,
    LogScales,
    V,
    Out,
    Logdet,
    steps,
    space,
    rows,
    K: tl.constexpr,
    FLOOR: tl.constexpr,
    EPS: tl.constexpr,
    TOLERANCE: tl.constexpr,
    MAX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = Out.pointer.dtype.element_ty
    row, index, inside, part, parts = tile(space, rows, ROWS, BLOCK)
    pointers = _pointers(Logits, Means, LogScales, space, row, index)
    v = load(V, space, row, index, inside, ACC)
    # Found before the first loop: behind one, Triton 3.6 has forgotten the constants of a space.
    places = Out.pointer + offsets(Out, space, row, index)
    x, low, high = _bracket(pointers, steps, inside, v, K, FLOOR, BLOCK_K)
    margin = 4 * EPS * tl.maximum(tl.abs(low), tl.abs(high))
    low -= margin
    high += margin
    last = tl.full([ROWS, BLOCK], float("inf"), ACC)
    evaluations = tl.zeros([ROWS, BLOCK], tl.int32)
    left = inside.to(tl.int32)
    while tl.max(tl.max(left, 1), 0) > 0:
        found, d, _ = _map(pointers, steps, inside, x, K, FLOOR, BLOCK_K)
        residual = found - v
        size = tl.abs(residual)
        low = tl.where(residual < 0, x, low)
        high = tl.where(residual < 0, high, x)
        newton = x - residual * _exp(-d)
        trusted = (newton > low) & (newton < high) & (size <= 0.5 * last)
        step = tl.where(trusted, newton, low + 0.5 * (high - low))
        wrong = size > TOLERANCE * tl.where(tl.abs(v) > 1, tl.abs(v), 1.0)
        step = tl.where(wrong, step, x + (residual - residual))  # NaN is as good as it gets, and stays
        near = 2 * EPS * tl.abs(x)
        going = wrong & (tl.abs(step - x) > near) & (high - low > near)
        x = tl.where(left > 0, step, x)
        last = size
        evaluations += left
        left = tl.where(going & (evaluations < MAX), left, 0)
    _, d, _ = _map(pointers, steps, inside, x, K, FLOOR, BLOCK_K)
    tl.store(places, x, mask=inside)
    tl.store(Logdet + row * parts + part, -tl.sum(tl.where(inside, d, 0.0), 1)[:, None], mask=row < rows)


@triton.jit
def _mixture_backward_kernel(
    Logits,
    Means,
    LogScales,
    X,
    GradOut,
    GradLogdet,
    stride_logdet,
    GradLogits,
    GradMeans,
    GradLogScales,
    GradX,
    steps,
    grad_steps,
    space,
    rows,
    K: tl.constexpr,
    FLOOR: tl.constexpr,
    INVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ACC: tl.constexpr = X.pointer.dtype.element_ty if X.pointer.dtype.element_ty == tl.float64 else tl.float32
    row, index, inside, _, _ = tile(space, rows, ROWS, BLOCK)
    pointers = _pointers(Logits, Means, LogScales, space, row, index)
    grad_pointers = _pointers(GradLogits, GradMeans, GradLogScales, space, row, index)
    x = load(X, space, row, index, inside, ACC)
    g = load(GradOut, space, row, index, inside, ACC)
    h = tl.load(GradLogdet + row * stride_logdet, mask=row < rows, other=0.0).to(ACC)
    places = GradX.pointer + offsets(GradX, space, row, index)
    v, d, sums = _map(pointers, steps, inside, x, K, FLOOR, BLOCK_K)
    grad_x = tl.zeros([ROWS, BLOCK], ACC)
    if INVERSE:
        # What comes to x, also through d, goes to the given v, and on to the parameters as if v were held.
        for first in range(0, K, BLOCK_K):
            z, raw, slope, p, q, r, below, above, exists = _shares(
                pointers, steps, inside, x, sums, first, K, FLOOR, BLOCK_K
            )
            grad_x += tl.sum(((r - p) * above + (q - r) * below) * slope, 2)
        g = (grad_x * -h + g) * _exp(-d)
        tl.store(places, g, mask=inside)
        g = -g
        h = -h
    decay = _exp(-tl.abs(v))
    to_p = g - h * tl.where(v < 0, 1.0, decay) / (1 + decay)
    to_q = g + h * tl.where(v < 0, decay, 1.0) / (1 + decay)
    g = g[:, :, None]
    h = h[:, :, None]
    for first in range(0, K, BLOCK_K):
        z, raw, slope, p, q, r, below, above, exists = _shares(
            pointers, steps, inside, x, sums, first, K, FLOOR, BLOCK_K
        )
        r = h * r
        grad_z = ((g - h) * p + r) * above + ((g + h) * q - r) * below
        grad_logit = to_p[:, :, None] * p - to_q[:, :, None] * q + r
        grad_mean = -grad_z * slope
        grad_raw = tl.where(raw < tl.full([1, 1, 1], FLOOR, ACC), 0.0, -(z * grad_z + r))
        k = _indices(first, BLOCK_K)
        tl.store(grad_pointers[0] + k * grad_steps[0], grad_logit, mask=exists)
        tl.store(grad_pointers[1] + k * grad_steps[1], grad_mean, mask=exists)
        tl.store(grad_pointers[2] + k * grad_steps[2], grad_raw, mask=exists)
        grad_x -= tl.sum(grad_mean, 2)
    if not INVERSE:
        tl.store(places, grad_x, mask=inside)


@triton.jit
def _pointers(Logits, Means, LogScales, space, row, index):
    """Pointers to the first components of elements, ``(ROWS, BLOCK, 1)``."""
    logits = (Logits.pointer + offsets(Logits, space, row, index))[:, :, None]
    means = (Means.pointer + offsets(Means, space, row, index))[:, :, None]
    log_scales = (LogScales.pointer + offsets(LogScales, space, row, index))[:, :, None]
    return logits, means, log_scales


@triton.jit
def _indices(first, BLOCK_K: tl.constexpr):
    return (first + tl.arange(0, BLOCK_K).to(tl.int64))[None, None, :]


@triton.jit
def _components(pointers, steps, inside, first, K: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr):
    """Load some components of elements, ``(ROWS, BLOCK, BLOCK_K)``, and which exist; the others weigh nothing."""
    k = _indices(first, BLOCK_K)
    exists = inside[:, :, None] & (k < K)
    logit = tl.load(pointers[0] + k * steps[0], mask=exists, other=0.0).to(ACC)
    mean = tl.load(pointers[1] + k * steps[1], mask=exists, other=0.0).to(ACC)
    raw = tl.load(pointers[2] + k * steps[2], mask=exists, other=0.0).to(ACC)
    return tl.where(k < K, logit, float("-inf")), mean, raw, exists


@triton.jit
def _clamp(raw, FLOOR: tl.constexpr):
    low = tl.full([1, 1, 1], FLOOR, raw.dtype)
    return tl.where(raw < low, low, raw)


@triton.jit
def _exp(x):
    """Exponentials in two instructions instead of five; of float32, results below 2^-126 are zero."""
    return tl.exp(x) if x.dtype == tl.float64 else tl.exp2(x * LOG2_E)


@triton.jit
def _sides(x, logit, mean, log_scale):
    """z, the slope ``exp(-s)``, and the parts of the terms of F, S and T.

    That is the logs of ``w sigmoid(z)``, ``w sigmoid(-z)`` and ``w sigmoid(z) sigmoid(-z)`` but for a factor; the logs
    of both sigmoids but for that factor; and the factor, for T squared, ``1 / (1 + exp(-|z|))``.
    """
    slope = tl.exp(-log_scale)  # also where it is tiny, since T is a sum of slopes
    z = (x[:, :, None] - mean) * slope
    left = tl.where(z < 0, z, 0.0)
    right = tl.where(z < 0, 0.0, -z)
    root = tl.rsqrt(1 + _exp(left + right))  # of 1 to 2, where squaring it is the quickest way to divide
    return z, slope, logit + left, logit + right, logit + left + right, left, right, root * root


@triton.jit
def _map(pointers, steps, inside, x, K: tl.constexpr, FLOOR: tl.constexpr, BLOCK_K: tl.constexpr):
    """v, d and the sums, each as the log of its largest term and the sum relative to that."""
    top_f = tl.full(x.shape, -1e30, x.dtype)
    top_s = top_f
    top_t = top_f
    f = tl.zeros_like(x)
    s = f
    t = f
    for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        logit, mean, raw, _ = _components(pointers, steps, inside, first, K, BLOCK_K, x.dtype)
        _, slope, p, q, r, _, _, share = _sides(x, logit, mean, _clamp(raw, FLOOR))
        top_f, f = _add(top_f, f, p, share)
        top_s, s = _add(top_s, s, q, share)
        top_t, t = _add(top_t, t, r, share * share * slope)
    v = (top_f - top_s) + tl.log(f / s)
    # log T - log F - log(S / (F + S)), or its mirror image: that in which nothing cancels, however large the logs are.
    d = (top_t - tl.where(v > 0, top_s, top_f)) + tl.log(t / tl.where(v > 0, s, f)) + log1p(_exp(-tl.abs(v)))
    return v, d, (top_f, f, top_s, s, top_t, t)


@triton.jit
def _add(top, total, logs, factors):
    """Add ``factors exp(logs)`` to ``total exp(top)``."""
    if logs.shape[2] == 1:  # one of the two is the larger, and its exponential one
        log = tl.max(logs, 2)
        factor = tl.max(factors, 2)
        decay = _exp(-tl.abs(log - top))
        return tl.maximum(top, log), tl.where(log > top, total * decay + factor, total + decay * factor)
    else:
        higher = tl.maximum(top, tl.max(logs, 2))
        return higher, total * _exp(top - higher) + tl.sum(_exp(logs - higher[:, :, None]) * factors, 2)


@triton.jit
def _shares(pointers, steps, inside, x, sums, first, K: tl.constexpr, FLOOR: tl.constexpr, BLOCK_K: tl.constexpr):
    """For some components: z, the raw log-scale, the slope, their shares P, Q and R, both sigmoids, and which exist."""
    top_f, f, top_s, s, top_t, t = sums
    logit, mean, raw, exists = _components(pointers, steps, inside, first, K, BLOCK_K, x.dtype)
    log_scale = _clamp(raw, FLOOR)
    z, slope, p, q, r, left, right, share = _sides(x, logit, mean, log_scale)
    # Of the sums alone, which are the same for all components, reciprocals and logs are taken once.
    p = _exp(p - top_f[:, :, None]) * share * (1 / f)[:, :, None]
    q = _exp(q - top_s[:, :, None]) * share * (1 / s)[:, :, None]
    r = _exp((r - top_t[:, :, None]) - (log_scale + tl.log(t)[:, :, None])) * share * share
    return z, raw, slope, p, q, r, _exp(left) * share, _exp(right) * share, exists


@triton.jit
def _bracket(pointers, steps, inside, v, K: tl.constexpr, FLOOR: tl.constexpr, BLOCK_K: tl.constexpr):
    """The mean, the least and the largest of the solutions of the components alone."""
    top = tl.full(v.shape, -1e30, v.dtype)
    total = tl.zeros_like(v)
    mean = tl.zeros_like(v)
    low = tl.full(v.shape, float("inf"), v.dtype)
    high = tl.full(v.shape, float("-inf"), v.dtype)
    for first in range(0, K, BLOCK_K):
        logit, center, raw, _ = _components(pointers, steps, inside, first, K, BLOCK_K, v.dtype)
        alone = center + _exp(_clamp(raw, FLOOR)) * v[:, :, None]
        exists = _indices(first, BLOCK_K) < K
        low = tl.minimum(low, tl.min(tl.where(exists, alone, float("inf")), 2))
        high = tl.maximum(high, tl.max(tl.where(exists, alone, float("-inf")), 2))
        higher = tl.maximum(top, tl.max(logit, 2))
        weights = _exp(logit - higher[:, :, None])
        decay = _exp(top - higher)
        total = total * decay + tl.sum(weights, 2)
        mean = mean * decay + tl.sum(weights * alone, 2)
        top = higher
    return mean / total, low, high


def mixture_map(
    x: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor, min_log_scale: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Compute either map: its output, in the layout of x, and log-det ``(B,)``, both float32 or the float64 of x."""
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    if not x.numel():
        return out, out.new_zeros(len(x))
    theta = logits, means, log_scales
    space, views = views_of(*(t[..., 0] for t in theta), x, out)
    grid, options = _cut("mixture_map_inverse" if inverse else "mixture_map", x, logits)
    parts = triton.cdiv(math.prod(x.shape[1:]), options["BLOCK"])
    logdet = torch.empty(len(x), parts, dtype=out.dtype, device=x.device)
    kernel = _mixture_kernel
    if inverse:
        eps = torch.finfo(out.dtype).eps
        kernel = _mixture_inverse_kernel
        options |= {"EPS": eps, "TOLERANCE": ROUNDING * eps, "MAX": MAX_EVALUATIONS}
    kernel[grid](*views, logdet, tuple(t.stride(-1) for t in theta), space, len(x), FLOOR=min_log_scale, **options)
    return out, logdet.view(-1) if parts == 1 else logdet.sum(1)


def mixture_map_backward(
    grad_out: Tensor,
    grad_logdet: Tensor,
    x: Tensor,
    logits: Tensor,
    means: Tensor,
    log_scales: Tensor,
    dtype: torch.dtype,
    min_log_scale: float,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of the input of the map, of ``dtype``, and of its parameters; x is always the data."""
    theta = logits, means, log_scales
    grad_x, grads = torch.empty_like(x, dtype=dtype), [torch.empty_like(t) for t in theta]
    if x.numel():
        space, views = views_of(*(t[..., 0] for t in (*theta, *grads)), x, grad_out, grad_x)
        *views, x_view, grad_out_view, grad_x_view = views
        grid, options = _cut("mixture_map_backward", x, logits)
        _mixture_backward_kernel[grid](
            *views[:3], x_view, grad_out_view, grad_logdet, grad_logdet.stride(0), *views[3:], grad_x_view,
            tuple(t.stride(-1) for t in theta), tuple(t.stride(-1) for t in grads), space, len(x),
            FLOOR=min_log_scale, INVERSE=inverse, **options,
        )  # fmt: skip
    grad_logits, grad_means, grad_log_scales = grads
    return grad_x, grad_logits, grad_means, grad_log_scales


def _cut(kernel: str, x: Tensor, logits: Tensor) -> tuple[tuple[int], dict[str, float]]:
    """Choose the grid and the options of a kernel by what lies next to each other in memory."""
    components = logits.shape[-1]
    padded = triton.next_power_of_2(components)
    order = "components" if components > 1 and logits.stride(-1) == 1 else "elements"
    key = f"{configs.dtype_name(logits.dtype)},k{padded},{order},n{configs.bucket(math.prod(x.shape[1:]))}"
    grid, options = cut(x, configs.choose(kernel, key, fallback(order, padded)))
    return grid, {**options, "K": components}
