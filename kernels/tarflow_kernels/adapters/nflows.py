"""nflows' flows (https://github.com/bayesiains/nflows) on these kernels.

In the flow that :func:`accelerate` returns, affine maps run through :func:`~tarflow_kernels.affine_inverse` and its
inverse, with their log-dets, and masked autoregressive transforms are inverted incrementally.
"""

from typing import Any, TypeVar

import torch
from nflows.transforms import autoregressive as library
from nflows.transforms.coupling import AffineCouplingTransform as LibraryAffineCouplingTransform
from nflows.transforms.made import MADE, MaskedFeedforwardBlock
from torch import Tensor, nn

from ..masked import MaskedNetwork
from ..scales import Scale, sigmoid
from . import common
from .common import affine_forward, affine_inverse, is_elementwise, is_plain
from .made import MaskedAffine, MaskedAutoregressive, feedforward, residual_layers

__all__ = ["accelerate"]

Module = TypeVar("Module", bound=nn.Module)


def accelerate(flow: Module) -> Module:
    """Make an equivalent of an nflows flow, or transform, that shares its parameters and buffers.

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
    return common.accelerate(flow, "nflows", _REPLACEMENTS)


class _Autoregressive(MaskedAutoregressive):
    """A base for nflows' transforms, whose networks are read here."""

    def read(self: Any, features: int, context: Tensor | None) -> MaskedNetwork | None:
        return read(self.autoregressive_net, features, context)


class MaskedAffineAutoregressiveTransform(_Autoregressive, MaskedAffine, library.MaskedAffineAutoregressiveTransform):
    """nflows' affine transform, with its map by kernels and an incremental inverse."""

    @property
    def activation(self) -> Scale:
        return Scale("softplus", 0.0, self._epsilon)


class MaskedPiecewiseLinearAutoregressiveTransform(
    _Autoregressive, library.MaskedPiecewiseLinearAutoregressiveTransform
):
    """nflows' linear splines, with an incremental inverse."""


class MaskedPiecewiseQuadraticAutoregressiveTransform(
    _Autoregressive, library.MaskedPiecewiseQuadraticAutoregressiveTransform
):
    """nflows' quadratic splines, with an incremental inverse."""


class MaskedPiecewiseCubicAutoregressiveTransform(_Autoregressive, library.MaskedPiecewiseCubicAutoregressiveTransform):
    """nflows' cubic splines, with an incremental inverse."""


class MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
    _Autoregressive, library.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
):
    """nflows' rational-quadratic splines, with an incremental inverse."""


class AffineCouplingTransform(LibraryAffineCouplingTransform):
    """nflows' affine coupling, with its map by kernels."""

    def _coupling_transform_forward(self, inputs: Tensor, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = transform_params.tensor_split((self.num_transform_features,), dim=1)
        return affine_inverse(inputs, shift, raw, scale=_COUPLING)

    def _coupling_transform_inverse(self, inputs: Tensor, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = transform_params.tensor_split((self.num_transform_features,), dim=1)
        return affine_forward(inputs, shift, raw, scale=_COUPLING)


_COUPLING = sigmoid(2.0, 1e-3)
_REPLACEMENTS = common.replacements_of(
    MaskedAffineAutoregressiveTransform,
    MaskedPiecewiseLinearAutoregressiveTransform,
    MaskedPiecewiseQuadraticAutoregressiveTransform,
    MaskedPiecewiseCubicAutoregressiveTransform,
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
    AffineCouplingTransform,
)


@torch.no_grad()
def read(made: Any, features: int, context: Tensor | None = None) -> MaskedNetwork | None:
    """Read a ``MADE`` as a masked network; None if it is something else, or not plain."""
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
            added = None if context is None else block.context_layer(context)
            h = network.map(torch.add, h, residual_layers(network, h, block, added))
    network.linear((h, made.final_layer))
    return network
