"""Rows of iTarFlow: guided sampling by its code and by ours, with and without the denoising that follows.

The model is a small one of the published proportions: a block of six layers above three of one. It is guided in all
blocks, as in the published evaluation, and denoised in ten steps, a forward and a backward pass of the model each.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

import checkout
import models
from row import Contender, Outputs, Row
from sampling import CHANCE, Decoding, Inputs, Subject, calibrated, sampling_row
from tarflow import Decoder, Guidance
from tarflow.decoding import DISTANCE, TOLERANCE

NAME = "itarflow-fashion-mnist"
TRAINED = Subject(
    "iTarFlow, Fashion-MNIST 2-128-4-1/1/1/6, trained", models.trained_config(NAME), partial(models.trained, name=NAME)
)
GUIDANCE = Guidance(2.1)
DENOISED = "guided sampling, denoised"


def itarflow_rows(device: torch.device) -> list[Row]:
    """List the rows of a CPU; nobody has asked a GPU yet."""
    if device.type != "cpu":
        return []
    contenders = "auto", "jacobi, window 64", "sequential", "published"
    drawn = [sampling_row(TRAINED, batch, GUIDANCE, contenders) for batch in (1, 16)]
    return [*drawn, *map(denoised, drawn)]


def denoised(row: Row) -> Row:
    """Turn a row of guided sampling into one of sampling as a user does it, to clean images."""
    auto = Contender(partial(_denoised, calibrated), allowance=DISTANCE * TOLERANCE, facts=Decoding.facts)
    sequential = Contender(partial(_denoised, _sequential), allowance=CHANCE, facts=Decoding.facts)
    published = Contender(_published, allowance=CHANCE)
    return replace(
        row,
        op=DENOISED,
        contenders={"auto": auto, "sequential": sequential, "published": published},
        expect=lambda inputs: _denoised(_sequential, inputs)(),
        note="with ten steps of denoising, which the limit leaves out",
    )


class Sampling(Decoding):
    """A decoder of ours at work, and the denoising of what it draws."""

    def __call__(self) -> Outputs:
        """Draw the latents that all contenders decode, decode them, and denoise."""
        self.statistics.clear()
        inputs, model = self.inputs, self.inputs.model
        model.calibration = self.calibration
        generator = torch.Generator(inputs.z.device).manual_seed(models.SEED)
        options = {"denoise_sigma": inputs.noise_level, "decoder": self.decoder, "generator": generator}
        with inputs.autocast():
            images = model.sample(
                len(inputs.z), inputs.labels, inputs.guidance, **options, progress=self.statistics.append
            )
        return (images[inputs.checked()],)


def _denoised(prepare: Callable[[Inputs], Decoding], inputs: Inputs) -> Sampling:
    decoding = prepare(inputs)
    return Sampling(decoding.decoder, inputs, decoding.calibration)


def _sequential(inputs: Inputs) -> Decoding:
    return Decoding(Decoder("sequential"), inputs)


def _published(inputs: Inputs) -> Callable[[], Outputs]:
    theirs = checkout.published(inputs.model).requires_grad_(False)
    levels = inputs.model.denoising_levels(inputs.noise_level)

    def run() -> Outputs:
        images = checkout.sample(theirs, inputs.z, inputs.labels, inputs.guidance, inputs.noise_level)
        return (checkout.remove_noise(theirs, images, inputs.labels, levels)[inputs.checked()],)

    return run
