"""Where a training step and a decoding step of a whole model spend their time, kernel by kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from models import build, fashion_mnist, imagenet64
from rows import training_rows
from tarflow.decoding.step import Step

TOP = 15
STEPS = 3


def training_step(device: torch.device) -> dict[str, Any]:
    """A step of training, as the training row does it, on the backend of the device."""
    row = training_rows(device)[0]
    prepare = row.contenders["triton" if device.type == "cuda" else "torch"].prepare
    return _profiled(prepare(row.draw(device)), device)


def decode_step(device: torch.device) -> dict[str, Any]:
    """A token of 64 rows (32 guided images) through the transformer of one block, half of the tokens being known."""
    on_gpu = device.type == "cuda"
    model = build(imagenet64(num_blocks=1) if on_gpu else fashion_mnist(2), device)
    transformer, rows, position = model.flow.blocks[0].transformer, 64, model.config.num_tokens // 2
    tokens = torch.randn(rows, model.config.token_dim, device=device)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
        step = Step(transformer, rows)
        for known in range(position):
            step.positions.fill_(known)
            step(tokens)
        return _profiled(lambda: step(tokens), device)


PROFILES: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    "training step": training_step,
    "decoding step": decode_step,
}


def show(name: str, table: dict[str, Any]) -> str:
    """A table as text."""
    if "unavailable" in table:
        return f"{name}: not profiled: {table['unavailable']}"
    lines = (
        f"\n{kernel['share']:8.1%} {1e3 * kernel['seconds']:9.3f} ms {kernel['calls']:6.0f} x  {kernel['name']}"
        for kernel in table["kernels"]
    )
    return f"{name}: {1e3 * table['seconds']:.3f} ms in kernels{''.join(lines)}"


def _profiled(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """The most expensive kernels (on a CPU: operators) of a run, and their shares."""
    on_gpu = device.type == "cuda"
    run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        for _ in range(STEPS):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    kernels = [
        {"name": event.key[:90], "seconds": _microseconds(event, on_gpu) / 1e6 / STEPS, "calls": event.count / STEPS}
        for event in profiled.key_averages()
        if (event.device_type == DeviceType.CUDA) == on_gpu and not event.is_user_annotation
    ]
    kernels.sort(key=lambda kernel: -kernel["seconds"])
    total = sum(kernel["seconds"] for kernel in kernels)
    return {
        "seconds": total,
        "kernels": [kernel | {"share": kernel["seconds"] / total} for kernel in kernels[:TOP]],
    }


def _microseconds(event: Any, on_gpu: bool) -> float:
    return event.self_device_time_total if on_gpu else event.self_cpu_time_total
