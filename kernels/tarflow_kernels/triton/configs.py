"""The configurations of kernels: those that the tuner found for this device, else ones that fit any card.

A configuration is the constants and launch options of one kernel, such as ``{"BLOCK_M": 128, "num_warps": 4}``. It is
looked up by dtype, padded head dim and bucketed length, never by a raw length, so that few variants are ever compiled
and results do not depend on what ran before. ``python -m tarflow_kernels.tune`` writes the files.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "configs"
Config = dict[str, int]
"""Constants and launch options of one kernel."""

_forced: dict[str, Config] = {}


def choose(kernel: str, key: str, fallback: Config) -> Config:
    """Choose the configuration of a kernel for a key, such as :func:`attention_key` makes.

    Fallbacks are made for Hopper. Elsewhere their limit of registers, ``maxnreg``, is left out: it is an option of
    NVIDIA's compiler, and counts on operands in shared memory. On cards of other makers copies run one tile ahead, not
    two, since they take registers there.
    """
    if config := _forced.get(kernel) or tuned(kernel, device_name()).get(key):
        return config
    architecture = architecture_of_target()
    if architecture == 90:
        return fallback
    config = {name: value for name, value in fallback.items() if name != "maxnreg"}
    if not architecture and "num_stages" in config:
        config["num_stages"] = min(config["num_stages"], 2)
    return config


@contextlib.contextmanager
def use(kernel: str, config: Config) -> Iterator[None]:
    """Launch a kernel with one configuration, whatever the tables say: for the tuner and its tests."""
    _forced[kernel] = config
    try:
        yield
    finally:
        del _forced[kernel]


def attention_key(tensor: Tensor, length: int) -> str:
    """The key for queries ``(B, H, N, D)`` and a number of keys.

    >>> attention_key(torch.empty(2, 12, 1000, 48, dtype=torch.bfloat16), 1000)
    'bfloat16,d64,n1024'
    """
    return f"{dtype_name(tensor.dtype)},d{block_of(tensor.shape[-1])},n{bucket(length)}"


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in keys: half-precision types of one size are the same to a kernel."""
    return "bfloat16" if dtype == torch.float16 else str(dtype).removeprefix("torch.")


def bucket(length: int) -> int:
    """The power of two from 64 to 4096 that a length belongs to."""
    return min(max(triton.next_power_of_2(length), 64), 4096)


def block_of(head_dim: int) -> int:
    """The head dim of tiles that hold heads of this one."""
    return max(triton.next_power_of_2(head_dim), 16)


@functools.cache
def tuned(kernel: str, device: str | None) -> dict[str, Config]:
    """The configurations that the tuner found for a kernel on a device, by key."""
    path = FOLDER / f"{kernel},{device}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def device_name() -> str | None:
    """The name of the device in those of files, such as ``nvidia-h100-80gb-hbm3``; None where there is no GPU."""
    for devices in (torch.cuda, torch.xpu):
        if devices.is_available():
            return re.sub(r"[^a-z0-9]+", "-", devices.get_device_name().lower()).strip("-")
    return None


def dot_precision(dtype: torch.dtype) -> str:
    """The way float32 operands are multiplied, as ``torch.set_float32_matmul_precision`` asks for.

    The ``"highest"`` is three products of tensor-core floats on NVIDIA's cards, which is as accurate to a few units
    in the last place, and plain float32 arithmetic elsewhere.
    """
    if dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "tf32x3" if on_nvidia() else "ieee"


def on_nvidia() -> bool:
    """Whether the target is one of NVIDIA's cards, and not AMD's, Intel's or the interpreter."""
    return architecture_of_target() > 0


def architecture_of_target() -> int:
    """The architecture of one of NVIDIA's cards, such as 90; 0 for all other targets."""
    if triton.knobs.runtime.interpret:
        return 0
    return _architecture(triton.runtime.driver.active.get_current_device())


@functools.cache
def _architecture(device: int) -> int:
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def num_multiprocessors() -> int:
    """The number of multiprocessors of the current device; one for the interpreter."""
    if triton.knobs.runtime.interpret:
        return 1
    return _num_multiprocessors(triton.runtime.driver.active.get_current_device())


@functools.cache
def _num_multiprocessors(device: int) -> int:
    return triton.runtime.driver.active.utils.get_device_properties(device)["multiprocessor_count"]
