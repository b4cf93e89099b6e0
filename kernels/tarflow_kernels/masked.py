"""Masked autoregressive networks, described so that they can be evaluated unit by unit.

A masked network (MADE, arXiv 1502.03509) makes the parameters of feature i from the features before it. Which unit sees
which feature is read from the masks; it says in which step of an inverse a unit is complete, its *degree*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

__all__ = ["MaskedLayer", "MaskedNetwork"]


class MaskedLayer(Protocol):
    """A module that computes ``x (weight * mask)^T + bias``, as zuko's, nflows', normflows' and Pyro's do."""

    weight: Tensor
    bias: Tensor | None
    mask: Tensor


class Linear(NamedTuple):
    """The sum of masked linear layers, each of one earlier node."""

    terms: tuple[tuple[int, MaskedLayer], ...]


class Map(NamedTuple):
    """A function of earlier nodes, unit by unit, and of tensors ``(units,)`` or ``(B, units)`` beside them."""

    function: Callable[..., Tensor]
    sources: tuple[int, ...]
    extras: tuple[Tensor, ...]


class MaskedNetwork:
    """A network that makes the parameters of every feature, described as a list of nodes, which are vectors of units.

    Node 0 is the input: the features, with the ``context`` behind or before them where it is an input too. The last
    node that is added is the output. Which unit sees which feature is read from the masks.

    Args:
        features: D, how many there are.
        context: ``(B, C)``, where the first layer takes it beside the features.
        context_first: whether the context lies before the features.
        parameters_first: whether unit ``p D + i`` of the output is parameter p of feature i, and not unit ``i P + p``.

    >>> from tarflow_kernels import incremental_inverse
    >>> layer = torch.nn.Linear(2, 2)  # the shift of the second feature depends on the first
    >>> layer.mask = torch.tensor([[0, 0], [1, 0]])
    >>> network = MaskedNetwork(2)
    >>> _ = network.linear((0, layer))
    >>> y = torch.randn(5, 2)
    >>> x, shift = incremental_inverse(network, y, lambda y, parameters, features: y - parameters[..., 0])
    >>> torch.allclose(x + torch.nn.functional.linear(x, layer.weight * layer.mask, layer.bias), y, atol=1e-6)
    True
    """

    def __init__(
        self,
        features: int,
        context: Tensor | None = None,
        *,
        context_first: bool = False,
        parameters_first: bool = False,
    ) -> None:
        self.features, self.context = features, context
        self.context_first, self.parameters_first = context_first, parameters_first
        self.nodes: list[Linear | Map] = []

    def linear(self, *terms: tuple[int, MaskedLayer]) -> int:
        """Add a node that sums masked linear layers, each of an earlier node, and return its number."""
        return self._add(Linear(terms))

    def map(self, function: Callable[..., Tensor], *sources: int, extras: Sequence[Tensor] = ()) -> int:
        """Add the node ``function(*sources, *extras)``, unit by unit, and return its number.

        The function must not depend on the layout: it is given ``(B, units)`` or ``(units, B)``.
        """
        return self._add(Map(function, sources, tuple(extras)))

    @property
    def context_size(self) -> int:
        """The number of inputs that are context."""
        return 0 if self.context is None else self.context.shape[-1]

    @property
    def layers(self) -> list[MaskedLayer]:
        """The masked layers of all nodes, in their order."""
        return [layer for node in self.nodes if isinstance(node, Linear) for _, layer in node.terms]

    def _add(self, node: Linear | Map) -> int:
        self.nodes.append(node)
        return len(self.nodes)


@dataclass(frozen=True)
class Plan:
    """The steps and orders in which units are evaluated; they depend on masks alone.

    Attributes:
        steps: the number of steps.
        features: the features in the order of their steps.
        orders: for every node, its units in the order of their degrees, without those that see the last step, which no
            other reads; of the input all units, its context first.
        ends: for every node, how many of its units have degrees below 0, 1, ..., steps.
        picks: for every map and each of its sources, where its units lie there; None where in the same order.
    """

    steps: int
    features: Tensor
    orders: list[Tensor]
    ends: list[list[int]]
    picks: list[list[Tensor | None]]


_plans: WeakKeyDictionary[MaskedLayer, tuple[tuple, list[Tensor], Plan]] = WeakKeyDictionary()


def plan_of(network: MaskedNetwork) -> Plan:
    """The plan of a network, which is made once, and again where its masks are others or have changed."""
    first, masks = network.layers[0], [layer.mask for layer in network.layers]
    form = (
        tuple(sources_of(node) for node in network.nodes),
        tuple(0 if mask.is_inference() else mask._version for mask in masks),
        (network.features, network.context_size, network.context_first, network.parameters_first),
    )
    cached = _plans.get(first)
    if cached is None or cached[0] != form or any(a is not b for a, b in zip(cached[1], masks)):
        with torch.device("cpu"):
            cached = _plans[first] = form, masks, _plan(network)
    return cached[2]


def _plan(network: MaskedNetwork) -> Plan:
    seen = _seen(network)
    owners = _owners(network, len(seen[-1]))
    step = _generations(torch.stack([seen[-1][owners == i].any(0) for i in range(network.features)]))
    steps, features = int(step.max()) + 1, step.argsort(stable=True)
    # A unit is complete before the step after the last that it sees.
    degrees = [((step + 1) * units).amax(1) for units in seen]
    orders = [degree.argsort(stable=True) for degree in degrees]
    # Parameters are wanted when their feature is, and side by side.
    degrees[-1], orders[-1] = step[owners], features.argsort()[owners].argsort(stable=True)
    ends = [[0, *torch.bincount(degree, minlength=steps).cumsum(0)[:steps].tolist()] for degree in degrees]
    device = network.layers[0].mask.device
    kept = [orders[0], *(order[: end[-1]] for order, end in zip(orders[1:], ends[1:]))]
    picks = [
        [_pick(kept[k], orders[source], device) for source in node.sources] if isinstance(node, Map) else []
        for k, node in enumerate(network.nodes, 1)
    ]
    return Plan(steps, features.to(device), [order.to(device) for order in kept], ends, picks)


def sources_of(node: Linear | Map) -> tuple[int, ...]:
    """The numbers of the nodes that a node reads."""
    return tuple(source for source, _ in node.terms) if isinstance(node, Linear) else node.sources


def _seen(network: MaskedNetwork) -> list[Tensor]:
    """For every node, which of its units see which features, ``(units, D)``."""
    size = network.features
    inputs = [torch.eye(size, dtype=torch.bool), torch.zeros(network.context_size, size, dtype=torch.bool)]
    seen = [torch.cat(inputs[::-1] if network.context_first else inputs)]
    for node in network.nodes:
        if isinstance(node, Linear):
            parts = [(layer.mask.cpu() != 0).float() @ seen[source].float() > 0 for source, layer in node.terms]
        else:
            parts = [seen[source] for source in node.sources]
        seen.append(torch.stack(parts).any(0))
    return seen


def _owners(network: MaskedNetwork, outputs: int) -> Tensor:
    """For every unit of the output, the feature whose parameter it is."""
    if outputs % network.features:
        raise ValueError(f"network: expected as many outputs for each of {network.features} features; got {outputs}")
    owners, parameters = torch.arange(network.features), outputs // network.features
    return owners.repeat(parameters) if network.parameters_first else owners.repeat_interleave(parameters)


def _generations(depends: Tensor) -> Tensor:
    """The step of each feature, the first after those of all features that it depends on."""
    step, waiting = torch.full((len(depends),), -1), depends.sum(1)
    for now in count():
        ready = (waiting == 0) & (step < 0)
        if not ready.any():
            break
        step[ready] = now
        waiting -= depends[:, ready].sum(1)
    if (step < 0).any():
        raise ValueError("network: expected masks by which no feature depends on itself; got some that do")
    return step


def _pick(order: Tensor, source: Tensor, device: torch.device) -> Tensor | None:
    """The places of units in the order of a source; None where the two orders are the same."""
    pick = source.argsort()[order]
    return None if torch.equal(pick, torch.arange(len(pick))) else pick.to(device)


def masked_weight(layer: MaskedLayer) -> Tensor:
    """The weight of a layer times its mask, as numbers: multiplying by booleans is slower."""
    return layer.weight * layer.mask.to(layer.weight.dtype)
