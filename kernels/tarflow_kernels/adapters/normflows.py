"""normflows' flows (https://github.com/VincentStimper/normalizing-flows) on these kernels.

Of the flow that :func:`accelerate` returns, affine maps run through :func:`~tarflow_kernels.affine_inverse` and its
inverse, with their log-dets, and masked autoregressive flows are inverted incrementally.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from normflows.flows.affine.autoregressive import MaskedAffineAutoregressive as LibraryMaskedAffineAutoregressive
from normflows.flows.affine.coupling import AffineCoupling as LibraryAffineCoupling
from normflows.flows.affine.coupling import MaskedAffineFlow as LibraryMaskedAffineFlow
from normflows.flows.neural_spline.autoregressive import (
    MaskedPiecewiseRationalQuadraticAutoregressive as LibraryMaskedPiecewiseRationalQuadraticAutoregressive,
)
from normflows.nets.made import MADE, MaskedFeedforwardBlock
from normflows.utils.nn import PeriodicFeaturesElementwise
from torch import Tensor, nn

from ..masked import MaskedNetwork
from ..scales import EXP, sigmoid
from .common import (
    MaskedAutoregressive,
    affine_forward,
    affine_inverse,
    affine_inverse_of,
    batch_norm,
    check_module,
    feedforward,
    is_elementwise,
    is_plain,
    replaced,
)

Module = TypeVar("Module", bound=nn.Module)


def accelerate(flow: Module) -> Module:
    """An equivalent of a normflows model, or flow, that shares its parameters and buffers.

    Replaced are ``MaskedAffineAutoregressive``, ``MaskedPiecewiseRationalQuadraticAutoregressive`` (also inside of
    ``AutoregressiveRationalQuadraticSpline`` and its circular sister), ``AffineCoupling`` (also inside of
    ``AffineCouplingBlock`` and ``GlowBlock``) and ``MaskedAffineFlow``; subclasses of these stay as they are. The flow
    that was given stays as it is, but for what is done to the shared parameters; moving one of the two to another
    device spoils the other. A network with dropout or batch normalization in training mode is inverted as normflows
    does it, by D passes.

    Raises:
        TypeError: ``flow`` is no module.

    >>> flow = LibraryMaskedAffineAutoregressive(5, 16)
    >>> fast, z = accelerate(flow), torch.randn(9, 5)
    >>> torch.allclose(fast.inverse(z)[0], flow.inverse(z)[0], atol=1e-5)
    True
    """
    check_module(flow, "normflows")
    return replaced(flow, lambda module: _REPLACEMENTS.get(type(module)))


class _Autoregressive(MaskedAutoregressive):
    """normflows' transforms, with an incremental inverse."""

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.incremental_inverse(inputs, context, read(self.autoregressive_net, inputs.shape[-1], context))


class MaskedAffineAutoregressive(_Autoregressive, LibraryMaskedAffineAutoregressive):
    """normflows', with its map by kernels and an incremental inverse."""

    def _elementwise_forward(self, inputs: Tensor, autoregressive_params: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self._unconstrained_scale_and_shift(autoregressive_params)
        return affine_inverse(inputs, shift, raw, scale=_AUTOREGRESSIVE)

    def _elementwise_inverse(self, inputs: Tensor, autoregressive_params: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self._unconstrained_scale_and_shift(autoregressive_params)
        return affine_forward(inputs, shift, raw, scale=_AUTOREGRESSIVE)

    def elementwise_inverse(self, y: Tensor, parameters: Tensor, features: Tensor) -> Tensor:
        raw, shift = parameters.unbind(-1)
        return affine_inverse_of(y, shift, raw, _AUTOREGRESSIVE)


class MaskedPiecewiseRationalQuadraticAutoregressive(
    _Autoregressive, LibraryMaskedPiecewiseRationalQuadraticAutoregressive
):
    """normflows', with an incremental inverse."""

    def only(self, features: Tensor) -> "MaskedPiecewiseRationalQuadraticAutoregressive":
        twin = super().only(features)
        if isinstance(self.tails, list | tuple):
            twin.tails = [self.tails[i] for i in features.tolist()]
        if isinstance(self.tail_bound, Tensor):
            twin._buffers = self._buffers | {"tail_bound": self.tail_bound[features]}
        return twin


class AffineCoupling(LibraryAffineCoupling):
    """normflows', with its map by kernels."""

    def forward(self, z: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        return self._map(affine_inverse, z) if self.scale else super().forward(z)

    def inverse(self, z: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        return self._map(affine_forward, z) if self.scale else super().inverse(z)

    def _map(self, op: Callable, z: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        z1, z2 = z
        parameters = self.param_map(z1)
        shift, raw, scale = parameters[:, 0::2], parameters[:, 1::2], EXP
        match self.scale_map:
            case "sigmoid":  # divides
                raw = -F.logsigmoid(raw + 2)
            case "sigmoid_inv":
                scale = sigmoid(2.0, 0.0)
            case other if other != "exp":
                raise NotImplementedError("This scale map is not implemented.")
        z2, logdet = op(z2, shift, raw, scale=scale)
        return [z1, z2], logdet


class MaskedAffineFlow(LibraryMaskedAffineFlow):
    """normflows', with its map by kernels."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(affine_inverse, z)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(affine_forward, z)

    def _map(self, op: Callable, z: Tensor) -> tuple[Tensor, Tensor]:
        seen, changed = self.b * z, 1 - self.b
        shift, alpha = (
            changed * torch.where(torch.isfinite(raw), raw, torch.nan) for raw in (self.t(seen), self.s(seen))
        )
        return op(z, shift, alpha)


_AUTOREGRESSIVE = sigmoid(2.0, 1e-3)
# By what they replace, which is the last of their bases.
_REPLACEMENTS = {
    ours.__bases__[-1]: ours
    for ours in (
        MaskedAffineAutoregressive,
        MaskedPiecewiseRationalQuadraticAutoregressive,
        AffineCoupling,
        MaskedAffineFlow,
    )
}


@torch.no_grad()
def read(made: nn.Module, features: int, context: Tensor | None = None) -> MaskedNetwork | None:
    """A ``MADE``; None if it is something else, or not plain."""
    if type(made) is not MADE or not is_plain(made) or not _is_elementwise(made):
        return None
    network = MaskedNetwork(features)
    h = 0
    if isinstance(made.preprocessing, PeriodicFeaturesElementwise):
        h = _read_periodic(network, made.preprocessing)
    h = network.linear((h, made.initial_layer))
    if context is not None:
        h = network.map(torch.add, h, extras=[made.context_layer(context)])
    for block in made.blocks:
        if isinstance(block, MaskedFeedforwardBlock):
            h = feedforward(network, h, block)
        else:
            h = _residual(network, h, block, context)
    network.linear((h, made.final_layer))
    return network


def _is_elementwise(made: MADE) -> bool:
    activations = [block.activation for block in made.blocks]
    if isinstance(made.preprocessing, PeriodicFeaturesElementwise):
        activations.append(made.preprocessing.activation)
    elif not isinstance(made.preprocessing, nn.Identity):
        return False
    return all(is_elementwise(activation, made.initial_layer.weight) for activation in activations)


def _read_periodic(network: MaskedNetwork, periodic: PeriodicFeaturesElementwise) -> int:
    """Of some features ``activation(w1 sin(scale x) + w2 cos(scale x) + bias)``, of the others x."""

    def of_all(values: Tensor | float, others: float) -> Tensor:
        everywhere = periodic.weights.new_full((periodic.ndim,), others)
        everywhere[periodic.ind] = torch.as_tensor(values, dtype=everywhere.dtype, device=everywhere.device)
        return everywhere

    def function(x: Tensor, chosen: Tensor, scale: Tensor, sine: Tensor, cosine: Tensor, bias: Tensor) -> Tensor:
        x_scaled = scale * x
        features = periodic.activation(sine * torch.sin(x_scaled) + cosine * torch.cos(x_scaled) + bias)
        return torch.where(chosen != 0, features, x)

    sine, cosine = (weights.detach() for weights in periodic.weights.unbind(1))
    bias = periodic.bias.detach() if periodic.apply_bias else 0.0
    values = (1.0, 0.0), (periodic.scale, 0.0), (sine, 0.0), (cosine, 0.0), (bias, 0.0)
    return network.map(function, 0, extras=[of_all(*pair) for pair in values])


def _residual(network: MaskedNetwork, h: int, block: nn.Module, context: Tensor | None) -> int:
    inputs = h
    for k, layer in enumerate(block.linear_layers):
        if block.use_batch_norm:
            h = batch_norm(network, h, block.batch_norm_layers[k])
        h = network.linear((network.map(block.activation, h), layer))
    if context is None:
        return network.map(torch.add, inputs, h)
    return network.map(_add_gated, inputs, h, extras=[block.context_layer(context)])


def _add_gated(inputs: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    return inputs + h * torch.sigmoid(gate)
