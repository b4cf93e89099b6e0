"""Bits/dim are those of densities that are known, posteriors are Bayes' rule, and errors are standard errors."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from helpers import tarflow
from tarflow import TarFlow, TarFlowConfig, datasets
from tarflow.evaluation import Estimate, accuracy, bits_per_dim, class_log_posterior, evaluate, noisy_bits_per_dim
from tarflow.noise import add_gaussian_noise, add_uniform_noise

# How each is added, and scored.
NOISES = {
    "uniform": (add_uniform_noise, bits_per_dim),
    "gaussian": (partial(add_gaussian_noise, sigma=0.1), partial(noisy_bits_per_dim, sigma=0.1)),
}
each_noise = pytest.mark.parametrize(("add", "score"), NOISES.values(), ids=NOISES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def standard_normal(**config):
    """An untrained flow is the identity, so its density is that of its prior."""
    return TarFlow(TarFlowConfig(**{"image_size": 8, "channels": 64, "num_blocks": 2, "layers_per_block": 1} | config))


def trained_on_nothing(**config):
    """A flow over 28x28 images whose layers mix and whose density is far from the prior's."""
    return tarflow(dtype=torch.float32, image_size=28, patch_size=7, num_blocks=2, layers_per_block=1, **config)


@pytest.fixture(scope="module")
def fashion():
    """The first test images: uint8 (40, 1, 28, 28) and labels."""
    return datasets.load("fashion-mnist", "test").get_batch(torch.arange(40))


@pytest.mark.parametrize("value", [0, 1, 100, 127, 128, 254, 255])
def test_bits_of_8_bit_images_are_exact_where_the_probability_of_a_pixel_is_known(value):
    pixels = torch.full((200, 1, 8, 8), value, dtype=torch.uint8)
    edges = np.linspace(value, value + 1, 1001) / 128 - 1
    middles = (edges[1:] + edges[:-1]) / 2
    probability = (np.exp(-(middles**2) / 2) / math.sqrt(2 * math.pi) * np.diff(edges)).sum()
    estimate = bits_per_dim(standard_normal(), pixels, num_samples=8, generator=seeded())
    assert estimate.mean == pytest.approx(-math.log2(probability), abs=1e-4)


@pytest.mark.parametrize("value", [0, 100, 255])
@pytest.mark.parametrize("sigma", [0.0, 0.1, 1.0])
def test_bits_of_noisy_images_are_those_of_a_known_gaussian(value, sigma):
    pixels = torch.full((400, 1, 8, 8), value, dtype=torch.uint8)
    square = (value / 127.5 - 1) ** 2 + sigma**2  # of a noisy pixel, on average
    expected = 7 + (math.log(2 * math.pi) + square) / (2 * math.log(2))
    estimate = noisy_bits_per_dim(standard_normal(), pixels, sigma=sigma, generator=seeded())
    assert estimate.mean == pytest.approx(expected, abs=1e-5 + 4 * estimate.standard_error)
    assert estimate.standard_error < 0.02


def test_samples_are_averaged_as_probabilities_which_gives_fewer_bits(fashion):
    model, images = trained_on_nothing(), fashion[0]
    for block in model.flow.blocks:
        block.transformer.proj_out.bias.data[:49] -= 1  # alpha: a density that varies within the bin of a pixel
    gaps = []
    for image in images.split(1):
        generator = seeded()
        bits = np.array([784 * bits_per_dim(model, image, generator=generator).mean for _ in range(8)])
        together = 784 * bits_per_dim(model, image, num_samples=8, generator=seeded()).mean  # of the same eight
        assert together == pytest.approx(-np.log2(np.exp2(bits.min() - bits).mean()) + bits.min(), rel=1e-5)
        gaps.append(bits.mean() - together)
    assert min(gaps) > 0.1


@pytest.mark.parametrize("num", [1, 2, 7])
def test_the_error_is_the_standard_error_of_the_mean(num):
    values = torch.tensor(np.random.default_rng(num).normal(3, 2, num), dtype=torch.float32)
    estimate, expected = Estimate.of(values), values.double().numpy()
    assert estimate.mean == pytest.approx(expected.mean())
    if num == 1:
        assert math.isnan(estimate.standard_error)
    else:
        assert estimate.standard_error == pytest.approx(expected.std(ddof=1) / math.sqrt(num))
    assert str(Estimate(1.23456, 0.00123)) == "1.2346 ± 0.0012"


@each_noise
@pytest.mark.parametrize("batch_size", [1, 16, 39])
def test_with_one_sample_the_batch_size_does_not_matter(fashion, add, score, batch_size):
    # An image has a multiple of 16 values, so torch.randn, which makes them 16 at a time, goes on where it was.
    model, labels = trained_on_nothing(num_classes=10), fashion[1]
    whole, parts = (score(model, fashion[0], labels, batch_size=size, generator=seeded()) for size in (40, batch_size))
    assert parts.mean == pytest.approx(whole.mean, abs=1e-5)
    assert parts.standard_error == pytest.approx(whole.standard_error, abs=1e-5)


@each_noise
def test_scores_are_those_of_float32_and_repeated_by_the_seed(fashion, add, score):
    model = trained_on_nothing()
    with torch.no_grad():
        nats = model.log_prob(add(fashion[0], generator=seeded())).mean().item()
    scores = [score(model, fashion[0], generator=seeded(seed)) for seed in (0, 0, 1)]
    with torch.autocast("cpu", torch.bfloat16):
        scores.append(score(model, fashion[0], generator=seeded()))
    assert scores[0].mean == pytest.approx(-(nats - 784 * math.log(128)) / (784 * math.log(2)), abs=1e-5)
    assert scores[0] == scores[1] == scores[3] != scores[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_posterior_is_bayes_rule(dtype):
    model = tarflow(num_classes=3, dtype=dtype)
    x = torch.rand(20, 1, 4, 4, dtype=dtype, generator=seeded()) * 2 - 1
    posterior = class_log_posterior(model, x)
    with torch.no_grad():
        likelihood = np.stack([model.log_prob(x, torch.full((20,), k)).double().exp().numpy() for k in range(3)], 1)
    bayes = torch.tensor(likelihood / likelihood.sum(1, keepdims=True))
    assert posterior.dtype == dtype
    assert not posterior.requires_grad
    assert_close(posterior.double().exp(), bayes, atol=1e-4, rtol=1e-4)
    assert_close(posterior.double().exp().sum(1), torch.ones(20, dtype=torch.float64), atol=1e-5, rtol=0)
    assert len(set(posterior.argmax(1).tolist())) > 1


def shades(size):
    """Black, gray and white images, and their labels."""
    labels = torch.arange(size) % 3
    return (labels * 127).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8), labels


@torch.no_grad()
def painter():
    """A flow that expects of a pixel beyond the first patch the shade of the class, give or take 1."""
    model = standard_normal(num_blocks=1, num_classes=3)
    transformer = model.flow.blocks[0].transformer
    for parameter in transformer.parameters():
        parameter.zero_()
    transformer.class_embed[:, 0] = torch.tensor([-1.0, 0.0, 1.0])
    transformer.proj_out.weight[16:, 0] = 1  # mu of each of the 16 values of a patch
    return model


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_classes_that_look_different_are_told_apart(sigma):
    images, labels = shades(30)
    right, wrong = (
        accuracy(painter(), images, given, sigma, generator=seeded()) for given in (labels, (labels + 1) % 3)
    )
    assert (right, wrong) == (Estimate(1, 0), Estimate(0, 0))


def test_noise_beyond_the_difference_between_classes_hides_it():
    assert 0.4 < accuracy(painter(), *shades(300), sigma=20.0, generator=seeded()).mean < 0.8


def test_an_untrained_model_knows_no_class():
    images, labels = shades(300)
    model = standard_normal(num_classes=3)
    assert_close(class_log_posterior(model, images / 127.5 - 1), torch.full((300, 3), -math.log(3)))
    assert accuracy(model, images, labels).mean == pytest.approx(1 / 3)


GAUSSIAN = r"Gaussian noise of sigma 0\.1 .*comparable at equal sigma only"
ONE = r"8-bit images, uniform dequantization, one sample \(the mean over 2\)"
UNIFORM = "8-bit images, uniform dequantization, 2 importance-weighted draws"
FOREIGN = [f"{name} .*the model never saw such noise" for name in (ONE, UNIFORM)]


@pytest.mark.parametrize(
    ("sigma", "num_classes", "names"),
    [
        (0.1, 3, [GAUSSIAN, *FOREIGN, "accuracy"]),
        (0.0, 3, [f"{ONE}$", f"{UNIFORM}$", "accuracy"]),
        (0.1, 0, [GAUSSIAN, *FOREIGN]),
        (0.0, 0, [f"{ONE}$", f"{UNIFORM}$"]),
    ],
)
def test_a_model_gets_the_scores_that_make_sense_for_it(sigma, num_classes, names):
    model, data = standard_normal(num_classes=num_classes), shades(8)
    scores = evaluate(model, *data, sigma, num_samples=2)
    assert [bool(re.search(name, score)) for name, score in zip(names, scores, strict=True)] == [True] * len(names)
    assert (
        scores == evaluate(model, *data, sigma, num_samples=2) != evaluate(model, *data, sigma, num_samples=2, seed=1)
    )


@pytest.mark.parametrize("num_samples", [0, -1])
def test_scoring_takes_a_sample(num_samples):
    with pytest.raises(ValueError, match=f"num_samples: expected at least 1; got {num_samples}"):
        bits_per_dim(standard_normal(), shades(9)[0], num_samples=num_samples)


@pytest.mark.parametrize(
    ("num_classes", "labels", "message"),
    [
        (0, torch.zeros(9, dtype=torch.int64), "labels: expected None for an unconditional model"),
        (3, None, r"labels: expected int64 of shape \(9,\) .* got None"),
        (3, torch.full((9,), 3), r"labels: .* got values from 3 to 3"),
    ],
)
@each_noise
def test_labels_have_to_fit_the_model(add, score, num_classes, labels, message):
    with pytest.raises(ValueError, match=message):
        score(standard_normal(num_classes=num_classes), shades(9)[0], labels)


def test_only_a_model_with_classes_classifies():
    with pytest.raises(ValueError, match="model: expected a class-conditional model; got one with num_classes=0"):
        accuracy(standard_normal(), *shades(9))
