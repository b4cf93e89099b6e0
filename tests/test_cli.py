"""Every command, from a first run to its samples and scores; and one line on stderr for whatever a user gets wrong."""

import json
import re
import sys
from dataclasses import MISSING, fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tarflow import TarFlow, TarFlowConfig, cli, datasets, evaluation
from tarflow.decoding import calibration
from tarflow.gallery import spread
from tarflow.training.config import PRESETS, TrainConfig
from tarflow.training.trainer import build

TINY = "--patch-size=7 --channels=64 --num-blocks=2 --layers-per-block=1 --batch-size=16 --device=cpu --log-every=1"
DATASET_NAMES = [
    f"{split}-{kind}" for split in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
]


def main(*arguments):
    return cli.main([str(argument) for argument in arguments])


def train(out, *flags, steps):
    # Steps large enough that even so few of them tell labels, guidance and noise apart.
    fast = ("--learning-rate=0.003", "--warmup-steps=1", f"--max-steps={steps}")
    assert main("train", *TINY.split(), *fast, *flags, f"--out={out}") == 0
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
    small = ("--model=flowpp", "--filters=8", "--blocks-per-coupling=1", "--stack=squeeze channel2", "--score-draws=2")
    return train(tmp_path_factory.mktemp("cli") / "flowpp", *small, steps=3)


def is_picture(path):
    with Image.open(path) as image:
        return min(image.size) > 100 and len(image.getcolors(2**24)) > 10


def test_a_run_leaves_its_folder(run):
    names = {path.name for path in run.iterdir() if "tfevents" not in path.name}
    pictures = {"samples.png", "trajectory.png", "curves.png"}
    assert names == {"config.json", "model.safetensors", "metrics.jsonl", "checkpoints", ".lock", *pictures}
    assert all(is_picture(run / name) for name in pictures)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000006.pt", "step-00000008.pt"]
    model = TarFlow.from_pretrained(run)
    assert model.config == TarFlowConfig(28, 1, 7, 64, 2, 1, num_classes=10)
    average = torch.load(run / "checkpoints" / "step-00000008.pt")["average"]
    assert all(torch.equal(tensor, average[name]) for name, tensor in model.state_dict().items())


def test_a_flowpp_is_trained_sampled_and_scored(flowpp, tmp_path, capsys):
    assert all(is_picture(flowpp / name) for name in ("samples.png", "trajectory.png", "curves.png"))
    assert main("sample", flowpp, "--num=8", f"--out={tmp_path / 's.png'}", "--device=cpu") == 0
    assert is_picture(tmp_path / "s.png")
    assert re.search(r"8 images in [0-9.]+ s, ", capsys.readouterr().out)
    assert main("sample", flowpp, "--num=3", f"--out={tmp_path / 's.npz'}", "--device=cpu") == 0
    assert np.load(tmp_path / "s.npz")["images"].shape == (3, 28, 28, 1)
    assert main("evaluate", flowpp, "--num-images=20", "--draws=3", "--device=cpu") == 0
    one_sample, weighted = json.loads((flowpp / "evaluation.json").read_text())["scores"].items()
    assert one_sample[0] == "bits/dim of 8-bit images, variational dequantization, one sample (the mean over 3)"
    assert weighted[0] == "bits/dim of 8-bit images, variational dequantization, 3 importance-weighted draws"
    assert weighted[1]["mean"] < one_sample[1]["mean"]


def test_a_run_for_likelihoods_ends_with_its_score(tmp_path, capsys):
    train(tmp_path / "run", "--noise=variational", "--guidance=0", "--score-draws=2", "--coupling=mixture", steps=2)
    number = r"[0-9.]+ ± [0-9.]+"
    expected = rf"score   {number} bits/dim of 1,000 test images by one sample, {number} by 2 importance-weighted ones"
    assert re.search(expected, capsys.readouterr().out)


def test_a_run_logs_every_step_and_evaluation_in_two_places(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {key: [row["step"] for row in rows if key in row] for key in ("loss", "eval_bits_per_dim")}
    assert logged == {"loss": [*range(1, 9)], "eval_bits_per_dim": [4, 8]}
    assert rows[-1]["eval_bits_per_dim"] < 8.5
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in rows if "loss" in row]
    assert [event.step for event in events.Images("samples")] == [4, 8]


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
        "--score-draws=2",
    )
    run = train(tmp_path / "run", *flags, "--no-conditional", "--guidance=0", steps=1)
    source = f"ImageNet 32x32 as released in 2016 (arXiv 1601.06759), 64 test images from {photos}"
    assert f" by 2 importance-weighted ones; {source}\n" in capsys.readouterr().out
    assert main("evaluate", run, "--num-images=4", "--draws=1", "--device=cpu") == 0
    assert capsys.readouterr().out.startswith(f"{source}; 4 of them")
    assert json.loads((run / "evaluation.json").read_text())["data"] == source


def test_evaluate_resizes_as_told(photos, tmp_path, capsys):
    flags = ("--dataset=folder", f"--data-dir={photos / 'good'}", "--image-size=14", "--no-conditional", "--guidance=0")
    run = train(tmp_path / "run", *flags, steps=1)
    means = []
    for resize in ("lanczos", "bilinear"):
        capsys.readouterr()
        assert main("evaluate", run, "--num-images=4", "--draws=1", f"--resize={resize}", "--device=cpu") == 0
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
    assert main("evaluate", run, "--num-images=50", "--draws=2", "--device=cpu") == 0
    written = json.loads((run / "evaluation.json").read_text())
    test = datasets.load("fashion-mnist", "test")
    expected = evaluation.evaluate(TarFlow.from_pretrained(run), *test.fetch(spread(len(test), 50)), sigma, draws=2)
    assert {name: evaluation.Estimate(**row) for name, row in written["scores"].items()} == expected
    assert len(expected) == scores
    lines = [f"{test.source}; 50 of them, mean ± standard error over images"]
    lines += [f"{estimate}   {name}" for name, estimate in expected.items()]
    assert capsys.readouterr().out.splitlines() == lines


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
    score = ("evaluate", out, "--num-images=20", "--draws=1", "--device=cpu")
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


def test_two_runs_without_a_folder_get_one_each(tmp_path):
    folders = [cli._new_folder(tmp_path / "runs", "fashion-mnist") for _ in range(3)]
    assert [folder.name for folder in folders] == ["fashion-mnist", "fashion-mnist-2", "fashion-mnist-3"]
    assert all(folder.is_dir() for folder in folders)


def test_a_run_that_cannot_start_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main("train", "--batch-size=1000000") == 1
    assert list((tmp_path / "runs").iterdir()) == []


def published_state(channels=64, token_dim=12, num_tokens=4, num_classes=3):
    """A state dict as the paper's code saves it: two blocks of one layer over 4x4 images of three channels."""
    shapes = {
        "proj_in.weight": (channels, token_dim),
        "proj_in.bias": (channels,),
        "pos_embed": (num_tokens, channels),
        "class_embed": (num_classes, 1, channels),
        "proj_out.weight": (2 * token_dim, channels),
        "proj_out.bias": (2 * token_dim,),
        "attn_mask": (num_tokens, num_tokens),
    }
    for name, width, *more in [
        ("attention.norm", channels), ("attention.qkv", 3 * channels, channels), ("attention.proj", channels, channels),
        ("mlp.norm", channels), ("mlp.main.0", 4 * channels, channels), ("mlp.main.2", channels, 4 * channels),
    ]:  # fmt: skip
        shapes |= {f"attn_blocks.0.{name}.weight": (width, *more), f"attn_blocks.0.{name}.bias": (width,)}
    draw = torch.Generator().manual_seed(0)
    state = {f"blocks.{t}.{name}": torch.randn(s, generator=draw) / 10 for t in (0, 1) for name, s in shapes.items()}
    return state | {"var": torch.ones(num_tokens, token_dim)}


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
        ("cifar10-flowpp", 32, 10, 31.44),
    ],
)
def test_a_preset_has_the_size_that_was_published(preset, image_size, num_classes, millions):
    config = PRESETS[preset]
    assert config.image_size in (None, image_size)
    dataset = SimpleNamespace(image_size=image_size, in_channels=3, num_classes=num_classes)
    with torch.device("meta"):
        model = build(config, dataset)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(millions * 1e6, rel=0.01)


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("train", [cli.Train, TrainConfig]),
        ("sample", [cli.Sample]),
        ("calibrate", [cli.Calibrate]),
        ("evaluate", [cli.Evaluate]),
        ("convert", [cli.Convert]),
    ],
)
def test_help_lists_every_flag(capsys, command, settings):
    with pytest.raises(SystemExit) as exit:
        main(command, "--help")
    assert exit.value.code == 0
    flags = [f"--{field.name}" for part in settings for field in fields(part) if field.default is not MISSING]
    text = capsys.readouterr().out
    assert [flag for flag in flags if not re.search(rf"{flag.replace('_', '-')}(?![\w-])", text)] == []


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["-h"], 0), ([], 0), (["trian"], 2)])
def test_the_usage_names_the_commands(capsys, monkeypatch, arguments, status):
    monkeypatch.setattr("sys.argv", ["tarflow", *arguments])
    assert [cli.main(), cli.main(arguments)] == [status, status]
    printed = capsys.readouterr()
    assert all(f"\n  {command} " in (printed.err if status else printed.out) for command in cli.COMMANDS)


@pytest.fixture
def broken(run, tmp_path):
    """Files that are not what they should be."""
    for name in DATASET_NAMES:
        (tmp_path / name).write_bytes(b"not a dataset")
    for name in ("model", "cut", "cut-config", "old-config"):
        TarFlow.from_pretrained(run).save_pretrained(tmp_path / name)
    (tmp_path / "cut" / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-1000])
    (tmp_path / "cut-config" / "config.json").write_text('{"train": {')
    (tmp_path / "old-config" / "config.json").write_text('{"train": {"data_dir": null, "width": 3}}')
    for name, text in (("deep", "[" * 100_000), ("null", '{"train": null}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        (tmp_path / name / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    return tmp_path


ERRORS = {
    "no such run": ("sample {broken}/none", r"source: expected a folder with config\.json .* no .*/none/config\.json"),
    "no such run to resume": ("train --resume={broken}/none", r"resume: .*/none/config\.json does not exist"),
    "no such checkpoint": ("convert {broken}/none.pth {broken}/new", r".*/none\.pth"),
    "not a checkpoint": ("convert {run}/config.json {broken}/new", r"source: .*/config\.json is .* not a state dict"),
    "another checkpoint": ("convert {run}/checkpoints/step-00000008.pt {broken}/new", "source: expected the state"),
    "cut weights": ("sample {broken}/cut", r".*/cut/model\.safetensors: truncated or corrupt"),
    "deep settings": ("sample {broken}/deep", r".*/deep/config\.json: truncated or corrupt: maximum recursion depth"),
    "no settings": ("evaluate {broken}/null", r".*/null/config\.json: train: expected an object; got None"),
    "no settings to resume": ("train --resume={broken}/null", r".*/null/config\.json: train: expected an object; got"),
    "too much to train": (
        "train --batch-size=1000000000 --out={broken}/new",
        "memory: expected training at batch size",
    ),
    "cut data": ("train --dataset=mnist --data-dir={broken}", ".*/train-images-idx3-ubyte: expected an IDX header"),
    "no data": ("train --dataset=mnist --data-dir={run}", "data_dir: expected .* in .*/run, missing train-images"),
    "no such dataset": ("train --dataset=minst", "name: expected one of fashion-mnist, .* got 'minst'"),
    "out is taken": ("train --max-steps=1 --out={run}", "out: .*/run already holds a run; choose another folder, or"),
    "bad setting": ("train --channels=100 --out={broken}/new", "head_dim: expected a divisor of channels 100; got 64"),
    "no such device": ("sample {run} --device=quantum", "device: expected auto or a device .* got 'quantum'"),
    "out of another kind": ("sample {run} --out=s.jpg", r"out: expected a \.png or \.npz file; got s\.jpg"),
    "nothing to draw": ("sample {run} --num=0", "num: expected at least 1; got 0"),
    "no dataset": ("train --dataset=", "name: expected one of fashion-mnist, .* got ''"),
    "no dataset to score": ("evaluate {run} --dataset=", "name: expected one of fashion-mnist, .* got ''"),
    "no size to score": ("evaluate {run} --image-size=0", "image_size: expected 1 to 7071, got 0"),
    "no labels": (
        "train --dataset=imagenet32-2016 --data-dir={photos} --out={broken}/new",
        r"conditional: expected False \(--no-conditional\) for data without labels; got True",
    ),
    "no labels to score": (
        "evaluate {run} --dataset=imagenet32-2016 --data-dir={photos}",
        "dataset: expected labels for a model that is conditional on them; got ImageNet 32x32 as released in 2016",
    ),
    "nothing to score": ("evaluate {run} --num-images=0", "num_images: expected at least 1; got 0"),
    "no folder to write to": ("sample {run} --out={broken}/nowhere/s.png", "out: .* a folder that exists; got "),
    "temperature of nothing": ("sample {run} --temperature=0.5", "temperature: expected 1 without --guidance"),
    "nothing to average": ("evaluate {run} --draws=0", "draws: expected at least 1; got 0"),
    "no such class": ("sample {run} --out={broken}/s.npz --labels 10", "labels: .* got values from 10 to 10"),
    "no classes": ("sample {unconditional} --out={broken}/s.png --labels 1", "labels: .* an unconditional model"),
    "nothing to guide by": ("sample {unconditional} --guidance=2", "guidance: .* or a temperature other than 1; got"),
    "no such window": ("sample {run} --decoder=jacobi --window=0", "window: expected at least 1; got 0"),
    "window of nothing": ("sample {run} --window=4", "window: expected none with the auto decoder, only with jacobi"),
    "negative tolerance": ("sample {run} --tolerance=-1", "tolerance: expected a finite number >= 0; got -1"),
    "nothing to time": ("calibrate {run} --batches 0", r"batches: expected positive numbers; got \(0,\)"),
    "nowhere to store": ("calibrate someone/model", "run: expected a folder to write to; got someone/model"),
    "negative guidance": ("sample {run} --guidance=-1", "weight: expected a finite number >= 0; got -1"),
    "model without a run": ("train --resume={broken}/model", "resume: .*/model holds a model without a training run"),
    "cut settings": ("train --resume={broken}/cut-config", r".*/cut-config/config\.json"),
    "labels for Flow++": ("train --model=flowpp --conditional --out={broken}/new", "conditional: expected False for"),
    "Gaussian noise for Flow++": ("train --model=flowpp --noise=gaussian --out={broken}/new", "noise: expected unif"),
    "guided Flow++": ("sample {flowpp} --guidance=2", r"guidance: expected 0\.0 for a Flow\+\+, .* got 2\.0"),
    "calibrated Flow++": ("calibrate {flowpp}", "run: expected a TarFlow, whose decoders .* holds a Flow"),
    "other settings": ("train --resume={broken}/old-config", r".*/old-config/config\.json"),
}


@pytest.mark.parametrize(("command", "message"), ERRORS.values(), ids=ERRORS)
def test_what_a_user_gets_wrong_ends_in_one_line(
    run, unconditional, flowpp, photos, broken, monkeypatch, capsys, command, message
):
    monkeypatch.chdir(broken)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    command = command.format(run=run, unconditional=unconditional, flowpp=flowpp, photos=photos, broken=broken)
    assert main(*command.split()) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "%|" not in line]  # but progress bars
    assert len(lines) == 1
    assert re.match(f"tarflow {command.split()[0]}: error: {message}", lines[0])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert not (broken / "new").exists()


def test_a_run_that_cannot_start_does_not_claim_its_folder(tmp_path):
    assert main("train", "--batch-size=1000000", f"--out={tmp_path / 'new'}") == 1
    assert not (tmp_path / "new" / "config.json").exists()
