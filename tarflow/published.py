"""Checkpoints of the paper's own code (apple/ml-tarflow): its state dicts, renamed to ours."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from .files import read_state
from .model import TarFlow, TarFlowConfig

HEAD_DIM = 64  # the published code has no other, and no shape tells

# The weights whose shapes tell the configuration.
_TELLING = tuple(
    f"blocks.0.{name}" for name in ("proj_in.weight", "pos_embed", "attn_blocks.0.mlp.main.0.weight", "proj_out.weight")
)

_RENAMED = (
    (r"attn_blocks\.(\d+)\.attention\.norm\.", r"layers.\1.attention_norm."),
    (r"attn_blocks\.(\d+)\.attention\.", r"layers.\1."),
    (r"attn_blocks\.(\d+)\.mlp\.norm\.", r"layers.\1.mlp_norm."),
    (r"attn_blocks\.(\d+)\.mlp\.main\.", r"layers.\1.mlp."),
)


def load(source: Path | str | Mapping[str, Tensor], in_channels: int = 3) -> TarFlow:
    """A model from a published checkpoint, in evaluation mode; the shapes of the weights tell its configuration.

    Args:
        source: path of a ``.pth`` file, read without executing code from it, or the state dict of the published
            ``Model``.
        in_channels: of the images; the one thing that the shapes leave open.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a state dict of the published model, or does not fit ``in_channels``.
    """
    if isinstance(source, Mapping):
        state = source
    else:
        try:
            state = read_state(source)
        except ValueError as error:
            raise ValueError(f"source: {source} is truncated, corrupt or not a state dict: {error}") from error
    _check(state)
    config = infer_config(state, in_channels)
    weights = {_rename(name): _convert(name, t) for name, t in state.items() if _is_kept(name)}
    if state is not source and sum(tensor.nbytes for tensor in weights.values()) > Path(source).stat().st_size:
        raise ValueError(f"source: expected weights that are stored in full; {source} is smaller than they are")
    return TarFlow.from_state(config, weights, "source")


def _check(state: Any) -> None:
    """ValueError where a state dict does not have the tensors, of the dimensions, that tell the configuration."""
    if not isinstance(state, Mapping):
        raise ValueError(f"source: expected the state dict of a published TarFlow; got a {type(state).__name__}")
    for name in _TELLING:
        if name not in state:
            raise ValueError(f"source: expected the state dict of a published TarFlow; it has no {name}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"source: expected names and tensors; got {short(name)} and a {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"source: expected dense weights; got {name} of {tensor.layout} on {tensor.device}")
        dims = 2 if name in _TELLING or name.endswith("pos_embed") else 3 if name.endswith("class_embed") else None
        if dims is not None and (tensor.dim() != dims or not tensor.numel()):
            raise ValueError(f"source: expected {name} of {dims} dimensions; got shape {tuple(tensor.shape)}")


def infer_config(state: Mapping[str, Tensor], in_channels: int = 3) -> TarFlowConfig:
    """The configuration behind a published state dict."""
    channels, token_dim = state["blocks.0.proj_in.weight"].shape
    patch_size = math.isqrt(token_dim // in_channels) if in_channels > 0 else 0
    if in_channels * patch_size**2 != token_dim:
        raise ValueError(
            f"in_channels: expected a number for which patches of {token_dim} values are square; got {in_channels}"
        )
    side = math.isqrt(len(state["blocks.0.pos_embed"]))
    classes = state.get("blocks.0.class_embed")
    try:
        return TarFlowConfig(
            image_size=side * patch_size,
            in_channels=in_channels,
            patch_size=patch_size,
            channels=channels,
            num_blocks=_count(state, r"blocks\.(\d+)\."),
            layers_per_block=_count(state, r"blocks\.0\.attn_blocks\.(\d+)\."),
            num_classes=0 if classes is None else len(classes),
            head_dim=HEAD_DIM,
            expansion=len(state["blocks.0.attn_blocks.0.mlp.main.0.weight"]) // channels,
            volume_preserving=len(state["blocks.0.proj_out.weight"]) == token_dim,
        )
    except ValueError as error:
        raise ValueError(f"source: expected the state dict of a published TarFlow; {error}") from error


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _is_kept(name: str) -> bool:
    return not name.endswith("attn_mask")


def _rename(name: str) -> str:
    if name == "var":
        return "flow.prior_variance"
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^blocks\.(\d+)\.", r"flow.blocks.\1.transformer.", name)


def _convert(name: str, tensor: Tensor) -> Tensor:
    """Ours has positions in the order in which a block generates, and class embeddings without the token dimension."""
    if name.endswith("class_embed"):
        return tensor[:, 0]
    if re.match(r"blocks\.\d*[13579]\.pos_embed", name):
        return tensor.flip(0)
    return tensor
