"""Accelerated flows of zuko, nflows, normflows and Pyro: zuko's contract of a transform, and equality with the library.

One table holds every map of every adapter. Its flows have random weights, are in double precision unless a test says
otherwise, and are looked at through one pair of functions whatever the library: both return a value and the log-det
of the map that they ran.
"""

import copy
import pickle
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
from pyro.nn import AutoRegressiveNN
from torch import nn
from torch.nn.functional import softplus

from helpers import DEVICE, draw
from tarflow_kernels import adapters, incremental
from tarflow_kernels.adapters import common
from tarflow_kernels.adapters import nflows as nflows_adapter
from tarflow_kernels.adapters import normflows as normflows_adapter
from tarflow_kernels.adapters import pyro as pyro_adapter
from tarflow_kernels.adapters import zuko as zuko_adapter

D, C = 7, 3
FEW, MANY = 3, incremental._FEW_ROWS + 1
AR = nflows.transforms.autoregressive
T = pyro.distributions.transforms
F = zuko.flows


@dataclass(frozen=True)
class Library:
    """How flows of a library are called; both functions return a value and a log-det."""

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
    """A flow: its library, how it is made, and of what it is a map.

    Attributes:
        context: whether it takes one, of C numbers.
        unit: whether its points are drawn from the unit cube, for one that does not map all of space.
        logdet: how far the library's log-det may be off.
        gradients: how far the gradients of its inverse may be off; None where they are off for good.
        inverts: whether the library can invert it.
    """

    library: Library
    make: Callable[[], nn.Module]
    context: bool = False
    unit: bool = False
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
    "zuko MAF, mixture": Case(ZUKO, lambda: F.MAF(D, C, **MIXTURE, **HIDDEN), context=True),
    "zuko NSF": Case(ZUKO, lambda: F.NSF(D, **HIDDEN)),
    "zuko NSF, context, two passes": Case(ZUKO, lambda: F.NSF(D, C, passes=2, **HIDDEN), context=True),
    "zuko NCSF": Case(ZUKO, lambda: F.NCSF(D, **HIDDEN), unit=True),
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
    "nflows MAF, softplus": Case(NFLOWS, lambda: AR.MaskedAffineAutoregressiveTransform(D, 20, activation=softplus)),
    # Its inverse adds 1e-6 to the last knot.
    "nflows linear spline": Case(
        NFLOWS, lambda: AR.MaskedPiecewiseLinearAutoregressiveTransform(5, D, 20), unit=True, gradients=1e-4
    ),
    "nflows quadratic spline": Case(
        NFLOWS, lambda: AR.MaskedPiecewiseQuadraticAutoregressiveTransform(D, 20, num_bins=5), unit=True
    ),
    "nflows quadratic spline, tails": Case(
        NFLOWS,
        lambda: AR.MaskedPiecewiseQuadraticAutoregressiveTransform(D, 20, num_bins=5, tails="linear", tail_bound=2.0),
    ),
    "nflows cubic spline": Case(NFLOWS, lambda: AR.MaskedPiecewiseCubicAutoregressiveTransform(5, D, 20), unit=True),
    "nflows rational spline": Case(
        NFLOWS, lambda: AR.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(D, 20, num_bins=5), unit=True
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
        unit=True,
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
    "pyro affine, context": Case(PYRO, lambda: T.conditional_affine_autoregressive(D, C, [20]), context=True),
    "pyro affine, context, stable": Case(
        PYRO, lambda: T.conditional_affine_autoregressive(D, C, [20], stable=True), context=True
    ),
    "pyro spline": Case(PYRO, lambda: T.spline_autoregressive(D, [20])),
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


@pytest.fixture(autouse=True)
def step_by_step(monkeypatch):
    """No problem of more than a few rows is too small for it."""
    monkeypatch.setattr(incremental, "_FEW_PRODUCTS", 0)


@pytest.fixture(autouse=True)
def double_precision():
    """Pyro's inverse of an affine transform works in the default precision alone."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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
    return flow, case.library.accelerate(flow)


def inputs(case, *shape, seed=1):
    """Points that the flow maps, and contexts."""
    x = draw(seed, *shape, D).to(DEVICE)
    return (torch.sigmoid(x) if case.unit else x), draw(seed + 1, *shape, C).to(DEVICE) if case.context else None


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@every_case
def test_the_inverse_undoes_the_map_and_its_logdet(case):
    _, flow = made(case)
    x, c = inputs(case, MANY)
    y, logdet = case.library.forward(flow, x, c)
    back, inverse_logdet = case.library.inverse(flow, y.detach(), c)
    close(back, x, 1e-5)  # bisection is content with 1e-6
    close(inverse_logdet, -logdet, 1e-4)
    assert y.shape == x.shape
    assert logdet.shape == x.shape[:-1] == inverse_logdet.shape


@every_case
def test_the_logdet_is_that_of_the_jacobian(case):
    _, flow = made(case)
    x, c = inputs(case, 1)
    _, logdet = case.library.forward(flow, x, c)
    jacobian = torch.autograd.functional.jacobian(lambda x: case.library.forward(flow, x, c)[0], x).view(D, D)
    close(torch.linalg.slogdet(jacobian).logabsdet, logdet[0], 1e-8)


@every_case
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_it_equals_the_library(case, rows):
    library, ours = made(case)
    x, c = inputs(case, rows)
    with torch.no_grad():
        for (value, logdet), (expected, expected_logdet) in _both_ways(case, ours, library, x, c):
            close(value, expected)
            close(logdet, expected_logdet, 1e-10 + case.logdet)


@every_case
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_it_equals_the_library_in_single_precision(case, rows):
    """To 1e-5, or to as much as the library itself is off where a spline loses more."""
    exact, _ = made(case)
    torch.set_default_dtype(torch.float32)
    library = copy.deepcopy(exact).float()
    ours = case.library.accelerate(library)
    x, c = inputs(case, rows)
    single = [None if tensor is None else tensor.float() for tensor in (x, c)]
    with torch.no_grad():
        pairs = [*_both_ways(case, ours, library, *single)]
        torch.set_default_dtype(torch.float64)
        for (mine, theirs), (_, truth) in zip(pairs, _both_ways(case, exact, exact, x, c), strict=True):
            for value, expected, right in zip(mine, theirs, truth, strict=True):
                assert value.dtype == torch.float32
                lost = (expected - right).abs().max().item()
                close(value.double(), right, 1e-5 + case.logdet + 8 * lost)


def _both_ways(case, ours, library, x, c):
    forward, inverse = case.library.forward, case.library.inverse
    expected = forward(library, x, c)
    yield forward(ours, x, c), expected
    if case.inverts:
        yield inverse(ours, expected[0], c), inverse(library, expected[0], c)


@every_case
def test_gradients_in_every_input_equal_the_librarys(case):
    library, ours = made(case)
    x, c = inputs(case, FEW)
    y = case.library.forward(library, x, c)[0].detach()
    parameters = [*library.parameters()]
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    directions = [(case.library.forward, x)]
    if case.inverts and case.gradients:
        directions.append((case.library.inverse, y))
    for run, given in directions:
        mine, theirs = (_gradients(run, flow, given, c, parameters) for flow in (ours, library))
        for gradient, expected in zip(mine, theirs, strict=True):
            close(gradient, expected, case.gradients or 1e-6)


def _gradients(run, flow, given, c, parameters):
    given = given.clone().requires_grad_()
    c = None if c is None else c.clone().requires_grad_()
    value, logdet = run(flow, given, c)
    wanted = [given, *([] if c is None else [c]), *parameters]
    found = torch.autograd.grad(value.pow(3).sum() + logdet.sum(), wanted, allow_unused=True)
    return [torch.zeros_like(tensor) if grad is None else grad for tensor, grad in zip(wanted, found, strict=True)]


@pytest.mark.parametrize(
    "name", ["zuko MAF", "nflows rational spline, context, tails", "pyro neural", "pyro neural, context"]
)
def test_gradients_of_the_inverse_are_those_of_differences(name):
    case = CASES[name]
    _, flow = made(case)
    x, c = inputs(case, 2)
    y = case.library.forward(flow, x, c)[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: case.library.inverse(flow, y, c), y)


@pytest.mark.parametrize("name", ["zuko MAF", "zuko NAF", "zuko UNAF", "pyro neural"])
def test_gradients_of_the_inverse_in_its_parameters_are_those_of_differences(name):
    """Of bisection, which is content with 1e-6, zuko's own are off by a few percent and more."""
    case = CASES[name]
    _, flow = made(case)
    x, c = inputs(case, 2)
    y = case.library.forward(flow, x, c)[0].detach()
    parameters = [*flow.parameters()]
    directions = [torch.randn_like(parameter) for parameter in parameters]

    def objective(step):
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=step)
        value, logdet = case.library.inverse(flow, y, c)
        return value.pow(3).sum() + logdet.sum()

    found = torch.autograd.grad(objective(0.0), parameters)
    along = sum((gradient * direction).sum() for gradient, direction in zip(found, directions, strict=True))
    step = 2e-4
    difference = (objective(step) - objective(-2 * step)) / (2 * step)
    close(along, difference.detach(), 1e-2)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("zuko")])
def test_zukos_compound_call_is_its_two_calls(name):
    case = CASES[name]
    _, flow = made(case)
    x, c = inputs(case, FEW)
    transform = flow(c).transform
    y, logdet = transform.call_and_ladj(x)
    assert torch.equal(y, transform(x))
    assert torch.equal(logdet, transform.log_abs_det_jacobian(x, y))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize(
    "name", ["zuko MAF, context", "zuko NSF", "zuko RealNVP", "zuko elementwise", "pyro affine", "pyro spline"]
)
def test_batch_dimensions_are_free_in_zuko_and_pyro(name, shape):
    case = CASES[name]
    library, ours = made(case)
    x, c = inputs(case, *shape)
    if name == "pyro spline" and shape == ():
        pytest.skip("Pyro's own spline takes no single vector")
    with torch.no_grad():
        for (value, logdet), (expected, expected_logdet) in _both_ways(case, ours, library, x, c):
            assert logdet.shape == expected_logdet.shape == shape
            close(value, expected)
            close(logdet, expected_logdet)


def test_zukos_contexts_broadcast():
    case = CASES["zuko MAF, context"]
    library, ours = made(case)
    for x_shape, c_shape in [((4,), ()), ((2, 3), (3,))]:
        (x, _), (_, c) = inputs(case, *x_shape), inputs(case, *c_shape)
        with torch.no_grad():
            for run in (zuko_forward, zuko_inverse):
                for value, expected in zip(run(ours, x, c), run(library, x, c), strict=True):
                    close(value, expected)


@every_case
def test_state_and_flow_are_left_as_they_are(case):
    library, ours = made(case)
    types = [type(module) for module in library.modules()]
    assert list(ours.state_dict()) == list(library.state_dict())
    assert all(a is b for a, b in zip(ours.parameters(), library.parameters(), strict=True))
    assert types == [type(module) for module in library.modules()]
    assert type(ours).__module__.startswith(adapters.__name__) or type(ours) is type(library)
    assert isinstance(ours, type(library))
    assert case.library is PYRO or repr(ours) == repr(library)


@one_of_each
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_weights_may_be_trained_loaded_and_moved(case, rows):
    library, ours = made(case)
    twin = copy.deepcopy(ours).to(DEVICE, torch.float64)
    x, c = inputs(case, rows)
    y = case.library.forward(library, x, c)[0].detach()
    case.library.inverse(ours, y, c)[0].sum().backward()
    torch.optim.SGD(ours.parameters(), lr=0.1).step()
    close(case.library.inverse(ours, y, c)[0], case.library.inverse(library, y, c)[0])
    other, _ = made(case, seed=1)
    ours.load_state_dict(other.state_dict())
    close(case.library.inverse(ours, y, c)[0], case.library.inverse(other, y, c)[0])
    twin.load_state_dict(other.state_dict())
    close(case.library.inverse(twin, y, c)[0], case.library.inverse(other, y, c)[0])


@one_of_each
def test_it_pickles(case):
    _, ours = made(case)
    x, c = inputs(case, MANY)
    twin = pickle.loads(pickle.dumps(ours))
    assert type(twin) is type(ours)
    close(case.library.inverse(twin, x, c)[0], case.library.inverse(ours, x, c)[0])


@one_of_each
def test_it_compiles(case):
    library, ours = made(case)
    x, c = inputs(case, MANY)
    for run in (case.library.forward, case.library.inverse):
        with torch.no_grad():
            compiled = torch.compile(lambda x, run=run: run(ours, x, c), backend="aot_eager")
            for value, expected in zip(compiled(x), run(library, x, c), strict=True):
                close(value, expected)


def test_masks_that_are_loaded_are_read():
    """Of random masks two flows of one make have different ones."""
    case = CASES["nflows MAF, feed-forward"]
    (_, ours), (other, _) = made(case, seed=0), made(case, seed=1)
    x, c = inputs(case, MANY)
    with torch.no_grad():
        case.library.inverse(ours, x, c)
        ours.load_state_dict(other.state_dict())
        close(case.library.inverse(ours, x, c)[0], case.library.inverse(other, x, c)[0])


def test_random_networks_are_inverted_as_the_library_does():
    """With dropout, or the statistics of a batch, no two passes are alike: D of them are made."""
    flow = AR.MaskedAffineAutoregressiveTransform(D, 20, dropout_probability=0.5, use_batch_norm=True).to(DEVICE)
    ours = nflows_adapter.accelerate(flow)
    results = []
    for each in (flow, ours):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(each.inverse(draw(1, MANY, D).to(DEVICE))[0])
    close(results[1], results[0])


@one_of_each
def test_hooks_are_not_passed_by(case):
    """Such as those of weight normalization, which make the weight of a layer when it is called."""
    library, ours = made(case)
    for module in (*library.modules(), *ours.modules()):
        if hasattr(module, "mask"):
            module.register_forward_hook(lambda module, args, out: 0.5 * out)
    x, c = inputs(case, MANY)
    with torch.no_grad():
        close(case.library.inverse(ours, x, c)[0], case.library.inverse(library, x, c)[0])


@one_of_each
def test_low_precision_stays_low(case):
    """As in the library: of the next layer's input, and of what comes back, to some of its roundings."""
    exact, _ = made(case)
    torch.set_default_dtype(torch.bfloat16)
    library = copy.deepcopy(exact).bfloat16()
    ours = case.library.accelerate(library)
    x, _ = inputs(case, MANY)
    with torch.no_grad():
        for pair in _both_ways(case, ours, library, x.bfloat16(), None):
            for value, expected in zip(*pair, strict=True):
                assert value.dtype == expected.dtype == torch.bfloat16
                close(value.double(), expected.double(), 0.3)


def test_only_known_functions_pass_for_elementwise():
    like = torch.zeros(1)
    assert all(common.is_elementwise(f, like) for f in (torch.relu, torch.tanh, nn.GELU(), nn.PReLU(), lambda x: x * 3))
    functions = (
        nn.PReLU(3),
        nn.Softmax(-1),
        nn.LayerNorm(3),
        nn.BatchNorm1d(3),
        nn.Dropout(),
        torch.sort,
        lambda x: x - x.mean(),
        lambda x: x.cumsum(0),
    )
    assert not any(common.is_elementwise(f, like) for f in functions)


def test_pyros_distributions_are_accelerated_whole():
    base = pyro.distributions.Normal(torch.zeros(D, device=DEVICE), 1.0).to_event(1)
    parts = [T.affine_autoregressive(D, [20]).to(DEVICE), T.permute(D), T.spline_autoregressive(D, [20]).to(DEVICE).inv]
    library = pyro.distributions.TransformedDistribution(base, parts)
    ours = pyro_adapter.accelerate(library)
    x = draw(0, MANY, D).to(DEVICE)
    with torch.no_grad():
        close(ours.log_prob(x.clone()), library.log_prob(x.clone()))
    conditional = pyro.distributions.ConditionalTransformedDistribution(
        base, [T.conditional_affine_autoregressive(D, C, [20]).to(DEVICE), parts[0]]
    )
    c = draw(1, MANY, C).to(DEVICE)
    ours = pyro_adapter.accelerate(conditional)
    with torch.no_grad():
        close(ours.condition(c).log_prob(x.clone()), conditional.condition(c).log_prob(x.clone()))


def test_pyros_other_neural_transforms_stay():
    flow = T.neural_autoregressive(D, [20], activation="ELU")
    assert type(pyro_adapter.accelerate(flow)) is type(flow)
    wide = T.neural_autoregressive(D, [20], width=65)
    assert type(pyro_adapter.accelerate(wide)) is type(wide)


def test_a_flow_that_was_used_can_be_accelerated():
    """Pyro's transforms keep what they computed, with its graph."""
    library = T.affine_autoregressive(D, [20])
    x = draw(0, MANY, D)
    y = library(x)
    ours = pyro_adapter.accelerate(library)
    close(ours.log_abs_det_jacobian(x, y), library.log_abs_det_jacobian(x, y))


@pytest.mark.parametrize("library", [ZUKO, NFLOWS, NORMFLOWS, PYRO])
def test_what_is_no_flow_is_named(library):
    with pytest.raises(TypeError, match=r"flow: expected .*; got str"):
        library.accelerate("MAF")


def test_samples_and_densities_of_whole_flows():
    """By the calls that a user makes: of one seed, the same samples."""
    c = draw(0, C).to(DEVICE)
    library, ours = made(CASES["zuko MAF, context"])
    samples = []
    for flow in (library, ours):
        torch.manual_seed(0)
        samples.append(flow(c).sample((MANY,)))
    close(samples[1], samples[0])
    close(ours(c).log_prob(samples[0]), library(c).log_prob(samples[0]))
    model = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(D), [made(CASES["normflows MAF"])[0]]).to(
        DEVICE
    )
    fast = normflows_adapter.accelerate(model)
    close(fast.log_prob(samples[0]), model.log_prob(samples[0]))
