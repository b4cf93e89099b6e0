"""Activations that make the log-scale a of an affine map from the raw output of a network.

An affine map scales by exp(a). An activation keeps a, or at least its gradient, from running away. Sources: the
affine transforms of zuko (softclip), nflows and normflows (softplus, sigmoid), Pyro (clamp) and RealNVP's scaled tanh
(arXiv 1605.08803).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EXP", "Scale", "clamp", "log_scale", "sigmoid", "softclip", "softplus", "tanh"]


class Scale(NamedTuple):
    """An activation and its two numbers; the functions of this module make and check them."""

    kind: str = "exp"
    first: float = 0.0
    second: float = 0.0


EXP = Scale()
"""The raw output is the log-scale: ``a = raw``."""


def softclip(bound: float) -> Scale:
    """Bound the log-scale softly: ``a = raw / (1 + |raw / bound|)``. zuko's ``slope`` is the bound ``-log(slope)``.

    Raises:
        ValueError: ``bound`` is not positive and finite.
    """
    return Scale("softclip", _positive(bound=bound))


def softplus(offset: float = 0.0, eps: float = 1e-3) -> Scale:
    """Scale by a softplus: ``exp(a) = log(1 + exp(raw + offset)) + eps``.

    With an offset of ``log(e - 1)`` and an ``eps`` of zero it is STARFlow's, whose scale is 1 at 0 (arXiv 2506.06276).

    Raises:
        ValueError: ``offset`` is not finite, or ``eps`` is negative or not finite.
    """
    return Scale("softplus", _finite(offset=offset), _not_negative(eps=eps))


def sigmoid(offset: float = 2.0, eps: float = 1e-3) -> Scale:
    """Scale by a sigmoid: ``exp(a) = 1 / (1 + exp(-raw - offset)) + eps``.

    With an ``eps`` of zero it is normflows' ``sigmoid_inv``.

    Raises:
        ValueError: ``offset`` is not finite, or ``eps`` is negative or not finite.
    """
    return Scale("sigmoid", _finite(offset=offset), _not_negative(eps=eps))


def clamp(low: float, high: float) -> Scale:
    """Clamp the log-scale: ``a = min(max(raw, low), high)``, whose gradient is taken to be 1 outside the limits too.

    Raises:
        ValueError: ``low`` is not below ``high``, or either is not finite.
    """
    if not _finite(low=low) < _finite(high=high):
        raise ValueError(f"low: expected a number below high, {high}; got {low}")
    return Scale("clamp", float(low), float(high))


def tanh(bound: float) -> Scale:
    """Bound the log-scale by a hyperbolic tangent: ``bound`` times that of ``raw / bound``.

    Raises:
        ValueError: ``bound`` is not positive and finite.
    """
    return Scale("tanh", _positive(bound=bound))


def log_scale(raw: Tensor, scale: Scale) -> Tensor:
    """The log-scale a that an activation makes of a raw output, in the dtype of ``raw``.

    >>> log_scale(torch.tensor([-1000.0, 0.0, 1000.0]), clamp(-5.0, 3.0))
    tensor([-5.,  0.,  3.])
    """
    kind, first, second = scale
    if kind == "exp":
        return raw
    if kind == "softclip":
        return raw / (1 + torch.abs(raw / first))
    if kind == "softplus":
        t = raw + first
        # PyTorch's softplus takes a shortcut from 20 on, which float64 would notice.
        if second:
            return torch.log(F.softplus(t, threshold=40) + second)
        # From -40 down it is exp(t) in any precision, which would underflow.
        return torch.where(t < -40, t, torch.log(F.softplus(t.clamp(min=-40), threshold=40)))
    if kind == "sigmoid":
        return torch.log(torch.sigmoid(raw + first) + second) if second else F.logsigmoid(raw + first)
    if kind == "clamp":
        return raw.clamp(first, second).detach() + (raw - raw.detach())
    if kind == "tanh":
        return first * torch.tanh(raw / first)
    raise ValueError(f"kind: expected the kind of a scale; got {kind!r}")


def _finite(**argument: float) -> float:
    ((name, value),) = argument.items()
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number; got {value}")
    return float(value)


def _not_negative(**argument: float) -> float:
    ((name, value),) = argument.items()
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number, zero or more; got {value}")
    return float(value)


def _positive(**argument: float) -> float:
    ((name, value),) = argument.items()
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive, finite number; got {value}")
    return float(value)
