"""Reads IDX files, .npz arrays and images that anyone may have made: a bad one is one error, which names the file.

A file may be damaged, or be made to fill the memory: sizes are checked before anything is decoded.
"""

import gzip
import hashlib
import math
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..files import atomic_write, locked

__all__ = [
    "RESIZE",
    "Resize",
    "Unreadable",
    "array_shape",
    "map_arrays",
    "open_decompressed",
    "opened_image",
    "read_array",
    "read_idx",
    "read_image",
    "reading",
    "to_tensor",
]

# Pillow knows of many more formats, and hands some of them on to other programs.
IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
Resize = Literal["lanczos", "bicubic", "bilinear", "box"]
RESIZE: dict[str, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}
# An image of a few hundred bytes can claim a size that fills the memory. This many pixels take 200 MB.
MAX_PIXELS = 50_000_000


class Unreadable(ValueError):
    """A file that cannot be read; the message, one line, names it.

    A DataLoader raises the error of a worker again, with the worker's traceback in front of the message; ``str`` cuts
    that off.
    """

    def __str__(self) -> str:
        return super().__str__().rpartition(f"{__name__}.{type(self).__name__}: ")[2].rstrip("\n")


@contextmanager
def reading(path: Path | str, what: str) -> Iterator[None]:
    """Turn every error of the block into Unreadable: which errors a decoder raises for damaged files has no end."""
    try:
        yield
    except Unreadable:
        raise
    except Exception as error:
        raise Unreadable(f"{path}: expected {what}, but reading it fails with {error!r}") from error


def open_decompressed(path: Path) -> BufferedIOBase:
    """Open a file for reading; one whose name ends in .gz is decompressed."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read an IDX file of uint8, the format of MNIST; Unreadable where it has other dimensions or another size."""
    begin = 4 + 4 * dimensions
    with reading(path, "an IDX file"), open_decompressed(path) as file:
        header = file.read(begin)
        if len(header) < begin or header[:4] != bytes((0, 0, 8, dimensions)):
            got = repr(header[:4])
            raise Unreadable(f"{path}: expected an IDX header of {dimensions} dimension(s) of uint8, got {got}")
        shape = np.frombuffer(header, ">u4", dimensions, 4).tolist()
        _check_size(path, math.prod(shape))
        raw = file.read(math.prod(shape) + 1)
    if len(raw) != math.prod(shape):
        found = "more" if len(raw) > math.prod(shape) else str(len(raw))
        raise Unreadable(f"{path}: expected {math.prod(shape)} values, as its header says, got {found}")
    return torch.tensor(np.frombuffer(raw, np.uint8).reshape(shape))


def read_array(path: Path, key: str) -> np.ndarray:
    """Read one array of an .npz file."""
    with reading(path, f"an .npz file with {key}"), path.open("rb") as file, np.load(file) as arrays:
        _check_size(path, arrays.zip.getinfo(f"{key}.npy").file_size)
        return arrays[key]


def array_shape(path: Path, key: str) -> tuple[int, ...]:
    """Read the shape of an array of uint8 in an .npz file, and nothing else of it."""
    with _open_array(path, key) as (_, (shape, in_columns, dtype)):
        if dtype != np.uint8 or in_columns:
            raise Unreadable(f"{path}: expected {key} of uint8, row by row, got {dtype} {shape}")
        return shape


def map_arrays(paths: list[Path], key: str, shape: tuple[int, ...], name: str) -> Tensor:
    """Map arrays of several .npz files as one tensor of uint8, whose pages all processes of a machine share.

    What is packed cannot be mapped: so the rows of all are written, once, to an .npy file beside them or, where nothing
    can be written to that folder, in one of the user among the temporary files. It is written anew when an .npz file is
    newer.

    Args:
        paths: the .npz files.
        key: the name of the array.
        shape: that of the tensor; the arrays have as many numbers in all.
        name: name of the .npy file.

    Raises:
        Unreadable: a file is damaged.
        OSError: there is no space.
    """
    folder = paths[0].parent.absolute()
    out = folder / name
    if not _is_unpacked(out, paths, shape):
        if not os.access(folder, os.W_OK):
            digest = hashlib.sha256(os.fsencode(folder)).hexdigest()
            out = _own_temporary_folder() / f"{digest[:16]}-{name}"
        with locked(out.with_name(f".{out.name}.lock")):
            if not _is_unpacked(out, paths, shape):
                _unpack(paths, key, shape, out)
    return torch.from_numpy(np.load(out, mmap_mode="c"))  # of "r" PyTorch warns that it could be written to


def _unpack(paths: list[Path], key: str, shape: tuple[int, ...], out: Path) -> None:
    for abandoned in out.parent.glob(f".{out.name}.[0-9]*"):
        abandoned.unlink()
    with atomic_write(out) as beside, beside.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for path in paths:
            file.writelines(_blocks(path, key))


def _own_temporary_folder() -> Path:
    """Make a folder among the temporary files that nobody but this user can write to."""
    user = os.getuid()
    folder = Path(tempfile.gettempdir()) / f"tarflow-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != user:
        raise PermissionError(f"{folder}: expected a folder of the user {user}; it belongs to another")
    return folder


def _is_unpacked(out: Path, paths: list[Path], shape: tuple[int, ...]) -> bool:
    if not out.exists() or any(path.stat().st_mtime >= out.stat().st_mtime for path in paths):
        return False
    with reading(out, "an .npy file; delete it"):
        return np.load(out, mmap_mode="r").shape == shape


def _blocks(path: Path, key: str) -> Iterator[bytes]:
    """Yield the numbers of an array, a mebibyte at a time."""
    with _open_array(path, key) as (file, _):
        while block := file.read(2**20):
            yield block


@contextmanager
def _open_array(path: Path, key: str) -> Iterator[tuple[IO[bytes], tuple[tuple[int, ...], bool, np.dtype]]]:
    """Open an array of an .npz file: its numbers, as bytes, and their shape, order and dtype."""
    what = f"an .npz file with {key}"
    with reading(path, what), zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
        _check_size(path, archive.getinfo(f"{key}.npy").file_size)
        is_first = np.lib.format.read_magic(file) == (1, 0)
        read_header = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
        yield file, read_header(file)


def _check_size(path: Path, size: int) -> None:
    """Unreadable where a file decompresses to far more than images do: such a file is made to fill the memory."""
    most = max(2**26, 100 * path.stat().st_size)
    if size > most:
        raise Unreadable(f"{path}: expected at most {most:,} bytes in a compressed file of its size, got {size:,}")


def read_image(path: Path, size: int, resize: str | None) -> Tensor:
    """Read an image as RGB, uint8 (3, size, size), see :func:`to_tensor`; where resize is None, it has that size."""
    with opened_image(path) as image:
        if resize is None and image.size != (size, size):
            raise Unreadable(f"{path}: expected {size} x {size} pixels, got {image.width} x {image.height}")
        return to_tensor(image, "RGB", size, resize or "lanczos")


@contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    """Open an image that anyone may have made, for :func:`to_tensor`; every error of the block is Unreadable."""
    with reading(path, "an image"), warnings.catch_warnings():
        # Pillow warns from 89 million pixels on; MAX_PIXELS is below that.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            yield image


def to_tensor(image: Image.Image, mode: str, size: int | None, resize: str) -> Tensor:
    """Convert an image to uint8 (C, H, W), C 1 for mode "L" and 3 for "RGB".

    Unless size is None, the image is resized and cropped to a square of that side. 16-bit grey levels are scaled to
    8 bits, and what is transparent lies on white. ValueError for more than MAX_PIXELS pixels, or 32 bits a channel.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"expected at most {MAX_PIXELS:,} pixels, got {image.width} x {image.height}")
    # Mode "I" has 32 bits, of which a PNG or a PGM fills 16. Nothing says which range other files use, nor do floats.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"expected 8 or 16 bits a channel, got 32 (mode {image.mode} of Pillow)")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.uint32)
        if "transparency" in image.info:
            levels[levels == image.info["transparency"]] = 65535
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(layer, mask=layer)
    image = image.convert(mode)
    if size is not None:
        image = _resize_and_crop(image, size, RESIZE[resize])
    return torch.tensor(np.atleast_3d(np.asarray(image))).permute(2, 0, 1)


def _resize_and_crop(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Resize the shorter side to ``size`` and the longer in proportion, and cut out the centre."""
    width, height = (size * side // min(image.size) for side in image.size)
    if width * height > MAX_PIXELS:
        raise ValueError(f"expected at most {MAX_PIXELS:,} pixels when resized, got {width} x {height}")
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), resample).crop((left, top, left + size, top + size))
