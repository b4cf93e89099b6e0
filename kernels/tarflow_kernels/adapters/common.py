"""What the adapters share."""

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
    """An op whose results have the dtype of x, for the next layer, and not full precision."""

    @functools.wraps(op)
    def run(x: Tensor, *parameters: Tensor, **options) -> tuple[Tensor, Tensor]:
        value, logdet = op(x, *parameters, **options)
        return value.to(x.dtype), logdet.to(x.dtype)

    return run


affine_forward = _in_dtype_of_x(affine.affine_forward)
affine_inverse = _in_dtype_of_x(affine.affine_inverse)
mixture_logistic = _in_dtype_of_x(mixture.mixture_logistic)
mixture_logistic_inverse = _in_dtype_of_x(mixture.mixture_logistic_inverse)


def check_module(flow: object, library: str) -> None:
    """A flow must be a module."""
    if not isinstance(flow, nn.Module):
        raise TypeError(f"flow: expected a flow or transform of {library}, a module; got {type(flow).__name__}")


def replaced(flow: Module, replacement: Callable[[nn.Module], type | None]) -> Module:
    """A copy of a flow that shares all tensors, whose modules have changed to the types that replace theirs."""
    flow = copy.deepcopy(flow, {id(tensor): tensor for module in flow.modules() for tensor in _tensors(vars(module))})
    for module in flow.modules():
        module.__class__ = replacement(module) or type(module)
    return flow


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
    """The x with ``y = forward(x, conditioner(x))``, and its parameters, with the gradients of the inverse.

    Args:
        y: ``(B, D)``.
        network: the conditioner as masks that could be read; None where they could not, which costs up to D passes.
        conditioner: from x to the parameters ``(B, D, P)``.
        forward: ``(x, parameters) -> y``, element by element.
        inverse: its inverse, as :func:`~tarflow_kernels.incremental_inverse` takes it.
        inputs: what gradients may go to beside y.
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


class MaskedAutoregressive:
    """What the autoregressive transforms of nflows and of normflows, which go back to the same code, have in common."""

    def incremental_inverse(
        self, inputs: Tensor, context: Tensor | None, network: MaskedNetwork | None
    ) -> tuple[Tensor, Tensor]:
        """What ``inverse`` returns: x ``(B, D)`` and the log-det of the inverse."""
        x, parameters = autoregressive_inverse(
            inputs,
            network,
            lambda x: self.autoregressive_net(x, context).unflatten(-1, (inputs.shape[1], -1)),
            lambda x, parameters: self._elementwise_forward(x, parameters.flatten(1))[0],
            self.elementwise_inverse,
            [*self.parameters(), *([] if context is None else [context])],
        )
        return x, self._elementwise_inverse(inputs, parameters.flatten(1))[1]

    def elementwise_inverse(self, y: Tensor, parameters: Tensor, features: Tensor) -> Tensor:
        """The inverse of the map of some features, ``(B, d)`` with parameters ``(B, d, P)``."""
        # Splines may write to their parameters.
        parameters = parameters.flatten(1).clone(memory_format=torch.contiguous_format)
        return self.only(features)._elementwise_inverse(y, parameters)[0]

    def only(self, features: Tensor) -> "MaskedAutoregressive":
        """The same transform, of some features."""
        twin = copy.copy(self)
        twin.features = len(features)
        return twin


def affine_inverse_of(y: Tensor, mu: Tensor, alpha: Tensor, scale: Scale) -> Tensor:
    """``(y - mu) / exp(a)``: on a GPU the kernel, on a CPU, where a step is all overhead, the bare formula."""
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
    """Whether a function gives an element the same wherever it stands, and time after time: known to, or tried."""
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
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return network.map(_scale_and_shift, node, extras=(scale, norm.bias - scale * norm.running_mean))


def feedforward(network: MaskedNetwork, node: int, block: nn.Module) -> int:
    """Add a ``MaskedFeedforwardBlock`` of nflows or normflows."""
    if block.batch_norm:
        node = batch_norm(network, node, block.batch_norm)
    return network.map(block.activation, network.linear((node, block.linear)))


def _scale_and_shift(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, h, scale)


def is_plain(network: nn.Module) -> bool:
    """Whether a network does what its layers say: no hooks, and nothing of its batch or of chance."""
    modules = list(network.modules())
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    trained = [module for module in modules if module.training]
    return not hooked and not any(
        isinstance(module, nn.BatchNorm1d) or (isinstance(module, nn.Dropout) and module.p > 0) for module in trained
    )
