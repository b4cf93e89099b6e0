"""Rows of Jacobi decoders: GS-Jacobi's code beside ours, on the trained flow, by passes, time and distance.

GS-Jacobi (arXiv 2505.12849) cuts the tough blocks into segments, decodes these in turn, each by Jacobi iteration, and
the other blocks as one. An iteration ends after a fixed number of passes, or where the norm of the change of the whole
batch, over B D, is below 1e-6; iterates are clamped to [-3, 3]. Its settings are four numbers, [Stack-GS-J-Else]: which
blocks are tough, their segments, and the most passes of a segment and of another block. The paper picks them by hand;
here all of its settings of a tough block run, and what tells the tough blocks and the first guesses is its own
measurement of their difficulty.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import checkout
import eager
import models
import sampling
from row import DECODERS, TIGHT, Contender, Outputs, Row
from tarflow import Decoder, Guidance, TarFlow
from tarflow.datasets import load
from tarflow.decoding import DISTANCE
from tarflow.decoding.step import CachedStep, count_branches
from tarflow.flow import Block
from tarflow.model import patchify
from tarflow.transformer import Condition

OPS = {"Jacobi decoders, guided": models.GUIDANCE, "Jacobi decoders, not guided": None}
# The published settings of a tough block: passes of a segment, passes of another block.
PUBLISHED = {"ImageNet64, patch 4": (13, 6), "ImageNet128, AFHQ": (32, 10), "ImageNet64, patch 2": (32, 20)}
SEGMENTS = 8
IMAGES = 200
TIGHT_TOLERANCE = 1e-5


def gs_jacobi_rows(device: torch.device) -> list[Row]:
    """List the rows of a CPU; nobody has asked a GPU yet."""
    return [jacobi_row(op, batch) for op in OPS for batch in (1, 16)] if device.type == "cpu" else []


def jacobi_row(op: str, batch: int) -> Row:
    """Compare all decoders, ours and theirs, on a batch, of which every sample counts."""
    subject, guidance = sampling.TRAINED, OPS[op]
    row = sampling.sampling_row(subject, batch, guidance, ("sequential",))

    def draw(device: torch.device) -> Inputs:
        model = subject.make(device).requires_grad_()
        return Inputs(model, *models.latents_and_labels(model, batch), guidance, torch.float32, row.rounds)

    contenders = _ours() | _theirs()
    return replace(row, op=op, contenders=contenders, draw=draw, expect=lambda inputs: (inputs.exact,), exact="float64")


# Contenders -----------------------------------------------------------------------------------------------------------


class Inputs(sampling.Inputs):
    """A model and its latents, of which all are compared."""

    def checked(self) -> slice:
        """Choose all samples."""
        return slice(None)

    @functools.cached_property
    def exact(self) -> Tensor:
        """The tokens by eager code in float64."""
        return eager.inverse(copy.deepcopy(self.model).double().flow, self.z.double(), self.labels, self.guidance)


def _ours() -> dict[str, Contender]:
    def decoding(decoder: Decoder, prepare: Any = None) -> Contender:
        prepare = prepare or partial(sampling.Decoding, decoder)
        allowance = max(DISTANCE * decoder.tolerance, sampling.CHANCE)
        return Contender(prepare, allowance=allowance, facts=partial(facts, trace_ours))

    auto, whole, window, sequential = DECODERS
    return {
        auto: decoding(Decoder("auto"), sampling.calibrated),
        whole: decoding(Decoder("jacobi")),
        window: decoding(Decoder("jacobi", 64)),
        TIGHT: decoding(Decoder("jacobi", None, TIGHT_TOLERANCE)),
        sequential: decoding(Decoder("sequential")),
    }


def _theirs() -> dict[str, Contender]:
    """List published settings, and for comparison one segment until nothing changes, and one token after the other."""
    limits = {f"GS-Jacobi {most}-{other}, of {of}": (SEGMENTS, most, other) for of, (most, other) in PUBLISHED.items()}
    limits |= {"GS-Jacobi's Jacobi": (1, math.inf, math.inf), "GS-Jacobi's sequential": (0, 1, 1)}
    return {
        name: Contender(
            partial(GSJacobi, *of),
            # How far an iteration is off is what is asked.
            allowance=math.inf if of[0] else sampling.CHANCE,
            facts=partial(facts, trace_theirs),
        )
        for name, of in limits.items()
    }


class GSJacobi:
    """Their decoder at work.

    Args:
        segments: the most segments of a tough block; 0 is one token after the other in all blocks.
        most, other: the most passes of a segment, and of another block.
        inputs: what is decoded.
    """

    def __init__(self, segments: int, most: float, other: float, inputs: Inputs):
        config = inputs.model.config
        self.inputs = inputs
        self.theirs = build(inputs.model)
        self.difficulty = difficulty_of_trained()
        last = config.num_tokens - 1
        cut = largest_divisor(config.num_tokens, segments)
        tough = self.difficulty.tough
        self.options = {
            "num_GS_list": [cut if is_tough or not cut else 1 for is_tough in tough],
            "max_jacobi_list": [min(most if is_tough else other, last) for is_tough in tough],
            "guess_list": self.difficulty.guesses,
        }

    def __call__(self) -> Outputs:
        """Decode."""
        images = self.sample()
        return (patchify(images, self.inputs.model.config.patch_size),)

    def sample(self, **options: Any) -> Any:
        """Turn the latents into images."""
        inputs = self.inputs
        return checkout.sample(self.theirs, inputs.z, inputs.labels, inputs.guidance, **self.options, **options)


def build(model: TarFlow, **options: Any) -> nn.Module:
    """Build their model with the weights of ours."""
    config = model.config
    names = "patch_size", "channels", "num_blocks", "layers_per_block", "num_classes"
    sizes = {name: getattr(config, name) for name in names}
    return checkout.with_weights(checkout.GS_JACOBI, model, **sizes, **options)


def largest_divisor(tokens: int, most: int) -> int:
    """Return in how many segments, at most, a sequence is cut: tokens that equal ones leave over are never decoded.

    >>> largest_divisor(196, 8), largest_divisor(256, 8), largest_divisor(196, 0)
    (7, 8, 0)
    """
    return max((number for number in range(1, most + 1) if tokens % number == 0), default=0)


# Difficulty -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difficulty:
    """What their code measures of blocks, as they are generated.

    Attributes:
        convergence: the share of each block in the sum of the convergence ranking metric.
        guesses: whether zeros are a better first guess than the latents, by the initial guessing metric: 1 or 0.
    """

    convergence: list[float]
    guesses: list[int]

    @property
    def tough(self) -> list[bool]:
        """Which blocks have more than an equal share: so have those that the paper cuts, but for one of six."""
        return [share > 1 / len(self.convergence) for share in self.convergence]


def measure_difficulty(theirs: nn.Module, images: Tensor) -> Difficulty:
    """Run their model in its mode of detection over clean images without labels, as their program does."""
    with torch.no_grad():
        *_, guessing, ranking = theirs(images, None)
    metric = [float(block[3]) for block in reversed(ranking)]
    return Difficulty(
        [value / sum(metric) for value in metric], [int(zeros < latents) for latents, zeros in reversed(guessing)]
    )


@functools.cache
def difficulty_of_trained() -> Difficulty:
    """Measure the blocks of the trained model on images of its training."""
    pixels, _ = load("fashion-mnist", "train").get_batch(range(IMAGES))
    theirs = build(sampling.TRAINED.make(torch.device("cpu")), detect_mode=True)
    return measure_difficulty(theirs, pixels.float() / 127.5 - 1)


# What is found --------------------------------------------------------------------------------------------------------


@dataclass
class Trace:
    """The tokens after each block, what they took, and by which settings.

    Attributes:
        frames: the tokens after each block.
        passes: those of each block.
        tokens: how many went through the layers of a block, of all blocks, on average over the rows.
        settings: what is to be recorded beside.
    """

    frames: list[Tensor]
    passes: list[int]
    tokens: float
    settings: dict[str, Any] = field(default_factory=dict)


def facts(trace: Callable[[Any], Trace], run: Any) -> dict[str, Any]:
    """Decode once more, watched; return passes, tokens and distances."""
    inputs, found = run.inputs, trace(run)
    steps = inputs.model.config.num_tokens - 1
    latents = torch.cat([error.flatten() for error in latent_errors(inputs, found.frames)])
    return {
        "passes": sum(found.passes),
        "steps": steps * len(found.passes),
        "by_block": [f"{passes}/{steps}" for passes in found.passes],
        "tokens": found.tokens,
        "latents": _max_and_rms(latents),
        "pixels": _max_and_rms(found.frames[-1].double() - inputs.exact),
        **found.settings,
    }


def trace_ours(run: sampling.Decoding) -> Trace:
    """Watch a decoder of ours."""
    inputs, flow, passes = run.inputs, run.inputs.model.flow, []
    flow.calibration = run.calibration
    with counted_tokens() as tokens:
        decoded = flow.trajectory(inputs.z, inputs.labels, inputs.guidance, run.decoder, passes.append)
        frames = list(decoded)
    return Trace(frames, [block.passes for block in passes], sum(tokens) / _rows(inputs))


@contextmanager
def counted_tokens() -> Iterator[list[int]]:
    """Collect how many tokens each of our passes is over, those of all rows."""
    counts: list[int] = []
    run_layers = CachedStep.run_layers

    def counted(step: CachedStep, h: Tensor) -> Any:
        counts.append(h.shape[0] * h.shape[1])
        return run_layers(step, h)

    with patch.object(CachedStep, "run_layers", counted):
        yield counts


def trace_theirs(run: GSJacobi) -> Trace:
    """Watch their decoder: each pass ends with a projection, once in each branch of guidance."""
    inputs, blocks = run.inputs, list(reversed(run.theirs.blocks))
    counts: list[list[int]] = [[] for _ in blocks]

    def count(number: int, module: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        counts[number].append(given[0].shape[0] * given[0].shape[1])

    handles = [block.proj_out.register_forward_hook(partial(count, number)) for number, block in enumerate(blocks)]
    _, *images = run.sample(return_sequence=True)
    for handle in handles:
        handle.remove()
    frames = [patchify(after, inputs.model.config.patch_size) for after in images]
    passes = [len(of_block) // count_branches(inputs.guidance) for of_block in counts]
    settings = {"convergence": run.difficulty.convergence, **run.options}
    return Trace(frames, passes, sum(map(sum, counts)) / _rows(inputs), settings)


def latent_errors(inputs: Inputs, frames: list[Tensor]) -> Iterator[Tensor]:
    """Yield by how much the latents that lead to the tokens after a block differ from those that it was given."""
    blocks = reversed(copy.deepcopy(inputs.model).double().flow.blocks)
    for block, before, after in zip(blocks, [inputs.z, *frames], frames, strict=False):
        yield latents_of(block, after.double(), inputs.labels, inputs.guidance) - before


@torch.no_grad()
def latents_of(block: Block, x: Tensor, labels: Tensor, guidance: Guidance | None) -> Tensor:
    """Map tokens to the latents from which the guided block makes them."""
    x = x.flip(1) if block.reverse else x
    mu, alpha = (parameter[:, :-1] for parameter in block.transformer(x, Condition(labels)))
    if guidance is not None:
        dropped = block.transformer(x, Condition(torch.full_like(labels, -1)))
        weights = guidance.weights(x.shape[1])[1:, None]
        mu, alpha = (v + weights * (v - ref[:, :-1]) for v, ref in zip((mu, alpha), dropped, strict=True))
    z = torch.cat((x[:, :1], (x[:, 1:] - mu) * torch.exp(-alpha)), dim=1)
    return z.flip(1) if block.reverse else z


def _max_and_rms(error: Tensor) -> dict[str, float]:
    return {"max": error.abs().max().item(), "rms": error.square().mean().sqrt().item()}


def _rows(inputs: Inputs) -> int:
    return len(inputs.z) * count_branches(inputs.guidance)
