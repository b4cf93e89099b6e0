"""``tarflow train`` leaves a folder with weights, log and pictures, and ends with a score; presets are as published."""

import json
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from commands import change_samples, is_picture, main, train
from tarflow import TarFlow, TarFlowConfig, datasets
from tarflow.decoding import calibration
from tarflow.training.folder import new_folder
from tarflow.training.presets import PRESETS
from tarflow.training.trainer import build


def test_a_run_leaves_its_folder(run):
    names = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    pictures = {"samples.png", "trajectory.png", "curves.png"}
    weights = {"config.json", "model.safetensors", "calibration.json"}
    assert names == {*weights, "metrics.jsonl", "checkpoints", ".lock", *pictures}
    assert all(is_picture(run / name) for name in pictures)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000006.pt", "step-00000008.pt"]
    model = TarFlow.from_pretrained(run)
    assert model.config == TarFlowConfig(28, 1, 7, 64, 2, 1, num_classes=10)
    average = torch.load(run / "checkpoints" / "step-00000008.pt")["average"]
    assert all(torch.equal(tensor, average[name]) for name, tensor in model.state_dict().items())


def test_a_run_times_the_decoders_of_its_weights_unless_told_otherwise(run, flowpp, tmp_path, capsys):
    stored = calibration.load(run)
    assert {timing.rows for timing in stored} == {2, 12, 160}, "its samples are guided"
    assert {timing.block for timing in stored} == {0, 1}
    assert TarFlow.from_pretrained(run).calibration == stored
    capsys.readouterr()
    for flag, is_timed in (("--calibrate", True), ("--no-calibrate", False)):
        out = train(tmp_path / flag, flag, steps=1)
        assert (out / calibration.FILE).exists() == is_timed
        *_, next_commands = capsys.readouterr().out.splitlines()
        assert (f"tarflow calibrate {out};" in next_commands) != is_timed
    assert not (flowpp / calibration.FILE).exists(), "there is but one decoder"


def test_a_run_for_likelihoods_ends_with_its_score(tmp_path, capsys):
    train(
        tmp_path / "run", "--noise=variational", "--guidance=0", "--importance-samples=2", "--coupling=mixture", steps=2
    )
    number = r"[0-9.]+ ± [0-9.]+"
    expected = rf"score   {number} bits/dim of 1,000 test images by one sample, {number} by 2 importance-weighted ones"
    assert re.search(expected, capsys.readouterr().out)


def test_a_run_logs_every_step_and_evaluation_in_two_places(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {key: [row["step"] for row in rows if key in row] for key in ("loss", "eval_bits_per_dim")}
    assert logged == {"loss": [*range(1, 9)], "eval_bits_per_dim": [1, 4, 8]}
    assert rows[-1]["eval_bits_per_dim"] < 8.5
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in rows if "loss" in row]
    assert [event.step for event in events.Images("samples")] == [1, 4, 8]


def test_training_goes_on_when_its_samples_are_not_finite(tmp_path, capsys, monkeypatch):
    change_samples(monkeypatch, lambda images: images[:5].fill_(torch.inf))
    train(tmp_path / "run", "--sample-every=1", steps=2)
    assert capsys.readouterr().out.count("5 of 80 samples are not finite and are kept") == 2


def test_a_run_may_be_called_anything(tmp_path):
    run = train(tmp_path / r"$\frac{a$", "--sample-every=1", steps=2)
    assert main("sample", run, "--num=10", f"--out={tmp_path / 's.png'}") == 0


def test_data_without_labels_trains_and_scores_a_model_without_classes(photos, tmp_path, capsys):
    flags = (
        "--dataset=imagenet32-2016",
        f"--data-dir={photos}",
        "--patch-size=8",
        "--noise=uniform",
        "--importance-samples=2",
    )
    run = train(tmp_path / "run", *flags, "--no-conditional", "--guidance=0", steps=1)
    source = f"ImageNet 32x32 as released in 2016 (arXiv 1601.06759), 64 test images from {photos}"
    assert f" by 2 importance-weighted ones; {source}\n" in capsys.readouterr().out
    assert main("evaluate", run, "--num-images=4", "--importance-samples=1", "--device=cpu") == 0
    assert capsys.readouterr().out.startswith(f"{source}; 4 of them")
    assert json.loads((run / "evaluation.json").read_text())["data"] == source


def test_two_runs_without_a_folder_get_one_each(tmp_path):
    folders = [new_folder(tmp_path / "runs", "fashion-mnist") for _ in range(3)]
    assert [folder.name for folder in folders] == ["fashion-mnist", "fashion-mnist-2", "fashion-mnist-3"]
    assert all(folder.is_dir() for folder in folders)


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main("train", "--batch-size=1000000") == 1
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_that_cannot_start_does_not_claim_its_folder(tmp_path):
    assert main("train", "--batch-size=1000000", f"--out={tmp_path / 'new'}") == 1
    assert not (tmp_path / "new" / "config.json").exists()


@pytest.mark.parametrize(
    ("preset", "image_size", "num_classes", "millions"),
    [
        ("imagenet64-likelihood", 64, 1000, 460),
        ("imagenet64", 64, 1000, 460),
        ("imagenet64-cond", 64, 1000, 466),
        ("imagenet128-cond", 128, 1000, 824),
        ("afhq256-cond", 256, 3, 463),
        ("itarflow-imagenet64", 64, 1000, 771.4),
        ("itarflow-imagenet128", 128, 1000, 1202.5),
        ("itarflow-imagenet256", 256, 1000, 2220.7),
        ("cifar10-flowpp", 32, 10, 31.44),
    ],
)
def test_a_preset_has_the_size_that_was_published(preset, image_size, num_classes, millions):
    config = PRESETS[preset]
    assert config.data.image_size in (None, image_size)
    names = tuple(map(str, range(num_classes)))
    labels = torch.zeros(1, dtype=torch.int64)
    dataset = datasets.ImageDataset(torch.zeros(1, 3, image_size, image_size).byte(), labels, names, False, "nothing")
    with torch.device("meta"):
        model = build(config, dataset)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)
