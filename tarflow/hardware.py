"""The device at hand: which one, whether it gains from bfloat16, how much memory it has and what fits into it."""

import ctypes
import os
import re
import sys
from pathlib import Path

import torch

__all__ = [
    "PEAKS",
    "check_memory",
    "chunk_size",
    "free_bytes",
    "keep_freed_memory",
    "peak_operations",
    "pick_device",
    "total_bytes",
    "uses_bfloat16",
]


PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}
"""Operations per second of dense products in bfloat16 that the data sheets tell, by PyTorch's names of the devices."""


def pick_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is the accelerator that PyTorch finds, or the CPU.

    ValueError where there is none of that name.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    counts = {"cpu": 1} | ({accelerator.type: torch.accelerator.device_count()} if accelerator else {})
    present = [name for kind, count in counts.items() for name in (kind, *(f"{kind}:{n}" for n in range(count)))]
    if name not in present:
        raise ValueError(f"device: expected auto or a device that PyTorch has here, {', '.join(present)}; got {name!r}")
    return torch.device(name)


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Return whether layers run in bfloat16: as ``precision`` says or, for ``auto``, where the device gains from it."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # A PyTorch that cannot tell trains a CPU in float32.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def peak_operations(device: torch.device) -> float | None:
    """Return the operations per second of dense products in bfloat16 by the data sheet; None of an unknown device."""
    return PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def check_memory(needed: int, device: torch.device, what: str) -> None:
    """Raise ValueError where something would take more memory than the device has at all."""
    total = total_bytes(device)
    if needed > total:
        raise ValueError(
            f"memory: expected {what} to take at most {total / 2**30:.1f} GiB, which is all that {device} has; "
            f"got about {needed / 2**30:.1f} GiB"
        )


def chunk_size(bytes_per_sample: int, device: torch.device) -> int:
    """Return how many samples can be in flight if they are to take half of the memory that is free."""
    return max(1, free_bytes(device) // 2 // bytes_per_sample)


def free_bytes(device: torch.device) -> int:
    """Return the memory of the device that new tensors can have; for a system that does not tell, four gibibytes.

    What PyTorch keeps of a GPU for them, and what Linux keeps of files that have been read, counts as free; what the C
    library keeps by :func:`keep_freed_memory` does not.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        told = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        told = None
    return 4 * 2**30 if told is None else 1024 * int(told[1])


def keep_freed_memory() -> None:
    """Have the C library keep the memory of tensors that are freed on a CPU, for those that come next.

    By itself glibc gives activations back to the system, and those that come next pay a page fault for every 4 kB: up
    to two fifths of an evaluation, and a sixth of a training step in bfloat16. Kept are tensors of up to 32 MB, the
    most that glibc can be asked for. This is a setting of the whole process, so it is for programs to make; what the
    environment says (``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_``) stays. Other C libraries are left as they
    are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # Each option has the number that malloc.h gives it.
    for option, variable, value in ((-3, "MALLOC_MMAP_THRESHOLD_", 32 * 2**20), (-1, "MALLOC_TRIM_THRESHOLD_", -1)):
        if mallopt and variable not in os.environ:
            mallopt(option, value)


def total_bytes(device: torch.device) -> int:
    """Return all memory of the device; for a system that does not tell, more than there is anywhere."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize
