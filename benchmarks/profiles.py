"""Profile a training step, a decoding step and a Jacobi pass of a whole model, kernel by kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from models import GUIDANCE, autocast, build, fashion_mnist, imagenet64, latents_and_labels, step_bytes
from tarflow import Decoder
from training import training_rows

TOP = 15
STEPS = 3
IMAGES = 32
# So much tolerance that the first pass settles everything.
_ONE_PASS = Decoder("jacobi", tolerance=1e30)


def training_step(device: torch.device) -> dict[str, Any]:
    """Profile a step of training, as the training row does it, on the backend of the device."""
    row = training_rows(device)[0]
    prepare = row.contenders["triton" if device.type == "cuda" else "torch"].prepare
    run = prepare(row.draw(device))
    run()
    return _profiled(run, device, STEPS)


def decoding_step(device: torch.device) -> dict[str, Any]:
    """Profile the mean step of the sequential decoder in one block for 32 guided images (64 rows).

    ``bytes`` are what it has to read: weights and cache, each once.
    """
    on_gpu = device.type == "cuda"
    config = imagenet64(num_blocks=1) if on_gpu else fashion_mnist(2)
    steps = config.num_tokens - 1
    read = step_bytes(config, 2 * IMAGES, (steps + 1) / 2, itemsize=2 if on_gpu else 4)
    return _decoding(Decoder("sequential"), device, steps) | {"bytes": read}


def jacobi_pass(device: torch.device) -> dict[str, Any]:
    """Profile a pass of the Jacobi decoder over whole sequences in one block, for 32 guided images, with its setup."""
    return _decoding(_ONE_PASS, device, 1)


PROFILES: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    "training step": training_step,
    "decoding step": decoding_step,
    "Jacobi pass": jacobi_pass,
}


def summary(table: dict[str, Any]) -> str:
    """Write time, launches and bytes of a profile in a line.

    >>> summary({"seconds": 0.0005, "launches": 61.2, "bytes": 2e8})
    '0.500 ms in 61 launches, 200.0 MB to be read'
    """
    read = f", {table['bytes'] / 1e6:.1f} MB to be read" if "bytes" in table else ""
    return f"{1e3 * table['seconds']:.3f} ms in {table['launches']:.0f} launches{read}"


def _decoding(decoder: Decoder, device: torch.device, parts: int) -> dict[str, Any]:
    """Profile one of the ``parts`` steps or passes in which a decoder inverts a block."""
    on_gpu = device.type == "cuda"
    model = build(imagenet64(num_blocks=1) if on_gpu else fashion_mnist(2), device)
    flow, (z, labels) = model.flow, latents_and_labels(model, IMAGES)
    with torch.inference_mode(), autocast(device, torch.bfloat16 if on_gpu else torch.float32):
        branches = flow.branches(flow.condition(labels, None, z), GUIDANCE)

        def run() -> None:
            flow.blocks[0].inverse(z, branches, GUIDANCE, decoder)

        run()
        return _profiled(run, device, 1, parts)


def _profiled(run: Callable[[], Any], device: torch.device, runs: int, parts: int = 1) -> dict[str, Any]:
    """Measure the most expensive kernels (on a CPU: operators, without those that they call) of a part of a run."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        for _ in range(runs):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    parts = runs * parts
    kernels = [
        {"name": event.key[:90], "seconds": _microseconds(event, on_gpu) / 1e6 / parts, "calls": event.count / parts}
        for event in profiled.key_averages()
        if (event.device_type == DeviceType.CUDA) == on_gpu and not event.is_user_annotation
    ]
    kernels.sort(key=lambda kernel: -kernel["seconds"])
    total = sum(kernel["seconds"] for kernel in kernels)
    return {
        "seconds": total,
        "launches": sum(kernel["calls"] for kernel in kernels),
        "kernels": [kernel | {"share": kernel["seconds"] / total} for kernel in kernels[:TOP]],
    }


def _microseconds(event: Any, on_gpu: bool) -> float:
    return event.self_device_time_total if on_gpu else event.self_cpu_time_total
