"""Rows of other libraries' flows: as the library runs them, by fixed-point iteration, and accelerated.

Flows have three transforms of 64 features, with hidden layers of 256, and the weights that they are initialized with. A
row counts one forward pass, whichever way it goes: the multiplications that the masks leave, each of their weights
read once, each input and output once. How near an inverse comes to the limit so says how near it comes to one pass.

On a CPU they run in one thread, whose limits are those that are measured with OMP_NUM_THREADS=1.
"""

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from row import Contender, Outputs, Row
from tarflow_kernels import fixed_point_inverse

FEATURES, HIDDEN, TRANSFORMS = 64, 256, 3
# It takes a flow and what goes into it.
Call = Callable[[Any, Tensor], Outputs]


def other_flow_rows(device: torch.device) -> list[Row]:
    """List the rows of a device."""
    on_gpu = device.type == "cuda"
    batches = (64, 1024, 4096, 65536) if on_gpu else (1, 64, 1024, 4096)
    return [
        *(_row("inverse", subject, batch, on_gpu) for subject in (_ZUKO_MAF, _NFLOWS_MAF) for batch in batches),
        *(_row("inverse", subject, 1024, on_gpu) for subject in (_NORMFLOWS_MAF, _PYRO_MAF, _ZUKO_NSF)),
        *(
            _row("density", subject, batch, on_gpu)
            for subject in (_ZUKO_MAF, _ZUKO_REALNVP, _NFLOWS_MAF)
            for batch in ((4096, 65536) if on_gpu else (4096,))
        ),
    ]


@dataclass(frozen=True)
class Subject:
    """A flow of another library, and how to run it.

    Attributes:
        owner, name: whose flow, and which; the adapter is named after the library.
        make: build a new one.
        inverse: ``(flow, z) -> (x,)``, as the library does it.
        updates: of each transform, in the order of the inverse: ``(x, y) -> x``, of which its inverse is the fixed
            point.
        weights: how many there are, without those that are masked.
        forward: ``(flow, x) -> (z, logdet)``, the direction of one pass, where it is measured.
        compiles: whether the inverse, which a compiler writes out, can be compiled in a minute or two.
    """

    owner: str
    name: str
    make: Callable[[], nn.Module]
    inverse: Call
    updates: Callable[[Any], list[Callable[[Tensor, Tensor], Tensor]]]
    weights: int
    forward: Call | None = None
    compiles: bool = False

    def fixed_point(self, flow: Any, z: Tensor) -> Outputs:
        """Invert with the library's own networks and maps, in as many passes as it takes until nothing changes."""
        for update in self.updates(flow):
            z, _ = fixed_point_inverse(lambda x, update=update, y=z: update(x, y), torch.zeros_like(z), FEATURES)
        return (z,)

    def accelerated(self, flow: nn.Module) -> nn.Module:
        """Return an equivalent of a flow, by our adapter."""
        return importlib.import_module(f"tarflow_kernels.adapters.{self.owner.lower()}").accelerate(flow)


def _made(hidden: int, parameters: int) -> int:
    """Count the weights that the masks of a MADE leave: its unit j sees the first 1 + j mod (D - 1) features.

    Args:
        hidden: products of hidden by hidden units.
        parameters: how many outputs there are for each feature.

    >>> _made(2, 2)  # of 180224
    91274
    """
    degrees = [1 + unit % (FEATURES - 1) for unit in range(HIDDEN)]
    squares = sum(upper >= lower for upper in degrees for lower in degrees)
    return sum(degrees) + hidden * squares + parameters * sum(FEATURES - degree for degree in degrees)


# zuko -----------------------------------------------------------------------------------------------------------------


def _make_zuko(name: str) -> nn.Module:
    import zuko

    return getattr(zuko.flows, name)(FEATURES, transforms=TRANSFORMS, hidden_features=(HIDDEN,) * 3)


def _zuko_updates(flow: nn.Module) -> list[Callable]:
    return [
        lambda x, y, transform=transform: transform.meta(x).inv(y)
        for transform in reversed(flow().transform.transforms)
    ]


def _zuko(name: str, weights: int, **options) -> Subject:
    return Subject(
        owner="zuko",
        name=name,
        make=partial(_make_zuko, name),
        inverse=lambda flow, z: (flow().transform.inv(z),),
        updates=_zuko_updates,
        weights=TRANSFORMS * weights,
        forward=lambda flow, x: flow().transform.call_and_ladj(x),
        **options,
    )


# nflows and normflows, which go back to the same code -----------------------------------------------------------------


def _make_nflows() -> nn.Module:
    from nflows import transforms

    made = partial(transforms.MaskedAffineAutoregressiveTransform, num_blocks=2, use_residual_blocks=False)
    parts = [made(FEATURES, HIDDEN)]
    for _ in range(TRANSFORMS - 1):
        parts += [transforms.ReversePermutation(FEATURES), made(FEATURES, HIDDEN)]
    return transforms.CompositeTransform(parts)


def _make_normflows() -> nn.Module:
    import normflows

    made = [normflows.flows.MaskedAffineAutoregressive(FEATURES, HIDDEN) for _ in range(TRANSFORMS)]
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(FEATURES), made)


def _made_updates(transforms: nn.ModuleList) -> list[Callable]:
    return [
        (lambda x, y, part=part: part._elementwise_inverse(y, part.autoregressive_net(x))[0])
        if hasattr(part, "autoregressive_net")
        else (lambda x, y, part=part: part.inverse(y)[0])
        for part in reversed(transforms)
    ]


# Pyro -----------------------------------------------------------------------------------------------------------------


def _make_pyro() -> nn.Module:
    from pyro.distributions import transforms

    parts = [transforms.affine_autoregressive(FEATURES, [HIDDEN] * 3) for _ in range(TRANSFORMS)]
    return transforms.ComposeTransformModule(parts)


def _pyro_updates(flow: nn.Module) -> list[Callable]:
    def update(part: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        mean, log_scale = part.arn(x)
        return (y - mean) * torch.exp(-log_scale.clamp(part.log_scale_min_clip, part.log_scale_max_clip))

    return [partial(update, part) for part in reversed(flow.parts)]


_ZUKO_MAF = _zuko("MAF", _made(hidden=2, parameters=2), compiles=True)
_ZUKO_NSF = _zuko("NSF", _made(hidden=2, parameters=23))  # eight bins
_ZUKO_REALNVP = _zuko("RealNVP", HIDDEN * (FEATURES // 2 + 2 * HIDDEN + FEATURES))
_NFLOWS_MAF = Subject(
    owner="nflows",
    name="MAF",
    make=_make_nflows,
    inverse=lambda flow, z: flow.inverse(z)[:1],
    updates=lambda flow: _made_updates(flow._transforms),
    weights=TRANSFORMS * _made(hidden=2, parameters=2),
    forward=lambda flow, x: flow(x),
    compiles=True,
)
_NORMFLOWS_MAF = Subject(
    owner="normflows",
    name="MAF",
    make=_make_normflows,
    inverse=lambda flow, z: (flow.inverse(z),),
    updates=lambda flow: _made_updates(flow.flows),
    weights=TRANSFORMS * _made(hidden=4, parameters=2),  # two residual blocks of two
)
_PYRO_MAF = Subject(
    owner="Pyro",
    name="MAF",
    make=_make_pyro,
    # It remembers the tensor that it saw last.
    inverse=lambda flow, z: (flow.inv(z.clone()),),
    updates=_pyro_updates,
    weights=TRANSFORMS * _made(hidden=2, parameters=2),  # its masks leave a thousandth less
)


# Rows -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """A flow, and what goes into it."""

    flow: nn.Module
    values: Tensor

    def double(self) -> "Inputs":
        """Return the same numbers in float64."""
        return Inputs(copy.deepcopy(self.flow).double(), self.values.double())


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Run without gradients and, on a CPU, in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def _row(op: str, subject: Subject, batch: int, on_gpu: bool) -> Row:
    """An inverse, the slow direction, or a density: a pass of which only the affine maps and log-dets are ours."""
    call, exactly = subject.forward, subject.forward
    if op == "inverse":
        call, exactly = subject.inverse, subject.fixed_point
    ways = {subject.owner: lambda flow: partial(call, flow)}
    if op == "inverse":
        ways["fixed point"] = lambda flow: partial(subject.fixed_point, flow)
    ways["accelerated"] = lambda flow: partial(call, subject.accelerated(flow))
    if on_gpu and (op == "density" or subject.compiles):
        ways[f"compiled {subject.owner}"] = lambda flow: torch.compile(partial(call, flow), dynamic=False)

    def contender(way: Callable[[nn.Module], Callable[[Tensor], Outputs]]) -> Contender:
        return Contender(lambda inputs: partial(way(inputs.flow), inputs.values), _alone, graph=False)

    def draw(device: torch.device) -> Inputs:
        return Inputs(subject.make().to(device), torch.randn(batch, FEATURES, device=device))

    def expect(inputs: Inputs) -> Outputs:
        """Use the library's networks and maps in float64."""
        exact = inputs.double()
        with torch.no_grad():
            return exactly(exact.flow, exact.values)

    return Row(
        op=op,
        model=f"{subject.owner} {subject.name}",
        shape={"B": batch, "D": FEATURES},
        dtype=torch.float32,
        bytes=4 * (subject.weights + 2 * batch * FEATURES),
        operations=2 * batch * subject.weights,
        contenders={name: contender(way) for name, way in ways.items()},
        draw=draw,
        expect=expect,
        plain=subject.owner,
        flush=False,
        note="weights as initialized" if on_gpu else "weights as initialized; one thread",
    )
