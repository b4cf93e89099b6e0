"""What ``auto`` goes by: how long each block of a model takes on a device, by each decoder, at a few batch sizes.

Decoders are timed as they are, on latents as they come, so that no cost model has to be right. A choice is then a table
lookup: the same calibration gives the same samples, whatever else the machine is doing.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files import replacing
from ..guidance import Guidance
from . import TOLERANCE, Decoder
from .branches import count_branches

_SEQUENTIAL = Decoder("sequential")
WINDOWS = (16, 64, 256, None)
BATCHES = (1, 4, 16, 64)
FILE = "calibration.json"
# So much faster than the sequential decoder another has to be: less may be the noise of a busy machine's clock.
_GAIN = 0.85
_ROUNDS = 3
# A decoder that takes so many times longer than the sequential one need not be tried on a larger batch.
_HOPELESS = 1.5


@dataclass(frozen=True)
class Timing:
    """A block, decoded once.

    Attributes:
        device, dtype: its name, and the precision of the layers.
        rows: samples times the branches of guidance.
        block: its index.
        decoder, window: of a :class:`tarflow.Decoder`.
        passes: of the transformer.
        seconds: all of them together.

    Raises:
        ValueError: a value of another type, a number out of its range, a decoder that does not exist.
    """

    device: str
    dtype: str
    rows: int
    block: int
    decoder: str
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


def choose(timings: Iterable[Timing], decoder: Decoder, block: int, rows: int, weight: Tensor) -> Decoder:
    """What ``auto`` stands for: the fastest decoder of a block, as timed on this device in this precision.

    What counts is the next larger number of rows that was timed, since parallel passes gain least on large batches;
    beyond all of them, or where nothing was timed, it is the sequential decoder. Others stand for themselves.

    Args:
        weight: any of the layers, whose device and dtype are meant, unless there is an autocast in force.
    """
    if decoder.name != "auto":
        return decoder
    place = *_place(weight), block
    known = [t for t in timings if (t.device, t.dtype, t.block) == place and t.rows >= rows]
    if not known:
        return _SEQUENTIAL
    nearest = min(timing.rows for timing in known)
    best = min((timing for timing in known if timing.rows == nearest), key=_seconds_to_beat)
    return _SEQUENTIAL if best.decoder == "sequential" else Decoder("jacobi", best.window, decoder.tolerance)


def _seconds_to_beat(timing: Timing) -> float:
    return timing.seconds * (_GAIN if timing.decoder == "sequential" else 1)


@torch.inference_mode()
def calibrate(
    flow,
    guidance: Guidance | None = None,
    tolerance: float = TOLERANCE,
    batches: Iterable[int] = BATCHES,
    report: Callable[[Timing], None] = lambda timing: None,
) -> list[Timing]:
    """Time every decoder on every block of a :class:`tarflow.TokenFlow`, under the autocast in force.

    Args:
        guidance: that of the samples to come; it changes how far a block depends on distant tokens.
        tolerance: of the Jacobi decoder.
        batches: numbers of samples.
        report: called with each timing.
    """
    device, num_tokens = flow.prior_variance.device, len(flow.prior_variance)
    windows = [window for window in WINDOWS if window is None or window < num_tokens - 1]
    parallel = [Decoder("jacobi", window, tolerance) for window in windows]
    promising = dict.fromkeys(range(len(flow.blocks)), parallel)
    timings = []
    for batch in sorted(batches):
        tokens = flow.sample_prior(batch, torch.Generator(device).manual_seed(0))
        labels = torch.arange(batch, device=device) % flow.num_classes if flow.num_classes else None
        rows = batch * count_branches(guidance)
        for t, block in reversed(list(enumerate(flow.blocks))):
            decoders = _SEQUENTIAL, *promising[t]
            # In turn, since the speed of a machine drifts.
            rounds = [{d: _timed(block, tokens, labels, guidance, d) for d in decoders} for _ in range(_ROUNDS)]
            seconds = {d: min(taken for _, _, taken in (runs[d] for runs in rounds)) for d in decoders}
            for decoder in decoders:
                _, passes, _ = rounds[0][decoder]
                place = _place(block.transformer.proj_in.weight)
                timings.append(Timing(*place, rows, t, decoder.name, decoder.window, passes, seconds[decoder]))
                report(timings[-1])
            promising[t] = [d for d in promising[t] if seconds[d] <= _HOPELESS * seconds[_SEQUENTIAL]]
            tokens, _, _ = rounds[0][_SEQUENTIAL]
    return timings


def load(folder: Path) -> tuple[Timing, ...]:
    """What was stored beside a checkpoint, if anything.

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
    """Store timings beside a checkpoint, in place of earlier ones of the same device and precision."""
    new = {(timing.device, timing.dtype) for timing in timings}
    kept = [timing for timing in load(folder) if (timing.device, timing.dtype) not in new]
    replace(folder, (*kept, *timings))


def replace(folder: Path, timings: Sequence[Timing]) -> None:
    """Store timings beside a checkpoint in place of all that is there: with none of them, nothing stays."""
    if not timings:
        (folder / FILE).unlink(missing_ok=True)
        return
    with replacing(folder / FILE) as path:
        path.write_text(json.dumps([asdict(timing) for timing in timings], indent=1) + "\n")


def _place(weight: Tensor) -> tuple[str, str]:
    """The device and the precision of the layers that timings hold for, as decoding would run them now."""
    device = weight.device
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"{device.type}, {torch.get_num_threads()} threads"
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
    return name, str(dtype).removeprefix("torch.")


def _timed(block, tokens, labels, guidance, decoder):
    _synchronize(tokens.device)
    began = time.perf_counter()
    decoded, passes = block.inverse(tokens, labels, guidance, decoder)
    _synchronize(tokens.device)
    return decoded, passes, time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
