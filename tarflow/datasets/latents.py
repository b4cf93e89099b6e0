"""Latents of an image dataset, computed once: ``{train,test}.safetensors`` beside ``latents.json``."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import atomic_write
from .dataset import ImageDataset
from .formats import Unreadable, reading

__all__ = ["read_latents", "write_latents"]

ABOUT = "latents.json"


def write_latents(
    folder: Path, split: str, latents: Tensor, labels: Tensor, prefixes: Tensor | None, about: dict[str, Any]
) -> None:
    """Write the latents of a split, and what is known of them: names of classes, the source of each split, encoders."""
    tensors = {"latents": latents.contiguous(), "labels": labels}
    if prefixes is not None:
        tensors["prefixes"] = prefixes.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / f"{split}.safetensors") as beside:
        save_file(tensors, beside)
    with atomic_write(folder / ABOUT) as beside:
        beside.write_text(json.dumps(about, indent=2) + "\n")


def read_latents(split: str, folder: Path) -> ImageDataset:
    """Read the latents of a split."""
    path = folder / f"{split}.safetensors"
    for needed in (path, folder / ABOUT):
        if not needed.is_file():
            raise FileNotFoundError(f"data_dir: expected a folder that `tarflow encode` wrote; no {needed}")
    with reading(path, "the latents that `tarflow encode` writes"):
        about, tensors = json.loads((folder / ABOUT).read_text()), load_file(path)
        latents, labels, prefixes = tensors["latents"], tensors["labels"], tensors.get("prefixes")
        names, source = tuple(about["class_names"]), f"{about['source'][split]}, as latents of {about['autoencoder']}"
        encoders = {name: about[name] for name in ("autoencoder", "text_encoder", "text_length")}
    if latents.dtype != torch.float32 or not latents.isfinite().all():
        raise Unreadable(f"{path}: expected finite latents of float32, got {latents.dtype}")
    if prefixes is not None and (prefixes.dim() != 3 or len(prefixes) != 1 + len(names)):
        raise Unreadable(f"{path}: expected {1 + len(names)} prefixes, got shape {list(prefixes.shape)}")
    return ImageDataset(latents, labels, names, False, source, prefixes, encoders)
