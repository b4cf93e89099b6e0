"""Replacement of modules, autoregressive inverses and affine maps, for the adapters of all libraries."""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import affine, mixture
from ..arguments import needs_gradients
from ..implicit import with_gradients
from ..incremental import Inverse, fixed_point_inverse, incremental_inverse
from ..masked import MaskedNetwork
from ..scales import Scale, log_scale

Module = TypeVar("Module", bound=nn.Module)


def _in_dtype_of_x(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Wrap an op so that its results have the dtype of x, for the next layer, and not full precision."""

    @functools.wraps(op)
    def run(x: Tensor, *parameters: Tensor, **options) -> tuple[Tensor, Tensor]:
        value, logdet = op(x, *parameters, **options)
        return value.to(x.dtype), logdet.to(x.dtype)

    return run


affine_forward = _in_dtype_of_x(affine.affine_forward)
affine_inverse = _in_dtype_of_x(affine.affine_inverse)
mixture_logistic = _in_dtype_of_x(mixture.mixture_logistic)
mixture_logistic_inverse = _in_dtype_of_x(mixture.mixture_logistic_inverse)


def accelerate(flow: Module, library: str, replacements: dict[type, type]) -> Module:
    """Replace modules by their type, as :func:`replaced` does; TypeError where the flow is no module."""
    if not isinstance(flow, nn.Module):
        raise TypeError(f"flow: expected a flow or transform of {library}, a module; got {type(flow).__name__}")
    return replaced(flow, lambda module: replacements.get(type(module)))


def replaced(flow: Module, replacement: Callable[[nn.Module], type | None]) -> Module:
    """Copy a flow with all tensors shared, and change its modules to the types that replace theirs, if any."""
    flow = copy.deepcopy(flow, {id(tensor): tensor for module in flow.modules() for tensor in _tensors(vars(module))})
    for module in flow.modules():
        module.__class__ = replacement(module) or type(module)
    return flow


def replacements_of(*classes: type) -> dict[type, type]:
    """Our classes by what they replace, which is the last of their bases."""
    return {ours.__bases__[-1]: ours for ours in classes}


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


@torch.compiler.disable
def autoregressive_inverse(
    y: Tensor,
    network: MaskedNetwork | None,
    conditioner: Callable[[Tensor], Tensor],
    forward: Callable[[Tensor, Tensor], Tensor],
    inverse: Inverse,
    inputs: Iterable[Tensor],
) -> tuple[Tensor, Tensor]:
    """Find the x with ``y = forward(x, conditioner(x))``, and its parameters, with the gradients of the inverse.

    Args:
        y: ``(B, D)``.
        network: the conditioner, where its masks could be read; None where not, which costs up to D passes.
        conditioner: a function from x to the parameters ``(B, D, P)``.
        forward: ``(x, parameters) -> y``, element by element.
        inverse: the inverse of that, as :func:`~tarflow_kernels.incremental_inverse` takes it.
        inputs: the tensors that gradients may go to beside y.
    """
    with torch.no_grad():
        if network is not None:
            x, parameters = incremental_inverse(network, y, inverse)
        else:
            features = torch.arange(y.shape[1], device=y.device)
            x, _ = fixed_point_inverse(lambda x: inverse(y, conditioner(x), features), torch.zeros_like(y), y.shape[1])
            parameters = None
    if needs_gradients(y, *inputs):
        x = with_gradients(x, y, conditioner, forward)
        parameters = None
    return x, conditioner(x) if parameters is None else parameters


def affine_inverse_of(y: Tensor, mu: Tensor, alpha: Tensor, scale: Scale) -> Tensor:
    """Invert an affine map, ``(y - mu) / exp(a)``: by the kernel, or on a CPU, where overhead is all, directly."""
    if not y.is_cpu:
        return affine_forward(y, mu, alpha, scale=scale)[0]
    kind, first, second = scale
    match kind:
        case "softplus":
            factor = F.softplus(alpha + first if first else alpha, threshold=40) + second
        case "sigmoid":
            factor = torch.sigmoid(alpha + first) + second
        case _:
            factor = torch.exp(log_scale(alpha, scale))
    return (y - mu) / factor


_ELEMENTWISE = {
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Identity),
    *(torch.relu, torch.tanh, torch.sigmoid, F.relu, F.leaky_relu, F.elu, F.selu, F.gelu, F.silu, F.tanh),
}


def is_elementwise(function: Callable[[Tensor], Tensor], like: Tensor) -> bool:
    """Whether a function maps each element on its own, the same every time: known to, or tried on a few numbers."""
    if function in _ELEMENTWISE or type(function) in _ELEMENTWISE:
        return True
    x = torch.linspace(-2, 2, 6, dtype=like.dtype, device=like.device).view(2, 3)
    try:
        with torch.no_grad():
            whole = function(x.clone())
            others = function(x.t().clone()).t(), function(x.clone())
            one = function(x[:1, :1].clone())
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    return all(torch.allclose(other, whole) for other in others) and torch.allclose(one, whole[:1, :1])


def batch_norm(network: MaskedNetwork, node: int, norm: nn.BatchNorm1d) -> int:
    """Add batch normalization by running statistics, a scale and a shift of each unit."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return network.map(_scale_and_shift, node, extras=(scale, norm.bias - scale * norm.running_mean))


def _scale_and_shift(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, h, scale)


def is_plain(network: nn.Module) -> bool:
    """Whether a network computes what its layers say: no hooks, no statistics of the batch, no dropout."""
    modules = list(network.modules())
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    trained = [module for module in modules if module.training]
    return not hooked and not any(
        isinstance(module, nn.BatchNorm1d) or (isinstance(module, nn.Dropout) and module.p > 0) for module in trained
    )
