"""Pixels in: the named datasets, folders of images and Hugging Face hubs, and the batches that training draws."""

import gzip
import hashlib
import json
import math
import os
import signal
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# What such files hold: Pillow knows of many more formats, and hands some of them on to other programs.
IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
RESIZE = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
# A few hundred bytes can say that they are an image which fills the memory; 200 MB decoded is what we take.
MAX_PIXELS = 50_000_000


class Unreadable(ValueError):
    """A file that cannot be read; the message, one line, names it.

    A DataLoader raises the error of its worker anew with the worker's whole traceback as the message, which ends in the
    message that was meant.
    """

    def __str__(self) -> str:
        return super().__str__().rpartition(f"{__name__}.{type(self).__name__}: ")[2].rstrip("\n")


@dataclass(frozen=True, eq=False)
class Images:
    """A dataset in memory.

    images: uint8 (N, C, S, S); labels: int64 (N,), each in 0 .. num_classes - 1, or all -1 where there are no classes;
    flip: whether a mirrored image means the same; source: one sentence that says which data this is. ValueError where
    these do not fit together.
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
        least, most = (0, self.num_classes - 1) if self.num_classes else (-1, -1)
        if labels.min() < least or labels.max() > most:
            got = f"{labels.min()} to {labels.max()}"
            raise ValueError(f"labels: expected {least} to {most}, got {got} from {self.source}")

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
    """A dataset of image files, read when fetched, as RGB.

    Their shorter side is resized to `image_size` and the centre cut out, see :func:`load`; where `resize` is None, they
    are of that size. Labels are -1 where there are no classes. 16-bit grey levels are scaled to 8 bits, and what is
    transparent lies on white.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    class_names: tuple[str, ...]
    image_size: int
    source: str
    flip: bool = True
    in_channels: int = 3
    resize: str | None = "lanczos"

    num_classes = property(lambda self: len(self.class_names))

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images, uint8 (B, 3, S, S), and labels, int64 (B,), at `indices`. Unreadable names a file that is not."""
        images = torch.empty(len(indices), self.in_channels, self.image_size, self.image_size, dtype=torch.uint8)
        for slot, index in zip(images, indices.tolist(), strict=True):
            slot.copy_(_read_image(self.paths[index], self.image_size, self.resize))
        return images, self.labels[indices]

    __getitem__ = fetch  # what DataLoader calls


def load(
    name: str = "fashion-mnist",
    split: str = "train",
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    resize: str = "lanczos",
) -> Images | Folder:
    """The `split`, "train" or "test", of a dataset.

    fashion-mnist   the four IDX files in `data_dir`, else the Debian package's, else the subset shipped with tarflow
    mnist           the four IDX files in `data_dir`, plain or .gz
    cifar10         the published binary version in `data_dir`, plain or .gz
    imagenet64, imagenet32
                    ImageNet downsampled by Chrabaszcz et al. (arXiv 1707.08819): the .npz batches in `data_dir` (the
                    train split of 64 takes 16 GB of memory)
    imagenet64-2016, imagenet32-2016
                    ImageNet downsampled by van den Oord et al. (arXiv 1601.06759), on which most bits/dim are
                    published, those of TarFlow and Flow++ among them: `train_64x64/` and `valid_64x64/`, the folders of
                    PNG files that the tars hold, or `train_64x64.npz` and `valid_64x64.npz`, in `data_dir`. No labels
    folder          class sub-folders of images in `data_dir`, or in its `train` and `test` (or `val`), resized to
                    `image_size`; without such splits 5% are the test split, chosen by the hash of each image's name, so
                    that other images stay where they are when one is added
    hub:<id>        a Hugging Face dataset, cached in `data_dir`, resized to `image_size` where given

    An image of `folder` or of a hub is resized so that its shorter side has `image_size` pixels and the longer, in
    proportion, a whole number rounded down; the centre of that is cut out. That is what torchvision's `Resize` and
    `CenterCrop` do. `resize` is the filter, "lanczos", "bicubic", "bilinear" or "box", antialiased as Pillow's are; the
    published TarFlow takes "bilinear". Data of one size, all others, are never resized.

    Raises ValueError for a bad argument or a bad file, FileNotFoundError for a missing one.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    if image_size is not None and not 1 <= image_size <= math.isqrt(MAX_PIXELS):
        raise ValueError(f"image_size: expected 1 to {math.isqrt(MAX_PIXELS)}, got {image_size}")
    if resize not in RESIZE:
        raise ValueError(f"resize: expected one of {', '.join(RESIZE)}; got {resize!r}")
    if name.startswith("hub:") and name != "hub:":
        return _load_hub(name, split, data_dir, image_size, resize)
    if name != "folder" and name not in _READERS:
        raise ValueError(f"name: expected one of {', '.join(_READERS)}, folder, hub:<dataset id>; got {name!r}")
    if data_dir is None and name != "fashion-mnist":
        raise ValueError(f"data_dir: expected the folder that holds {name}, got None")
    if name == "folder":
        return _load_folder(split, Path(data_dir), image_size, resize)
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
            batch, failure = next(read), None
        except BaseException as error:
            failure = _without_readers(error)
        if failure is not None:
            del read
            raise failure
        yield tuple(batch)


def _without_readers(error: BaseException) -> BaseException:
    """What is to be raised for an error of a loader, without a traceback that would keep its processes alive."""
    if isinstance(error, RuntimeError) and "exited unexpectedly" in str(error):
        return ChildProcessError("a process that reads images was killed, maybe for want of memory")
    return error.with_traceback(None)


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
        with _reading(path, "a file of CIFAR-10"), _open(path) as file:
            records.append(np.frombuffer(file.read(10_001 * 3073), np.uint8))
        if not records[-1].size or records[-1].size % 3073 or records[-1].size > 10_000 * 3073:
            got = f"{records[-1].size} bytes" if records[-1].size % 3073 else f"{records[-1].size // 3073} or more"
            raise Unreadable(f"{path}: expected 1 to 10,000 records of 3073 bytes, got {got}")
    records = torch.from_numpy(np.concatenate(records)).view(-1, 3073)
    images, labels = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()
    return Images(images, labels, _CIFAR10, True, f"CIFAR-10, {len(labels):,} {split} images from {data_dir}")


def _load_imagenet(side: int, split: str, data_dir: Path) -> Images:
    """Arrays `data`, uint8 (n, 3 * side * side), and `labels`, 1 to 1000."""
    names = [f"train_data_batch_{number}.npz" for number in range(1, 11)]
    paths = _find_files(data_dir, names if split == "train" else ["val_data.npz"])
    labels = [_read_array(path, "labels") for path in paths]
    for path, part in zip(paths, labels, strict=True):
        if part.dtype.kind not in "iu" or part.ndim != 1:
            raise Unreadable(f"{path}: expected labels of integers (n,), got {part.dtype} {part.shape}")
    # Filled file by file: joining the arrays at the end would need the memory twice.
    images = torch.empty(sum(map(len, labels)), 3, side, side, dtype=torch.uint8)
    for path, part in zip(paths, images.split([*map(len, labels)]), strict=True):
        data, expected = _read_array(path, "data"), (len(part), 3 * side**2)
        if data.dtype != np.uint8 or data.shape != expected:
            raise Unreadable(f"{path}: expected data of uint8 {expected}, got {data.dtype} {data.shape}")
        part.copy_(torch.from_numpy(data).view_as(part))
    labels = torch.from_numpy(np.concatenate(labels).astype(np.int64) - 1)
    title = f"ImageNet {side}x{side} as released in 2017 (arXiv 1707.08819)"
    source = f"{title}, {len(labels):,} {split} images from {data_dir}"
    return Images(images, labels, tuple(map(str, range(1000))), True, source)


def _load_imagenet_2016(side: int, split: str, data_dir: Path) -> Images | Folder:
    """A PNG file an image, or one array `arr_0`, uint8 (n, side, side, 3) or (n, 3, side, side)."""
    folder = data_dir / f"{'train' if split == 'train' else 'valid'}_{side}x{side}"
    packed = folder.with_name(f"{folder.name}.npz")
    if folder.is_dir():
        paths = sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() == ".png")
        size = len(paths)
    elif packed.is_file():
        images = torch.from_numpy(_read_array(packed, "arr_0"))
        images = images.movedim(3, 1) if images.dim() == 4 and images.shape[3] == 3 else images
        size = len(images)
        if images.dtype != torch.uint8 or images.shape[1:] != (3, side, side):
            got = f"{images.dtype} {list(images.shape)}"
            raise Unreadable(f"{packed}: expected arr_0 of uint8 [n, {side}, {side}, 3], got {got}")
    else:
        raise FileNotFoundError(f"data_dir: expected {folder.name}/ or {packed.name} in {data_dir}, found neither")
    if not size:
        raise ValueError(f"data_dir: expected PNG files in {folder}, got none")
    title = f"ImageNet {side}x{side} as released in 2016 (arXiv 1601.06759)"
    source = f"{title}, {size:,} {split} images from {data_dir}"
    labels = torch.full((size,), -1)
    if folder.is_dir():
        return Folder(tuple(paths), labels, (), side, source, resize=None)
    return Images(images, labels, (), True, source)


def _load_folder(split: str, data_dir: Path, image_size: int | None, resize: str) -> Folder:
    if image_size is None:
        raise ValueError("image_size: expected the side to resize the folder's images to, got None")
    test = next((data_dir / name for name in ("test", "val") if (data_dir / name).is_dir()), None)
    train = data_dir / "train" if test and (data_dir / "train").is_dir() else data_dir
    files = _find_images(train)
    class_names = sorted({path.parent.name for path in files})
    if train == data_dir:
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
    return Folder(tuple(files), labels, tuple(class_names), image_size, source, resize=resize)


def _load_hub(name: str, split: str, cache_dir: str | Path | None, image_size: int | None, resize: str) -> Images:
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
    with _reading(name, "images"):
        images = [_pixels(row[image], mode, image_size, resize) for row in rows]
    if len({picture.shape for picture in images}) > 1:
        raise ValueError(f"image_size: expected the side to resize to, because the images of {name} differ in size")
    source, labels = f"{name}, {len(images):,} images of its split {key}", torch.tensor(rows[label][:])
    if image_size is not None:
        source += f", resized to {image_size} ({resize}) and centre-cropped"
    return Images(torch.stack(images), labels, tuple(rows.features[label].names), True, source)


def _read_idx(path: Path, dimensions: int) -> Tensor:
    begin = 4 + 4 * dimensions
    with _reading(path, "an IDX file"), _open(path) as file:
        header = file.read(begin)
        if len(header) < begin or header[:4] != bytes((0, 0, 8, dimensions)):
            got = repr(header[:4])
            raise Unreadable(f"{path}: expected an IDX header of {dimensions} dimension(s) of uint8, got {got}")
        shape = np.frombuffer(header, ">u4", dimensions, 4).tolist()
        _check_size(path, math.prod(shape))
        raw = file.read(math.prod(shape) + 1)
    if len(raw) != math.prod(shape):
        got = "more" if len(raw) > math.prod(shape) else len(raw)
        raise Unreadable(f"{path}: expected {math.prod(shape)} values, as its header says, got {got}")
    return torch.tensor(np.frombuffer(raw, np.uint8).reshape(shape))


def _read_array(path: Path, key: str) -> np.ndarray:
    with _reading(path, f"an .npz file with {key}"), path.open("rb") as file, np.load(file) as arrays:
        _check_size(path, arrays.zip.getinfo(f"{key}.npy").file_size)
        return arrays[key]


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _check_size(path: Path, size: int) -> None:
    """Unreadable where a file decompresses to far more than images do: such a file is made to fill the memory."""
    most = max(2**26, 100 * path.stat().st_size)
    if size > most:
        raise Unreadable(f"{path}: expected at most {most:,} bytes in a compressed file of its size, got {size:,}")


@contextmanager
def _reading(path: Path | str, what: str) -> Iterator[None]:
    """Unreadable, which names the file, for whatever its decoder throws: each has a list of its own, and adds to it."""
    try:
        yield
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"{path}: expected {what}, but reading it fails with {error!r}") from error


def _read_image(path: Path, size: int, resize: str | None) -> Tensor:
    with _reading(path, "an image"), warnings.catch_warnings():
        # Pillow warns from 89 million pixels on; MAX_PIXELS is below that.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if resize is None and image.size != (size, size):
                raise Unreadable(f"{path}: expected {size} x {size} pixels, got {image.width} x {image.height}")
            return _pixels(image, "RGB", size, resize or "lanczos")


def _pixels(image: Image.Image, mode: str, size: int | None, resize: str) -> Tensor:
    """uint8 (C, H, W)."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"expected at most {MAX_PIXELS:,} pixels, got {image.width} x {image.height}")
    # An "I" has 32 bits, of which a PNG or a PGM fills 16; the range of others is anyone's guess, as that of floats is.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"expected 8 or 16 bits a channel, got 32 (mode {image.mode} of Pillow)")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.uint32)
        if "transparency" in image.info:
            levels[levels == image.info["transparency"]] = 65535
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(seen, mask=seen)
    image = image.convert(mode)
    if size is not None:
        image = _centre(image, size, RESIZE[resize])
    return torch.tensor(np.atleast_3d(image)).permute(2, 0, 1)


def _centre(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Its shorter side resized to `size`, the longer in proportion, and the centre of that."""
    width, height = (size * side // min(image.size) for side in image.size)
    if width * height > MAX_PIXELS:
        raise ValueError(f"expected at most {MAX_PIXELS:,} pixels when resized, got {width} x {height}")
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), resample).crop((left, top, left + size, top + size))


def _find_files(folder: Path, names: list[str]) -> list[Path]:
    """Each plain or gzipped; FileNotFoundError lists those that are neither."""
    paths = [next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), name) for name in names]
    if missing := [path for path in paths if isinstance(path, str)]:
        raise FileNotFoundError(f"data_dir: expected {', '.join(names)} in {folder}, missing {', '.join(missing)}")
    return paths


def _find_images(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("[!.]*/[!.]*")) if path.suffix.lower() in IMAGE_SUFFIXES]


def _hold_out(names: Sequence[str], split: str) -> list[int]:
    """The indices of a split where the data has none of its own: one name in twenty, by its hash alone, is held out."""
    hashes = [int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) for name in names]
    most = max(2**64 // 20, min(hashes, default=0))  # one at least
    return [index for index, value in enumerate(hashes) if (value <= most) == (split == "test")]


_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_HASHED_BYTES, _HASHED_FILES = 2**28, 10_000
_READERS = {
    "fashion-mnist": _load_fashion_mnist,
    "mnist": partial(_load_idx, "MNIST", tuple("0123456789")),
    "cifar10": _load_cifar10,
    "imagenet32": partial(_load_imagenet, 32),
    "imagenet64": partial(_load_imagenet, 64),
    "imagenet32-2016": partial(_load_imagenet_2016, 32),
    "imagenet64-2016": partial(_load_imagenet_2016, 64),
}
