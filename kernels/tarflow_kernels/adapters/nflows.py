"""nflows' flows (https://github.com/bayesiains/nflows) on these kernels.

Of the flow that :func:`accelerate` returns, affine maps run through :func:`~tarflow_kernels.affine_inverse` and its
inverse, with their log-dets, and masked autoregressive transforms are inverted incrementally.
"""

from typing import TypeVar

import torch
from nflows.transforms import autoregressive as library
from nflows.transforms.coupling import AffineCouplingTransform as LibraryAffineCouplingTransform
from nflows.transforms.made import MADE, MaskedFeedforwardBlock
from torch import Tensor, nn

from ..masked import MaskedNetwork
from ..scales import Scale, sigmoid
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
    """An equivalent of an nflows flow, or transform, that shares its parameters and buffers.

    Replaced are the masked autoregressive transforms, affine and piecewise linear, quadratic, cubic and
    rational-quadratic, and ``AffineCouplingTransform``; subclasses of these stay as they are. The flow that was given
    stays as it is, but for what is done to the shared parameters; moving one of the two to another device spoils the
    other. A network with dropout or batch normalization in training mode is inverted as nflows does it, by D passes.

    Raises:
        TypeError: ``flow`` is no module.

    >>> transform = library.MaskedAffineAutoregressiveTransform(features=5, hidden_features=16)
    >>> fast, z = accelerate(transform), torch.randn(9, 5)
    >>> torch.allclose(fast.inverse(z)[0], transform.inverse(z)[0], atol=1e-5)
    True
    """
    check_module(flow, "nflows")
    return replaced(flow, lambda module: _REPLACEMENTS.get(type(module)))


class _Autoregressive(MaskedAutoregressive):
    """nflows' transforms, with an incremental inverse."""

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.incremental_inverse(inputs, context, read(self.autoregressive_net, inputs.shape[-1], context))


class MaskedAffineAutoregressiveTransform(_Autoregressive, library.MaskedAffineAutoregressiveTransform):
    """nflows', with its map by kernels and an incremental inverse."""

    def _elementwise_forward(self, inputs: Tensor, autoregressive_params: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self._unconstrained_scale_and_shift(autoregressive_params)
        return affine_inverse(inputs, shift, raw, scale=self._activation)

    def _elementwise_inverse(self, inputs: Tensor, autoregressive_params: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self._unconstrained_scale_and_shift(autoregressive_params)
        return affine_forward(inputs, shift, raw, scale=self._activation)

    def elementwise_inverse(self, y: Tensor, parameters: Tensor, features: Tensor) -> Tensor:
        raw, shift = parameters.unbind(-1)
        return affine_inverse_of(y, shift, raw, self._activation)

    @property
    def _activation(self) -> Scale:
        return Scale("softplus", 0.0, self._epsilon)


class MaskedPiecewiseLinearAutoregressiveTransform(
    _Autoregressive, library.MaskedPiecewiseLinearAutoregressiveTransform
):
    """nflows', with an incremental inverse."""


class MaskedPiecewiseQuadraticAutoregressiveTransform(
    _Autoregressive, library.MaskedPiecewiseQuadraticAutoregressiveTransform
):
    """nflows', with an incremental inverse."""


class MaskedPiecewiseCubicAutoregressiveTransform(_Autoregressive, library.MaskedPiecewiseCubicAutoregressiveTransform):
    """nflows', with an incremental inverse."""


class MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
    _Autoregressive, library.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
):
    """nflows', with an incremental inverse."""


class AffineCouplingTransform(LibraryAffineCouplingTransform):
    """nflows', with its map by kernels."""

    def _coupling_transform_forward(self, inputs: Tensor, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = transform_params.tensor_split((self.num_transform_features,), dim=1)
        return affine_inverse(inputs, shift, raw, scale=_COUPLING)

    def _coupling_transform_inverse(self, inputs: Tensor, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = transform_params.tensor_split((self.num_transform_features,), dim=1)
        return affine_forward(inputs, shift, raw, scale=_COUPLING)


_COUPLING = sigmoid(2.0, 1e-3)
# By what they replace, which is the last of their bases.
_REPLACEMENTS = {
    ours.__bases__[-1]: ours
    for ours in (
        MaskedAffineAutoregressiveTransform,
        MaskedPiecewiseLinearAutoregressiveTransform,
        MaskedPiecewiseQuadraticAutoregressiveTransform,
        MaskedPiecewiseCubicAutoregressiveTransform,
        MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
        AffineCouplingTransform,
    )
}


@torch.no_grad()
def read(made: nn.Module, features: int, context: Tensor | None = None) -> MaskedNetwork | None:
    """A ``MADE``; None if it is something else, or not plain."""
    if type(made) is not MADE or not is_plain(made) or not is_elementwise(made.activation, made.initial_layer.weight):
        return None
    network = MaskedNetwork(features)
    h = network.linear((0, made.initial_layer))
    if context is not None:
        h = network.map(torch.add, h, extras=[made.activation(made.context_layer(context))])
    if not made.use_residual_blocks:
        h = network.map(made.activation, h)
    for block in made.blocks:
        if isinstance(block, MaskedFeedforwardBlock):
            h = feedforward(network, h, block)
        else:
            h = _residual(network, h, block, context)
    network.linear((h, made.final_layer))
    return network


def _residual(network: MaskedNetwork, h: int, block: nn.Module, context: Tensor | None) -> int:
    inputs = h
    for k, layer in enumerate(block.linear_layers):
        if block.use_batch_norm:
            h = batch_norm(network, h, block.batch_norm_layers[k])
        h = network.linear((network.map(block.activation, h), layer))
        if k == 0 and context is not None:
            h = network.map(torch.add, h, extras=[block.context_layer(context)])
    return network.map(torch.add, inputs, h)
