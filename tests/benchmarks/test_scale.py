"""What many devices are predicted to take follows the formulas of the page, which says that nothing was measured."""

import json
from dataclasses import replace

import pytest

import scale
from scale import H100, IMAGENET64, STARFLOW, held, largest_batch, seconds, step

MODELS = pytest.mark.parametrize("model", [IMAGENET64, STARFLOW], ids=lambda model: model.name)


def test_the_models_are_those_that_the_page_names():
    assert IMAGENET64.parameters == pytest.approx(466e6, rel=0.01)
    assert STARFLOW.parameters == pytest.approx(12 * 34 * 3072**2, rel=0.02)


@pytest.mark.parametrize(("devices", "machines"), [(8, 1), (8, 4), (1, 16)])
def test_what_crosses_a_link_takes_its_bytes_over_its_rate(devices, machines):
    idle = replace(H100, hop=0.0, network_hop=0.0)
    within, between = ((n - 1) / n for n in (devices, machines))
    expected = within * 8e9 / 450e9 + between * 8e9 / devices / 50e9
    assert seconds(8e9, devices, machines, 7, idle) == pytest.approx(expected)
    hops = 7 * ((devices - 1) * 1e-6 + (machines - 1) * 4e-6)
    assert seconds(8e9, devices, machines, 7, H100) == pytest.approx(expected + hops)


@MODELS
@pytest.mark.parametrize("count", [8, 64, 1024])
def test_a_device_receives_as_much_however_weights_are_shared(model, count):
    """In bfloat16, gathering twice is as much as adding up once more; and hybrid sends less over the network."""
    received = {sharding: step(model, sharding, count, 1).received for sharding in ("none", "full")}
    assert received["none"] == pytest.approx(received["full"])
    assert received["none"] == pytest.approx(8 * model.parameters * (count - 1) / count)


@MODELS
def test_more_images_hide_more_and_more_devices_hide_less(model):
    shares = [[step(model, "full", count, images).exposed for images in (1, 4, 16)] for count in (16, 256, 1024)]
    assert all(row == sorted(row, reverse=True) for row in shares)
    assert all(list(column) == sorted(column) for column in zip(*shares, strict=True))


@MODELS
def test_sharding_leaves_room_for_images(model):
    states = [held(model, "full", count)[0] for count in (8, 64, 1024)]
    assert states == sorted(states, reverse=True)
    assert largest_batch(model, "full", 64) > largest_batch(model, "hybrid", 64) > largest_batch(model, "none", 64)
    assert held(model, "none", 64)[0] == 20 * model.parameters


def test_the_page_is_the_one_that_is_committed():
    page = scale.page()
    assert (scale.ROOT / "docs" / "scale.md").read_text() == page
    assert "nothing on this page was measured on a GPU" in page.splitlines()[0]


def test_the_bytes_of_gloo_are_those_of_the_formulas():
    """Where weights are split, they are those of adding up whole gradients: twice 4 bytes a parameter, not once."""
    for row in json.loads(scale.CHECK.read_text())["rows"]:
        whole = 4 / 3 if row["sharding"] == "full" else 1
        assert row["received"] == pytest.approx(whole * row["predicted_received"], rel=0.05)
