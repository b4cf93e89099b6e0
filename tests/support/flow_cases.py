"""Flows of zuko, nflows, normflows and Pyro: one table of every map of every adapter.

Its flows have random weights, are in double precision unless a test says otherwise, and are looked at through one pair
of functions whatever the library: both return a value and the log-det of the map that they ran.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import nflows.transforms
import normflows
import pyro.distributions
import pytest
import torch
import zuko
from nflows.nn.nets import ResidualNet
from normflows.utils.nn import PeriodicFeaturesElementwise
from pyro.nn import AutoRegressiveNN
from torch import nn
from torch.nn.functional import softplus

from helpers import DEVICE, draw
from tarflow_kernels import incremental
from tarflow_kernels.adapters import nflows as nflows_adapter
from tarflow_kernels.adapters import normflows as normflows_adapter
from tarflow_kernels.adapters import pyro as pyro_adapter
from tarflow_kernels.adapters import zuko as zuko_adapter

D, C = 7, 3
FEW, MANY = 3, incremental.FEW_ROWS + 1
AR = nflows.transforms.autoregressive
T = pyro.distributions.transforms
F = zuko.flows


@dataclass(frozen=True)
class Library:
    """A library: how its flows are called; both functions return a value and a log-det."""

    accelerate: Callable
    forward: Callable
    inverse: Callable


def zuko_forward(flow, x, c):
    return flow(c).transform.call_and_ladj(x)


def zuko_inverse(flow, y, c):
    return flow(c).transform.inv.call_and_ladj(y)


def nflows_forward(flow, x, c):
    return flow(x) if c is None else flow(x, c)


def nflows_inverse(flow, y, c):
    return flow.inverse(y) if c is None else flow.inverse(y, c)


def pyro_forward(flow, x, c):
    transform, x = flow if c is None else flow.condition(c), x.clone()  # known by identity, so a new one
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y)


def pyro_inverse(flow, y, c):
    transform, y = flow if c is None else flow.condition(c), y.clone()
    x = transform.inv(y)
    return x, -transform.log_abs_det_jacobian(x, y)


ZUKO = Library(zuko_adapter.accelerate, zuko_forward, zuko_inverse)
NFLOWS = Library(nflows_adapter.accelerate, nflows_forward, nflows_inverse)
NORMFLOWS = Library(normflows_adapter.accelerate, nflows_forward, nflows_inverse)
PYRO = Library(pyro_adapter.accelerate, pyro_forward, pyro_inverse)


@dataclass(frozen=True)
class Case:
    """A flow of a library, and what its tests need to know.

    Attributes:
        peer: the library.
        make: makes the flow.
        context: whether it takes a context, of C numbers.
        span: the interval in which its points lie, where it does not map all of space.
        logdet: how far the library's log-det may be off.
        gradients: how far the gradients of its inverse may be off; None where they are off for good.
        inverts: whether the library can invert it.
    """

    peer: Library
    make: Callable[[], nn.Module]
    context: bool = False
    span: tuple[float, float] | None = None
    logdet: float = 0.0
    gradients: float | None = 1e-6
    inverts: bool = True


def of_zuko(*transforms):
    return F.Flow(
        transforms, zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, torch.zeros(D), torch.ones(D))
    )


def graph():
    """A graph in which no feature comes before all others, with itself on the diagonal, as zuko wants it."""
    shuffle = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    return ((torch.arange(D)[:, None] - torch.arange(D)) % 3 == 0).tril()[shuffle][:, shuffle]


def preprocessed(preprocessing):
    flow = normflows.flows.MaskedAffineAutoregressive(D, 20)
    flow.autoregressive_net.preprocessing = preprocessing
    return flow


def coupling_net(inputs, outputs):
    return ResidualNet(inputs, outputs, 16)


HIDDEN = {"hidden_features": (20, 20)}
MIXTURE = {"univariate": zuko_adapter.MixtureTransform, "shapes": [(4,), (4,), (4,)]}
SLOPE = {"univariate": partial(zuko.transforms.MonotonicAffineTransform, slope=0.1)}
ARN = {"permutation": torch.tensor([3, 0, 6, 1, 5, 2, 4]), "skip_connections": True, "nonlinearity": nn.Tanh()}
CASES = {
    "zuko MAF": Case(ZUKO, lambda: F.MAF(D, **HIDDEN)),
    "zuko MAF, context": Case(ZUKO, lambda: F.MAF(D, C, randperm=True, **HIDDEN), context=True),
    "zuko MAF, two passes": Case(ZUKO, lambda: F.MAF(D, passes=2, **HIDDEN)),
    "zuko MAF, residual": Case(ZUKO, lambda: F.MAF(D, hidden_features=(20, 30, 30), residual=True)),
    "zuko MAF, tanh": Case(ZUKO, lambda: F.MAF(D, activation=nn.Tanh, **HIDDEN)),
    "zuko MAF, slope": Case(ZUKO, lambda: F.MAF(D, **SLOPE, **HIDDEN)),
    "zuko MAF, graph": Case(ZUKO, lambda: of_zuko(F.MaskedAutoregressiveTransform(D, adjacency=graph(), **HIDDEN))),
    "zuko MAF, unreadable": Case(ZUKO, lambda: F.MAF(D, activation=partial(nn.PReLU, 20), **HIDDEN)),
    "zuko MAF, residual, unreadable": Case(
        ZUKO, lambda: F.MAF(D, hidden_features=(20, 20), activation=partial(nn.PReLU, 20), residual=True)
    ),
    "zuko MAF, mixture": Case(ZUKO, lambda: F.MAF(D, C, **MIXTURE, **HIDDEN), context=True),
    "zuko NSF": Case(ZUKO, lambda: F.NSF(D, **HIDDEN)),
    "zuko NSF, context, two passes": Case(ZUKO, lambda: F.NSF(D, C, passes=2, **HIDDEN), context=True),
    "zuko NCSF": Case(ZUKO, lambda: F.NCSF(D, **HIDDEN), span=(-3.0, 3.0)),
    "zuko SOSPF": Case(ZUKO, lambda: F.SOSPF(D, transforms=2, **HIDDEN)),
    "zuko BPF": Case(ZUKO, lambda: F.BPF(D, transforms=2, **HIDDEN)),
    "zuko NAF": Case(ZUKO, lambda: F.NAF(D, transforms=2, **HIDDEN), gradients=None),
    "zuko UNAF": Case(ZUKO, lambda: F.UNAF(D, C, transforms=2, **HIDDEN), context=True, gradients=None),
    "zuko RealNVP": Case(ZUKO, lambda: F.RealNVP(D, C, **HIDDEN), context=True),
    "zuko RealNVP, mixture": Case(ZUKO, lambda: F.RealNVP(D, **MIXTURE, **HIDDEN)),
    "zuko elementwise": Case(ZUKO, lambda: of_zuko(F.ElementWiseTransform(D))),
    "zuko elementwise, context": Case(ZUKO, lambda: of_zuko(F.ElementWiseTransform(D, C)), context=True),
    "zuko GF": Case(ZUKO, lambda: F.GF(D)),
    "nflows MAF": Case(NFLOWS, lambda: AR.MaskedAffineAutoregressiveTransform(D, 20)),
    "nflows MAF, context": Case(NFLOWS, lambda: AR.MaskedAffineAutoregressiveTransform(D, 20, C), context=True),
    "nflows MAF, feed-forward": Case(
        NFLOWS,
        lambda: AR.MaskedAffineAutoregressiveTransform(D, 20, C, use_residual_blocks=False, random_mask=True),
        context=True,
    ),
    "nflows MAF, batch norm": Case(
        NFLOWS,
        lambda: AR.MaskedAffineAutoregressiveTransform(D, 20, use_batch_norm=True, dropout_probability=0.3).eval(),
    ),
    "nflows MAF, feed-forward, batch norm": Case(
        NFLOWS,
        lambda: AR.MaskedAffineAutoregressiveTransform(D, 20, use_residual_blocks=False, use_batch_norm=True).eval(),
    ),
    "nflows MAF, unreadable": Case(
        NFLOWS, lambda: AR.MaskedAffineAutoregressiveTransform(D, 20, activation=nn.PReLU(20))
    ),
    "nflows MAF, softplus": Case(NFLOWS, lambda: AR.MaskedAffineAutoregressiveTransform(D, 20, activation=softplus)),
    # Its inverse adds 1e-6 to the last knot.
    "nflows linear spline": Case(
        NFLOWS, lambda: AR.MaskedPiecewiseLinearAutoregressiveTransform(5, D, 20), span=(0.0, 1.0), gradients=1e-4
    ),
    "nflows quadratic spline": Case(
        NFLOWS, lambda: AR.MaskedPiecewiseQuadraticAutoregressiveTransform(D, 20, num_bins=5), span=(0.0, 1.0)
    ),
    "nflows quadratic spline, tails": Case(
        NFLOWS,
        lambda: AR.MaskedPiecewiseQuadraticAutoregressiveTransform(D, 20, num_bins=5, tails="linear", tail_bound=2.0),
    ),
    "nflows cubic spline": Case(
        NFLOWS, lambda: AR.MaskedPiecewiseCubicAutoregressiveTransform(5, D, 20), span=(0.0, 1.0)
    ),
    "nflows rational spline": Case(
        NFLOWS, lambda: AR.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(D, 20, num_bins=5), span=(0.0, 1.0)
    ),
    "nflows rational spline, context, tails": Case(
        NFLOWS,
        lambda: AR.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(D, 20, C, tails="linear", tail_bound=2.0),
        context=True,
    ),
    "nflows coupling": Case(
        NFLOWS, lambda: nflows.transforms.AffineCouplingTransform([1, 0, 1, 0, 1, 0, 1], coupling_net)
    ),
    "nflows composite": Case(
        NFLOWS,
        lambda: nflows.transforms.CompositeTransform(
            [
                AR.MaskedAffineAutoregressiveTransform(D, 20),
                nflows.transforms.ReversePermutation(D),
                nflows.transforms.InverseTransform(AR.MaskedAffineAutoregressiveTransform(D, 20)),
            ]
        ),
    ),
    "normflows MAF": Case(NORMFLOWS, lambda: normflows.flows.MaskedAffineAutoregressive(D, 20)),
    "normflows MAF, context": Case(
        NORMFLOWS, lambda: normflows.flows.MaskedAffineAutoregressive(D, 20, C), context=True
    ),
    "normflows MAF, feed-forward": Case(
        NORMFLOWS,
        lambda: normflows.flows.MaskedAffineAutoregressive(D, 20, use_residual_blocks=False, random_mask=True),
    ),
    "normflows MAF, batch norm": Case(
        NORMFLOWS, lambda: normflows.flows.MaskedAffineAutoregressive(D, 20, use_batch_norm=True).eval()
    ),
    "normflows MAF, feed-forward, batch norm": Case(
        NORMFLOWS,
        lambda: normflows.flows.MaskedAffineAutoregressive(
            D, 20, use_residual_blocks=False, use_batch_norm=True
        ).eval(),
    ),
    "normflows MAF, unreadable": Case(
        NORMFLOWS, lambda: normflows.flows.MaskedAffineAutoregressive(D, 20, activation=nn.PReLU(20))
    ),
    "normflows MAF, periodic": Case(
        NORMFLOWS, lambda: preprocessed(PeriodicFeaturesElementwise(D, [1, 4], 0.7, bias=True, activation=nn.Tanh()))
    ),
    "normflows MAF, periodic, unreadable": Case(
        NORMFLOWS, lambda: preprocessed(PeriodicFeaturesElementwise(D, [1, 4], 0.7, activation=nn.PReLU(2)))
    ),
    "normflows MAF, preprocessed": Case(NORMFLOWS, lambda: preprocessed(nn.Tanh())),
    "normflows reversed MAF": Case(
        NORMFLOWS, lambda: normflows.flows.Reverse(normflows.flows.MaskedAffineAutoregressive(D, 20))
    ),
    "normflows spline": Case(
        NORMFLOWS,
        lambda: normflows.flows.AutoregressiveRationalQuadraticSpline(D, 2, 20, C, permute_mask=True),
        context=True,
    ),
    "normflows circular spline": Case(
        NORMFLOWS,
        lambda: normflows.flows.CircularAutoregressiveRationalQuadraticSpline(
            D, 2, 20, [1, 4], tail_bound=torch.tensor([3.0, 2.5, 3.0, 2.0, 2.5, 3.0, 3.0])
        ),
        span=(-1.95, 1.95),
    ),
    **{
        f"normflows coupling, {scale_map}": Case(
            NORMFLOWS,
            lambda scale_map=scale_map: normflows.flows.AffineCouplingBlock(
                normflows.nets.MLP([4, 20, 6]), scale_map=scale_map
            ),
        )
        for scale_map in ("exp", "sigmoid", "sigmoid_inv")
    },
    "normflows additive coupling": Case(
        NORMFLOWS, lambda: normflows.flows.AffineCouplingBlock(normflows.nets.MLP([4, 20, 3]), scale=False)
    ),
    "normflows masked affine": Case(
        NORMFLOWS,
        lambda: normflows.flows.MaskedAffineFlow(
            torch.tensor([1.0, 0, 1, 0, 1, 0, 1]), normflows.nets.MLP([D, 20, D]), normflows.nets.MLP([D, 20, D])
        ),
    ),
    "pyro affine": Case(PYRO, lambda: T.affine_autoregressive(D, [20, 20])),
    "pyro affine, skips": Case(PYRO, lambda: T.AffineAutoregressive(AutoRegressiveNN(D, [20, 30], **ARN))),
    "pyro affine, stable": Case(PYRO, lambda: T.affine_autoregressive(D, [20], stable=True)),
    "pyro affine, stable, bias": Case(PYRO, lambda: T.affine_autoregressive(D, [20], stable=True, sigmoid_bias=0.5)),
    "pyro affine, clipped": Case(
        PYRO, lambda: T.affine_autoregressive(D, [20], log_scale_min_clip=-0.2, log_scale_max_clip=0.1)
    ),
    "pyro affine, unreadable": Case(
        PYRO, lambda: T.AffineAutoregressive(AutoRegressiveNN(D, [20], nonlinearity=nn.PReLU(20)))
    ),
    "pyro affine, context": Case(PYRO, lambda: T.conditional_affine_autoregressive(D, C, [20]), context=True),
    "pyro affine, context, stable": Case(
        PYRO, lambda: T.conditional_affine_autoregressive(D, C, [20], stable=True), context=True
    ),
    "pyro spline": Case(PYRO, lambda: T.spline_autoregressive(D, [20], bound=1.5)),
    "pyro quadratic spline": Case(
        PYRO,
        lambda: T.SplineAutoregressive(D, AutoRegressiveNN(D, [20], param_dims=[8, 8, 7]), order="quadratic"),
    ),
    "pyro spline, context": Case(PYRO, lambda: T.conditional_spline_autoregressive(D, C, [20]), context=True),
    # Pyro adds 1e-8 to the slopes in its log-det.
    "pyro neural": Case(PYRO, lambda: T.neural_autoregressive(D, [20], width=8), logdet=1e-6, inverts=False),
    "pyro neural, context": Case(
        PYRO, lambda: T.conditional_neural_autoregressive(D, C, [20], width=8), context=True, logdet=1e-6, inverts=False
    ),
    "pyro coupling": Case(PYRO, lambda: T.affine_coupling(D, [20])),
    "pyro coupling, context": Case(PYRO, lambda: T.conditional_affine_coupling(D, C, [20]), context=True),
    "pyro compose": Case(
        PYRO,
        lambda: T.ComposeTransformModule(
            [T.affine_autoregressive(D, [20]), T.permute(D), T.spline_autoregressive(D, [20])]
        ),
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
one_of_each = pytest.mark.parametrize(
    "case",
    [CASES[name] for name in ("zuko MAF", "nflows MAF", "normflows MAF", "pyro affine")],
    ids=["zuko", "nflows", "normflows", "pyro"],
)


def made(case, seed=0):
    """The library's flow with random weights and statistics, and the accelerated one."""
    torch.manual_seed(seed)
    flow = case.make().to(DEVICE)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for module in flow.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return flow, case.peer.accelerate(flow)


def inputs(case, *shape, seed=1):
    """Points that the flow maps, and contexts."""
    x = draw(seed, *shape, D).to(DEVICE)
    if case.span:
        low, high = case.span
        x = low + (high - low) * torch.sigmoid(2 * x)
    return x, draw(seed + 1, *shape, C).to(DEVICE) if case.context else None


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def both_ways(case, ours, library, x, c):
    forward, inverse = case.peer.forward, case.peer.inverse
    expected = forward(library, x, c)
    yield forward(ours, x, c), expected
    if case.inverts:
        yield inverse(ours, expected[0], c), inverse(library, expected[0], c)
