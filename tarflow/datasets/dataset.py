"""The two kinds of datasets, in memory and on the disk, and which data they are."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .formats import read_image

__all__ = ["ImageDataset", "ImageFolder", "evenly_spaced", "fingerprint"]


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A dataset of images in memory, or of a file that is mapped into it.

    Args:
        images: uint8 (N, C, S, S); float32 of latents.
        labels: int64 (N,), each in 0 .. num_classes - 1, or all -1 where there are no classes.
        class_names: one a class; none for data without classes.
        flip: whether a mirrored image means the same.
        source: a sentence that says which data this is.
        prefixes: of latents the embeddings of no text and of the name of each class, ``(1 + num_classes, L, E)``.
        encoders: what made the latents: ``autoencoder``, ``text_encoder`` and ``text_length``.

    Raises:
        ValueError: the images and labels are of other shapes or types, or a label is out of range.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    flip: bool
    source: str
    prefixes: Tensor | None = None
    encoders: dict[str, Any] | None = None

    def __post_init__(self):
        images, labels, shape = self.images, self.labels, list(self.images.shape)
        if images.dtype not in (torch.uint8, torch.float32) or len(shape) != 4 or 0 in shape or shape[2] != shape[3]:
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

    def get_batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images, uint8 (B, C, S, S), and labels, int64 (B,), at ``indices``, int64 (B,)."""
        return self.images[indices], self.labels[indices]


@dataclass(frozen=True, eq=False)
class ImageFolder(Dataset):
    """A dataset of image files, which are read as RGB whenever a batch asks for them.

    Args:
        paths: N files.
        labels, class_names, flip, source: as in :class:`ImageDataset`.
        image_size: side of the squares that images are resized and cropped to, see :func:`tarflow.datasets.load`.
        resize: the filter; None where the files are of that size already.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    class_names: tuple[str, ...]
    image_size: int
    source: str
    flip: bool = True
    in_channels: int = 3
    resize: str | None = "lanczos"
    prefixes: None = None
    encoders: None = None

    num_classes = property(lambda self: len(self.class_names))

    def __len__(self) -> int:
        return len(self.labels)

    def get_batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Read the images, uint8 (B, 3, S, S), and labels, int64 (B,), at ``indices``; Unreadable names a bad file."""
        images = torch.empty(len(indices), self.in_channels, self.image_size, self.image_size, dtype=torch.uint8)
        for slot, index in zip(images, indices.tolist(), strict=True):
            slot.copy_(read_image(self.paths[index], self.image_size, self.resize))
        return images, self.labels[indices]

    __getitem__ = get_batch  # what DataLoader calls


def evenly_spaced(total: int, num: int) -> Tensor:
    """Return at most ``num`` indices, evenly spaced over ``total``, int64.

    >>> evenly_spaced(10, 4)
    tensor([0, 2, 5, 7])
    """
    num = min(num, total)
    return torch.arange(num) * total // num


def fingerprint(dataset: ImageDataset | ImageFolder, max_bytes: int = 2**28, max_files: int = 10_000) -> dict[str, Any]:
    """Tell which data this is, wherever it lies, at a cost that is bounded for any dataset.

    Args:
        dataset: the data.
        max_bytes: the most pixels of an ImageDataset to look at: of more, at every second, third, ... image alone.
        max_files: the most files of an ImageFolder whose sizes to look at, likewise.

    Returns:
        ``source``, the number of ``images`` and of ``classes``, and ``digest``, a SHA-256 of the names of the classes,
        all labels, and the pixels of an ImageDataset, or the names (class/file) and sizes of an ImageFolder's files.
    """
    sha = hashlib.sha256(json.dumps(dataset.class_names).encode())
    sha.update(dataset.labels.numpy().data)
    if isinstance(dataset, ImageDataset):
        sha.update(json.dumps(list(dataset.images.shape)).encode())
        for part in dataset.images[:: -(-dataset.images.numel() // max_bytes)].split(1024):
            sha.update(part.contiguous().numpy().data)
    else:
        names = [f"{path.parent.name}/{path.name}" for path in dataset.paths]
        sizes = [path.stat().st_size for path in dataset.paths[:: -(-len(dataset) // max_files)]]
        sha.update(json.dumps([names, sizes]).encode())
    counts = {"images": len(dataset), "classes": dataset.num_classes}
    return {"source": dataset.source, **counts, "digest": sha.hexdigest()}
