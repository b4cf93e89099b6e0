"""The operations of an image, the memory of a process, and the time for communication that training takes."""

import re

import torch

from ..image_flow import FlowConfig
from ..model import TarFlowConfig
from .config import TrainingConfig

__all__ = ["COLLECTIVE", "memory", "operations", "share_of_time", "training_operations"]

COLLECTIVE = "gloo:|ncclDevKernel"
"""The events of a profile that are collectives: those of gloo on the host, of NCCL on the device."""


def operations(config: TarFlowConfig) -> tuple[float, float]:
    """Count the operations of one image in one direction: by the weights of the layers, and by causal attention.

    A multiply-add is two. In a block of L layers of width C over N tokens they are ``24 L N C^2``, for an MLP of width
    4 C, and ``2 L C N (N + 1)``. The projections at both ends of a block are left out.
    """
    tokens, weights_of_channel = config.num_tokens, 4 + 2 * config.expansion
    by_weights, attention = 0, 0
    for layers, channels in zip(config.layers_of_blocks, config.channels_of_blocks, strict=True):
        by_weights += 2 * layers * tokens * weights_of_channel * channels**2
        attention += 2 * layers * channels * tokens * (tokens + 1)
    return by_weights, attention


def training_operations(config: FlowConfig) -> float | None:
    """Count the operations of training on one image, three times those of a forward pass; None where nobody counts.

    What activation checkpointing computes again is not counted.
    """
    return 3 * sum(operations(config)) if isinstance(config, TarFlowConfig) else None


def memory(
    config: FlowConfig, training: TrainingConfig, num_parameters: int, num_ranks: int, num_shards: int, itemsize: int
) -> dict[str, int]:
    """Estimate the bytes that a process takes, by what they hold; all but activations are float32.

    Args:
        config: that of the model.
        training: the settings.
        num_parameters: of the whole model.
        num_ranks, num_shards: the processes, and those over which weights are split.
        itemsize: bytes of a number in activations.
    """
    own = 4 * num_parameters // num_shards
    images = training.batch_size // (training.accumulate * num_ranks)
    activations = config.activation_bytes(itemsize)
    if training.activation_checkpointing:
        activations //= config.num_layers
    return {
        "weights": own,
        "gradients": own,
        "moments": 2 * own,
        "average": own,
        f"activations of {images} images": images * activations,
    }


def share_of_time(profile: torch.profiler.profile, pattern: str, seconds: float) -> float:
    """The share of so many seconds in which an event is under way whose name begins with the pattern."""
    spans = sorted(
        (event.time_range.start, event.time_range.end) for event in profile.events() if re.match(pattern, event.name)
    )
    busy, until = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e6 / seconds
