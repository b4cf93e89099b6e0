"""What several test files need: models with weights as if trained, and random tensors from a seed."""

import torch

from tarflow import TarFlow, TarFlowConfig


def randomize(module, seed=0):
    """Redraw every parameter in place, so that layers mix, mu spreads by about 0.5 and alpha by about 0.3.

    An untrained flow is the identity, which would hide most mistakes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("proj_out.weight"):
                parameter.copy_(0.2 * noise / parameter.shape[1] ** 0.5)
            elif name.endswith(".weight"):
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif name.endswith("embed"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(0.1 * noise)
    return module


def tarflow(seed=0, dtype=torch.float64, **config):
    """A small TarFlow with random weights: four tokens of four values, unless told otherwise."""
    small = {"image_size": 4, "patch_size": 2, "channels": 32, "head_dim": 16, "num_blocks": 3, "layers_per_block": 2}
    return randomize(TarFlow(TarFlowConfig(**small | config)), seed).to(dtype)


def draw(seed, *shape, dtype=torch.float64):
    """Normal numbers from a seed; the same whatever the dtype, but for rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
