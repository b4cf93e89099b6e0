"""Accelerated flows of other libraries: zuko's contract of a transform, and equality with the library."""

import copy
import pickle

import normflows
import pytest
import torch

from flow_cases import (
    CASES,
    FEW,
    MANY,
    NFLOWS,
    NORMFLOWS,
    PYRO,
    ZUKO,
    C,
    D,
    both_ways,
    close,
    every_case,
    inputs,
    made,
    one_of_each,
)
from helpers import DEVICE, draw
from tarflow_kernels import adapters
from tarflow_kernels.adapters import normflows as normflows_adapter

pytestmark = pytest.mark.usefixtures("step_by_step", "double_precision")


@every_case
def test_the_inverse_undoes_the_map_and_its_logdet(case):
    _, flow = made(case)
    x, c = inputs(case, MANY)
    y, logdet = case.peer.forward(flow, x, c)
    back, inverse_logdet = case.peer.inverse(flow, y.detach(), c)
    close(back, x, 1e-5)  # bisection is content with 1e-6
    close(inverse_logdet, -logdet, 1e-4)
    assert y.shape == x.shape
    assert logdet.shape == x.shape[:-1] == inverse_logdet.shape


@every_case
def test_the_logdet_is_that_of_the_jacobian(case):
    _, flow = made(case)
    x, c = inputs(case, 1)
    _, logdet = case.peer.forward(flow, x, c)
    jacobian = torch.autograd.functional.jacobian(lambda x: case.peer.forward(flow, x, c)[0], x).view(D, D)
    close(torch.linalg.slogdet(jacobian).logabsdet, logdet[0], 1e-8)


@every_case
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_it_equals_the_library(case, rows):
    library, ours = made(case)
    x, c = inputs(case, rows)
    with torch.no_grad():
        for (value, logdet), (expected, expected_logdet) in both_ways(case, ours, library, x, c):
            close(value, expected)
            close(logdet, expected_logdet, 1e-10 + case.logdet)


@every_case
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_it_equals_the_library_in_single_precision(case, rows):
    """To 1e-5, or to as much as the library itself is off where a spline loses more."""
    exact, _ = made(case)
    torch.set_default_dtype(torch.float32)
    library = copy.deepcopy(exact).float()
    ours = case.peer.accelerate(library)
    x, c = inputs(case, rows)
    single = [None if tensor is None else tensor.float() for tensor in (x, c)]
    with torch.no_grad():
        pairs = [*both_ways(case, ours, library, *single)]
        torch.set_default_dtype(torch.float64)
        for (mine, theirs), (_, truth) in zip(pairs, both_ways(case, exact, exact, x, c), strict=True):
            for value, expected, right in zip(mine, theirs, truth, strict=True):
                assert value.dtype == torch.float32
                lost = (expected - right).abs().max().item()
                close(value.double(), right, 1e-5 + case.logdet + 8 * lost)


@every_case
def test_gradients_in_every_input_equal_the_librarys(case):
    library, ours = made(case)
    x, c = inputs(case, FEW)
    y = case.peer.forward(library, x, c)[0].detach()
    parameters = [*library.parameters()]
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    directions = [(case.peer.forward, x)]
    if case.inverts and case.gradients:
        directions.append((case.peer.inverse, y))
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
    y = case.peer.forward(flow, x, c)[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: case.peer.inverse(flow, y, c), y)


@pytest.mark.parametrize("name", ["zuko MAF", "zuko NAF", "zuko UNAF", "pyro neural"])
def test_gradients_of_the_inverse_in_its_parameters_are_those_of_differences(name):
    """Of bisection, which is content with 1e-6, zuko's own are off by a few percent and more."""
    case = CASES[name]
    _, flow = made(case)
    x, c = inputs(case, 2)
    y = case.peer.forward(flow, x, c)[0].detach()
    parameters = [*flow.parameters()]
    directions = [torch.randn_like(parameter) for parameter in parameters]

    def objective(step):
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=step)
        value, logdet = case.peer.inverse(flow, y, c)
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
        for (value, logdet), (expected, expected_logdet) in both_ways(case, ours, library, x, c):
            assert logdet.shape == expected_logdet.shape == shape
            close(value, expected)
            close(logdet, expected_logdet)


@pytest.mark.parametrize("name", ["zuko MAF, context", "zuko RealNVP", "pyro affine, context", "pyro spline, context"])
def test_contexts_broadcast_in_zuko_and_pyro(name):
    case = CASES[name]
    library, ours = made(case)
    for x_shape, c_shape in [((4,), ()), ((2, 3), (3,))]:
        (x, _), (_, c) = inputs(case, *x_shape), inputs(case, *c_shape)
        with torch.no_grad():
            for run in (case.peer.forward, case.peer.inverse):
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
    assert case.peer is PYRO or repr(ours) == repr(library)


@one_of_each
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_weights_may_be_trained_loaded_and_moved(case, rows):
    library, ours = made(case)
    twin = copy.deepcopy(ours).to(DEVICE, torch.float64)
    x, c = inputs(case, rows)
    y = case.peer.forward(library, x, c)[0].detach()
    case.peer.inverse(ours, y, c)[0].sum().backward()
    torch.optim.SGD(ours.parameters(), lr=0.1).step()
    close(case.peer.inverse(ours, y, c)[0], case.peer.inverse(library, y, c)[0])
    other, _ = made(case, seed=1)
    ours.load_state_dict(other.state_dict())
    close(case.peer.inverse(ours, y, c)[0], case.peer.inverse(other, y, c)[0])
    twin.load_state_dict(other.state_dict())
    close(case.peer.inverse(twin, y, c)[0], case.peer.inverse(other, y, c)[0])


@one_of_each
def test_it_pickles(case):
    _, ours = made(case)
    x, c = inputs(case, MANY)
    twin = pickle.loads(pickle.dumps(ours))
    assert type(twin) is type(ours)
    close(case.peer.inverse(twin, x, c)[0], case.peer.inverse(ours, x, c)[0])


@one_of_each
def test_it_compiles(case):
    library, ours = made(case)
    x, c = inputs(case, MANY)
    for run in (case.peer.forward, case.peer.inverse):
        with torch.no_grad():
            compiled = torch.compile(lambda x, run=run: run(ours, x, c), backend="aot_eager")
            for value, expected in zip(compiled(x), run(library, x, c), strict=True):
                close(value, expected)


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
