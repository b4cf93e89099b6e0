"""Checks of flags and steps that several commands share."""

import os
from pathlib import Path
from typing import Any

import torch

from ..decoding import Decoder
from ..encoders import Autoencoder
from ..guidance import MAX_WEIGHT
from ..hardware import pick_device
from ..image_flow import ImageFlow
from ..pretrained import load_pretrained

__all__ = [
    "autocast",
    "check_file",
    "check_guidance_weight",
    "check_image_channels",
    "check_new_folder",
    "check_resize",
    "check_seed",
    "check_tolerance",
    "check_writable",
    "load_model",
]


def check_seed(seed: int) -> None:
    """Raise ValueError where PyTorch has no generator of that seed."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected an integer from 0 to 2^63 - 1; got {seed}")


def check_guidance_weight(weight: float) -> None:
    """Raise ValueError, by the name of the flag, for a weight that :class:`tarflow.Guidance` does not take."""
    if not 0 <= weight <= MAX_WEIGHT:
        raise ValueError(f"guidance: expected a number from 0 to {MAX_WEIGHT}; got {weight}")


def check_image_channels(model: ImageFlow, autoencoder: Autoencoder | None) -> None:
    """Raise ValueError for samples that would be no images: latents without an autoencoder, or with that of others."""
    channels = model.config.image_shape[0]
    if autoencoder is not None:
        autoencoder.check("latents", channels)
    elif channels not in (1, 3):
        raise ValueError(f"autoencoder: expected one, which decodes the latents of {channels} channels; got none")


def check_tolerance(decoder: Decoder) -> Decoder:
    """Return the decoder; raise ValueError for a tolerance with which any latent may pass for any other."""
    if decoder.tolerance > 1:
        raise ValueError(f"tolerance: expected at most 1, latents being about as large; got {decoder.tolerance}")
    return decoder


def check_file(name: str, path: Path) -> None:
    """Raise OSError where a file cannot be written: before the work, not after it."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{name}: expected a file in a folder that exists; got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{name}: expected a file; got the folder {path}")
    check_writable(name, path.parent)


def check_resize(dataset: str, resize: str | None) -> None:
    """Raise ValueError for a filter that was chosen for a dataset whose images are never resized."""
    if resize and not dataset.startswith(("folder", "hub:")):
        raise ValueError(f"resize: expected with a folder or a hub alone, whose images are resized; got {resize}")


def check_new_folder(name: str, folder: Path) -> None:
    """Raise OSError where a folder could not be made, or a file is in its place."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"{name}: expected a folder; got {folder}, and {place} is a file")
    check_writable(name, place)


def check_writable(name: str, folder: Path) -> None:
    """Raise OSError where there is no such folder, or nothing can be written to it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: expected a folder to write to; got {folder}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{name}: expected a folder that can be written to; got {folder}")


def load_model(run: Path, device: str) -> tuple[ImageFlow, dict[str, Any]]:
    """The model on a device, and what its config.json says besides its configuration."""
    model: ImageFlow
    model, metadata = load_pretrained(run)
    return model.to(pick_device(device)), metadata


def autocast(model: ImageFlow, precision: str, run: Path) -> torch.autocast:
    """Autocast to a precision; ValueError for a model in float64, which autocast leaves as it is."""
    low = precision == "bfloat16"
    if low and model.dtype == torch.float64:
        raise ValueError(f"precision: expected float32 for {run}, a model in float64; got bfloat16")
    return torch.autocast(model.device.type, torch.bfloat16, enabled=low)
