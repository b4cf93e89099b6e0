"""normflows' flows (https://github.com/VincentStimper/normalizing-flows) on these kernels.

In the flow that :func:`accelerate` returns, affine maps run through :func:`~tarflow_kernels.affine_inverse` and its
inverse, with their log-dets, and masked autoregressive flows are inverted incrementally.
"""

from collections.abc import Callable
from typing import Any, TypeVar

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
from . import common
from .common import affine_forward, affine_inverse, is_elementwise, is_plain
from .made import MaskedAffine, MaskedAutoregressive, feedforward, residual_layers

__all__ = ["accelerate"]

Module = TypeVar("Module", bound=nn.Module)


def accelerate(flow: Module) -> Module:
    """Make an equivalent of a normflows model, or flow, that shares its parameters and buffers.

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
    return common.accelerate(flow, "normflows", _REPLACEMENTS)


class _Autoregressive(MaskedAutoregressive):
    """A base for normflows' transforms, whose networks are read here."""

    def read(self: Any, features: int, context: Tensor | None) -> MaskedNetwork | None:
        return read(self.autoregressive_net, features, context)


class MaskedAffineAutoregressive(_Autoregressive, MaskedAffine, LibraryMaskedAffineAutoregressive):
    """normflows' affine transform, with its map by kernels and an incremental inverse."""

    activation = sigmoid(2.0, 1e-3)


class MaskedPiecewiseRationalQuadraticAutoregressive(
    _Autoregressive, LibraryMaskedPiecewiseRationalQuadraticAutoregressive
):
    """normflows' rational-quadratic splines, with an incremental inverse."""

    def restricted_to(self, features: Tensor) -> "MaskedPiecewiseRationalQuadraticAutoregressive":
        twin = super().restricted_to(features)
        if isinstance(self.tails, list | tuple):
            twin.tails = [self.tails[i] for i in features.tolist()]
        if isinstance(self.tail_bound, Tensor):
            twin._buffers = self._buffers | {"tail_bound": self.tail_bound[features]}
        return twin


class AffineCoupling(LibraryAffineCoupling):
    """normflows' affine coupling, with its map by kernels."""

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
    """normflows' masked affine flow, with its map by kernels."""

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


_REPLACEMENTS = common.replacements_of(
    MaskedAffineAutoregressive, MaskedPiecewiseRationalQuadraticAutoregressive, AffineCoupling, MaskedAffineFlow
)


@torch.no_grad()
def read(made: Any, features: int, context: Tensor | None = None) -> MaskedNetwork | None:
    """Read a ``MADE`` as a masked network; None if it is something else, or not plain."""
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
            inside = residual_layers(network, h, block)
            if context is None:
                h = network.map(torch.add, h, inside)
            else:
                h = network.map(_add_gated, h, inside, extras=[block.context_layer(context)])
    network.linear((h, made.final_layer))
    return network


def _is_elementwise(made: MADE) -> bool:
    """Whether all activations of a network are known to map each element on its own, and its preprocessing is read."""
    activations = [block.activation for block in made.blocks]
    if isinstance(made.preprocessing, PeriodicFeaturesElementwise):
        activations.append(made.preprocessing.activation)
    elif not isinstance(made.preprocessing, nn.Identity):
        return False
    return all(is_elementwise(activation, made.initial_layer.weight) for activation in activations)


def _read_periodic(network: MaskedNetwork, periodic: PeriodicFeaturesElementwise) -> int:
    """Add ``activation(w1 sin(scale x) + w2 cos(scale x) + bias)`` of the periodic features, and x of the others."""

    def for_all(values: Tensor | float) -> Tensor:
        """A number for each feature, which is zero for those that are not periodic."""
        everywhere = periodic.weights.new_zeros(periodic.ndim)
        everywhere[periodic.ind] = torch.as_tensor(values, dtype=everywhere.dtype, device=everywhere.device)
        return everywhere

    def function(x: Tensor, chosen: Tensor, scale: Tensor, sine: Tensor, cosine: Tensor, bias: Tensor) -> Tensor:
        x_scaled = scale * x
        features = periodic.activation(sine * torch.sin(x_scaled) + cosine * torch.cos(x_scaled) + bias)
        return torch.where(chosen != 0, features, x)

    sine, cosine = (weights.detach() for weights in periodic.weights.unbind(1))
    bias = periodic.bias.detach() if periodic.apply_bias else 0.0
    return network.map(function, 0, extras=[for_all(each) for each in (1.0, periodic.scale, sine, cosine, bias)])


def _add_gated(inputs: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    return inputs + h * torch.sigmoid(gate)
