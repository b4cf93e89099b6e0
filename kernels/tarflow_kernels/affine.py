"""Affine autoregressive maps: ``z = (x - mu) exp(-alpha)`` and its inverse.

Source: TarFlow (arXiv 2412.06329).
"""

from typing import Any

import torch
from torch import Tensor

from . import dispatch, reference
from .arguments import check_floating, check_tensors, full_precision, in_full_precision
from .derivatives import differentiated_again, gradients_of
from .scales import EXP, Scale, log_scale

__all__ = ["affine_forward", "affine_inverse"]


def affine_forward(
    x: Tensor, mu: Tensor, alpha: Tensor, *, shift: bool = False, scale: Scale = EXP
) -> tuple[Tensor, Tensor]:
    """Map data to latents: ``z = (x - mu) exp(-alpha)`` and ``logdet = -sum alpha``.

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
        ValueError: the shapes or devices differ, or are too small for ``shift``.

    >>> x, mu, alpha = torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 2.0]]).log1p()
    >>> z, logdet = affine_forward(x, mu, alpha)
    >>> z
    tensor([[2.0000, 1.3333]])
    >>> affine_inverse(z, mu, alpha)[0]
    tensor([[3., 5.]])
    """
    _check("x", x, mu, alpha, shift, scale)
    return dispatch.call("affine_forward", x, mu, alpha, shift, *scale)


def affine_inverse(
    z: Tensor, mu: Tensor, alpha: Tensor, *, shift: bool = False, scale: Scale = EXP
) -> tuple[Tensor, Tensor]:
    """Map latents to data: ``x = z exp(alpha) + mu`` and ``logdet = sum alpha``, that of the inverse map.

    Arguments, shapes, dtypes and errors are those of :func:`affine_forward`. With ``shift`` the parameters are those
    of tokens that are already known; it inverts :func:`affine_forward` given the same parameters.
    """
    _check("z", z, mu, alpha, shift, scale)
    return dispatch.call("affine_inverse", z, mu, alpha, shift, *scale)


def _check(name: str, x: Tensor, mu: Tensor, alpha: Tensor, shift: bool, scale: Scale) -> None:
    check_floating(name, x.dtype)
    check_tensors(name, x, ("mu", mu, x.shape, None), ("alpha", alpha, x.shape, None))
    if x.dim() < 1 + shift:
        raise ValueError(f"{name}: expected {'(B, N, ...)' if shift else '(B, ...)'}; got shape {tuple(x.shape)}")
    if not isinstance(scale, Scale):
        raise TypeError(f"scale: expected a Scale, such as scales.softclip(5.0); got {scale!r}")


def _reference_forward(x, mu, alpha, shift, *scale):
    return reference.affine_forward(*in_full_precision(x, mu, alpha), shift=shift, scale=Scale(*scale))


def _reference_inverse(z, mu, alpha, shift, *scale):
    return reference.affine_inverse(*in_full_precision(z, mu, alpha), shift=shift, scale=Scale(*scale))


def _torch_forward(x, mu, alpha, shift, *scale):
    if not _runs_eagerly(x):
        return _stock_forward(x, mu, alpha, shift, *scale)
    x, mu, alpha = in_full_precision(x, mu, alpha)
    return _EagerMap.apply(x, mu, _log_scale(alpha, *scale), shift, False)


def _torch_inverse(z, mu, alpha, shift, *scale):
    if not _runs_eagerly(z):
        return _stock_inverse(z, mu, alpha, shift, *scale)
    z, mu, alpha = in_full_precision(z, mu, alpha)
    return _EagerMap.apply(z, mu, _log_scale(alpha, *scale), shift, True)


def _runs_eagerly(x: Tensor) -> bool:
    """Whether operators run one by one on a CPU; compilers fuse stock operators, and torch.func asks for them."""
    return x.is_cpu and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def _stock_forward(x, mu, alpha, shift, *scale):
    x, mu, alpha = in_full_precision(x, mu, alpha)
    mu, a = _parameters(mu, alpha, shift, *scale)
    return (x - mu) * torch.exp(-a), -_sum_per_sample(a)


def _stock_inverse(z, mu, alpha, shift, *scale):
    z, mu, alpha = in_full_precision(z, mu, alpha)
    mu, a = _parameters(mu, alpha, shift, *scale)
    return torch.addcmul(mu, z, torch.exp(a)), _sum_per_sample(a)


class _EagerMap(torch.autograd.Function):
    """Both directions in few passes over memory, and gradients as :mod:`.triton.affine` has them.

    The shift is that of views: nothing is copied for it. Gradients that are to be differentiated again are those of
    stock operators.
    """

    @staticmethod
    def forward(ctx, x, mu, a, shift, inverse):
        out = torch.empty_like(x)
        tail, known_mu, known_a = (out[:, 1:], mu[:, :-1], a[:, :-1]) if shift else (out, mu, a)
        if shift:
            out[:, :1] = x[:, :1]
        given = x[:, 1:] if shift else x
        # Only of contiguous numbers does PyTorch take exponentials several at a time.
        factor = (known_a.clone(memory_format=torch.contiguous_format) if inverse else torch.neg(known_a)).exp_()
        if inverse:
            torch.mul(given, factor, out=tail).add_(known_mu)
        else:
            torch.sub(given, known_mu, out=tail).mul_(factor)
        ctx.save_for_backward(x, mu, a, x if inverse else out, factor)
        ctx.shift, ctx.inverse = shift, inverse
        logdet = _sum_per_sample(known_a)
        return out, logdet if inverse else logdet.neg_()

    @staticmethod
    def backward(ctx, grad_out, grad_logdet):
        x, mu, a, z, factor = ctx.saved_tensors
        if differentiated_again():
            run = _stock_inverse if ctx.inverse else _stock_forward
            grads = gradients_of(lambda *tensors: run(*tensors, ctx.shift), (x, mu, a), (grad_out, grad_logdet))
            return *grads, None, None
        grad_x, grad_mu, grad_a = torch.empty_like(x), torch.empty_like(mu), torch.empty_like(a)
        of_x, of_mu, of_a = grad_x, grad_mu, grad_a
        if ctx.shift:
            grad_x[:, :1] = grad_out[:, :1]
            grad_mu[:, -1:] = 0  # nothing depends on the parameters of the last token
            grad_a[:, -1:] = 0
            of_x, of_mu, of_a, grad_out, z = grad_x[:, 1:], grad_mu[:, :-1], grad_a[:, :-1], grad_out[:, 1:], z[:, 1:]
        grad_logdet = grad_logdet.view(-1, *[1] * (x.dim() - 1))
        torch.mul(grad_out, factor, out=of_x)
        if ctx.inverse:
            of_mu.copy_(grad_out)
            torch.addcmul(grad_logdet, of_x, z, out=of_a)
        else:
            torch.neg(of_x, out=of_mu)
            torch.addcmul(-grad_logdet, grad_out, z, value=-1, out=of_a)
        return grad_x, grad_mu, grad_a, None, None


def _parameters(mu: Tensor, alpha: Tensor, shift: bool, *scale: Any) -> tuple[Tensor, Tensor]:
    """The shift and the log-scale of every element, zeros for those that pass through."""
    a = _log_scale(alpha, *scale)
    return (_of_token_before(mu), _of_token_before(a)) if shift else (mu, a)


def _log_scale(alpha: Tensor, kind: str = "exp", *numbers: float) -> Tensor:
    return alpha if kind == "exp" else log_scale(alpha, Scale(kind, *numbers))


def _of_token_before(parameter: Tensor) -> Tensor:
    return torch.cat((torch.zeros_like(parameter[:, :1]), parameter[:, :-1]), dim=1)


def _sum_per_sample(alpha: Tensor) -> Tensor:
    # A reduction over dimensions, unlike a reshape, copies nothing when alpha is strided.
    return alpha.sum(tuple(range(1, alpha.dim()))) if alpha.dim() > 1 else alpha.clone()


class _FusedMap(torch.autograd.Function):
    """The kernels of both directions; their gradients need alpha and the latent alone.

    Gradients that are to be differentiated again are those of the stock operators.
    """

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
            run = _stock_inverse if inverse else _stock_forward
            grads = gradients_of(lambda *tensors: run(*tensors, shift, *scale), inputs, (grad_out, grad_logdet))
        else:
            grads = _affine_map_backward(grad_out, grad_logdet, latent, inputs[2], *ctx.dtypes, *ctx.options)
        return *grads, None, None, None


def _triton_forward(x, mu, alpha, shift, *scale):
    return _FusedMap.apply(x, mu, alpha, shift, False, Scale(*scale))


def _triton_inverse(z, mu, alpha, shift, *scale):
    return _FusedMap.apply(z, mu, alpha, shift, True, Scale(*scale))


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

dispatch.register(
    "affine_forward(Tensor x, Tensor mu, Tensor alpha, bool shift,"
    ' str scale="exp", float first=0.0, float second=0.0) -> (Tensor, Tensor)',
    reference=_reference_forward,
    torch=_torch_forward,
    triton=_triton_forward,
)
dispatch.register(
    "affine_inverse(Tensor z, Tensor mu, Tensor alpha, bool shift,"
    ' str scale="exp", float first=0.0, float second=0.0) -> (Tensor, Tensor)',
    reference=_reference_inverse,
    torch=_torch_inverse,
    triton=_triton_inverse,
)
