"""The studies say what their numbers are, and what they are not."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from torch.testing import assert_close

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
    for name in ("fashion_mnist", "samples"):
        sys.modules.pop(name, None)


@pytest.fixture
def samples(monkeypatch, tmp_path):
    module = load("samples")
    monkeypatch.setitem(sys.modules, "samples", module)  # dataclasses look their module up
    for name in ("RESULTS", "PAGE", "PICTURE"):
        monkeypatch.setattr(module, name, tmp_path / name)
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
def test_errors_are_said_to_be_over_images_and_those_of_means_over_seeds(report, seeds, trained):
    results = [
        result(name, seed, [3.0 + more, 3.5 + 2 * more, 4.0])
        for seed in seeds
        for name, more in (("flowpp-uniform", 0.25), ("flowpp-variational", 0.0))
    ]
    said = report.errors(results).replace("\n", " ")
    assert "standard error over 3 test images" in said
    assert trained in said
    assert "of a mean it is the standard deviation over seeds of training" in said
    assert "standard errors over images" in report.differences(results)
    means = [line for line in report.differences(results).splitlines() if "+0.2500 ± 0.0000" in line]
    assert [f"mean of {len(seeds)}" in line for line in means] == [True] * (len(seeds) > 1)
    # The mean of 1/4, 1/2 and 0 with its error over these three, whatever other seeds there are.
    rows = [line for line in report.differences(results).splitlines() if "+0.2500 ± 0.1443" in line]
    assert len(rows) == len(seeds)


def test_every_row_of_samples_is_one_of_the_command_and_no_two_are_the_same(samples):
    flags = {name: row.flags for name, row in samples.ROWS.items() if name != "sampling"}
    configs = [samples.read_flags(f"{samples.COMMON} {told}".split())[0].config for told in flags.values()]
    assert len({str(config) for config in configs}) == len(configs)


def test_every_score_of_samples_is_of_a_row_as_it_is_now(samples):
    results = [json.loads(path.read_text()) for path in (STUDIES / "results" / "samples").glob("*.json")]
    assert results
    for result in results:
        row = samples.ROWS[result["name"]]
        settings = samples.read_flags(f"{samples.COMMON} {row.flags}".split())[0].config.training
        assert (result["flags"], result["steps"]) == (row.flags, settings.max_steps)
        assert result["scores"].keys() <= row.samplings.keys()


TINY = "--patch-size 7 --channels 64 --num-blocks 2 --layers-per-block 1 --max-steps 2 --device cpu"


def test_a_row_is_trained_and_scored_once_for_each_seed_and_reported(samples, monkeypatch, tmp_path):
    ways = {"guided": samples.guided(1), "no labels": samples.Sampling(labels=False)}
    rows = {"tiny": samples.Row(TINY, ways, num=20)}
    panels = {lambda axes, results: samples._rows(axes, {1.0: results["tiny"]}, "guided", "tiny", "k"): ["tiny"]}
    told = {"ROWS": rows, "RECIPES": rows, "FIGURES": {}, "PANELS": panels, "NUM_IMAGES": 20}
    for name, given in told.items():
        monkeypatch.setattr(samples, name, given)
    samples.main(["tiny", "--seeds", "0", "1", f"--out={tmp_path / 'runs'}"])
    first, second = (json.loads((tmp_path / "RESULTS" / f"tiny-{seed}.json").read_text()) for seed in (0, 1))
    assert first["noisy_bits_per_dim"] != second["noisy_bits_per_dim"]
    assert first["scores"].keys() == ways.keys()
    assert first["scores"]["guided"]["recognised"] is not None
    assert first["scores"]["no labels"]["recognised"] is None
    monkeypatch.setattr(samples, "train", None)
    monkeypatch.setattr(samples, "score", None)
    samples.main(["tiny", "--seeds", "0", "1", f"--out={tmp_path / 'runs'}"])  # all is there
    (tmp_path / "PAGE").write_text(f"before\n{samples.BEGIN}\nold\n{samples.END}\nafter\n")
    samples.main(["--report"])
    page = (tmp_path / "PAGE").read_text()
    bits, distances = (
        samples.mean_and_deviation([get(result) for result in (first, second)], digits)
        for get, digits in (
            (lambda result: result["noisy_bits_per_dim"]["mean"], 3),
            (lambda result: result["scores"]["guided"]["distance"], 2),
        )
    )
    assert f"guided, n = 20 | 2 | 64 | {bits} (0.1) | {distances} |" in page
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    assert (tmp_path / "PICTURE").stat().st_size


def test_a_run_of_other_settings_is_not_scored_for_a_row(samples, tmp_path):
    one, other = (samples.read_flags(f"{TINY} --seed {seed}".split())[0].config for seed in (0, 1))
    weights = [samples.trained(one, tmp_path / "run").state_dict() for _ in range(2)]  # the second time as it was left
    assert_close(*weights, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"out: expected the run in .* to have the settings of its row"):
        samples.trained(other, tmp_path / "run")


def test_a_deviation_is_that_of_a_sample_of_seeds(samples):
    assert samples.mean_and_deviation([1.0, 3.0]) == "2.00 ± 1.41"
    assert samples.mean_and_deviation([1.0]) == "1.00"
