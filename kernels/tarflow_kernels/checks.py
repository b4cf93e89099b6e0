"""Argument checks of the public functions: one clear error that names the argument, what was expected, what came."""

import math

import torch
from torch import Tensor


def check_floating(**tensors: Tensor) -> None:
    """Every tensor must be floating point."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor; got {tensor.dtype}")


def check_same_shape(**tensors: Tensor) -> None:
    """Every tensor must have the shape of the first and lie on its device."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name}: expected the shape of {first_name}, {tuple(first.shape)}; got {tuple(tensor.shape)}"
            )
    check_same_device(**tensors)


def check_same_device(**tensors: Tensor) -> None:
    """Every tensor must lie on the device of the first."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected the device of {first_name}, {first.device}; got {tensor.device}")


def check_attention(**tensors: Tensor) -> None:
    """Queries, keys and values must be floating point, of one dtype and one shape (B, H, N, D), D at least 1."""
    check_floating(**tensors)
    check_same_shape(**tensors)
    (first_name, first), *others = tensors.items()
    if first.dim() != 4 or not first.shape[3]:
        raise ValueError(f"{first_name}: expected shape (B, H, N, D), D at least 1; got {tuple(first.shape)}")
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name}: expected the dtype of {first_name}, {first.dtype}; got {tensor.dtype}")


def check_temperature(temperature: float | Tensor, q: Tensor) -> None:
    """A positive number, or a floating-point tensor of one temperature per row of q (its values are not looked at)."""
    if isinstance(temperature, Tensor):
        check_floating(temperature=temperature)
        if temperature.shape != q.shape[:1]:
            raise ValueError(
                f"temperature: expected a number or shape ({len(q)},), one for each row; got {tuple(temperature.shape)}"
            )
        check_same_device(q=q, temperature=temperature)
    elif not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive, finite number; got {temperature}")


def check_scale(scale: float | None) -> None:
    """A positive number, or None for the default."""
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive, finite number; got {scale}")


def check_positions(positions: Tensor, rows: int) -> None:
    """An int32 tensor with one position per row (its values are not looked at)."""
    if positions.dtype != torch.int32:
        raise TypeError(f"positions: expected int32; got {positions.dtype}")
    if positions.shape != (rows,):
        raise ValueError(f"positions: expected shape ({rows},), one for each row; got {tuple(positions.shape)}")
