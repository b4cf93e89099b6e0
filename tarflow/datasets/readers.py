"""Reads each dataset from the files in which it is published.

A reader takes the split, "train" or "test", and the folder that holds the files.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .dataset import ImageDataset, ImageFolder
from .formats import Unreadable, array_shape, map_arrays, open_decompressed, read_array, read_idx, reading, to_tensor

__all__ = ["FASHION_MNIST", "READERS", "SHIPPED_SUBSET", "read_folder", "read_hub"]

SHIPPED_SUBSET = Path(__file__).parents[1] / "data" / "fashion_mnist_subset.npz"
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FASHION_MNIST = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _read_fashion_mnist(split: str, data_dir: Path) -> ImageDataset:
    """Read the four IDX files in the folder, or the subset that is shipped with tarflow."""
    if data_dir != SHIPPED_SUBSET:
        return _read_mnist("Fashion-MNIST", FASHION_MNIST, split, data_dir)
    images, labels = (torch.from_numpy(read_array(data_dir, f"{split}_{kind}")) for kind in ("images", "labels"))
    source = f"Fashion-MNIST, the {len(labels):,}-image {split} subset shipped with tarflow, from the training split"
    return ImageDataset(images[:, None], labels.long(), FASHION_MNIST, False, source)


def _read_mnist(title: str, class_names: tuple[str, ...], split: str, data_dir: Path) -> ImageDataset:
    """Read two of the four IDX files; all four have to be there."""
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    paths = _find_files(data_dir, [f"{prefix}-{kind}" for prefix in ("train", "t10k") for kind in kinds])
    image_path, label_path = paths[:2] if split == "train" else paths[2:]
    images, labels = read_idx(image_path, 3)[:, None], read_idx(label_path, 1).long()
    # Not flipped: a mirrored digit is another sign, and every shoe of Fashion-MNIST points left.
    return ImageDataset(images, labels, class_names, False, f"{title}, {len(labels):,} {split} images from {data_dir}")


def _read_cifar10(split: str, data_dir: Path) -> ImageDataset:
    """Read records of one label byte and 3,072 bytes of image, channel by channel."""
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] if split == "train" else ["test_batch.bin"]
    parts = []
    for path in _find_files(data_dir, names):
        with reading(path, "a file of CIFAR-10"), open_decompressed(path) as file:
            part = np.frombuffer(file.read(10_001 * 3073), np.uint8)
        if not part.size or part.size % 3073 or part.size > 10_000 * 3073:
            got = f"{part.size} bytes" if part.size % 3073 else f"{part.size // 3073} or more"
            raise Unreadable(f"{path}: expected 1 to 10,000 records of 3073 bytes, got {got}")
        parts.append(part)
    records = torch.from_numpy(np.concatenate(parts)).view(-1, 3073)
    images, labels = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()
    return ImageDataset(images, labels, CIFAR10, True, f"CIFAR-10, {len(labels):,} {split} images from {data_dir}")


def _read_imagenet(side: int, split: str, data_dir: Path) -> ImageDataset:
    """Read arrays `data`, uint8 (n, 3 * side * side), and `labels`, 1 to 1000."""
    names = [f"train_data_batch_{number}.npz" for number in range(1, 11)]
    paths = _find_files(data_dir, names if split == "train" else ["val_data.npz"])
    parts = [read_array(path, "labels") for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if part.dtype.kind not in "iu" or part.ndim != 1:
            raise Unreadable(f"{path}: expected labels of integers (n,), got {part.dtype} {part.shape}")
        if (shape := array_shape(path, "data")) != (expected := (len(part), 3 * side**2)):
            raise Unreadable(f"{path}: expected data of uint8 {expected}, got {shape}")
    labels = torch.from_numpy(np.concatenate(parts).astype(np.int64) - 1)
    images = map_arrays(paths, "data", (len(labels), 3, side, side), f"imagenet{side}-{split}.npy")
    title = f"ImageNet {side}x{side} as released in 2017 (arXiv 1707.08819)"
    source = f"{title}, {len(labels):,} {split} images from {data_dir}"
    return ImageDataset(images, labels, tuple(map(str, range(1000))), True, source)


def _read_imagenet_2016(side: int, split: str, data_dir: Path) -> ImageDataset | ImageFolder:
    """Read a PNG file an image, or one array `arr_0`, uint8 (n, side, side, 3) or (n, 3, side, side)."""
    folder = data_dir / f"{'train' if split == 'train' else 'valid'}_{side}x{side}"
    packed = folder.with_name(f"{folder.name}.npz")
    if folder.is_dir():
        paths = sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() == ".png")
        size = len(paths)
    elif packed.is_file():
        size, *shape = array_shape(packed, "arr_0") or (0,)
        if shape not in ([side, side, 3], [3, side, side]):
            raise Unreadable(f"{packed}: expected arr_0 of uint8 (n, {side}, {side}, 3), got {(size, *shape)}")
        images = map_arrays([packed], "arr_0", (size, *shape), f"{folder.name}.npy")
        images = images.movedim(3, 1) if shape[-1] == 3 else images
    else:
        raise FileNotFoundError(f"data_dir: expected {folder.name}/ or {packed.name} in {data_dir}, found neither")
    if not size:
        raise ValueError(f"data_dir: expected PNG files in {folder}, got none")
    title = f"ImageNet {side}x{side} as released in 2016 (arXiv 1601.06759)"
    source = f"{title}, {size:,} {split} images from {data_dir}"
    labels = torch.full((size,), -1)
    if folder.is_dir():
        return ImageFolder(tuple(paths), labels, (), side, source, resize=None)
    return ImageDataset(images, labels, (), True, source)


def read_folder(split: str, data_dir: Path, image_size: int | None, resize: str) -> ImageFolder:
    """List the images in the class sub-folders of a folder, or of its `train` and `test` or `val`."""
    if image_size is None:
        raise ValueError("image_size: expected the side to resize the folder's images to, got None")
    train = data_dir / "train"
    test = next((data_dir / name for name in ("test", "val") if (data_dir / name).is_dir()), None)
    if test is None or not train.is_dir():
        train = data_dir
    files = _find_images(train)
    class_names = sorted({path.parent.name for path in files})
    if test is None or train == data_dir:
        names = [path.relative_to(data_dir).as_posix() for path in files]
        files = [files[index] for index in _hold_out(names, split)]
    elif split == "test":
        files = _find_images(test)
    if not files:
        raise ValueError(f"data_dir: expected images ({', '.join(IMAGE_SUFFIXES)}) in sub-folders of {train}, got none")
    names = [path.parent.name for path in files]
    if unknown := set(names) - set(class_names):
        raise ValueError(f"data_dir: expected in {test} the classes of {train}, got also {', '.join(sorted(unknown))}")
    labels = torch.from_numpy(np.searchsorted(class_names, names))
    source = f"{len(files):,} {split} images from {data_dir}, resized to {image_size} ({resize}) and centre-cropped"
    return ImageFolder(tuple(files), labels, tuple(class_names), image_size, source, resize=resize)


def read_hub(name: str, split: str, cache_dir: str | Path | None, image_size: int | None, resize: str) -> ImageDataset:
    """Read a dataset of the Hugging Face hub, ``hub:<id>``, by its columns of images and of classes."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'{name} needs Hugging Face datasets: pip install "tarflow[hub]"') from error
    splits = datasets.load_dataset(name.removeprefix("hub:"), cache_dir=cache_dir and str(cache_dir))
    test = next((key for key in ("test", "validation", "valid", "val") if key in splits), None)
    key = test if split == "test" and test else "train"
    if key not in splits:
        raise ValueError(f"{name}: expected a train split, got {', '.join(splits)}")
    rows = splits[key] if test else splits[key].select(_hold_out([*map(str, range(len(splits[key])))], split))
    columns = {type(feature).__name__: column for column, feature in reversed(rows.features.items())}
    image, label = columns.get("Image"), columns.get("ClassLabel")
    if None in (image, label):
        raise ValueError(f"{name}: expected an Image and a ClassLabel column, got {dict(rows.features)}")
    mode = "L" if rows[0][image].mode in ("1", "L", "LA", "I", "I;16", "I;16B") else "RGB"
    with reading(name, "images"):
        images = [to_tensor(row[image], mode, image_size, resize) for row in rows]
    if len({picture.shape for picture in images}) > 1:
        raise ValueError(f"image_size: expected the side to resize to, because the images of {name} differ in size")
    source, labels = f"{name}, {len(images):,} images of its split {key}", torch.tensor(rows[label][:])
    if image_size is not None:
        source += f", resized to {image_size} ({resize}) and centre-cropped"
    return ImageDataset(torch.stack(images), labels, tuple(rows.features[label].names), False, source)


def _find_files(folder: Path, names: list[str]) -> list[Path]:
    """Find each file, plain or gzipped; FileNotFoundError lists those that are missing."""
    paths, missing = [], []
    for name in names:
        found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        paths += found[:1]
        missing += [] if found else [name]
    if missing:
        raise FileNotFoundError(f"data_dir: expected {', '.join(names)} in {folder}, missing {', '.join(missing)}")
    return paths


def _find_images(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("[!.]*/[!.]*")) if path.suffix.lower() in IMAGE_SUFFIXES]


def _hold_out(names: Sequence[str], split: str) -> list[int]:
    """Return the indices of a split of undivided data: one name in twenty, by its hash alone, is a test image."""
    hashes = [int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) for name in names]
    most = max(2**64 // 20, min(hashes, default=0))  # one at least
    return [index for index, value in enumerate(hashes) if (value <= most) == (split == "test")]


READERS: dict[str, Callable[[str, Path], ImageDataset | ImageFolder]] = {
    "fashion-mnist": _read_fashion_mnist,
    "mnist": partial(_read_mnist, "MNIST", tuple("0123456789")),
    "cifar10": _read_cifar10,
    "imagenet32": partial(_read_imagenet, 32),
    "imagenet64": partial(_read_imagenet, 64),
    "imagenet32-2016": partial(_read_imagenet_2016, 32),
    "imagenet64-2016": partial(_read_imagenet_2016, 64),
}
