"""The report of the study says what its numbers are, and what they are not."""

import importlib.util
import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDIES))
    spec = importlib.util.spec_from_file_location("report", STUDIES / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("fashion_mnist", None)


def result(name, seed, bits):
    return {
        "name": name,
        "seed": seed,
        "weighted": bits,
        "one_sample": bits,
        "parameters": 1000,
        "seconds": None,
        "round_trip": {"max": 1e-4},
        "config": {"max_steps": 1000},
    }


@pytest.mark.parametrize(
    ("seeds", "trained"),
    [((0,), "Each model was trained once"), ((0, 1, 2), "Each model was trained up to 3 times")],
)
def test_errors_are_said_to_be_over_images_and_not_over_training(report, seeds, trained):
    results = [
        result(name, seed, [3.0 + more, 3.5 + 2 * more, 4.0])
        for seed in seeds
        for name, more in (("flowpp-uniform", 0.25), ("flowpp-variational", 0.0))
    ]
    said = report.errors(results).replace("\n", " ")
    assert "standard error over 3 test images" in said
    assert trained in said
    assert "What another seed of training would change is in none of the errors" in said
    assert "standard errors over images" in report.differences(results)
    # The mean of 1/4, 1/2 and 0 with its error over these three, whatever other seeds there are.
    rows = [line for line in report.differences(results).splitlines() if "+0.2500 ± 0.1443" in line]
    assert len(rows) == len(seeds)
