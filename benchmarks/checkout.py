"""The paper's code (apple/ml-tarflow), from a checkout of it, with the weights of a model of ours.

Only the contenders called "published" need a checkout, and ``tools/record_published.py``.
"""

import functools
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from tarflow import Guidance, TarFlow
from tarflow.published import to_published

# The environment tells the folder of the checkout to this process and to those that it starts.
VARIABLE = "TARFLOW_PUBLISHED"
HELP = "folder of a checkout of apple/ml-tarflow, to measure against"

_GUIDED = {"both": "ab", "alpha": "a", "mu": "b"}


def use(folder: Path | None) -> None:
    """Measure against the checkout in this folder, if there is one."""
    if folder is not None:
        os.environ[VARIABLE] = str(folder.resolve())


@functools.cache
def load_code(folder: Path) -> ModuleType:
    """Import the module of the published model."""
    spec = importlib.util.spec_from_file_location("transformer_flow", folder / "transformer_flow.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published(model: TarFlow) -> nn.Module:
    """Build the published model with the weights of ours, on the same device.

    Its weights require gradients: autocast keeps what it cast only of such weights.

    Raises:
        NotImplementedError: nobody said where the checkout is.
    """
    if VARIABLE not in os.environ:
        raise NotImplementedError("no checkout given; see --published")
    config, device = model.config, model.flow.prior_variance.device
    with device:
        theirs = load_code(Path(os.environ[VARIABLE])).Model(
            config.in_channels,
            config.image_size,
            config.patch_size,
            config.channels,
            config.num_blocks,
            config.layers_per_block,
            nvp=not config.volume_preserving,
            num_classes=config.num_classes,
        )
    theirs.load_state_dict(theirs.state_dict() | to_published(model.state_dict()))
    return theirs.requires_grad_()


def sample(theirs: nn.Module, z: Tensor, labels: Tensor | None, guidance: Guidance | None) -> Tensor:
    """Turn latents into images with a published model, whose reference branch never has a label."""
    options = guidance and {
        "guidance": guidance.weight,
        "guide_what": _GUIDED[guidance.parameters],
        "attn_temp": guidance.temperature,
        "annealed_guidance": guidance.schedule == "linear",
    }
    with torch.no_grad():
        return theirs.reverse(z, labels, **(options or {}))


def gradients(theirs: nn.Module, model: TarFlow) -> list[Tensor]:
    """Collect the gradients of a published model in the order and the shapes of our parameters."""
    weights, collected = dict(theirs.named_parameters()), []
    for name, parameter in model.named_parameters():
        (published_name,) = to_published({name: parameter})
        # Positions that are reversed once more are in our order again.
        (gradient,) = to_published({name: weights[published_name].grad}).values()
        collected.append(gradient.reshape_as(parameter))
    return collected
