"""Second derivatives through ops that have backward passes of their own.

PyTorch's ``once_differentiable`` does not say what is missing where incoming gradients need no gradients, as those of a
sum, nor where derivatives are asked for in the inputs alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["differentiated_again", "gradients_of", "undifferentiable"]


def differentiated_again() -> bool:
    """Whether the gradients that a backward pass returns are themselves to be differentiated: ``create_graph=True``."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients_of(formula: Callable, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Differentiate ``formula(*inputs)`` in all inputs so that the gradients can be differentiated again."""
    with torch.enable_grad():
        # Views, since one input may have been made from another.
        views = [t.view_as(t).requires_grad_() for t in inputs]
        return torch.autograd.grad(formula(*views), views, grads, create_graph=True)


def undifferentiable(gradient: Tensor, *sources: Tensor) -> Tensor:
    """Mark a gradient that a backward pass made of some tensors: to differentiate it in them raises."""
    return _Undifferentiable.apply(gradient, *sources) if differentiated_again() else gradient


class _Undifferentiable(torch.autograd.Function):
    """The identity of the first tensor, which makes the graph of all of them refuse a second derivative."""

    @staticmethod
    def forward(ctx, gradient, *sources):
        return gradient.clone()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("an inverse that was found without gradients can be differentiated once, not twice")
