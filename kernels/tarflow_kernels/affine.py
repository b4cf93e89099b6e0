"""Affine autoregressive maps: ``z = (x - mu) exp(-alpha)``, its inverse, and its inverse under guidance.

Source: TarFlow (arXiv 2412.06329).
"""

import torch
from torch import Tensor

from . import dispatch, reference
from .checks import check_floating, check_same_shape


def affine_forward(x: Tensor, mu: Tensor, alpha: Tensor, *, shift: bool = False) -> tuple[Tensor, Tensor]:
    """Data to latent: ``z = (x - mu) exp(-alpha)`` and ``logdet = -sum alpha``.

    Args:
        x: ``(B, ...)``, any strides.
        mu, alpha: shift and log-scale, of the shape of x, any strides, possibly of a lower precision.
        shift: along dimension 1, token i uses the parameters at position i - 1 and token 0 passes through, so that the
            output of a causal network goes in as it is. Needs at least two dimensions.

    Returns:
        z of the shape of x, and the log-abs-det of the map in nats, summed per sample, ``(B,)``. Both are float32, or
        float64 where x is: the arithmetic never runs in a lower precision, which would break inversion.

    Raises:
        TypeError: an argument is not floating point.
        ValueError: the shapes differ, or are too small for ``shift``.

    >>> x, mu, alpha = torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 2.0]]).log1p()
    >>> z, logdet = affine_forward(x, mu, alpha)
    >>> z
    tensor([[2.0000, 1.3333]])
    >>> affine_inverse(z, mu, alpha)[0]
    tensor([[3., 5.]])
    """
    _check_affine(shift, x=x, mu=mu, alpha=alpha)
    return dispatch.call("affine_forward", x, mu, alpha, shift)


def affine_inverse(z: Tensor, mu: Tensor, alpha: Tensor, *, shift: bool = False) -> tuple[Tensor, Tensor]:
    """Latent to data: ``x = z exp(alpha) + mu`` and ``logdet = sum alpha``, that of the inverse map.

    Arguments, shapes, dtypes and errors are those of :func:`affine_forward`. With ``shift`` the parameters are those
    of tokens that are already known; it inverts :func:`affine_forward` given the same parameters.
    """
    _check_affine(shift, z=z, mu=mu, alpha=alpha)
    return dispatch.call("affine_inverse", z, mu, alpha, shift)


def guided_affine_inverse(
    z: Tensor, mu: Tensor, alpha: Tensor, mu_ref: Tensor, alpha_ref: Tensor, weight: float | Tensor
) -> Tensor:
    """Latent to data under guidance: ``x = z exp(a) + m`` with ``v = (1 + w) v(cond) - w v(ref)`` for v in {a, m}.

    Args:
        z: ``(B, N, ...)``, any strides.
        mu, alpha: parameters of the conditional branch, of the shape of z.
        mu_ref, alpha_ref: those of the reference branch, which guidance moves away from.
        weight: w, a number for all tokens or a tensor of one weight per token, ``(N,)`` or ``(B, N)``.

    Returns:
        x of the shape of z, float32, or float64 where z is. There is no log-det: the guided map is no longer the
        inverse of the flow.

    Raises:
        TypeError: an argument is not floating point.
        ValueError: shapes differ, or ``weight`` has none of the shapes above.
    """
    check_floating(z=z, mu=mu, alpha=alpha, mu_ref=mu_ref, alpha_ref=alpha_ref)
    check_same_shape(z=z, mu=mu, alpha=alpha, mu_ref=mu_ref, alpha_ref=alpha_ref)
    if isinstance(weight, Tensor) and (z.dim() < 2 or weight.shape not in (z.shape[1:2], z.shape[:2])):
        raise ValueError(
            f"weight: expected a number, or shape (N,) or (B, N) for z of shape {tuple(z.shape)}; "
            f"got {tuple(weight.shape)}"
        )
    per_token, uniform = (weight, 0.0) if isinstance(weight, Tensor) else (None, weight)
    return dispatch.call("guided_affine_inverse", z, mu, alpha, mu_ref, alpha_ref, per_token, uniform)


def _check_affine(shift: bool, **tensors: Tensor) -> None:
    check_floating(**tensors)
    check_same_shape(**tensors)
    (name, first), *_ = tensors.items()
    if first.dim() < 1 + shift:
        raise ValueError(f"{name}: expected {'(B, N, ...)' if shift else '(B, ...)'}; got shape {tuple(first.shape)}")


def _torch_affine_forward(x: Tensor, mu: Tensor, alpha: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    if not shift:
        x, mu, alpha = _in_full_precision(x, mu, alpha)
        return (x - mu) * torch.exp(-alpha), -_sum_per_sample(alpha)
    tail, logdet = _torch_affine_forward(x[:, 1:], mu[:, :-1], alpha[:, :-1], False)
    return torch.cat((x[:, :1].to(tail.dtype), tail), dim=1), logdet


def _torch_affine_inverse(z: Tensor, mu: Tensor, alpha: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    if not shift:
        z, mu, alpha = _in_full_precision(z, mu, alpha)
        return torch.addcmul(mu, z, torch.exp(alpha)), _sum_per_sample(alpha)
    tail, logdet = _torch_affine_inverse(z[:, 1:], mu[:, :-1], alpha[:, :-1], False)
    return torch.cat((z[:, :1].to(tail.dtype), tail), dim=1), logdet


def _torch_guided_affine_inverse(
    z: Tensor, mu: Tensor, alpha: Tensor, mu_ref: Tensor, alpha_ref: Tensor, per_token: Tensor | None, weight: float
) -> Tensor:
    z, mu, alpha, mu_ref, alpha_ref = _in_full_precision(z, mu, alpha, mu_ref, alpha_ref)
    w = weight if per_token is None else reference.per_token(per_token.to(z.dtype), z)
    return torch.addcmul(torch.lerp(mu, mu_ref, -w), z, torch.exp(torch.lerp(alpha, alpha_ref, -w)))


def _reference_guided_affine_inverse(z, mu, alpha, mu_ref, alpha_ref, per_token, weight):
    weight = weight if per_token is None else per_token
    return reference.guided_affine_inverse(*_in_full_precision(z, mu, alpha, mu_ref, alpha_ref), weight)


def _in_full_precision(first: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(first.dtype, torch.float32)
    return first.to(dtype), *(other.to(dtype) for other in others)


def _sum_per_sample(alpha: Tensor) -> Tensor:
    # A reduction over dimensions, unlike a reshape, copies nothing when alpha is strided.
    return alpha.sum(tuple(range(1, alpha.dim()))) if alpha.dim() > 1 else alpha.clone()


dispatch.register(
    "affine_forward(Tensor x, Tensor mu, Tensor alpha, bool shift) -> (Tensor, Tensor)",
    reference=lambda x, mu, alpha, shift: reference.affine_forward(*_in_full_precision(x, mu, alpha), shift=shift),
    torch=_torch_affine_forward,
)
dispatch.register(
    "affine_inverse(Tensor z, Tensor mu, Tensor alpha, bool shift) -> (Tensor, Tensor)",
    reference=lambda z, mu, alpha, shift: reference.affine_inverse(*_in_full_precision(z, mu, alpha), shift=shift),
    torch=_torch_affine_inverse,
)
dispatch.register(
    "guided_affine_inverse(Tensor z, Tensor mu, Tensor alpha, Tensor mu_ref, Tensor alpha_ref,"
    " Tensor? per_token, float weight) -> Tensor",
    reference=_reference_guided_affine_inverse,
    torch=_torch_guided_affine_inverse,
)
