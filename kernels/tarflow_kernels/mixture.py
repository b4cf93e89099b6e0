"""Mixtures of logistics as a monotonic map, ``v = logit(sum_k pi_k sigmoid((x - mu_k) exp(-s_k)))``, and its inverse.

Source: Flow++ (arXiv 1902.00275). It is the sigmoidal transform of neural autoregressive flows (arXiv 1804.00779) too.

With ``z = (x - mu_k) exp(-s_k)``, ``l`` the logits, ``F = sum_k e^l sigmoid(z)`` and ``S = sum_k e^l sigmoid(-z)``,

    v = log F - log S    d = log dv/dx = log(sum_k e^l sigmoid(z) sigmoid(-z) e^-s) - log F - log S + log(F + S)

Nothing here forms 1 - F or a logit, and every sum is taken relative to its largest term, so that both stay accurate
and finite however far x is from all components, or between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import dispatch, reference
from .arguments import check_floating, check_tensors, full_precision, in_full_precision, needs_gradients
from .derivatives import differentiated_again, gradients_of

__all__ = [
    "BLOCK",
    "MAX_COMPONENTS",
    "MAX_EVALUATIONS",
    "ROUNDING",
    "mixture_logistic",
    "mixture_logistic_inverse",
    "solve_and_count",
]

MAX_COMPONENTS = 64
"""The most components of a mixture that any implementation takes."""
MAX_EVALUATIONS = 64
"""The most evaluations of the map that an inverse takes for an element."""
ROUNDING = 8
"""The residual of an inverse that counts as rounding, in units of it: a GPU's exponentials are good to a few."""
BLOCK = 2**17
"""Numbers of a temporary on a CPU: its cache still holds so many when they are read."""
# Elements of which half take as long as all.
_FEW = 1024


def mixture_logistic(
    x: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor, *, min_log_scale: float = -7.0
) -> tuple[Tensor, Tensor]:
    """Map data to latents: ``v = logit(sum_k pi_k sigmoid((x - mu_k) exp(-s_k)))`` and ``logdet = sum log dv/dx``.

    Args:
        x: ``(B, ...)``, any strides.
        logits, means, log_scales: parameters of the K components of every element, 1 to 64, of the shape of x and one
            more, last, dimension K; any strides, possibly of a lower precision. ``pi = softmax(logits)``,
            ``s = max(log_scales, min_log_scale)``.
        min_log_scale: the least log-scale; below it the gradient of ``log_scales`` is zero. ``-inf`` for none, but
            log-scales under -87 overflow in float32.

    Returns:
        v of the shape of x, and the log-abs-det of the map in nats, summed per sample, ``(B,)``. Both are float32, or
        float64 where x is, and so is all arithmetic. Differentiable in all tensors, twice; gradients that are to be
        differentiated again (``create_graph=True``) are those of stock operators. An element with a NaN among its x and
        parameters is NaN, and so is the log-det of its sample; no other is.

    Raises:
        TypeError: an argument is not floating point, or ``min_log_scale`` not a number.
        ValueError: shapes or devices that do not fit each other; a ``min_log_scale`` that is NaN or positive infinity.

    >>> x, zeros = torch.tensor([[3.0, -1.0]]), torch.zeros(1, 2, 4)
    >>> v, logdet = mixture_logistic(x, zeros, zeros + 1.0, zeros)  # four times the same logistic: an affine map
    >>> v
    tensor([[ 2., -2.]])
    >>> mixture_logistic_inverse(v, zeros, zeros + 1.0, zeros)[0]
    tensor([[ 3., -1.]])
    """
    _check("x", x, logits, means, log_scales, min_log_scale)
    return dispatch.call("mixture_logistic", x, logits, means, log_scales, float(min_log_scale))


def mixture_logistic_inverse(
    v: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor, *, min_log_scale: float = -7.0
) -> tuple[Tensor, Tensor]:
    """Map latents to data: the x whose v is given, and ``logdet = -sum log dv/dx``, that of the inverse map.

    Arguments, shapes, dtypes and errors are those of :func:`mixture_logistic`. x is found by Newton's method in v,
    within a bracket that starts at the least and the largest of the solutions ``mu_k + exp(s_k) v`` of the components
    alone, in at most 64 evaluations. It is as exact as rounding lets it be: v comes back to some units in the last
    place of v, or of x where the map is so steep that these weigh more. Where it is all but flat, in a gap between
    sharp components, many x have nearly the same v, and any of them may be returned.

    Gradients are those of the exact inverse, ``dx = exp(-d) (dv - sum dv/dtheta dtheta)``; in such gaps they overflow.
    """
    _check("v", v, logits, means, log_scales, min_log_scale)
    return dispatch.call("mixture_logistic_inverse", v, logits, means, log_scales, float(min_log_scale))


def _check(name: str, x: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor, min_log_scale: float | int) -> None:
    check_floating(name, x.dtype)
    if x.dim() < 1:
        raise ValueError(f"{name}: expected (B, ...); got shape ()")
    shape = tuple(x.shape)
    if logits.dim() != len(shape) + 1 or logits.shape[:-1] != shape or not 1 <= logits.shape[-1] <= MAX_COMPONENTS:
        raise ValueError(
            f"logits: expected the shape of {name} and K more, {shape} + (K,), K from 1 to {MAX_COMPONENTS}; "
            f"got {tuple(logits.shape)}"
        )
    theta = ("logits", logits), ("means", means), ("log_scales", log_scales)
    check_tensors(name, x, *((each, tensor, logits.shape, None) for each, tensor in theta))
    if isinstance(min_log_scale, bool) or not isinstance(min_log_scale, (int, float)):
        raise TypeError(f"min_log_scale: expected a number; got {min_log_scale!r}")
    if not min_log_scale < math.inf:
        raise ValueError(f"min_log_scale: expected a number below infinity; got {min_log_scale}")


def _reference_forward(*args):
    *tensors, floor = args
    return reference.mixture_logistic(*in_full_precision(*tensors), min_log_scale=floor)


def _reference_inverse(*args):
    *tensors, floor = args
    return reference.mixture_logistic_inverse(*in_full_precision(*tensors), min_log_scale=floor)


class _Parts(NamedTuple):
    """The numbers that make the map and its gradients; components come first, ``(K, ...)``; F, S, T, v and d have none.

    ``p / F``, ``q / S`` and ``r / T`` are the weights of the components in the sums of F, of S and of the density.
    """

    v: Tensor
    d: Tensor
    z: Tensor
    p: Tensor
    F: Tensor
    q: Tensor
    S: Tensor
    r: Tensor
    T: Tensor


def _parts(x: Tensor, logits: Tensor, means: Tensor, s: Tensor) -> _Parts:
    """Evaluate the map at x ``(...)`` for components ``(K, ...)``.

    On a CPU an exponential costs no more than a product, and a selection by condition ten times that.
    """
    z = (x - means).mul_(torch.exp(-s))
    left = z.clamp(max=0)
    right = left - z  # -max(z, 0), to the bit
    p, q = logits + left, logits + right
    r = p + right
    share = left.exp_().add_(right.exp_()).reciprocal_()  # 1 / (1 + exp(-|z|))
    # Relative to their largest terms: log F = log_F + log(F), log S = log_S + log(S).
    log_F, log_S = p.amax(0), q.amax(0)
    p, q = p.sub_(log_F).exp_().mul_(share), q.sub_(log_S).exp_().mul_(share)
    F, S = p.sum(0), q.sum(0)
    v = (log_F - log_S) + torch.log(F / S)
    # d = log(sum_k (p / F) sigmoid(-z) e^-s) - log(S / (F + S)), or its mirror image: that of the two in which nothing
    # cancels, however large the logs are.
    left_half = v <= 0
    r = r.sub_(torch.where(left_half, log_F, log_S)).sub_(s)
    log_T = r.amax(0)
    r = r.sub_(log_T).exp_().mul_(share).mul_(share)
    T = r.sum(0)
    d = log_T + torch.log(T / torch.where(left_half, F, S)) + torch.log1p(torch.exp(-v.abs()))
    return _Parts(v, d, z, p, F, q, S, r, T)


def _gradients(
    parts: _Parts, slope: Tensor, grad_v: Tensor, grad_d: Tensor, inverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, logits, means and s, given those of v and d; ``slope`` is ``exp(-s)``."""
    v, d, z, p, F, q, S, r, T = parts
    below = torch.sigmoid(z)
    above = torch.sigmoid(-z)
    if inverse:
        # The gradient of x, also through d, goes to the given v, and on to the parameters as if v were held.
        w = r / T
        of_d = (q / S).sub_(w).mul_(below).add_(w.sub_(p / F).mul_(above)).mul_(slope).sum(0)
        grad_x = (grad_v - grad_d * of_d) * torch.exp(-d)
        grad_v, grad_d = -grad_x, -grad_d
    r = r * (grad_d / T)
    grad_z = (q * ((grad_v + grad_d) / S)).sub_(r).mul_(below)
    grad_z.add_((p * ((grad_v - grad_d) / F)).add_(r).mul_(above))
    sigmoid = torch.sigmoid(v)
    grad_logits = p * ((grad_v - grad_d * (1 - sigmoid)) / F)
    grad_logits.addcmul_(q, (grad_v + grad_d * sigmoid) / S, value=-1).add_(r)
    grad_s = torch.addcmul(r, z, grad_z).neg_()
    grad_means = grad_z.mul_(slope).neg_()
    return grad_x if inverse else -grad_means.sum(0), grad_logits, grad_means, grad_s


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of samples that are computed together: as many as stay in a CPU's cache, elsewhere all of them."""
    rows = logits.shape[0]
    step = max(BLOCK // max(logits[:1].numel(), 1), 1)
    if torch.compiler.is_compiling() or not logits.is_cpu or step >= rows:
        return iter([slice(None)])
    return (slice(start, start + step) for start in range(0, rows, step))


def _components_first(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy with the components first, ``(K, ...)``."""
    return tensor.movedim(-1, 0).to(dtype, memory_format=torch.contiguous_format, copy=True)


class _Map(torch.autograd.Function):
    """Both directions, in stock operators, with gradients that keep few of their results."""

    @staticmethod
    def forward(ctx, given, logits, means, log_scales, min_log_scale, inverse, save):
        x = given.to(full_precision(given))
        if inverse:
            x = _solve(x, logits, means, log_scales, min_log_scale)
        v = None if inverse else torch.empty_like(x)
        logdet, saved = x.new_empty(x.shape[:1]), []
        blocks = list(_blocks(logits))
        for rows in blocks:
            l, m, s = (_components_first(t[rows], x.dtype) for t in (logits, means, log_scales))
            parts = _parts(x[rows].contiguous(), l, m, s.clamp_(min=min_log_scale))
            logdet[rows] = parts.d.flatten(1).sum(1) if parts.d.dim() > 1 else parts.d
            if not inverse:
                v[rows] = parts.v
            if save:
                saved.extend(parts)
        if save:
            ctx.save_for_backward(given, logits, means, log_scales, *saved)
            ctx.blocks, ctx.min_log_scale, ctx.inverse = blocks, min_log_scale, inverse
        return (x, -logdet) if inverse else (v, logdet)

    @staticmethod
    def backward(ctx, grad_out, grad_logdet):
        given, logits, means, log_scales, *saved = ctx.saved_tensors
        if differentiated_again():
            inputs = given, logits, means, log_scales
            return (
                *_gradients_of_formula(grad_out, grad_logdet, inputs, ctx.min_log_scale, ctx.inverse),
                None,
                None,
                None,
            )
        grads = [torch.empty_like(t) for t in (given, logits, means, log_scales)]
        grad_logdet = grad_logdet.view(-1, *[1] * (given.dim() - 1))
        for rows, parts in zip(ctx.blocks, zip(*[iter(saved)] * len(_Parts._fields))):
            raw = _components_first(log_scales[rows], grad_out.dtype)
            slope = torch.exp(-raw.clamp(min=ctx.min_log_scale))
            parts = _Parts(*parts)
            grad_x, *others = _gradients(
                parts, slope, grad_out[rows], grad_logdet[rows].expand_as(parts.v), ctx.inverse
            )
            grads[0][rows] = grad_x
            others[2].masked_fill_(raw < ctx.min_log_scale, 0)
            for grad, value in zip(grads[1:], others):
                grad[rows] = value.movedim(0, -1)
        return *grads, None, None, None


def _gradients_of_formula(grad_out, grad_logdet, inputs, min_log_scale, inverse):
    """The gradients of what was given and of the parameters, which can be differentiated again."""
    return gradients_of(lambda *tensors: _formula(*tensors, min_log_scale, inverse), inputs, (grad_out, grad_logdet))


def _formula(given, logits, means, log_scales, min_log_scale, inverse):
    """Either direction, of operators that can be differentiated; the inverse, which is known, twice."""
    given, logits, means, log_scales = in_full_precision(given, logits, means, log_scales)
    theta, x = (logits, means, log_scales.clamp(min=min_log_scale)), given
    if inverse:
        with torch.no_grad():
            x = _solve(given, logits, means, log_scales, min_log_scale)
            # Where the map is flat, Newton's step would be endless, and x as good without.
            slope = torch.exp(-_logit_and_slope(x, *theta)[1]).clamp(max=torch.finfo(x.dtype).max)
        for _ in range(2):  # the first step makes first derivatives right, the second those of second order
            residual = given - _logit_and_slope(x, *theta)[0]
            x = x + slope * (residual - residual.detach())
    v, d = _logit_and_slope(x, *theta)
    logdet = d.flatten(1).sum(1) if d.dim() > 1 else d
    return (x, -logdet) if inverse else (v, logdet)


def _logit_and_slope(x: Tensor, logits: Tensor, means: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """v and d, of components that come last."""
    z = (x[..., None] - means) * torch.exp(-s)
    log_below, log_above = nn.functional.logsigmoid(z), nn.functional.logsigmoid(-z)
    log_F, log_S = (torch.logsumexp(logits + log_side, -1) for log_side in (log_below, log_above))
    log_T = torch.logsumexp(logits + log_below + log_above - s, -1)
    return log_F - log_S, log_T - log_F - log_S + torch.logaddexp(log_F, log_S)


def _torch_forward(*args):
    return _Map.apply(*args, False, needs_gradients(*args))


def _torch_inverse(*args):
    return _Map.apply(*args, True, needs_gradients(*args))


def solve_and_count(
    v: Tensor,
    logits: Tensor,
    means: Tensor,
    log_scales: Tensor,
    min_log_scale: float,
    *,
    leave_out_solved: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the x whose v is given, in the dtype of v, and count how often the map was evaluated for every element.

    Args:
        v, logits, means, log_scales, min_log_scale: as :func:`mixture_logistic_inverse` takes them.
        leave_out_solved: whether elements that are solved are left out from then on, which reads how many these are;
            on a CPU, where that waits for nothing, unless given.
    """
    if leave_out_solved is None:
        leave_out_solved = v.is_cpu
    x, evaluations = torch.empty_like(v), torch.empty_like(v, dtype=torch.int32)
    for rows in _blocks(logits):
        log_pi, mu, s = (_components_first(t[rows], v.dtype).flatten(1) for t in (logits, means, log_scales))
        solved, counted = _newton(v[rows].flatten(), log_pi, mu, s.clamp(min=min_log_scale), leave_out_solved)
        x[rows], evaluations[rows] = solved.view_as(v[rows]), counted.view_as(v[rows])
    return x, evaluations


def _newton(v: Tensor, logits: Tensor, means: Tensor, s: Tensor, leave_out_solved: bool) -> tuple[Tensor, Tensor]:
    """Solve for x, and count; v is ``(N,)``, components are ``(K, N)``.

    Newton's steps are taken in v, where the map is nearly linear far from the components, and only within a bracket
    and while they halve the residual; the bracket is halved otherwise. No element sees another.
    """
    eps = torch.finfo(v.dtype).eps
    alone = torch.addcmul(means, torch.exp(s), v)
    x = (torch.softmax(logits, 0) * alone).sum(0)
    low, high = alone.amin(0), alone.amax(0)
    margin = 4 * eps * torch.maximum(low.abs(), high.abs())
    low, high = low - margin, high + margin
    last = torch.full_like(v, math.inf)
    done, counts = torch.zeros_like(v, dtype=torch.bool), torch.zeros_like(v, dtype=torch.int32)
    positions, solved, counted = torch.arange(len(v), device=v.device), torch.empty_like(v), torch.empty_like(counts)
    for _ in range(MAX_EVALUATIONS):
        parts = _parts(x, logits, means, s)
        residual = parts.v - v
        size = residual.abs()
        low, high = torch.where(residual < 0, x, low), torch.where(residual < 0, high, x)
        newton = x - residual * torch.exp(-parts.d)
        trusted = (newton > low) & (newton < high) & (size <= last / 2)
        step = torch.where(trusted, newton, low + (high - low) / 2)
        exact = ~(size > ROUNDING * eps * v.abs().clamp(min=1))  # NaN is as good as it gets, and stays
        step = torch.where(exact, x + (residual - residual), step)
        near = 2 * eps * x.abs()
        counts += ~done
        x, moved, last = torch.where(done, x, step), (step - x).abs(), size
        done = done | exact | (moved <= near) | (high - low <= near)
        remaining = len(done) - int(done.sum()) if leave_out_solved else len(done)
        if not remaining:
            break
        if 2 * remaining <= len(done) > _FEW:
            solved[positions], counted[positions] = x, counts
            left = (~done).nonzero().squeeze(1)
            positions, x, v, low, high, last, done, counts, logits, means, s = (
                t[..., left] for t in (positions, x, v, low, high, last, done, counts, logits, means, s)
            )
    solved[positions], counted[positions] = x, counts
    return solved, counted


class _FusedMap(torch.autograd.Function):
    """Both directions, in kernels; their gradients need x and the parameters alone, second ones what was given."""

    @staticmethod
    def forward(ctx, given, logits, means, log_scales, min_log_scale, inverse):
        theta = logits, means, log_scales
        out, logdet = _mixture_map(given, *theta, min_log_scale, inverse)
        ctx.save_for_backward(given, *theta, out if inverse else given)
        ctx.options = given.dtype, min_log_scale, inverse
        return out, logdet

    @staticmethod
    def backward(ctx, grad_out, grad_logdet):
        *inputs, x = ctx.saved_tensors
        if differentiated_again():
            grads = _gradients_of_formula(grad_out, grad_logdet, inputs, *ctx.options[1:])
        else:
            grads = _mixture_map_backward(grad_out, grad_logdet, x, *inputs[1:], *ctx.options)
        return *grads, None, None


def _triton_forward(*args):
    return _FusedMap.apply(*args, False)


def _triton_inverse(*args):
    return _FusedMap.apply(*args, True)


def _fake_mixture_map(x, *_):
    out = torch.empty_like(x, dtype=full_precision(x))
    return out, out.new_empty(x.shape[:1])


def _fake_mixture_map_backward(grad_out, grad_logdet, x, logits, means, log_scales, dtype, *_):
    return torch.empty_like(x, dtype=dtype), *map(torch.empty_like, (logits, means, log_scales))


# Opaque to compilers, which would otherwise write out all of its steps.
_solve = dispatch.register_opaque(
    "mixture_logistic_solve(Tensor v, Tensor logits, Tensor means, Tensor log_scales, float min_log_scale) -> Tensor",
    lambda *args: solve_and_count(*args)[0],
    fake=lambda v, *_: torch.empty_like(v),
)

_mixture_map = dispatch.register_kernel(
    "mixture_map(Tensor x, Tensor logits, Tensor means, Tensor log_scales, float min_log_scale, bool inverse)"
    " -> (Tensor, Tensor)",
    module="mixture",
    fake=_fake_mixture_map,
)
_mixture_map_backward = dispatch.register_kernel(
    "mixture_map_backward(Tensor grad_out, Tensor grad_logdet, Tensor x, Tensor logits, Tensor means,"
    " Tensor log_scales, ScalarType dtype, float min_log_scale, bool inverse) -> (Tensor, Tensor, Tensor, Tensor)",
    module="mixture",
    fake=_fake_mixture_map_backward,
)

dispatch.register(
    "mixture_logistic(Tensor x, Tensor logits, Tensor means, Tensor log_scales, float min_log_scale)"
    " -> (Tensor, Tensor)",
    reference=_reference_forward,
    torch=_torch_forward,
    triton=_triton_forward,
)
dispatch.register(
    "mixture_logistic_inverse(Tensor v, Tensor logits, Tensor means, Tensor log_scales, float min_log_scale)"
    " -> (Tensor, Tensor)",
    reference=_reference_inverse,
    torch=_torch_inverse,
    triton=_triton_inverse,
)
