"""The models that are measured: random weights, scaled so that alpha and mu have a realistic spread."""

import torch
from torch import Tensor, nn

from tarflow import TarFlow, TarFlowConfig

# (patch size, batch): the CPU rows of the README, at 28 x 28, width 128, 4 blocks of 4 layers.
CPU_ROWS = [(4, 64), (4, 1), (2, 16), (2, 1)]
TRAINING_ROWS = [(4, 64), (2, 16)]


def fashion_mnist(patch_size: int) -> TarFlow:
    """A class-conditional model of 28 x 28 images."""
    torch.manual_seed(0)
    model = TarFlow(TarFlowConfig(patch_size=patch_size, num_classes=10))
    for block in model.flow.blocks:
        nn.init.normal_(block.transformer.proj_out.weight, std=0.02)
    return model


def latents_and_labels(model: TarFlow, batch: int) -> tuple[Tensor, Tensor]:
    """Latents from the prior, and all classes in turn."""
    generator = torch.Generator().manual_seed(1)
    return model.flow.sample_prior(batch, generator), torch.arange(batch) % model.config.num_classes
