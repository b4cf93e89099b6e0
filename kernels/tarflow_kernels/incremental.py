"""The exact inverse of a masked autoregressive network, at the cost of about one forward pass.

A masked network (MADE, arXiv 1502.03509) makes the parameters of feature i from the features before it, so that
inverting an element-wise map ``y_i = f(x_i; parameters_i)`` takes one step per feature. The usual implementation runs
the whole network in each. But a hidden unit is complete once the last feature that it sees is known: that step is its
*degree*. With units in the order of their degrees, a step evaluates those that it completes, from the activations of
those before them, which lie side by side: each weight is used once, and a good part of the masks' zeros not at all. It
is what a key-value cache is to a transformer.

As in a blocked triangular solve, a window of steps first takes in what lies before it by large products, one for each
layer, and each step then only what the window itself has found. Activations are ``(units, B)``: what a step reads and
writes is contiguous.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import check_same_device
from .masked import Linear, Map, MaskedNetwork, Plan, masked_weight, plan_of, sources_of

__all__ = [
    "FEW_PRODUCTS",
    "FEW_ROWS",
    "FEW_ROWS_ON_GPU",
    "MANY_ROWS",
    "WINDOWS",
    "WINDOWS_OF_MANY_ROWS",
    "Inverse",
    "fixed_point_inverse",
    "incremental_inverse",
]

Inverse = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The inverse of an element-wise map for some features, ``(y, parameters, features) -> x``."""

# Settings: they change what an inverse costs, and nothing else of it.

WINDOWS = 8, 32
"""Steps of a window and of a wide one."""
WINDOWS_OF_MANY_ROWS, MANY_ROWS = (4, 16), 2048
"""The same for more rows than that, where products cost more than operators."""
FEW_ROWS, FEW_ROWS_ON_GPU = 8, 4096
"""Rows up to which fixed-point iteration is tried first: a pass then costs hardly more than a step, both overhead."""
FEW_PRODUCTS = 8e6
"""Multiplications, in as many passes as there are steps, that take less than the overhead of the steps."""


def incremental_inverse(network: MaskedNetwork, y: Tensor, inverse: Inverse) -> tuple[Tensor, Tensor]:
    """Find the x with ``y_i = f(x_i; parameters_i)``, where the network makes ``parameters_i`` from features before i.

    Exact up to rounding, whatever the order of the features or the depth of their graph: features that do not depend
    on each other are found in one step. Up to 8 rows, or 4096 on a GPU, are first tried by fixed-point iteration with
    the whole network, which is as exact where it comes to rest, and is given up where it does not soon. Problems that
    are small in all are solved by such passes altogether.

    Args:
        network: the network that makes the parameters; its layers in the dtype of y and on its device.
        y: ``(B, D)``.
        inverse: the inverse of f, ``inverse(y, parameters, features) -> x``, element by element: y and x ``(B, d)``,
            parameters ``(B, d, P)`` with any strides, and ``features``, int64 ``(d,)``, which features these are.

    Returns:
        x ``(B, D)``, and the parameters ``(B, D, P)`` at x, any strides, of which a log-det needs no other pass.
        Without gradients.

    Raises:
        ValueError: y is not ``(B, D)`` or lies on another device; a context has other rows; the masks make a feature
            depend on itself.
        TypeError: y and the weights differ in dtype.
    """
    _check(network, y)
    with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
        plan = plan_of(network)
        found = _by_passes(network, y, inverse, _worthwhile_passes(network, plan.steps, y), plan.steps)
        return _step_by_step(network, plan, y, inverse) if found is None else found


def fixed_point_inverse(update: Callable[[Tensor], Tensor], start: Tensor, passes: int) -> tuple[Tensor, bool]:
    """Repeat ``x <- update(x)`` until nothing changes, and say whether that came within so many passes.

    With ``update(x) = inverse(y, parameters(x))`` it inverts any autoregressive network: feature i is exact after as
    many passes as features lie before it, and one more, so after D passes all are, at rest or not. Each pass waits for
    the device.
    """
    x = start
    for _ in range(passes):
        previous, x = x, update(x)
        if torch.equal(previous, x):
            return x, True
    return x, False


def _check(network: MaskedNetwork, y: Tensor) -> None:
    if y.dim() != 2 or y.shape[1] != network.features:
        raise ValueError(f"y: expected shape (B, {network.features}); got {tuple(y.shape)}")
    weight = network.layers[0].weight
    if y.dtype != weight.dtype:
        raise TypeError(f"y: expected the dtype of the network, {weight.dtype}; got {y.dtype}")
    check_same_device("network", weight, "y", y)
    if network.context is not None and len(network.context) != len(y):
        raise ValueError(f"context: expected as many rows as y, {len(y)}; got {len(network.context)}")


# Passes over all features at once -------------------------------------------------------------------------------------


def _worthwhile_passes(network: MaskedNetwork, steps: int, y: Tensor) -> int:
    """The number of passes worth trying: a quarter of the steps, or half on a GPU, where launches cost most."""
    if steps * len(y) * sum(layer.weight.numel() for layer in network.layers) <= FEW_PRODUCTS:
        return steps
    if y.is_cpu:
        return steps // 4 if len(y) <= FEW_ROWS else 0
    return steps // 2 if len(y) <= FEW_ROWS_ON_GPU else 0


def _by_passes(
    network: MaskedNetwork, y: Tensor, inverse: Inverse, passes: int, enough: int
) -> tuple[Tensor, Tensor] | None:
    """Invert by fixed-point iteration; None where it has not come to rest in fewer passes than are enough."""
    if not passes:
        return None
    parameters, features = _whole_network(network), torch.arange(network.features, device=y.device)
    made = None

    def update(x: Tensor) -> Tensor:
        nonlocal made
        made = parameters(x)
        return inverse(y, made, features)

    x, rests = fixed_point_inverse(update, torch.zeros_like(y), passes)
    assert made is not None  # there was a pass
    return (x, made) if rests or passes == enough else None  # no parameter depends on what the last pass found


def _whole_network(network: MaskedNetwork) -> Callable[[Tensor], Tensor]:
    """The network as a function from x to the parameters ``(B, D, P)``, with weights that are masked once."""
    weights = [
        [masked_weight(layer) for _, layer in node.terms] if isinstance(node, Linear) else [] for node in network.nodes
    ]

    def parameters(x: Tensor) -> Tensor:
        inputs = [x] if network.context is None else [x, network.context]
        values = [torch.cat(inputs[::-1] if network.context_first else inputs, -1)]
        for node, masked in zip(network.nodes, weights):
            if isinstance(node, Linear):
                terms = zip(node.terms, masked)
                parts = (F.linear(values[source], weight, layer.bias) for (source, layer), weight in terms)
                values.append(cast(Tensor, sum(parts)))
            else:
                values.append(node.function(*(values[source] for source in node.sources), *node.extras))
        if network.parameters_first:
            return values[-1].unflatten(-1, (-1, network.features)).transpose(-1, -2)
        return values[-1].unflatten(-1, (network.features, -1))

    return parameters


# Step by step ---------------------------------------------------------------------------------------------------------


def _step_by_step(network: MaskedNetwork, plan: Plan, y: Tensor, inverse: Inverse) -> tuple[Tensor, Tensor]:
    units = _allocate(network, plan, y)
    nodes = [_ordered(node, plan, k, units) for k, node in enumerate(network.nodes, 1)]
    sums = [node for node in nodes if isinstance(node, _Sum)]
    narrow, wide = WINDOWS if len(y) <= MANY_ROWS else WINDOWS_OF_MANY_ROWS
    if network.context is not None:
        units[0].values[: network.context_size] = network.context.t()
    x, parameters = units[0].values[network.context_size :], units[-1].values.view(network.features, -1, len(y))
    sizes = [size // parameters.shape[1] for size in _differences(plan.ends[-1])]
    # A step reads and writes views, which are made beforehand and all at once.
    steps = zip(
        x.t().split(sizes, 1),
        y.t()[plan.features].t().split(sizes, 1),
        parameters.permute(2, 0, 1).split(sizes, 1),
        plan.features.split(sizes),
    )
    for step, (x_step, y_step, parameters_step, features) in enumerate(steps):
        if step % wide == 0:
            for node in sums:
                node.begin_wide(step, min(step + wide, plan.steps))
        if step % narrow == 0:
            for node in sums:
                node.begin(step, min(step + narrow, plan.steps))
        for each in nodes:
            each.complete(step)
        x_step.copy_(inverse(y_step, parameters_step, features))
    rank = plan.features.argsort()
    return x[rank].t().contiguous(), parameters[rank].permute(2, 0, 1)


def _allocate(network: MaskedNetwork, plan: Plan, y: Tensor) -> list[_Units]:
    """Allocate all activations. A map takes the memory of a sum that nothing else reads."""
    readers = Counter(source for node in network.nodes for source in sources_of(node))
    units = [_Units(y.new_zeros(len(plan.orders[0]), len(y)), plan.ends[0])]
    for k, node in enumerate(network.nodes, 1):
        if isinstance(node, Linear):
            values = y.new_empty(len(plan.orders[k]), len(y))  # a window begins by writing all of it
        else:
            sources = zip(node.sources, plan.picks[k - 1])
            same_order = (i for i, pick in sources if i and pick is None and plan.ends[i] == plan.ends[k])
            own = next((i for i in same_order if readers[i] == 1 and isinstance(network.nodes[i - 1], Linear)), None)
            values = y.new_zeros(len(plan.orders[k]), len(y)) if own is None else units[own].values
        units.append(_Units(values, plan.ends[k]))
    return units


class _Units:
    """The activations of a node, ``(units, B)`` in the order of degrees, finite where they are not complete."""

    def __init__(self, values: Tensor, ends: list[int]) -> None:
        self.values, self.ends = values, ends
        self.by_step = values[: ends[-1]].split(_differences(ends))

    def between(self, first: int, last: int) -> slice:
        """The units with degrees from first to below last."""
        return slice(self.ends[first], self.ends[last])


class _Sum:
    """A :class:`Linear` node: its units, and its weights and biases in the order of degrees."""

    def __init__(self, units: _Units, terms: list[tuple[_Units, Tensor]], bias: Tensor) -> None:
        self.units, self.terms, self.bias = units, terms, bias

    def begin_wide(self, first: int, last: int) -> None:
        """Add to all units of a wide window what the units before it contribute."""
        rows = self.units.between(first, last)
        values, addend, self.since = self.units.values[rows], self.bias[rows], first
        for source, weight in self.terms:
            before = source.between(0, first)
            addend = torch.addmm(addend, weight[rows, before], source.values[before], out=values)

    def begin(self, first: int, last: int) -> None:
        """Add to all units of a window what the wide one has found before it, and prepare its steps."""
        rows, sizes = self.units.between(first, last), _differences(self.units.ends[first : last + 1])
        self.first, self.window = first, []
        for source, weight in self.terms:
            before, within = source.between(self.since, first), source.between(first, last)
            if self.since < first:
                self.units.values[rows].addmm_(weight[rows, before], source.values[before])
            self.window.append((weight[rows, within].split(sizes), source.values[within]))

    def complete(self, step: int) -> None:
        """Add to the units of a step what the window has found; all other weights within it are zero."""
        values = self.units.by_step[step]
        if len(values):
            for weights, source in self.window:
                values.addmm_(weights[step - self.first], source)


class _Mapped:
    """A :class:`Map` node: its units, and the parts of its sources and extras that each step needs."""

    def __init__(
        self,
        units: _Units,
        function: Callable[..., Tensor],
        sources: list[tuple[_Units, Tensor | None]],
        extras: list[Tensor],
    ) -> None:
        # A step is all overhead, and calling a module or writing elsewhere adds to it.
        self.in_place = None
        if [source.values is units.values for source, _ in sources] == [True] and not extras:
            self.in_place = _IN_PLACE.get(function) or _IN_PLACE.get(type(function))
        self.units, self.function = units, function.forward if isinstance(function, nn.Module) else function
        sizes = _differences(units.ends)
        self.parts = [_aligned(source, pick, sizes) for source, pick in sources]
        self.parts += [extra.split(sizes).__getitem__ for extra in extras]

    def complete(self, step: int) -> None:
        """Evaluate the units of a step."""
        values = self.units.by_step[step]
        if not len(values):
            return
        if self.in_place:
            self.in_place(values)
        else:
            values.copy_(self.function(*[part(step) for part in self.parts]))


_IN_PLACE = {
    **dict.fromkeys((nn.ReLU, torch.relu, F.relu), torch.relu_),
    **dict.fromkeys((nn.Tanh, torch.tanh, F.tanh), torch.tanh_),
}


def _aligned(source: _Units, pick: Tensor | None, sizes: list[int]) -> Callable[[int], Tensor]:
    """A function from a step to the units of a source that another node reads in it."""
    if pick is None:  # in the same order, though not always in the same steps
        return source.values[: sum(sizes)].split(sizes).__getitem__
    picks = pick.split(sizes)
    return lambda step: source.values[picks[step]]


def _ordered(node: Linear | Map, plan: Plan, k: int, units: list[_Units]) -> _Sum | _Mapped:
    """Node k with its weights, or extras, in the order of degrees."""
    order = plan.orders[k]
    if isinstance(node, Map):
        sources = [(units[source], pick) for source, pick in zip(node.sources, plan.picks[k - 1])]
        extras = [extra.expand(1, -1) if extra.dim() == 1 else extra for extra in node.extras]
        return _Mapped(units[k], node.function, sources, [extra.t()[order] for extra in extras])
    terms, bias = [], units[k].values.new_zeros(len(order), 1)
    for source, layer in node.terms:
        weight = masked_weight(layer).index_select(0, order).index_select(1, plan.orders[source])
        terms.append((units[source], weight))
        if layer.bias is not None:
            bias += layer.bias[order, None]
    return _Sum(units[k], terms, bias)


def _differences(ends: list[int]) -> list[int]:
    return [end - start for start, end in zip(ends, ends[1:])]
