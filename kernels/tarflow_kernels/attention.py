"""Causal attention with temperature: ``softmax(q k^T * scale / temperature) v``, where query i sees keys 0 to i.

Source: TarFlow (arXiv 2412.06329), whose temperature guidance divides the attention logits by tau.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, reference
from .arguments import (
    autocast,
    check_floating,
    check_scale,
    check_temperature,
    check_tensors,
    fold_temperature,
    has_attention_kernel,
    in_full_precision,
    scale_queries,
)
from .derivatives import differentiated_again, gradients_of

__all__ = ["causal_attention"]


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, temperature: float | Tensor = 1.0, scale: float | None = None
) -> Tensor:
    """Attend causally: ``softmax(q k^T * scale / temperature + mask) v``, where query i sees keys 0 to i.

    Args:
        q, k, v: ``(B, H, N, D)`` of one dtype, any strides, best with a contiguous last dimension. Under autocast they
            are cast to its dtype.
        temperature: tau, a positive number, or ``(B,)``, one for each row of the batch, on the device of q.
        scale: a positive number, 1 / sqrt(D) by default.

    Returns:
        ``(B, H, N, D)`` in the dtype of q. Differentiable in q, k, v and a tensor temperature. Gradients that are to
        be differentiated again (``create_graph=True``) are those of stock operators, with all logits in memory;
        PyTorch's own attention, the torch backend, refuses that.

    Raises:
        TypeError: dtypes that are not floating point or not equal.
        ValueError: shapes or devices that differ, another number of dimensions; a temperature or scale that is not
            positive and finite.

    >>> q = torch.zeros(1, 1, 3, 2)
    >>> v = torch.tensor([[[[0.0, 3.0], [2.0, 1.0], [4.0, 2.0]]]])
    >>> causal_attention(q, q, v)  # equal logits: a running mean
    tensor([[[[0., 3.],
              [1., 2.],
              [2., 2.]]]])
    """
    q, k, v = autocast(q, k, v)
    check_floating("q", q.dtype)
    if q.dim() != 4 or not q.shape[3]:
        raise ValueError(f"q: expected shape (B, H, N, D), D at least 1; got {tuple(q.shape)}")
    check_tensors("q", q, ("k", k, q.shape, q.dtype), ("v", v, q.shape, q.dtype))
    check_temperature(temperature, q)
    check_scale(scale)
    return dispatch.call("causal_attention", q, k, v, *fold_temperature(q, temperature, scale))


def _reference(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None, scale: float) -> Tensor:
    tau = 1.0 if temperature is None else temperature
    return reference.causal_attention(q, k, v, temperature=tau, scale=scale)


def _torch(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None, scale: float) -> Tensor:
    dtype = q.dtype
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # PyTorch's backward for bfloat16 on a CPU takes five times as long as the one for float32.
        q, k, v = in_full_precision(q, k, v)
    with torch.autocast(q.device.type, enabled=False):  # which would cast them back
        out = F.scaled_dot_product_attention(scale_queries(q, temperature), k, v, is_causal=True, scale=scale)
    return out.to(dtype)


class _Fused(torch.autograd.Function):
    """The Triton kernels under autograd; gradients that are to be differentiated again are those of stock operators."""

    @staticmethod
    def forward(ctx, q, k, v, temperature, scale):
        out, lse = _forward_kernel(q, k, v, temperature, scale)
        ctx.save_for_backward(q, k, v, out, lse, temperature)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, temperature = ctx.saved_tensors
        if differentiated_again():
            inputs = [q, k, v] if temperature is None else [q, k, v, temperature]
            grads = gradients_of(lambda *tensors: _explicit(*tensors, scale=ctx.scale), inputs, [grad])
            return *grads, *[None] * (5 - len(grads))
        grads = _backward_kernel(grad, q, k, v, out, lse, temperature, ctx.scale)
        dq, dk, dv = grads.permute(2, 0, 3, 1, 4).unbind()
        grad_temperature = None
        if ctx.needs_input_grad[3]:
            # The logits are q k^T scale / tau, so tau's gradient is minus that of q along q, over tau.
            dtype = torch.promote_types(q.dtype, torch.float32)
            along = (q.to(dtype) * dq.to(dtype)).sum((1, 2, 3))
            grad_temperature = -(along / temperature).to(temperature.dtype)
        return dq, dk, dv, grad_temperature, None


def _explicit(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None = None, *, scale: float) -> Tensor:
    """The same attention of operators that can be differentiated any number of times."""
    dtype = q.dtype
    q, k, v = in_full_precision(q, k, v)
    logits = q @ k.mT * scale
    if temperature is not None:
        logits = logits / temperature.view(-1, 1, 1, 1)
    later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return (logits.masked_fill(later, float("-inf")).softmax(-1).to(v.dtype) @ v).to(dtype)


def empty_forward(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Make room for the output, laid out as ``(B, N, H, D)``, and the log-sum-exp, ``(B, H, N)``."""
    batch, heads, length, head_dim = q.shape
    # The head dimension lies behind that of the heads, so that joining the heads is no copy.
    out = q.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    return out, q.new_empty(batch, heads, length, dtype=torch.promote_types(q.dtype, torch.float32))


def empty_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, temperature: Tensor | None, scale: float
) -> Tensor:
    """Make room for the gradients of q, k and v, ``(B, N, 3, H, D)``, as a fused projection lays them out."""
    batch, heads, length, head_dim = q.shape
    return q.new_empty(batch, length, 3, heads, head_dim)


_forward_kernel = dispatch.register_kernel(
    "causal_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? temperature, float scale) -> (Tensor, Tensor)",
    module="attention",
    fake=empty_forward,
)
_backward_kernel = dispatch.register_kernel(
    "causal_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor? temperature, float scale) -> Tensor",
    module="attention",
    fake=empty_backward,
)

dispatch.register(
    "causal_attention(Tensor q, Tensor k, Tensor v, Tensor? temperature, float scale) -> Tensor",
    serves=has_attention_kernel,
    reference=_reference,
    torch=_torch,
    triton=_Fused.apply,
)
