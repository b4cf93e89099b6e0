"""The processes that torchrun has started: who they are, and what they agree on.

Alone, without torchrun, everything here is what it is for one process. Two groups connect several: PyTorch's default
one, over which gradients go, and one on CPUs, over which they agree. There a process may wait for the first, the main
one, for as long as that scores, draws and writes.
"""

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

import tarflow_kernels

from . import hardware

__all__ = [
    "anywhere",
    "by_main",
    "check_same",
    "connected",
    "control_group",
    "in_turn",
    "is_main",
    "is_restartable",
    "num_local_ranks",
    "num_ranks",
    "num_readers",
    "of_main",
    "pick_device",
    "rank",
    "together",
    "total",
]

Made = TypeVar("Made")

START, WORK = timedelta(minutes=30), timedelta(days=7)
"""The longest that processes wait for the last one to begin, and for the main one to be done with what it does."""


def rank() -> int:
    """The number of this process among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def num_local_ranks() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def num_readers() -> int:
    """The number of processes that read images for this one: its share of the cores, at most 8."""
    return min(8, max(1, (os.cpu_count() or 1) // num_local_ranks()))


def is_main() -> bool:
    """Whether this is the process that logs, draws and writes."""
    return rank() == 0


def pick_device(name: str) -> torch.device:
    """The device of this process: that of the name, of which each process on a machine takes another.

    Raises:
        ValueError: there are fewer devices than processes, or the name is that of a single one.
    """
    device = hardware.pick_device(name)
    if device.type == "cpu" or not dist.is_torchelastic_launched():
        return device
    if device.index is not None:
        if num_local_ranks() > 1:
            raise ValueError(f"device: expected {device.type}, of which each process takes another; got {name}")
        return device
    if num_local_ranks() > (present := torch.accelerator.device_count()):
        raise ValueError(f"nproc-per-node: expected at most {present}, the devices here; got {num_local_ranks()}")
    return torch.device(device.type, int(os.environ["LOCAL_RANK"]))


def is_restartable() -> bool:
    """Whether torchrun starts all processes again when one is lost; not every machine is told when it has done so."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


@contextlib.contextmanager
def connected(device_name: str) -> Iterator[None]:
    """Within the block the processes that torchrun has started are connected, if they are not already.

    Raises:
        ValueError: see :func:`pick_device`; or the code of one is another.
        TimeoutError: some did not begin; the message names them.
    """
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        yield
        return
    device = pick_device(device_name)
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)
    store, number, count = next(dist.rendezvous("env://", timeout=START))
    store = _meet(store, number, count)
    device_id = None if device.index is None else device
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, device_id=device_id)
    try:
        check_same("code", _code())
        yield
    finally:
        control_group.cache_clear()
        dist.destroy_process_group()


def _meet(store: dist.Store, number: int, count: int) -> dist.Store:
    """Wait until all processes are there; returns a store that none has written to.

    The store of torchrun also holds what those wrote that it has started again since: one may find the name of the main
    process of that time, but only a living one answers.
    """
    name, deadline = uuid4().hex, time.monotonic() + START.total_seconds()
    if number == 0:
        store.set("main", name)
        others = {f"{name}/{other}": other for other in range(1, count)}
        try:
            store.wait([*others], START)
        except RuntimeError:
            missing = ", ".join(str(other) for key, other in others.items() if not store.check([key]))
            raise TimeoutError(
                f"torchrun: expected all {count} processes to begin within {START}; got none of number {missing}"
            ) from None
        for key in others:
            store.set(store.get(key).decode(), "here")
        return dist.PrefixStore(name, store)
    while time.monotonic() < deadline:
        with contextlib.suppress(RuntimeError):
            main = store.get("main").decode()
            store.set(f"{main}/{number}", name)
            store.wait([name], timedelta(seconds=1))
            return dist.PrefixStore(main, store)
    raise TimeoutError(f"torchrun: expected all {count} processes to begin within {START}; got no answer of number 0")


def _code() -> str:
    """A SHA-256 of the sources of both packages and of the version of PyTorch."""
    sha = hashlib.sha256(torch.__version__.encode())
    for folder in (Path(__file__).parent, Path(tarflow_kernels.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            sha.update(path.read_bytes())
    return sha.hexdigest()


@functools.cache
def control_group() -> dist.ProcessGroup:
    """The group on CPUs."""
    return dist.new_group(backend="gloo", timeout=WORK)


def anywhere(flag: bool) -> bool:
    """Whether the flag of any process is set."""
    if num_ranks() == 1:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX, control_group())
    return bool(flags)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Within the block each process does its part; an error of one, which its user could mend, is raised by all.

    Raises:
        ValueError: another process failed, which the message names.
    """
    failure = None
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if num_ranks() == 1:
            raise
        failure = error
    if anywhere(failure is not None):
        messages = _all_of(failure and str(failure))
        if failure is not None and is_main():
            raise failure
        where, message = next((where, message) for where, message in enumerate(messages) if message is not None)
        raise ValueError(f"{message} (process {where} of {num_ranks()})") from failure


def by_main(work: Callable[[], object]) -> None:
    """Do work in the main process, while the others wait for it."""
    with together():
        if is_main():
            work()


def of_main(make: Callable[[], Made]) -> Made:
    """Give all processes what the main one makes."""
    made: list[Made] = []
    by_main(lambda: made.append(make()))
    return _all_of(made)[0][0]


def check_same(name: str, value: str) -> None:
    """Raise ValueError where a value is not the same in all processes."""
    values = _all_of(value)
    for where, other in enumerate(values):
        if other != values[0]:
            raise ValueError(f"{name}: expected the same in all processes; process {where} has others than process 0")


def _all_of(value: Any) -> list[Any]:
    """The values of all processes."""
    values = [value] * num_ranks()
    if num_ranks() > 1:
        dist.all_gather_object(values, value, control_group())
    return values


def total(tensor: Tensor) -> Tensor:
    """The sum of the tensors of all processes, each on the CPU."""
    if num_ranks() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=control_group())
    return tensor


def in_turn(parts: list[Made]) -> list[Made]:
    """The parts of all processes, where process r made the parts r, r + num_ranks(), ... of a whole, in its order."""
    lists = _all_of(parts)
    return [lists[place % len(lists)][place // len(lists)] for place in range(sum(map(len, lists)))]
