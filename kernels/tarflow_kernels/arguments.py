"""The handling of arguments before an op runs: checks, precision, gradients, autocast, temperatures.

An error names the argument, what was expected and what came.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "autocast",
    "check_floating",
    "check_same_device",
    "check_scale",
    "check_temperature",
    "check_tensors",
    "fold_temperature",
    "full_precision",
    "has_attention_kernel",
    "in_full_precision",
    "needs_gradients",
    "scale_queries",
]

# Channels of the widest head that fits on the chip.
_WIDEST_HEAD = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128, torch.float64: 128}


def check_tensors(
    name: str, first: Tensor, *others: tuple[str, Tensor | None, tuple[int, ...], torch.dtype | None]
) -> None:
    """Check that tensors fit the first one. A decoding step does so a few times per layer and token.

    Args:
        name: what the first argument is called.
        first: the argument whose device the others must share.
        others: of each, its name, the tensor (None: not given, nothing to check), its shape and its dtype (None: any
            floating point).

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a tensor has another shape or lies on another device.
    """
    device = first.device
    for other, tensor, shape, dtype in others:
        if tensor is None:
            continue
        if tensor.shape != shape:
            expected = f"the shape of {name}, {tuple(shape)}" if shape == first.shape else f"shape {tuple(shape)}"
            raise ValueError(f"{other}: expected {expected}; got {tuple(tensor.shape)}")
        found = tensor.dtype
        if found is not dtype and not (dtype is None and found.is_floating_point):
            wanted = "a floating-point tensor" if dtype is None else str(dtype)
            expected = f"the dtype of {name}, {dtype}" if dtype is first.dtype else wanted
            raise TypeError(f"{other}: expected {expected}; got {found}")
        if tensor.device != device:
            raise ValueError(f"{other}: expected the device of {name}, {device}; got {tensor.device}")


def check_floating(name: str, dtype: torch.dtype) -> None:
    """Check that the dtype of an argument is floating point; TypeError if not."""
    if not dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point tensor; got {dtype}")


def check_same_device(name: str, first: Tensor, other: str, tensor: Tensor) -> None:
    """Check that a tensor lies on the device of another, the first; ValueError if not."""
    if tensor.device != first.device:
        raise ValueError(f"{other}: expected the device of {name}, {first.device}; got {tensor.device}")


def check_temperature(temperature: float | Tensor, q: Tensor) -> None:
    """Check that a temperature is a positive number, or a tensor of one for each row of q, whose values nobody reads.

    Raises:
        TypeError: the tensor is not floating point.
        ValueError: the number is not positive and finite, or the tensor has another shape or device.
    """
    if isinstance(temperature, Tensor):
        check_floating("temperature", temperature.dtype)
        if temperature.shape != q.shape[:1]:
            raise ValueError(
                f"temperature: expected a number or shape ({len(q)},), one for each row; got {tuple(temperature.shape)}"
            )
        check_same_device("q", q, "temperature", temperature)
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive, finite number; got {temperature}")


def check_scale(scale: float | None) -> None:
    """Check that a factor of logits is a positive, finite number, or None for the default; ValueError if not."""
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive, finite number; got {scale}")


def needs_gradients(*args: object) -> bool:
    """Whether autograd is on and one of the arguments is a tensor that it follows."""
    return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def full_precision(first: Tensor) -> torch.dtype:
    """The dtype of maps that low precision would make impossible to invert: float64 of a float64, else float32."""
    return torch.promote_types(first.dtype, torch.float32)


def in_full_precision(first: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Convert all tensors to the full precision of the first."""
    dtype = full_precision(first)
    return first.to(dtype), *(other.to(dtype) for other in others)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to the dtype of the autocast in force for the device of the first, if any."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def fold_temperature(q: Tensor, temperature: float | Tensor, scale: float | None) -> tuple[Tensor | None, float]:
    """Split into what only the device knows, a temperature per row, and one factor of the logits."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return (temperature, scale) if isinstance(temperature, Tensor) else (None, scale / temperature)


def scale_queries(q: Tensor, temperature: Tensor | None) -> Tensor:
    """Divide queries by the temperature of their row, which divides its logits."""
    return q if temperature is None else (q / temperature.view(-1, 1, 1, 1)).to(q.dtype)


def has_attention_kernel(q: Tensor, *_: object) -> bool:
    """Whether the Triton kernels take such queries; PyTorch takes heads that do not fit on the chip.

    It takes all of float64 on a GPU, too: only the interpreter has tiles for that.
    """
    return q.shape[-1] <= _WIDEST_HEAD.get(q.dtype, 0) and (q.dtype != torch.float64 or q.is_cpu)
