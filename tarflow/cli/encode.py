"""``tarflow encode``: compute the latents of a dataset, and the embeddings of its texts, to train a flow on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from .. import datasets
from ..datasets.latents import write_latents
from ..encoders import Autoencoder, TextEncoder
from ..hardware import pick_device
from ..image_flow import at_least_one
from .parsing import parse
from .shared import check_new_folder, check_resize

__all__ = ["Encode", "run"]


@dataclass(frozen=True)
class Encode:
    """Encode a dataset once: `tarflow train --dataset latents --data-dir OUT` then trains on its latents."""

    dataset: tyro.conf.Positional[str]
    """its name, as `tarflow train --dataset` takes it"""
    out: tyro.conf.Positional[Path]
    """the folder"""
    autoencoder: str
    """folder or name on the Hugging Face hub of an AutoencoderKL of diffusers"""
    text_encoder: str | None = None
    """folder or name of a text encoder of transformers, to condition images on the names of their classes"""
    text_length: int = 128
    """tokens to which texts are padded or cut"""
    data_dir: Path | None = None
    """folder with the files of the dataset"""
    image_size: int | None = None
    """side to which a folder's images are resized and cropped"""
    resize: datasets.Resize | None = None
    """filter that resizes the images of a folder, by default lanczos"""
    batch_size: int = 64
    device: str = "auto"


def run(arguments: Sequence[str]) -> None:
    """Encode both splits."""
    command, _ = parse(Encode, arguments)
    check_new_folder("out", command.out)
    check_resize(command.dataset, command.resize)
    batch_size, length = (at_least_one(name, getattr(command, name)) for name in ("batch_size", "text_length"))
    device = pick_device(command.device)
    autoencoder = Autoencoder(command.autoencoder, device)
    texts = None if command.text_encoder is None else TextEncoder(command.text_encoder, length, device)
    sources: dict[str, str] = {}
    for split in ("train", "test"):
        dataset = datasets.load(
            command.dataset, split, command.data_dir, command.image_size, command.resize or "lanczos"
        )
        if texts is not None and not dataset.num_classes:
            raise ValueError(f"text_encoder: expected none for data without classes; got {command.text_encoder}")
        autoencoder.check("images", dataset.in_channels)
        latents, labels = encode(dataset, autoencoder, batch_size)
        prefixes = None if texts is None else texts(["", *dataset.class_names]).cpu()
        sources[split] = dataset.source
        about: dict[str, Any] = {
            "source": sources,
            "class_names": dataset.class_names,
            "autoencoder": _in_full(command.autoencoder),
            "text_encoder": command.text_encoder and _in_full(command.text_encoder),
            "text_length": None if texts is None else length,
        }
        write_latents(command.out, split, latents, labels, prefixes, about)
        print(f"wrote {command.out / split}.safetensors: {list(latents.shape)}, standard deviation {latents.std():.3f}")


def _in_full(source: str) -> str:
    """Return the path of a folder from the root, and a name as it is."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def encode(
    dataset: datasets.ImageDataset | datasets.ImageFolder, autoencoder: Autoencoder, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Return the latents of all images, float32 ``(N, C, S, S)``, and their labels."""
    parts = []
    for indices in tqdm(torch.arange(len(dataset)).split(batch_size), desc="encoding", unit=" batches"):
        pixels, _ = dataset.get_batch(indices)
        images = pixels.to(autoencoder.module.device).float() / 127.5 - 1
        parts.append(autoencoder.encode(images).cpu())
    return torch.cat(parts), dataset.labels
