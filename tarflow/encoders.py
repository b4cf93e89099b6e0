"""Autoencoders and text encoders that others have trained, of the libraries diffusers and transformers.

A flow over latents is a :class:`tarflow.TarFlow` whose images are ``autoencoder.encode(images)``; one with a prefix is
conditioned on ``text_encoder(texts)``. Both are read when they are first needed: ``pip install "tarflow[starflow]"``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Autoencoder", "TextEncoder"]

NEEDS = 'pip install "tarflow[starflow]"'


class Autoencoder:
    """An ``AutoencoderKL`` of diffusers, such as stabilityai/sd-vae-ft-ema, whose latents STARFlow draws.

    Args:
        source: a folder, or a repository on the Hugging Face hub.
        device: where it runs.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: there is no such autoencoder.
    """

    def __init__(self, source: Path | str, device: torch.device | str = "cpu"):
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ImportError(f"autoencoder: reading {source} needs: {NEEDS}") from error
        try:
            self.module: Any = AutoencoderKL.from_pretrained(str(source), low_cpu_mem_usage=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"autoencoder: expected an AutoencoderKL of diffusers; got {source} ({error})") from error
        self.module.to(device).eval().requires_grad_(False)
        self.source = str(source)
        self.scale = float(self.module.config.scaling_factor)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the latents of images ``(B, C, H, W)`` in [-1, 1]: the mean of their posterior, times the scale."""
        self.check("images", images.shape[-3])
        with torch.autocast(images.device.type, enabled=False):
            return self.module.encode(images.to(self.module.dtype)).latent_dist.mode().float() * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk_size: int = 64) -> Tensor:
        """Return the images of latents ``(..., C, h, w)``, so many at a time, nominally in [-1, 1].

        An autocast in force is that of the flow: an autoencoder runs in its own precision.
        """
        self.check("latents", latents.shape[-3])
        parts = (latents.flatten(0, -4).to(self.module.device, self.module.dtype) / self.scale).split(chunk_size)
        with torch.autocast(self.module.device.type, enabled=False):
            images = torch.cat([self.module.decode(part).sample for part in parts]).to(latents)
        return images.unflatten(0, latents.shape[:-3])

    def check(self, what: Literal["images", "latents"], channels: int) -> None:
        """Raise ValueError where images or latents have other channels than those of this autoencoder."""
        config = self.module.config
        own = config.in_channels if what == "images" else config.latent_channels
        if channels != own:
            raise ValueError(f"autoencoder: expected one for {what} of {channels} channels; {self.source} has {own}")

    def image_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape (C, H, W) of the images of latents of a shape."""
        return tuple(self.decode(torch.zeros(1, *latent_shape)).shape[1:])

    @classmethod
    def of(cls, metadata: Mapping[str, Any] | None, device: torch.device | str) -> "Autoencoder | None":
        """Read the autoencoder that the metadata of a model name, if they do."""
        source = (metadata or {}).get("autoencoder")
        return None if source is None else cls(source, device)


class TextEncoder:
    """The encoder of a language model of transformers, such as google/flan-t5-xl, with its tokenizer.

    Args:
        source: a folder, or a repository on the Hugging Face hub.
        length: L, to which texts are padded or cut.
        device: where it runs.

    Raises:
        ImportError: transformers is not installed.
        ValueError: there is no such encoder.
    """

    def __init__(self, source: Path | str, length: int, device: torch.device | str = "cpu"):
        try:
            from transformers import AutoModelForTextEncoding, AutoTokenizer
        except ImportError as error:
            raise ImportError(f"text_encoder: reading {source} needs: {NEEDS}") from error
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(source))
            self.module: Any = AutoModelForTextEncoding.from_pretrained(str(source))
        except (OSError, ValueError) as error:
            raise ValueError(f"text_encoder: expected one of transformers; got {source} ({error})") from error
        self.module.to(device).eval().requires_grad_(False)
        self.length = length

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the last hidden states ``(B, L, E)`` of texts, float32, zero where they are padded."""
        padded = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.module.device)
        hidden = self.module(input_ids=padded.input_ids, attention_mask=padded.attention_mask).last_hidden_state
        return (hidden * padded.attention_mask[..., None]).float()
