"""Every command, from a first run to its samples and scores; and one line on stderr for whatever a user gets wrong."""

import importlib
import json
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from published_state import published_state
from tarflow import TarFlow, TarFlowConfig, cli, datasets, evaluation
from tarflow.cli.evaluate import Evaluate
from tarflow.cli.parsing import flags_of, parse
from tarflow.cli.train import read_flags
from tarflow.datasets import evenly_spaced
from tarflow.decoding import calibration
from tarflow.training.folder import new_folder
from tarflow.training.presets import PRESETS
from tarflow.training.trainer import build

TINY = "--patch-size=7 --channels=64 --num-blocks=2 --layers-per-block=1"
DATASET_NAMES = [
    f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
]


def main(*arguments):
    return cli.main([str(argument) for argument in arguments])


def train(out, *flags, steps, shape=TINY):
    # Steps large enough that even so few of them tell labels, guidance and noise apart.
    fast = ("--learning-rate=0.003", "--warmup-steps=1", f"--max-steps={steps}", "--log-every=1")
    assert main("train", *shape.split(), *fast, "--batch-size=16", "--device=cpu", *flags, f"--out={out}") == 0
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Eight steps of the default recipe: conditional Fashion-MNIST with Gaussian noise."""
    out = tmp_path_factory.mktemp("cli") / "run"
    return train(out, "--evaluate-every=4", "--sample-every=4", "--checkpoint-every=3", "--keep-checkpoints=2", steps=8)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    """A model without classes."""
    return train(tmp_path_factory.mktemp("cli") / "unconditional", "--no-conditional", "--sigma=0.2", steps=4)


@pytest.fixture(scope="module")
def likelihood(tmp_path_factory):
    """A model for likelihoods: with uniform noise."""
    return train(tmp_path_factory.mktemp("cli") / "likelihood", "--noise=uniform", "--guidance=0", steps=4)


@pytest.fixture(scope="module")
def flowpp(tmp_path_factory):
    """A Flow++, which ends with its score."""
    small = "--model=flowpp --filters=8 --blocks-per-coupling=1 --importance-samples=2"
    return train(tmp_path_factory.mktemp("cli") / "flowpp", "--stack=squeeze channel2", steps=3, shape=small)


def is_picture(path):
    with Image.open(path) as image:
        return min(image.size) > 100 and len(image.getcolors(2**24)) > 10


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


@pytest.mark.parametrize(
    "flags",
    [
        ["--guidance=2"],
        ["--guidance=2", "--schedule=constant", "--guide=mu", "--labels", "3", "1"],
        ["--guidance=1", "--temperature=0.5", "--no-drop-label", "--sigma=0"],
    ],
    ids=" ".join,
)
def test_sample_draws_a_picture_and_a_trajectory(run, tmp_path, capsys, flags):
    out, trajectory = tmp_path / "s.png", tmp_path / "t.png"
    assert main("sample", run, *flags, "--num=20", f"--out={out}", f"--trajectory={trajectory}") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"wrote {out}, {trajectory}"]
    assert is_picture(out)
    assert is_picture(trajectory)


def arrays(run, path, *flags):
    assert main("sample", run, "--num=12", f"--out={path}", *flags) == 0
    with np.load(path) as file:
        return dict(file)


@pytest.mark.parametrize(
    ("flags", "labels"), [([], [*range(10), 0, 1]), (["--labels", "3", "1"], 6 * [3, 1])], ids=["all", "two classes"]
)
def test_sample_writes_8_bit_images_with_their_labels(run, tmp_path, flags, labels):
    drawn = arrays(run, tmp_path / "s.npz", *flags)
    assert (drawn["images"].shape, drawn["images"].dtype) == ((12, 28, 28, 1), np.uint8)
    assert (drawn["labels"].tolist(), drawn["labels"].dtype) == (labels, np.int64)
    assert len(np.unique(drawn["images"])) > 50


def test_a_model_from_the_hub_is_denoised_like_the_same_in_a_folder(run, tmp_path, monkeypatch):
    downloads = []
    hub = SimpleNamespace(snapshot_download=lambda name, **_: downloads.append(name) or run)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    (from_hub, from_folder), noisy = (
        (arrays(source, tmp_path / "s.npz")["images"] for source in ("someone/model", run)),
        arrays(run, tmp_path / "s.npz", "--sigma=0")["images"],
    )
    assert downloads == ["someone/model"]
    assert np.array_equal(from_hub, from_folder)
    assert not np.array_equal(from_hub, noisy)


def test_samples_are_repeated_by_the_seed_and_changed_by_each_setting(run, tmp_path):
    settings = ["--seed=1", "--guidance=2", "--guidance=2 --schedule=constant", "--guidance=2 --guide=alpha"]
    settings += ["--guidance=2 --temperature=0.5", "--sigma=0", "--labels 3"]
    images = [arrays(run, tmp_path / "s.npz", *flags.split())["images"].tobytes() for flags in ("", *settings)]
    assert len(set(images)) == len(images)
    assert arrays(run, tmp_path / "again.npz")["images"].tobytes() == images[0]


def change_samples(monkeypatch, change):
    """Change, in place, the images that a TarFlow draws from now on."""
    sample = TarFlow.sample

    def changed(*arguments, **options):
        drawn = sample(*arguments, **options)
        change(drawn[0] if isinstance(drawn, tuple) else drawn)
        return drawn

    monkeypatch.setattr(TarFlow, "sample", changed)


@pytest.mark.parametrize(
    ("kind", "flags", "pixel"),
    [
        ("run", [], 41),
        ("run", ["--sigma=0"], 41),
        ("run", ["--quantization=truncate"], 40),
        ("run", ["--quantization=floor"], 40),
        ("likelihood", [], 40),
        ("likelihood", ["--quantization=round"], 41),
    ],
)
def test_samples_become_the_pixels_of_the_noise_in_training(request, tmp_path, monkeypatch, kind, flags, pixel):
    run = request.getfixturevalue(kind)
    change_samples(monkeypatch, lambda images: images.fill_(40.7 / 127.5 - 1))
    assert np.unique(arrays(run, tmp_path / "s.npz", *flags)["images"]).tolist() == [pixel]
    assert main("sample", run, "--num=10", f"--out={tmp_path / 's.png'}", *flags) == 0
    with Image.open(tmp_path / "s.png") as image:
        assert (pixel, pixel, pixel) in {color for _, color in image.convert("RGB").getcolors(2**24)}


def spoil(images):
    """Make the darker half of the images that are likely drawn, and no other, not finite."""
    images[images.mean((1, 2, 3)) < -0.4] = torch.nan


def test_samples_that_are_not_finite_fail_unless_told_otherwise(run, tmp_path, capsys, monkeypatch):
    whole = arrays(run, tmp_path / "s.npz")["images"]
    (tmp_path / "s.npz").unlink()
    change_samples(monkeypatch, spoil)
    capsys.readouterr()
    for out in ("s.npz", "s.png"):
        assert main("sample", run, "--num=12", f"--out={tmp_path / out}") == 1
        *_, line = capsys.readouterr().err.splitlines()
        message = r"tarflow sample: error: (\d+) of 1\d samples are not finite; --on-nan redraw draws others .*"
        assert 0 < int(re.fullmatch(message, line)[1]) < 12
        assert not (tmp_path / out).exists()
    kept = arrays(run, tmp_path / "s.npz", "--on-nan=keep")["images"]
    same = (kept == whole).all((1, 2, 3))
    assert not kept[~same].any()
    assert f"{12 - same.sum()} of 12 samples are not finite and are kept" in capsys.readouterr().out
    redrawn = arrays(run, tmp_path / "s.npz", "--on-nan=redraw")["images"]
    assert f"{12 - same.sum()} of 12 samples are not finite and are drawn anew" in capsys.readouterr().out
    assert np.array_equal(redrawn[same], whole[same])
    assert redrawn[~same].any((1, 2, 3)).all()
    assert np.array_equal(arrays(run, tmp_path / "s.npz", "--on-nan=redraw")["images"], redrawn)


def test_redrawing_ends(run, tmp_path, capsys):
    model = TarFlow.from_pretrained(run)
    with torch.no_grad():
        model.flow.blocks[0].transformer.proj_out.bias.fill_(1e3)
    model.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    flags = ("--num=3", f"--out={tmp_path / 's.npz'}", "--on-nan=redraw")
    assert main("sample", tmp_path / "model", *flags) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line == "tarflow sample: error: 3 of 3 samples are not finite after being drawn anew 10 times"


def test_training_goes_on_when_its_samples_are_not_finite(tmp_path, capsys, monkeypatch):
    change_samples(monkeypatch, lambda images: images[:5].fill_(torch.inf))
    train(tmp_path / "run", "--sample-every=1", steps=2)
    assert capsys.readouterr().out.count("5 of 80 samples are not finite and are kept") == 2


def test_a_run_may_be_called_anything(tmp_path):
    run = train(tmp_path / r"$\frac{a$", "--sample-every=1", steps=2)
    assert main("sample", run, "--num=10", f"--out={tmp_path / 's.png'}") == 0


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folders of pictures, with an image in one of them that is none, and ImageNet's of 2016, without labels."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(64):
        for parent in (f"good/{'ab'[number % 2]}", f"bad/{'ab'[number % 2]}", "train_32x32", "valid_32x32"):
            (folder / parent).mkdir(parents=True, exist_ok=True)
            width = 32 if "_32x32" in parent else 8 + number
            pixels = np.random.default_rng(number).integers(0, 256, (32, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / parent / f"{number}.png")
    for path in datasets.load("folder", "train", folder / "bad", 8).paths[:17]:
        path.write_bytes(b"no picture")
    return folder


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


def test_an_unreadable_image_ends_training_in_one_line(photos, tmp_path, capfd):
    flags = (
        f"train --dataset=folder --data-dir={photos / 'bad'} --image-size=14 --max-steps=20 --out={tmp_path / 'run'}"
    )
    assert main(*flags.split(), *TINY.split()) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line and "%|" not in line]
    assert len(lines) == 1
    assert re.match(rf"tarflow train: error: {photos}/bad/[ab]/\d+\.png: expected an image, but reading it", lines[0])


def test_sample_says_what_decoding_took(run, tmp_path, capsys):
    flags = ("--num=20", f"--out={tmp_path / 's.npz'}", "--guidance=1")
    assert main("sample", run, *flags, "--decoder=jacobi", "--window=4", "--tolerance=0.01") == 0
    printed = capsys.readouterr()
    found = re.match(
        r"20 images in .* s, .* images/s; (\d+) passes for 30 sequential steps \(1/.*\): (.*)\n", printed.out
    )
    assert 4 <= int(found[1]) <= 30
    assert found[2] == "jacobi, window 4"
    assert "block 1: jacobi, window 4, " in printed.err


def test_images_of_one_patch_take_no_passes(tmp_path, capsys):
    TarFlow(TarFlowConfig(image_size=4, patch_size=4, channels=64, num_blocks=2)).save_pretrained(tmp_path)
    for decoder in ("sequential", "jacobi"):
        assert main("sample", tmp_path, "--num=2", f"--out={tmp_path / 's.npz'}", f"--decoder={decoder}") == 0
        assert " 0 passes for 0 sequential steps " in capsys.readouterr().out


@pytest.mark.parametrize(("num", "rows", "columns"), [(1, 1, 1), (7, 7, 1), (15, 10, 2), (20, 10, 2)])
def test_a_picture_shows_as_many_images_as_were_asked_for(run, tmp_path, monkeypatch, capsys, num, rows, columns):
    grids = []
    monkeypatch.setattr("tarflow.pictures.sample_grid", lambda images, *rest: grids.append((images, rest)))
    assert main("sample", run, f"--num={num}", f"--out={tmp_path / 's.png'}") == 0
    assert capsys.readouterr().out.startswith(f"{num} images in ")
    ((images, (_, _, names, *_)),) = grids
    assert (images.shape[:2], len(names)) == ((rows, columns), rows)
    blank = (images == 1).flatten(2).all(2)
    assert (blank.sum(), blank[:, 0].sum()) == (rows * columns - num, 0)


def test_a_picture_of_no_classes_has_rows_of_eight(unconditional, tmp_path, monkeypatch):
    grids = []
    monkeypatch.setattr("tarflow.pictures.sample_grid", lambda images, *rest: grids.append(images))
    assert main("sample", unconditional, "--num=11", f"--out={tmp_path / 's.png'}") == 0
    blank = (grids[0] == 1).flatten(2).all(2)
    assert blank.tolist() == [8 * [False], 3 * [False] + 5 * [True]]


def test_samples_without_a_label_are_captioned_so(run, tmp_path, monkeypatch):
    captions = []
    monkeypatch.setattr("tarflow.pictures.sample_grid", lambda images, path, title, names, *_: captions.extend(names))
    assert main("sample", run, "--labels", "-1", "9", "--num=2", f"--out={tmp_path / 's.png'}") == 0
    assert captions == ["no label", "Ankle boot"]
    assert arrays(run, tmp_path / "s.npz", "--labels", "-1", "9")["labels"].tolist() == 6 * [-1, 9]


@pytest.mark.parametrize("command", ["sample {run} --out={new}/s.png", "calibrate {run}", "evaluate {run}",
                                     "train --resume={run}", "train --out={new}/run"])  # fmt: skip
def test_a_folder_that_cannot_be_written_to_is_found_before_the_work(run, tmp_path, monkeypatch, capsys, command):
    # Not by its mode, which the superuser of a container does not mind.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr("tarflow.pretrained.load_pretrained", None)
    monkeypatch.setattr("tarflow.cli.train.train", None)
    command = command.format(run=run, new=tmp_path)
    assert main(*command.split()) == 1
    assert re.search(
        r": error: (out|run|resume): expected a folder that can be written to; got /", capsys.readouterr().err
    )


WANTS = {
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes": RuntimeError,
    "CUDA out of memory. Tried to allocate 8 GiB": torch.OutOfMemoryError,
    "Unable to allocate 8 GiB for an array": MemoryError,
}


@pytest.mark.parametrize(("message", "error"), WANTS.items())
def test_want_of_memory_is_one_line_that_says_what_to_reduce(run, tmp_path, monkeypatch, capsys, message, error):
    def sample(*arguments, **options):
        raise error(message + "\nException raised from somewhere")

    monkeypatch.setattr(TarFlow, "sample", sample)
    assert main("sample", run, f"--out={tmp_path / 's.png'}") == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"tarflow sample: error: not enough memory; try a smaller --num ({message}")


def test_a_mistake_of_ours_is_not_taken_for_one_of_the_user(run, tmp_path, monkeypatch):
    monkeypatch.setattr(TarFlow, "sample", lambda *arguments, **options: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main("sample", run, f"--out={tmp_path / 's.png'}")


def test_calibrate_stores_what_auto_then_goes_by(run, tmp_path, capsys):
    folder = tmp_path / "run"
    model = TarFlow.from_pretrained(run)
    model.save_pretrained(folder)
    assert main("calibrate", folder, "--batches", "1", "2", "--device=cpu") == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last == f"wrote {folder / 'calibration.json'}"
    stored = calibration.load(folder)
    assert {timing.rows for timing in stored} == {2, 4}
    assert {(timing.block, timing.decoder) for timing in stored if timing.rows == 2} == {
        (t, name) for t in (0, 1) for name in ("sequential", "jacobi")
    }
    assert all(timing.passes == 15 for timing in stored if timing.decoder == "sequential")
    assert TarFlow.from_pretrained(folder).flow.calibration == stored
    assert main("sample", folder, "--num=1", f"--out={tmp_path / 's.npz'}") == 0


def test_a_model_without_classes_is_guided_by_temperature(unconditional, tmp_path):
    assert TarFlow.from_pretrained(unconditional).config.num_classes == 0
    plain = arrays(unconditional, tmp_path / "s.npz")
    guided = arrays(unconditional, tmp_path / "s.npz", "--guidance=3", "--temperature=0.5")
    assert set(plain) == {"images"}
    assert not np.array_equal(plain["images"], guided["images"])
    assert main("sample", unconditional, f"--out={tmp_path / 's.png'}") == 0
    assert is_picture(tmp_path / "s.png")


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


def test_two_runs_without_a_folder_get_one_each(tmp_path):
    folders = [new_folder(tmp_path / "runs", "fashion-mnist") for _ in range(3)]
    assert [folder.name for folder in folders] == ["fashion-mnist", "fashion-mnist-2", "fashion-mnist-3"]
    assert all(folder.is_dir() for folder in folders)


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main("train", "--batch-size=1000000") == 1
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_published_checkpoint_is_converted_and_sampled(tmp_path, capsys):
    state, out = published_state(), tmp_path / "converted"
    torch.save(state, tmp_path / "model.pth")
    assert main("convert", tmp_path / "model.pth", out, "--sigma=0.05") == 0
    assert capsys.readouterr().out.startswith(f"wrote {out}: TarFlowConfig(image_size=4, in_channels=3, patch_size=2")
    transformer = TarFlow.from_pretrained(out).flow.blocks[1].transformer
    assert torch.equal(transformer.layers[0].mlp[2].weight, state["blocks.1.attn_blocks.0.mlp.main.2.weight"])
    drawn = arrays(out, tmp_path / "s.npz", "--guidance=1")
    assert (drawn["images"].shape, drawn["labels"].max()) == ((12, 4, 4, 3), 2)
    assert not np.array_equal(arrays(out, tmp_path / "s.npz", "--guidance=1", "--sigma=0")["images"], drawn["images"])
    assert main("convert", tmp_path / "model.pth", out) == 1
    assert f"out: {out} already holds a model" in capsys.readouterr().err


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


def help_of(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main(*arguments, "--help")
    assert exit.value.code == 0
    return capsys.readouterr().out


def flags_in(text):
    return set(re.findall(r"(?<![\w`])--[a-z][a-z0-9.-]*[a-z0-9]", text)) - {"--help"}


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "train"])
def test_help_lists_every_flag(capsys, command):
    settings = getattr(importlib.import_module(f"tarflow.cli.{command}"), command.capitalize())
    assert {*flags_of(settings)} <= flags_in(help_of(capsys, command))


OF_ONE_MODEL = {
    "tarflow": "--patch-size --channels --num-blocks --layers-per-block --head-dim --expansion --volume-preserving "
    "--sigma --label-drop --conditional --guidance.weight --guidance.temperature",
    "flowpp": "--stack --filters --blocks-per-coupling --attention --pointwise --elu-output --weight-norm --dropout",
}
OF_EVERY_MODEL = (
    "--model --preset --out --resume --dataset --image-size --coupling --num-mixtures --noise --batch-size "
    "--dequantizer.filters --importance-samples --learning-rate --device"
)


@pytest.mark.parametrize(
    ("flags", "model"),
    [
        ([], "tarflow"),
        (["--model=flowpp"], "flowpp"),
        (["--preset=cifar10-flowpp"], "flowpp"),
        (["--preset=afhq256-cond"], "tarflow"),
    ],
    ids=str,
)
def test_help_for_training_lists_the_flags_of_the_chosen_model_alone(capsys, flags, model):
    listed = flags_in(help_of(capsys, "train", *flags))
    others = {flag for name, flags in OF_ONE_MODEL.items() if name != model for flag in flags.split()}
    assert {*OF_EVERY_MODEL.split(), *OF_ONE_MODEL[model].split()} <= listed
    assert not listed & {*others, "--in-channels", "--num-classes"}


def test_sizes_are_flags_of_one_number_or_one_for_each_block():
    command, _ = read_flags(["--channels=64", "--layers-per-block", "2", "2", "2", "8"])
    assert (command.architecture.channels, command.architecture.layers_per_block) == (64, (2, 2, 2, 8))
    with pytest.raises(ValueError, match=r"^layers_per_block: expected .*, or 3 of them, .*; got \(2, 8\)"):
        read_flags(["--num-blocks=3", "--layers-per-block", "2", "8"])


SAMPLING = """
import sys
from tarflow.cli import main
assert main(sys.argv[1:]) == 0
print(*(name for name in ("tensorboard", "torch.utils.tensorboard", "tarflow.training.trainer") if name in sys.modules))
"""


def test_sampling_imports_neither_tensorboard_nor_the_trainer(run, tmp_path):
    arguments = ["sample", run, "--num=2", f"--out={tmp_path / 's.png'}", "--device=cpu"]
    sampled = subprocess.run([sys.executable, "-c", SAMPLING, *arguments], capture_output=True, text=True)
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.splitlines()[-1] == ""


def test_the_trainer_imports_no_matplotlib():
    command = "import sys, tarflow.training.trainer; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0


@pytest.mark.parametrize(
    ("read", "old", "new"),
    [
        (read_flags, ["--score-draws=0"], ["--importance-samples=0"]),
        (read_flags, ["--guidance", "1.5"], ["--guidance.weight", "1.5"]),
        (read_flags, ["--model=flowpp", "--no-conditional"], ["--model=flowpp"]),
        (partial(parse, Evaluate), ["run", "--draws=1"], ["run", "--importance-samples=1"]),
    ],
    ids=["score-draws", "guidance", "no-conditional", "draws"],
)
def test_flags_of_the_last_release_mean_what_they_meant(read, old, new):
    assert read(old)[0] == read(new)[0]


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_the_usage_names_the_commands(capsys, monkeypatch, arguments):
    monkeypatch.setattr("sys.argv", ["tarflow", *arguments])
    assert [cli.main(), cli.main(arguments)] == [0, 0]
    usage = capsys.readouterr().out
    assert all(f"\n  {command} " in usage for command in cli.COMMANDS)


def test_a_model_in_double_precision_is_not_drawn_from_in_a_lower_one(run, tmp_path, capsys):
    TarFlow.from_pretrained(run).double().save_pretrained(tmp_path)
    for command in ("sample", "calibrate"):
        assert main(command, tmp_path, "--precision=bfloat16") == 1
        assert "precision: expected float32 for " in capsys.readouterr().err


def test_a_command_that_there_is_not_is_answered_with_those_that_there_are(capsys):
    assert main("trian", "--out=x") == 2
    commands = "train, sample, calibrate, evaluate, statistics, encode, demo, convert, push"
    assert capsys.readouterr().err == f"tarflow: error: command: expected one of {commands}; got 'trian'\n"


@pytest.fixture
def broken(run, tmp_path):
    """Files that are not what they should be."""
    for name in DATASET_NAMES:
        (tmp_path / name).write_bytes(b"not a dataset")
    model = TarFlow.from_pretrained(run)
    model.metadata = {}
    for name in ("model", "cut", "cut-config", "old-config", "bad-config"):
        model.save_pretrained(tmp_path / name)
    (tmp_path / "cut" / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-1000])
    (tmp_path / "cut-config" / "config.json").write_text('{"train": {')
    (tmp_path / "old-config" / "config.json").write_text('{"train": {"data_dir": null, "width": 3}}')
    for name, text in (("deep", "[" * 100_000), ("null", '{"train": null}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        (tmp_path / name / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    (tmp_path / "bad-config" / "config.json").write_text('{"train": {"data_dir": null, "noise": 5}}')
    (tmp_path / "folder.png").mkdir()
    return tmp_path


# Commands and the start of the line that each ends in, {value} being each of the values with | between them.
LINES = r"""
sample {broken}/none                  source: expected a folder with config\.json .* no .*/none/config\.json
train --resume={broken}/none          resume: .*/none/config\.json does not exist
convert {broken}/none.pth {broken}/new  .*/none\.pth
convert {run}/config.json {broken}/new  source: .*/config\.json is .* not a state dict
convert {run}/checkpoints/step-00000008.pt {broken}/new  source: expected the state
sample {broken}/cut                   .*/cut/model\.safetensors: truncated or corrupt
sample {broken}/deep                  .*/deep/config\.json: truncated or corrupt: maximum recursion depth
evaluate {broken}/null                .*/null/config\.json: train: expected an object; got None
train --resume={broken}/null          .*/null/config\.json: train: expected an object; got
train --batch-size=1000000000 --out={broken}/new  memory: expected training at batch size
train --dataset=mnist --data-dir={broken}  .*/train-images-idx3-ubyte: expected an IDX header
train --dataset=mnist --data-dir={run}  data_dir: expected .* in .*/run, missing train-images
train --dataset=minst                 name: expected one of fashion-mnist, .* got 'minst'
train --max-steps=1 --out={run}       out: .*/run already holds a run; choose another folder, or
train --channels=100 --out={broken}/new  head_dim: expected a divisor of channels 100; got 64
train --dataset=imagenet32-2016 --data-dir={photos} --out={broken}/new  conditional: expected False
evaluate {run} --dataset=imagenet32-2016 --data-dir={photos}  dataset: expected labels for a model that is
sample {run} --tolerance=-1           tolerance: expected a finite number >= 0; got -1
calibrate {run} --batches 0           batches: expected positive numbers; got \(0,\)
calibrate someone/model               run: expected a folder to write to; got someone/model
train --resume={broken}/model         resume: .*/model holds a model without a training run
train --resume={broken}/cut-config    .*/cut-config/config\.json
calibrate {flowpp}                    run: expected a TarFlow, whose decoders .* holds a Flow
train --resume={broken}/old-config    .*/old-config/config\.json
train --resume={broken}/bad-config    .*/bad-config/config\.json: noise: .* got 5
train --learning-rate=inf|nan|1e+300|-1.0  learning_rate: expected a number > 0, at most 3\.4e\+38; got {value}
train --min-learning-rate=nan|inf|1.0|-1.0  min_learning_rate: .* from 0 to the learning rate, 0\.006; got {value}
train --gradient-clip=inf|nan         gradient_clip: expected a number > 0, at most 3\.4e\+38; got {value}
train --sigma=0                     sigma: expected more than 0 with Gaussian noise
train --resize=box                  resize: expected with --dataset folder alone, .*; got --resize=box
train --weight-decay=inf|nan          weight_decay: expected a number >= 0, at most 3\.4e\+38; got {value}
train --sigma=inf|nan|1e+300          sigma: expected a number from 0 to 10, .* got {value}
train --model=flowpp --dropout=-1.0|1.5|nan|inf  dropout: expected a number in \[0, 1\); got {value}
train --label-drop=nan                label_drop: expected a number >= 0 and below 1; got nan
train --beta2=1                       beta2: expected .* got 1\.0
train --ema-decay=1.5                 ema_decay: expected .* got 1\.5
train --seed=-1|9223372036854775808   seed: expected an integer from 0 to 2\^63 - 1; got {value}
train --max-steps=0|1{thirty}         max_steps: expected an integer from 1 to 2\^63 - 1; got {value}
train --channels=1{eighteen}          channels: expected .* got 1{eighteen}
train --num-blocks=1{thirty}          num_blocks: expected .* got 1{thirty}
train --batch-size=1{eighteen}        memory: expected training at batch size 1{eighteen} to take at most
train --batch-size=1{thirty}          batch_size: expected .* got 1{thirty}
train --importance-samples=1{eighteen}  importance_samples: expected an integer from 0 to 100000; got 1{eighteen}
train --score-draws=-1                importance_samples: expected an integer from 0 to 2\^63 - 1; got -1
train --image-size=0                  image_size: expected 1 to 7071, got 0
train --device=meta|hpu|cpu:7         device: expected auto or a device that PyTorch has here, cpu.*; got '{value}'
train --num-mixtures=65               num_mixtures: expected an integer in \[1, 64\]; got 65
train --num-mixtures=5                num_mixtures: expected with --coupling mixture alone
train --noise=uniform --sigma=0.1     sigma: expected with --noise gaussian alone
train --sigma=0.1 --noise-levels 0.1 0.2  sigma: expected with --noise-levels None alone
train --noise=uniform --noise-levels 0.1 0.2  noise: expected gaussian for a model with noise levels; got uniform
train --noise-levels 0.2 0.1          noise_levels: expected two rising numbers > 0, .*; got \(0\.2, 0\.1\)
train --dequantizer.filters=16        dequantizer: expected with --noise variational alone
train --no-conditional --label-drop=0.2  label_drop: expected with --conditional alone
train --model=flowpp --noise=gaussian  noise: expected uniform or variational for flowpp
train --model=tarflow --preset=cifar10-flowpp  model: expected flowpp, the model of --preset cifar10-flowpp; got tarflow
train --resume={run} --model=flowpp   model: expected tarflow, the model of --resume .*/run; got flowpp
train --resume={run} --preset=imagenet64  preset: expected none besides --resume, .* got imagenet64
train --resume={run} --max-steps=7    max_steps: expected at least 8, which .*/run is at; got 7
train --out={run}/config.json         out: expected a folder; got .*/run/config\.json
train --out={run}/config.json/x       out: expected a folder; got .*/config\.json/x, and .*/config\.json is a file
sample {run} --device=quantum|cpu:7|meta|cuda:99  device: expected auto or a device that PyTorch has .*; got '{value}'
sample {run} --seed=-1|9223372036854775808  seed: expected an integer from 0 to 2\^63 - 1; got {value}
sample {run} --guidance=1e+300|-1|nan  guidance: expected a number from 0 to 100; got {value}
sample {run} --guidance=1 --temperature=1e-300  temperature: expected a number from 0\.001 to 1000; got 1e-300
sample {run} --temperature=0.5        temperature: expected none without --guidance, .* got 0\.5
sample {run} --schedule=constant      schedule: expected none without --guidance, .* got constant
sample {run} --no-drop-label          drop_label: expected none without --guidance, .* got False
sample {unconditional} --guidance=2   guidance: .* or a temperature other than 1; got
sample {run} --sigma=nan|inf|-1|1e+300  sigma: expected a number from 0 to 10, .* got {value}
sample {run} --guidance=1 --guided-blocks=0  guided_blocks: expected at least 1; got 0
sample {run} --guided-blocks=1        guided_blocks: expected none without --guidance, .* got 1
sample {run} --guidance=1 --rule=gaussian --guide=mu  parameters: expected both with the rule gaussian; got 'mu'
sample {run} --denoising-steps=0      denoising_steps: expected at least 1; got 0
sample {run} --sigma=0 --clip         clip: expected none with --sigma 0, .*; got True
sample {run} --stochastic             stochastic: expected none for a TarFlow, .*; got True
sample {run} --num=0                  num: expected at least 1; got 0
sample {run} --num=10000              num: expected at most 333 rows and columns of a picture; got 10 x 1000
sample {unconditional} --num=10000    num: expected at most 333 rows and columns of a picture; got 1250 x 8
sample {run} --num=1{eighteen}        memory: expected num = 1{eighteen} samples to take at most
sample {run} --num=1{thirty} --out=s.npz  memory: expected num = 1{thirty} samples to take at most
sample {flowpp} --num=1{eighteen} --out=s.npz  memory: expected num = 1{eighteen} samples to take at most
sample {run} --labels                 labels: expected 1 to 80 classes, as --num says; got 0
sample {run} --labels 1 2 3 --num=2   labels: expected 1 to 2 classes, as --num says; got 3
sample {run} --labels 10|-2|1{thirty}  labels: expected classes from 0 to 9, or -1 for no label; got {value}
sample {unconditional} --labels 1     labels: expected none for an unconditional model; got 1
sample {run} --out=s.jpg|.png         out: expected a file of \.png, .*, or a folder; got {value}
sample {run} --out=folder.png         out: expected a file; got the folder folder\.png
sample {run} --out=nowhere/s.png      out: expected a file in a folder that exists; got nowhere/s\.png
sample {run} --trajectory=t.txt       trajectory: expected a picture \(.*png.*\); got t\.txt
sample {run} --trajectory=t           trajectory: expected a picture .*; got t
sample {run} --trajectory=nowhere/t.png  trajectory: expected a file in a folder that exists; got nowhere/t\.png
sample {run} --out=s.png --trajectory=./s.png  trajectory: expected another file than --out; got s\.png for both
sample {run} --decoder=jacobi --window=0  window: expected at least 1; got 0
sample {run} --window=4               window: expected none with the auto decoder, only with jacobi
sample {run} --decoder=sequential --tolerance=0.1  tolerance: expected none for the sequential decoder; got 0\.1
sample {flowpp} --guidance=2          guidance: expected none for a FlowPP, which has no use for it; got 2\.0
sample {flowpp} --labels 1            labels: expected none for an unconditional model; got 1
sample {flowpp} --sigma=0             sigma: expected none for a FlowPP
sample {flowpp} --tolerance=0.1       tolerance: expected none for a FlowPP
sample {flowpp} --decoder=jacobi      decoder: expected none for a FlowPP
calibrate {run} --batches             batches: expected positive numbers; got \(\)
calibrate {run} --batches 1{eighteen}  memory: expected batches of 1{eighteen} to take at most
calibrate {run} --guidance=nan        guidance: expected a number from 0 to 100; got nan
calibrate {run} --tolerance=nan       tolerance: expected a finite number >= 0; got nan
sample {run} --tolerance=1e300        tolerance: expected at most 1, .*; got 1e\+300
calibrate {run} --tolerance=3         tolerance: expected at most 1, .*; got 3
convert /dev/zero new                 source: /dev/zero is .* not a state dict: it is no file
convert {run} new                     source: .*/run is .* not a state dict: it is no file
evaluate {run} --resize=box           resize: expected with a folder or a hub alone, .*; got box
evaluate {run} --dataset=folder --data-dir={photos}/good --image-size=28  dataset: expected images of shape \(1
evaluate {run} --num-images=0         num_images: expected at least 1; got 0
evaluate {run} --draws=0              importance_samples: expected at least 1; got 0
evaluate {run} --importance-samples=1{eighteen}  importance_samples: expected at most 100000; got 1{eighteen}
evaluate {run} --batch-size=-1        batch_size: expected at least 1; got -1
evaluate {run} --seed=-1              seed: expected an integer from 0 to 2\^63 - 1; got -1
evaluate {run} --image-size=0         image_size: expected 1 to 7071, got 0
evaluate {run} --dataset=minst        name: expected one of fashion-mnist, .* got 'minst'
evaluate someone/model                run: expected a folder to write to; got someone/model
evaluate {run} --samples=1|3|-1       samples: expected at least 4, or 0 for none; got {value}
evaluate {run} --samples=1{eighteen}  memory: expected samples = 1{eighteen} to take at most
evaluate {run} --samples=1{thirty}    memory: expected samples = 1{thirty} to take at most
evaluate {run} --guidance=2           guidance: expected with --samples alone, .*; got --guidance=2
evaluate {run} --protocol=tarflow     protocol: expected with --samples alone, .*; got --protocol=tarflow
evaluate {run} --no-drop-label        drop_label: expected with --samples alone, .*; got --no-drop-label
evaluate {run} --weights=none.pth     weights: expected with --samples alone, .*; got --weights=none\.pth
evaluate {run} --samples=8 --sigma=nan  sigma: expected a number from 0 to 10, .* got nan
evaluate {run} --samples=8 --schedule=constant  schedule: expected none without --guidance, .* got constant
evaluate {run} --samples=8 --tolerance=3  tolerance: expected at most 1, .*; got 3
evaluate {run} --samples=8 --window=4  window: expected none with the auto decoder, only with jacobi
evaluate {run} --samples=8 --weights=none.pth  weights: expected the Inception .* https://.*; there is no file none\.pth
evaluate {run} --samples=8 --weights={run}/config.json  weights: expected the Inception .* of SHA-256 6726825d.*; got
evaluate {run} --samples=8 --statistics=none  statistics: expected a file that .* wrote; there is no none
evaluate {run} --samples=8 --statistics={run}/model.safetensors  statistics: expected a file .* wrote; got .*/model\.saf
evaluate {flowpp} --samples=8 --guidance=2  guidance: expected none for a FlowPP, which has no use for it; got 2\.0
statistics fashion-mnist --out=nowhere/s  out: expected a file in a folder that exists; got nowhere/s
statistics fashion-mnist --out=new --resize=box  resize: expected with a folder or a hub alone, .*; got box
statistics fashion-mnist --out=new --batch-size=0  batch_size: expected at least 1; got 0
statistics fashion-mnist --out=new --seed=-1  seed: expected an integer from 0 to 2\^63 - 1; got -1
statistics minst --out=new            name: expected one of fashion-mnist, .* got 'minst'
statistics imagenet32-2016 --data-dir={photos} --out=new  weights: expected a file for images other than Fashion-MNIST
convert {run}/none.pth new --sigma=nan|inf  sigma: expected a number from 0 to 10, .* got {value}
convert {run}/none.pth {run}/config.json  out: expected a folder; got .*/run/config\.json
"""
# Arguments that are none of the command, which have an exit status of their own.
USAGE_LINES = r"""
train --filters=-1                    --filters: expected with --model flowpp alone, .*; got --filters=-1
train --filters 32                    --filters: expected with --model flowpp alone, .*; got --filters
train --stack=squeeze                 --stack: expected with --model flowpp alone
train --no-pointwise                  --no-pointwise: expected with --model flowpp alone, .*; got --no-pointwise
train --dropout=0.5                   --dropout: expected with --model flowpp alone
train --model=flowpp --channels=64    --channels: expected with --model tarflow alone
train --model=flowpp --sigma=0.1      --sigma: expected with --model tarflow alone
train --model=flowpp --guidance=2     --guidance\.weight: expected with --model tarflow alone
train --resume={run} --filters=8      --filters: expected with --model flowpp alone
train --model=flowpp --conditional    --conditional: expected with --model tarflow alone
train --channels=abc|1e3              --channels: expected INT \[INT \.\.\.\]; got '{value}'
train --layers-per-block 2 2 x 8      --layers-per-block: expected INT \[INT \.\.\.\]; got '2', '2', 'x', '8'
train --learning-rate=fast            --learning-rate: expected FLOAT; got 'fast'
train --image-size=big                --image-size: expected \{None\}\|INT; got 'big'
train --num-blocks=1 --num-blocks=x   --num-blocks: expected INT; got 'x'
train --dequantizer.filters=x         --dequantizer\.filters: expected INT; got 'x'
train --dequantizer.filters=3         --dequantizer\.filters: expected a multiple of the 4 heads of attention; got 3
train --dequantizer.dropout=nan|-1    --dequantizer\.dropout: expected a number in \[0, 1\); got {value}
train --guidance=1e+300|nan           --guidance\.weight: expected a number from 0 to 100; got {value}
train --guidance.temperature=0        --guidance\.temperature: expected a number from 0\.001 to 1000; got 0
train --batch-size                    --batch-size: expected a value; got none
train --max-steps --out=new           --max-steps: expected a value; got none
train --nonsense 3                    --nonsense: expected a flag of tarflow train.*; got '--nonsense'
train --chanels=3                     --chanels: expected a flag of tarflow train, perhaps --channels; got '--chanels=3'
train --in_chanels=3                  --in_chanels: expected a flag of tarflow train.*; got '--in_chanels=3'
train --preset=foo                    --preset: expected one of 'fashion-mnist', .*; got 'foo'
train --preset                        --preset: expected a value; got none
train --model=foo                     --model: expected one of 'tarflow', 'flowpp'; got 'foo'
train --noise=laplace                 --noise: expected one of 'gaussian', 'uniform', 'variational'; got 'laplace'
train --conditional=yes               arguments: expected flags, each with its value; got yes besides
train 3|-x                            arguments: expected flags, each with its value; got {value} besides
train -- new                          arguments: expected flags, each with its value; got new besides
train --help --nonsense               --nonsense: expected a flag of tarflow train.*; got '--nonsense'
train --nonsense -h                   --nonsense: expected a flag of tarflow train.*; got '--nonsense'
train --dataset=                      --dataset: expected a value; got ''
train --dataset ''                    --dataset: expected a value; got ''
train --out=                          --out: expected a value; got ''
train --resume ''                     --resume: expected a value; got ''
sample                                arguments: expected run; got fewer
sample ''                             arguments: expected a value; got ''
sample {run} {run}                    arguments: expected flags, each with its value; got .*/run besides
sample {run} --num 3 4                arguments: expected flags, each with its value; got 4 besides
sample {run} --num=3.5                --num: expected INT; got '3\.5'
sample {run} --labels a b             --labels: expected \[INT \[INT \.\.\.\]\]; got 'a', 'b'
sample {run} --labels 1.5             --labels: expected .*; got '1\.5'
sample {run} --decoder=fast           --decoder: expected one of 'auto', 'sequential', 'jacobi'; got 'fast'
sample {run} --out ''                 --out: expected a value; got ''
sample {run} --trajectory=            --trajectory: expected a value; got ''
sample {run} --help --nonsense        --nonsense: expected a flag of tarflow sample.*; got '--nonsense'
sample {run} --filters=3              --filters: expected a flag of tarflow sample.*; got '--filters=3'
calibrate                             arguments: expected run; got fewer
evaluate {run} --dataset ''           --dataset: expected a value; got ''
evaluate {run} --draws=many           --importance-samples: expected INT; got 'many'
evaluate {run} --protocol=best        --protocol: expected one of 'tarflow', 'balanced'; got 'best'
statistics fashion-mnist              arguments: expected dataset and out; got fewer
convert {run}/none.pth                arguments: expected checkpoint and out; got fewer
convert {run}/none.pth ''             arguments: expected a value; got ''
convert {run}/none.pth new --sigma=a  --sigma: expected FLOAT; got 'a'
"""


def cases():
    for status, lines in ((1, LINES), (2, USAGE_LINES)):
        for line in lines.strip().splitlines():
            command, message = re.split(r"  +", line, maxsplit=1)
            start, values = re.fullmatch(r"(.*[= ])(\S+\|\S+)|.*", command).groups()
            if not values:
                yield pytest.param(command, message, status)
                continue
            for value in values.split("|"):
                pattern = re.sub(r"([.+])", r"\\\1", value)
                yield pytest.param(f"{start}{value}", message.replace("{value}", pattern), status)


@pytest.mark.parametrize(("command", "message", "status"), [*cases()])
def test_what_a_user_gets_wrong_ends_in_one_line(
    run, unconditional, flowpp, photos, broken, monkeypatch, capsys, command, message, status
):
    monkeypatch.chdir(broken)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    named = {"run": run, "unconditional": unconditional, "flowpp": flowpp, "photos": photos, "broken": broken}
    named |= {"eighteen": 18 * "0", "thirty": 30 * "0"}
    command = re.sub(r"\{(\w+)\}", lambda found: str(named[found[1]]), command)
    message = re.sub(r"\{([a-z]\w+)\}", lambda found: str(named[found[1]]), message)
    if command.startswith("train") and "--out" not in command and "--resume" not in command:
        command += " --out=new" if status == 1 else ""
    assert main(*("" if argument == "''" else argument for argument in command.split())) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]  # but progress bars
    assert len(lines) == 1
    assert re.match(f"tarflow {command.split()[0]}: error: {message}", lines[0])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert not (broken / "new").exists()


def test_a_run_that_cannot_start_does_not_claim_its_folder(tmp_path):
    assert main("train", "--batch-size=1000000", f"--out={tmp_path / 'new'}") == 1
    assert not (tmp_path / "new" / "config.json").exists()
