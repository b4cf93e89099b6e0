"""The masked autoregressive transforms of nflows and normflows, which go back to the same code."""

import copy
from typing import Any

import torch
from torch import Tensor

from ..masked import MaskedNetwork
from ..scales import Scale
from .common import (
    affine_forward,
    affine_inverse,
    affine_inverse_of,
    autoregressive_inverse,
    batch_norm,
)


class MaskedAutoregressive:
    """A base for transforms of either library, whose ``inverse`` becomes incremental.

    The attributes of a transform are those of its library, which has no types: hence ``self: Any``.
    """

    def read(self: Any, features: int, context: Tensor | None) -> MaskedNetwork | None:
        """Read the masks of ``autoregressive_net``; None where that cannot be."""
        raise NotImplementedError

    def inverse(self: Any, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Invert the map of vectors ``(B, D)``: x, and the log-det of the inverse."""
        x, parameters = autoregressive_inverse(
            inputs,
            self.read(inputs.shape[-1], context),
            lambda x: self.autoregressive_net(x, context).unflatten(-1, (inputs.shape[1], -1)),
            lambda x, parameters: self._elementwise_forward(x, parameters.flatten(1))[0],
            self.elementwise_inverse,
            [*self.parameters(), *([] if context is None else [context])],
        )
        return x, self._elementwise_inverse(inputs, parameters.flatten(1))[1]

    def elementwise_inverse(self: Any, y: Tensor, parameters: Tensor, features: Tensor) -> Tensor:
        """Invert the map of some features, ``(B, d)`` with parameters ``(B, d, P)``."""
        # Splines may write to their parameters.
        parameters = parameters.flatten(1).clone(memory_format=torch.contiguous_format)
        return self.restricted_to(features)._elementwise_inverse(y, parameters)[0]

    def restricted_to(self: Any, features: Tensor) -> Any:
        """The same transform for some features only."""
        twin = copy.copy(self)
        twin.features = len(features)
        return twin


class MaskedAffine(MaskedAutoregressive):
    """A base for affine transforms of either library, whose maps run by kernels too."""

    @property
    def activation(self) -> Scale:
        """The activation that makes the log-scale."""
        raise NotImplementedError

    def _elementwise_forward(self: Any, inputs: Tensor, autoregressive_params: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self._unconstrained_scale_and_shift(autoregressive_params)
        return affine_inverse(inputs, shift, raw, scale=self.activation)

    def _elementwise_inverse(self: Any, inputs: Tensor, autoregressive_params: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self._unconstrained_scale_and_shift(autoregressive_params)
        return affine_forward(inputs, shift, raw, scale=self.activation)

    def elementwise_inverse(self: Any, y: Tensor, parameters: Tensor, features: Tensor) -> Tensor:
        """Invert the map of some features, whose parameters are a raw scale and a shift."""
        raw, shift = parameters.unbind(-1)
        return affine_inverse_of(y, shift, raw, self.activation)


def feedforward(network: MaskedNetwork, node: int, block: Any) -> int:
    """Add a ``MaskedFeedforwardBlock``, and return the number of its last node."""
    if block.batch_norm:
        node = batch_norm(network, node, block.batch_norm)
    return network.map(block.activation, network.linear((node, block.linear)))


def residual_layers(network: MaskedNetwork, node: int, block: Any, added: Tensor | None = None) -> int:
    """Add the layers of a ``MaskedResidualBlock``, with something added behind the first, and return the last node."""
    for k, layer in enumerate(block.linear_layers):
        if block.use_batch_norm:
            node = batch_norm(network, node, block.batch_norm_layers[k])
        node = network.linear((network.map(block.activation, node), layer))
        if k == 0 and added is not None:
            node = network.map(torch.add, node, extras=[added])
    return node
