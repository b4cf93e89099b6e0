"""Gradients of an inverse that was found without any, by the implicit function theorem."""

from collections.abc import Callable

import torch
from torch import Tensor

from .derivatives import undifferentiable
from .incremental import fixed_point_inverse

__all__ = ["with_gradients"]


def with_gradients(x: Tensor, y: Tensor, conditioner: Callable, forward: Callable) -> Tensor:
    """Give x the gradients of the inverse of the autoregressive map ``y_i = f(x_i; parameters_i(x_<i))``.

    For a gradient g of x, that of y is the solution of ``J^T lambda = g``, where J = dy/dx is triangular in the order
    of the features: its diagonal is that of f, all else goes through the network. It is found by at most D passes
    backward, and fewer where nothing changes any more; what made the parameters gets ``-lambda dy/dparameters``.
    Once differentiable: to differentiate them again is an error.

    Args:
        x: ``(B, D)``, the inverse of y.
        y: ``(B, D)``.
        conditioner: ``x -> parameters``, any nest of tensors.
        forward: ``(x, parameters) -> y``, element by element.
    """
    element, seen = (x.detach().requires_grad_() for _ in range(2))
    made = forward(element, conditioner(seen))
    return _Inverse.apply(y - made, x, made, element, seen)


class _Inverse(torch.autograd.Function):
    """The function ``x + J^-1 (y - f(x))`` of the residual ``y - f(x)``, which is zero."""

    @staticmethod
    def forward(ctx, residual, x, made, element, seen):
        ctx.save_for_backward(residual)
        ctx.made, ctx.element, ctx.seen = made, element, seen
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        solution = _Inverse.solve(ctx, grad)
        return undifferentiable(solution, grad, *ctx.saved_tensors), None, None, None, None

    @staticmethod
    @torch.no_grad()
    def solve(ctx, grad):
        made, element, seen = ctx.made, ctx.element, ctx.seen
        (diagonal,) = torch.autograd.grad(made, element, torch.ones_like(made), retain_graph=True)

        def update(solution):
            (before,) = torch.autograd.grad(made, seen, solution, retain_graph=True)
            return (grad - before) / diagonal

        solution, _ = fixed_point_inverse(update, grad / diagonal, grad.shape[-1])
        return solution
