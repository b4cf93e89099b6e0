"""The device at hand: which one, whether it gains from bfloat16, how much memory it has and what fits into it."""

import os
import sys

import torch

__all__ = [
    "PEAKS",
    "check_memory",
    "chunk_size",
    "free_bytes",
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
    """Return the free memory of the device; for a system that does not tell, four gibibytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


def total_bytes(device: torch.device) -> int:
    """Return all memory of the device; for a system that does not tell, more than there is anywhere."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize
