"""Checkpoints of a training run: written beside and renamed, the last few kept, refused when damaged."""

import re
from pathlib import Path
from typing import IO, Any, cast

import torch

from ..files import atomic_write, read_state

__all__ = ["checkpoints", "load_latest", "rotate", "save", "step_of"]


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``step-<step>.pt``."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / f"step-{step:08d}.pt") as beside, beside.open("wb") as file:
        _dump(state, file)


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep``."""
    for old in checkpoints(folder)[:-keep]:
        old.unlink()


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The state in the newest checkpoint, on the CPU; None for a run that was stopped before its first.

    Raises:
        ValueError: the checkpoint is truncated or corrupt; the message names the one before it.
    """
    paths = checkpoints(folder)
    if not paths:
        return None
    try:
        return read_state(paths[-1])
    except ValueError as error:
        before = f"delete it to go on from {paths[-2].name}" if len(paths) > 1 else "there is none before it"
        raise ValueError(f"resume: {paths[-1]} is truncated or corrupt; {before}") from error


def checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints, oldest first; copies under other names are not among them."""
    return sorted((path for path in folder.glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint was written at."""
    return int(path.stem.removeprefix("step-"))


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
