"""Each dataset gives the pixels and labels of its files, or one error; batches can be taken up at any step."""

import gc
import gzip
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import tarflow
from tarflow import datasets
from tarflow.datasets import ImageDataset, batches, fingerprint, load, streaming

DEBIAN = datasets.DEBIAN_FASHION_MNIST
SUBSET = Path(tarflow.__file__).parent / "data" / "fashion_mnist_subset.npz"
RESIZE = ["lanczos", "bicubic", "bilinear", "box"]
IDX_NAMES = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]


@pytest.fixture
def no_debian(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "not-installed")


def numbered(size, channels=1):
    """A dataset whose i-th image and label say i."""
    numbers = torch.arange(size)
    images = numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, channels, 2, 2)
    return ImageDataset(images, numbers, tuple(map(str, numbers.tolist())), False, "numbers")


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(values):
    return bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()


def write_idx(folder, suffix=".gz", train=5, test=3):
    """The four files; the test images are not the training images."""
    folder.mkdir(exist_ok=True)
    contents = [pixels(0, train, 28, 28), np.arange(train), pixels(1, test, 28, 28), np.arange(test)]
    for name, values in zip(IDX_NAMES, contents, strict=True):
        raw = idx(values)
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(raw) if suffix else raw)


def write_pictures(folder, classes, count, seed=0, size=(60, 30)):
    for number in range(len(classes) * count):
        path = folder / classes[number % len(classes)] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(seed + number, size[1], size[0], 3)).save(path)


def test_the_shipped_subset_is_balanced_and_small_and_its_splits_share_no_image(no_debian):
    seen = []
    for split, per_class in (("train", 1000), ("test", 100)):
        subset = load(split=split)
        assert subset.images.shape == (10 * per_class, 1, 28, 28)
        assert subset.labels.bincount().tolist() == [per_class] * 10
        assert (subset.num_classes, subset.in_channels, subset.image_size, subset.flip) == (10, 1, 28, False)
        assert f"{10 * per_class:,}-image {split} subset shipped with tarflow" in subset.source
        seen += [image.numpy().tobytes() for image in subset.images]
    assert len(set(seen)) == 11_000
    assert SUBSET.stat().st_size < 6e6


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the full data: apt-get install dataset-fashion-mnist")
def test_shipped_subset_stands_in_the_training_split(no_debian):
    full = load(data_dir=DEBIAN)
    assert full.images.shape == (60_000, 1, 28, 28)
    with np.load(SUBSET) as arrays:
        for split in ("train", "test"):
            subset, indices = load(split=split), torch.from_numpy(arrays[f"{split}_indices"]).long()
            assert all(map(torch.equal, (subset.images, subset.labels), full.get_batch(indices)))


def test_the_folder_asked_for_comes_before_debians_and_that_before_the_subset(monkeypatch, tmp_path):
    write_idx(tmp_path / "debian", train=5)
    write_idx(tmp_path / "mine", train=7)
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "debian")
    installed, asked = load(), load(data_dir=tmp_path / "mine")
    assert (len(installed), len(asked)) == (5, 7)
    assert str(tmp_path / "debian") in installed.source
    assert str(tmp_path / "mine") in asked.source


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_idx_files_hold_these_images(tmp_path, suffix):
    write_idx(tmp_path, suffix)
    for split, seed, count in (("train", 0, 5), ("test", 1, 3)):
        dataset = load("mnist", split, str(tmp_path))
        assert np.array_equal(dataset.images[:, 0], pixels(seed, count, 28, 28))
        assert dataset.labels.tolist() == list(range(count))


@pytest.mark.parametrize("name", IDX_NAMES)
def test_a_missing_idx_file_is_named(tmp_path, name):
    write_idx(tmp_path)
    (tmp_path / f"{name}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=rf"data_dir: .* missing {name}$"):
        load("fashion-mnist", data_dir=tmp_path)


WHOLE = idx(pixels(0, 5, 28, 28))
BAD_IDX = {
    "empty": b"",
    "not gzip": b"not gzip",
    "cut": gzip.compress(WHOLE)[:-100],
    "damaged": gzip.compress(WHOLE)[:2000] + bytes(100) + gzip.compress(WHOLE)[2100:],
    "empty inside": gzip.compress(b""),
    "half a header": gzip.compress(WHOLE[:10]),
    "short": gzip.compress(WHOLE[:-1]),
    "long": gzip.compress(WHOLE + b"0"),
    "labels": gzip.compress(idx(np.arange(5))),
}


@pytest.mark.parametrize("raw", BAD_IDX.values(), ids=BAD_IDX)
def test_a_bad_idx_file_is_named(tmp_path, raw):
    write_idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(raw)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz: expected"):
        load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize("labels", [np.arange(4), np.array([0, 1, 2, 3, 10])], ids=["too few", "out of range"])
def test_labels_that_do_not_fit_the_images_are_refused(tmp_path, labels):
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    with pytest.raises(ValueError, match=rf"labels: expected .* from MNIST, .* {tmp_path}"):
        load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_cifar10_is_read_from_its_binary_version(tmp_path, suffix):
    def write(name, records):
        raw = records.tobytes()
        (tmp_path / f"{name}{suffix}").write_bytes(gzip.compress(raw) if suffix else raw)

    images, labels = pixels(0, 12, 3, 32, 32), np.arange(12, dtype=np.uint8) % 10
    records = np.concatenate([labels[:, None], images.reshape(12, -1)], axis=1)
    for number in range(5):
        write(f"data_batch_{number + 1}.bin", records[2 * number : 2 * number + 2])
    write("test_batch.bin", records[10:])
    train, test = (load("cifar10", split, tmp_path) for split in ("train", "test"))
    assert np.array_equal(torch.cat([train.images, test.images]), images)
    assert np.array_equal(torch.cat([train.labels, test.labels]), labels)
    assert (len(train), len(test), train.class_names[9], train.flip) == (10, 2, "truck", True)
    for bad, got in ((records[4:6].flatten()[:-1], "6145 bytes"), (np.zeros(10_001 * 3073, np.uint8), "10001 or more")):
        write("data_batch_3.bin", bad)
        message = rf"data_batch_3\.bin{suffix}: expected 1 to 10,000 records of 3073 bytes, got {got}"
        with pytest.raises(ValueError, match=message):
            load("cifar10", "train", tmp_path)


def write_imagenet(folder, side, labels=range(990, 1001)):
    """The eleven .npz files of the release of 2017, an image each; returns the images."""
    images = pixels(0, 11, 3, side, side)
    names = [f"train_data_batch_{number}.npz" for number in range(1, 11)] + ["val_data.npz"]
    for name, image, label in zip(names, images, labels, strict=True):
        np.savez(folder / name, data=image.reshape(1, -1), labels=[label], mean=np.zeros(3 * side**2))
    return images


@pytest.mark.parametrize("side", [32, 64])
def test_imagenet_of_2017_is_read_from_its_batches(tmp_path, side):
    images = write_imagenet(tmp_path, side)
    train, test = (load(f"imagenet{side}", split, tmp_path) for split in ("train", "test"))
    assert np.array_equal(torch.cat([train.images, test.images]), images)
    assert torch.cat([train.labels, test.labels]).tolist() == [*range(989, 1000)]
    assert (len(train), train.num_classes, train.flip) == (10, 1000, True)
    assert f"ImageNet {side}x{side} as released in 2017 (arXiv 1707.08819), 10 train images" in train.source
    (tmp_path / "val_data.npz").write_bytes((tmp_path / "val_data.npz").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"val_data\.npz: expected an \.npz file with labels"):
        load(f"imagenet{side}", "test", tmp_path)


def test_packed_images_are_unpacked_once_and_mapped(tmp_path):
    write_imagenet(tmp_path, 32)
    (tmp_path / ".imagenet32-train.npy.12345").write_bytes(b"left by a process that was killed")
    with multiprocessing.get_context("fork").Pool(3) as pool:
        sizes = pool.map(len_of_imagenet, [tmp_path] * 6, chunksize=1)
    assert sizes == [10] * 6
    unpacked = tmp_path / "imagenet32-train.npy"
    assert {path.name for path in tmp_path.glob("*train.npy*")} == {unpacked.name, f".{unpacked.name}.lock"}
    written = unpacked.stat().st_mtime_ns
    dataset = load("imagenet32", "train", tmp_path)
    assert unpacked.stat().st_mtime_ns == written
    if sys.platform == "linux":
        assert str(unpacked) in Path("/proc/self/maps").read_text()
    dataset.images[0] = 0  # the pages of this process alone
    assert load("imagenet32", "train", tmp_path).images[0].any()


def len_of_imagenet(folder):
    return len(load("imagenet32", "train", folder).images)


def test_packed_images_that_have_changed_are_unpacked_again(tmp_path):
    write_imagenet(tmp_path, 32)
    before = load("imagenet32", "test", tmp_path)
    images = pixels(1, 2, 3, 32, 32)
    np.savez_compressed(tmp_path / "val_data.npz", data=images.reshape(2, -1), labels=[1, 2])
    assert np.array_equal(load("imagenet32", "test", tmp_path).images, images)
    assert len(before.images) == 1  # still those that it was made of


def test_packed_images_of_a_folder_that_cannot_be_written_to_are_unpacked_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    images = write_imagenet(tmp_path / "data", 32)
    before = sorted((tmp_path / "data").iterdir())
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert np.array_equal(load("imagenet32", "train", tmp_path / "data").images, images[:10])
    assert sorted((tmp_path / "data").iterdir()) == before
    assert len([*tmp_path.glob(f"tarflow-{os.getuid()}/*-imagenet32-train.npy")]) == 1


def test_images_that_are_unpacked_in_a_folder_that_cannot_be_written_to_are_read_there(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    images = write_imagenet(tmp_path / "data", 32)
    load("imagenet32", "train", tmp_path / "data")
    (tmp_path / "data" / ".imagenet32-train.npy.lock").unlink()
    (tmp_path / "data").chmod(0o500)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # to root everything can be written
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert np.array_equal(load("imagenet32", "train", tmp_path / "data").images, images[:10])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_temporary_folder_of_somebody_else_is_not_trusted(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write_imagenet(tmp_path / "data", 32)
    user = os.getuid() + 1
    (tmp_path / f"tarflow-{user}").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: user)
    with pytest.raises(PermissionError, match="expected a folder of the user"):
        load("imagenet32", "train", tmp_path / "data")


@pytest.mark.parametrize("labels", [[1.5], [2.0], [[1]], ["cat"]], ids=str)
def test_labels_of_imagenet_that_are_not_whole_numbers_are_refused(tmp_path, labels):
    np.savez(tmp_path / "val_data.npz", data=pixels(0, 1, 3 * 32 * 32), labels=labels)
    with pytest.raises(ValueError, match=r"val_data\.npz: expected labels of integers \(n,\), got "):
        load("imagenet32", "test", tmp_path)


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("layout", ["folder", "n, side, side, 3", "n, 3, side, side"])
def test_imagenet_of_2016_is_read_as_it_is_distributed(tmp_path, side, layout):
    images = {"train": pixels(0, 4, side, side, 3), "valid": pixels(1, 2, side, side, 3)}
    for split, values in images.items():
        if layout == "folder":
            (tmp_path / f"{split}_{side}x{side}").mkdir()
            for number, image in enumerate(values):
                Image.fromarray(image).save(tmp_path / f"{split}_{side}x{side}" / f"{number:07}.png")
        else:
            values = values.transpose(0, 3, 1, 2) if layout == "n, 3, side, side" else values
            np.savez(tmp_path / f"{split}_{side}x{side}.npz", values)
    for split, key, count in (("train", "train", 4), ("test", "valid", 2)):
        dataset = load(f"imagenet{side}-2016", split, tmp_path)
        drawn, labels = dataset.get_batch(torch.arange(count))
        assert np.array_equal(drawn.permute(0, 2, 3, 1), images[key])
        assert (len(dataset), dataset.num_classes, labels.tolist()) == (count, 0, count * [-1])
        assert (dataset.image_size, dataset.in_channels, dataset.flip) == (side, 3, True)
        title = f"ImageNet {side}x{side} as released in 2016 (arXiv 1601.06759), {count} {split} images from {tmp_path}"
        assert dataset.source == title


def test_imagenet_of_2016_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_dir: expected train_32x32/ or train_32x32\.npz in .* neither"):
        load("imagenet32-2016", "train", tmp_path)
    np.savez(tmp_path / "train_32x32.npz", pixels(0, 2, 64, 64, 3))
    with pytest.raises(
        ValueError, match=r"train_32x32\.npz: expected arr_0 of uint8 \(n, 32, 32, 3\), got \(2, 64, 64, 3\)"
    ):
        load("imagenet32-2016", "train", tmp_path)
    (tmp_path / "train_32x32").mkdir()
    with pytest.raises(ValueError, match=r"data_dir: expected PNG files in .*train_32x32, got none"):
        load("imagenet32-2016", "train", tmp_path)
    Image.fromarray(pixels(0, 64, 64, 3)).save(tmp_path / "train_32x32" / "1.png")
    with pytest.raises(ValueError, match=r"1\.png: expected 32 x 32 pixels, got 64 x 64"):
        load("imagenet32-2016", "train", tmp_path).get_batch(torch.tensor([0]))


def test_data_without_classes_has_no_labels():
    with pytest.raises(ValueError, match="labels: expected -1 to -1, got 0 to 0 from nowhere"):
        ImageDataset(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), (), True, "nowhere")


def test_folder_gives_the_centred_square_resized(tmp_path):
    write_pictures(tmp_path / "train", ["cat", "ant"], 3)
    write_pictures(tmp_path / "val", ["cat"], 1, seed=9)
    train, test = (load("folder", split, tmp_path, image_size=10) for split in ("train", "test"))
    images, labels = train.get_batch(torch.arange(6))
    assert train.class_names == test.class_names == ("ant", "cat")
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.get_batch(torch.tensor([0]))[1].tolist() == [1]
    for path, image in zip(train.paths, images, strict=True):
        resized = Image.open(path).resize((20, 10), Image.Resampling.LANCZOS)
        assert np.array_equal(image.permute(1, 2, 0), resized.crop((5, 0, 15, 10)))


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.sampled_from(RESIZE))
@settings(max_examples=150, deadline=None)
def test_resizing_is_that_of_the_shorter_side_and_a_centre_crop(tmp_path_factory, width, height, size, resize):
    folder = tmp_path_factory.mktemp("folder")
    write_pictures(folder / "train", ["a"], 1, size=(width, height))
    write_pictures(folder / "val", ["a"], 1, size=(width, height))
    dataset = load("folder", "train", folder, size, resize)
    # As torchvision's Resize and CenterCrop, of which published TarFlow makes its data, say.
    short = min(width, height)
    whole = (int(size * width / short), int(size * height / short))
    left, top = (round((side - size) / 2.0) for side in whole)
    with Image.open(dataset.paths[0]) as image:
        expected = image.resize(whole, Image.Resampling[resize.upper()]).crop((left, top, left + size, top + size))
    assert np.array_equal(dataset.get_batch(torch.tensor([0]))[0][0].permute(1, 2, 0), expected)
    assert dataset.source.endswith(f", resized to {size} ({resize}) and centre-cropped")


def test_a_picture_too_long_to_resize_is_refused(tmp_path):
    for split in ("train", "val"):
        write_pictures(tmp_path / split, ["a"], 1, size=(1_000_000, 1))
    with pytest.raises(ValueError, match=r"0\.png: .* at most 50,000,000 pixels when resized, got 84000000 x 84"):
        load("folder", "train", tmp_path, 84).get_batch(torch.tensor([0]))


def read_one(folder, save, suffix=".png"):
    """What a folder makes of one picture, in 3 x 8 x 8."""
    for split in ("train", "val"):
        (folder / split / "a").mkdir(parents=True, exist_ok=True)
        save(folder / split / "a" / f"0{suffix}")
    return load("folder", "train", folder, image_size=8).get_batch(torch.tensor([0]))[0][0]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_16_bit_grey_is_scaled_to_8_bits(tmp_path, suffix):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040 + 7
    drawn = read_one(tmp_path, Image.fromarray(values).save, suffix)
    assert np.array_equal(drawn, np.broadcast_to(np.rint(values / 257), (3, 8, 8)))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pictures_whose_range_is_not_known_are_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match=r"0\.tif: expected an image.* 8 or 16 bits a channel, got 32 "):
        read_one(tmp_path, Image.fromarray(np.ones((8, 8), dtype)).save, ".tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "I;16"])
def test_what_is_transparent_lies_on_white(tmp_path, mode):
    picture, options = Image.new("L", (8, 8), 40), {}
    if mode in ("RGBA", "LA"):
        picture = picture.convert(mode)
        picture.putalpha(Image.fromarray(np.repeat(np.uint8([[0, 255]]), 4, axis=1).repeat(8, axis=0)))
    else:
        picture.paste(200, (0, 0, 4, 8))
        wide = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
        picture = wide if mode == "I;16" else picture.convert(mode)
        options = {
            "transparency": {"P": picture.getpixel((0, 0)), "RGB": (200, 200, 200), "L": 200, "I;16": 51400}[mode]
        }
    drawn = read_one(tmp_path, lambda path: picture.save(path, **options))
    assert drawn[:, :, :4].unique().tolist() == [255]
    assert drawn[:, :, 4:].unique().tolist() == [40]


def test_only_formats_that_the_suffixes_name_are_opened(tmp_path):
    """Pillow hands an EPS to Ghostscript, whatever the file is called."""
    with pytest.raises(ValueError, match=r"0\.png: expected an image, .*cannot identify"):
        read_one(tmp_path, lambda path: Image.new("RGB", (8, 8)).save(path, "EPS"))


def test_a_picture_too_large_is_refused_before_it_is_decoded(tmp_path, recwarn):
    large = Image.new("1", (10_000, 10_000))
    with pytest.raises(ValueError, match=r"0\.png: expected an image.* at most 50,000,000 pixels, got 10000 x 10000"):
        read_one(tmp_path, large.save)
    assert not recwarn.list


def test_a_small_file_that_would_fill_the_memory_is_refused_unread(tmp_path):
    write_idx(tmp_path)
    header = bytes((0, 0, 8, 3)) + np.array((100_000, 28, 28), ">u4").tobytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(78_400_000)))
    np.savez_compressed(tmp_path / "val_data.npz", data=np.zeros((1, 70_000_000), np.uint8), labels=[1])
    for name, split, file in (("mnist", "train", "train-images-idx3-ubyte.gz"), ("imagenet32", "test", "val_data.npz")):
        with pytest.raises(ValueError, match=rf"{file}: expected at most 67,108,864 bytes in a compressed file of"):
            load(name, split, tmp_path)


def test_folder_makes_every_image_rgb(tmp_path):
    gray = pixels(0, 8, 8)
    (tmp_path / "a").mkdir()
    for number, mode in enumerate(("L", "RGB", "RGBA", "P")):
        Image.fromarray(gray).convert(mode).save(tmp_path / "a" / f"{number}.png")
    images = [load("folder", split, tmp_path, image_size=8) for split in ("train", "test")]
    images = torch.cat([dataset.get_batch(torch.arange(len(dataset)))[0] for dataset in images])
    assert np.array_equal(images, np.broadcast_to(gray, (4, 3, 8, 8)))


def test_without_splits_every_image_is_in_one_which_other_images_do_not_change(tmp_path):
    write_pictures(tmp_path / "data", ["a", "b"], 50, size=(4, 4))
    before = {split: {*load("folder", split, tmp_path / "data", image_size=4).paths} for split in ("train", "test")}
    assert before["train"] | before["test"] == {*(tmp_path / "data").glob("*/*.png")}
    assert before["test"]
    assert not before["train"] & before["test"]
    for number in range(30):
        write_pictures(tmp_path / "data", [f"c{number}"], 1, size=(4, 4))
    after = {split: {*load("folder", split, tmp_path / "data", image_size=4).paths} for split in ("train", "test")}
    assert before["train"] < after["train"]
    assert before["test"] <= after["test"]
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = load("folder", "test", tmp_path / "moved", image_size=4).paths
    assert [path.name for path in moved] == [path.name for path in sorted(after["test"])]


def test_one_image_in_twenty_is_held_out(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    for number in range(4000):
        (folder / f"{number}.png").touch()
    assert len(load("folder", "test", tmp_path, image_size=4)) == pytest.approx(200, abs=45)


def test_folder_names_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="image_size: expected"):
        load("folder", data_dir=tmp_path)
    with pytest.raises(ValueError, match="data_dir: expected images"):
        load("folder", data_dir=tmp_path, image_size=8)
    write_pictures(tmp_path / "train", ["a"], 2)
    write_pictures(tmp_path / "test", ["a", "b", "c"], 1)
    with pytest.raises(ValueError, match=r"data_dir: expected in .* got also b, c"):
        load("folder", "test", tmp_path, 8)
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"0\.png: expected an image"):
        load("folder", "train", tmp_path, 8).get_batch(torch.tensor([0]))


def test_hub_reads_the_columns_of_images_and_classes(tmp_path):
    pytest.importorskip("datasets", reason="needs the extra: pip install 'tarflow[hub]'")
    write_pictures(tmp_path / "data" / "train", ["ant", "bee"], 3, size=(8, 8))
    write_pictures(tmp_path / "data" / "test", ["ant", "bee"], 1, seed=9, size=(8, 8))
    train, test = (load(f"hub:{tmp_path / 'data'}", split, tmp_path / "cache") for split in ("train", "test"))
    same = load("folder", "train", tmp_path / "data", image_size=8).get_batch(torch.arange(6))
    assert torch.equal(train.images.sum((1, 2, 3)).sort()[0], same[0].sum((1, 2, 3)).sort()[0])
    assert train.labels.bincount().tolist() == [3, 3]
    assert (len(test), train.class_names, train.image_size) == (2, ("ant", "bee"), 8)
    assert load(f"hub:{tmp_path / 'data'}", "test", tmp_path / "cache", image_size=5).image_size == 5
    assert not train.flip  # nothing says that a mirrored image means the same


def test_hub_without_the_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'hub:me/mine .* pip install "tarflow\[hub\]"'):
        load("hub:me/mine")


BAD_ARGUMENTS = [
    ({"name": 5}, "name: expected one of fashion-mnist, .*; got 5"),
    ({"data_dir": 5}, "data_dir: expected the folder that holds the files, or None; got 5"),
    ({"image_size": "28"}, "image_size: expected 1 to 7071, got 28"),
    ({"resize": ["box"]}, r"resize: expected one of .*; got \['box'\]"),
    ({"name": "minst"}, "name: expected one of fashion-mnist, mnist, cifar10, .*; got 'minst'"),
    ({"split": "val"}, "split: expected 'train' or 'test', got 'val'"),
    ({"name": "cifar10"}, "data_dir: expected the folder that holds cifar10, got None"),
    ({"image_size": 32}, "image_size: expected None or 28 for fashion-mnist, got 32"),
    ({"image_size": 0}, "image_size: expected 1 to 7071, got 0"),
    ({"image_size": 10**18}, "image_size: expected 1 to 7071, got 10+"),
    ({"name": ""}, "name: expected one of fashion-mnist, .*; got ''"),
    ({"name": "hub:"}, "name: expected one of fashion-mnist, .*; got 'hub:'"),
    ({"resize": "nearest"}, "resize: expected one of lanczos, bicubic, bilinear, box; got 'nearest'"),
]


@pytest.mark.parametrize(("arguments", "error"), BAD_ARGUMENTS)
def test_a_bad_argument_is_named(no_debian, arguments, error):
    with pytest.raises(ValueError, match=error):
        load(**arguments)


@given(st.integers(1, 40), st.data())
@settings(max_examples=50, deadline=None)
def test_a_resumed_run_sees_the_batches_it_would_have_seen(size, data):
    batch_size, seed = data.draw(st.integers(1, size)), data.draw(st.integers(0, 2**32))
    start = data.draw(st.integers(0, 5 * size))
    whole = islice(batches(numbered(size), batch_size, seed), start, start + 3)
    resumed = islice(batches(numbered(size), batch_size, seed, start), 3)
    assert [labels.tolist() for _, labels in whole] == [labels.tolist() for _, labels in resumed]


@given(st.integers(1, 40), st.data())
@settings(max_examples=50, deadline=None)
def test_an_epoch_draws_no_image_twice_and_drops_only_the_last_partial_batch(size, data):
    batch_size = data.draw(st.integers(1, size))
    steps, stream = size // batch_size, batches(numbered(size), batch_size, seed=0)
    for _ in range(2):
        epoch = [next(stream) for _ in range(steps)]
        drawn = torch.cat([labels for _, labels in epoch])
        assert len(drawn.unique()) == steps * batch_size > size - batch_size
        assert torch.equal(torch.cat([images for images, _ in epoch])[:, 0, 0, 0], drawn.to(torch.uint8))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_shares_of_several_processes_are_the_batch_of_one(num_ranks):
    whole = islice(batches(numbered(40), 16, seed=3), 3)
    shares = [batches(numbered(40), 16, seed=3, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    for (images, labels), *parts in zip(whole, *shares, strict=False):
        for rank, (part, part_labels) in enumerate(parts):
            assert torch.equal(part, images[rank::num_ranks])
            assert torch.equal(part_labels, labels[rank::num_ranks])


@pytest.mark.parametrize("arguments", [{"num_ranks": 3}, {"rank": 2, "num_ranks": 2}, {"rank": -1}])
def test_a_batch_without_equal_shares_is_refused(arguments):
    with pytest.raises(ValueError, match=r"batch_size: expected a multiple of the \d processes"):
        batches(numbered(10), 4, seed=0, **arguments)


def test_epochs_and_seeds_differ_in_their_order():
    first, second = islice(batches(numbered(200), 200, seed=0), 2)
    other = next(batches(numbered(200), 200, seed=1))
    assert not torch.equal(first[1], second[1])
    assert not torch.equal(first[1], other[1])


@pytest.fixture
def folder(tmp_path):
    """Twenty or so files of three classes."""
    write_pictures(tmp_path, ["a", "b", "c"], 7)
    return load("folder", "train", tmp_path, image_size=6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_folder_streams_what_get_batch_reads(folder, num_workers):
    state = torch.get_rng_state()
    stream = batches(folder, 8, seed=3, start=1, num_workers=num_workers)
    indices = islice(batches(numbered(len(folder)), 8, seed=3), 1, 5)
    for (images, labels), (_, chosen) in zip(islice(stream, 4), indices, strict=True):
        assert all(map(torch.equal, (images, labels), folder.get_batch(chosen)))
    assert torch.equal(torch.get_rng_state(), state), "streaming drew from the caller's random numbers"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_chosen_images_are_read_once_and_in_their_order(folder, num_workers, no_collector):
    indices = torch.arange(len(folder)).flip(0).split(5)
    for data, expected in ((folder, folder.get_batch), (numbered(len(folder)), numbered(len(folder)).get_batch)):
        read = list(datasets.read(data, indices, num_workers))
        assert [len(labels) for _, labels in read] == [len(chosen) for chosen in indices]
        for batch, chosen in zip(read, indices, strict=True):
            assert all(map(torch.equal, batch, expected(chosen)))
    assert multiprocessing.active_children() == []


@pytest.fixture
def no_collector():
    """What ends then, ends because the last reference to it is gone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_image_is_one_line_whoever_reads_it(tmp_path, num_workers, no_collector):
    write_pictures(tmp_path / "train", ["a"], 4, size=(8, 8))
    write_pictures(tmp_path / "val", ["a"], 1, size=(8, 8))
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"^/.*\.png: expected an image, but reading it fails with .*$") as error:
        next(batches(load("folder", "train", tmp_path, 8), 2, seed=0, num_workers=num_workers))
    assert len(str(error.value).splitlines()) == 1
    assert multiprocessing.active_children() == []


def test_readers_end_with_the_stream_of_batches(folder, no_collector):
    before = signal.getsignal(signal.SIGCHLD)
    stream = batches(folder, 8, seed=3, num_workers=2)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGCHLD) == before, "a reader that ends could throw at anything that runs"


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ConnectionResetError(), False),
        (EOFError(), False),
        (OSError("got end of file during message"), False),
        (multiprocessing.AuthenticationError(), False),
        (ValueError("an error"), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_reader_is_silent_about_lost_connections_alone(error, shown, monkeypatch, capsys):
    for name in ("signal", "alarm"):
        monkeypatch.setattr(signal, name, lambda *_: None)
    monkeypatch.setattr(sys, "excepthook", None)
    streaming._prepare_reader(0)
    sys.excepthook(type(error), error, None)
    assert ("an error" in capsys.readouterr().err) == shown


def test_a_reader_that_is_killed_is_one_error_of_a_batch(folder, no_collector):
    stream = batches(folder, 8, seed=3, num_workers=2)
    next(stream)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError, match=r"^a process that reads images was killed, .*$"):
        list(islice(stream, 1000))
    stream.close()
    assert multiprocessing.active_children() == []


def test_batches_can_be_read_in_any_thread(folder):
    stream, seen = batches(folder, 2, seed=3, num_workers=1), []
    thread = threading.Thread(target=lambda: seen.append(next(stream)))
    thread.start()
    thread.join()
    stream.close()
    assert seen[0][0].shape == (2, 3, 6, 6)


def test_a_fingerprint_tells_data_apart_and_not_where_they_lie():
    data = numbered(20)
    print = fingerprint(data)
    assert (print["source"], print["images"], print["classes"]) == ("numbers", 20, 20)
    assert fingerprint(replace(data, images=data.images.clone(), source="elsewhere"))["digest"] == print["digest"]
    images = data.images.clone()
    images[-1, 0, 1, 1] ^= 1
    different = [
        {"images": images},
        {"labels": data.labels.flip(0)},
        {"class_names": ("another", *data.class_names[1:])},
        {"images": data.images[:19], "labels": data.labels[:19]},
        {"images": data.images.expand(-1, 3, -1, -1)},
    ]
    digests = [fingerprint(replace(data, **parts))["digest"] for parts in different]
    assert len({print["digest"], *digests}) == len(different) + 1


@pytest.mark.parametrize(("index", "looked_at"), [(18, True), (19, False)])
def test_the_fingerprint_of_much_data_looks_at_some_of_it(index, looked_at):
    data = numbered(20)
    images = data.images.clone()
    images[index] ^= 1
    digests = {fingerprint(some, max_bytes=4 * 10)["digest"] for some in (data, replace(data, images=images))}
    assert len(digests) == 1 + looked_at


def test_the_fingerprint_of_a_folder_is_of_its_names_and_sizes(tmp_path):
    for place in ("here", "there"):
        write_pictures(tmp_path / place, ["a", "b"], 10, size=(4, 4))

    def digest(place):
        return fingerprint(load("folder", "train", tmp_path / place, image_size=4))["digest"]

    same = digest("here")
    assert digest("there") == same
    path = load("folder", "train", tmp_path / "there", image_size=4).paths[0]
    path.write_bytes(path.read_bytes() + b"more")
    assert digest("there") != same
    write_pictures(tmp_path / "here", ["c"], 10, size=(4, 4))
    assert digest("here") != same


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"batch_size": 11}, {"seed": -1}, {"start": -1}])
def test_batches_refuse_what_they_cannot_do_at_the_call(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}.*: expected"):
        batches(numbered(10), **{"batch_size": 2, "seed": 0} | arguments)
