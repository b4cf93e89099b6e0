"""Causal attention with temperature: ``softmax(q k^T * scale / temperature) v``, where query i sees keys 0 to i.

Source: TarFlow (arXiv 2412.06329), whose temperature guidance divides the attention logits by tau.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch, reference
from .checks import check_attention, check_temperature


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, temperature: float | Tensor = 1.0, scale: float | None = None
) -> Tensor:
    """``softmax(q k^T * scale / temperature + mask) v``, where query i sees keys 0 to i.

    Args:
        q, k, v: ``(B, H, N, D)`` of one dtype, any strides with a contiguous last dimension. Under autocast they are
            cast to its dtype.
        temperature: tau, a positive number, or ``(B,)``, one for each row of the batch, on the device of q.
        scale: 1 / sqrt(D) by default.

    Returns:
        ``(B, H, N, D)`` in the dtype of q. Differentiable in q, k, v and a tensor temperature.

    Raises:
        TypeError: dtypes that are not floating point or not equal.
        ValueError: shapes that differ or have another number of dimensions; a temperature that is not positive.

    >>> q = torch.zeros(1, 1, 3, 2)
    >>> v = torch.tensor([[[[0.0, 3.0], [2.0, 1.0], [4.0, 2.0]]]])
    >>> causal_attention(q, q, v)  # equal logits: a running mean
    tensor([[[[0., 3.],
              [1., 2.],
              [2., 2.]]]])
    """
    q, k, v = autocast(q, k, v)
    check_attention(q=q, k=k, v=v)
    check_temperature(temperature, q.shape[0])
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


dispatch.register(
    "causal_attention(Tensor q, Tensor k, Tensor v, Tensor? temperature, float scale) -> Tensor",
    reference=_reference,
    torch=_torch,
)
