"""The rehearsal of ``gpu.py``: all that it would do on a card, on a CPU under Triton's interpreter, with tiny shapes.

    python benchmarks/gpu.py --rehearse

The code is the same; only the tables say something else. Times mean nothing, and results are called a rehearsal's.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import torch

import device as devices
import gpu
import models
import ops
import profiles
import rows
import smoke
import stages
import tasks
import warm
from row import Row
from sampling import Subject, sampling_row
from tarflow import TarFlowConfig
from tarflow_kernels import cases, dispatch, tune
from tarflow_kernels.triton import affine, attention, configs, decode, mixture
from training import training_row

TINY = TarFlowConfig(
    image_size=8, in_channels=1, patch_size=4, channels=64, num_blocks=2, layers_per_block=1, num_classes=3
)
FLOAT32 = torch.float32


def tiny_rows(device: torch.device) -> list[Row]:
    """List a row of each kind."""
    shape = ops.Published("tiny", tokens=32, heads=1, token_dim=4)
    coupling = ops.Coupling("tiny", channels=1, height=4, width=4, components=4)
    subject = Subject("tiny", TINY, partial(models.build, TINY))
    return [
        *ops.rows_of([shape], [coupling], ops.Amounts(64, 2, 2**12, 2), FLOAT32),
        sampling_row(subject, 2, models.GUIDANCE),
        training_row("tiny", TINY, 2, FLOAT32, "float64"),
    ]


def tiny_problems() -> list[tune.Problem]:
    """List a problem of each op, with a few of its candidates."""

    def forward(build, device: str) -> cases.Launch:
        return build(device, FLOAT32)[0]

    attend = partial(forward, partial(cases.attention, rows=1, length=32, head_dim=64))
    decoded = partial(cases.decoding, dtype=FLOAT32, rows=2, new=1, head_dim=64, capacity=32)
    mapped = partial(forward, partial(cases.affine, rows=32, length=8, token_dim=4))
    mixed = partial(forward, partial(cases.mixture, rows=2, components=4, order="elements"))
    return [
        tune.Problem("causal_attention_forward", "float32,d64,n64", attention.CANDIDATES["forward"][:2], attend),
        tune.Problem("decode_attention", "float32,d64,n64", decode.CANDIDATES[:2], decoded),
        tune.Problem("affine_map", "float32,n64", affine.CANDIDATES[:2], mapped),
        tune.Problem("mixture_map", "float32,k4,elements,n2048", mixture.candidates("elements", 4)[-2:], mixed),
    ]


def pick(name: str, args: tuple) -> str:
    """Pick the backend that a card would run."""
    runs = "triton" in dispatch.implementations[name] and dispatch._serves[name](*args)
    return "triton" if runs else "torch"


def rehearse(folder: Path) -> None:
    """Put tiny tables in the place of those that a card has; what is tuned goes to a folder."""
    devices._name = lambda device: "Rehearsal, interpreted on a CPU"
    devices.LEAST_ROUNDS = 1
    configs.FOLDER = folder / "configs"
    configs.device_name = lambda: "rehearsal"
    dispatch.pick = pick
    stages.all_rows = rows.all_rows = tiny_rows
    stages.TESTS = stages.TESTS[:1] + stages.TESTS[-2:]
    smoke.MODEL = TINY
    tune.problems = lambda: iter(tiny_problems())
    few = warm.launches()[:3]
    warm.launches = lambda: few
    profiles.IMAGES = 2
    profiles.fashion_mnist = lambda patch_size: TINY
    profiles.training_rows = lambda device: tiny_rows(device)[-1:]


if __name__ == "__main__":
    rehearse(Path(os.environ["TARFLOW_REHEARSAL"]))
    if sys.argv[1].startswith("{"):  # one of the tasks
        tasks.main(**json.loads(sys.argv[1]))
    else:
        gpu.TASKS = Path(__file__)
        sys.exit(gpu.main())
