"""Rows of STARFlow: guided sampling by its code and by ours, of latents under a text.

The model is a small one of the published proportions, a deep block above five shallow ones, with random weights: it
shows the time of sequential decoding, which does not depend on them.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

import checkout
import models
from row import Contender, Outputs, Row
from sampling import CHANCE, Inputs, Subject, sampling_row
from tarflow import Guidance, TarFlow, TarFlowConfig
from tarflow.model import STARFLOW, patchify, unpatchify

TEXT = {"prefix_length": 32, "prefix_dim": 128}
CONFIG = TarFlowConfig(16, 4, 1, 128, 6, (1, 1, 1, 1, 1, 12), num_classes=10, **TEXT, **STARFLOW)
GUIDANCE = Guidance(2.5, "constant", rule="gaussian")


def build(device: torch.device) -> TarFlow:
    """Build the model with random weights, and random embeddings in the place of those of ten texts."""
    model = models.build(CONFIG, device)
    model.set_prefixes(torch.randn(1 + CONFIG.num_classes, *TEXT.values()))
    return model


SUBJECT = Subject("STARFlow, latents 4 x 16 x 16, 1-128-6-1/1/1/1/1/12, random", CONFIG, build)


def starflow_rows(device: torch.device) -> list[Row]:
    """List the rows of a CPU; nobody has asked a GPU yet."""
    if device.type != "cpu":
        return []
    published = {"published": Contender(_published, allowance=CHANCE)}
    rows = [sampling_row(SUBJECT, batch, GUIDANCE, ("sequential",)) for batch in (1, 16)]
    return [replace(row, contenders=row.contenders | published) for row in rows]


def _published(inputs: Inputs) -> Callable[[], Outputs]:
    theirs, model = checkout.published(inputs.model), inputs.model
    prefixes = model.flow.class_prefixes
    assert prefixes is not None
    texts, empty = prefixes[inputs.labels + 1], prefixes[:1]
    latents = unpatchify(inputs.z, CONFIG.patch_size, CONFIG.image_size)

    def run() -> Outputs:
        drawn = checkout.sample_starflow(theirs, latents, texts, inputs.guidance, empty)
        return (patchify(drawn[inputs.checked()], CONFIG.patch_size),)

    return run
