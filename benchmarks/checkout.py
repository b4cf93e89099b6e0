"""The paper's code (apple/ml-tarflow), from a checkout of it, with the weights of a model of ours.

Nothing of the checkout is needed for anything else.
"""

import functools
import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from tarflow import Guidance, TarFlow

# Where the checkout is, for this process and those that it starts.
VARIABLE = "TARFLOW_PUBLISHED"
HELP = "folder of a checkout of apple/ml-tarflow, to measure against"

_RENAMED = (
    (r"^flow\.prior_variance$", "var"),
    (r"^flow\.blocks\.(\d+)\.transformer\.", r"blocks.\1."),
    (r"layers\.(\d+)\.attention_norm\.", r"attn_blocks.\1.attention.norm."),
    (r"layers\.(\d+)\.(qkv|proj)\.", r"attn_blocks.\1.attention.\2."),
    (r"layers\.(\d+)\.mlp_norm\.", r"attn_blocks.\1.mlp.norm."),
    (r"layers\.(\d+)\.mlp\.", r"attn_blocks.\1.mlp.main."),
)


def use(folder: Path | None) -> None:
    """Measure against the checkout in this folder, if there is one."""
    if folder is not None:
        os.environ[VARIABLE] = str(folder.resolve())


def published(model: TarFlow) -> nn.Module:
    """The published model of the same weights, on the same device; they require gradients, which autocast's cache asks.

    Raises:
        NotImplementedError: nobody said where the checkout is.
    """
    if VARIABLE not in os.environ:
        raise NotImplementedError("no checkout given; see --published")
    config, device = model.config, model.flow.prior_variance.device
    with device:
        theirs = _transformer_flow(Path(os.environ[VARIABLE])).Model(
            config.in_channels,
            config.image_size,
            config.patch_size,
            config.channels,
            config.num_blocks,
            config.layers_per_block,
            nvp=not config.volume_preserving,
            num_classes=config.num_classes,
        )
    weights = {_rename(name): tensor for name, tensor in model.state_dict().items()}
    theirs.load_state_dict(theirs.state_dict() | {name: _convert(name, tensor) for name, tensor in weights.items()})
    return theirs.requires_grad_()


def sample(theirs: nn.Module, z: Tensor, labels: Tensor, guidance: Guidance | None) -> Tensor:
    """Latents to images, under guidance with the linear schedule, by a published model."""
    weight = guidance.weight if guidance else 0.0
    with torch.no_grad():
        return theirs.reverse(z, labels, guidance=weight, annealed_guidance=True)


@functools.cache
def _transformer_flow(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("transformer_flow", folder / "transformer_flow.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _convert(name: str, tensor: Tensor) -> Tensor:
    """Theirs has positions in raster order, and class embeddings with a dimension of tokens."""
    if name.endswith("class_embed"):
        return tensor[:, None]
    if name.endswith("pos_embed") and int(name.split(".")[1]) % 2:
        return tensor.flip(0)
    return tensor
