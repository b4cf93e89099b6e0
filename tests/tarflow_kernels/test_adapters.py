"""Accelerated flows of other libraries: zuko's contract of a transform, equality with the library, and edge cases."""

import copy
import math
import pickle
from functools import partial

import normflows
import pyro.distributions
import pytest
import torch
import zuko
from torch import nn

from flow_cases import (
    AR,
    CASES,
    FEW,
    MANY,
    NFLOWS,
    NORMFLOWS,
    PYRO,
    ZUKO,
    C,
    D,
    T,
    both_ways,
    close,
    every_case,
    inputs,
    made,
    one_of_each,
    pyro_forward,
    pyro_inverse,
)
from helpers import DEVICE, draw
from tarflow_kernels import adapters, scales
from tarflow_kernels.adapters import common
from tarflow_kernels.adapters import nflows as nflows_adapter
from tarflow_kernels.adapters import normflows as normflows_adapter
from tarflow_kernels.adapters import pyro as pyro_adapter
from tarflow_kernels.adapters import zuko as zuko_adapter

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
    """Zuko's own are off by a few percent and more: its bisection is content with 1e-6."""
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
    """The calls that a user makes give the same samples from one seed."""
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


# Flows that are frozen, hooked, subclassed, random or extreme ---------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["zuko MAF, context", "nflows MAF, context", "normflows MAF, context", "pyro affine, context"]
)
@pytest.mark.parametrize("wanted", ["y", "context"])
def test_flows_may_be_frozen(name, wanted):
    """Gradients are then asked of what goes in alone."""
    case = CASES[name]
    library, ours = made(case)
    library.requires_grad_(False)
    y, c = inputs(case, FEW)
    asked = (y if wanted == "y" else c).requires_grad_()
    mine, theirs = (
        torch.autograd.grad(case.peer.inverse(flow, y, c)[0].pow(3).sum(), asked) for flow in (ours, library)
    )
    close(mine[0], theirs[0])


@one_of_each
def test_the_inverse_is_differentiable_once(case):
    _, ours = made(case)
    y = inputs(case, FEW)[0].requires_grad_()
    x, _ = case.peer.inverse(ours, y, None)
    (gradient,) = torch.autograd.grad(x.sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        gradient.sum().backward()


@one_of_each
def test_networks_of_other_classes_are_called(case):
    """Whatever theirs do; and subclasses of transforms stay as they are."""
    library, _ = made(case)
    for module in library.modules():
        for name in ("hyper", "autoregressive_net", "arn"):
            network = vars(module).get("_modules", {}).get(name)
            if network is not None:
                kind = type(network)
                network.__class__ = type("Halved", (kind,), {"forward": _halved(kind)})
    ours = case.peer.accelerate(library)
    y, c = inputs(case, MANY)
    with torch.no_grad():
        close(case.peer.inverse(ours, y, c)[0], case.peer.inverse(library, y, c)[0])


def _halved(kind):
    def forward(self, *args, **kwargs):
        made = kind.forward(self, *args, **kwargs)
        return 0.5 * made if isinstance(made, torch.Tensor) else tuple(0.5 * part for part in made)

    return forward


@one_of_each
def test_subclasses_of_transforms_stay(case):
    library = case.make()
    for module in library.modules():
        if case.peer.accelerate(module) is not module and type(case.peer.accelerate(module)) is not type(module):
            module.__class__ = type("Mine", (type(module),), {})
    assert [type(module) for module in case.peer.accelerate(library).modules()] == [type(m) for m in library.modules()]


def test_masks_that_are_loaded_are_read():
    """Two flows with random masks have different ones."""
    case = CASES["nflows MAF, feed-forward"]
    (_, ours), (other, _) = made(case, seed=0), made(case, seed=1)
    x, c = inputs(case, MANY)
    with torch.no_grad():
        case.peer.inverse(ours, x, c)
        ours.load_state_dict(other.state_dict())
        close(case.peer.inverse(ours, x, c)[0], case.peer.inverse(other, x, c)[0])


@pytest.mark.parametrize("options", [{"dropout_probability": 0.5}, {"use_batch_norm": True}])
def test_random_networks_are_inverted_as_the_library_does(options):
    """No two passes are alike with dropout, or the statistics of a batch: D of them are made."""
    flow = AR.MaskedAffineAutoregressiveTransform(D, 20, **options).to(DEVICE)
    ours = nflows_adapter.accelerate(flow)
    results = []
    for each in (flow, ours):
        torch.manual_seed(0)
        with torch.no_grad():
            results.append(each.inverse(draw(1, MANY, D).to(DEVICE))[0])
    close(results[1], results[0])


@one_of_each
@pytest.mark.parametrize("before", [False, True])
def test_hooks_are_not_passed_by(case, before):
    """Such as those of weight normalization, which make the weight of a layer when it is called."""
    library, ours = made(case)
    for module in (*library.modules(), *ours.modules()):
        if hasattr(module, "mask") and before:
            module.register_forward_pre_hook(lambda module, args: 0.5 * args[0])
        elif hasattr(module, "mask"):
            module.register_forward_hook(lambda module, args, out: 0.5 * out)
    x, c = inputs(case, MANY)
    with torch.no_grad():
        close(case.peer.inverse(ours, x, c)[0], case.peer.inverse(library, x, c)[0])


@pytest.mark.parametrize(
    "name", ["zuko MAF", "zuko RealNVP, mixture", "nflows MAF", "normflows MAF", "pyro affine", "pyro neural"]
)
def test_low_precision_stays_low(name):
    """The next layer's input and what comes back are as in the library, to some of its roundings."""
    case = CASES[name]
    exact, _ = made(case)
    torch.set_default_dtype(torch.bfloat16)
    library = copy.deepcopy(exact).bfloat16()
    ours = case.peer.accelerate(library)
    x, _ = inputs(case, MANY)
    with torch.no_grad():
        for pair in both_ways(case, ours, library, x.bfloat16(), None):
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


@pytest.mark.parametrize(
    "scale",
    [
        scales.EXP,
        scales.softclip(3.0),
        scales.softplus(0.0),
        scales.softplus(1.0),
        scales.sigmoid(2.0),
        scales.sigmoid(1.0, 0.0),
        scales.clamp(-1.0, 2.0),
        scales.tanh(2.0),
    ],
)
def test_a_step_of_an_affine_map_is_that_of_the_kernel(scale):
    y, mu = draw(0, 50, 1), draw(1, 50, 1)
    alpha = torch.linspace(-8, 25, 50)[:, None]
    close(common.affine_inverse_of(y, mu, alpha, scale), common.affine_forward(y, mu, alpha, scale=scale)[0], 1e-12)


@pytest.mark.parametrize("name", ["nflows rational spline", "normflows spline"])
def test_splines_may_write_to_their_parameters(name):
    """They do where their network says how wide it is."""
    case = CASES[name]
    library, _ = made(case)
    for module in library.modules():
        if hasattr(module, "autoregressive_net"):
            module.autoregressive_net.hidden_features = 20
    ours = case.peer.accelerate(library)
    for rows in (1, FEW, MANY):
        x, c = inputs(case, rows)
        with torch.no_grad():
            for (value, logdet), (expected, expected_logdet) in both_ways(case, ours, library, x, c):
                close(value, expected)
                close(logdet, expected_logdet)


def test_zukos_affine_univariates_are_known_by_their_slope_alone():
    affine = zuko.transforms.MonotonicAffineTransform
    known = zuko_adapter.affine_activation
    assert known(affine) == known(partial(affine)) == scales.softclip(-math.log(1e-3))
    assert known(partial(affine, slope=0.5)) == scales.softclip(math.log(2))
    others = partial(affine, torch.zeros(1)), partial(affine, cache_size=1), zuko.transforms.MonotonicRQSTransform
    assert not any(map(known, others))


def test_mixture_parameters_broadcast_and_increase():
    parameters = draw(0, 3, 4)
    transform = zuko_adapter.MixtureTransform(*parameters)
    x = torch.linspace(-3, 3, 20)
    y, ladj = transform.call_and_ladj(x)
    assert y.shape == ladj.shape == x.shape
    assert transform.sign == 1
    assert (y.diff() > 0).all()
    close(transform.inv(y), x)


def test_normflows_own_errors_and_infinities_stay():
    unknown = normflows.flows.AffineCoupling(nn.Identity(), scale_map="cube")
    with pytest.raises(NotImplementedError, match="scale map"):
        normflows_adapter.accelerate(unknown)([torch.zeros(2, 4), torch.zeros(2, 2)])
    library = normflows.flows.MaskedAffineFlow(torch.tensor([1.0, 0.0]), s=nn.Threshold(0.0, torch.inf))
    ours = normflows_adapter.accelerate(library)
    for run in ("forward", "inverse"):
        for value, expected in zip(
            getattr(ours, run)(-torch.ones(3, 2)), getattr(library, run)(-torch.ones(3, 2)), strict=True
        ):
            assert value.isnan().tolist() == expected.isnan().tolist()


def test_pyros_couplings_split_any_dimension():
    library = T.affine_coupling([D, 4], [64], dim=-2)
    ours, x = pyro_adapter.accelerate(library), draw(0, 2, 5, D, 4)
    with torch.no_grad():
        for run in (pyro_forward, pyro_inverse):
            for value, expected in zip(run(ours, x, None), run(library, x, None), strict=True):
                close(value, expected)


@pytest.mark.parametrize("slope", [-60.0, -10.0, 2000.0])
def test_pyros_neural_slopes_may_be_flat_or_steep(slope):
    library = T.neural_autoregressive(D, [20], width=8)
    with torch.no_grad():
        library.arn.layers[-1].bias[: 8 * D] += slope
    ours, x = pyro_adapter.accelerate(library), 1e-3 * draw(0, MANY, D)
    with torch.no_grad():
        (y, logdet), (expected, _) = pyro_forward(ours, x, None), pyro_forward(library, x, None)
        close(y, expected, 1e-8)
        assert logdet.isfinite().all()
        if slope > -60:  # where it is flat, other x have all but the same y
            back, inverse_logdet = pyro_inverse(ours, y, None)
            again, logdet = pyro_forward(ours, back, None)
            close(again, y, 1e-8)
            close(inverse_logdet, -logdet, 1e-6)


def test_pyros_distributions_are_accelerated_whole():
    base = pyro.distributions.Normal(torch.zeros(D, device=DEVICE), 1.0).to_event(1)
    parts = [T.affine_autoregressive(D, [20]).to(DEVICE), T.permute(D), T.spline_autoregressive(D, [20]).to(DEVICE).inv]
    library = pyro.distributions.TransformedDistribution(base, parts)
    ours = pyro_adapter.accelerate(library)
    assert [type(part).__module__ for part in (ours.transforms[0], ours.transforms[2].inv)] == [
        pyro_adapter.__name__
    ] * 2
    x = draw(0, MANY, D).to(DEVICE)
    with torch.no_grad():
        close(ours.log_prob(x.clone()), library.log_prob(x.clone()))
    composed = pyro_adapter.accelerate(torch.distributions.ComposeTransform(parts))
    assert type(composed.parts[0]).__module__ == pyro_adapter.__name__
    conditional = pyro.distributions.ConditionalTransformedDistribution(
        base, [T.conditional_affine_autoregressive(D, C, [20]).to(DEVICE), parts[0]]
    )
    c = draw(1, MANY, C).to(DEVICE)
    ours = pyro_adapter.accelerate(conditional)
    assert type(ours.condition(c).transforms[1]).__module__ == pyro_adapter.__name__
    with torch.no_grad():
        close(ours.condition(c).log_prob(x.clone()), conditional.condition(c).log_prob(x.clone()))


def test_pyros_other_neural_transforms_stay():
    flow = T.neural_autoregressive(D, [20], activation="ELU")
    assert type(pyro_adapter.accelerate(flow)) is type(flow)
    assert (
        type(pyro_adapter.accelerate(T.neural_autoregressive(D, [20], width=64))) is pyro_adapter.NeuralAutoregressive
    )
    wide = T.neural_autoregressive(D, [20], width=65)
    assert type(pyro_adapter.accelerate(wide)) is type(wide)


def test_a_flow_that_was_used_can_be_accelerated():
    """Pyro's transforms keep what they computed, with its graph."""
    library = T.affine_autoregressive(D, [20])
    x = draw(0, MANY, D)
    y = library(x)
    ours = pyro_adapter.accelerate(library)
    close(ours.log_abs_det_jacobian(x, y), library.log_abs_det_jacobian(x, y))
