"""The pages of kernels/examples on other libraries: accelerated flows agree with theirs, and each names the gain."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from tarflow_kernels import incremental
from tarflow_kernels.adapters import common

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parents[1] / "kernels" / "examples"
SMALL = {
    "zuko": {"names": ("MAF", "NSF", "mixtures"), "features": 6, "hidden": 16, "steps": 5, "repeats": 1},
    "nflows": {"features": 6, "hidden": 16, "layers": 3, "steps": 5, "repeats": 1},
    "normflows": {"features": 6, "hidden": 16, "layers": 2, "steps": 5, "repeats": 1},
    "pyro": {"features": 6, "steps": 5, "repeats": 1},
}
# In float32: rounding of one layer is magnified by the next ones, in steep maps of a trained flow by a hundred or so.
TOLERANCE = 1e-4


@pytest.fixture
def inversions(monkeypatch):
    """The rows of each inverse that was found incrementally."""
    found = []

    def counting(network, y, inverse):
        found.append(len(y))
        return original(network, y, inverse)

    monkeypatch.setattr(incremental, "FEW_PRODUCTS", 0)  # no page is too small for it
    original = common.incremental_inverse
    monkeypatch.setattr(common, "incremental_inverse", counting)
    return found


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested():
    elsewhere = (TESTS / "test_self_attention.py").read_text()
    others = {page.stem for page in EXAMPLES.glob("*.py")} - {f"with_{library}" for library in SMALL}
    assert others
    assert all(f"{other}.py" in elsewhere for other in others)


@pytest.mark.parametrize("rows", [8, 70])  # the former may be inverted by fixed-point iteration
@pytest.mark.parametrize("library", SMALL)
def test_accelerated_flows_agree_and_the_page_ends_with_the_gain(library, rows, inversions, capsys):
    pytest.importorskip(library)
    differences = load(f"with_{library}").main(rows=rows, **SMALL[library])
    assert len(differences) >= 4
    assert all(0 <= difference < TOLERANCE for difference in differences)
    assert inversions
    assert re.search(r" ms accelerated, gain: \d+\.\d times\n$", capsys.readouterr().out)


@pytest.mark.parametrize("library", SMALL)
def test_apart_is_relative_to_the_largest_of_a_row(library):
    pytest.importorskip(library)
    theirs = torch.tensor([[1.0, 9.0], [0.0, 0.0]])
    apart = load(f"with_{library}").apart
    assert apart(theirs, theirs) == 0
    assert apart(theirs + torch.tensor([[1.0, 0.0], [0.0, 0.0]]), theirs) == pytest.approx(0.1)
    assert apart(theirs + torch.tensor([[0.0, 0.0], [0.0, -0.5]]), theirs) == pytest.approx(0.5)
