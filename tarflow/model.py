"""TarFlow: the flow over the patches of an image, its configuration, its samples and its files."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from . import memory
from .decoding import Decoder, Report, calibration
from .denoising import tweedie
from .files import replacing
from .flow import TokenFlow, check_labels
from .guidance import Guidance
from .patches import patchify, unpatchify


@dataclass(frozen=True)
class TarFlowConfig:
    """The shape of a TarFlow. The paper writes it as [patch_size-channels-num_blocks-layers_per_block].

    Raises:
        ValueError: a size that is not positive, an image that is not a whole number of patches, a width that is not a
            whole number of heads.
    """

    image_size: int = 28
    in_channels: int = 1
    patch_size: int = 4
    channels: int = 128
    num_blocks: int = 4
    layers_per_block: int = 4
    num_classes: int = 0
    head_dim: int = 64
    expansion: int = 4
    volume_preserving: bool = False

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "num_classes" else 1
            if field.type is int and (not isinstance(value, int) or value < least):
                raise ValueError(f"{field.name}: expected an integer >= {least}; got {value!r}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size: expected a divisor of image_size {self.image_size}; got {self.patch_size}")
        if self.channels % self.head_dim:
            raise ValueError(f"head_dim: expected a divisor of channels {self.channels}; got {self.head_dim}")

    @property
    def num_tokens(self) -> int:
        """N, the number of patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def token_dim(self) -> int:
        """D, the number of values in a patch."""
        return self.in_channels * self.patch_size**2

    @property
    def num_dims(self) -> int:
        """N * D, the number of values in an image."""
        return self.num_tokens * self.token_dim


class TarFlow(nn.Module):
    """A transformer autoregressive flow over images ``(B, C, H, W)``, float in [-1, 1].

    Labels are int64 ``(B,)`` in [-1, num_classes), where -1 is a dropped label; None for an unconditional model.

    >>> model = TarFlow(TarFlowConfig(image_size=8, patch_size=4, channels=64, num_blocks=2, layers_per_block=1))
    >>> x = torch.rand(3, 1, 8, 8) * 2 - 1
    >>> z, logdet = model(x)
    >>> z.shape, logdet.shape
    (torch.Size([3, 4, 16]), torch.Size([3]))
    >>> torch.allclose(model.inverse(z), x, atol=1e-5)
    True
    """

    def __init__(self, config: TarFlowConfig):
        super().__init__()
        self.config = config
        self.flow = TokenFlow(
            config.num_tokens,
            config.token_dim,
            config.channels,
            config.num_blocks,
            config.layers_per_block,
            head_dim=config.head_dim,
            expansion=config.expansion,
            num_classes=config.num_classes,
            volume_preserving=config.volume_preserving,
        )

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Image to latent: z ``(B, N, D)`` and the log-det of the map in nats, ``(B,)``."""
        return self.flow(self._to_tokens(x), labels)

    def log_prob(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The log-density of images in [-1, 1], in nats, ``(B,)``."""
        return self.flow.log_prob(self._to_tokens(x), labels)

    def inverse(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        guidance: Guidance | None = None,
        decoder: str | Decoder = "sequential",
    ) -> Tensor:
        """Latent ``(B, N, D)`` to image ``(B, C, H, W)``, the inverse of :meth:`forward`; not differentiable."""
        return self._to_images(self.flow.inverse(z, labels, guidance, decoder))

    def denoise(self, y: Tensor, sigma: float, labels: Tensor | None = None) -> Tensor:
        """``y + sigma^2 grad_y log p(y)``, the mean of clean images given images with the noise of training."""
        self._check(y, "y")
        return tweedie(lambda noisy: self.log_prob(noisy, labels), y, sigma)

    def sample(
        self,
        num: int,
        labels: Tensor | None = None,
        guidance: Guidance | None = None,
        denoise_sigma: float = 0.0,
        decoder: str | Decoder = "auto",
        generator: torch.Generator | None = None,
        return_trajectory: bool = False,
        chunk_size: int | None = None,
        report: Report = lambda decoded: None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw ``num`` images.

        Args:
            num: how many.
            labels: int64 ``(num,)``, or None for an unconditional model.
            guidance: see :class:`tarflow.Guidance`; None samples the model's own distribution.
            denoise_sigma: the standard deviation of the noise in training, to be removed from the samples; 0 leaves it.
            decoder: a :class:`tarflow.Decoder` or the name of one: ``"sequential"``, ``"jacobi"``, or ``"auto"``, the
                faster of these for each block where the model was calibrated (``tarflow calibrate``).
            generator: makes the samples reproducible, whatever the chunks (to the tolerance, where ``auto`` decodes
                chunks of different sizes differently); on the device of the model.
            return_trajectory: also return the image after every block.
            chunk_size: how many images to decode at a time; by default what half of the free memory holds.
            report: called after every block of every chunk with a :class:`tarflow.decoding.Decoded`.

        Returns:
            images ``(num, C, H, W)``, nominally in [-1, 1] but not clipped, and, if asked for, their trajectory
            ``(num_blocks + 1, num, C, H, W)`` from the latent to the image before denoising.

        Raises:
            ValueError, TypeError: num below 1; labels that do not fit; a guidance that can have no effect; an unknown
                decoder.
        """
        if num < 1:
            raise ValueError(f"num: expected at least 1; got {num}")
        check_labels(labels, num, self.config.num_classes)
        z = self.flow.sample_prior(num, generator)
        labels = None if labels is None else labels.to(z.device)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1; got {chunk_size}")
        if chunk_size is None:
            per_sample = memory.decoding_bytes(self.config, branches=2)
            if denoise_sigma:
                per_sample = max(per_sample, memory.activation_bytes(self.config))
            chunk_size = memory.chunk_size(per_sample, z.device)
        samples, trajectories = [], []
        for start in range(0, num, chunk_size):
            chunk = slice(start, start + chunk_size)
            chunk_labels = None if labels is None else labels[chunk]
            frames = [z[chunk], *self.flow.trajectory(z[chunk], chunk_labels, guidance, decoder, report)]
            images = self._to_images(frames[-1])
            if return_trajectory:
                trajectories.append(torch.stack([self._to_images(frame) for frame in frames]))
            samples.append(self.denoise(images, denoise_sigma, chunk_labels) if denoise_sigma else images)
        images = torch.cat(samples)
        return (images, torch.cat(trajectories, dim=1)) if return_trajectory else images

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``config.json`` and ``model.safetensors``, and the calibration of the decoders if there is one."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_weights(folder / "model.safetensors")
        with replacing(folder / "config.json") as path:
            path.write_text(json.dumps({"model": asdict(self.config)}, indent=2) + "\n")
        if self.flow.calibration:
            calibration.save(folder, self.flow.calibration)

    def save_weights(self, path: Path | str) -> None:
        """Write the weights alone, as safetensors, beside what may be there and then over it."""
        with replacing(path) as beside:
            beside.write_bytes(save({name: tensor.contiguous() for name, tensor in self.state_dict().items()}))

    @classmethod
    def from_pretrained(cls, source: Path | str) -> "TarFlow":
        """Read what :meth:`save_pretrained` wrote: from a folder, or from the Hugging Face hub by repository name.

        Raises:
            FileNotFoundError: the folder or one of its two files is missing.
            ValueError: a file is truncated or corrupt, or the weights are those of another configuration.
        """
        folder = Path(source)
        if not folder.exists() and str(source).count("/") == 1 and not str(source).startswith("."):
            folder = _download(str(source))
        config_path, weights_path = folder / "config.json", folder / "model.safetensors"
        for path in (config_path, weights_path):
            if not path.is_file():
                raise FileNotFoundError(f"source: expected a folder with config.json and model.safetensors; no {path}")
        try:
            config = TarFlowConfig(**read_config(folder)["model"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{config_path}: expected the configuration of a TarFlow; {error}") from error
        try:
            state = load_file(weights_path)
        except SafetensorError as error:
            raise ValueError(f"{weights_path}: truncated or corrupt: {error}") from error
        model = cls(config).to(next((tensor.dtype for tensor in state.values()), torch.float32))
        model.load_checked(state, str(weights_path))
        model.flow.calibration = calibration.load(folder)
        return model

    @classmethod
    def from_published(cls, source: Path | str | dict[str, Tensor], in_channels: int = 3) -> "TarFlow":
        """Read a checkpoint of the paper's code; see :func:`tarflow.published.load`."""
        from .published import load

        return load(source, in_channels)

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
        self.load_state_dict(state)

    def _to_tokens(self, x: Tensor) -> Tensor:
        self._check(x, "x")
        return patchify(x, self.config.patch_size)

    def _check(self, x: Tensor, name: str) -> None:
        config = self.config
        expected = (config.in_channels, config.image_size, config.image_size)
        if x.dim() != 4 or x.shape[1:] != expected:
            raise ValueError(
                f"{name}: expected images of shape (B, {', '.join(map(str, expected))}); got {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected floating-point images in [-1, 1]; got {x.dtype}")

    def _to_images(self, tokens: Tensor) -> Tensor:
        return unpatchify(tokens, self.config.patch_size, self.config.image_size)


def read_config(folder: Path) -> dict:
    """What ``config.json`` says: ``model`` is a :class:`TarFlowConfig`, the rest is up to whoever wrote it."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: truncated or corrupt: {error}") from error


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f'source: no folder {repository!r}; reading it from the hub needs: pip install "tarflow[hub]"'
        ) from error
    return Path(snapshot_download(repository, allow_patterns=["config.json", "model.safetensors", calibration.FILE]))
