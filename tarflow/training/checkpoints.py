"""Checkpoints of a training run: written beside and renamed, the last few kept, refused when damaged.

A state is a file, ``step-<step>.pt``; where weights are sharded it is a folder, ``step-<step>``, to which each process
writes its shards by torch.distributed.checkpoint. Either is read under any sharding, by any number of processes. The
folder holds a pickle of PyTorch's: read none from strangers.
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from .. import processes
from ..files import atomic_write, read_state
from . import parallel

__all__ = ["checkpoints", "load_latest", "remove_abandoned", "rotate", "save", "step_of"]


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``step-<step>.pt``, or, of a sharded state, ``step-<step>``, to which all processes write.

    Raises:
        OSError: it could not be written; those that were there before are intact.
    """
    if any(isinstance(part, DTensor) for _, part in _flat(state)):
        _save_sharded(folder / f"step-{step:08d}", state)
    elif processes.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / f"step-{step:08d}.pt") as beside, beside.open("wb") as file:
            _dump(state, file)


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep``."""
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def remove_abandoned(folder: Path) -> None:
    """Remove the folders that processes were writing when they ended."""
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path)


def load_latest(folder: Path, like: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The state in the newest checkpoint; None for a run that was stopped before its first.

    Args:
        folder: that of the checkpoints.
        like: a state; what is sharded in it is sharded like it in the one that is read, and all else is on the CPU.

    Raises:
        ValueError: the checkpoint is truncated or corrupt; the message names the one before it.
    """
    paths = checkpoints(folder)
    if not paths:
        return None
    try:
        return _load_sharded(paths[-1], like or {}) if paths[-1].is_dir() else _shard(read_state(paths[-1]), like)
    except ValueError as error:
        before = f"delete it to go on from {paths[-2].name}" if len(paths) > 1 else "there is none before it"
        raise ValueError(f"resume: {paths[-1]} is truncated or corrupt; {before}") from error


def checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints, oldest first; copies under other names are not among them."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+(\.pt)?", path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint was written at."""
    return int(path.stem.removeprefix("step-"))


def _flat(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the parts of a state by their paths, such as ``optimizer/state/0/step``; a list is one part, as JSON."""
    if not isinstance(state, dict):
        yield name, json.dumps(state) if isinstance(state, list) else state
        return
    for key, part in state.items():
        yield from _flat(part, f"{name}/{key}" if name else str(key))


def _nested(parts: dict[str, Any]) -> dict[str, Any]:
    """Make a state of parts by their paths."""
    state: dict[Any, Any] = {}
    for path, part in parts.items():
        *above, last = (int(key) if key.isdigit() else key for key in path.split("/"))
        inner = state
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(part) if isinstance(part, str) else part
    return state


def _save_sharded(path: Path, state: dict[str, Any]) -> None:
    if processes.anywhere(path.exists()):  # a run that goes on from a step and ends at it
        return
    beside = path.with_name(f"{path.name}.tmp")
    try:
        dcp.save(dict(_flat(state)), checkpoint_id=beside, process_group=processes.control_group())
    except CheckpointException as error:  # which all processes raise
        processes.by_main(lambda: shutil.rmtree(beside, ignore_errors=True))
        raise OSError(f"{_reason(error)} while writing {path}; what was there before is unchanged") from error
    processes.by_main(lambda: beside.rename(path))


def _load_sharded(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    """Read each shard where it is needed, and whole what is sharded no more."""
    shards = {name: part for name, part in _flat(like) if isinstance(part, DTensor)}
    parts: dict[str, Any] = {}
    try:
        stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        for name, kind in stored.items():
            if name in shards:
                parts[name] = torch.empty_like(shards[name])
            elif isinstance(kind, TensorStorageMetadata):
                parts[name] = torch.empty(kind.size, dtype=kind.properties.dtype)
            else:
                parts[name] = None
        is_alone = processes.num_ranks() == 1
        group = None if is_alone else processes.control_group()
        with warnings.catch_warnings(action="ignore"):  # that a process is alone
            dcp.load(parts, checkpoint_id=path, process_group=group, no_dist=is_alone)
    except CheckpointException as error:
        raise ValueError(_reason(error)) from error
    except Exception as error:  # the unpickler throws anything at a damaged file
        raise ValueError(str(error).partition("\n")[0]) from error
    return _nested(parts)


def _reason(error: CheckpointException) -> str:
    """The first line of the first failure."""
    number, (failure, _) = min(error.failures.items())
    return f"{str(failure).partition(chr(10))[0]} (process {number})"


def _shard(state: Any, like: Any) -> Any:
    """Shard whole tensors as those of another state are, by their names; other parts stay."""
    if isinstance(state, dict) and isinstance(like, dict):
        return {key: _shard(part, like.get(key)) for key, part in state.items()}
    if isinstance(state, Tensor) and isinstance(like, DTensor) and state.shape == like.shape:
        return parallel.shard_like(state, like, whole=True)
    return state


def _dump(state: dict[str, Any], file) -> None:
    """Call torch.save, which hides the reason why a write fails behind an error of its own, and raise that reason."""
    failure: list[OSError] = []

    class Writer:
        def write(self, data) -> int:
            try:
                return file.write(data)
            except OSError as error:
                failure.append(error)
                raise

        def flush(self) -> None:
            file.flush()

    try:
        torch.save(state, cast(IO[bytes], Writer()))
    except Exception as error:
        raise failure[0] if failure else error from None
