"""Reasons for a run to end early: signals, too little memory, errors of other threads, divergence."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import torch

__all__ = ["TrainingDiverged", "is_out_of_memory", "name_memory_errors", "raise_thread_errors_once", "stop_signals"]


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or a gradient that was not finite."""


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block, note SIGINT and SIGTERM for the loop to stop at; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, frame) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt("interrupted at once")
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be allocated; PyTorch has an error of its own for that on an accelerator alone."""
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return True
    return isinstance(error, MemoryError | torch.OutOfMemoryError)


@contextlib.contextmanager
def name_memory_errors(batch_size: int) -> Iterator[None]:
    """Within the block, raise ValueError, one line, in place of PyTorch's error where memory does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"batch_size: expected steps that fit in memory; {batch_size} images of this model do not"
        ) from error


@contextlib.contextmanager
def raise_thread_errors_once() -> Iterator[None]:
    """Within the block no thread prints an error of writing: TensorBoard raises it in the main thread, too."""
    previous = threading.excepthook
    threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else previous(args)
    try:
        yield
    finally:
        threading.excepthook = previous
