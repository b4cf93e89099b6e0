"""The studies say what their numbers are, and what they are not."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[2] / "studies"


def load(name):
    spec = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDIES))
    yield load("report")
    sys.modules.pop("fashion_mnist", None)


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    module = load("recipe")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "NUM_IMAGES", 20)
    return module


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


def test_every_recipe_is_one_of_the_command_and_no_two_are_the_same(recipe):
    configs = [recipe.read_flags(f"{flags} {recipe.COMMON}".split())[0].config for flags in recipe.RECIPES.values()]
    assert len({str(config) for config in configs}) == len(configs)


TINY = "--patch-size 7 --channels 64 --num-blocks 2 --layers-per-block 1 --device cpu"


@pytest.mark.parametrize(("load", "comparable"), [(1.2, True), (2.0, False)])
def test_a_recipe_is_trained_and_scored_once_and_says_whether_its_time_compares(
    recipe, monkeypatch, tmp_path, capsys, load, comparable
):
    monkeypatch.setattr(recipe, "_load", lambda: load)
    arguments = ["--add", "tiny", f"--optimizer muon {TINY}", "--steps=2", "--seeds", "0", "1", f"--out={tmp_path}"]
    recipe.main(arguments)
    paths = sorted((tmp_path / "results").iterdir())
    assert [path.name for path in paths] == ["tiny-2-0.json", "tiny-2-1.json"]
    first, second = (json.loads(path.read_text()) for path in paths)
    assert first["noisy_bits_per_dim"] != second["noisy_bits_per_dim"]
    assert (first["images"], first["samples"], first["config"]["training"]["optimizer"]) == (32, None, "muon")
    assert [step for step, _ in first["curve"]] == [2]
    assert first["seconds"] > 0
    assert first["seconds_comparable"] == comparable
    table = capsys.readouterr().out
    assert ("not comparable: a shared machine" in table) != comparable
    monkeypatch.setattr(recipe, "train", None)
    recipe.main(arguments)
    assert capsys.readouterr().out == table[table.index("| recipe") :]


def test_samples_that_cannot_be_scored_are_recorded_with_the_reason(recipe, monkeypatch, tmp_path):
    config = recipe.read_flags(TINY.split())[0].config
    scored = recipe.score_samples(tmp_path / "nothing", config, samples=1000)
    assert list(scored) == ["unavailable"]
    assert "error: " in scored["unavailable"]
