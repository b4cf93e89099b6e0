"""The folder of a run: who trains in it, its settings, and the record of the data that it was begun with.

It holds ``config.json``, ``model.safetensors`` (the averaged weights), ``calibration.json`` (the times of the
decoders), ``metrics.jsonl``, ``samples.png``, ``trajectory.png``, ``curves.png``, ``checkpoints/``, the events of
TensorBoard and ``.lock``.
"""

import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import datasets
from ..compatibility import current_settings
from ..datasets import ImageDataset, ImageFolder
from ..pretrained import read_config
from . import checkpoints
from .config import DataConfig, TrainConfig

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "check_same_data",
    "check_scored",
    "lock_folder",
    "new_folder",
    "read_data",
    "read_run",
    "refuse_taken",
]


def new_folder(parent: Path, name: str) -> Path:
    """Make ``parent/name``, or the first of ``name-2``, ... that is not taken, so that no other run gets it too."""
    folder, number = parent / name, 1
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            folder = parent / f"{name}-{number}"
        else:
            return folder


def refuse_taken(folder: Path) -> None:
    """Raise FileExistsError where a folder holds a model, or a run that has learned anything."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    if checkpoints.checkpoints(folder / "checkpoints") or (
        config.exists() and (weights.exists() or "train" not in read_config(folder))
    ):
        raise FileExistsError(f"out: {folder} already holds a run; choose another folder, or --resume it")


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other processes from training in it; if it stays empty it is removed.

    The lock is on a file in it and ends with the process, however that ends. A system without such locks takes none.

    Raises:
        BlockingIOError: another process trains in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("a") as file:
        try:
            # Not flock, whose locks are inherited: a reader outlives a trainer that is killed by some seconds.
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(f"out: another process trains in {folder}; choose another folder") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if [*folder.iterdir()] == [path]:
                    path.unlink()
                    folder.rmdir()


def read_run(folder: Path) -> TrainConfig:
    """The settings of a run, also of one of the last release.

    Raises:
        FileNotFoundError, ValueError: there is no run in the folder, or its settings are not what they should be.
    """
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"resume: expected the folder of a run; {path} does not exist")
    config = read_config(folder)
    if config.get("train") is None:
        raise ValueError(f"resume: {folder} holds a model without a training run")
    try:
        return TrainConfig.read(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: settings of another version of tarflow: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_data(folder: Path, metadata: dict[str, Any]) -> DataConfig:
    """The data of a run by its metadata, or the default; ValueError where they are not what they should be."""
    try:
        return DataConfig(**current_settings(metadata.get("train", {})).get("data", {}))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def check_same_data(folder: Path, recorded: dict[str, Any], data: dict[str, Any]) -> None:
    """Raise ValueError where a run was begun with other images than those it is to go on with."""
    for split, before in _checked(recorded).items():
        if before["digest"] != data[split]["digest"]:
            raise ValueError(
                f"data_dir: expected the {split} images that {folder} was begun with, {_named(before)}; "
                f"got {_named(data[split])}"
            )


def check_scored(recorded: dict[str, Any] | None, dataset: ImageDataset | ImageFolder, chosen: bool) -> None:
    """Check that test images may be scored: those of the data that a run was trained on, ``data`` in config.json.

    Others may be where the user has ``chosen`` them, with a warning on stderr: they may be training images all the
    same, as those of Fashion-MNIST's shipped subset are in the whole. Training images are always refused.

    Raises:
        ValueError: they may not.
    """
    if recorded is None or recorded == {}:  # a run from before this was recorded, or no run
        return
    data, scored = _checked(recorded), datasets.fingerprint(dataset)
    if scored["digest"] == data["train"]["digest"]:
        raise ValueError(f"dataset: expected other images than the run was trained on; got {_named(scored)}")
    if scored["digest"] == data["test"]["digest"]:
        return
    message = (
        f"expected the test images of the data that the run was trained on, {_named(data['test'])}; "
        f"got {_named(scored)}, some of which it may have been trained on"
    )
    if not chosen:
        raise ValueError(f"data_dir: {message}")
    print(f"warning: {message}", file=sys.stderr)


def _checked(recorded: dict[str, Any]) -> dict[str, Any]:
    """The recorded data, of no split or of both; ValueError where they are not what a run records."""
    kinds = {"source": str, "images": int, "classes": int, "digest": str}
    for split in ("train", "test") if recorded != {} else ():
        part = recorded.get(split) if isinstance(recorded, dict) else None
        if not isinstance(part, dict) or any(not isinstance(part.get(name), kind) for name, kind in kinds.items()):
            raise ValueError(f"config.json: data: expected {', '.join(kinds)} of the {split} images; got {part!r:.80}")
    return recorded


def _named(data: dict[str, Any]) -> str:
    """The words that tell data from other data, for a message."""
    return f"{data['source']} ({data['images']:,} in {data['classes']} classes, digest {data['digest'][:8]})"
