"""How long the kernels would take on an H100, predicted from their machine code, at the shapes that are benchmarked.

    python -m tarflow_kernels.resources --model sm_90

Kernels are compiled as their launchers call them, in the configurations for cards that nobody has tuned, and run
through the static model of :mod:`.hopper`. No number here was measured. The inverse of a mixture is left out, since its
trips depend on the data.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from . import cases, hopper
from .hopper import Trips
from .offline import TARGETS, Launched, launches, resources

__all__ = ["Kernel", "Prediction", "Row", "as_json", "predict", "rows", "show"]

# So many programs after another tell how long any number of them takes.
ENOUGH = 8


class Row(NamedTuple):
    """An op at a shape, named as the benchmarks name it, and the least that it has to move and to compute.

    Attributes:
        op, shape, dtype: as in a row of the benchmarks.
        bytes, operations: as there, in low-precision products.
        kernels: by name, the bytes that each of its kernels has to move.
        launch: launches them, and perhaps others.
    """

    op: str
    shape: dict[str, int]
    dtype: torch.dtype
    bytes: float
    operations: float
    kernels: dict[str, float]
    launch: Callable[[], object]

    @property
    def name(self) -> str:
        """Its op, shape and dtype in a line."""
        sizes = " ".join(f"{key}={value}" for key, value in self.shape.items())
        return f"{self.op}, {sizes}, {str(self.dtype).removeprefix('torch.')}"


class Kernel(NamedTuple):
    """One kernel of a row.

    Attributes:
        microseconds: predicted time of all its programs, or of its bytes, if that is longer.
        programs: how many of them a multiprocessor holds at a time.
        registers, spilled: of a thread; the latter in bytes.
        busy: percent of the time that each pipe and the issue of instructions are busy, the busiest first.
        loop: by pipe, the instructions of the loop that it goes through most, or of all of it.
    """

    microseconds: float
    programs: int
    registers: int
    spilled: int
    busy: dict[str, int]
    loop: dict[str, int]


class Prediction(NamedTuple):
    """The predicted time of a row, its limit, which is that of its bytes or operations, and what its kernels do."""

    microseconds: float
    limit: float
    bound: str
    kernels: dict[str, Kernel]

    @property
    def percent_of_limit(self) -> float:
        """The share of the limit that it reaches."""
        return 100 * self.limit / self.microseconds


def rows() -> Iterator[Row]:
    """Yield the rows that are predicted: those of the published models, and decoding of few rows and heads."""
    for (batch, length), backward in itertools.product([(32, 1024), (128, 256)], (False, True)):
        yield _attention(batch, length, 64, backward)
    for batch, length in ((64, 1024), (32, 1024), (16, 1024), (11, 1024), (2, 1024), (32, 256)):
        yield _decoding(batch, length, 64)
    for (length, token_dim), op in itertools.product([(1024, 12), (256, 48)], AFFINE):
        yield _affine(1376, length, token_dim, op)
    for backward, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        yield _mixture(64, 32, backward, dtype)


def predict(row: Row) -> Prediction:
    """Compile the kernels of a row for sm_90, and add up what the model says of each."""
    found = {launched.name: launched for launched in launches(TARGETS["sm_90"], row.launch)}
    kernels = {name: _predict_kernel(found[name], row) for name in row.kernels if name in found}
    moving, multiplying = row.bytes / hopper.COPY_RATE, row.operations / hopper.MATRIX_RATE
    limit = 1e6 * max(moving, multiplying)
    taken = sum(kernel.microseconds for kernel in kernels.values())
    return Prediction(round(taken, 2), round(limit, 2), "copy" if moving >= multiplying else "matrix", kernels)


def _predict_kernel(launched: Launched, row: Row) -> Kernel:
    used, (grid, *_) = resources(launched.compiled), launched.grid
    code = hopper.disassemble(launched.compiled.asm["cubin"])
    warps = launched.compiled.metadata.num_warps
    resident = hopper.occupancy(used.registers, warps, used.shared)
    each = math.ceil(grid / hopper.MULTIPROCESSORS)
    simulated = min(each, ENOUGH * resident)
    pattern = TRIPS.get(launched.name, lambda shape, options: [()])(row.shape, launched.options)
    paths = {trips: hopper.unroll(code, trips) for trips in set(pattern)}
    in_turn = itertools.islice(itertools.cycle(pattern), simulated)
    result = hopper.simulate(
        code,
        warps,
        resident,
        (paths[trips] for trips in in_turn),
        # The keys and values of a cache and the operands of maps are read for the first time.
        latency=hopper.L2_LATENCY if row.op.startswith("causal") else hopper.MEMORY_LATENCY,
    )
    busy = {pipe: min(round(100 * cycles / result.cycles), 100) for pipe, cycles in result.busy.items()}
    busy["issue"] = round(100 * result.issued / result.cycles)
    computing, moving = result.cycles * each / simulated / hopper.CLOCK, row.kernels[launched.name] / hopper.COPY_RATE
    return Kernel(
        round(1e6 * max(computing, moving), 2),
        resident,
        used.registers,
        used.spilled,
        dict(sorted(busy.items(), key=lambda item: -item[1])),
        _mix(code, max(pattern)),
    )


def _mix(code: list[hopper.Instruction], trips: tuple[Trips, ...]) -> dict[str, int]:
    """Count the instructions of the loop with the most trips by pipe; of all the code, where there is no loop."""
    found = hopper.find_loops(code)
    first, last = max(zip(trips, found, strict=True))[1] if found else (0, len(code) - 1)
    pipes = Counter(_pipe(instruction) for instruction in code[first : last + 1])
    return dict(sorted(pipes.items(), key=lambda item: -item[1]))


def _pipe(instruction: hopper.Instruction) -> str:
    if instruction.name == "HGMMA":
        return "tensor"
    return hopper.UNITS.get(instruction.name, hopper.OTHER).pipe or "other"


# Trips ----------------------------------------------------------------------------------------------------------------

Pattern = list[tuple[Trips, ...]]


def _along_queries(shape: dict[str, int], options: dict[str, int]) -> Pattern:
    """Tiles of queries, the latest first, over the keys before them; the diagonal crosses the last of these."""
    m, n = options["BLOCK_M"], options["BLOCK_N"]
    return [(Trips((tile + 1) * m // n, m // n),) for tile in reversed(range(math.ceil(shape["N"] / m)))]


def _along_keys(shape: dict[str, int], options: dict[str, int]) -> Pattern:
    """Tiles of keys, the earliest first, over the queries behind them."""
    m, n = options["BLOCK_M"], options["BLOCK_N"]
    return [(Trips(math.ceil((shape["N"] - start) / m), n // m),) for start in range(0, shape["N"], n)]


def _through_the_cache(shape: dict[str, int], options: dict[str, int]) -> Pattern:
    """The splits of a cache that is full but for the new tokens, of which the last takes these too."""
    tiles, splits = math.ceil((shape["N"] - shape["G"]) / options["BLOCK_N"]), options["SPLITS"]
    return [(Trips(math.ceil((tiles - s) / splits)), Trips(int(s == splits - 1))) for s in range(splits)]


def _over_components(loops: int, shape: dict[str, int], options: dict[str, int]) -> Pattern:
    return [(Trips(shape["K"] // options["BLOCK_K"]),) * loops]


TRIPS: dict[str, Callable[[dict[str, int], dict[str, int]], Pattern]] = {
    "causal_attention_forward": _along_queries,
    "causal_attention_backward_queries": _along_queries,
    "causal_attention_backward_keys": _along_keys,
    "decode_attention": _through_the_cache,
    "mixture": partial(_over_components, 1),
    "mixture_backward": partial(_over_components, 2),
}
"""By kernel: the trips through each of its loops, of programs in the order in which they start, over and over."""


# Rows -----------------------------------------------------------------------------------------------------------------


def _attention(batch: int, length: int, head_dim: int, backward: bool) -> Row:
    heads = cases.HEADS
    pairs, size = batch * heads * length * (length + 1) / 2, batch * heads * length * head_dim
    names = ("backward_queries", "backward_keys") if backward else ("forward",)

    def launch() -> None:
        _, gradients = cases.attention("meta", torch.bfloat16, batch, length, head_dim)
        if backward:
            gradients()

    return Row(
        "causal_attention backward" if backward else "causal_attention",
        {"B": batch, "H": heads, "N": length, "D": head_dim},
        torch.bfloat16,
        2 * size * (8 if backward else 4),
        4 * pairs * head_dim * (2.5 if backward else 1),
        # Forward q, k, v and out; of the gradients one kernel reads five and writes dq, one reads four and writes two.
        {f"causal_attention_{name}": 2 * size * (6 if backward else 4) for name in names},
        launch,
    )


def _decoding(batch: int, length: int, head_dim: int) -> Row:
    heads = cases.HEADS
    numbers = batch * heads * head_dim * (2 * length + 4)  # with the new key, value, query and output
    return Row(
        "decode_attention",
        {"B": batch, "H": heads, "N": length, "D": head_dim, "G": 1},
        torch.bfloat16,
        2 * numbers,
        0.0,
        {"decode_attention": 2 * numbers, "merge_splits": 0.0},
        lambda: cases.decoding("meta", torch.bfloat16, batch, 1, head_dim, capacity=length)(),
    )


# By op: its kernel, and how many numbers it moves for each value.
AFFINE = {
    "affine_forward": ("affine", 4),
    "affine_forward backward": ("affine_backward", 6),
    "affine_inverse": ("affine", 4),
}


def _affine(batch: int, length: int, token_dim: int, op: str) -> Row:
    kernel, numbers = AFFINE[op]

    def launch() -> None:
        inverse = op == "affine_inverse"
        _, gradients = cases.affine("meta", torch.float32, batch, length, token_dim, inverse=inverse)
        if kernel == "affine_backward":
            gradients()

    shape = {"B": batch, "N": length, "D": token_dim}
    moved = 4.0 * numbers * math.prod(shape.values())
    return Row(op, shape, torch.float32, moved, 0.0, {kernel: moved}, launch)


def _mixture(batch: int, components: int, backward: bool, dtype: torch.dtype) -> Row:
    kernel, parameters, numbers = ("mixture_backward", 6, 3) if backward else ("mixture", 3, 2)

    def launch() -> None:
        _, gradients = cases.mixture("meta", dtype, batch, components, "elements")
        if backward:
            gradients()

    shape = dict(zip("BCHW", (batch, 3, 32, 16), strict=True))
    moved = float(math.prod(shape.values()) * (dtype.itemsize * parameters * components + 4 * numbers))
    op = "mixture_logistic backward" if backward else "mixture_logistic"
    return Row(op, shape | {"K": components}, dtype, moved, 0.0, {kernel: moved}, launch)


def as_json(found: dict[str, Prediction]) -> dict[str, Any]:
    """Return predictions as a file keeps them."""
    return {
        name: row._asdict() | {"kernels": {kernel: facts._asdict() for kernel, facts in row.kernels.items()}}
        for name, row in found.items()
    }


def show(found: dict[str, Prediction]) -> Iterator[str]:
    """Write predictions as lines of a table."""
    width = max(len(name) for name in found)
    yield f"{'predicted for an H100, not measured':{width}}{'us':>9}{'of limit':>10}"
    for name, row in found.items():
        yield f"{name:{width}}{row.microseconds:9.1f}{row.percent_of_limit:8.0f} % ({row.bound})"
        for kernel, facts in row.kernels.items():
            busiest = ", ".join(f"{pipe} {percent} %" for pipe, percent in list(facts.busy.items())[:3])
            mix = ", ".join(f"{count} {pipe}" for pipe, count in facts.loop.items())
            spilled = f", {facts.spilled} bytes spilled" * (facts.spilled > 0)
            yield f"  {kernel}: {facts.microseconds:.1f} us, {facts.programs} programs at a time{spilled}; {busiest}"
            yield f"    loop: {mix}"
