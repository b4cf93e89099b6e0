"""The models that are measured: random weights, scaled so that alpha and mu have a realistic spread."""

import torch
from torch import Tensor, nn

from tarflow import TarFlow, TarFlowConfig

# (patch size, batch): the CPU rows of the README, at 28 x 28, width 128, 4 blocks of 4 layers.
CPU_ROWS = [(4, 64), (4, 1), (2, 16), (2, 1)]
TRAINING_ROWS = [(4, 64), (2, 16)]


def fashion_mnist(patch_size: int) -> TarFlowConfig:
    """A class-conditional model of 28 x 28 images."""
    return TarFlowConfig(patch_size=patch_size, num_classes=10)


def imagenet64(num_blocks: int = 8) -> TarFlowConfig:
    """The published class-conditional 2-768-8-8 model of 64 x 64 images, or its first blocks."""
    return TarFlowConfig(
        image_size=64,
        in_channels=3,
        patch_size=2,
        channels=768,
        num_blocks=num_blocks,
        layers_per_block=8,
        num_classes=1000,
    )


def build(config: TarFlowConfig, device: torch.device) -> TarFlow:
    """A model with random weights, the same every time."""
    torch.manual_seed(0)
    with device:
        model = TarFlow(config)
    for block in model.flow.blocks:
        nn.init.normal_(block.transformer.proj_out.weight, std=0.02)
    return model


def latents_and_labels(model: TarFlow, batch: int) -> tuple[Tensor, Tensor]:
    """Latents from the prior, and all classes in turn."""
    device = model.flow.prior_variance.device
    generator = torch.Generator(device).manual_seed(1)
    return model.flow.sample_prior(batch, generator), torch.arange(batch, device=device) % model.config.num_classes
