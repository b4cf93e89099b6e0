"""How processes share out the training of one model: its layers, its weights and its gradients.

Alone, without torchrun, everything here is what it is for one process.
"""

import contextlib
import functools
from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ..flowpp.networks import GatedBlock
from ..image_flow import ImageFlow
from ..processes import num_local_ranks, num_ranks, rank
from ..transformer import TransformerLayer

__all__ = [
    "Sharding",
    "broadcast_weights",
    "clip_gradients",
    "gather_weights",
    "hand_over",
    "layers_of",
    "local",
    "make_mesh",
    "mean",
    "num_ranks",
    "rank",
    "rework_layers",
    "shard_like",
    "share",
    "synchronized",
]

Sharding = Literal["none", "full", "hybrid"]


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
