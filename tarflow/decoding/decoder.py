"""The choice of a decoder for each block of a flow, what parallel passes may lose at most, and what decoders report."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from ..guidance import Guidance
from ..transformer import NO_CONTEXT, CausalTransformer, Context
from .jacobi import cautious_jacobi, jacobi
from .sequential import sequential
from .step import DecodingMemory

__all__ = [
    "DISTANCE",
    "LARGEST_LOSS",
    "NAMES",
    "PASS_COSTS",
    "TOLERANCE",
    "Allowance",
    "BlockStatistics",
    "Decoder",
    "DecoderName",
    "PassCost",
    "ProgressCallback",
    "Timing",
    "choose",
]

DecoderName = Literal["auto", "sequential", "jacobi"]
NAMES: tuple[DecoderName, ...] = get_args(DecoderName)

TOLERANCE = 1e-2
"""Default of the largest difference between a latent and the one asked for; latents have a variance of about one."""

DISTANCE = 40
"""The largest distance of any value of a sample from the sequential decoder's, in multiples of the tolerance.

Measured, not proved: over 90 batches of 16 samples of the trained model that the benchmarks use (3 draws of latents, 5
kinds of guidance, 3 tolerances, 2 windows) the largest was 31, and the root mean square of a batch at most 1.
"""

SEQUENTIAL_HANDICAP = 0.85
"""The sequential decoder's time counts as this share of it: a smaller gain may be noise in the clock of a machine."""


@dataclass(frozen=True)
class Decoder:
    """How blocks are inverted.

    Args:
        name: ``"sequential"``; ``"jacobi"``; or ``"auto"``, for each block the one that a calibration of the model
            found faster on this device, and where there is none, parallel passes for as long as they pay: see
            :class:`~tarflow.decoding.decoder.Allowance`.
        window: the number of tokens of a row that a pass of ``"jacobi"`` updates; None is the whole sequence.
        tolerance: the largest difference between a latent and the one asked for; see :mod:`tarflow.decoding`. It is 0
            for the sequential decoder; for the others None is :data:`TOLERANCE`.

    Raises:
        ValueError: an unknown name, a window that is not positive, a negative tolerance, or one of these with a decoder
            that has no use for it.
    """

    name: DecoderName = "auto"
    window: int | None = None
    tolerance: float = None  # type: ignore[assignment]  # it is a number once the decoder is made

    def __post_init__(self):
        if self.name not in NAMES:
            raise ValueError(f"decoder: expected one of {', '.join(NAMES)}; got {self.name!r}")
        if self.window is not None and self.name != "jacobi":
            raise ValueError(f"window: expected none with the {self.name} decoder, only with jacobi; got {self.window}")
        if self.window is not None and (not isinstance(self.window, Integral) or self.window < 1):
            raise ValueError(f"window: expected at least 1; got {self.window}")
        if self.tolerance is None:
            object.__setattr__(self, "tolerance", 0.0 if self.name == "sequential" else TOLERANCE)
        if not isinstance(self.tolerance, Real) or not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"tolerance: expected a finite number >= 0; got {self.tolerance}")
        if self.tolerance and self.name == "sequential":
            raise ValueError(f"tolerance: expected none with the sequential decoder; got {self.tolerance}")

    @classmethod
    def of(cls, decoder: "str | Decoder") -> "Decoder":
        """Return a decoder unchanged, or make the one of that name."""
        return decoder if isinstance(decoder, Decoder) else cls(cast(Any, decoder))

    def __call__(
        self,
        transformer: CausalTransformer,
        z: Tensor,
        context: Context = NO_CONTEXT,
        guidance: Guidance | None = None,
        memory: DecodingMemory | None = None,
        allowance: "Allowance | None" = None,
    ) -> tuple[Tensor, int]:
        """Decode latents ``(B, N, D)`` to tokens, both in generation order; also return the number of passes.

        The first token is known: it is its own latent. The ``context`` is that of each sample in each branch of
        guidance.

        The ``memory`` is that of other blocks, if they are to share it, and so is the ``allowance``,
        without which ``auto`` is sequential.
        """
        if self.name == "jacobi":
            return jacobi(transformer, z, context, guidance, self.window, self.tolerance, memory)
        if self.name == "auto" and allowance is not None:
            return cautious_jacobi(transformer, z, context, guidance, self.tolerance, allowance, memory)
        return sequential(transformer, z, context, guidance, memory)

    def __str__(self) -> str:
        return self.name if self.window is None else f"{self.name}, window {self.window}"


@dataclass(frozen=True)
class BlockStatistics:
    """The cost of inverting a block: ``passes`` of its transformer, where the sequential decoder takes ``steps``."""

    block: int
    decoder: Decoder
    batch: int
    passes: int
    steps: int


ProgressCallback = Callable[[BlockStatistics], None]
"""A function that is called after every block."""


@dataclass(frozen=True)
class Timing:
    """The time that one decoder takes for one block of a model at one number of rows.

    Attributes:
        device, dtype: name of the device, and precision of the layers.
        rows: samples times the branches of guidance.
        block: index of the block.
        decoder, window: name and window of a :class:`tarflow.Decoder`.
        passes: passes of the transformer.
        seconds: time of all passes together.

    Raises:
        ValueError: a value of another type, a number out of its range, a decoder that does not exist.
    """

    device: str
    dtype: str
    rows: int
    block: int
    decoder: DecoderName
    window: int | None
    passes: int
    seconds: float

    def __post_init__(self):
        for name in ("device", "dtype"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}: expected a name; got {getattr(self, name)!r}")
        window = 1 if self.window is None else self.window
        counts = ("rows", self.rows, 1), ("block", self.block, 0), ("window", window, 1), ("passes", self.passes, 0)
        for name, value, least in counts:
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: expected an integer >= {least}; got {value!r}")
        if self.decoder not in ("sequential", "jacobi"):
            raise ValueError(f"decoder: expected sequential or jacobi; got {self.decoder!r}")
        Decoder(self.decoder, self.window)
        if type(self.seconds) not in (int, float) or not 0 <= self.seconds < math.inf:
            raise ValueError(f"seconds: expected a finite number >= 0; got {self.seconds!r}")


@dataclass(frozen=True)
class PassCost:
    """The time of a pass over G tokens of each row, in steps of the sequential decoder: ``fixed + per_token * G``.

    Attributes:
        rows: the largest number of rows that it is for: samples times the branches of guidance.
    """

    rows: int
    fixed: float
    per_token: float

    def of(self, window: int) -> float:
        """Return the time of a pass over a window."""
        return self.fixed + self.per_token * window


PASS_COSTS = {
    ("cpu", "float32"): (PassCost(1, 3.6, 0.046), PassCost(2, 3.6, 0.066), PassCost(4, 3.6, 0.12)),
}
"""Costs of passes by kind of device, precision of the layers and rows, for affine maps, where passes may pay.

They are no less than any that ``python benchmarks/pass_costs.py`` measured of three sizes of a block, in windows of 16,
64 and 195 tokens, on two cores of an Intel Xeon: 4.2, 5.7 and 12.5 steps at most for one row, 4.1, 7.0 and 16.2 for
two, 5.0, 10.3 and 26.5 for four. Of no other device is anything known yet.
"""

LARGEST_LOSS = 0.05
"""The share of its time that decoding may lose to parallel passes that do not pay."""

PATIENCE = 6
"""Passes after which a window is expected to agree: the blocks of a trained model take four to seven."""

SHORTEST_WINDOW = 16


class Allowance:
    """The time that parallel passes may still lose while a flow is decoded, in steps of the sequential decoder.

    Where blocks differ in size, these are steps of the average block.

    It begins with :data:`LARGEST_LOSS` of all steps. A pass takes from it what it costs, and gives to it the tokens
    that it has brought in every row, each of which saves a step. No pass is run that could leave it below zero, and so
    decoding never takes longer than sequentially by more than that share, whatever the weights, if passes cost what
    :data:`PASS_COSTS` says. What is saved may be staked again, on longer windows and in the blocks that follow. No
    clock is asked: the same latents are decoded by the same passes.

    Attributes:
        left: what may still be lost.
        step_cost: the time of a step of the block at hand, in that of the average block; whoever decodes sets it.
    """

    def __init__(self, cost: PassCost, num_blocks: int, steps: int):
        self.cost = cost
        self.steps = steps
        self.left = LARGEST_LOSS * num_blocks * steps
        self.step_cost = 1.0

    @classmethod
    def for_flow(cls, weight: Tensor, rows: int, num_blocks: int, steps: int) -> "Allowance | None":
        """Return the allowance of blocks with so many steps each; None where parallel passes are not expected to pay.

        The ``weight`` is any of the layers, whose device and dtype count, unless an autocast is in force.
        """
        costs = PASS_COSTS.get((weight.device.type, _precision(weight)), ())
        cost = next((cost for cost in costs if 0 < rows <= cost.rows), None)
        return None if cost is None else cls(cost, num_blocks, steps)

    @property
    def suffices(self) -> bool:
        """Whether a block can begin with a parallel pass."""
        return self.window(self.steps) > 0

    def window(self, remaining: int, before: int = 0) -> int:
        """Return how many of the remaining tokens the next pass is over, 0 for none.

        A window is as long as :data:`PATIENCE` passes over it can be paid for, and no shorter than the one before,
        which may be about to agree.
        """
        left = self.left / self.step_cost
        payable = int((left / PATIENCE - self.cost.fixed) / self.cost.per_token)
        window = min(max(payable, before), remaining)
        is_payable = self.cost.of(window) - 1 <= left
        return window if is_payable and window >= min(SHORTEST_WINDOW, remaining) else 0

    def settle(self, window: int, tokens: int) -> None:
        """Take account of a pass over a window that has brought so many tokens in every row."""
        self.left += self.step_cost * (tokens - self.cost.of(window))


def choose(
    timings: Iterable[Timing],
    decoder: Decoder,
    block: int,
    rows: int,
    weight: Tensor,
    allowance: Allowance | None = None,
) -> Decoder:
    """Choose the decoder that ``auto`` stands for: the fastest for a block, as timed on this device in this precision.

    The timings of the next larger number of rows count, since parallel passes gain least on large batches. Beyond all
    of them, or where nothing was timed, it stays ``auto``, parallel passes within an allowance, if there is one that
    suffices, or else is the sequential decoder. Decoders other than ``auto`` are returned unchanged.

    Args:
        weight: any weight of the layers, whose device and dtype count, unless an autocast is in force.
    """
    if decoder.name != "auto":
        return decoder
    place = *device_and_precision(weight), block
    known = [t for t in timings if (t.device, t.dtype, t.block) == place and t.rows >= rows]
    if not known:
        return decoder if allowance is not None and allowance.suffices else Decoder("sequential")
    nearest = min(timing.rows for timing in known)
    best = min((timing for timing in known if timing.rows == nearest), key=_handicapped_seconds)
    if best.decoder == "sequential":
        return Decoder("sequential")
    return Decoder("jacobi", best.window, decoder.tolerance)


def device_and_precision(weight: Tensor) -> tuple[str, str]:
    """Name the device and the precision of the layers for which timings hold, as decoding would run them now."""
    device = weight.device
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"{device.type}, {torch.get_num_threads()} threads"
    return name, _precision(weight)


def _precision(weight: Tensor) -> str:
    autocast = torch.is_autocast_enabled(weight.device.type)
    dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
    return str(dtype).removeprefix("torch.")


def _handicapped_seconds(timing: Timing) -> float:
    return timing.seconds * (SEQUENTIAL_HANDICAP if timing.decoder == "sequential" else 1)
