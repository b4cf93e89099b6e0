"""``tarflow evaluate`` scores models and their samples by the right images, and writes down how it was done."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from commands import DATASET_NAMES, change_samples, is_picture, main, train
from tarflow import TarFlow, datasets, evaluation
from tarflow.datasets import evenly_spaced


@pytest.fixture(scope="module")
def run(run, tmp_path_factory):
    """A copy of the run that test files share, for scores are written into it."""
    return shutil.copytree(run, tmp_path_factory.mktemp("cli") / "run")


@pytest.fixture(scope="module")
def unconditional(unconditional, tmp_path_factory):
    """A copy of the model without classes."""
    return shutil.copytree(unconditional, tmp_path_factory.mktemp("cli") / "unconditional")


@pytest.fixture(scope="module")
def likelihood(likelihood, tmp_path_factory):
    """A copy of the model for likelihoods."""
    return shutil.copytree(likelihood, tmp_path_factory.mktemp("cli") / "likelihood")


@pytest.fixture(scope="module")
def flowpp(flowpp, tmp_path_factory):
    """A copy of the Flow++."""
    return shutil.copytree(flowpp, tmp_path_factory.mktemp("cli") / "flowpp")


@pytest.mark.parametrize(
    ("kind", "sigma", "scores"), [("run", 0.1, 4), ("unconditional", 0.2, 3), ("likelihood", 0.0, 3)]
)
def test_evaluate_prints_and_writes_the_scores(request, capsys, kind, sigma, scores):
    run = request.getfixturevalue(kind)
    capsys.readouterr()
    assert main("evaluate", run, "--num-images=50", "--importance-samples=2", "--device=cpu") == 0
    written = json.loads((run / "evaluation.json").read_text())
    test = datasets.load("fashion-mnist", "test")
    expected = evaluation.evaluate(
        TarFlow.from_pretrained(run), *test.get_batch(evenly_spaced(len(test), 50)), sigma, num_samples=2
    )
    assert {name: evaluation.Estimate(**row) for name, row in written["scores"].items()} == expected
    assert len(expected) == scores
    lines = [f"{test.source}; 50 of them, mean ± standard error over images"]
    lines += [f"{estimate}   {name}" for name, estimate in expected.items()]
    assert capsys.readouterr().out.splitlines() == lines


def test_evaluate_resizes_as_told(photos, tmp_path, capsys):
    flags = ("--dataset=folder", f"--data-dir={photos / 'good'}", "--image-size=14", "--no-conditional", "--guidance=0")
    run = train(tmp_path / "run", *flags, steps=1)
    means = []
    for resize in ("lanczos", "bilinear"):
        capsys.readouterr()
        assert (
            main("evaluate", run, "--num-images=4", "--importance-samples=1", f"--resize={resize}", "--device=cpu") == 0
        )
        assert f"resized to 14 ({resize}) and centre-cropped; " in capsys.readouterr().out
        scores = json.loads((run / "evaluation.json").read_text())["scores"]
        means.append([row["mean"] for row in scores.values()])
    assert means[0] != means[1]


def test_a_flowpp_is_trained_sampled_and_scored(flowpp, tmp_path, capsys):
    assert all(is_picture(flowpp / name) for name in ("samples.png", "trajectory.png", "curves.png"))
    assert main("sample", flowpp, "--num=8", f"--out={tmp_path / 's.png'}", "--device=cpu") == 0
    assert is_picture(tmp_path / "s.png")
    assert re.search(r"8 images in [0-9.]+ s, ", capsys.readouterr().out)
    assert main("sample", flowpp, "--num=3", f"--out={tmp_path / 's.npz'}", "--device=cpu") == 0
    assert np.load(tmp_path / "s.npz")["images"].shape == (3, 28, 28, 1)
    assert main("evaluate", flowpp, "--num-images=20", "--importance-samples=3", "--device=cpu") == 0
    one_sample, weighted = json.loads((flowpp / "evaluation.json").read_text())["scores"].items()
    assert one_sample[0] == "bits/dim of 8-bit images, variational dequantization, one sample (the mean over 3)"
    assert weighted[0] == "bits/dim of 8-bit images, variational dequantization, 3 importance-weighted draws"
    assert weighted[1]["mean"] < one_sample[1]["mean"]


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    """Statistics of the test images that ship, of which there are fewer."""
    path = tmp_path_factory.mktemp("statistics") / "fashion-mnist.safetensors"
    assert main("statistics", "fashion-mnist", "--split=test", f"--out={path}", "--device=cpu") == 0
    return path


def score_samples(run, *flags):
    fast = ("--num-images=4", "--importance-samples=1", "--device=cpu")
    assert main("evaluate", run, "--samples=20", *fast, *flags) == 0
    return json.loads((run / "evaluation.json").read_text())


SAMPLE_SCORES = [
    "Frechet distance in classifier features",
    "kernel distance in classifier features, 100 subsets of 10: mean",
    "kernel distance in classifier features, 100 subsets of 10: standard deviation",
    "precision of 20 samples",
    "recall of 20 real images",
    "recognised as their class",
    "floor: the distance between two disjoint sets of 20 real images",
    "ceiling: the distance of 20 images of uniform noise",
]


def test_samples_are_scored_beside_the_likelihoods_and_with_their_protocol(run, statistics, capsys):
    capsys.readouterr()
    record = score_samples(run, f"--statistics={statistics}", "--guidance=1", "--seed=1")
    scores, protocol = record["samples"]["scores"], record["samples"]["protocol"]
    assert [*scores] == SAMPLE_SCORES
    assert np.isfinite([*scores.values()]).all()
    assert len(record["scores"]) == 4
    stated = {"protocol": "tarflow", "samples": 20, "quantization": "truncate", "resize": "none", "seed": 1}
    stated |= {"labels": "drawn uniformly from 10 classes", "denoising": "Tweedie at sigma 0.1, 0.1"}
    assert stated.items() <= protocol.items()
    assert protocol["guidance"]["weight"] == 1
    assert protocol["reference"]["images"] == 1000
    assert protocol["versions"]["torch"] == torch.__version__
    lines = capsys.readouterr().out.splitlines()
    for name, value in scores.items():
        assert f"{value:.4g}   {name}" in lines
    assert {line.split()[0] for line in lines} >= {name.split()[0] for name in protocol}


def test_each_flag_of_samples_changes_their_scores_and_the_seed_repeats_them(run, statistics):
    settings = ["", "--protocol=balanced", "--guidance=3", "--sigma=0", "--seed=1"]
    records = [score_samples(run, f"--statistics={statistics}", *flags.split())["samples"] for flags in settings]
    assert len({record["scores"][SAMPLE_SCORES[0]] for record in records}) == len(settings)
    again = score_samples(run, f"--statistics={statistics}", "--decoder=sequential")["samples"]
    assert again["scores"] == pytest.approx(records[0]["scores"])
    assert records[1]["protocol"]["labels"] == "in turn from 10 classes"
    assert records[1]["protocol"]["quantization"] == "round"


def test_samples_that_are_not_finite_are_reported_and_enter_no_score(run, statistics, monkeypatch):
    draws = []

    def spoil_the_first(images):
        draws.append(len(images))
        if len(draws) == 1:
            images[:3, 0, 5] = torch.nan

    change_samples(monkeypatch, spoil_the_first)
    record = score_samples(run, f"--statistics={statistics}")["samples"]
    assert draws == [20, 3]
    assert record["protocol"]["not finite, drawn anew"] == 3
    assert np.isfinite([*record["scores"].values()]).all()


@pytest.mark.parametrize("kind", ["unconditional", "flowpp"])
def test_samples_without_labels_are_scored_too(request, statistics, kind):
    record = score_samples(request.getfixturevalue(kind), f"--statistics={statistics}")["samples"]
    assert [*record["scores"]] == [name for name in SAMPLE_SCORES if name != "recognised as their class"]
    assert record["protocol"]["labels"] == "none"


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """A package with the whole of Fashion-MNIST, though small, which is taken in place of the subset while it is."""
    folder, draw = tmp_path / "package", np.random.default_rng(0)
    folder.mkdir()
    for name, size in zip(DATASET_NAMES, (64, 64, 20, 20), strict=True):
        shape = (size, 28, 28) if "images" in name else (size,)
        header = bytes((0, 0, 8, len(shape))) + np.array(shape, ">u4").tobytes()
        (folder / name).write_bytes(header + draw.integers(0, 10, shape, np.uint8).tobytes())
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", folder)
    return folder


def test_a_model_is_not_scored_on_images_that_it_may_have_been_trained_on(whole, tmp_path, monkeypatch, capsys):
    out = train(tmp_path / "run", steps=2)
    score = ("evaluate", out, "--num-images=20", "--importance-samples=1", "--device=cpu")
    assert main(*score) == 0
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "not-installed")
    capsys.readouterr()
    assert main(*score) == 1
    message = (
        "data_dir: expected the test images of the data that the run was trained on, Fashion-MNIST, 20 test images"
    )
    errors = capsys.readouterr().err
    assert errors.startswith(f"tarflow evaluate: error: {message}")
    assert len(errors.splitlines()) == 1
    # Who asks for other images gets them, with a warning; and the right ones, from wherever they lie, without.
    for flags, warning in (["--dataset=fashion-mnist"], f"warning: {message[10:]}"), ([f"--data-dir={whole}"], ""):
        assert main(*score, *flags) == 0
        assert capsys.readouterr().err.startswith(warning)
    # The training images under the name of test images.
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        (whole / f"t10k-{kind}").write_bytes((whole / f"train-{kind}").read_bytes())
    assert main(*score, f"--data-dir={whole}") == 1
    assert "dataset: expected other images than the run was trained on; got" in capsys.readouterr().err


def test_samples_are_compared_with_the_training_images_of_the_run(whole, tmp_path):
    reference = score_samples(train(tmp_path / "run", steps=2))["samples"]["protocol"]["reference"]
    assert (reference["images"], reference["transform"]) == (64, "none")
    assert reference["data"] == f"Fashion-MNIST, 64 train images from {whole}"
    mirrored = score_samples(train(tmp_path / "mirrored", "--flip=True", steps=2))["samples"]["protocol"]["reference"]
    assert mirrored["transform"] == "mirrored with probability 1/2, seed 0"
