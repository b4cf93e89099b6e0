"""Pixels in: the named datasets, folders of images and Hugging Face hubs, and the batches that training draws."""

import gzip
import hashlib
import json
import math
import os
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, eq=False)
class Images:
    """A dataset in memory.

    images: uint8 (N, C, S, S); labels: int64 (N,), each in 0 .. num_classes - 1; flip: whether a mirrored image means
    the same; source: one sentence that says which data this is. ValueError where these do not fit together.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    flip: bool
    source: str

    def __post_init__(self):
        images, labels, shape = self.images, self.labels, list(self.images.shape)
        if images.dtype != torch.uint8 or len(shape) != 4 or 0 in shape or shape[2] != shape[3]:
            raise ValueError(f"images: expected uint8 [N, C, S, S], got {images.dtype} {shape} from {self.source}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            got = f"{labels.dtype} {list(labels.shape)}"
            raise ValueError(f"labels: expected int64 {shape[:1]}, got {got} from {self.source}")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            got = f"{labels.min()} to {labels.max()}"
            raise ValueError(f"labels: expected 0 to {self.num_classes - 1}, got {got} from {self.source}")

    num_classes = property(lambda self: len(self.class_names))
    image_size = property(lambda self: self.images.shape[3])
    in_channels = property(lambda self: self.images.shape[1])

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images, uint8 (B, C, S, S), and labels, int64 (B,), at `indices`, int64 (B,)."""
        return self.images[indices], self.labels[indices]


@dataclass(frozen=True, eq=False)
class Folder:
    """A dataset of image files, read when fetched: their centred squares, resized with Lanczos, as RGB."""

    paths: tuple[Path, ...]
    labels: Tensor
    class_names: tuple[str, ...]
    image_size: int
    source: str
    flip: bool = True
    in_channels: int = 3

    num_classes = property(lambda self: len(self.class_names))

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images, uint8 (B, 3, S, S), and labels, int64 (B,), at `indices`. ValueError names an unreadable file."""
        images = torch.empty(len(indices), self.in_channels, self.image_size, self.image_size, dtype=torch.uint8)
        for slot, index in zip(images, indices.tolist(), strict=True):
            with _reading(self.paths[index], "an image"), Image.open(self.paths[index]) as image:
                slot.copy_(_pixels(image, "RGB", self.image_size))
        return images, self.labels[indices]

    __getitem__ = fetch  # what DataLoader calls


def load(
    name: str = "fashion-mnist", split: str = "train", data_dir: str | Path | None = None, image_size: int | None = None
) -> Images | Folder:
    """The `split`, "train" or "test", of a dataset.

    fashion-mnist   the four IDX files in `data_dir`, else the Debian package's, else the subset shipped with tarflow
    mnist           the four IDX files in `data_dir`, plain or .gz
    cifar10         the published binary version in `data_dir`
    imagenet64      the published downsampled .npz batches in `data_dir` (the train split takes 16 GB of memory)
    folder          class sub-folders of images in `data_dir`, or in its `train` and `test` (or `val`), resized to
                    `image_size`; without such splits a fixed 5% is the test split
    hub:<id>        a Hugging Face dataset, cached in `data_dir`, resized to `image_size` where given
    Raises ValueError for a bad argument or a bad file, FileNotFoundError for a missing one.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected at least 1, got {image_size}")
    if name.startswith("hub:"):
        return _load_hub(name, split, data_dir, image_size)
    if name != "folder" and name not in _READERS:
        raise ValueError(f"name: expected one of {', '.join(_READERS)}, folder, hub:<dataset id>; got {name!r}")
    if data_dir is None and name != "fashion-mnist":
        raise ValueError(f"data_dir: expected the folder that holds {name}, got None")
    if name == "folder":
        return _load_folder(split, Path(data_dir), image_size)
    dataset = _READERS[name](split, data_dir and Path(data_dir))
    if image_size not in (None, dataset.image_size):
        raise ValueError(f"image_size: expected None or {dataset.image_size} for {name}, got {image_size}")
    return dataset


def batches(
    dataset: Images | Folder, batch_size: int, seed: int, start: int = 0, num_workers: int | None = None
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Endless batches of (images, labels) from number `start` on, shuffled anew each epoch, no image twice in one.

    The order of epoch e depends on (seed, e) alone, so a run that resumes at step n passes start=n and sees what it
    would have seen. The len(dataset) % batch_size images left at the end of an epoch are dropped. A `Folder` is read
    ahead by `num_workers` processes (default: one a core, at most 8), which end when the generator is closed.
    ValueError for an argument out of range; from a batch, ChildProcessError where such a process was killed.
    """
    if not 1 <= batch_size <= len(dataset):
        raise ValueError(f"batch_size: expected 1 to {len(dataset)}, the size of the dataset, got {batch_size}")
    if seed < 0 or start < 0:
        raise ValueError(f"seed, start: expected at least 0, got {seed} and {start}")
    indices = _batch_indices(len(dataset), batch_size, seed, start)
    if isinstance(dataset, Images):
        return (dataset.fetch(chosen) for chosen in indices)
    workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
    # No batch size: each item of this sampler is a batch. Its own generator: the global one is the caller's.
    options = {"batch_size": None, "pin_memory": torch.cuda.is_available(), "generator": torch.Generator()}
    options |= {"num_workers": workers, "worker_init_fn": _outlive_stop_signals}
    return _stream(torch.utils.data.DataLoader(dataset, sampler=indices, **options))


def _stream(loader: torch.utils.data.DataLoader) -> Generator[tuple[Tensor, Tensor], None, None]:
    """What the loader reads; its processes end with this generator, which holds the only reference to them."""
    with _no_child_signals():
        read = iter(loader)
    while True:
        try:
            images, labels = next(read)
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            raise ChildProcessError("a process that reads images was killed, maybe for want of memory") from None
        yield images, labels


@contextmanager
def _no_child_signals() -> Iterator[None]:
    """Take back the handler that the loader sets: it would throw at whatever runs when a reader dies.

    That may be half an update of the weights. Without it the death is found when the next batch is waited for.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _outlive_stop_signals(worker: int) -> None:
    """A stop, which may be sent to every process, is for the trainer to handle: readers outlive it by 30 seconds.

    Not for ever, because multiprocessing ends what is left of them by SIGTERM, and waits.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def fingerprint(dataset: Images | Folder) -> dict[str, Any]:
    """Which data this is: `source`, the number of `images` and of `classes`, and a SHA-256 `digest`.

    The digest is of the names of the classes, all labels, and the pixels of `Images` or the names (class/file) of a
    `Folder`, wherever it lies, and the sizes of its files. To be cheap for any dataset it looks at no more than 256 MB
    of pixels and the sizes of 10,000 files: beyond that, at every second, third, ... image alone.
    """
    sha = hashlib.sha256(json.dumps(dataset.class_names).encode())
    sha.update(dataset.labels.numpy())
    if isinstance(dataset, Images):
        sha.update(json.dumps(list(dataset.images.shape)).encode())
        for part in dataset.images[:: -(-dataset.images.numel() // _HASHED_BYTES)].split(1024):
            sha.update(part.contiguous().numpy())
    else:
        names = [f"{path.parent.name}/{path.name}" for path in dataset.paths]
        sizes = [path.stat().st_size for path in dataset.paths[:: -(-len(dataset) // _HASHED_FILES)]]
        sha.update(json.dumps([names, sizes]).encode())
    counts = {"images": len(dataset), "classes": dataset.num_classes}
    return {"source": dataset.source, **counts, "digest": sha.hexdigest()}


def _batch_indices(size: int, batch_size: int, seed: int, start: int) -> Iterator[Tensor]:
    steps = size // batch_size
    epoch, step = divmod(start, steps)
    while True:
        order = np.random.default_rng(np.random.SeedSequence((seed, epoch))).permutation(size)
        yield from torch.from_numpy(order[: steps * batch_size]).view(steps, batch_size)[step:]
        epoch, step = epoch + 1, 0


def _load_fashion_mnist(split: str, data_dir: Path | None) -> Images:
    if data_dir or DEBIAN_FASHION_MNIST.is_dir():
        return _load_idx("Fashion-MNIST", _FASHION, split, data_dir or DEBIAN_FASHION_MNIST)
    subset = resources.files("tarflow") / "data" / "fashion_mnist_subset.npz"
    images, labels = (torch.from_numpy(_read_array(subset, f"{split}_{kind}")) for kind in ("images", "labels"))
    source = f"Fashion-MNIST, the {len(labels):,}-image {split} subset shipped with tarflow, from the training split"
    return Images(images[:, None], labels.long(), _FASHION, False, source)


def _load_idx(title: str, class_names: tuple[str, ...], split: str, data_dir: Path) -> Images:
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    paths = _find_files(data_dir, [f"{prefix}-{kind}" for prefix in ("train", "t10k") for kind in kinds])
    images, labels = paths[:2] if split == "train" else paths[2:]
    images, labels = _read_idx(images, 3)[:, None], _read_idx(labels, 1).long()
    # Not flipped: a mirrored digit is another sign, and every shoe of Fashion-MNIST points left.
    return Images(images, labels, class_names, False, f"{title}, {len(labels):,} {split} images from {data_dir}")


def _load_cifar10(split: str, data_dir: Path) -> Images:
    """Records of one label byte and 3,072 bytes of image, channel by channel."""
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] if split == "train" else ["test_batch.bin"]
    records = []
    for path in _find_files(data_dir, names):
        records.append(np.fromfile(path, np.uint8))
        if not records[-1].size or records[-1].size % 3073:
            raise ValueError(f"{path}: expected records of 3073 bytes, got {records[-1].size} bytes")
    records = torch.from_numpy(np.concatenate(records)).view(-1, 3073)
    images, labels = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()
    return Images(images, labels, _CIFAR10, True, f"CIFAR-10, {len(labels):,} {split} images from {data_dir}")


def _load_imagenet64(split: str, data_dir: Path) -> Images:
    """Arrays `data`, uint8 (n, 12288), and `labels`, 1 to 1000."""
    names = [f"train_data_batch_{number}.npz" for number in range(1, 11)]
    paths = _find_files(data_dir, names if split == "train" else ["val_data.npz"])
    labels = [_read_array(path, "labels") for path in paths]
    # Filled file by file: joining the arrays at the end would need the memory twice.
    images = torch.empty(sum(map(len, labels)), 3, 64, 64, dtype=torch.uint8)
    for path, part in zip(paths, images.split([*map(len, labels)]), strict=True):
        data = _read_array(path, "data")
        if data.dtype != np.uint8 or data.shape != (len(part), 12288):
            raise ValueError(f"{path}: expected data of uint8 ({len(part)}, 12288), got {data.dtype} {data.shape}")
        part.copy_(torch.from_numpy(data).view_as(part))
    labels = torch.from_numpy(np.concatenate(labels).astype(np.int64) - 1)
    source = f"ImageNet 64x64, {len(labels):,} {split} images from {data_dir}"
    return Images(images, labels, tuple(map(str, range(1000))), True, source)


def _load_folder(split: str, data_dir: Path, image_size: int | None) -> Folder:
    if image_size is None:
        raise ValueError("image_size: expected the side to resize the folder's images to, got None")
    test = next((data_dir / name for name in ("test", "val") if (data_dir / name).is_dir()), None)
    train = data_dir / "train" if test and (data_dir / "train").is_dir() else data_dir
    files = _find_images(train)
    class_names = sorted({path.parent.name for path in files})
    if train == data_dir:
        files = [files[index] for index in _hold_out(len(files), split)]
    elif split == "test":
        files = _find_images(test)
    if not files:
        raise ValueError(f"data_dir: expected images ({', '.join(IMAGE_SUFFIXES)}) in sub-folders of {train}, got none")
    names = [path.parent.name for path in files]
    if unknown := set(names) - set(class_names):
        raise ValueError(f"data_dir: expected in {test} the classes of {train}, got also {', '.join(sorted(unknown))}")
    labels, source = np.searchsorted(class_names, names), f"{len(files):,} {split} images from {data_dir}"
    return Folder(tuple(files), torch.from_numpy(labels), tuple(class_names), image_size, source)


def _load_hub(name: str, split: str, cache_dir: str | Path | None, image_size: int | None) -> Images:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'{name} needs Hugging Face datasets: pip install "tarflow[hub]"') from error
    splits = datasets.load_dataset(name.removeprefix("hub:"), cache_dir=cache_dir and str(cache_dir))
    test = next((key for key in ("test", "validation", "valid", "val") if key in splits), None)
    key = test if split == "test" and test else "train"
    if key not in splits:
        raise ValueError(f"{name}: expected a train split, got {', '.join(splits)}")
    rows = splits[key] if test else splits[key].select(_hold_out(len(splits[key]), split))
    columns = {type(feature).__name__: column for column, feature in reversed(rows.features.items())}
    image, label = columns.get("Image"), columns.get("ClassLabel")
    if None in (image, label):
        raise ValueError(f"{name}: expected an Image and a ClassLabel column, got {dict(rows.features)}")
    mode = "L" if rows[0][image].mode in ("1", "L") else "RGB"
    images = [_pixels(row[image], mode, image_size) for row in rows]
    if len({picture.shape for picture in images}) > 1:
        raise ValueError(f"image_size: expected the side to resize to, because the images of {name} differ in size")
    source, labels = f"{name}, {len(images):,} images of its split {key}", torch.tensor(rows[label][:])
    return Images(torch.stack(images), labels, tuple(rows.features[label].names), True, source)


def _read_idx(path: Path, dimensions: int) -> Tensor:
    with _reading(path, "an IDX file"):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    begin = 4 + 4 * dimensions
    if len(raw) < begin or raw[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"{path}: expected an IDX header of {dimensions} dimension(s) of uint8, got {raw[:4]!r}")
    shape = np.frombuffer(raw, ">u4", dimensions, 4).tolist()
    if len(raw) != begin + math.prod(shape):
        raise ValueError(f"{path}: expected {math.prod(shape)} values, as its header says, got {len(raw) - begin}")
    return torch.tensor(np.frombuffer(raw, np.uint8, offset=begin).reshape(shape))


def _read_array(path: Path, key: str) -> np.ndarray:
    with _reading(path, f"an .npz file with {key}"), path.open("rb") as file, np.load(file) as arrays:
        return arrays[key]


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """ValueError that names the file for whatever its decoder throws: each has a list of its own, and adds to it."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path}: expected {what}, but reading it fails with {error!r}") from error


def _pixels(image: Image.Image, mode: str, size: int | None) -> Tensor:
    image = ImageOps.exif_transpose(image).convert(mode)
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.tensor(np.atleast_3d(image)).permute(2, 0, 1)


def _find_files(folder: Path, names: list[str]) -> list[Path]:
    """Each plain or gzipped; FileNotFoundError lists those that are neither."""
    paths = [next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), name) for name in names]
    if missing := [path for path in paths if isinstance(path, str)]:
        raise FileNotFoundError(f"data_dir: expected {', '.join(names)} in {folder}, missing {', '.join(missing)}")
    return paths


def _find_images(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("[!.]*/[!.]*")) if path.suffix.lower() in IMAGE_SUFFIXES]


def _hold_out(size: int, split: str) -> np.ndarray:
    """The indices of a split where the data has none of its own: always the same 5% are the test split."""
    order, count = np.random.default_rng(0).permutation(size), max(1, size // 20)
    return np.sort(order[:count] if split == "test" else order[count:])


_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_HASHED_BYTES, _HASHED_FILES = 2**28, 10_000
_READERS = {
    "fashion-mnist": _load_fashion_mnist,
    "mnist": partial(_load_idx, "MNIST", tuple("0123456789")),
    "cifar10": _load_cifar10,
    "imagenet64": _load_imagenet64,
}
