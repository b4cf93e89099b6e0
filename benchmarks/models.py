"""The models that are measured: random weights, scaled for a realistic spread of alpha and mu, and trained ones."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tarflow import Guidance, TarFlow, TarFlowConfig
from tarflow.pretrained import read_config

GUIDANCE = Guidance(weight=2.0, schedule="linear")
TRAINED = Path(__file__).parent / "trained"
SEED = 1

# The spread of alpha over that of the activations, over whose number it sums. A large token makes large activations,
# these a large alpha, and that a larger token: with four times this, tokens run away to infinity within a block.
_SPREAD = 0.14


def fashion_mnist(patch_size: int) -> TarFlowConfig:
    """Configure a class-conditional model of 28 x 28 images."""
    return TarFlowConfig(patch_size=patch_size, num_classes=10)


def imagenet64(num_blocks: int = 8) -> TarFlowConfig:
    """Configure the published class-conditional 2-768-8-8 model of 64 x 64 images, or its first blocks."""
    return _published(image_size=64, patch_size=2, channels=768, num_blocks=num_blocks, num_classes=1000)


def imagenet128(num_blocks: int = 8) -> TarFlowConfig:
    """Configure the published class-conditional 4-1024-8-8 model of 128 x 128 images, or its first blocks."""
    return _published(image_size=128, patch_size=4, channels=1024, num_blocks=num_blocks, num_classes=1000)


def afhq256(num_blocks: int = 8) -> TarFlowConfig:
    """Configure the published class-conditional 8-768-8-8 model of 256 x 256 images, or its first blocks."""
    return _published(image_size=256, patch_size=8, channels=768, num_blocks=num_blocks, num_classes=3)


def _published(**sizes: int) -> TarFlowConfig:
    return TarFlowConfig(in_channels=3, layers_per_block=8, **sizes)


def build(config: TarFlowConfig, device: torch.device) -> TarFlow:
    """Build a model with random weights, the same every time."""
    torch.manual_seed(0)
    with device:
        model = TarFlow(config)
    for block in model.flow.blocks:
        weight = block.transformer.proj_out.weight
        nn.init.normal_(weight, std=_SPREAD / weight.shape[1] ** 0.5)
    return model


def trained(device: torch.device, name: str = "fashion-mnist") -> TarFlow:
    """Load what was trained: how many passes a parallel decoder takes depends on trained weights."""
    return TarFlow.from_pretrained(TRAINED / name).float().to(device)


def trained_config(name: str = "fashion-mnist") -> TarFlowConfig:
    """Read the configuration of a trained model."""
    return TarFlowConfig(**read_config(TRAINED / name)["model"])


def latents_and_labels(model: TarFlow, batch: int) -> tuple[Tensor, Tensor]:
    """Draw latents from the prior; the labels are all classes in turn."""
    device = model.flow.prior_variance.device
    generator = torch.Generator(device).manual_seed(SEED)
    return model.flow.sample_prior(batch, generator), torch.arange(batch, device=device) % model.config.num_classes


def step_bytes(config: TarFlowConfig, rows: int, known: float, itemsize: int) -> float:
    """Count what a step of sequential decoding reads in the average block with ``known`` tokens: weights and cache."""
    blocks = zip(config.layers_of_blocks, config.channels_of_blocks, strict=True)
    read = sum(layers * channels * (12 * channels + 2 * rows * known) for layers, channels in blocks)
    return itemsize * read / config.num_blocks


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Let the transformers run in a precision."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
