"""Endless batches in an order that a seed fixes; files are read ahead by processes of their own."""

import os
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .dataset import ImageDataset, ImageFolder

__all__ = ["batches", "read"]


def batches(
    dataset: ImageDataset | ImageFolder,
    batch_size: int,
    seed: int,
    start: int = 0,
    num_workers: int | None = None,
    rank: int = 0,
    num_ranks: int = 1,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield endless batches of (images, labels), shuffled anew each epoch, with no image twice in an epoch.

    The order of epoch e depends on (seed, e) alone. So a run that resumes at step n passes start=n and sees the batches
    that it would have seen. The len(dataset) % batch_size images left at the end of an epoch are dropped.

    Of several processes, rank r reads the places r, r + num_ranks, ... of each batch, which is that of a single one.

    Args:
        dataset: an ImageFolder is read ahead by other processes, which end when the generator is closed.
        batch_size: images in a batch.
        seed: seed of the order.
        start: number of the first batch.
        num_workers: number of these processes; by default one a core, at most 8.
        rank, num_ranks: which of how many processes this is, each of which reads its share of a batch.

    Raises:
        ValueError: an argument is out of range, or the batch has no equal shares.
        ChildProcessError: (from a batch) a process that reads was killed.
    """
    if not 1 <= batch_size <= len(dataset):
        raise ValueError(f"batch_size: expected 1 to {len(dataset)}, the size of the dataset, got {batch_size}")
    if seed < 0 or start < 0:
        raise ValueError(f"seed, start: expected at least 0, got {seed} and {start}")
    if not 0 <= rank < num_ranks or batch_size % num_ranks:
        raise ValueError(f"batch_size: expected a multiple of the {num_ranks} processes, got {batch_size}, rank {rank}")
    indices = (chosen[rank::num_ranks] for chosen in _batch_indices(len(dataset), batch_size, seed, start))
    return read(dataset, indices, num_workers)


def read(
    dataset: ImageDataset | ImageFolder, indices: Iterable[Tensor], num_workers: int | None = None
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield the batch (images, labels) of each of the ``indices``, int64 (B,); the rest is as in :func:`batches`."""
    if isinstance(dataset, ImageDataset):
        return (dataset.get_batch(chosen) for chosen in indices)
    loader = DataLoader(
        dataset,
        batch_size=None,  # each item of the sampler is a batch
        sampler=indices,
        num_workers=min(8, os.cpu_count() or 1) if num_workers is None else num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_prepare_reader,
        generator=torch.Generator(),  # the global one is the caller's
    )
    return _stream(loader)


def _batch_indices(size: int, batch_size: int, seed: int, start: int) -> Iterator[Tensor]:
    steps = size // batch_size
    epoch, step = divmod(start, steps)
    while True:
        order = np.random.default_rng(np.random.SeedSequence((seed, epoch))).permutation(size)
        yield from torch.from_numpy(order[: steps * batch_size]).view(steps, batch_size)[step:]
        epoch, step = epoch + 1, 0


def _stream(loader: DataLoader) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield the batches of a loader; its processes end with this generator, which holds the only reference to them.

    An error is raised outside of the ``except`` block, without its traceback, which would refer to the processes too.
    """
    with _no_child_signals():
        remaining = iter(loader)
    while True:
        try:
            batch, failure = next(remaining), None
        except StopIteration:
            return
        except BaseException as error:
            failure = ChildProcessError(_KILLED) if _is_from_a_killed_reader(error) else error.with_traceback(None)
        if failure is not None:
            del remaining
            raise failure
        yield tuple(batch)


_KILLED = "a process that reads images was killed, maybe for want of memory"


def _is_from_a_killed_reader(error: BaseException) -> bool:
    """Tell the error of a DataLoader that misses a reader, or of the pipe from a reader that died while it wrote."""
    missed = isinstance(error, RuntimeError) and "exited unexpectedly" in str(error)
    return missed or isinstance(error, ConnectionError | EOFError)


@contextmanager
def _no_child_signals() -> Iterator[None]:
    """Take back the signal handler that a DataLoader sets: it raises in whatever code runs when a reader dies.

    That may be half an update of the weights. Without the handler, the death is found when the next batch is due.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _prepare_reader(worker: int) -> None:
    """Let a reader outlive a stop signal by 30 seconds, and be silent about lost connections.

    Stopping is the trainer's work, but every process may get the signal. Not for ever, because multiprocessing sends
    SIGTERM to the readers that are left, and waits for them. A connection is lost where the trainer ends, perhaps since
    another reader was killed, while a thread of this one hands a batch over.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
    sys.excepthook = _pass_over_lost_connections


def _pass_over_lost_connections(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # One that ends in the midst of a message is an OSError without a kind of its own.
    if not issubclass(kind, OSError | EOFError | AuthenticationError):
        sys.__excepthook__(kind, error, trace)
