"""What ops ask of their arguments before they choose how to run."""

import torch
from torch import Tensor


def needs_gradients(*args: object) -> bool:
    """Whether autograd is on and one of the arguments is a tensor that it follows."""
    return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def full_precision(first: Tensor) -> torch.dtype:
    """Of maps that low precision would make impossible to invert: float32, or float64 where the first tensor is."""
    return torch.promote_types(first.dtype, torch.float32)


def in_full_precision(first: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """All tensors in the full precision of the first."""
    dtype = full_precision(first)
    return first.to(dtype), *(other.to(dtype) for other in others)
