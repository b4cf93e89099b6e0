"""What several test files need: models with weights as if trained, and random tensors from a seed."""

import os

import pytest
import torch

from tarflow import TarFlow, TarFlowConfig
from tarflow.model import STARFLOW
from tarflow.transforms import MixtureTransform

PREFIX = STARFLOW | {"prefix_length": 5, "prefix_dim": 7, "channels": 20, "head_dim": 20}

# The Triton kernels run on a GPU, or, in a process of their own, under Triton's interpreter: see test_triton.py.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
BACKENDS = ["triton"] if INTERPRETED else ["torch", "reference"] + ["triton"] * (DEVICE != "cpu")
# The interpreter computes with the bits of bfloat16, not with its values.
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.skipif(INTERPRETED, reason="no bfloat16 to interpret"))


def randomize(module, seed=0):
    """Redraw every parameter in place, so that layers mix, mu spreads by about 0.5 and alpha by about 0.3.

    An untrained flow is about the identity, which would hide most mistakes.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
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
        for part in module.modules():
            if getattr(part, "class_prefixes", None) is not None:
                part.class_prefixes.copy_(torch.randn(part.class_prefixes.shape, generator=generator))
            if isinstance(getattr(part, "transform", None), MixtureTransform) and hasattr(part, "proj_out"):
                randomize_mixture(part.transform, part.proj_out, generator)
    return module


def randomize_mixture(coupling, proj_out, generator):
    """Move the components apart, and let their log-scales vary less than alpha: the widest rules the tails."""
    _, _, bias = coupling.split(proj_out.bias)
    _, _, weight = coupling.split(proj_out.weight.t())
    noise = torch.randn(bias.shape, generator=generator, dtype=torch.float64, device="cpu")
    logits, means, log_scales = noise.to(bias).unbind()
    bias.copy_(torch.stack((logits, 1.5 * means, 0.3 * log_scales - 0.6)))
    weight[:, 2] *= 0.1


def tarflow(seed=0, dtype=torch.float64, **config):
    """A small TarFlow with random weights: four tokens of four values, unless told otherwise."""
    small = {"image_size": 4, "patch_size": 2, "channels": 32, "head_dim": 16, "num_blocks": 3, "layers_per_block": 2}
    return randomize(TarFlow(TarFlowConfig(**small | config)), seed).to(dtype)


def branches(flow, z, labels=None, guidance=None, noise_level=None):
    """What a block is conditioned on in each branch of guidance."""
    return flow.branches(flow.condition(labels, noise_level, z), guidance)


def draw(seed, *shape, dtype=torch.float64):
    """Normal numbers from a seed on the default device; the same whatever device and dtype, but for rounding."""
    generator = torch.Generator("cpu").manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return numbers.to(torch.get_default_device(), dtype)


def assert_shares_are_of_the_batch(trainer, data):
    """Assert that what a trainer prepares of the share of a process is that share of what it prepares of the batch."""

    def prepare(rank, num_ranks):
        trainer.generator.manual_seed(0)
        return trainer.prepare(data.images[rank::num_ranks], data.labels[rank::num_ranks], rank, num_ranks)

    whole = prepare(0, 1)
    for rank in range(4):
        for part, tensor in zip(prepare(rank, 4), whole, strict=True):
            assert part is tensor is None or torch.equal(part, tensor[rank::4])
