"""What TarFlow and Flow++ have in common: densities of images, probabilities of 8-bit pixels, and files."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .files import replacing
from .flowpp.dequantizer import Dequantizer, DequantizerConfig
from .flowpp.networks import initialize_from_data
from .noise import add_uniform_noise


class ImageFlow(nn.Module):
    """A flow over images ``(B, C, H, W)``, float in [-1, 1].

    Subclasses bring ``config``, ``forward``, ``inverse``, ``log_prior`` and ``sample``.

    Attributes:
        dequantizer: of variational dequantization; None where noise is uniform (or Gaussian, for samples).
    """

    config_class: type

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dequantizer = None
        if config.dequantizer is not None:
            self.dequantizer = Dequantizer(config.dequantizer, config.image_shape)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.parameters()).dtype

    def initialize(
        self, pixels: Tensor, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Set the scales of all convolutions and norms by a batch of 8-bit images; those of transformers need no data.

        Each layer does so when it first sees its inputs, which come through layers that have done so already.
        """
        initialize_from_data(self, lambda: self.discrete_log_prob(pixels, labels, generator=generator))

    def update_prior(self, z: Tensor, rate: float | Tensor) -> None:
        """Adapt the prior to the latents of a batch, where it is one that adapts."""

    def log_prob(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The log-density of images in [-1, 1], in nats, ``(B,)``."""
        z, logdet = self(x, labels)
        return self.log_prior(z) + logdet

    def dequantize(self, pixels: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """8-bit pixels with noise in their bins: images in [-1, 1], and the log-density of the noise, ``(B,)`` nats.

        The noise is that of :attr:`dequantizer`, or uniform, whose log-density is 0.
        """
        if self.dequantizer is None:
            return add_uniform_noise(pixels, generator), torch.zeros(len(pixels), device=pixels.device)
        eps = torch.randn(pixels.shape, generator=generator, device=pixels.device, dtype=self.dtype)
        return self.dequantizer(pixels, eps)

    def discrete_log_prob(
        self, pixels: Tensor, labels: Tensor | None = None, draws: int = 1, generator: torch.Generator | None = None
    ) -> Tensor:
        """A lower bound on the log-probability of 8-bit images, in nats, ``(B,)``.

        ``log mean_k p(pixels + u_k) / q(u_k | pixels)`` over K draws of noise, with p the density in units of pixels:
        in expectation the evidence lower bound for K = 1, and rising to the exact log-probability with K.

        Args:
            pixels: uint8 ``(B, C, H, W)``.
            labels: int64 ``(B,)``, or None for an unconditional model.
            draws: K, the importance-weighted samples.
            generator: of the noise, on the device of the model.

        Raises:
            TypeError: pixels are not uint8.
            ValueError: pixels of another shape, labels that do not fit, draws below 1.

        Source: importance weighting, Burda et al. (arXiv 1509.00519).
        """
        return log_mean_exp(self.bounds(pixels, labels, draws, generator))

    def bounds(
        self, pixels: Tensor, labels: Tensor | None = None, draws: int = 1, generator: torch.Generator | None = None
    ) -> Tensor:
        """What :meth:`discrete_log_prob` averages: ``log p(pixels + u_k) - log q(u_k | pixels)``, float64 ``(K, B)``.

        Its mean over the draws is the one-sample bound, with less variance than a single sample has. Arguments and
        errors are those of :meth:`discrete_log_prob`.
        """
        if pixels.dtype != torch.uint8:
            raise TypeError(f"pixels: expected uint8; got {pixels.dtype}")
        self._check_shape(pixels, "pixels")
        if draws < 1:
            raise ValueError(f"draws: expected at least 1; got {draws}")
        bounds = []
        for _ in range(draws):
            x, log_q = self.dequantize(pixels, generator)
            bounds.append((self.log_prob(x, labels) - log_q).double())
        return torch.stack(bounds) - self.config.num_dims * math.log(128)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_weights(folder / "model.safetensors")
        with replacing(folder / "config.json") as path:
            path.write_text(json.dumps(self.describe(), indent=2) + "\n")

    def save_weights(self, path: Path | str) -> None:
        """Write the weights alone, as safetensors, beside what may be there and then over it."""
        with replacing(path) as beside:
            beside.write_bytes(save({name: tensor.contiguous() for name, tensor in self.state_dict().items()}))

    def describe(self) -> dict[str, Any]:
        """What ``config.json`` says of the model: the name of its class and its configuration."""
        return {"flow": type(self).__name__, "model": asdict(self.config)}

    @classmethod
    def from_pretrained(cls, source: Path | str) -> "ImageFlow":
        """Read what :meth:`save_pretrained` wrote: from a folder, or from the Hugging Face hub by repository name.

        ``ImageFlow.from_pretrained`` returns whichever flow it finds, and each flow its own kind alone.

        Raises:
            FileNotFoundError: the folder or one of its two files is missing.
            ValueError: a file is truncated or corrupt, the weights are those of another configuration, or the flow is
                of another kind.
        """
        folder = Path(source)
        if not folder.exists() and str(source).count("/") == 1 and not str(source).startswith("."):
            folder = _download(str(source))
        config_path, weights_path = folder / "config.json", folder / "model.safetensors"
        for path in (config_path, weights_path):
            if not path.is_file():
                raise FileNotFoundError(f"source: expected a folder with config.json and model.safetensors; no {path}")
        model_class, config = cls._read(folder)
        try:
            state = load_file(weights_path)
        except SafetensorError as error:
            raise ValueError(f"{weights_path}: truncated or corrupt: {error}") from error
        model = model_class(config).to(next((tensor.dtype for tensor in state.values()), torch.float32))
        model.load_checked(state, str(weights_path))
        model._load_beside(folder)
        return model

    def _load_beside(self, folder: Path) -> None:
        """Read what else a kind of flow keeps beside its weights."""

    def load_checked(self, state: dict[str, Tensor], origin: str) -> None:
        """Load a state dict; ValueError, naming ``origin``, where it is one of another configuration."""
        own = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        other = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if own != other:
            name = min(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
            raise ValueError(
                f"{origin}: weights of another configuration: expected {name} of shape {own.get(name, 'nothing')}; "
                f"got {other.get(name, 'nothing')}"
            )
        for name, tensor in state.items():
            if not tensor.isfinite().all():
                raise ValueError(f"{origin}: expected finite weights; got nan or inf in {name}")
        self.load_state_dict(state)

    @classmethod
    def _read(cls, folder: Path) -> tuple[type["ImageFlow"], Any]:
        """The class of the flow in a folder, and its configuration."""
        settings = read_config(folder)
        kinds = {kind.__name__: kind for kind in (cls.__subclasses__() or [cls])}
        name = settings.get("flow", "TarFlow")
        if name not in kinds:
            raise ValueError(f"{folder / 'config.json'}: expected a {' or '.join(kinds)}; got a {name}")
        kind = kinds[name]
        try:
            return kind, kind.config_class(**read_dequantizer(settings["model"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / 'config.json'}: expected the configuration of a {name}; {error}") from error

    def _check(self, x: Tensor, name: str) -> None:
        self._check_shape(x, name)
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected floating-point images in [-1, 1]; got {x.dtype}")

    def _check_shape(self, images: Tensor, name: str) -> None:
        expected = self.config.image_shape
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"{name}: expected images of shape (B, {', '.join(map(str, expected))}); got {tuple(images.shape)}"
            )


def log_mean_exp(bounds: Tensor) -> Tensor:
    """The importance-weighted bound ``(B,)`` of bounds ``(K, B)``."""
    return bounds.logsumexp(0) - math.log(len(bounds))


def read_config(folder: Path) -> dict:
    """What ``config.json`` says: ``flow`` and ``model`` are :meth:`ImageFlow.describe`'s, the rest is the writer's."""
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: truncated or corrupt: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected the configuration of a flow; got {type(settings).__name__}")
    return settings


def read_dequantizer(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a model as JSON has them, with a dequantizer's made a :class:`DequantizerConfig` again."""
    dequantizer = settings.get("dequantizer")
    return settings | {"dequantizer": DequantizerConfig(**dequantizer) if dequantizer else None}


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f'source: no folder {repository!r}; reading it from the hub needs: pip install "tarflow[hub]"'
        ) from error
    return Path(snapshot_download(repository, allow_patterns=["config.json", "model.safetensors", "calibration.json"]))
