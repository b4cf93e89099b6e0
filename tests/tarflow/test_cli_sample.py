"""``tarflow sample`` draws what its flags say, as a picture or as arrays, and tells what the decoding took."""

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from commands import arrays, change_samples, is_picture, main
from tarflow import TarFlow, TarFlowConfig


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


def test_a_model_without_classes_is_guided_by_temperature(unconditional, tmp_path):
    assert TarFlow.from_pretrained(unconditional).config.num_classes == 0
    plain = arrays(unconditional, tmp_path / "s.npz")
    guided = arrays(unconditional, tmp_path / "s.npz", "--guidance=3", "--temperature=0.5")
    assert set(plain) == {"images"}
    assert not np.array_equal(plain["images"], guided["images"])
    assert main("sample", unconditional, f"--out={tmp_path / 's.png'}") == 0
    assert is_picture(tmp_path / "s.png")
