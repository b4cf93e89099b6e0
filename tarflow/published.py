"""Checkpoints of the published code: state dicts of TarFlow, iTarFlow and STARFlow, renamed to ours, and back.

Sources: apple/ml-tarflow, apple/ml-itarflow, apple/ml-starflow.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .compatibility import renamed_attributes
from .files import read_state
from .model import STARFLOW, TarFlow, TarFlowConfig
from .pretrained import build_model
from .validation import NoiseLevels

__all__ = ["infer_config", "load_published", "to_published"]

HEAD_DIM = 64  # the published code has no other, and no shape tells

PUBLISHED_LEVELS = {64: (0.01, 0.3), 128: (0.01, 0.5), 256: (0.01, 0.7)}
"""The noise levels that the published iTarFlows were trained at, by the size of their images."""

# The weights whose shapes tell the configuration; of other blocks it is the first.
_TELLING = tuple(f"blocks.0.{name}.weight" for name in ("proj_in", "attn_blocks.0.mlp.main.0", "proj_out"))
_START = "blocks.0.sos_embed"  # that of a STARFlow, which has no pos_embed

# Buffers that hold no weights. The prior of a STARFlow is the unit one, whatever its unused "var" says.
_UNUSED = ("attn_mask", "freqs_cos", "freqs_sin")

# The modules of a layer, ours and theirs.
_LAYER_NAMES = {
    "attention_norm": "attention.norm",
    "qkv": "attention.qkv",
    "proj": "attention.proj",
    "mlp_norm": "mlp.norm",
    "mlp": "mlp.main",
}

# The other weights of a STARFlow, ours and theirs.
_STARFLOW_NAMES = {
    "start_token": "sos_embed",
    "proj_prefix.weight": "proj_txt.weight",
    "proj_prefix.bias": "proj_txt.bias",
    "final_norm": "final_norm.weight",
}


def load_published(
    source: Path | str | Mapping[str, Tensor], in_channels: int | None = None, *, noise_levels: NoiseLevels = None
) -> TarFlow:
    """Make a model of a published checkpoint, in evaluation mode; its weights tell its kind and its configuration.

    Args:
        source: path of a ``.pth`` file, read without executing code from it, or the state dict of the published
            ``Model``, of TarFlow, of iTarFlow or of STARFlow (of images; its ``class_prefixes``, the embeddings of an
            empty text, are no part of it, and are zeros).
        in_channels: channels of the images, which the shapes leave open: 3 by default, and of a STARFlow, whose images
            are latents of an autoencoder, as many as a token has values.
        noise_levels: smallest and largest noise level in the training of an iTarFlow, which nothing in it tells; by
            default the published ones of its image size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a state dict of a published model, or does not fit ``in_channels``; noise levels of
            a TarFlow, or none of an iTarFlow of another size than the published ones.
    """
    state = _check(source if isinstance(source, Mapping) else _read(source))
    config = infer_config(state, in_channels, noise_levels)
    weights = {_our_name(name): _our_layout(name, t) for name, t in state.items() if not name.endswith(_UNUSED)}
    in_full = sum(tensor.nbytes for tensor in weights.values())
    if _START in state:
        weights = _in_our_patches(weights, config)
    if not isinstance(source, Mapping) and in_full > Path(source).stat().st_size:
        raise ValueError(f"source: expected weights that are stored in full; {source} is smaller than they are")
    return build_model(TarFlow, config, weights, "source")


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of a model to that of the published ``Model``, but for its unused buffers.

    That of a model with noise levels is one of the iTarFlow, whose code reads the names of TarFlow too. The prefixes of
    a STARFlow stay behind: there, they come with the text. Its patches have to be single values.
    """
    return {
        _their_name(name): _their_layout(name, tensor)
        for name, tensor in state.items()
        if name != "flow.class_prefixes"
    }


def _read(path: Path | str) -> Any:
    try:
        return read_state(path)
    except ValueError as error:
        raise ValueError(f"source: {path} is truncated, corrupt or not a state dict: {error}") from error


def _check(state: Any) -> dict[str, Tensor]:
    """Return a state dict with the names of TarFlow's code.

    ValueError where the tensors that tell the configuration are missing, or of other dimensions.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"source: expected the state dict of a published TarFlow; got a {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            got = f"{short(name)} and a {type(tensor).__name__}"
            raise ValueError(f"source: expected the state dict of a published TarFlow, names and tensors; got {got}")
    # The code of iTarFlow has another name for the layers of a block.
    state = {name.replace(".head_blocks.", ".attn_blocks."): tensor for name, tensor in state.items()}
    for name in (*_TELLING, *(("var",) if _START in state else ("blocks.0.pos_embed",))):
        if name not in state:
            raise ValueError(f"source: expected the state dict of a published TarFlow; it has no {name}")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"source: expected dense weights; got {name} of {tensor.layout} on {tensor.device}")
        is_matrix = name in _TELLING or name == "var" or name.endswith(("pos_embed", "proj_in.weight", "attn_mask"))
        dims = 2 if is_matrix else 3 if name.endswith(("class_embed", "sos_embed")) else None
        if dims is not None and (tensor.dim() != dims or not tensor.numel()):
            raise ValueError(f"source: expected {name} of {dims} dimensions; got shape {tuple(tensor.shape)}")
    return state


def infer_config(
    state: Mapping[str, Tensor], in_channels: int | None = None, noise_levels: NoiseLevels = None
) -> TarFlowConfig:
    """Infer the configuration of a published state dict; arguments and errors are those of :func:`load_published`."""
    channels, token_dim = state["blocks.0.proj_in.weight"].shape
    is_starflow = _START in state
    if in_channels is None:
        in_channels = token_dim if is_starflow else 3
    patch_size = math.isqrt(token_dim // in_channels) if in_channels > 0 else 0
    if in_channels * patch_size**2 != token_dim:
        raise ValueError(
            f"in_channels: expected a number for which patches of {token_dim} values are square; got {in_channels}"
        )
    num_tokens = len(state["var" if is_starflow else "blocks.0.pos_embed"])
    side = math.isqrt(num_tokens)
    classes = state.get("blocks.0.class_embed")
    num_blocks = len({match[1] for name in state if (match := re.match(r"blocks\.(\d+)\.", name))})
    layers = {match.groups() for name in state if (match := re.match(r"blocks\.(\d+)\.attn_blocks\.(\d+)\.", name))}
    layers_of_block = Counter(int(block) for block, _ in layers)
    # A block that is not there is like the first, for the missing weights to be named.
    widths = [len(state.get(f"blocks.{t}.proj_in.weight", state["blocks.0.proj_in.weight"])) for t in range(num_blocks)]
    takes_noise_level = any(".time_embed." in name for name in state)
    if noise_levels is not None and not takes_noise_level:
        raise ValueError(f"noise_levels: expected None for a TarFlow; got {noise_levels}")
    if noise_levels is None and takes_noise_level:
        noise_levels = PUBLISHED_LEVELS.get(side * patch_size)
        if noise_levels is None:
            sizes = ", ".join(map(str, PUBLISHED_LEVELS))
            raise ValueError(
                "noise_levels: expected those of training for an iTarFlow of images of another size than "
                f"{sizes}; got None for {side * patch_size}"
            )
    try:
        return TarFlowConfig(
            image_size=side * patch_size,
            in_channels=in_channels,
            patch_size=patch_size,
            channels=tuple(widths),
            num_blocks=num_blocks,
            layers_per_block=tuple(layers_of_block[t] or layers_of_block[0] for t in range(num_blocks)),
            num_classes=0 if classes is None else len(classes),
            head_dim=HEAD_DIM,
            expansion=len(state["blocks.0.attn_blocks.0.mlp.main.0.weight"]) // channels,
            volume_preserving=len(state["blocks.0.proj_out.weight"]) == token_dim,
            noise_levels=noise_levels,
            **(_infer_starflow(state, num_tokens, num_blocks) if is_starflow else {}),
        )
    except ValueError as error:
        raise ValueError(f"source: expected the state dict of a published TarFlow; {error}") from error


def _infer_starflow(state: Mapping[str, Tensor], num_tokens: int, num_blocks: int) -> dict[str, Any]:
    """Infer what a STARFlow has beyond a TarFlow; the mask of its attention tells the length of the text."""
    text = state.get(f"blocks.{num_blocks - 1}.proj_txt.weight")
    mask = state.get(f"blocks.{num_blocks - 1}.attn_mask")
    if text is not None and (mask is None or len(mask) <= num_tokens):
        raise ValueError("its attn_mask has no room for a text")
    return {
        **STARFLOW,
        "final_norm": "blocks.0.final_norm.weight" in state,
        "prefix_length": 0 if text is None or mask is None else len(mask) - num_tokens,
        "prefix_dim": 0 if text is None else text.shape[1],
    }


def _in_our_patches(weights: dict[str, Tensor], config: TarFlowConfig) -> dict[str, Tensor]:
    """Put the values of a patch, there row, column and channel, in our order; add what is no part of a checkpoint."""
    patch, channels = config.patch_size, config.in_channels
    place = torch.arange(config.token_dim).view(patch, patch, channels).permute(2, 0, 1).flatten()
    for name, tensor in weights.items():
        if name.endswith(("proj_in.weight", "start_token")):
            weights[name] = tensor[..., place]
        elif ".proj_out." in name:
            weights[name] = tensor.unflatten(0, (2, -1))[:, place].flatten(0, 1)
    weights["flow.prior_variance"] = torch.ones(config.num_tokens, config.token_dim)
    if config.prefix_dim:
        weights["flow.class_prefixes"] = torch.zeros(1, config.prefix_length, config.prefix_dim)
    return weights


def _our_name(name: str) -> str:
    if name == "var":
        return "flow.prior_variance"
    for ours, theirs in _LAYER_NAMES.items():
        name = re.sub(rf"attn_blocks\.(\d+)\.{re.escape(theirs)}\.", rf"layers.\1.{ours}.", name)
    name = name.replace(".time_embed.mlp.", ".noise_embed.")
    for ours, theirs in _STARFLOW_NAMES.items():
        name = name.replace(f".{theirs}", f".{ours}")
    return re.sub(r"^blocks\.(\d+)\.", r"flow.blocks.\1.transformer.", name)


def _their_name(name: str) -> str:
    if name == "flow.prior_variance":
        return "var"
    for ours, theirs in _LAYER_NAMES.items():
        name = re.sub(rf"layers\.(\d+)\.{ours}\.", rf"attn_blocks.\1.{theirs}.", name)
    for ours, theirs in _STARFLOW_NAMES.items():
        name = name.replace(f".{ours}", f".{theirs}")
    name = name.replace(".noise_embed.", ".time_embed.mlp.")
    return re.sub(r"^flow\.blocks\.(\d+)\.transformer\.", r"blocks.\1.", name)


def _our_layout(name: str, tensor: Tensor) -> Tensor:
    """Put positions in the order in which a block generates, and drop dimensions of size one."""
    if name.endswith("class_embed"):
        return tensor[:, 0]
    if name.endswith("sos_embed"):
        return tensor[0, 0]
    return _in_other_order(name, tensor)


def _their_layout(name: str, tensor: Tensor) -> Tensor:
    """Put positions in raster order, and add dimensions of size one."""
    if name.endswith("class_embed"):
        return tensor[:, None]
    if name.endswith("start_token"):
        return tensor[None, None]
    return _in_other_order(name, tensor)


def _in_other_order(name: str, tensor: Tensor) -> Tensor:
    """Reverse the positions of odd blocks, which generate from the last token to the first."""
    return tensor.flip(0) if re.search(r"blocks\.\d*[13579]\.(transformer\.)?pos_embed", name) else tensor


if not TYPE_CHECKING:
    __getattr__ = renamed_attributes(globals(), load="load_published")
