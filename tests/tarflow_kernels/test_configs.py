"""The choice of a configuration: what was tuned for the card, else a fallback that its compiler can follow."""

import pytest

from tarflow_kernels.offline import TARGETS, pretend
from tarflow_kernels.triton import configs

FALLBACK = {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 168}
TUNED = {"BLOCK_N": 32, "num_warps": 4, "num_stages": 4, "maxnreg": 128}


@pytest.fixture
def untuned(monkeypatch):
    monkeypatch.setattr(configs, "tuned", lambda kernel, device: {})


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("sm_90", FALLBACK),
        ("sm_80", {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}),
        ("sm_100", {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}),
        ("gfx942", {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2}),
    ],
)
def test_a_fallback_is_one_for_the_architecture(target, expected, untuned):
    """A limit of registers is for Hopper alone, and only NVIDIA's cards copy past the registers."""
    with pretend(TARGETS[target]):
        assert configs.choose("kernel", "key", FALLBACK) == expected


def test_what_was_tuned_is_taken_as_it_is(monkeypatch):
    monkeypatch.setattr(configs, "tuned", lambda kernel, device: {"key": TUNED})
    with pretend(TARGETS["sm_80"]):
        assert configs.choose("kernel", "key", FALLBACK) == TUNED


def test_a_configuration_that_is_forced_comes_before_all_others(untuned):
    with pretend(TARGETS["gfx942"]), configs.use("kernel", TUNED):
        assert configs.choose("kernel", "key", FALLBACK) == TUNED
