"""Files that are written whole or not at all: beside, flushed to the disk, renamed; and files of others, read."""

import contextlib
import errno
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["atomic_write", "locked", "name_full_disk", "read_state", "remove_abandoned"]


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; it takes the place of ``path`` when the block ends without an error.

    On an error the half-written file is removed and what was at ``path`` stays.

    Raises:
        OSError: the file cannot be written; where the disk is full the message says so and what is safe.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with name_full_disk(path):
            yield beside
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within the block no other process is in one of the same lock file; wait for that, where the system has locks."""
    with path.open("a") as file:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def name_full_disk(path: Path) -> Iterator[None]:
    """Within the block, make an error of a full disk say what was to be written, and that nothing is lost."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full or error.strerror != os.strerror(error.errno or 0):  # else the error has a message of its own
            raise
        raise OSError(error.errno, f"no space left to write {path}; what was there before is unchanged") from error


def read_state(path: Path | str) -> Any:
    """Read what ``torch.save`` has written to a file, to the CPU; run no code in it, and verify its checksums.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, compressed, or holds more than tensors, numbers and names.
    """
    if Path(path).exists() and not Path(path).is_file():  # a device may have no end
        raise ValueError("it is no file")
    try:
        if zipfile.is_zipfile(path):  # files from before PyTorch 1.6 are none
            _check_zip(path)
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:  # its message tells how to run code from the file
        raise ValueError("it is damaged, or holds more than tensors, numbers and names") from error
    except Exception as error:  # the unpickler throws anything at a damaged file, from KeyError to struct.error
        raise ValueError(str(error).partition("\n")[0]) from error


def _check_zip(path: Path | str) -> None:
    """Raise ValueError where an archive has wrong checksums, which torch.load ignores, or is compressed."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"expected stored records; got a compressed one, {record.filename}")
        if damaged := archive.testzip():
            raise ValueError(f"wrong checksum of {damaged}")


def remove_abandoned(folder: Path) -> None:
    """Remove the half-written files that processes which no longer run have left in a folder."""
    if os.name != "posix":  # elsewhere, os.kill may end a process
        return
    for path in folder.glob(".*.*"):
        found = re.fullmatch(r"\..+\.(?:json|jsonl|npz|png|pt|safetensors)\.(\d{1,9})", path.name)
        if found and not _is_another(int(found[1])):
            path.unlink(missing_ok=True)


def _is_another(process: int) -> bool:
    """Return whether there is such a process, other than this one: in a container the same number comes again."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()
