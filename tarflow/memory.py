"""How much memory a model needs, from its shapes, and how many samples fit into what a device has."""

import os
import sys
from typing import Protocol

import torch


class Shapes(Protocol):
    """What the estimates need to know of a model; :class:`tarflow.TarFlowConfig` has it."""

    num_tokens: int
    channels: int
    num_blocks: int
    layers_per_block: int
    expansion: int
    token_dim: int
    coupling: str
    num_mixtures: int


def training_bytes(per_sample: int, num_parameters: int, batch_size: int) -> int:
    """Weights, gradients, the two moments of Adam and the average of the weights, all float32, and activations."""
    return 5 * 4 * num_parameters + batch_size * per_sample


def activation_bytes(shapes: Shapes, itemsize: int = 4) -> int:
    """What autograd keeps of one sample: per layer two norms' inputs and outputs, qkv, attention, the MLP twice.

    And per block the parameters of its mixtures, and about as much of what their map is made of.
    """
    per_token = (4 + 3 + 1 + 2 * shapes.expansion) * shapes.channels * itemsize
    layers = shapes.layers_per_block * shapes.num_tokens * per_token
    return shapes.num_blocks * (layers + 2 * _mixture_bytes(shapes))


def decoding_bytes(shapes: Shapes, branches: int = 1, itemsize: int = 4) -> int:
    """The key-value cache of one sample in the block being decoded, and a layer's activations of all its tokens.

    Or the parameters of their mixtures, of each branch and guided, and what solving for the tokens keeps at hand.
    """
    cached = 2 * shapes.layers_per_block
    active = 3 + 2 * shapes.expansion + 6  # qkv, the MLP before and after its GELU, residuals and norms
    layers = branches * shapes.num_tokens * shapes.channels * (cached + active) * itemsize
    solving = 7  # exponentials, sums and their products, in stock operators, over the parameters
    return layers + (branches + 1 + solving) * _mixture_bytes(shapes)


def _mixture_bytes(shapes: Shapes) -> int:
    """The float32 logits, means and log-scales for every value of a sample."""
    if shapes.coupling != "mixture":
        return 0
    return 4 * shapes.num_tokens * shapes.token_dim * 3 * shapes.num_mixtures


def check(needed: int, device: torch.device, what: str) -> None:
    """ValueError where something would take more memory than the device has at all."""
    total = total_bytes(device)
    if needed > total:
        raise ValueError(
            f"memory: expected {what} to take at most {total / 2**30:.1f} GiB, which is all that {device} has; "
            f"got about {needed / 2**30:.1f} GiB"
        )


def chunk_size(bytes_per_sample: int, device: torch.device) -> int:
    """How many samples may be in flight if they are to take half of the memory that is free."""
    return max(1, free_bytes(device) // 2 // bytes_per_sample)


def free_bytes(device: torch.device) -> int:
    """Free memory of the device; for a system that does not tell, four gibibytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


def total_bytes(device: torch.device) -> int:
    """Memory of the device, free or not; for a system that does not tell, more than there is anywhere."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize
