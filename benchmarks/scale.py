"""Predict what training on many devices costs in communication and memory, and write ``docs/scale.md``.

    python benchmarks/scale.py                   # the page, from the formulas and from what was measured last
    python benchmarks/scale.py --measure 2 4     # bytes and seconds of gloo on this machine first, by so many processes

R devices are M machines of s. To gather D bytes that are spread over all, or to add up D bytes and spread the sum, each
machine sends them once through its s network cards, and its devices pass them on:

    seconds(D) = (s - 1) / s D / nvlink + (M - 1) / M D / s / network + (s - 1) hop + (M - 1) network_hop

and each device receives ``(R - 1) / R D`` bytes. For P parameters, a step

    copies         adds up gradients: 2 seconds(4 P), of which the backward pass hides what lasts no longer
    full           gathers weights in bfloat16 for each pass and spreads gradients: 2 seconds(2 P) + seconds(4 P)
    hybrid         does that within machines, and adds up shards over the network: 2 (M - 1) / M 4 P / s / network

The forward pass hides its own gathering, the backward pass the rest, layer by layer, but for the first layer's. Nothing
that this file predicts was measured on a GPU.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import torch
import torch.distributed as dist

import device
from report import table
from tarflow import TarFlow, TarFlowConfig, processes
from tarflow.datasets import ImageDataset
from tarflow.files import atomic_write
from tarflow.hardware import PEAKS
from tarflow.training.config import DataConfig, TrainConfig, TrainingConfig
from tarflow.training.parallel import Sharding
from tarflow.training.presets import PRESETS
from tarflow.training.throughput import COLLECTIVE, memory, share_of_time, training_operations
from tarflow.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
CHECK = ROOT / "benchmarks" / "predictions" / "scale-cpu-check.json"
COUNTS = (1, 8, 16, 64, 256, 1024)
SHARDINGS: tuple[Sharding, ...] = ("none", "full", "hybrid")
CALLED = {"none": "copies", "full": "full", "hybrid": "hybrid"}
BUCKET = 25 * 2**20
"""Bytes of gradients that copies add up at a time, the default of PyTorch."""


@dataclass(frozen=True)
class Network:
    """The constants of devices and of what connects them.

    Attributes:
        per_machine: devices of a machine.
        nvlink, network: bytes per second that a device receives within its machine, and through its network card.
        hop, network_hop: seconds that a collective takes for each device of a machine, and for each machine.
        matrix: operations per second of training.
        memory: bytes of a device that training may take.
        gathered: bytes of a weight when it is gathered.
    """

    per_machine: int
    nvlink: float
    network: float
    hop: float
    network_hop: float
    matrix: float
    memory: float
    gathered: int = 2


H100 = Network(8, 450e9, 50e9, 1e-6, 4e-6, 0.4 * PEAKS["NVIDIA H100 80GB HBM3"], 0.92 * 80e9)
ASSUMED = {
    "devices of a machine": "8",
    "NVLink, a direction and device": "450 GB/s, of the data sheet",
    "network card, a device": "50 GB/s (400 Gb/s), of the data sheet",
    "time of a collective for each device, machine": "1 us, 4 us, assumed",
    "operations of training": "40 % of the 989 TFLOP/s of the data sheet, assumed",
    "memory": "92 % of 80 GB, assumed: the rest is PyTorch's and NCCL's",
}


@dataclass(frozen=True)
class Model:
    """A model by its configuration and the number of its parameters."""

    name: str
    config: TarFlowConfig

    @property
    def parameters(self) -> int:
        """P."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in TarFlow(self.config).parameters())


IMAGENET64 = Model("imagenet64-cond", PRESETS["imagenet64-cond"].model.for_data(64, 3, 1000))
# The released text-to-image model has 2 2 2 2 2 24 layers; how many a block has changes nothing here.
STARFLOW = Model(
    "STARFlow's size, 34 layers of width 3072 over 32 x 32 latents",
    TarFlowConfig(32, 4, 1, channels=3072, num_blocks=17, layers_per_block=2),
)


@dataclass(frozen=True)
class Step:
    """What a step of one device is predicted to take.

    Attributes:
        received: bytes.
        forward, backward: seconds of communication that the passes may hide.
        first: seconds of gathering the first layer, which nothing hides.
        compute: seconds.
    """

    received: float
    forward: float
    backward: float
    first: float
    compute: float

    @property
    def exposed(self) -> float:
        """The share of the time of a step in which the device only communicates."""
        waiting = max(0.0, self.forward - self.first - self.compute / 3) + self.first
        waiting += max(0.0, self.backward - self.compute * 2 / 3)
        return waiting / (self.compute + waiting)


def seconds(size: float, devices: int, machines: int, calls: int, network: Network) -> float:
    """Predict the time of gathering so many bytes, or of adding up and spreading them, in so many calls.

    >>> seconds(8e9, 8, 1, 0, H100) == 7 / 8 * 8e9 / 450e9
    True
    >>> seconds(8e9, 1, 1, 5, H100)
    0.0
    """
    within, between = (devices - 1) / devices * size, (machines - 1) / machines * size / devices
    hops = (devices - 1) * network.hop + (machines - 1) * network.network_hop
    return within / network.nvlink + between / network.network + calls * hops


def step(model: Model, sharding: Sharding, count: int, images: int, network: Network = H100) -> Step:
    """Predict a step of so many devices that take so many images each.

    >>> step(IMAGENET64, "none", 1, 8).received
    0.0
    """
    parameters, layers = model.parameters, model.config.num_layers + 1
    devices = min(network.per_machine, count)
    machines = count // devices
    operations = training_operations(model.config)
    assert operations is not None
    compute = images * operations / network.matrix
    if sharding == "none":
        calls = math.ceil(4 * parameters / BUCKET)
        received = 2 * (count - 1) / count * 4 * parameters
        return Step(received, 0.0, 2 * seconds(4 * parameters, devices, machines, calls, network), 0.0, compute)
    inner = machines if sharding == "full" else 1
    shards = devices * inner
    gathering = seconds(network.gathered * parameters, devices, inner, layers, network)
    scattering = seconds(4 * parameters, devices, inner, layers, network)
    received = (shards - 1) / shards * (2 * network.gathered + 4) * parameters
    if sharding == "hybrid":
        scattering += 2 * seconds(4 * parameters / devices, 1, machines, layers, network)
        received += 2 * (machines - 1) / machines * 4 * parameters / devices
    return Step(received, gathering, gathering + scattering, gathering / layers, compute)


def held(model: Model, sharding: Sharding, count: int, network: Network = H100) -> tuple[int, int]:
    """Predict the bytes that a device holds whatever its images are, and those of an image."""
    shards = {"none": 1, "full": count, "hybrid": min(network.per_machine, count)}[sharding]
    parts = memory(model.config, TrainingConfig(batch_size=count), model.parameters, count, shards, 2)
    *state, image = parts.values()
    # Two layers are gathered at a time, and their gradients are whole.
    gathered = 2 * (network.gathered + 4) * model.parameters // model.config.num_layers if shards > 1 else 0
    return sum(state) + gathered, image


def largest_batch(model: Model, sharding: Sharding, count: int, network: Network = H100) -> int:
    """Predict how many images fit a device; 0 where not even one does."""
    state, image = held(model, sharding, count, network)
    return max(0, int((network.memory - state) // image))


# The page -------------------------------------------------------------------------------------------------------------


def page() -> str:
    """Write the page."""
    sections = [
        "# Many devices, on paper: nothing on this page was measured on a GPU",
        "`python benchmarks/scale.py` writes this page. Every number is a prediction by the formulas below, but for"
        " those of the last section, which were measured on a CPU.",
        "```text\n" + _formulas() + "\n```",
        table(["constant", "value"], [list(row) for row in ASSUMED.items()]),
        *map(_predicted, (IMAGENET64, STARFLOW)),
        _check(),
    ]
    return "\n\n".join(sections) + "\n"


def _formulas() -> str:
    _, _, formulas = (__doc__ or "").partition("R devices are")
    return f"R devices are{formulas}".strip()


def _predicted(model: Model) -> str:
    """The tables of a model: what fits, and what communication costs."""
    rows = []
    for count in COUNTS:
        for sharding in SHARDINGS if count > 8 else SHARDINGS[: min(2, count)]:
            state, _ = held(model, sharding, count)
            most = largest_batch(model, sharding, count)
            cells = [f"{count:,}", CALLED[sharding] if count > 1 else "alone", f"{state / 1e9:.1f}", f"{most}"]
            if not most:
                rows.append([*cells, *["–"] * 5])
                continue
            steps = [step(model, sharding, count, images) for images in (most, -(-most // 4), 1)]
            cells += [f"{steps[0].received / 1e9:.2f}", f"{steps[0].compute * 1e3:.0f}"]
            rows.append([*cells, *(f"{each.exposed:.1%}" for each in steps)])
    head = ["devices", "weights", "GB without images", "images that fit a device", "GB received a step"]
    head += ["ms of computing", "share of time exposed", "with a quarter of the images", "with one image"]
    operations = training_operations(model.config) or 0
    about = f"{model.parameters / 1e6:,.0f}M parameters, {operations / 1e12:.2f} TFLOP to train on an image."
    return f"## {model.name}: predicted\n\n{about}\n\n{table(head, rows)}"


def _check() -> str:
    """The section that compares the formulas with gloo on a CPU."""
    if not CHECK.exists():
        return "## With gloo on a CPU\n\nNot measured: `python benchmarks/scale.py --measure 2 4`."
    checked = json.loads(CHECK.read_text())
    rows = [
        [
            f"{row['processes']}",
            CALLED[row["sharding"]],
            f"{row['received'] / 1e6:.1f}",
            f"{row['predicted_received'] / 1e6:.1f}",
            f"{row['seconds'] * 1e3:.0f}",
            f"{row['predicted_seconds'] * 1e3:.0f}",
        ]
        for row in checked["rows"]
    ]
    head = ["processes", "weights", "MB received a step", "predicted", "ms of communication", "predicted"]
    machine = checked["machine"]
    about = (
        f"Measured on {machine['device']} ({machine['driver']}, torch {machine['torch']}), with gloo over the loopback "
        f"device, whose counters tell the bytes: a step of a model of {checked['parameters'] / 1e6:.1f}M parameters in "
        f"float32, the least of {checked['rounds']} steps. The seconds are those of one more, in which a collective of "
        f"the first process was under way, with waiting for others, on two busy cores; predicted are those of the "
        f"formula at {checked['rate'] / 1e9:.2f} GB/s, the rate of one large sum over two processes, and "
        f"without hops. Of shards, processes receive a third more than predicted: as much as if gloo added up whole "
        f"gradients, which NCCL does not."
    )
    return f"## With gloo on a CPU: measured\n\n{about}\n\n{table(head, rows)}"


# Measuring with gloo --------------------------------------------------------------------------------------------------

SMALL = Model("small", TarFlowConfig(16, 1, 2, channels=256, num_blocks=2, layers_per_block=2))
ROUNDS = 3


def measure(counts: Sequence[int]) -> None:
    """Measure both shardings by so many processes, and write the check, which keeps what others were measured by."""
    checked = json.loads(CHECK.read_text()) if CHECK.exists() else {"rows": []}
    rows, rate = [row for row in checked["rows"] if row["processes"] not in counts], checked.get("rate", 0.0)
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            command = [sys.executable, *torchrun, "--", __file__, "--worker", str(out)]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            told = json.loads(out.read_text())
        rate = told["rate"] if count == 2 else rate
        # Processes share one loopback device, so that each has its share of the rate of two.
        network = Network(count, rate * 2 / count, math.inf, 0.0, 0.0, 1.0, 0.0, gathered=4)
        for row in told["rows"]:
            predicted = step(SMALL, row["sharding"], count, 1, network)
            both = {
                "predicted_received": predicted.received,
                "predicted_seconds": predicted.forward + predicted.backward,
            }
            rows.append(row | both | {"processes": count})
    rows.sort(key=lambda row: row["processes"])
    machine = device.describe(torch.device("cpu"))
    checked = {"machine": machine, "parameters": SMALL.parameters, "rounds": ROUNDS, "rate": rate, "rows": rows}
    with atomic_write(CHECK) as beside:
        beside.write_text(json.dumps(checked, indent=2) + "\n")


def _work(out: Path) -> None:
    """Measure in a process that torchrun has started; the main one writes what it saw."""
    with processes.connected("cpu"):
        rate = _rate()
        rows = [_measured(sharding) for sharding in SHARDINGS[:2]]
        processes.by_main(lambda: out.write_text(json.dumps({"rate": rate, "rows": rows})))


def _rate() -> float:
    """Bytes per second that a process receives in a large sum over all processes, at best."""
    numbers, times = torch.ones(2**23), []
    for _ in range(ROUNDS):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(numbers)
        times.append(time.perf_counter() - began)
    return 2 * (1 - 1 / processes.num_ranks()) * numbers.nbytes / min(times)


def _measured(sharding: Sharding) -> dict[str, Any]:
    """Do some steps: the bytes that each process receives, and the seconds in which it communicates."""
    count = processes.num_ranks()
    images = torch.zeros(2 * count, 1, 16, 16, dtype=torch.uint8)
    dataset = ImageDataset(images, torch.zeros(len(images), dtype=torch.int64), ("zero",), False, "zeros")
    training = TrainingConfig(batch_size=len(images), sharding=sharding, precision="float32", device="cpu")
    data = DataConfig(conditional=False)
    trainer = Trainer(TrainConfig(data, SMALL.config, training), dataset, torch.device("cpu"))
    batch, received = dataset.get_batch(torch.arange(2)), []
    for _ in range(ROUNDS):
        dist.barrier()
        before = _loopback_bytes()
        trainer.train_step(*batch)
        dist.barrier()
        received.append((_loopback_bytes() - before) / count)
    began = time.perf_counter()
    with torch.profiler.profile() as profile:
        trainer.train_step(*batch)
    passed = time.perf_counter() - began
    seconds = share_of_time(profile, COLLECTIVE, passed) * passed
    return {"sharding": sharding, "received": min(received), "seconds": seconds}


def _loopback_bytes() -> int:
    """The bytes that the loopback device has received."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[0])


def main() -> None:
    """Write the page; measure first, if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page")
    parser.add_argument(
        "--measure", type=int, nargs="+", help="measure gloo on this machine first, by so many processes"
    )
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options.worker)
        return
    if options.measure:
        measure(options.measure)
    with atomic_write(options.docs / "scale.md") as beside:
        beside.write_text(page())


if __name__ == "__main__":
    main()
