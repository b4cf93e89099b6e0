"""The processes that train one model, started by torchrun: what they agree on, and how they share out its weights.

Alone, without torchrun, everything here is what it is for one process. Two groups connect several: PyTorch's default
one, over which gradients go, and one on CPUs, over which they agree. There a process may wait for the first, the main
one, for as long as that scores, draws and writes.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from .. import hardware
from ..flowpp.networks import GatedBlock
from ..image_flow import ImageFlow
from ..transformer import TransformerLayer

__all__ = [
    "Sharding",
    "anywhere",
    "broadcast_weights",
    "by_main",
    "check_same",
    "clip_gradients",
    "connected",
    "control_group",
    "gather_weights",
    "hand_over",
    "is_main",
    "is_restartable",
    "layers_of",
    "local",
    "make_mesh",
    "mean",
    "num_local_ranks",
    "num_ranks",
    "num_readers",
    "of_main",
    "pick_device",
    "rank",
    "rework_layers",
    "shard_like",
    "share",
    "synchronized",
    "together",
]

Sharding = Literal["none", "full", "hybrid"]
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
        ValueError: see :func:`pick_device`.
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


def mean(tensor: Tensor) -> Tensor:
    """The mean of the tensors of all processes, on the device."""
    if num_ranks() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        tensor /= num_ranks()
    return tensor


def broadcast_weights(model: nn.Module) -> None:
    """Give all processes the weights of the main one."""
    if num_ranks() > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers that are checkpointed, compiled and sharded one by one."""
    return [module for module in model.modules() if isinstance(module, TransformerLayer | GatedBlock)]


def rework_layers(model: nn.Module, activation_checkpointing: bool, compiled: bool) -> None:
    """Have the layers compute their activations anew in the backward pass, and compile each."""
    for layer in layers_of(model):
        if activation_checkpointing:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        if compiled:
            layer.forward = torch.compile(layer.forward, fullgraph=True)


def make_mesh(sharding: Sharding, device: torch.device, model: nn.Module) -> DeviceMesh | None:
    """The mesh of all devices that weights are sharded over: all of them, or replicas of those of a machine.

    Raises:
        ValueError: there is one process, or one machine to replicate on, or the model is too small.
    """
    if sharding == "none":
        return None
    if num_ranks() == 1:
        raise ValueError(f"sharding: expected none for a single process; got {sharding}; start several by torchrun")
    shards = num_ranks() if sharding == "full" else num_local_ranks()
    if sharding == "hybrid" and shards in (1, num_ranks()):
        raise ValueError("sharding: expected full; hybrid shards within machines of several devices, one of many")
    rows = min(max(len(weight) for weight in layer.parameters()) for layer in layers_of(model))
    if rows < shards:
        raise ValueError(f"sharding: expected layers of at least {shards} rows, a row for each device; got {rows}")
    if sharding == "full":
        return init_device_mesh(device.type, (shards,))
    return init_device_mesh(device.type, (num_ranks() // shards, shards), mesh_dim_names=("replicate", "shard"))


def share(objective: nn.Module, mesh: DeviceMesh | None, low_precision: bool = False) -> nn.Module:
    """Share a module out by its weights, over a mesh, or by its gradients alone; returns what is to be called."""
    if mesh is None:
        if num_ranks() == 1:
            return objective
        return DistributedDataParallel(objective, gradient_as_bucket_view=True)
    full, low = MixedPrecisionPolicy(), MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in layers_of(objective):
        # Flow++ under autocast does not run in low precision as a whole.
        policy = low if low_precision and isinstance(layer, TransformerLayer) else full
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh)
    return objective


def synchronized(objective: Any, is_last: bool) -> contextlib.AbstractContextManager:
    """Add up the gradients of all processes in the last of several backward passes alone, where they are whole.

    Sharded ones are added up in each: whole ones would take the memory that sharding is to save.
    """
    has_whole = isinstance(objective, DistributedDataParallel) and not is_last
    return objective.no_sync() if has_whole else contextlib.nullcontext()


def local(tensor: Tensor) -> Tensor:
    """The shard of a tensor that this process has; the tensor itself, if it is not sharded."""
    return cast(DTensor, tensor.detach()).to_local() if isinstance(tensor, DTensor) else tensor


def hand_over(parameters: Iterable[Tensor], weights: Iterable[Tensor]) -> None:
    """Give weights, which stand for parameters in an optimizer, the shards of these and of their gradients.

    They are looked up at every step: FSDP may move a shard that is smaller than the others.
    """
    for parameter, weight in zip(parameters, weights, strict=True):
        if weight is not parameter:
            weight.data = local(parameter)
            weight.grad = None if parameter.grad is None else local(parameter.grad)


def shard_like(tensor: Tensor, other: Tensor, *, whole: bool) -> Tensor:
    """Make a tensor, the whole or this process's shard, one that is sharded like another, if that is."""
    if not isinstance(other, DTensor):
        return tensor
    if whole:
        return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
    layout: dict[str, Any] = {"shape": other.shape, "stride": other.stride()}  # a shard's own do not tell
    return DTensor.from_local(tensor, other.device_mesh, other.placements, run_check=False, **layout)


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the norm of all gradients, sharded or not; returns the norm."""
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in parameters if weight.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def gather_weights(model: ImageFlow) -> ImageFlow:
    """The model with the weights of all shards, in every process; the model itself, if it is not sharded.

    Its buffers are those of the model.
    """
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return model
    with torch.device("meta"):
        whole = type(model)(model.config)
    gathered = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}
    whole.load_state_dict(gathered, assign=True)
    return whole.requires_grad_(False).eval()
