"""Flow++: every map inverts, its log-det is that of its Jacobian, densities integrate to one, and counts are published.

Layers are compared with the specification written plainly, with loops where that is plainer.
"""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from helpers import draw
from tarflow import Dequantizer, DequantizerConfig, FlowPP, FlowPPConfig, Guidance, ImageFlow, TarFlow, evaluation
from tarflow.flowpp.config import NUM_HEADS, CouplingConfig
from tarflow.flowpp.layers import ActNorm, Coupling, InvertibleConv1x1, MultiScaleFlow
from tarflow.flowpp.networks import (
    Conditioner,
    DataInitConv2d,
    GatedAttention,
    GatedConv,
    concat_elu,
    gate,
)
from tarflow.flowpp.splits import SPLITS, parse_stack, squeeze, unsqueeze
from tarflow.image_flow import initialize_from_data

SMALL = CouplingConfig(num_mixtures=3, filters=8, blocks_per_coupling=1)
TINY = FlowPPConfig(
    image_size=4,
    num_mixtures=3,
    filters=8,
    blocks_per_coupling=1,
    stack="stripe2 squeeze channel1 stripe2",
    dequantizer=DequantizerConfig(filters=4, num_mixtures=2, context_filters=4, stack="stripe2"),
)
HALF = (2, 4, 2)


def redraw(module, seed=0, spread=0.2):
    """Every parameter at random, in float64, about where it starts: an untrained layer hides most mistakes."""
    module.double()
    with torch.no_grad():
        for k, (name, parameter) in enumerate(module.named_parameters()):
            parameter.add_(spread * draw(seed + k, *parameter.shape))
            if "norm" in name or "gain" in name:
                parameter.abs_().add_(0.1)
    return module


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels_of(config, seed=0, batch=3):
    return torch.randint(0, 256, (batch, *config.image_shape), dtype=torch.uint8, generator=seeded(seed))


def flowpp(seed=0, spread=0.05, **settings):
    torch.manual_seed(seed)
    return redraw(FlowPP(replace(TINY, **settings)), seed, spread).eval()


def coupling(**settings):
    context = settings.pop("context", 0)
    return redraw(Coupling(replace(SMALL, **settings), HALF, context))


def jacobian_logdet(function, x):
    """The log-abs-det of the Jacobian of a function at x, whose image is as large as x."""
    jacobian = torch.autograd.functional.jacobian(lambda flat: function(flat.view_as(x)).flatten(), x.flatten())
    return torch.linalg.slogdet(jacobian).logabsdet


# Layers between halves, with the channels of the context that they take.
LAYERS = {
    "norm": (lambda: redraw(ActNorm(HALF)), 0),
    "pointwise": (lambda: redraw(InvertibleConv1x1(2)), 0),
    "mixture coupling": (coupling, 0),
    "affine coupling": (lambda: coupling(coupling="affine"), 0),
    "coupling without attention": (lambda: coupling(attention="max"), 0),
    "coupling of convolutions": (lambda: coupling(attention="none"), 0),
    "coupling, ImageNet": (lambda: coupling(weight_norm=True, elu_output=True), 0),
    "coupling with context": (lambda: coupling(context=3), 3),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    make, context_channels = LAYERS[request.param]
    torch.manual_seed(0)
    context = draw(9, 2, context_channels, *HALF[1:]) if context_channels else None
    return make(), context


def halves(seed=0, batch=2):
    return draw(seed, batch, *HALF), draw(seed + 1, batch, *HALF)


def test_a_layer_inverts(layer):
    layer, context = layer
    x = halves()
    y, logdet = layer(x, context)
    back, inverse_logdet = layer.inverse(y, context)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_logdet, -logdet)


def test_the_logdet_of_a_layer_is_that_of_its_jacobian(layer):
    layer, context = layer
    _, logdet = layer(halves(), context)
    for sample in range(2):
        one = None if context is None else context[sample : sample + 1]
        x = torch.stack([half[sample : sample + 1] for half in halves()])
        expected = jacobian_logdet(lambda pair, one=one: torch.stack(layer(pair.unbind(), one)[0]), x)
        torch.testing.assert_close(logdet[sample], expected)


@pytest.mark.parametrize(
    "stack", ["stripe1", "stripe3", "squeeze channel1 stripe2", "stripe2 squeeze channel2 stripe1"]
)
def test_a_stack_inverts_and_its_logdet_is_that_of_its_jacobian(stack):
    flow = redraw(MultiScaleFlow(stack, (1, 4, 4), SMALL))
    x = draw(0, 2, 1, 4, 4)
    z, logdet = flow(x)
    back, inverse_logdet = flow.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_logdet, -logdet)
    torch.testing.assert_close(logdet[0], jacobian_logdet(lambda x: flow(x)[0], x[:1]), rtol=1e-5, atol=1e-5)


def test_a_coupling_changes_the_odd_columns_given_the_even_ones_and_they_change_places():
    """So the columns that one coupling keeps the next one changes, and an odd number leaves them exchanged."""
    plain = replace(SMALL, pointwise=False)
    x = draw(0, 1, 1, 4, 4)
    once = redraw(MultiScaleFlow("stripe1", (1, 4, 4), plain))
    twice = redraw(MultiScaleFlow("stripe2", (1, 4, 4), plain))
    for flow in (once, twice):
        for step in flow.steps[0]:
            step[0] = ActNorm((1, 4, 2)).double()  # the identity
    z = once(x)[0]
    assert torch.equal(z[..., 1::2], x[..., 0::2])
    torch.testing.assert_close(twice.steps[0][0][1](SPLITS["stripe"][0](x))[0][0], x[..., 0::2])
    z = twice(x)[0]
    assert not torch.isclose(z, x).any()
    changed = x.clone()
    changed[0, 0, 1, 3] += 0.5  # an odd column: the next coupling changes even columns given those
    assert not torch.isclose(twice(changed)[0], z)[..., 0::2].all()


def test_a_dequantizer_reads_even_and_odd_columns_as_channels():
    dequantizer = Dequantizer(replace(TINY.dequantizer), (1, 4, 4))
    pixels, seen = pixels_of(TINY, batch=2), []
    dequantizer.context.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    dequantizer(pixels, draw(0, 2, 1, 4, 4, dtype=torch.float32))
    centered = pixels / 256 - 0.5
    assert torch.equal(seen[0], torch.cat((centered[..., 0::2], centered[..., 1::2]), dim=1))


def test_the_logdet_of_the_model_is_that_of_its_jacobian():
    model = flowpp()
    x = torch.tanh(draw(0, 2, 1, 4, 4))
    _, logdet = model(x)
    torch.testing.assert_close(logdet[0], jacobian_logdet(lambda x: model(x)[0], x[:1]), rtol=1e-5, atol=1e-5)


def test_the_noise_of_a_dequantizer_has_the_density_that_it_says():
    dequantizer = redraw(Dequantizer(TINY.dequantizer, (1, 4, 4)))
    pixels, eps = pixels_of(TINY, batch=1), draw(1, 1, 1, 4, 4)

    def noise(eps):
        return (dequantizer(pixels, eps)[0] + 1) * 128 - pixels

    u = noise(eps)
    assert ((u > 0) & (u < 1)).all()
    expected = torch.distributions.Normal(0, 1).log_prob(eps).sum() - jacobian_logdet(noise, eps)
    torch.testing.assert_close(dequantizer(pixels, eps)[1], expected[None], rtol=1e-9, atol=1e-9)


def quadrature(low, high, points, dimensions):
    """Nodes ``(points^dimensions, dimensions)`` and weights of Gauss and Legendre on a cube."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(points))
    nodes, weights = (low + high) / 2 + (high - low) / 2 * nodes, weights * (high - low) / 2
    grid = torch.cartesian_prod(*[nodes] * dimensions)
    return grid, torch.cartesian_prod(*[weights] * dimensions).prod(1)


def test_the_density_of_the_model_integrates_to_one():
    """Over all images of four pixels that have a logit, at points as even as Sobol's under a wide normal."""
    model = flowpp(image_size=2, stack="stripe2", dequantizer=None)
    normal = torch.distributions.Normal(0.0, torch.tensor(1.3, dtype=torch.float64))
    t = normal.icdf(torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(2**15, dtype=torch.float64))
    x = (t.sigmoid() - FlowPP.MARGIN) / (0.5 - FlowPP.MARGIN) - 1
    log_slopes = (F.logsigmoid(t) + F.logsigmoid(-t) - math.log(0.5 - FlowPP.MARGIN)).sum(1)
    with torch.no_grad():
        ratios = (model.log_prob(x.view(-1, 1, 2, 2)) + log_slopes - normal.log_prob(t).sum(1)).exp()
    assert ratios.mean().item() == pytest.approx(1, abs=5e-3)


def test_the_importance_weighted_bound_rises_to_the_exact_probability_and_one_sample_stays_below():
    """Of an 8-bit image of four pixels, whose probability quadrature over its bins tells."""
    model = flowpp(image_size=2, stack="stripe2")
    pixels = pixels_of(model.config, batch=1)
    u, weights = quadrature(0.0, 1.0, 8, 4)
    with torch.no_grad():
        densities = model.log_prob((pixels + u.view(-1, 1, 2, 2)) / 128 - 1).exp()
        exact = (densities @ weights).log().item() - 4 * math.log(128)
        copies = pixels.expand(20_000, -1, -1, -1)
        log_weights = model.importance_log_weights(copies, num_samples=4, generator=seeded())
    ten = (log_weights.view(-1, 10).logsumexp(1) - math.log(10)).mean().item()
    assert log_weights.mean().item() < ten < exact
    # The noise is normal before its sigmoid: samples hardly ever come from the ends of a bin, where p is not small.
    assert (log_weights.flatten().logsumexp(0) - math.log(log_weights.numel())).item() == pytest.approx(exact, abs=0.2)


@pytest.mark.parametrize("dequantizer", [None, TINY.dequantizer], ids=["uniform", "variational"])
def test_log_weights_are_densities_in_units_of_pixels_and_discrete_log_prob_is_the_log_of_their_mean(dequantizer):
    model, pixels, generator = flowpp(dequantizer=dequantizer).float(), pixels_of(TINY), seeded()
    log_weights = model.importance_log_weights(pixels, num_samples=3, generator=seeded())
    for row in log_weights:
        x, log_q = model.dequantize(pixels, generator)
        expected = (model.log_prob(x) - log_q).double() - 16 * math.log(128)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-6)
    log_mean = model.discrete_log_prob(pixels, num_samples=3, generator=seeded())
    torch.testing.assert_close(log_mean, log_weights.exp().mean(0).log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (FlowPPConfig.cifar10(), 31_443_440),
        (FlowPPConfig.imagenet32(), 168_955_724),
        (FlowPPConfig.imagenet64(), 73_489_960),
        (replace(FlowPPConfig.cifar10(), filters=104, dequantizer=None), 32_324_408),
        (
            replace(
                FlowPPConfig.cifar10(),
                coupling="affine",
                filters=108,
                dequantizer=replace(FlowPPConfig.cifar10().dequantizer, coupling="affine", filters=108),
            ),
            32_045_708,
        ),
        (replace(FlowPPConfig.cifar10(), attention="max"), 31_443_440),
    ],
    ids=["CIFAR", "ImageNet32", "ImageNet64", "uniform dequantization", "affine couplings", "no attention"],
)
def test_published_models_have_their_published_number_of_parameters(config, expected):
    with torch.device("meta"):
        model = FlowPP(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_squeezing_puts_the_pixels_of_a_square_where_tensorflow_does():
    x = draw(0, 2, 3, 4, 6)
    y = squeeze(x)
    for c, i, j, row, column in itertools.product(range(3), range(2), range(2), range(2), range(3)):
        assert torch.equal(y[:, (2 * i + j) * 3 + c, row, column], x[:, c, 2 * row + i, 2 * column + j])
    assert torch.equal(unsqueeze(y), x)


def test_a_batch_of_no_images_has_empty_results():
    model = flowpp()
    pixels = pixels_of(TINY, batch=0)
    x, _ = model.dequantize(pixels)
    z, logdet = model(x)
    assert (x.shape, logdet.shape, model.log_prob(x).shape) == ((0, *TINY.image_shape), (0,), (0,))
    assert model.inverse(z).shape == x.shape


def test_splits_are_undone_by_their_merges_and_the_channels_of_a_squeezed_image_part_rows():
    x = draw(0, 1, 3, 4, 4)
    for split, merge in SPLITS.values():
        assert torch.equal(merge(*split(squeeze(x))), squeeze(x))
    upper, lower = SPLITS["channel"][0](squeeze(x))
    assert set(upper.flatten().tolist()) == set(x[:, :, 0::2].flatten().tolist())
    assert set(lower.flatten().tolist()) == set(x[:, :, 1::2].flatten().tolist())


def test_a_mixture_coupling_is_the_formula_value_by_value():
    """The outputs of the network belong to channels first, then to â, b, logits, means and log-scales of each."""
    layer = coupling()
    first, x = halves(batch=1)
    (kept, y), logdet = layer((first, x))
    out = layer.conditioner(first)[0]
    expected_logdet = 0.0
    for c, i, j in itertools.product(range(2), range(4), range(2)):
        raw, b, *rest = out[c * 11 : (c + 1) * 11, i, j].unbind()
        logits, means, log_scales = torch.stack(rest).view(3, 3)
        scale = log_scales.clamp(min=-7).exp()
        value = x[0, c, i, j].clone().requires_grad_()
        cdf = (logits.softmax(0) * torch.sigmoid((value - means) / scale)).sum()
        mapped = raw.tanh().exp() * torch.logit(cdf) + b
        (slope,) = torch.autograd.grad(mapped, value, retain_graph=True)
        expected_logdet += slope.log()
        torch.testing.assert_close(y[0, c, i, j], mapped)
    assert torch.equal(kept, first)
    torch.testing.assert_close(logdet[0], expected_logdet)


@pytest.mark.parametrize("attention", ["softmax", "max"])
def test_gated_attention_is_the_formula_or_takes_the_largest_of_query_key_and_value(attention):
    torch.manual_seed(0)
    layer = redraw(GatedAttention(8, replace(SMALL, attention=attention)))
    x, positions = draw(0, 2, 8, 3, 2), draw(1, 8, 3, 2)
    q, k, v = layer.qkv(x + positions).flatten(2).view(2, 3, NUM_HEADS, 2, 6).unbind(1)
    if attention == "softmax":
        weights = (torch.einsum("bhci,bhcj->bhij", q, k) / math.sqrt(2)).softmax(-1)
        attended = torch.einsum("bhij,bhcj->bhci", weights, v)
    else:
        attended = torch.maximum(torch.maximum(q, k), v)
    torch.testing.assert_close(layer(x, positions), x + gate(layer.out(attended.reshape(2, 8, 3, 2))))


def test_a_gated_convolution_is_the_formula():
    layer = redraw(GatedConv(4, SMALL, context_channels=3))
    x, context = draw(0, 2, 4, 3, 2), draw(1, 2, 3, 3, 2)

    def celu(t):
        return torch.cat((F.elu(t), F.elu(-t)), 1)

    h = F.conv2d(celu(x), layer.conv.weight, layer.conv.bias, padding=1)
    h = h + F.conv2d(context, layer.context.weight, layer.context.bias)
    value, opening = F.conv2d(celu(h), layer.out.weight, layer.out.bias).chunk(2, dim=1)
    torch.testing.assert_close(layer(x, context), x + value * opening.sigmoid())
    torch.testing.assert_close(concat_elu(x), celu(x))


@pytest.mark.parametrize("layer", [GatedConv, GatedAttention])
def test_dropout_is_for_training(layer):
    layer = redraw(layer(8, replace(SMALL, dropout=0.5)))
    x = draw(0, 2, 8, 3, 2)
    other = () if isinstance(layer, GatedConv) else (draw(1, 8, 3, 2),)
    assert not torch.equal(layer(x, *other), layer(x, *other))
    layer.eval()
    assert torch.equal(layer(x, *other), layer(x, *other))


def test_a_normalized_weight_has_a_direction_alone():
    layer = redraw(DataInitConv2d(3, 5, 3, weight_norm=True))
    x = draw(0, 2, 3, 4, 4)
    expected = layer(x)
    with torch.no_grad():
        layer.weight.mul_(7)
        torch.testing.assert_close(layer(x), expected)
        layer.gain.mul_(2)
        bias = layer.bias[:, None, None]
    torch.testing.assert_close(layer(x) - bias, 2 * (expected - bias))


@pytest.mark.parametrize("elu_output", [False, True])
def test_the_output_of_a_conditioner_is_in_full_precision_and_behind_a_concat_elu_if_told(elu_output):
    network = Conditioner(2, 6, (4, 4), replace(SMALL, elu_output=elu_output))
    before, seen = [], []
    network.blocks[-1].register_forward_hook(lambda module, inputs, output: before.append(output))
    network.proj_out.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with torch.autocast("cpu", torch.bfloat16):
        network(draw(0, 2, 2, 4, 4, dtype=torch.float32))
    ((h, out),) = seen
    assert h.dtype == out.dtype == torch.float32
    torch.testing.assert_close(h, (concat_elu(before[0]) if elu_output else before[0]).float())


@pytest.mark.parametrize("weight_norm", [False, True])
def test_the_first_batch_gives_the_outputs_of_a_convolution_their_scale(weight_norm):
    torch.manual_seed(0)
    layer = DataInitConv2d(3, 5, 3, init_scale=0.1, weight_norm=weight_norm)
    x = 3 + 2 * draw(0, 16, 3, 6, 6, dtype=torch.float32)
    initialize_from_data(layer_in := torch.nn.Sequential(layer), lambda: layer_in(x))
    variance, mean = torch.var_mean(layer(x), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(variance.sqrt(), torch.full((5,), 0.1), atol=1e-4, rtol=0)


def test_the_first_batch_normalizes_every_value():
    norm = ActNorm(HALF)
    batch = draw(0, 64, *HALF, dtype=torch.float32) * 3 + 1, draw(1, 64, *HALF, dtype=torch.float32)
    norm.initialize(batch)
    for half in norm(batch)[0]:
        variance, mean = torch.var_mean(half, 0, correction=0)
        torch.testing.assert_close(mean, torch.zeros(HALF), atol=1e-5, rtol=0)
        torch.testing.assert_close(variance, torch.ones(HALF), atol=1e-4, rtol=0)


def test_each_layer_is_initialized_by_what_comes_through_the_ones_before():
    """So after it, the same batch finds every convolution of a network at its scale."""
    torch.manual_seed(0)
    network = Conditioner(2, 6, (4, 4), replace(SMALL, blocks_per_coupling=2, elu_output=True))
    x = draw(0, 32, 2, 4, 4, dtype=torch.float32)
    initialize_from_data(network, lambda: network(x))
    convolutions = [layer for layer in network.modules() if isinstance(layer, DataInitConv2d)]
    deviations = {}
    for conv in convolutions:
        conv.register_forward_hook(lambda conv, _, y: deviations.__setitem__(conv, y.std((0, 2, 3), correction=0)))
    network(x)
    assert len(deviations) == len(convolutions) == 10
    for conv, deviation in deviations.items():
        torch.testing.assert_close(deviation, torch.full_like(deviation, conv.init_scale), rtol=1e-3, atol=1e-5)


def test_initializing_a_model_brings_its_latents_to_the_prior():
    torch.manual_seed(0)
    model = FlowPP(FlowPPConfig(image_size=8, filters=8, num_mixtures=4, blocks_per_coupling=1))
    generator = seeded()
    pixels = (torch.randint(0, 256, (256, 1, 8, 8), generator=generator) // 3).to(torch.uint8)
    before = model.discrete_log_prob(pixels, generator=generator).mean()
    model.initialize(pixels, generator=generator)
    with torch.no_grad():
        z, _ = model(model.dequantize(pixels, generator)[0])
    assert model.discrete_log_prob(pixels, generator=generator).mean() > before
    assert z.mean().abs() < 0.1
    assert 0.8 < z.std() < 1.3


def test_a_gain_never_falls_below_its_floor():
    norm = ActNorm(HALF)
    with torch.no_grad():
        norm.gain.fill_(-1.0)
    y, logdet = norm(halves())
    assert logdet.isfinite().all()
    torch.testing.assert_close(y[0], halves()[0] * 1e-10 + norm.bias[0], rtol=1e-5, atol=0)


def test_exported_it_takes_batches_of_any_size():
    model = redraw(FlowPP(TINY)).eval().requires_grad_(False)
    batch = torch.export.Dim("batch", min=1, max=64)
    x = 0.5 * draw(1, 3, *TINY.image_shape)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    for size in (1, 2, 5):
        x = 0.5 * draw(2, size, *TINY.image_shape)
        torch.testing.assert_close(exported(x), model(x))


def test_an_image_returns_from_its_latent_in_float32():
    model = flowpp().float()
    pixels = pixels_of(TINY, batch=64)
    with torch.no_grad():
        x, _ = model.dequantize(pixels, seeded())
        z, _ = model(x)
        assert ((model.inverse(z) - x) * 128).abs().max() < 1e-3


def with_dropout(**settings):
    """A model of float32, in training mode, with dropout in every part."""
    dequantizer = replace(TINY.dequantizer, dropout=0.2, attention="softmax", context_attention="softmax")
    return flowpp(dropout=0.2, dequantizer=dequantizer, **settings).float().train()


# Every way to score and to sample; each returns a tensor.
WITHOUT_DROPOUT = {
    "log_prob": lambda model: model.log_prob(pixels_of(TINY) / 128 - 1),
    "discrete_log_prob": lambda model: model.discrete_log_prob(pixels_of(TINY), num_samples=2, generator=seeded()),
    "log-weights": lambda model: model.importance_log_weights(pixels_of(TINY), num_samples=2, generator=seeded()),
    "inverse": lambda model: model.inverse(draw(0, 2, 4, 2, 2, dtype=torch.float32)),
    "sample": lambda model: model.sample(3, generator=seeded()),
    "trajectory": lambda model: model.sample(3, generator=seeded(), return_trajectory=True)[1],
    "bits_per_dim": lambda model: evaluation.dequantized_bits_per_dim(model, pixels_of(TINY), generator=seeded())[1],
    "noisy_bits_per_dim": lambda model: torch.tensor(
        evaluation.noisy_bits_per_dim(model, pixels_of(TINY), sigma=0.01, generator=seeded()).mean
    ),
}


@pytest.mark.parametrize("run", WITHOUT_DROPOUT.values(), ids=WITHOUT_DROPOUT)
def test_scores_and_samples_are_without_dropout_and_leave_every_module_in_its_mode(run):
    model = with_dropout()
    model.flow.steps[0][0].eval()  # a part that its owner does not train
    modes = [module.training for module in model.modules()]
    results = [run(model), run(model)]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(*results)
    assert torch.equal(results[0], run(model.eval()))


def test_an_error_leaves_every_module_in_its_mode():
    model = with_dropout()
    model.flow.steps[0][0].eval()
    modes = [module.training for module in model.modules()]
    for call in (
        lambda: model.log_prob(torch.zeros(2, 1, 4, 5)),
        lambda: model.importance_log_weights(pixels_of(TINY), labels=torch.zeros(3)),
        lambda: evaluation.bits_per_dim(model, pixels_of(TINY), labels=torch.zeros(3)),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
    assert [module.training for module in model.modules()] == modes


def test_in_training_mode_forward_and_noise_have_dropout():
    model, pixels = with_dropout(), pixels_of(TINY)
    x = pixels / 128 - 1
    for run in (lambda: model(x)[0], lambda: model.dequantize(pixels, seeded())[0]):
        assert not torch.equal(run(), run())
        model.eval()
        assert torch.equal(run(), run())
        model.train()


@pytest.mark.parametrize("kind", [FlowPP, ImageFlow])
def test_a_saved_model_comes_back_without_dropout(tmp_path, kind):
    saved, pixels = with_dropout(), pixels_of(TINY, batch=64)
    saved.save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path)
    assert model.config == saved.config
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        x, _ = model.dequantize(pixels, seeded())
        z, _ = model(x)
        assert ((model.inverse(z) - x) * 128).abs().max() < 0.01
    scores = [m.discrete_log_prob(pixels, generator=seeded()) for m in (saved, model, model)]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[1], scores[2])


@pytest.mark.parametrize("training", [True, False])
def test_initialization_has_the_dropout_of_training(training):
    gains = []
    for seed in (0, 1, 1):
        model = with_dropout().train(training)
        torch.manual_seed(seed)
        model.initialize(pixels_of(TINY), generator=seeded())
        assert {module.training for module in model.modules()} == {training}
        gains.append(model.flow.steps[-1][-1][0].gain.detach())
    assert not torch.equal(gains[0], gains[1])
    assert torch.equal(gains[1], gains[2])


def test_scoring_compiles_whole_in_either_mode():
    model, x = with_dropout(stack="stripe1"), pixels_of(TINY) / 128 - 1
    expected = model.log_prob(x)
    for training in (False, True):
        torch.compiler.reset()
        compiled = torch.compile(model.train(training).log_prob, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-3)
        assert {module.training for module in model.modules()} == {training}


def test_samples_are_the_inverse_of_normal_latents_whatever_the_chunks():
    model = flowpp().float()
    images, frames = model.sample(5, generator=seeded(), return_trajectory=True)
    chunks = model.sample(5, generator=seeded(), chunk_size=2)
    torch.testing.assert_close(images, chunks, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        z, _ = model(images)
    eps = torch.randn(5, 1, 4, 4, generator=seeded())
    torch.testing.assert_close(z, squeeze(eps), rtol=1e-2, atol=1e-2)
    assert model.stages == ["after stripe couplings", "after channel couplings", "after stripe couplings", "image"]
    assert frames.shape == (1 + len(model.stages), 5, 1, 4, 4)
    assert torch.equal(frames[0], eps)
    assert torch.equal(frames[-1], images)


@given(
    words=st.lists(st.sampled_from(["squeeze", "stripe1", "stripe2", "channel1", "channel3"]), min_size=1, max_size=5)
)
def test_a_stack_is_refused_or_its_shapes_fit(words):
    try:
        levels = parse_stack(" ".join(words), (2, 8, 8))
    except ValueError:
        # Only smaller images than this one cannot be halved.
        assert "squeeze" in words[:-1] or set(words) == {"squeeze"}
        return
    assert set(words) != {"squeeze"}
    channels, height, width = levels[-1][2]
    assert channels * height * width == 2 * 8 * 8
    assert [kind + (str(number) if number else "") for kind, number, _ in levels] == words


BAD = {
    "filters": ({"filters": 10}, "filters: expected a multiple of the 4 heads of attention; got 10"),
    "mixtures": ({"num_mixtures": 0}, "num_mixtures: expected an integer in \\[1, 64\\]; got 0"),
    "many mixtures": ({"num_mixtures": 65}, "num_mixtures: expected an integer in \\[1, 64\\]; got 65"),
    "coupling": ({"coupling": "spline"}, "coupling: expected one of mixture, affine; got 'spline'"),
    "attention": ({"attention": "linear"}, "attention: expected one of softmax, max, none; got 'linear'"),
    "word": (
        {"stack": "stripe4 pool"},
        "stack: expected words squeeze, stripe<n> and channel<n>, n at least 1; got 'pool'",
    ),
    "no couplings": (
        {"stack": "squeeze squeeze"},
        "stack: expected couplings, as in 'stripe4 .*'; got 'squeeze squeeze'",
    ),
    "no words": ({"stack": ""}, "stack: expected couplings, as in 'stripe4 .*'; got ''"),
    "a level of nothing": ({"stack": "stripe0"}, r"stack: expected words .* n at least 1; got 'stripe0' in 'stripe0'"),
    "another": ({"stack": "stripe1 stripe00"}, r"stack: expected words .* got 'stripe00' in 'stripe1 stripe00'"),
    "odd": ({"stack": "squeeze squeeze stripe1"}, "stack: expected even sizes where stripe1 halves them"),
    "dropout": ({"dropout": 1.0}, "dropout: expected a number in"),
    "no dropout": ({"dropout": "0.1"}, "dropout: expected a number; got '0.1'"),
    "no filters": ({"filters": True}, r"filters: expected an integer in \[1, 16384\]; got True"),
    "endless filters": ({"filters": 10**30}, r"filters: expected an integer in \[1, 16384\]; got 1"),
    "endless blocks": ({"blocks_per_coupling": 10**18}, r"blocks_per_coupling: expected an integer in \[1, 1024\]"),
    "endless stack": ({"stack": "stripe1000000000000000000"}, "stack: expected at most 1024 layers in all; got 1"),
    "many layers": ({"stack": "stripe64", "blocks_per_coupling": 64}, "stack: expected at most 1024 layers in all"),
    "no stack": ({"stack": ["stripe4"]}, "stack: expected a string; got "),
    "neither": ({"pointwise": "no"}, "pointwise: expected True or False; got 'no'"),
    "list": ({"coupling": ["affine"]}, "coupling: expected one of mixture, affine; got "),
    "large": ({"image_size": 21_000}, r"image_size: expected an integer in \[1, 8192\]; got 21000"),
    "too large": ({"in_channels": 65_536, "image_size": 128}, "image_size: expected at most 268435456 values in an i"),
    "size": ({"image_size": 0}, "image_size: expected an integer in \\[1, 8192\\]; got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_configuration_that_makes_no_sense_is_refused(case):
    settings, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        replace(TINY, **settings)


BAD_DEQUANTIZER = [
    ({"stack": "stripe99999999"}, "stack: expected at most 1024 layers in all; got 99999999"),
    ({"stack": "squeeze stripe4"}, "stack: expected levels stripe<n> alone in a dequantizer; got 'squeeze"),
    ({"stack": "stripe0"}, r"stack: expected words .* n at least 1; got 'stripe0' in 'stripe0'"),
    ({"context_blocks": 10**6}, r"context_blocks: expected an integer in \[1, 1024\]; got 1000000"),
    (
        {"context_filters": 6, "context_attention": "softmax"},
        "context_filters: expected a multiple of the 4 heads of attention; got 6",
    ),
]


@pytest.mark.parametrize(("settings", "message"), BAD_DEQUANTIZER)
def test_a_dequantizer_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DequantizerConfig(**settings)


def test_a_configuration_fits_other_data_or_says_why_not():
    assert TINY.for_data(8, 3, 0) == replace(TINY, image_size=8, in_channels=3)
    with pytest.raises(ValueError, match=r"num_classes: expected 0, since Flow\+\+ is unconditional; got 10"):
        TINY.for_data(8, 3, 10)
    with pytest.raises(ValueError, match="stack: expected even sizes where stripe2 halves them"):
        TINY.for_data(5, 1, 0)


def test_weights_for_an_endless_flow_are_refused_before_it_is_built(tmp_path, monkeypatch):
    flowpp().float().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    settings["model"] |= {"stack": "stripe512", "blocks_per_coupling": 2}
    path.write_text(json.dumps(settings))
    monkeypatch.setattr(FlowPP, "__init__", None)
    with pytest.raises(ValueError, match="weights of another configuration: expected those of 1024 layers; got "):
        FlowPP.from_pretrained(tmp_path)


def test_a_context_of_the_wrong_shape_is_refused():
    flow = MultiScaleFlow("stripe1", (1, 4, 4), SMALL, context_channels=3)
    x = torch.zeros(2, 1, 4, 4)
    expected = r"context: expected a tensor of shape \(2, 3, 4, 2\), or None for None; got "
    for context, got in ((None, "None"), (torch.zeros(2, 3, 4, 4), r"\(2, 3, 4, 4\)")):
        for method in (flow.forward, flow.inverse):
            with pytest.raises(ValueError, match=expected + got):
                method(x, context)
    with pytest.raises(ValueError, match="context: expected a tensor of shape None"):
        MultiScaleFlow("stripe1", (1, 4, 4), SMALL)(x, torch.zeros(2, 3, 4, 2))


def test_bad_input_to_a_model_is_refused():
    model = flowpp()
    x = torch.zeros(2, 1, 4, 4)
    for call, message in (
        (lambda: model(x[:, 0]), r"x: expected images of shape \(B, 1, 4, 4\); got \(2, 4, 4\)"),
        (lambda: model(x, torch.zeros(2)), "labels: expected None, since Flow"),
        (lambda: model.inverse(x), r"z: expected shape \(B, \*\(4, 2, 2\)\); got \(2, 1, 4, 4\)"),
        (lambda: model.sample(0), "num: expected at least 1; got 0"),
        (lambda: model.sample(2, chunk_size=0), "chunk_size: expected at least 1; got 0"),
        (lambda: model.sample(2, torch.zeros(2)), "labels: expected None, since Flow"),
        (lambda: model.sample(2, guidance=Guidance(2.0)), r"guidance: expected None, .*; got Guidance\(weight=2.0"),
        (lambda: model.sample(2, denoise_sigma=0.1), "denoise_sigma: expected 0, .*; got 0.1"),
        (lambda: model.sample(2, decoder="jacobi"), "decoder: expected auto, .*; got jacobi"),
        (
            lambda: model.importance_log_weights(pixels_of(TINY), num_samples=0),
            "num_samples: expected at least 1; got 0",
        ),
        (
            lambda: model.importance_log_weights(pixels_of(TINY)[..., :2]),
            r"pixels: expected images of shape .*; got \(3, 1, 4, 2\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in (
        (lambda: model.importance_log_weights(x), "pixels: expected uint8; got torch.float32"),
        (lambda: model.importance_log_weights(x.numpy()), "pixels: expected a torch.Tensor; got numpy.ndarray"),
        (lambda: model(x.numpy()), "x: expected a torch.Tensor; got numpy.ndarray"),
        (lambda: model.inverse(x.numpy()), "z: expected a floating-point torch.Tensor; got numpy.ndarray"),
        (lambda: model.inverse(x.long()), "z: expected a floating-point torch.Tensor; got torch.int64 of shape"),
        (lambda: model.sample(1.5), "num: expected an integer; got 1.5"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_weights_that_are_not_numbers_are_not_loaded(tmp_path):
    model = flowpp().float()
    with torch.no_grad():
        model.flow.steps[0][0][0].gain[0, 0, 0, 0] = math.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected finite weights; got nan or inf in flow.steps.0.0.0.gain"):
        FlowPP.from_pretrained(tmp_path)


def test_a_flow_of_another_kind_is_not_loaded(tmp_path):
    flowpp().float().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"flow: expected TarFlow.*; got 'FlowPP'"):
        TarFlow.from_pretrained(tmp_path)
