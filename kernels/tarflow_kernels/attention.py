"""Causal attention with temperature: ``softmax(q k^T * scale / temperature) v``, where query i sees keys 0 to i.

Source: TarFlow (arXiv 2412.06329), whose temperature guidance divides the attention logits by tau.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, reference
from .checks import check_attention, check_scale, check_temperature
from .derivatives import differentiated_again, gradients_of
from .tensors import in_full_precision


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, temperature: float | Tensor = 1.0, scale: float | None = None
) -> Tensor:
    """``softmax(q k^T * scale / temperature + mask) v``, where query i sees keys 0 to i.

    Args:
        q, k, v: ``(B, H, N, D)`` of one dtype, any strides, best with a contiguous last dimension. Under autocast they
            are cast to its dtype.
        temperature: tau, a positive number, or ``(B,)``, one for each row of the batch, on the device of q.
        scale: a positive number, 1 / sqrt(D) by default.

    Returns:
        ``(B, H, N, D)`` in the dtype of q. Differentiable in q, k, v and a tensor temperature. Gradients that are to
        be differentiated again (``create_graph=True``) are those of the formula, with all of its logits in memory;
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
    check_attention(q=q, k=k, v=v)
    check_temperature(temperature, q)
    check_scale(scale)
    return dispatch.call("causal_attention", q, k, v, *fold_temperature(q, temperature, scale))


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the dtype of the autocast in force for their device, if any."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def fold_temperature(q: Tensor, temperature: float | Tensor, scale: float | None) -> tuple[Tensor | None, float]:
    """Split into what only the device knows, a temperature per row, and one factor of the logits."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return (temperature, scale) if isinstance(temperature, Tensor) else (None, scale / temperature)


def scale_queries(q: Tensor, temperature: Tensor | None) -> Tensor:
    """Dividing the logits of a row by its temperature is dividing its queries."""
    return q if temperature is None else (q / temperature.view(-1, 1, 1, 1)).to(q.dtype)


def _reference(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None, scale: float) -> Tensor:
    temperature = 1.0 if temperature is None else temperature
    return reference.causal_attention(q, k, v, temperature=temperature, scale=scale)


def _torch(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor | None, scale: float) -> Tensor:
    dtype = q.dtype
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # PyTorch's backward for bfloat16 on a CPU takes up to five times as long as the one for float32.
        q, k, v = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(scale_queries(q, temperature), k, v, is_causal=True, scale=scale).to(dtype)


class _Fused(torch.autograd.Function):
    """The Triton kernels under autograd."""

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
            return *_formula_gradients(grad, q, k, v, temperature, ctx.scale), None
        grads = _backward_kernel(grad, q, k, v, out, lse, temperature, ctx.scale)
        dq, dk, dv = grads.permute(2, 0, 3, 1, 4).unbind()
        grad_temperature = None
        if ctx.needs_input_grad[3]:
            # The logits are q k^T scale / tau, so tau's gradient is minus that of q along q, over tau.
            dtype = torch.promote_types(q.dtype, torch.float32)
            along = (q.to(dtype) * dq.to(dtype)).sum((1, 2, 3))
            grad_temperature = -(along / temperature).to(temperature.dtype)
        return dq, dk, dv, grad_temperature, None


def _formula_gradients(grad, q, k, v, temperature, scale):
    """Gradients of q, k, v and temperature that can be differentiated again."""

    def formula(q, k, v, temperature=None):
        return _reference(*in_full_precision(q, k, v), temperature, scale).to(q.dtype)

    grads = gradients_of(formula, (q, k, v) if temperature is None else (q, k, v, temperature), [grad])
    return grads if len(grads) == 4 else (*grads, None)


def empty_forward(q, k, v, temperature, scale):
    batch, heads, length, head_dim = q.shape
    # The head dimension lies behind that of the heads, so that joining the heads is no copy.
    out = q.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    return out, q.new_empty(batch, heads, length, dtype=torch.promote_types(q.dtype, torch.float32))


def empty_backward(grad, q, k, v, out, lse, temperature, scale):
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


_WIDEST = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128, torch.float64: 128}


def serves(q: Tensor, *_) -> bool:
    """Whether the attention kernels take such queries: stock PyTorch takes heads that do not fit on the chip.

    Of float64, for which only the interpreter has tiles, it takes all on a GPU.
    """
    return q.shape[-1] <= _WIDEST.get(q.dtype, 0) and (q.dtype != torch.float64 or q.is_cpu)


dispatch.register(
    "causal_attention(Tensor q, Tensor k, Tensor v, Tensor? temperature, float scale) -> Tensor",
    serves=serves,
    reference=_reference,
    torch=_torch,
    triton=_Fused.apply,
)
