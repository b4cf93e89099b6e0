"""Rows of sampling: latents to tokens, guided and not, by our decoders, by eager code and by the published code.

The limit of a row is that of sequential decoding: a step of a block with L layers of width C over R rows reads 12 L C^2
weights once and, at position n, 2 L R n C elements of cache once. A parallel pass reads them once for many tokens, so
that it may go beyond.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import checkout
import eager
from models import (
    GUIDANCE,
    afhq256,
    autocast,
    build,
    fashion_mnist,
    imagenet64,
    imagenet128,
    latents_and_labels,
    step_bytes,
    trained,
    trained_config,
)
from row import DECODERS, UNCALIBRATED, Contender, Outputs, Row
from tarflow import Decoder, Guidance, TarFlow, TarFlowConfig
from tarflow.decoding import DISTANCE, TOLERANCE, BlockStatistics
from tarflow.decoding.calibration import Timing, calibrate
from tarflow.model import patchify
from tarflow.training.throughput import operations

OTHERS = ("eager", "published")
# About so many samples of a batch are checked.
CHECKED = 4


@dataclass(frozen=True)
class Subject:
    """A model that draws samples, and a remark for the reader of the results."""

    name: str
    config: TarFlowConfig
    make: Callable[[torch.device], TarFlow]
    note: str = ""


def _random(name: str, config: TarFlowConfig, note: str = "") -> Subject:
    return Subject(name, config, partial(build, config), note)


TRAINED = Subject("Fashion-MNIST 2-128-4-2, trained", trained_config(), trained)


def _chaotic() -> Subject:
    """Build a model in which every token depends so strongly on the one before that no guess is any good.

    It shows what parallel passes lose where they never pay. Tokens cannot run away: their scale is fixed, and they
    reach mu through norms alone.
    """
    config = trained_config()

    def make(device: torch.device) -> TarFlow:
        model = build(config, device)
        for block in model.flow.blocks:
            transformer = block.transformer
            alpha, mu = transformer.proj_out.weight.data.chunk(2)
            alpha.zero_()
            mu.mul_(300)
            first = transformer.proj_in.weight, transformer.proj_in.bias, transformer.pos_embed, transformer.class_embed
            for parameter in first:
                parameter.data.mul_(0.01)
        return model

    return Subject("28x28 patch 2, chaotic", config, make, "every token depends strongly on the one before")


def sampling_rows(device: torch.device) -> list[Row]:
    """List the rows of a device; what is asked for first comes first, and what takes longest last."""
    return _gpu_rows() if device.type == "cuda" else _cpu_rows()


def _cpu_rows() -> list[Row]:
    """Sample in float32; from random weights, whose passes say nothing, as a user would."""
    random = _random("28x28 patch 4, random", fashion_mnist(4))
    few = "auto", UNCALIBRATED, "sequential"
    every, some = (*DECODERS, UNCALIBRATED, *OTHERS), (*few, *OTHERS)
    return [
        *(sampling_row(TRAINED, batch, guidance, every) for guidance in (GUIDANCE, None) for batch in (1, 16)),
        *(sampling_row(random, batch, GUIDANCE, some) for batch in (64, 1)),
        *(sampling_row(TRAINED, 2, guidance, few) for guidance in (GUIDANCE, None)),
        *(sampling_row(_chaotic(), batch, None, few) for batch in (1, 2, 4)),
    ]


def _gpu_rows() -> list[Row]:
    """Sample in bfloat16; eager and published code take minutes for a large model, and are timed on a block of it."""
    whole = _random("ImageNet64 2-768-8-8", imagenet64(), "random weights; eager and published code: see 2-768-1-8")
    block = _random("ImageNet64 2-768-1-8", imagenet64(1), "one of the model's eight blocks, of random weights")
    short = "two of the model's eight blocks, of random weights"
    others = [
        _random("ImageNet128 4-1024-2-8", imagenet128(2), short),
        _random("AFHQ256 8-768-2-8", afhq256(2), short),
    ]
    row = partial(sampling_row, dtype=torch.bfloat16)
    # The passes of random weights say nothing, and there can be a thousand of them.
    large = partial(row, contenders=("auto", "sequential"), rounds=1)
    return [
        *(row(TRAINED, batch, GUIDANCE) for batch in (1, 8, 32, 128)),
        large(whole, 32, GUIDANCE),
        row(block, 32, GUIDANCE, rounds=1),
        *(row(TRAINED, batch, None) for batch in (1, 8, 32, 128)),
        *(large(whole, batch, GUIDANCE) for batch in (8, 1)),
        *(large(subject, 8, GUIDANCE) for subject in others),
        *(large(whole, batch, None) for batch in (32, 8, 1)),
        *(large(whole, 128, guidance) for guidance in (GUIDANCE, None)),
    ]


# Contenders -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """A model, the latents that it decodes, and how; the precision is that of the transformers.

    Decoders are timed in so many rounds to choose between them.
    """

    model: TarFlow
    z: Tensor
    labels: Tensor
    guidance: Guidance | None
    dtype: torch.dtype
    rounds: int

    @property
    def noise_level(self) -> float | None:
        """The level at which a model of noisy images draws: the largest."""
        levels = self.model.noise_levels
        return levels and levels[1]

    def autocast(self) -> torch.autocast:
        """Let the transformers run in the precision."""
        return autocast(self.z.device, self.dtype)

    def checked(self) -> slice:
        """Choose the samples that are compared, from all over the batch."""
        return slice(None, None, max(1, len(self.z) // CHECKED))


class Decoding:
    """A decoder of ours at work, by a calibration or without one, and the statistics of each block when it last ran."""

    def __init__(self, decoder: Decoder, inputs: Inputs, calibration: Sequence[Timing] = ()):
        self.decoder = decoder
        self.inputs = inputs
        self.calibration = calibration
        self.statistics: list[BlockStatistics] = []

    def __call__(self) -> Outputs:
        """Decode, and return the samples that are compared."""
        self.statistics.clear()
        inputs, progress = self.inputs, self.statistics.append
        inputs.model.flow.calibration = self.calibration
        with inputs.autocast():
            tokens = inputs.model.flow.inverse(
                inputs.z, inputs.labels, inputs.guidance, self.decoder, progress, noise_level=inputs.noise_level
            )
        return (tokens[inputs.checked()],)

    def facts(self) -> dict[str, Any]:
        """Count its passes and the steps of the sequential decoder, in all and by block, as they were generated."""
        return {
            "passes": sum(block.passes for block in self.statistics),
            "steps": sum(block.steps for block in self.statistics),
            "by_block": [
                f"{block.passes}/{block.steps}" + (f" by {block.decoder}" if block.decoder != self.decoder else "")
                for block in self.statistics
            ],
        }


def calibrated(inputs: Inputs) -> Decoding:
    """Calibrate ``auto`` for this very batch; what is hopeless at batch 1 is not tried on it."""
    with inputs.autocast():
        batches = {1, len(inputs.z)}
        options = {"batches": batches, "rounds": inputs.rounds, "noise_level": inputs.noise_level}
        timings = calibrate(inputs.model.flow, inputs.guidance, **options)
    return Decoding(Decoder("auto"), inputs, timings)


def _eager(inputs: Inputs) -> Callable[[], Outputs]:
    def run() -> Outputs:
        with inputs.autocast():
            return (eager.inverse(inputs.model.flow, inputs.z, inputs.labels, inputs.guidance)[inputs.checked()],)

    return run


def _published(inputs: Inputs) -> Callable[[], Outputs]:
    theirs = checkout.published(inputs.model)

    def run() -> Outputs:
        with inputs.autocast():
            images = checkout.sample(theirs, inputs.z, inputs.labels, inputs.guidance, inputs.noise_level)
        return (patchify(images[inputs.checked()], inputs.model.config.patch_size),)

    return run


# The chain of tokens amplifies rounding, now more in one contender, now in another.
CHANCE = 1e-5
# Latents have a variance of one and images less: relative to them, what each latent may be off by is stricter.
_parallel = partial(Contender, allowance=DISTANCE * TOLERANCE, facts=Decoding.facts)
_CONTENDERS = {
    "auto": _parallel(calibrated),
    UNCALIBRATED: _parallel(partial(Decoding, Decoder("auto"))),
    "jacobi": _parallel(partial(Decoding, Decoder("jacobi"))),
    "jacobi, window 64": _parallel(partial(Decoding, Decoder("jacobi", 64))),
    "sequential": Contender(partial(Decoding, Decoder("sequential")), allowance=CHANCE, facts=Decoding.facts),
    "eager": Contender(_eager),
    "published": Contender(_published, allowance=CHANCE),
}


def _exactly(inputs: Inputs) -> Outputs:
    """Decode by eager code in float64."""
    rows, flow = inputs.checked(), copy.deepcopy(inputs.model).double().flow
    return (eager.inverse(flow, inputs.z[rows].double(), inputs.labels[rows], inputs.guidance),)


def _nearly(inputs: Inputs) -> Outputs:
    """Decode sequentially in float32, where eager code takes too long."""
    rows = inputs.checked()
    options = {"decoder": "sequential", "noise_level": inputs.noise_level}
    return (inputs.model.flow.inverse(inputs.z[rows], inputs.labels[rows], inputs.guidance, **options),)


def sampling_row(
    subject: Subject,
    batch: int,
    guidance: Guidance | None,
    contenders: Sequence[str] = (*DECODERS, *OTHERS),
    dtype: torch.dtype = torch.float32,
    rounds: int = 3,
) -> Row:
    def draw(device: torch.device) -> Inputs:
        # Autocast keeps what it cast, so as not to cast it again for every token, of weights that require gradients.
        model = subject.make(device).requires_grad_()
        return Inputs(model, *latents_and_labels(model, batch), guidance, dtype, rounds)

    config = subject.config
    rows = batch if guidance is None else 2 * batch
    steps = config.num_tokens - 1
    # Over all steps, half of a sequence is known on average.
    read = config.num_blocks * steps * step_bytes(config, rows, (steps + 1) / 2, dtype.itemsize)
    on_eager = "eager" in contenders
    return Row(
        op="sampling without guidance" if guidance is None else "guided sampling",
        model=subject.name,
        shape={"B": batch, "N": config.num_tokens},
        dtype=dtype,
        bytes=read,
        operations=rows * sum(operations(config)),
        contenders={name: _CONTENDERS[name] for name in contenders},
        draw=draw,
        expect=_exactly if on_eager else _nearly,
        exact="float64" if on_eager else "float32",
        plain="eager" if on_eager else "sequential",
        flush=False,
        rounds=rounds,
        images=batch,
        note=subject.note,
    )
