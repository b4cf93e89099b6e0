"""Mixtures of logistics: how exact their map, its inverse and its gradients are, wherever x lies."""

import math

import mpmath
import pytest
import torch
from torch import library
from torch.testing import assert_close

from helpers import BACKENDS, BFLOAT16, DEVICE, INTERPRETED, draw
from tarflow_kernels import affine_forward, mixture, mixture_logistic, mixture_logistic_inverse, reference, use_backend

pytestmark = pytest.mark.usefixtures("on_device", "poisoned")

# What is claimed of extremes is claimed of what users run; the formula is there to be read.
IMPLEMENTATIONS = [backend for backend in BACKENDS if backend != "reference"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_implementation = pytest.mark.parametrize("backend", IMPLEMENTATIONS)
both_ways = pytest.mark.parametrize("op", [mixture_logistic, mixture_logistic_inverse])
DTYPE, TIGHT = (torch.float64, 1e-9) if DEVICE == "cpu" else (torch.float32, 1e-4)
COUNT = 40 if INTERPRETED else 200


def uniform(low, high):
    """Numbers between the two, of a shape, from a seed."""
    return lambda seed, *shape: low + (high - low) * torch.special.ndtr(draw(seed, *shape))


# The standard deviations of x and of the means, and how log-scales are drawn.
REGIMES = {
    "wide": (30.0, 1.0, uniform(-7.0, 2.0)),
    "wide, all sharp": (30.0, 1.0, uniform(-7.0, -7.0)),
    "wide, below the floor": (30.0, 1.0, uniform(-9.0, -6.5)),
    "between sharp modes": (1.0, 1.0, uniform(-7.0, -6.0)),
    "between modes": (10.0, 10.0, uniform(-7.0, 2.0)),
    "near": (3.0, 1.0, uniform(-2.0, 1.0)),
}
every_regime = pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)


def elements(regime, count, components=32, dtype=torch.float32):
    """x ``(count,)``, every element a sample of its own, and its parameters."""
    spread, between, scales = regime
    x, logits, means = draw(0, count), draw(1, count, components), draw(2, count, components)
    return [t.to(dtype) for t in (spread * x, logits, between * means, scales(3, count, components))]


def in_many_digits(x, logits, means, log_scales, floor=-7.0):
    """v and log dv/dx of one element, of 50 digits: what the formula says, with nothing done about rounding."""
    with mpmath.workdps(50):
        below = above = density = total = mpmath.mpf(0)
        for logit, mean, raw in zip(logits, means, log_scales, strict=True):
            weight, slope = mpmath.exp(logit), mpmath.exp(-max(mpmath.mpf(raw), floor))
            z = (mpmath.mpf(x) - mean) * slope
            rising, falling = 1 / (1 + mpmath.exp(-z)), 1 / (1 + mpmath.exp(z))
            below, above = below + weight * rising, above + weight * falling
            density, total = density + weight * rising * falling * slope, total + weight
        return mpmath.log(below / above), mpmath.log(density * total / below / above)


@every_implementation
@every_regime
def test_results_are_those_of_fifty_digits(regime, backend):
    """v is exact to 1e-5 of itself in float32; log dv/dx to 1e-4, or 1e-6 of itself in gaps, where it is large."""
    inputs = elements(regime, COUNT)
    with use_backend(backend):
        v, d = mixture_logistic(*inputs)
    for i, numbers in enumerate(zip(*(t.tolist() for t in inputs), strict=True)):
        exact_v, exact_d = in_many_digits(*numbers)
        assert abs(v[i].item() - exact_v) <= 1e-5 * max(1, abs(exact_v))
        assert abs(d[i].item() - exact_d) <= max(1e-4, 1e-6 * abs(exact_d))


@every_implementation
def test_nothing_overflows_far_out(backend):
    """Values and gradients are finite and right where |v| is 1e5 and log dv/dx 7."""
    x = torch.tensor([-90.0, 90.0, -1e-3, 91.0])
    theta = [t.requires_grad_() for t in elements(REGIMES["wide, all sharp"], 4)[1:]]
    x = x.requires_grad_()
    with use_backend(backend):
        v, d = mixture_logistic(x, *theta)
        back, _ = mixture_logistic_inverse(v.detach(), *(t.detach() for t in theta))
    assert v.abs().max() > 9e4
    assert_close(d[[0, 1, 3]], torch.full((3,), 7.0))
    assert_close(back[[0, 1, 3]], x[[0, 1, 3]].detach())
    gradients = torch.autograd.grad(v.sum() + d.sum(), [x, *theta])
    assert all(t.isfinite().all() for t in gradients)
    assert_close(gradients[0][[0, 1, 3]], torch.full((3,), math.exp(7.0)))


@every_implementation
def test_slopes_below_the_normal_numbers_keep_their_log(backend):
    """Scales of e^84 to e^91: in float32 their inverses are denormal, and have fewer bits; gradients are finite."""
    inputs = [t.requires_grad_() for t in elements((30.0, 1.0, uniform(84.0, 91.0)), COUNT, components=8)]
    with use_backend(backend):
        v, d = mixture_logistic(*inputs)
        gradients = torch.autograd.grad(v.sum() + d.sum(), inputs)
    for i, numbers in enumerate(zip(*(t.tolist() for t in inputs), strict=True)):
        exact_v, exact_d = in_many_digits(*numbers)
        assert abs(v[i].item() - exact_v) <= 1e-5
        assert abs(d[i].item() - exact_d) <= 1e-4
    assert all(t.isfinite().all() for t in gradients)


@every_implementation
@every_regime
def test_what_is_inverted_comes_back(regime, backend):
    """v comes back to 1e-5, or to what the last bits of x weigh where the map is steep; the log-dets cancel."""
    x, *theta = elements(regime, COUNT)
    with use_backend(backend):
        v, _ = mixture_logistic(x, *theta)
        x, inverse_d = mixture_logistic_inverse(v, *theta)
        again, d = mixture_logistic(x, *theta)
    bits = 2 * torch.finfo(x.dtype).eps * x.abs() * d.exp()
    assert ((again - v).abs() <= 1e-5 * v.abs().clamp(min=1) + bits).all()
    assert_close(inverse_d, -d)


@pytest.mark.skipif(INTERPRETED, reason="counted where the solver returns its count")
@every_regime
@pytest.mark.parametrize(("dtype", "usual"), [(torch.float32, 7), (torch.float64, 15)], ids=str)
def test_an_inverse_takes_few_evaluations(regime, dtype, usual):
    """Under 8 in the median, in float32, and never all of the 64 that it may take."""
    x, *theta = elements(regime, 5000, dtype=dtype)
    v, _ = mixture_logistic(x, *theta)
    _, evaluations = mixture.solve_and_count(v, *theta, -7.0)
    assert evaluations.median() <= usual
    assert evaluations.max() < mixture.MAX_EVALUATIONS


@every_backend
@pytest.mark.parametrize("output", [0, 1], ids=["v", "log-det"])
def test_gradients_are_those_of_fifty_digits(output, backend):
    """Against differences of a millionth, in so many digits that nothing of them is lost."""
    inputs = [t.requires_grad_() for t in elements((3.0, 1.0, uniform(-2.0, 1.0)), 4, components=3, dtype=DTYPE)]
    with use_backend(backend):
        gradients = torch.autograd.grad(mixture_logistic(*inputs)[output].sum(), inputs)
    for i in range(4):
        numbers = [t[i].tolist() for t in inputs]

        def exact(position, k, by, numbers=numbers):
            moved = [list(part) if isinstance(part, list) else part for part in numbers]
            if position:
                moved[position][k] = mpmath.mpf(moved[position][k]) + by
            else:
                moved[0] = mpmath.mpf(moved[0]) + by
            return in_many_digits(*moved)[output]

        for position, gradient in enumerate(gradients):
            for k, found in enumerate(gradient[i].reshape(-1).tolist()):
                with mpmath.workdps(50):
                    step = mpmath.mpf(10) ** -12
                    expected = (exact(position, k, step) - exact(position, k, -step)) / (2 * step)
                assert abs(found - expected) <= TIGHT * max(1, abs(expected))


@every_backend
@both_ways
def test_gradients_know_what_changes_nothing(op, backend):
    """Adding to all logits, or moving x and all means together."""
    given, *theta = [t.requires_grad_() for t in elements(REGIMES["near"], COUNT, components=5, dtype=DTYPE)]
    with use_backend(backend):
        out, logdet = op(given, *theta)
        d_given, d_logits, d_means, _ = torch.autograd.grad(out.sin().sum() + logdet.cos().sum(), [given, *theta])
        (moved,) = torch.autograd.grad(op(given, *theta)[0].sum(), theta[1])
    assert_close(d_logits.sum(-1), torch.zeros_like(d_given), atol=TIGHT, rtol=0)
    if op is mixture_logistic:
        assert_close(d_means.sum(-1), -d_given)
    else:
        assert_close(moved.sum(-1), torch.ones_like(given))


@every_backend
def test_the_slope_is_what_the_log_det_says(backend):
    """``dv/dx = exp(d)``, and of that each component has the share ``-dv/dmu`` that it has in the density."""
    x, *theta = [t.requires_grad_() for t in elements(REGIMES["near"], COUNT, components=5, dtype=DTYPE)]
    with use_backend(backend):
        v, d = mixture_logistic(x, *theta)
        slope, of_means = torch.autograd.grad(v.sum(), (x, theta[1]))
    z = (x[:, None] - theta[1]) * torch.exp(-theta[2])
    density = theta[0].softmax(-1) * z.sigmoid() * (-z).sigmoid() * torch.exp(-theta[2])
    assert_close(slope, d.exp())
    assert_close(of_means, -density / density.sum(-1, keepdim=True) * d.exp()[:, None])


@every_backend
@both_ways
def test_one_component_is_an_affine_map(op, backend):
    x, mu, alpha = draw(0, 3, 4, 7, dtype=DTYPE)
    z, logdet = affine_forward(x, mu, alpha)
    given, expected = (x, (z, logdet)) if op is mixture_logistic else (z, (x, -logdet))
    with use_backend(backend):
        assert_close(op(given, torch.zeros_like(x)[..., None], mu[..., None], alpha[..., None]), expected)


@every_backend
@both_ways
def test_log_scales_stop_at_the_floor_and_so_do_their_gradients(op, backend):
    given, logits, means = draw(0, 3), *draw(1, 2, 3, 4)
    raw = torch.tensor([[-2.0, -1.0, 0.0, 1.0]], dtype=torch.float64).repeat(3, 1).requires_grad_()
    kept = (raw >= -1.0).double()
    with use_backend(backend):
        out, logdet = op(given, logits, means, raw, min_log_scale=-1)
        assert_close((out, logdet), op(given, logits, means, raw.clamp(min=-1.0), min_log_scale=-math.inf))
        (gradient,) = torch.autograd.grad(out.sum() + logdet.sum(), raw)
        other = raw.detach().clamp(min=-1.0).requires_grad_()
        out, logdet = op(given, logits, means, other, min_log_scale=-math.inf)
        (expected,) = torch.autograd.grad(out.sum() + logdet.sum(), other)
    assert_close(gradient, expected * kept)


@every_backend
@pytest.mark.parametrize("which", range(4), ids=["x", "logits", "means", "log-scales"])
@both_ways
def test_what_is_not_a_number_stays_where_it_is(op, which, backend):
    inputs = [draw(0, 3, 5), *draw(1, 3, 3, 5, 4)]
    with use_backend(backend):
        expected = [t.clone() for t in op(*inputs)]
        inputs[which][1, 2] = math.nan
        out, logdet = op(*inputs)
    expected[0][1, 2] = expected[1][1] = math.nan
    assert_close((out, logdet), tuple(expected), equal_nan=True)


@every_implementation
@both_ways
def test_an_element_is_the_same_whatever_lies_beside_it(op, backend):
    """It is the same but for rounding: PyTorch adds up in an order that depends on how much there is to add."""
    given, *theta = elements(REGIMES["near"], 65, components=5, dtype=DTYPE)
    with use_backend(backend):
        whole = op(given, *theta)
        far = op(torch.cat((given, 1e4 * given)), *(torch.cat((t, t)) for t in theta))
        alone = [op(*(t[i : i + 1] for t in (given, *theta))) for i in range(0, 65, 9)]
    assert_close([t[:65] for t in far], [*whole])
    assert_close([t[::9] for t in whole], [torch.cat(parts) for parts in zip(*alone, strict=True)])


@every_implementation
@both_ways
@pytest.mark.parametrize("low", [BFLOAT16, torch.float16], ids=str)
def test_parameters_of_low_precision_leave_results_in_full(op, low, backend):
    given, logits, means, log_scales = elements(REGIMES["near"], 6, components=4)
    theta = [t.to(low).requires_grad_() for t in (logits, means, log_scales)]
    formula = getattr(reference, op.__name__)
    for dtype in (torch.float32, torch.float64) if DEVICE == "cpu" else (torch.float32,):
        given = given.to(dtype).requires_grad_()
        results = []
        for function, parameters in ((op, theta), (formula, [t.detach().to(dtype).requires_grad_() for t in theta])):
            with use_backend(backend):
                outputs = function(given, *parameters)
            results.append((outputs, torch.autograd.grad([t.sum() for t in outputs], [given, *parameters])))
        (outputs, gradients), (expected, expected_gradients) = results
        assert_close(outputs, expected, atol=2e-5, rtol=2e-5)
        assert [t.dtype for t in gradients] == [dtype, low, low, low]
        assert_close(gradients, expected_gradients, atol=1e-2, rtol=1e-2, check_dtype=False)
    with use_backend(backend):
        assert op(given.to(low), *theta)[0].dtype == torch.float32


@every_backend
@both_ways
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 0, 3)], ids=str)
def test_nothing_to_map(op, shape, backend):
    inputs = [torch.zeros(shape, requires_grad=True), *(torch.zeros(*shape, 4, requires_grad=True) for _ in range(3))]
    with use_backend(backend):
        out, logdet = op(*inputs)
        gradients = torch.autograd.grad(out.sum() + logdet.sum(), inputs)
    assert out.shape == shape
    assert_close(logdet, torch.zeros(shape[0]))
    assert [t.shape for t in gradients] == [t.shape for t in inputs]


@pytest.mark.skipif(INTERPRETED, reason="the kernels have no blocks")
@both_ways
def test_blocks_of_samples_are_put_together_again(op, monkeypatch):
    """A CPU takes large batches in parts that its cache holds."""
    inputs = [draw(0, 7, 3), *draw(1, 3, 7, 3, 4)]
    results = []
    for size in (1, 24, 10**9):
        monkeypatch.setattr(mixture, "BLOCK", size)
        leaves = [t.detach().requires_grad_() for t in inputs]
        with use_backend("torch"):
            outputs = op(*leaves)
        results.append([*outputs, *torch.autograd.grad([t.sin().sum() for t in outputs], leaves)])
    assert_close(results[0], results[2])
    assert_close(results[1], results[2])


def test_the_solver_is_registered_as_it_behaves():
    """Compilers do not look into it."""
    v, theta = draw(0, 3, 2).mT, [draw(seed, 2, 4, 3).movedim(1, -1) for seed in range(3)]
    library.opcheck(torch.ops.tarflow.mixture_logistic_solve.default, (v, *theta, -7.0))


def test_the_solver_may_not_look_at_its_progress():
    """It goes on to the end, as on a device that would have to wait, and what is solved stays as it is."""
    x, *theta = elements(REGIMES["near"], 50, components=5, dtype=torch.float64)
    v, _ = mixture_logistic(x, *theta)
    looked, counts = mixture.solve_and_count(v, *theta, -7.0)
    blind, blind_counts = mixture.solve_and_count(v, *theta, -7.0, leave_out_solved=False)
    assert_close(blind, looked)
    assert (blind_counts - counts).abs().max() <= 1
