"""Predict how long the decoders take, from bytes, operations and launches: a model, and no measurement.

    python benchmarks/cost.py            # a step and a pass of 2-768-8-8, as predicted for each card
    python benchmarks/cost.py --check    # the same formulas against what the decoders take on the CPU at hand

A pass is a chain of kernels, and a kernel takes ``launch + max(bytes / copy, operations / matrix)``: a time for being
launched, filling the device and draining it, and then whichever of moving its bytes and multiplying takes longer. A
pass over R rows of G tokens, of a block with L layers of width C, whose last token sees n tokens, moves

    weights      12 L C^2 elements, once
    cache        2 L R n C elements, once
    activations  34 L R G C elements, and 4 L R G C in full precision: the residual

with ``24 L C^2 R G`` operations by weights and ``4 L C R (G n - G (G - 1) / 2)`` by attention. A step of the sequential
decoder is a pass with G = 1 and, on average, n = N / 2, of ``8 L + 3`` kernels. A pass of the Jacobi decoder has some
40 around its layers. Few rows are thus bound by launches and weights, many by the cache, and long windows by products.

*Halves.* On a GPU the sequential decoder runs a large batch as two halves on two streams. Each is a chain of its own;
together they hide each other's launches, but neither bytes nor operations, and read the weights twice: a step takes as
long as the larger half alone, or as all bytes or all operations, whichever is longest.

*Left out.* Warming up and capturing the graph of a block; looking whether a Jacobi iteration may end; rows that are
finished before others; caches that hold what was just written, or a small model; keys that a pass over many tokens
reads several times; attention, which multiplies more slowly than a large product.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import numpy as np
import torch

import device as devices
import models
import records
from records import Record
from tarflow import Decoder, TarFlowConfig
from tarflow.decoding.sequential import count_chains
from tarflow.files import atomic_write
from tarflow.hardware import PEAKS
from tarflow.transformer import UNCONDITIONAL

CHECK = Path(__file__).parent / "predictions" / "decoding-cpu-check.json"
# Residuals, and the projections at both ends, are in full precision; so are weights before they are cast.
_FULL = 4
BFLOAT16, FLOAT32 = 2, 4

# Devices --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """The constants of a device.

    Attributes:
        name: as PyTorch names it.
        copy: bytes per second, read and written.
        matrix: operations per second of a large product.
        launch: seconds that a kernel takes beside its bytes and operations.
        processors: multiprocessors; attention over fewer rows and heads is split, which takes one more kernel.
        streams: 2 where a large batch is decoded as two halves.
    """

    name: str
    copy: float
    matrix: float
    launch: float
    processors: int = 0
    streams: int = 1


_H100 = Device("NVIDIA H100 80GB HBM3", 3.0e12, 0.65 * PEAKS["NVIDIA H100 80GB HBM3"], 3e-6, processors=132, streams=2)
DEVICES = {"H100 SXM": _H100, "H200": replace(_H100, name="NVIDIA H200", copy=4.8 / 3.35 * _H100.copy)}
SOURCES = {
    "copy": "assumed: 90 % of what the data sheets say, 3.35 and 4.8 TB/s",
    "matrix": "assumed: 65 % of what the data sheets say of dense bfloat16, 989 TFLOP/s",
    "launch": "assumed: 2 us from one kernel of a CUDA graph to the next, 1 us to fill the card and to drain it",
    "processors": "of the data sheets",
}
"""Where the constants of the devices are from: none has been measured."""


# Kernels --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """The bytes of each kind that a kernel moves, its operations, and its launches."""

    name: str
    weights: float = 0
    cache: float = 0
    activations: float = 0
    operations: float = 0
    launches: int = 1

    @property
    def bytes(self) -> float:
        """All bytes."""
        return self.weights + self.cache + self.activations


def seconds(kernels: Iterable[Kernel], device: Device) -> float:
    """Predict the time of kernels that wait for each other."""
    return sum(k.launches * device.launch + max(k.bytes / device.copy, k.operations / device.matrix) for k in kernels)


def limit(kernels: Iterable[Kernel], device: Device) -> float:
    """Return the time below which nobody gets: that of all bytes, or of all operations."""
    kernels = list(kernels)
    return max(sum(k.bytes for k in kernels) / device.copy, sum(k.operations for k in kernels) / device.matrix)


def layer(channels: int, rows: int, new: int, seen: float, size: int = BFLOAT16, split: bool = False) -> list[Kernel]:
    """List the kernels of a layer, for ``new`` tokens in each row, of which the last sees ``seen``.

    Args:
        size: bytes of an element of the layers.
        split: whether attention splits the cache and merges the parts.
    """
    values = rows * new * channels
    pairs = rows * (new * seen - new * (new - 1) / 2)

    def product(name: str, inputs: int, outputs: int) -> Kernel:
        """Multiply activations ``inputs`` times as wide as a token's by a matrix."""
        weights = inputs * outputs * channels**2
        return Kernel(
            name,
            weights=size * weights,
            activations=size * (inputs + outputs) * values,
            operations=2 * weights * rows * new,
        )

    # It reads the residual and what is added to it, and writes the sum, as it is and normalized.
    norm = Kernel("residual and norm", activations=2 * (_FULL + size) * values)
    attention = Kernel(
        "append and attend",
        cache=size * 2 * rows * seen * channels,
        activations=size * 6 * values,
        operations=4 * channels * pairs,
        launches=2 if split else 1,
    )
    gelu = Kernel("GELU", activations=size * 8 * values)
    return [
        norm,
        product("qkv", 1, 3),
        attention,
        product("projection", 1, 1),
        norm,
        product("up", 1, 4),
        gelu,
        product("down", 4, 1),
    ]


# A block of 64 queries is one program; caches below twice this are not split.
_QUERIES, _SPLIT = 64, 128


def run_layers(
    config: TarFlowConfig, rows: int, new: int, seen: float, device: Device, size: int = BFLOAT16
) -> list[Kernel]:
    """List the kernels from the first activations to mu and alpha."""
    programs = rows * config.channels // config.head_dim * math.ceil(new / _QUERIES)
    split = programs < device.processors and config.num_tokens >= 2 * _SPLIT
    values, outputs = rows * new * config.channels, 2 * config.token_dim
    return [
        *config.layers_per_block * layer(config.channels, rows, new, seen, size, split),
        Kernel("last residual", activations=(2 * _FULL + size) * values),
        Kernel(
            "mu and alpha",
            weights=_FULL * config.channels * outputs,
            activations=_FULL * (values + rows * new * outputs),
            operations=2 * values * outputs,
        ),
    ]


def step(config: TarFlowConfig, rows: int, device: Device, size: int = BFLOAT16) -> list[Kernel]:
    """List the kernels of the mean step of the sequential decoder, which sees half of the sequence."""
    embedding = Kernel(
        "next token",
        weights=_FULL * config.token_dim * config.channels,
        activations=_FULL * rows * (4 * config.token_dim + 2 * config.channels),
        operations=2 * rows * config.token_dim * config.channels,
    )
    return [*run_layers(config, rows, 1, config.num_tokens / 2, device, size), embedding]


# Around the embedding and the layers of a Jacobi pass, by branches: gathering a window, deciding what of it is frozen.
_UPDATES = {1: 35, 2: 41}


def jacobi_pass(
    config: TarFlowConfig, batch: int, branches: int, window: int | None, device: Device, size: int = BFLOAT16
) -> list[Kernel]:
    """List the kernels of the mean pass over windows, whose last token sees half of the sequence and half a window."""
    last = config.num_tokens - 1
    new, rows = min(window or last, last), batch * branches
    values, tokens = rows * new * config.channels, batch * new * config.token_dim
    embedding = [
        Kernel("positions", activations=2 * _FULL * values),
        Kernel("classes", activations=2 * _FULL * values),  # of a model that has them
        Kernel(
            "tokens",
            weights=_FULL * config.token_dim * config.channels,
            activations=_FULL * (2 * values + branches * tokens),
            operations=2 * values * config.token_dim,
        ),
    ]
    update = Kernel("update", activations=2 * _FULL * tokens)
    layers = run_layers(config, rows, new, (last + new) / 2, device, size)
    return [*embedding, *layers, *_UPDATES[branches] * [update]]


def prepare(config: TarFlowConfig, size: int) -> list[Kernel]:
    """List the kernels that cast the weights of a block and lay them out, once."""
    shares = 3, 1, 4, 4
    return config.layers_per_block * [
        Kernel("cast", weights=(_FULL + size) * share * config.channels**2) for share in shares
    ]


# Decoders -------------------------------------------------------------------------------------------------------------

SEQUENTIAL = Decoder("sequential")

Shares = tuple[float, float]
"""The passes of a Jacobi decoder as shares of the steps: in the block that is generated first, and in each other."""


def in_halves(config: TarFlowConfig, batch: int, branches: int) -> bool:
    """Tell whether a batch is decoded as two halves: where a mean step reads twice as much cache as weights."""
    return count_chains(torch.device("cuda"), batch, branches * batch, config.num_tokens, config.channels) == 2


def step_seconds(config: TarFlowConfig, batch: int, branches: int, device: Device, size: int = BFLOAT16) -> float:
    """Predict the mean step of the sequential decoder."""
    if device.streams == 1 or not in_halves(config, batch, branches):
        return seconds(step(config, branches * batch, device, size), device)
    larger, smaller = (step(config, branches * half, device, size) for half in (batch - batch // 2, batch // 2))
    return max(seconds(larger, device), limit([*larger, *smaller], device))


def block_seconds(
    config: TarFlowConfig,
    batch: int,
    branches: int,
    decoder: Decoder,
    passes: int,
    device: Device,
    size: int = BFLOAT16,
) -> float:
    """Predict the time in which the sequential decoder or a Jacobi decoder inverts a block with so many passes."""
    if decoder.name == "sequential":
        each = step_seconds(config, batch, branches, device, size)
    else:
        each = seconds(jacobi_pass(config, batch, branches, decoder.window, device, size), device)
    return seconds(prepare(config, size), device) + passes * each


def sequential(config: TarFlowConfig, batch: int, branches: int, device: Device) -> float:
    """Predict the time in which the sequential decoder inverts all blocks."""
    return sum(_by_block(config, batch, branches, SEQUENTIAL, (1, 1), device))


def jacobi(
    config: TarFlowConfig, batch: int, branches: int, window: int | None, shares: Shares, device: Device
) -> float:
    """Predict the time in which the Jacobi decoder inverts all blocks."""
    return sum(_by_block(config, batch, branches, Decoder("jacobi", window), shares, device))


def auto(
    config: TarFlowConfig, batch: int, branches: int, shares: Mapping[int | None, Shares], device: Device
) -> float:
    """Predict the time of the best decoder of each block: sequential, or Jacobi with one of the windows given."""
    candidates = {SEQUENTIAL: (1.0, 1.0)} | {Decoder("jacobi", window): shares[window] for window in shares}
    times = [_by_block(config, batch, branches, *candidate, device) for candidate in candidates.items()]
    return sum(map(min, zip(*times, strict=True)))


def floor(config: TarFlowConfig, batch: int, branches: int, device: Device) -> float:
    """Return the limit of sequential decoding: weights and cache of every step, each read once."""
    read = models.step_bytes(config, branches * batch, config.num_tokens / 2, BFLOAT16)
    return config.num_blocks * (config.num_tokens - 1) * read / device.copy


def _by_block(
    config: TarFlowConfig, batch: int, branches: int, decoder: Decoder, shares: Shares, device: Device
) -> list[float]:
    """Predict the time of each block, as they are generated; a window moves by its length at most."""
    steps = config.num_tokens - 1
    fewest = math.ceil(steps / (decoder.window or steps))
    passes = [max(fewest, math.ceil(share * steps)) for share in shares]
    first, other = (block_seconds(config, batch, branches, decoder, count, device) for count in passes)
    return [first, *[other] * (config.num_blocks - 1)]


# Records --------------------------------------------------------------------------------------------------------------


def covered() -> dict[str, TarFlowConfig]:
    """Return the configurations that rows of sampling on a GPU are of, by the names that the rows have for them."""
    return {
        "ImageNet64 2-768-8-8": models.imagenet64(),
        "ImageNet64 2-768-1-8": models.imagenet64(1),
        "ImageNet128 4-1024-2-8": models.imagenet128(2),
        "AFHQ256 8-768-2-8": models.afhq256(2),
        "Fashion-MNIST 2-128-4-2, trained": models.trained_config(),
    }


def predict_record(record: Record) -> dict[str, float]:
    """Predict the decoders of a row of sampling, by contender, with the passes that each block took when measured.

    Returns nothing for an op, a device, a model or a precision of which there is no model.
    """
    device = next((d for d in DEVICES.values() if d.name == record["machine"]["device"]), None)
    config = covered().get(record["model"])
    if device is None or config is None or record["dtype"] != "bfloat16":
        return {}
    branches = 2 if record["op"] == "guided sampling" else 1
    predicted = {}
    for name, result in records.timed(record).items():
        blocks = [_block_of(entry, name) for entry in result.get("by_block", ())]
        times = [block_seconds(config, record["shape"]["B"], branches, *block, device) for block in blocks]
        if times:
            predicted[name] = sum(times)
    return predicted


def _block_of(entry: str, contender: str) -> tuple[Decoder, int]:
    """Read the decoder and the passes of a block.

    >>> _block_of("8/195 by jacobi, window 64", "auto")
    (Decoder(name='jacobi', window=64, tolerance=0.01), 8)
    """
    counts, _, by = entry.partition(" by ")
    name, _, window = (by or contender).partition(", window ")
    return Decoder(name, int(window) if window else None), int(counts.partition("/")[0])


# Check ----------------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
BASE = {"batch": 8, "tokens": 64, "channels": 128, "layers": 4}
VARIED = {
    "batch": (1, 4, 16, 64),
    "tokens": (16, 64, 144, 256),
    "channels": (64, 128, 256, 512),
    "layers": (1, 2, 4, 8),
}
# With so much tolerance a pass settles its whole window: there are as many passes as there are windows.
CHECKED = (SEQUENTIAL, Decoder("jacobi", 16, 1e30), Decoder("jacobi", None, 1e30))
# Next to nothing to compute: its steps take as long as their launches do.
_THIN = {"batch": 1, "tokens": 64, "channels": 8, "layers": 8}

Sizes = Mapping[str, int]


def check(
    path: Path = CHECK, base: Sizes = BASE, varied: Mapping[str, Iterable[int]] = VARIED, duration: float = 60.0
) -> None:
    """Measure this CPU and the decoders on it, one size varied at a time, and write both with what is predicted.

    Args:
        duration: seconds for which everything is timed in turn, since the speed of a machine drifts.
    """
    copy, matrix = devices.copy_rate(CPU), devices.matrix_rate(CPU, torch.float32)
    sizes = [(name, {**base, name: value}) for name, values in varied.items() for value in values]
    cases = [(name, size, decoder) for name, size in sizes for decoder in CHECKED]
    (taken, steps), *measured = _measure([(_THIN, SEQUENTIAL), *(case[1:] for case in cases)], duration)
    cpu = Device("CPU", copy, matrix, launch=taken / steps / (8 * _THIN["layers"] + 3))
    points = []
    for (name, size, decoder), (taken, passes) in zip(cases, measured, strict=True):
        predicted = block_seconds(_one_block(size), size["batch"], 1, decoder, passes, cpu, FLOAT32)
        point = {"varied": name, **size, "decoder": str(decoder), "passes": passes}
        points.append(point | {"predicted": predicted, "measured": taken})
    constants = {"copy": cpu.copy, "matrix": cpu.matrix, "launch": cpu.launch}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as beside:
        result = {"machine": devices.describe(CPU), "constants": constants, "points": points}
        beside.write_text(json.dumps(result, indent=1) + "\n")


def fit(points: Iterable[Record]) -> tuple[float, float]:
    """Return the slope of log measured over log predicted, by least squares, and the geometric mean of their ratio.

    >>> slope, factor = fit([{"predicted": t, "measured": 3 * t} for t in (1.0, 2.0, 5.0)])
    >>> round(slope, 6), round(factor, 6)
    (1.0, 3.0)
    """
    predicted, measured = np.log([(point["predicted"], point["measured"]) for point in points]).T
    slope, _ = np.polyfit(predicted, measured, 1)
    return float(slope), float(np.exp((measured - predicted).mean()))


def _measure(cases: Iterable[tuple[Sizes, Decoder]], duration: float) -> list[tuple[float, int]]:
    """Time decoders in turn, each on one block of random weights; return the median and the passes of each."""
    runs, passes = {}, []
    with torch.inference_mode():
        for place, (size, decoder) in enumerate(cases):
            flow = models.build(_one_block(size), CPU).flow
            z = flow.sample_prior(size["batch"], torch.Generator().manual_seed(1))
            run = functools.partial(flow.blocks[0].inverse, z, [UNCONDITIONAL], None, decoder)
            passes.append(run()[1])
            runs[str(place)] = devices.Timed(run)
        times = devices.interleave(runs, CPU, duration, flush=False)
    return [(devices.percentiles(taken)["p50"], count) for taken, count in zip(times.values(), passes, strict=True)]


def _one_block(size: Sizes) -> TarFlowConfig:
    """Configure a model of one block."""
    return TarFlowConfig(
        image_size=2 * math.isqrt(size["tokens"]),
        patch_size=2,
        channels=size["channels"],
        num_blocks=1,
        layers_per_block=size["layers"],
        head_dim=min(64, size["channels"]),
    )


# Command --------------------------------------------------------------------------------------------------------------


def main() -> None:
    """Print predictions, or check the formulas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help=f"measure this CPU and write {CHECK.name}")
    if parser.parse_args().check:
        check()
        slope, factor = fit(json.loads(CHECK.read_text())["points"])
        print(f"slope {slope:.2f}, measured over predicted {factor:.2f}; written to {CHECK}")
        return
    for title, device in DEVICES.items():
        for batch in (1, 32, 256):
            config = models.imagenet64()
            taken = step_seconds(config, batch, 2, device)
            each = seconds(jacobi_pass(config, batch, 2, None, device), device)
            print(f"{title}, 2-768-8-8, {batch} guided: step {1e6 * taken:.0f} us, Jacobi pass {1e3 * each:.2f} ms")


if __name__ == "__main__":
    main()
