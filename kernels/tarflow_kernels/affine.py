"""Affine autoregressive maps: ``z = (x - mu) exp(-alpha)``, its inverse, and its inverse under guidance.

Source: TarFlow (arXiv 2412.06329).
"""

import torch
from torch import Tensor

from . import dispatch, reference
from .checks import check_floating, check_same_shape
from .derivatives import differentiated_again, gradients_of
from .scales import EXP, Scale
from .tensors import full_precision, in_full_precision, needs_gradients


def affine_forward(
    x: Tensor, mu: Tensor, alpha: Tensor, *, shift: bool = False, scale: Scale = EXP
) -> tuple[Tensor, Tensor]:
    """Data to latent: ``z = (x - mu) exp(-alpha)`` and ``logdet = -sum alpha``.

    Args:
        x: ``(B, ...)``, any strides.
        mu, alpha: shift and log-scale, of the shape of x, any strides, possibly of a lower precision.
        shift: along dimension 1, token i uses the parameters at position i - 1 and token 0 passes through, so that the
            output of a causal network goes in as it is. Needs at least two dimensions.
        scale: one of :mod:`~tarflow_kernels.scales`, where alpha is not itself the log-scale but the raw output of a
            network, of which the log-scale is still to be made.

    Returns:
        z of the shape of x, and the log-abs-det of the map in nats, summed per sample, ``(B,)``. Both are float32, or
        float64 where x is: the arithmetic never runs in a lower precision, which would break inversion. Differentiable
        in all tensors, any number of times.

    Raises:
        TypeError: an argument is not floating point, or ``scale`` not a ``Scale``.
        ValueError: the shapes differ, or are too small for ``shift``.

    >>> x, mu, alpha = torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 2.0]]).log1p()
    >>> z, logdet = affine_forward(x, mu, alpha)
    >>> z
    tensor([[2.0000, 1.3333]])
    >>> affine_inverse(z, mu, alpha)[0]
    tensor([[3., 5.]])
    """
    _check_affine(shift, scale, x=x, mu=mu, alpha=alpha)
    return dispatch.call("affine_forward", x, mu, alpha, shift, *scale)


def affine_inverse(
    z: Tensor, mu: Tensor, alpha: Tensor, *, shift: bool = False, scale: Scale = EXP
) -> tuple[Tensor, Tensor]:
    """Latent to data: ``x = z exp(alpha) + mu`` and ``logdet = sum alpha``, that of the inverse map.

    Arguments, shapes, dtypes and errors are those of :func:`affine_forward`. With ``shift`` the parameters are those
    of tokens that are already known; it inverts :func:`affine_forward` given the same parameters.
    """
    _check_affine(shift, scale, z=z, mu=mu, alpha=alpha)
    return dispatch.call("affine_inverse", z, mu, alpha, shift, *scale)


def guided_affine_inverse(
    z: Tensor,
    mu: Tensor,
    alpha: Tensor,
    mu_ref: Tensor,
    alpha_ref: Tensor,
    weight: float | Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Latent to data under guidance: ``x = z exp(a) + m`` with ``v = (1 + w) v(cond) - w v(ref)`` for v in {a, m}.

    Args:
        z: ``(B, N, ...)``, any strides.
        mu, alpha: parameters of the conditional branch, of the shape of z.
        mu_ref, alpha_ref: those of the reference branch, which guidance moves away from.
        weight: w, a number for all tokens or a tensor of one weight per token, ``(N,)`` or ``(B, N)``.
        out: where to write x, of its shape and dtype, any strides, such as the next token of a sequence. Not for
            inputs that need gradients.

    Returns:
        x of the shape of z, float32, or float64 where z is. There is no log-det: the guided map is no longer the
        inverse of the flow.

    Raises:
        TypeError: an argument is not floating point, or ``out`` not of the dtype of the result.
        ValueError: shapes differ, ``weight`` has none of the shapes above, or gradients would go through ``out``.
    """
    check_floating(z=z, mu=mu, alpha=alpha, mu_ref=mu_ref, alpha_ref=alpha_ref)
    check_same_shape(z=z, mu=mu, alpha=alpha, mu_ref=mu_ref, alpha_ref=alpha_ref)
    if isinstance(weight, Tensor) and (z.dim() < 2 or weight.shape not in (z.shape[1:2], z.shape[:2])):
        raise ValueError(
            f"weight: expected a number, or shape (N,) or (B, N) for z of shape {tuple(z.shape)}; "
            f"got {tuple(weight.shape)}"
        )
    per_token, uniform = (weight, 0.0) if isinstance(weight, Tensor) else (None, weight)
    args = z, mu, alpha, mu_ref, alpha_ref, per_token, uniform
    if out is None:
        return dispatch.call("guided_affine_inverse", *args)
    _check_out(out, *args)
    dispatch.call("guided_affine_inverse_out", *args, out)
    return out


def _check_affine(shift: bool, scale: Scale, **tensors: Tensor) -> None:
    check_floating(**tensors)
    check_same_shape(**tensors)
    (name, first), *_ = tensors.items()
    if first.dim() < 1 + shift:
        raise ValueError(f"{name}: expected {'(B, N, ...)' if shift else '(B, ...)'}; got shape {tuple(first.shape)}")
    if not isinstance(scale, Scale):
        raise TypeError(f"scale: expected a Scale, such as scales.softclip(5.0); got {scale!r}")


def _check_out(out: Tensor, z: Tensor, *args: Tensor | float | None) -> None:
    check_same_shape(z=z, out=out)
    if out.dtype != full_precision(z):
        raise TypeError(f"out: expected {full_precision(z)}, the dtype of the result; got {out.dtype}")
    if needs_gradients(out, z, *args):
        raise ValueError(
            "out: expected arguments that need no gradients, since x is written in place; got some that do"
        )


def _reference_affine_forward(x, mu, alpha, shift, *scale):
    return reference.affine_forward(*in_full_precision(x, mu, alpha), shift=shift, scale=Scale(*scale))


def _reference_affine_inverse(z, mu, alpha, shift, *scale):
    return reference.affine_inverse(*in_full_precision(z, mu, alpha), shift=shift, scale=Scale(*scale))


def _reference_guided_affine_inverse(z, mu, alpha, mu_ref, alpha_ref, per_token, weight):
    weight = weight if per_token is None else per_token
    return reference.guided_affine_inverse(*in_full_precision(z, mu, alpha, mu_ref, alpha_ref), weight)


def _torch_affine_forward(
    x: Tensor, mu: Tensor, alpha: Tensor, shift: bool, *scale: str | float
) -> tuple[Tensor, Tensor]:
    x, mu, alpha = in_full_precision(x, mu, alpha)
    mu, a = reference.parameters(mu, alpha, shift, Scale(*scale))
    return (x - mu) * torch.exp(-a), -_sum_per_sample(a)


def _torch_affine_inverse(
    z: Tensor, mu: Tensor, alpha: Tensor, shift: bool, *scale: str | float
) -> tuple[Tensor, Tensor]:
    z, mu, alpha = in_full_precision(z, mu, alpha)
    mu, a = reference.parameters(mu, alpha, shift, Scale(*scale))
    return torch.addcmul(mu, z, torch.exp(a)), _sum_per_sample(a)


def _torch_guided_affine_inverse(
    z: Tensor, mu: Tensor, alpha: Tensor, mu_ref: Tensor, alpha_ref: Tensor, per_token: Tensor | None, weight: float
) -> Tensor:
    z, mu, alpha, mu_ref, alpha_ref = in_full_precision(z, mu, alpha, mu_ref, alpha_ref)
    w = weight if per_token is None else reference.per_token(per_token.to(z.dtype), z)
    return torch.addcmul(torch.lerp(mu, mu_ref, -w), z, torch.exp(torch.lerp(alpha, alpha_ref, -w)))


def _sum_per_sample(alpha: Tensor) -> Tensor:
    # A reduction over dimensions, unlike a reshape, copies nothing when alpha is strided.
    return alpha.sum(tuple(range(1, alpha.dim()))) if alpha.dim() > 1 else alpha.clone()


class _AffineMap(torch.autograd.Function):
    """The kernels of both directions; their gradients need alpha and the latent alone, second ones the formula."""

    @staticmethod
    def forward(ctx, x, mu, alpha, shift, inverse, scale):
        out, logdet = _affine_map(x, mu, alpha, shift, inverse, *scale)
        ctx.save_for_backward(x, mu, alpha, x if inverse else out)
        ctx.dtypes, ctx.options = (x.dtype, mu.dtype), (shift, inverse, *scale)
        return out, logdet

    @staticmethod
    def backward(ctx, grad_out, grad_logdet):
        *inputs, latent = ctx.saved_tensors
        if differentiated_again():
            shift, inverse, *scale = ctx.options
            run = _reference_affine_inverse if inverse else _reference_affine_forward
            grads = gradients_of(lambda *tensors: run(*tensors, shift, *scale), inputs, (grad_out, grad_logdet))
        else:
            grads = _affine_map_backward(grad_out, grad_logdet, latent, inputs[2], *ctx.dtypes, *ctx.options)
        return *grads, None, None, None


def _triton_affine_forward(x, mu, alpha, shift, *scale):
    return _AffineMap.apply(x, mu, alpha, shift, False, Scale(*scale))


def _triton_affine_inverse(z, mu, alpha, shift, *scale):
    return _AffineMap.apply(z, mu, alpha, shift, True, Scale(*scale))


def _triton_guided_affine_inverse(z, mu, alpha, mu_ref, alpha_ref, per_token, weight):
    out = torch.empty_like(z, dtype=full_precision(z))
    _triton_guided_affine_inverse_out(z, mu, alpha, mu_ref, alpha_ref, per_token, weight, out)
    return out


def _triton_guided_affine_inverse_out(z, mu, alpha, mu_ref, alpha_ref, per_token, weight, out):
    per_token = None if per_token is None else reference.per_token(per_token, z)
    _guided_affine_map(z, mu, alpha, mu_ref, alpha_ref, per_token, weight, out)


def _writing_to_out(op):
    def write(*args):
        *args, out = args
        out.copy_(op(*args))

    return write


def _fake_affine_map(x, mu, alpha, *options):
    out = torch.empty_like(x, dtype=full_precision(x))
    return out, out.new_empty(x.shape[:1])


def _fake_affine_map_backward(grad_out, grad_logdet, z, alpha, x_dtype, mu_dtype, *options):
    return torch.empty_like(z, dtype=x_dtype), torch.empty_like(alpha, dtype=mu_dtype), torch.empty_like(alpha)


_affine_map = dispatch.register_kernel(
    "affine_map(Tensor x, Tensor mu, Tensor alpha, bool shift, bool inverse, str scale, float first, float second)"
    " -> (Tensor, Tensor)",
    module="affine",
    fake=_fake_affine_map,
)
_affine_map_backward = dispatch.register_kernel(
    "affine_map_backward(Tensor grad_out, Tensor grad_logdet, Tensor z, Tensor alpha, ScalarType x_dtype,"
    " ScalarType mu_dtype, bool shift, bool inverse, str scale, float first, float second) -> (Tensor, Tensor, Tensor)",
    module="affine",
    fake=_fake_affine_map_backward,
)
_guided_affine_map = dispatch.register_kernel(
    "guided_affine_map(Tensor z, Tensor mu, Tensor alpha, Tensor mu_ref, Tensor alpha_ref, Tensor? per_token,"
    " float weight, Tensor(a!) out) -> ()",
    module="affine",
    fake=lambda *args: None,
)

dispatch.register(
    "affine_forward(Tensor x, Tensor mu, Tensor alpha, bool shift,"
    ' str scale="exp", float first=0.0, float second=0.0) -> (Tensor, Tensor)',
    reference=_reference_affine_forward,
    torch=_torch_affine_forward,
    triton=_triton_affine_forward,
)
dispatch.register(
    "affine_inverse(Tensor z, Tensor mu, Tensor alpha, bool shift,"
    ' str scale="exp", float first=0.0, float second=0.0) -> (Tensor, Tensor)',
    reference=_reference_affine_inverse,
    torch=_torch_affine_inverse,
    triton=_triton_affine_inverse,
)
dispatch.register(
    "guided_affine_inverse(Tensor z, Tensor mu, Tensor alpha, Tensor mu_ref, Tensor alpha_ref,"
    " Tensor? per_token, float weight) -> Tensor",
    serves=lambda *args: not needs_gradients(*args),
    reference=_reference_guided_affine_inverse,
    torch=_torch_guided_affine_inverse,
    triton=_triton_guided_affine_inverse,
)
dispatch.register(
    "guided_affine_inverse_out(Tensor z, Tensor mu, Tensor alpha, Tensor mu_ref, Tensor alpha_ref,"
    " Tensor? per_token, float weight, Tensor(a!) out) -> ()",
    fake=lambda *args: None,
    reference=_writing_to_out(_reference_guided_affine_inverse),
    torch=_writing_to_out(_torch_guided_affine_inverse),
    triton=_triton_guided_affine_inverse_out,
)
