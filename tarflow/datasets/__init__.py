"""Datasets of 8-bit images: the named ones, folders, Hugging Face hubs, and the batches that training draws from them.

:mod:`.dataset` has the two kinds of datasets, :mod:`.readers` the layout of each named one, :mod:`.formats` what reads
files that anyone may have made, and :mod:`.streaming` the batches.
"""

import math
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

from ..compatibility import renamed_attributes
from .dataset import ImageDataset, ImageFolder, evenly_spaced, fingerprint
from .formats import MAX_PIXELS, RESIZE, Resize, Unreadable
from .latents import read_latents
from .readers import READERS, SHIPPED_SUBSET, read_folder, read_hub
from .streaming import batches, read

__all__ = [
    "RESIZE",
    "ImageDataset",
    "ImageFolder",
    "Resize",
    "Unreadable",
    "batches",
    "evenly_spaced",
    "fingerprint",
    "load",
    "read",
]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def load(
    name: str = "fashion-mnist",
    split: str = "train",
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    resize: str = "lanczos",
) -> ImageDataset | ImageFolder:
    """Load the `split`, "train" or "test", of a dataset.

    fashion-mnist   the four IDX files in `data_dir`, else the Debian package's, else the subset shipped with tarflow
    mnist           the four IDX files in `data_dir`, plain or .gz
    cifar10         the published binary version in `data_dir`, plain or .gz
    imagenet64, imagenet32
                    ImageNet downsampled by Chrabaszcz et al. (arXiv 1707.08819): the .npz batches in `data_dir`
    imagenet64-2016, imagenet32-2016
                    ImageNet downsampled by van den Oord et al. (arXiv 1601.06759), on which most bits/dim are
                    published, those of TarFlow and Flow++ among them: `train_64x64/` and `valid_64x64/`, the folders of
                    PNG files that the tars hold, or `train_64x64.npz` and `valid_64x64.npz`, in `data_dir`. No labels
    folder          class sub-folders of images in `data_dir`, or in its `train` and `test` (or `val`), resized to
                    `image_size`; without such splits 5% are the test split, chosen by the hash of each image's name, so
                    that other images stay where they are when one is added
    latents         a folder that `tarflow encode` wrote, `data_dir`
    hub:<id>        a Hugging Face dataset, cached in `data_dir`, resized to `image_size` where given

    The .npz files of ImageNet are unpacked once, to an .npy file beside them or, where nothing can be written to that
    folder, in that of temporary files (the train split of 64 takes 16 GB of disk). It is mapped: all processes of a
    machine share the pages that they read, and a process needs no memory of its own for it.

    An image of `folder` or of a hub is resized so that its shorter side has `image_size` pixels and the longer, in
    proportion, a whole number rounded down; the centre of that is cut out. That is what torchvision's `Resize` and
    `CenterCrop` do. `resize` is the filter, "lanczos", "bicubic", "bilinear" or "box", antialiased as Pillow's are; the
    published TarFlow takes "bilinear". All other datasets have images of one size, which are never resized.

    Raises ValueError for a bad argument or a bad file, FileNotFoundError for a missing one.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    most = math.isqrt(MAX_PIXELS)
    if image_size is not None and not (isinstance(image_size, Integral) and 1 <= image_size <= most):
        raise ValueError(f"image_size: expected 1 to {most}, got {image_size}")
    if resize not in [*RESIZE]:
        raise ValueError(f"resize: expected one of {', '.join(RESIZE)}; got {resize!r}")
    if not isinstance(data_dir, str | Path | None):
        raise ValueError(f"data_dir: expected the folder that holds the files, or None; got {data_dir!r}")
    if not isinstance(name, str):
        raise ValueError(f"name: expected one of {', '.join(READERS)}, folder, hub:<dataset id>; got {name!r}")
    if name.startswith("hub:") and name != "hub:":
        return read_hub(name, split, data_dir, image_size, resize)
    if name not in ("folder", "latents", *READERS):
        raise ValueError(f"name: expected one of {', '.join(READERS)}, folder, latents, hub:<id>; got {name!r}")
    if data_dir is None and name != "fashion-mnist":
        raise ValueError(f"data_dir: expected the folder that holds {name}, got None")
    if data_dir is not None:
        folder = Path(data_dir)
    else:
        folder = DEBIAN_FASHION_MNIST if DEBIAN_FASHION_MNIST.is_dir() else SHIPPED_SUBSET
    if name == "folder":
        return read_folder(split, folder, image_size, resize)
    dataset = read_latents(split, folder) if name == "latents" else READERS[name](split, folder)
    if image_size not in (None, dataset.image_size):
        raise ValueError(f"image_size: expected None or {dataset.image_size} for {name}, got {image_size}")
    return dataset


if not TYPE_CHECKING:
    __getattr__ = renamed_attributes(globals(), Images="ImageDataset", Folder="ImageFolder")
