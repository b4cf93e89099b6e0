"""A residual connection and the layer norm behind it: two of the small operators between a decoding step's products."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, reference
from .arguments import check_floating, check_tensors

__all__ = ["residual_norm"]


def residual_norm(
    h: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Add a residual in place, ``h += delta``, then normalize: ``(h - mean) / sqrt(var + eps) * weight + bias``.

    Mean and variance are those of the stored h over its last dimension, in float32, or float64 where h is.

    Args:
        h: ``(..., C)``, any strides, best with contiguous rows; updated in place.
        delta: of the shape of h, any strides, possibly of a lower precision; or None, which leaves h as it is.
        weight, bias: ``(C,)``, of the dtype of h.
        eps: a positive number.
        dtype: of the result, that of h by default.

    Returns:
        ``(..., C)``, contiguous, in ``dtype``. Not differentiable.

    Raises:
        TypeError: dtypes that are not floating point; a weight or bias not of the dtype of h.
        ValueError: shapes or devices that do not fit each other; an ``eps`` that is not positive.

    >>> h, delta, ones = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]]), torch.ones(2)
    >>> residual_norm(h, delta, ones, ones, eps=1e-9)
    tensor([[0., 2.]])
    >>> h
    tensor([[1., 3.]])
    """
    shape, own = h.shape, h.dtype
    check_floating("h", own)
    if not shape:
        raise ValueError("h: expected shape (..., C); got ()")
    channels = (shape[-1],)
    check_tensors(
        "h", h, ("delta", delta, shape, None), ("weight", weight, channels, own), ("bias", bias, channels, own)
    )
    if dtype is None:
        dtype = own
    elif not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: expected a floating-point dtype; got {dtype}")
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number; got {eps}")
    return dispatch.call("residual_norm", h, delta, weight, bias, eps, dtype)


def _reference(h, delta, weight, bias, eps, dtype):
    return reference.residual_norm(h, delta, weight, bias, eps=eps, dtype=dtype).contiguous()


def _torch(h, delta, weight, bias, eps, dtype):
    if delta is not None:
        h.add_(delta)
    y = torch.layer_norm(h, weight.shape, weight, bias, eps)
    return y if y.dtype == dtype else y.to(dtype)  # even a cast to what it is takes a microsecond


def _serves(h: Tensor, *_) -> bool:
    """Whether a row fits into the registers of one program."""
    return h.shape[-1] <= 8192


dispatch.register(
    "residual_norm(Tensor(a!) h, Tensor? delta, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> Tensor",
    fake=lambda h, delta, weight, bias, eps, dtype: h.new_empty(h.shape, dtype=dtype),
    serves=_serves,
    reference=_reference,
    torch=_torch,
    triton=dispatch.launcher("norm", "residual_norm"),
)
