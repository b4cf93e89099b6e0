"""Timing the decoders on every block of a model, and the file that keeps the timings beside its weights.

Decoders are timed as they are, on latents as they come, so that no cost model has to be right. The choice of ``auto``
is then a table lookup (:func:`tarflow.decoding.decoder.choose`): the same calibration gives the same samples, whatever
else the machine is doing.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..files import atomic_write
from ..guidance import Guidance
from .decoder import TOLERANCE, Decoder, Timing, device_and_precision
from .step import count_branches

if TYPE_CHECKING:
    from ..flow import Block, TokenFlow
    from ..transformer import Condition

__all__ = ["BATCHES", "FILE", "Timing", "calibrate", "load", "save", "time_block", "write"]

WINDOWS = (16, 64, 256, None)
BATCHES = (1, 4, 16, 64)
FILE = "calibration.json"
ROUNDS = 3
HOPELESS = 1.5
"""A decoder that takes so many times longer than the sequential one is not tried on larger batches."""


@torch.inference_mode()
def calibrate(
    flow: "TokenFlow",
    guidance: Guidance | None = None,
    tolerance: float = TOLERANCE,
    batches: Iterable[int] = BATCHES,
    progress: Callable[[Timing], None] = lambda timing: None,
    rounds: int = ROUNDS,
    seconds: float = math.inf,
    noise_level: float | None = None,
) -> list[Timing]:
    """Time every decoder on every block of a :class:`tarflow.TokenFlow`, under the autocast in force.

    Args:
        flow: the flow.
        guidance: that of the samples to come; it changes how far a block depends on distant tokens.
        tolerance: that of the Jacobi decoder.
        batches: numbers of samples.
        progress: a function that is called with each timing.
        rounds: how often each decoder is timed; the best time counts.
        seconds: time for all of it. A batch, and all that are larger, are left out if they would take longer than is
            left, at the time per image of the one before; the smallest is never left out.
        noise_level: that of the samples to come, for a flow that takes one.
    """
    began = time.perf_counter()
    device = flow.prior_variance.device
    sequential = Decoder("sequential")
    windows = [window for window in WINDOWS if window is None or window < flow.num_steps]
    parallel = [Decoder("jacobi", window, tolerance) for window in windows]
    promising = dict.fromkeys(range(len(flow.blocks)), parallel)
    timings = []
    per_image = 0.0
    for batch in sorted(batches):
        batch_began = time.perf_counter()
        if per_image * batch > seconds - (batch_began - began):
            break
        tokens = flow.sample_prior(batch, torch.Generator(device).manual_seed(0))
        labels = torch.arange(batch, device=device) % flow.num_classes if flow.num_classes else None
        condition = flow.condition(labels, noise_level, tokens)
        block: Any
        for t, block in reversed(list(enumerate(flow.blocks))):
            guided = guidance and block.guided(guidance, len(flow.blocks) - 1 - t)
            rows, decoders = batch * count_branches(guided), (sequential, *promising[t])
            branches = flow.branches(condition, guided)
            # In turn, since the speed of a machine drifts.
            runs = [{d: time_block(block, tokens, branches, guided, d) for d in decoders} for _ in range(rounds)]
            best = {d: min(taken for _, _, taken in (run[d] for run in runs)) for d in decoders}
            place = device_and_precision(block.transformer.proj_in.weight)
            for decoder in decoders:
                _, passes, _ = runs[0][decoder]
                timings.append(Timing(*place, rows, t, decoder.name, decoder.window, passes, best[decoder]))
                progress(timings[-1])
            promising[t] = [d for d in promising[t] if best[d] <= HOPELESS * best[sequential]]
            tokens, _, _ = runs[0][sequential]
        per_image = (time.perf_counter() - batch_began) / batch
    return timings


def time_block(
    block: "Block",
    tokens: Tensor,
    branches: Sequence["Condition"],
    guidance: Guidance | None,
    decoder: Decoder,
) -> tuple[Tensor, int, float]:
    """Invert a block; return its tokens, the passes and the seconds that it took."""
    _synchronize(tokens.device)
    began = time.perf_counter()
    decoded, passes = block.inverse(tokens, branches, guidance, decoder)
    _synchronize(tokens.device)
    return decoded, passes, time.perf_counter() - began


def load(folder: Path) -> tuple[Timing, ...]:
    """Read the timings that lie in the folder of a model; none where there is no such file.

    Raises:
        ValueError: the file is not a calibration.
    """
    path = folder / FILE
    if not path.exists():
        return ()
    try:
        rows = json.loads(path.read_text())
        if not isinstance(rows, list):
            raise ValueError(f"a list; got {type(rows).__name__}")
        return tuple(Timing(**row) for row in rows)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: expected what `tarflow calibrate` writes; {error}") from error


def save(folder: Path, timings: Sequence[Timing]) -> None:
    """Write timings into the folder of a model, in place of earlier ones of the same device and precision."""
    new = {(timing.device, timing.dtype) for timing in timings}
    kept = [timing for timing in load(folder) if (timing.device, timing.dtype) not in new]
    write(folder, (*kept, *timings))


def write(folder: Path, timings: Sequence[Timing]) -> None:
    """Write timings into the folder of a model, in place of all earlier ones; without any, remove the file."""
    if not timings:
        (folder / FILE).unlink(missing_ok=True)
        return
    with atomic_write(folder / FILE) as path:
        path.write_text(json.dumps([asdict(timing) for timing in timings], indent=1) + "\n")


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
