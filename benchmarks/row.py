"""A row, which is an op at a shape, and its contenders, which are the ways to do it."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("triton", "torch")
UNCALIBRATED = "auto, uncalibrated"
DECODERS = ("auto", "jacobi", "jacobi, window 64", "sequential")
TIGHT = "jacobi, tolerance 1e-5"
# A user of the device gets the first of these that runs there.
USUAL = (*BACKENDS, "auto", "accelerated", "sequential")
OURS = (*BACKENDS, *DECODERS, UNCALIBRATED, TIGHT, "compiled torch", "compiled", "accelerated")

# A contender returns tensors, or lists of tensors that are compared as one.
Outputs = tuple[Tensor | list[Tensor], ...]
Run = Callable[[], Outputs]


@dataclass(frozen=True)
class Contender:
    """One way to do the work of a row: ``prepare(inputs)``, untimed, returns what is timed.

    Attributes:
        context: the context manager that it runs in.
        graph: whether a CUDA graph can hold it, that is, whether it never waits for the device.
        allowance: the relative error that it may have beside that of rounding.
        facts: more to record, from what ``prepare`` returned, once that ran.
    """

    prepare: Callable[[Any], Run]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    graph: bool = True
    allowance: float = 0.0
    facts: Callable[[Run], dict[str, Any]] = lambda run: {}


@dataclass(frozen=True, eq=False)
class Row:
    """One op at one shape.

    Attributes:
        op, model, shape, dtype: together they name the row.
        bytes, operations: the least that one run has to move and to compute.
        contenders: the ways to do it, by name.
        draw: the random inputs that all contenders share, on a device.
        expect: computes the outputs in ``exact``, a higher precision.
        plain: the contender whose error is that of plain torch in low precision; others are judged by it.
        launches: how many calls of the op a run makes; times and costs are reported per call.
        flush, graph: whether a GPU starts from a cold L2, and whether it replays a CUDA graph.
        rounds: how often a contender is timed at least, however long it takes.
        images: how many images a run of a whole model makes.
        note: a remark for the reader of the results.
    """

    op: str
    model: str
    shape: dict[str, int]
    dtype: torch.dtype
    bytes: float
    operations: float
    contenders: dict[str, Contender]
    draw: Callable[[torch.device], Any]
    expect: Callable[[Any], Outputs]
    exact: str = "float64"
    plain: str = "reference"
    launches: int = 1
    flush: bool = True
    graph: bool = False
    rounds: int = 3
    images: int = 0
    note: str = ""

    @cached_property
    def name(self) -> str:
        """Name the row, such as ``causal_attention, ImageNet64 patch 4, B=128 H=12 N=256 D=64, bfloat16``."""
        sizes = " ".join(f"{key}={value}" for key, value in self.shape.items())
        return f"{self.op}, {self.model}, {sizes}, {str(self.dtype).removeprefix('torch.')}"
