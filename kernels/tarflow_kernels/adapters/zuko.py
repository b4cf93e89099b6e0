"""zuko's flows (https://github.com/probabilists/zuko) on these kernels.

In the flow that :func:`accelerate` returns, affine maps run through :func:`~tarflow_kernels.affine_inverse` and its
inverse, with their log-dets, and masked autoregressive transforms of any univariate are inverted incrementally.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import zuko
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from zuko.flows.autoregressive import MaskedAutoregressiveTransform as ZukoMaskedAutoregressiveTransform
from zuko.flows.coupling import GeneralCouplingTransform as ZukoGeneralCouplingTransform
from zuko.flows.gaussianization import ElementWiseTransform as ZukoElementWiseTransform
from zuko.transforms import DependentTransform, MonotonicAffineTransform
from zuko.utils import broadcast, unpack

from ..incremental import Inverse
from ..masked import MaskedNetwork
from ..scales import Scale, softclip
from . import common
from .common import (
    affine_forward,
    affine_inverse,
    affine_inverse_of,
    autoregressive_inverse,
    is_elementwise,
    is_plain,
    mixture_logistic,
    mixture_logistic_inverse,
)

__all__ = ["AffineTransform", "MixtureTransform", "accelerate"]

Lazy = TypeVar("Lazy", bound=nn.Module)


def accelerate(flow: Lazy) -> Lazy:
    """Make an equivalent of a zuko flow, or lazy transform, that shares its parameters and buffers.

    Replaced are ``MaskedAutoregressiveTransform`` (MAF, NSF, NCSF, SOSPF, BPF, NAF, UNAF), ``GeneralCouplingTransform``
    (NICE, RealNVP) and ``ElementWiseTransform``; subclasses of these stay as they are. The flow that was given stays as
    it is, but for what is done to the shared parameters; moving one of the two to another device spoils the other.

    Raises:
        TypeError: ``flow`` is no module.

    >>> flow = zuko.flows.MAF(5, context=2)
    >>> fast, c, z = accelerate(flow), torch.randn(9, 2), torch.randn(9, 5)
    >>> torch.allclose(fast(c).transform.inv(z), flow(c).transform.inv(z), atol=1e-5)
    True
    """
    return common.accelerate(flow, "zuko", _REPLACEMENTS)


class MixtureTransform(Transform):
    """A univariate for zuko, Flow++'s mixture of logistics: ``f(x) = logit(sum_k pi_k sigmoid((x - mu_k) exp(-s_k)))``.

    It is the sigmoidal transform of neural autoregressive flows (arXiv 1804.00779) as well, here with an inverse::

        zuko.flows.MAF(features, univariate=MixtureTransform, shapes=[(K,), (K,), (K,)])

    Arguments:
        logits, means, log_scales: ``(*, K)``; log-scales below -7 are taken to be -7.
    """

    domain = codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, logits: Tensor, means: Tensor, log_scales: Tensor, **kwargs) -> None:
        super().__init__(**kwargs)
        self.parameters = logits, means, log_scales

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._elementwise(mixture_logistic_inverse, y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map each element, and return its log-derivative too."""
        return self._elementwise(mixture_logistic, x)

    def _elementwise(self, op: Callable, x: Tensor) -> tuple[Tensor, Tensor]:
        # Each element is a sample, so that log-dets are not summed.
        x, *parameters = broadcast(x[..., None], *self.parameters, ignore=1)
        value, ladj = op(x.flatten(), *(tensor.flatten(0, -2) for tensor in parameters))
        return value.view(x.shape[:-1]), ladj.view(x.shape[:-1])


class AffineTransform(Transform):
    """zuko's ``MonotonicAffineTransform`` as a map of vectors, ``f(x) = exp(a) x + b``, with its log-det."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, shift: Tensor, scale: Tensor, activation: Scale, **kwargs) -> None:
        super().__init__(**kwargs)
        self.shift, self.scale, self.activation = shift, scale, activation

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self._vectors(affine_forward, y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map each vector, and return its log-det too."""
        return self._vectors(affine_inverse, x)

    def _vectors(self, op: Callable, x: Tensor) -> tuple[Tensor, Tensor]:
        tensors = torch.broadcast_tensors(x, self.shift, self.scale)
        value, logdet = op(*(tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors), scale=self.activation)
        return value.view(tensors[0].shape), logdet.view(tensors[0].shape[:-1])


class AutoregressiveTransform(zuko.transforms.AutoregressiveTransform):
    """zuko's autoregressive transform, with an incremental inverse."""

    def __init__(self, lazy: "MaskedAutoregressiveTransform", c: Tensor | None) -> None:
        super().__init__(partial(lazy.meta, c), lazy.passes)
        self.lazy, self.c = lazy, c

    def _inverse(self, y: Tensor) -> Tensor:
        c = self.c
        if c is not None:
            y, c = broadcast(y, c, ignore=1)
        return self.lazy.inverse(y.reshape(-1, y.shape[-1]), None if c is None else c.reshape(-1, c.shape[-1])).view(
            y.shape
        )


class MaskedAutoregressiveTransform(ZukoMaskedAutoregressiveTransform):
    """zuko's lazy autoregressive transform, with affine maps by kernels and an incremental inverse."""

    def forward(self, c: Tensor | None = None) -> Transform:
        return AutoregressiveTransform(self, c)

    def meta(self, c: Tensor | None, x: Tensor) -> Transform:
        return _row(self.univariate, unpack(self._conditioner(c, x), self.shapes))

    def inverse(self, y: Tensor, c: Tensor | None) -> Tensor:
        """Invert the map of vectors ``(B, D)`` with their contexts ``(B, C)``."""
        x, _ = autoregressive_inverse(
            y,
            read(self.hyper, y.shape[-1], c),
            partial(self._conditioner, c),
            lambda x, phi: self.univariate(*unpack(phi, self.shapes))(x),
            _inverse_of(self.univariate, self.shapes),
            [*self.parameters(), *([] if c is None else [c])],
        )
        return x

    def _conditioner(self, c: Tensor | None, x: Tensor) -> Tensor:
        if c is not None:
            x = torch.cat(broadcast(x, c, ignore=1), dim=-1)
        return self.hyper(x).unflatten(-1, (-1, self.total))


class GeneralCouplingTransform(ZukoGeneralCouplingTransform):
    """zuko's lazy coupling, with affine maps by kernels."""

    def meta(self, c: Tensor | None, x: Tensor) -> Transform:
        if c is not None:
            x = torch.cat(broadcast(x, c, ignore=1), dim=-1)
        return _row(self.univariate, unpack(self.hyper(x).unflatten(-1, (-1, self.total)), self.shapes))


class ElementWiseTransform(ZukoElementWiseTransform):
    """zuko's lazy element-wise transform, with affine maps by kernels."""

    def forward(self, c: Tensor | None = None) -> Transform:
        phi = self.phi if c is None else unpack(self.hyper(c).unflatten(-1, (-1, self.total)), self.shapes)
        return _row(self.univariate, phi)


_REPLACEMENTS = common.replacements_of(MaskedAutoregressiveTransform, GeneralCouplingTransform, ElementWiseTransform)


def read(hyper: nn.Module, features: int, context: Tensor | None = None) -> MaskedNetwork | None:
    """Read a ``zuko.nn.MaskedMLP``, whose input ends with the context; None if it is something else, or not plain."""
    network = MaskedNetwork(features, context)
    readable = type(hyper) is zuko.nn.MaskedMLP and is_plain(hyper) and _read(network, hyper, 0)
    return network if readable else None


def _read(network: MaskedNetwork, layers: Any, h: int) -> int | None:
    """Add layers behind node h, and return the number of the last; None where one cannot be read."""
    like = next(layers.parameters())
    for layer in layers:
        added: int | None = None
        if isinstance(layer, zuko.nn.MaskedLinear):
            added = network.linear((h, layer))
        elif isinstance(layer, zuko.nn.Residual):
            inside = _read(network, layer, h)
            added = inside and network.map(torch.add, h, inside)
        elif is_elementwise(layer, like):
            added = network.map(layer, h)
        if added is None:
            return None
        h = added
    return h


def _row(univariate: Callable[..., Transform], phi: Sequence[Tensor]) -> Transform:
    """The univariates of all features as one map of vectors."""
    activation = affine_activation(univariate)
    if activation is None:
        return DependentTransform(univariate(*phi), 1)
    shift, scale = phi
    return AffineTransform(shift, scale, activation)


def affine_activation(univariate: Callable[..., Transform]) -> Scale | None:
    """The activation by which an affine univariate makes its log-scale; None if it is another univariate."""
    if isinstance(univariate, partial):
        known = (
            univariate.func is MonotonicAffineTransform
            and not univariate.args
            and set(univariate.keywords) <= {"slope"}
        )
        return softclip(-math.log(univariate.keywords.get("slope", 1e-3))) if known else None
    return softclip(-math.log(1e-3)) if univariate is MonotonicAffineTransform else None


def _inverse_of(univariate: Callable[..., Transform], shapes: Sequence[torch.Size]) -> Inverse:
    activation = affine_activation(univariate)
    if activation is not None:
        return lambda y, phi, features: affine_inverse_of(y, phi[..., 0], phi[..., 1], activation)
    return lambda y, phi, features: _restricted(univariate, features)(*unpack(phi, shapes)).inv(y)


def _restricted(univariate: Any, features: Tensor) -> Any:
    """The univariate for some features only: of networks that are a stack of one per feature, as in NAF, theirs."""
    if not isinstance(univariate, nn.Module):
        return univariate
    twin = copy.copy(univariate)
    twin._modules = {name: _restricted(module, features) for name, module in univariate._modules.items()}
    if isinstance(univariate, zuko.nn.Linear) and univariate.weight.dim() == 3:
        twin._parameters = {
            name: value if value is None else value[features] for name, value in univariate._parameters.items()
        }
    return twin
