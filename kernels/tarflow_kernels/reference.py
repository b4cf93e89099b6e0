"""Every op as its formula, in plain torch: the specification that the other implementations are tested against.

Readable before fast: each function materializes whatever the formula names. All of them are differentiable in every
tensor argument and run in the dtype of their inputs, float64 included. Arguments are those of the public functions,
where shapes, units and errors are documented. No arithmetic is shared with what is tested against it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .scales import EXP, Scale

__all__ = [
    "affine_forward",
    "affine_inverse",
    "causal_attention",
    "decode_attention",
    "embed_next",
    "mixture_logistic",
    "mixture_logistic_inverse",
    "residual_norm",
]


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, temperature: float | Tensor = 1.0, scale: float | None = None
) -> Tensor:
    """``softmax(q k^T * scale / temperature + mask) v``, where query i sees keys 0 to i."""
    length = q.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    return _attend(q, k, v, seen, temperature, scale)


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
    """Append k and v to the cache at ``positions[b]``, row by row, then attend to everything up to each query."""
    new = q.shape[2]
    rows = []
    for b, start in enumerate(positions.tolist()):
        end = start + new
        cache_k[b, :, start:end] = k[b]
        cache_v[b, :, start:end] = v[b]
        seen = torch.ones(new, end, dtype=torch.bool, device=q.device).tril(diagonal=start)
        row = slice(b, b + 1)
        row_temperature = temperature[row] if isinstance(temperature, Tensor) else temperature
        rows.append(_attend(q[row], cache_k[row, :, :end], cache_v[row, :, :end], seen, row_temperature, scale))
    return torch.cat(rows) if rows else torch.empty_like(q)


def affine_forward(
    x: Tensor, mu: Tensor, alpha: Tensor, *, shift: bool = False, scale: Scale = EXP
) -> tuple[Tensor, Tensor]:
    """``z = (x - mu) exp(-a)``, ``logdet = -sum a``, with ``a`` the log-scale that ``scale`` makes of alpha."""
    mu, a = _parameters(mu, alpha, shift, scale)
    return (x - mu) * torch.exp(-a), -_sum_per_sample(a)


def affine_inverse(
    z: Tensor, mu: Tensor, alpha: Tensor, *, shift: bool = False, scale: Scale = EXP
) -> tuple[Tensor, Tensor]:
    """``x = z exp(a) + mu``, ``logdet = sum a``, with ``a`` the log-scale that ``scale`` makes of alpha."""
    mu, a = _parameters(mu, alpha, shift, scale)
    return z * torch.exp(a) + mu, _sum_per_sample(a)


def residual_norm(
    h: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Add delta to h in place, then ``(h - mean) / sqrt(var + eps) * weight + bias`` over the last dimension."""
    if delta is not None:
        h += delta
    x = h.to(torch.promote_types(h.dtype, torch.float32))
    centered = x - x.mean(-1, keepdim=True)
    variance = centered.square().mean(-1, keepdim=True)
    y = centered / torch.sqrt(variance + eps) * weight + bias
    return y.to(h.dtype if dtype is None else dtype)


def embed_next(
    x: Tensor,
    z: Tensor,
    mu: Tensor,
    alpha: Tensor,
    mu_ref: Tensor | None,
    alpha_ref: Tensor | None,
    weights: Tensor | None,
    positions: Tensor,
    projection: Tensor,
    embedding: Tensor,
    context: Tensor | None,
    h: Tensor,
    tickets: Tensor,
) -> None:
    """``x_i = z_i exp(a) + m`` at ``i = positions + 1``, ``h = x_i projection + embedding_i + context``, all in place.

    Under guidance ``v = (1 + w_i) v(cond) - w_i v(ref)`` for v in {a, m}; without, a is alpha and m is mu. Then the
    positions are i. No formula needs the tickets.
    """
    samples, i = torch.arange(len(x), device=x.device), positions[: len(x)].long() + 1
    if weights is not None:
        assert mu_ref is not None
        assert alpha_ref is not None
        w = weights[i, None]
        mu, alpha = (1 + w) * mu - w * mu_ref, (1 + w) * alpha - w * alpha_ref
    token = z[samples, i] * torch.exp(alpha) + mu
    x[samples, i] = token
    embedded = token @ projection + embedding[i]
    rows = embedded if weights is None else torch.cat((embedded, embedded))  # the branches differ in their context
    h.copy_(rows if context is None else rows + context)
    positions += 1


def mixture_logistic(
    x: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor, *, min_log_scale: float = -7.0
) -> tuple[Tensor, Tensor]:
    """``v = log F - log(1 - F)`` for the distribution F of a mixture of logistics, ``logdet = sum log dv/dx``."""
    v, d = _mixture_logit(x, torch.log_softmax(logits, -1), means, log_scales.clamp(min=min_log_scale))
    return v, _sum_per_sample(d)


def mixture_logistic_inverse(
    v: Tensor, logits: Tensor, means: Tensor, log_scales: Tensor, *, min_log_scale: float = -7.0
) -> tuple[Tensor, Tensor]:
    """The x whose v is given, by bisection between the solutions of the components alone; ``logdet = -sum log dv/dx``.

    Derivatives are those of two of Newton's steps from there: the first step makes first derivatives right, the second
    those of second order; there are no others.
    """
    theta = torch.log_softmax(logits, -1), means, log_scales.clamp(min=min_log_scale)
    with torch.no_grad():
        alone = means + torch.exp(theta[2]) * v[..., None]
        low, high = alone.amin(-1), alone.amax(-1)
        for _ in range(64):
            x = low + (high - low) / 2
            too_low = _mixture_logit(x, *theta)[0] < v
            low, high = torch.where(too_low, x, low), torch.where(too_low, high, x)
        # Where the map is flat, the step would be endless, and x as good without.
        dx = torch.exp(-_mixture_logit(x, *theta)[1]).clamp(max=torch.finfo(x.dtype).max)
    for _ in range(2):
        residual = v - _mixture_logit(x, *theta)[0]
        x = x + dx * (residual - residual.detach())
    return x, -_sum_per_sample(_mixture_logit(x, *theta)[1])


def _parameters(mu: Tensor, alpha: Tensor, shift: bool, scale: Scale) -> tuple[Tensor, Tensor]:
    """mu and the log-scale a of every element; with ``shift``, of the token before."""
    a = _log_scale(alpha, *scale)
    return (_shift(mu), _shift(a)) if shift else (mu, a)


def _log_scale(raw: Tensor, kind: str, first: float, second: float) -> Tensor:
    """The log-scale a as :mod:`~tarflow_kernels.scales` defines each kind of it."""
    if kind == "exp":
        return raw
    if kind == "softclip":
        return first * raw / (first + raw.abs())
    if kind == "softplus":
        t = raw + first
        if second:
            return torch.log(torch.logaddexp(t, torch.zeros_like(t)) + second)
        return torch.where(t < -40, t, torch.log(torch.logaddexp(t.clamp(min=-40), torch.zeros_like(t))))
    if kind == "sigmoid":
        t = raw + first
        return torch.log(torch.sigmoid(t) + second) if second else -torch.logaddexp(-t, torch.zeros_like(t))
    if kind == "clamp":
        return raw + (raw.clamp(first, second) - raw).detach()
    if kind == "tanh":
        return first * torch.tanh(raw / first)
    raise ValueError(f"scale: expected a kind of tarflow_kernels.scales; got {kind!r}")


def _mixture_logit(x: Tensor, log_pi: Tensor, means: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """``log F - log(1 - F)``, and the log of its derivative ``f / (F (1 - F))``."""
    z = (x[..., None] - means) * torch.exp(-s)
    log_below, log_above = F.logsigmoid(z), F.logsigmoid(-z)
    log_cdf = torch.logsumexp(log_pi + log_below, -1)
    log_rest = torch.logsumexp(log_pi + log_above, -1)
    log_density = torch.logsumexp(log_pi + log_below + log_above - s, -1)
    return log_cdf - log_rest, log_density - log_cdf - log_rest


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, temperature: float | Tensor, scale: float | None) -> Tensor:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1, 1, 1, 1)
    logits = (q @ k.transpose(-1, -2)) * scale / temperature
    return logits.masked_fill(~seen, -math.inf).softmax(-1).to(v.dtype) @ v


def _shift(parameter: Tensor) -> Tensor:
    """Token i gets the parameters at i - 1; token 0 gets zeros, with which an affine map is the identity."""
    return torch.cat((torch.zeros_like(parameter[:, :1]), parameter[:, :-1]), dim=1)


def _sum_per_sample(alpha: Tensor) -> Tensor:
    return alpha.reshape(len(alpha), math.prod(alpha.shape[1:])).sum(1)
