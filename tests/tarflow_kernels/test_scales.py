"""The activations of affine maps: what they compute, against their formulas and the flow libraries that use them."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from helpers import BACKENDS, INTERPRETED, draw
from tarflow_kernels import affine_forward, affine_inverse, reference, scales, use_backend

pytestmark = pytest.mark.usefixtures("on_device")

SCALES = {
    "exp": scales.EXP,
    "softclip": scales.softclip(2.0),
    "softplus": scales.softplus(),
    "softplus, offset": scales.softplus(0.5413, 0.1),
    "softplus, no eps": scales.softplus(0.5413, 0.0),
    "sigmoid": scales.sigmoid(),
    "sigmoid, no eps": scales.sigmoid(eps=0.0),
    "clamp": scales.clamp(-0.5, 0.7),
    "tanh": scales.tanh(1.5),
}
every_scale = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
both_ways = pytest.mark.parametrize("op", [affine_forward, affine_inverse])


@pytest.mark.parametrize(
    ("scale", "formula"),
    [
        (scales.softclip(3.0), lambda raw: raw / (1 + (raw / 3).abs())),
        (scales.softplus(0.5, 0.01), lambda raw: ((raw + 0.5).exp().log1p() + 0.01).log()),
        (scales.softplus(0.5, 0.0), lambda raw: (raw + 0.5).exp().log1p().log()),
        (scales.sigmoid(1.0, 0.01), lambda raw: (1 / (1 + (-raw - 1).exp()) + 0.01).log()),
        (scales.sigmoid(1.0, 0.0), lambda raw: -(-raw - 1).exp().log1p()),
        (scales.tanh(3.0), lambda raw: 3 * (raw / 3).tanh()),
        (scales.clamp(-1.0, 0.5), lambda raw: raw + (raw.clamp(-1.0, 0.5) - raw).detach()),
    ],
)
def test_log_scale(scale, formula):
    raw = (3 * draw(0, 100)).requires_grad_()
    a, expected = scales.log_scale(raw, scale), formula(raw)
    assert_close(a, expected)
    assert_close(torch.autograd.grad(a.sin().sum(), raw), torch.autograd.grad(expected.sin().sum(), raw))


@both_ways
@every_scale
@every_backend
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=str)
def test_affine_maps_with_a_scale(op, scale, backend, shift, dtype, tolerance, poisoned):
    mu, raw = draw(0, 3, 5, 4, 2, dtype=dtype).unbind(-1)
    x, *cotangents = draw(1, 3, 5, 4, dtype=dtype), draw(2, 3, 5, 4), draw(3, 3)
    formula, results = getattr(reference, op.__name__), []
    for function, precision in ((formula, torch.float64), (op, dtype)):
        inputs = [t.detach().to(precision).requires_grad_() for t in (x, mu, raw)]
        with use_backend(backend):
            outputs = function(*inputs, shift=shift, scale=scale)
        gradients = torch.autograd.grad(outputs, inputs, [t.to(precision) for t in cotangents])
        results.append([t.to(dtype) for t in (*outputs, *gradients)])
    assert_close(*results, atol=tolerance, rtol=tolerance)


@both_ways
@every_backend
@pytest.mark.parametrize("scale", [scale for name, scale in SCALES.items() if name != "clamp"], ids=lambda s: s.kind)
def test_gradients(op, scale, backend):
    inputs = [draw(seed, 2, 3, 2).requires_grad_() for seed in range(3)]
    with use_backend(backend):
        assert torch.autograd.gradcheck(partial(op, shift=True, scale=scale), inputs)


@every_backend
@pytest.mark.parametrize("output", [0, 1])
def test_what_no_loss_depends_on_has_gradients_too(output, backend, poisoned):
    inputs = [draw(seed, 2, 3, 2).requires_grad_() for seed in range(3)]
    with use_backend(backend):
        gradients = torch.autograd.grad(affine_forward(*inputs)[output].sum(), inputs, materialize_grads=True)
    expected = torch.autograd.grad(reference.affine_forward(*inputs)[output].sum(), inputs, materialize_grads=True)
    assert_close(gradients, expected)


@every_backend
@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (scales.softclip(2.0), [-2.0, 2.0]),
        (scales.softplus(), [math.log(1e-3), math.log(1e4)]),
        (scales.softplus(0.5, 0.0), [0.5 - 1e4, math.log(1e4)]),
        (scales.sigmoid(), [math.log(1e-3), math.log1p(1e-3)]),
        (scales.sigmoid(eps=0.0), [2.0 - 1e4, 0.0]),
        (scales.clamp(-5.0, 3.0), [-5.0, 3.0]),
        (scales.tanh(2.0), [-2.0, 2.0]),
    ],
    ids=str,
)
def test_huge_values_keep_log_dets_and_their_gradients_finite(scale, expected, backend):
    raw = torch.tensor([-1e4, 1e4]).requires_grad_()
    zeros = torch.zeros_like(raw)
    with use_backend(backend):
        _, logdet = affine_inverse(zeros, zeros, raw, scale=scale)
    assert_close(logdet, torch.tensor(expected), rtol=1e-3, atol=1e-6)
    assert torch.autograd.grad(logdet.sum(), raw)[0].isfinite().all()


@every_backend
@every_scale
@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no arithmetic in bfloat16")
def test_parameters_of_low_precision(scale, backend):
    x, mu, raw = draw(0, 2, 5, 4, dtype=torch.float32), *draw(1, 2, 2, 5, 4, dtype=torch.bfloat16)
    inputs = [t.requires_grad_() for t in (x, mu, raw)]
    with use_backend(backend):
        outputs = affine_forward(*inputs, shift=True, scale=scale)
    assert_close(outputs, reference.affine_forward(x, mu.float(), raw.float(), shift=True, scale=scale))
    for gradient, t in zip(torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), inputs), inputs, strict=True):
        assert gradient.dtype == t.dtype


def test_a_scale_is_compiled_in():
    inputs = [draw(seed, 2, 3, 2).requires_grad_() for seed in range(3)]
    op = partial(affine_forward, shift=True, scale=scales.softplus())
    results = []
    for run in (op, torch.compile(op, fullgraph=True, backend="aot_eager")):
        outputs = run(*inputs)
        results.append([*outputs, *torch.autograd.grad([t.sin().sum() for t in outputs], inputs)])
    assert_close(*results)


# The affine maps of other libraries, as a function of x and the raw output of a network; their forward maps scale by
# exp(a), as our inverse does. Parameters are read where the library has them, in pairs or interleaved.


def zuko_affine(x, pairs):
    transform = pytest.importorskip("zuko").transforms.MonotonicAffineTransform(*pairs.unbind(-1), slope=1e-2)
    y, logdet = transform.call_and_ladj(x)
    return y, logdet.sum(-1)


def nflows_autoregressive(x, pairs):
    made = pytest.importorskip("nflows.transforms.autoregressive")
    transform = made.MaskedAffineAutoregressiveTransform(x.shape[1], 8)
    return transform._elementwise_forward(x, pairs.flatten(1))


def nflows_coupling(x, pairs):
    coupling = pytest.importorskip("nflows.transforms.coupling")
    mask = torch.arange(2 * x.shape[1]) % 2
    transform = coupling.AffineCouplingTransform(mask, lambda features, params: nn.Identity())
    return transform._coupling_transform_forward(x, torch.cat(pairs.unbind(-1), 1))


def normflows_autoregressive(x, pairs):
    flows = pytest.importorskip("normflows").flows
    return flows.MaskedAffineAutoregressive(x.shape[1], 8)._elementwise_forward(x, pairs.flatten(1))


def normflows_coupling(x, pairs):
    flows = pytest.importorskip("normflows").flows
    (_, y), logdet = flows.AffineCoupling(nn.Identity(), scale_map="sigmoid_inv")([pairs.flatten(1), x])
    return y, logdet


@pytest.mark.parametrize(
    ("library", "scale", "scale_first"),
    [
        (zuko_affine, scales.softclip(-math.log(1e-2)), False),
        (nflows_autoregressive, scales.softplus(), True),
        (nflows_coupling, scales.sigmoid(), False),
        (normflows_autoregressive, scales.sigmoid(), True),
        (normflows_coupling, scales.sigmoid(eps=0.0), False),
    ],
)
@every_backend
def test_maps_of_other_libraries(library, scale, scale_first, backend):
    x, pairs = draw(0, 7, 6, dtype=torch.float32), 2 * draw(1, 7, 6, 2, dtype=torch.float32)
    with torch.device("cpu"):
        expected, expected_logdet = (t.to(x.device) for t in library(x.cpu(), pairs.cpu()))
    mu, raw = pairs.flip(-1).unbind(-1) if scale_first else pairs.unbind(-1)
    with use_backend(backend):
        y, logdet = affine_inverse(x, mu, raw, scale=scale)
        assert_close((y, logdet), (expected, expected_logdet), atol=1e-5, rtol=1e-5)
        assert_close(affine_forward(y, mu, raw, scale=scale), (x, -logdet), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("make", "error", "argument"),
    [
        (lambda: scales.softclip(0.0), ValueError, "bound"),
        (lambda: scales.softclip(math.nan), ValueError, "bound"),
        (lambda: scales.tanh(math.inf), ValueError, "bound"),
        (lambda: scales.softplus(math.inf), ValueError, "offset"),
        (lambda: scales.softplus(eps=-1e-3), ValueError, "eps"),
        (lambda: scales.sigmoid(math.nan), ValueError, "offset"),
        (lambda: scales.sigmoid(eps=-1e-3), ValueError, "eps"),
        (lambda: scales.clamp(1.0, 1.0), ValueError, "low"),
        (lambda: scales.clamp(-math.inf, 1.0), ValueError, "low"),
        (lambda: scales.clamp(0.0, math.nan), ValueError, "high"),
        (lambda: affine_forward(*torch.ones(3, 1, 1), scale="softplus"), TypeError, "scale"),
        (lambda: affine_inverse(*torch.ones(3, 1, 1), scale=scales.softclip), TypeError, "scale"),
    ],
)
def test_an_error_names_the_argument(make, error, argument):
    with pytest.raises(error, match=rf"^{argument}: expected .*; got "):
        make()
