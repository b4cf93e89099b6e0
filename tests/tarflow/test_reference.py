"""The model agrees with TarFlow as the paper writes it, in both directions and under every kind of guidance."""

import copy

import pytest
import torch
from torch.testing import assert_close

import reference_tarflow as reference
from helpers import draw, tarflow
from tarflow import Guidance

LEVELS = (0.01, 0.5)
MODELS = {
    "one block": {"num_blocks": 1},
    "two blocks, colour": {"num_blocks": 2, "in_channels": 3},
    "three blocks, classes": {"num_blocks": 3, "num_classes": 4},
    "four blocks, one layer, one head": {"num_blocks": 4, "layers_per_block": 1, "head_dim": 32, "num_classes": 3},
    "volume preserving": {"volume_preserving": True},
    "volume preserving, classes": {"num_blocks": 2, "volume_preserving": True, "num_classes": 4},
    "nine tokens": {"image_size": 6, "num_blocks": 2},
    "one token": {"image_size": 2, "num_classes": 3},
    "mixture": {"coupling": "mixture", "num_mixtures": 3},
    "one component, classes": {"num_blocks": 1, "coupling": "mixture", "num_mixtures": 1, "num_classes": 4},
    "mixture, one token": {"image_size": 2, "coupling": "mixture"},
    "sizes of their own": {"channels": (32, 16, 48), "layers_per_block": (1, 3, 2), "num_classes": 3},
    "noise levels": {"noise_levels": LEVELS},
    "noise levels, classes, sizes": {"noise_levels": LEVELS, "num_classes": 3, "channels": (16, 32, 32)},
    "noise levels, mixture": {"noise_levels": LEVELS, "coupling": "mixture", "num_mixtures": 3},
    "patches of one pixel, narrow MLP": {"image_size": 3, "patch_size": 1, "expansion": 2, "num_blocks": 2},
}

GUIDED = {
    "label, linear": Guidance(0.75),
    "label, constant": Guidance(0.75, "constant"),
    "label, only alpha": Guidance(0.75, parameters="alpha"),
    "label, only mu": Guidance(0.75, parameters="mu"),
    "label and temperature": Guidance(0.75, temperature=0.5),
    "temperature, label kept": Guidance(0.75, temperature=0.5, drop_label=False),
    "temperature, label kept, constant, only alpha": Guidance(0.75, "constant", 1.5, "alpha", drop_label=False),
    "no weight": Guidance(0.0),
    "one block": Guidance(0.75, blocks=1),
    "densities": Guidance(0.75, rule="gaussian"),
    "densities, constant, one block": Guidance(0.75, "constant", rule="gaussian", blocks=1),
    "densities, temperature": Guidance(0.75, temperature=0.5, rule="gaussian"),
}
UNCONDITIONAL = {
    "unconditional, temperature": Guidance(0.75, temperature=0.5),
    "unconditional, temperature, constant, only mu": Guidance(0.75, "constant", 1.5, "mu"),
}
LABELS = torch.tensor([-1, 0, 2])  # one is dropped


def table(rows):
    return [pytest.param(*row, id=name) for name, *row in rows]


def build(**config):
    """A model, and the labels and noise levels of three images as it takes them."""
    model = tarflow(**config)
    levels = torch.tensor([0.01, 0.2, 0.5], dtype=torch.float64) if model.noise_levels else None
    return model, LABELS if model.config.num_classes else None, levels


def agree_in_both_precisions(run, model, inputs, *expected):
    """``run`` gives what is expected with a float64 model and inputs, and nearly so after rounding both to float32."""
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        outputs = run(copy.deepcopy(model).to(dtype), inputs.to(dtype))
        for output, value in zip(outputs, expected, strict=True):
            assert output.dtype == dtype
            assert_close(output.detach().double(), value, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("config", table(MODELS.items()))
def test_forward(config):
    model, labels, levels = build(**config)
    x = draw(1, 3, model.config.in_channels, model.config.image_size, model.config.image_size)
    expected = reference.forward(model.state_dict(), model.config, x, labels, levels)
    agree_in_both_precisions(lambda model, x: model(x, labels, noise_level=levels), model, x, *expected)


@pytest.mark.parametrize("config", table(MODELS.items()))
def test_inverse(config):
    model, labels, levels = build(**config)
    z = draw(2, 3, model.config.num_tokens, model.config.token_dim)
    expected = reference.inverse(model.state_dict(), model.config, z, labels, levels)
    agree_in_both_precisions(
        lambda model, z: [model.inverse(z, labels, decoder="sequential", noise_level=levels)], model, z, expected
    )


@pytest.mark.parametrize(
    ("coupling", "guidance", "num_classes"),
    table(
        (f"{options}, {name}", options, guidance, 4 if name in GUIDED else 0)
        for options in (
            {},
            {"volume_preserving": True},
            {"noise_levels": LEVELS},
            {"coupling": "mixture", "num_mixtures": 3},
            {"coupling": "mixture", "num_mixtures": 3, "noise_levels": LEVELS},
        )
        for name, guidance in (GUIDED | UNCONDITIONAL).items()
        if "coupling" not in options or (guidance.parameters, guidance.rule) == ("both", "extrapolate")
    ),
)
def test_guided_inverse(coupling, guidance, num_classes):
    model, labels, levels = build(num_blocks=2, num_classes=num_classes, **coupling)
    z = draw(2, 3, 4, 4)
    expected = reference.inverse(model.state_dict(), model.config, z, labels, levels, **vars(guidance))
    agree_in_both_precisions(
        lambda model, z: [model.inverse(z, labels, guidance, noise_level=levels)], model, z, expected
    )


@pytest.mark.parametrize("options", [{}, {"noise_levels": LEVELS}], ids=str)
def test_no_two_kinds_of_guidance_are_the_same_map(options):
    """Otherwise agreement above would not show that the model tells them apart."""
    model, _, levels = build(num_blocks=2, num_classes=4, **options)
    z, labels = draw(2, 3, 4, 4), torch.tensor([0, 1, 3])
    images = [
        reference.inverse(model.state_dict(), model.config, z, labels, levels, **vars(g)) for g in GUIDED.values()
    ]
    distances = torch.stack([torch.stack([(a - b).abs().amax() for b in images]) for a in images])
    assert (distances.fill_diagonal_(1) > 0.01).all()


@pytest.mark.parametrize("guidance", [Guidance(0.7), Guidance(0.7, "constant"), Guidance(0.5, "constant", 0.3)])
def test_guidance_that_float32_cannot_hold_is_exact_in_float64(guidance):
    model, labels, _ = build(num_blocks=2, num_classes=4)
    z = draw(2, 3, 4, 4)
    expected = reference.inverse(model.state_dict(), model.config, z, labels, **vars(guidance))
    assert_close(model.inverse(z, labels, guidance), expected, atol=1e-10, rtol=1e-10)
