"""Pyro's flows (https://github.com/pyro-ppl/pyro) on these kernels.

In the flow that :func:`accelerate` returns, affine maps run through :func:`~tarflow_kernels.affine_inverse` and its
inverse, with their log-dets; neural autoregressive ones, which are mixtures of logistics by another name, through
:func:`~tarflow_kernels.mixture_logistic`, which gives them the inverse that they lack in Pyro; and autoregressive
transforms are inverted incrementally.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import transforms as library
from pyro.distributions.conditional import (
    ConditionalTransform,
    ConditionalTransformedDistribution,
    ConstantConditionalTransform,
)
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import ComposeTransform, SigmoidTransform, Transform
from torch.distributions.transforms import _InverseTransform

from ..masked import MaskedNetwork
from ..mixture import MAX_COMPONENTS
from ..scales import Scale, clamp, sigmoid
from .common import (
    affine_forward,
    affine_inverse,
    affine_inverse_of,
    autoregressive_inverse,
    is_elementwise,
    is_plain,
    mixture_logistic,
    mixture_logistic_inverse,
    replaced,
    replacements_of,
)

__all__ = ["accelerate"]

Flow = TypeVar("Flow")
# Smaller slopes count as this one, so that 1 / slope and its products stay finite.
_LEAST_SLOPE = 1e-18


def accelerate(flow: Flow) -> Flow:
    """Make an equivalent of a flow of Pyro that shares its parameters and buffers.

    Args:
        flow: a ``TransformModule``, a ``ConditionalTransformModule``, compositions and inverses of them, or a
            ``TransformedDistribution`` or ``ConditionalTransformedDistribution`` of them.

    Replaced are ``AffineAutoregressive``, ``SplineAutoregressive``, ``NeuralAutoregressive`` with sigmoids (of up to 64
    hidden units), ``AffineCoupling`` and the conditional versions of all of them; subclasses of these stay as they are.
    The flow that was given stays as it is, but for what is done to the shared parameters; moving one of the two to
    another device spoils the other.

    Raises:
        TypeError: ``flow`` is none of these.

    >>> transform = library.affine_autoregressive(5)
    >>> fast, y = accelerate(transform), torch.randn(9, 5)
    >>> torch.allclose(fast.inv(y), transform.inv(y), atol=1e-5)
    True
    """
    accelerated: Any = _accelerated(flow)
    return accelerated


def _accelerated(flow: Any) -> Any:
    match flow:
        case dist.TransformedDistribution():
            return dist.TransformedDistribution(flow.base_dist, [accelerate(part) for part in flow.transforms])
        case ConditionalTransformedDistribution():
            return ConditionalTransformedDistribution(flow.base_dist, [accelerate(part) for part in flow.transforms])
        case ConstantConditionalTransform():
            return ConstantConditionalTransform(accelerate(flow.transform))
        case nn.Module():
            flow = replaced(flow, _replacement)
            for module in flow.modules():
                if isinstance(module, _Cached):
                    _reset(module)
            return flow
        case _InverseTransform():
            return accelerate(flow.inv).inv
        case ComposeTransform():
            return ComposeTransform([accelerate(part) for part in flow.parts])
        case Transform():
            return flow
    raise TypeError(f"flow: expected a transform of Pyro or a distribution of them; got {type(flow).__name__}")


def _reset(transform: Any) -> Any:
    """Drop what Pyro keeps on an instance of the former class: the values computed last, and methods where stable."""
    transform._cached_x_y, transform._cached_logdet = (None, None), None
    for method in ("_call", "_inverse"):
        vars(transform).pop(method, None)
    return transform


class _Cached:
    """A base for transforms that keep the log-det, summed, of the last pair of values."""

    def log_abs_det_jacobian(self: Any, x: Tensor, y: Tensor) -> Tensor:
        last_x, last_y = self._cached_x_y
        if x is not last_x or y is not last_y:
            self._cached_x_y = None, None
            self(x)
        return self._cached_logdet


class _Autoregressive(_Cached):
    """A base for autoregressive transforms, whose inverse is incremental."""

    def _solve(self: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Find x, and its parameters ``(..., D, P)``."""
        arn, context = _parts(self.arn)
        rows = y.reshape(-1, y.shape[-1])
        if context is not None:
            context = context.expand(*y.shape[:-1], -1).reshape(len(rows), -1)

        def conditioner(x: Tensor) -> Tensor:
            made = arn(x) if context is None else arn(x, context=context)
            return _joined(made, arn)

        x, parameters = autoregressive_inverse(
            rows,
            read(arn, context),
            conditioner,
            self._forward,
            self._elementwise_inverse,
            [*arn.parameters(), *([] if context is None else [context])],
        )
        return x.view(y.shape), parameters.reshape(*y.shape, parameters.shape[-1])


class AffineAutoregressive(_Autoregressive, library.AffineAutoregressive):
    """Pyro's affine transform, with its map by kernels and an incremental inverse."""

    def _call(self, x: Tensor) -> Tensor:
        y, self._cached_logdet = _of_vectors(
            affine_inverse, x, *self._shift_and_raw(*self.arn(x)), scale=self._activation
        )
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, parameters = self._solve(y)
        shift, raw = self._shift_and_raw(*parameters.unbind(-1))
        self._cached_logdet = -_of_vectors(affine_forward, y, shift, raw, scale=self._activation)[1]
        return x

    def _forward(self, x: Tensor, parameters: Tensor) -> Tensor:
        return affine_inverse(x, *self._shift_and_raw(*parameters.unbind(-1)), scale=self._activation)[0]

    def _elementwise_inverse(self, y: Tensor, parameters: Tensor, features: Tensor) -> Tensor:
        return affine_inverse_of(y, *self._shift_and_raw(*parameters.unbind(-1)), self._activation)

    def _shift_and_raw(self, mean: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.sigmoid(-raw - self.sigmoid_bias) * mean if self.stable else mean), raw

    @property
    def _activation(self) -> Scale:
        return sigmoid(self.sigmoid_bias, 0.0) if self.stable else _clamp(self)


class SplineAutoregressive(_Autoregressive, library.SplineAutoregressive):
    """Pyro's splines, with an incremental inverse."""

    def _call(self, x: Tensor) -> Tensor:
        y = super()._call(x)
        self._cached_logdet = self._cache_log_detJ.sum(-1)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, parameters = self._solve(y)
        spline = self._spline(parameters)
        spline._inverse(y)
        self._cached_logdet = spline._cache_log_detJ.sum(-1)
        return x

    def _forward(self, x: Tensor, parameters: Tensor) -> Tensor:
        return self._spline(parameters)._call(x)

    def _elementwise_inverse(self, y: Tensor, parameters: Tensor, features: Tensor) -> Tensor:
        return self._spline(parameters)._inverse(y)

    def _spline(self, parameters: Tensor) -> Any:
        """The splines of as many features as there are parameters for."""
        arn, _ = _parts(self.arn)
        made = parameters.transpose(-1, -2).split(arn.param_dims, dim=-2)
        spline = self.spline
        return type(spline)(
            lambda _: made, parameters.shape[-2], spline.count_bins, spline.bound, spline.order
        ).condition(None)


class NeuralAutoregressive(_Autoregressive, library.NeuralAutoregressive):
    """Pyro's neural transform with sigmoids, as a mixture of logistics, with an incremental inverse."""

    def _call(self, x: Tensor) -> Tensor:
        parameters = (made.transpose(-1, -2) for made in self.arn(x))
        y, self._cached_logdet = _of_vectors(mixture_logistic, x, *_mixture(*parameters), min_log_scale=-torch.inf)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, parameters = self._solve(y)
        _, self._cached_logdet = _of_vectors(
            mixture_logistic, x, *_mixture(*parameters.chunk(3, dim=-1)), min_log_scale=-torch.inf
        )
        return x

    def _forward(self, x: Tensor, parameters: Tensor) -> Tensor:
        return mixture_logistic(x, *_mixture(*parameters.chunk(3, dim=-1)), min_log_scale=-torch.inf)[0]

    def _elementwise_inverse(self, y: Tensor, parameters: Tensor, features: Tensor) -> Tensor:
        return mixture_logistic_inverse(y, *_mixture(*parameters.chunk(3, dim=-1)), min_log_scale=-torch.inf)[0]


class AffineCoupling(_Cached, library.AffineCoupling):
    """Pyro's affine coupling, with its map by kernels."""

    def _call(self, x: Tensor) -> Tensor:
        y, self._cached_logdet = self._map(affine_inverse, x)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, logdet = self._map(affine_forward, y)
        self._cached_logdet = -logdet
        return x

    def _map(self, op: Callable, x: Tensor) -> tuple[Tensor, Tensor]:
        seen, changed = x.split([self.split_dim, x.shape[self.dim] - self.split_dim], dim=self.dim)
        made = self.nn(seen.reshape(*seen.shape[: self.dim], -1))
        shift, raw = (part.reshape(*part.shape[:-1], *changed.shape[self.dim :]) for part in made)
        # A sample is whatever comes after the batch dimensions.
        parts = (part.flatten(self.dim) for part in (changed, shift, raw))
        flat, logdet = _of_vectors(op, *parts, scale=_clamp(self))
        return torch.cat([seen, flat.view(changed.shape)], dim=self.dim), logdet


class _Conditional(ConditionalTransform):
    """A base for conditional transforms: the transform of a context is one of this module.

    It has the base of Pyro's, since Python changes the class of an object only where their layouts are alike.
    """

    def condition(self, context: Tensor) -> Transform:
        return _conditioned(cast(Any, super()).condition(context))


class ConditionalAffineAutoregressive(_Conditional, library.ConditionalAffineAutoregressive):
    """Pyro's transform, conditioned to :class:`AffineAutoregressive`."""


class ConditionalSplineAutoregressive(_Conditional, library.ConditionalSplineAutoregressive):
    """Pyro's transform, conditioned to :class:`SplineAutoregressive`."""


class ConditionalNeuralAutoregressive(_Conditional, library.ConditionalNeuralAutoregressive):
    """Pyro's transform, conditioned to :class:`NeuralAutoregressive`."""


class ConditionalAffineCoupling(_Conditional, library.ConditionalAffineCoupling):
    """Pyro's transform, conditioned to :class:`AffineCoupling`."""


_REPLACEMENTS = replacements_of(
    AffineAutoregressive,
    SplineAutoregressive,
    NeuralAutoregressive,
    AffineCoupling,
    ConditionalAffineAutoregressive,
    ConditionalSplineAutoregressive,
    ConditionalNeuralAutoregressive,
    ConditionalAffineCoupling,
)


def read(arn: Any, context: Tensor | None = None) -> MaskedNetwork | None:
    """Read an ``AutoRegressiveNN``, conditional or not; None if it is something else, or not plain."""
    if type(arn) not in (AutoRegressiveNN, ConditionalAutoRegressiveNN) or not is_plain(arn):
        return None
    if not is_elementwise(arn.f, arn.layers[0].weight):
        return None
    network = MaskedNetwork(arn.input_dim, context, context_first=True, parameters_first=True)
    h = 0
    for layer in arn.layers[:-1]:
        h = network.map(arn.f, network.linear((h, layer)))
    skip = [] if arn.skip_layer is None else [(0, arn.skip_layer)]
    network.linear((h, arn.layers[-1]), *skip)
    return network


def _parts(arn: Any) -> tuple[Any, Tensor | None]:
    """The network of a transform, and the context that a conditional one has bound to it."""
    return (arn.func, arn.keywords["context"]) if isinstance(arn, partial) else (arn, None)


def _replacement(module: nn.Module) -> type | None:
    """The type that replaces that of a module, if any."""
    if type(module) is library.NeuralAutoregressive:
        served = isinstance(module.T, SigmoidTransform) and module.hidden_units <= MAX_COMPONENTS
        return NeuralAutoregressive if served else None
    return _REPLACEMENTS.get(type(module))


def _conditioned(transform: Any) -> Any:
    """Change a transform that was just made to the type that replaces its own."""
    transform.__class__ = _replacement(transform) or type(transform)
    return _reset(transform) if isinstance(transform, _Cached) else transform


def _joined(made: Tensor | tuple[Tensor, ...], arn: nn.Module) -> Tensor:
    """Join the outputs of a network, whatever their form, to ``(B, D, P)``."""
    made = (made,) if isinstance(made, Tensor) else made
    parts = [part.unsqueeze(-2) if part.dim() == 2 else part for part in made]
    return torch.cat(parts, -2).transpose(-1, -2)


def _mixture(slopes: Tensor, logits: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logits, means and log-scales of ``sum_k softmax(W)_k sigmoid(a_k x + b_k)`` as a mixture of logistics."""
    slopes = F.softplus(slopes).clamp(min=_LEAST_SLOPE)
    return logits, -offsets / slopes, -torch.log(slopes)


def _of_vectors(op: Callable, x: Tensor, *parameters: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Run an op, which sums over all but the first dimension, on x with any batch dimensions before the last."""
    tensors = [tensor.reshape(-1, *tensor.shape[x.dim() - 1 :]) for tensor in (x, *parameters)]
    value, logdet = op(*tensors, **options)
    return value.view(x.shape), logdet.view(x.shape[:-1])


def _clamp(module: Any) -> Scale:
    """The activation of a transform that clamps its log-scale."""
    return clamp(float(module.log_scale_min_clip), float(module.log_scale_max_clip))
