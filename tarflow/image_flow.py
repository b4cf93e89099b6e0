"""The common part of TarFlow and Flow++: densities of images, probabilities of 8-bit pixels, and files."""

import contextlib
import math
import operator
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from . import hardware, hub, pretrained
from .compatibility import renamed_arguments
from .decoding import Decoder, ProgressCallback, calibration
from .decoding.decoder import Timing
from .denoising import Denoising
from .guidance import Guidance
from .noise import add_uniform_noise
from .validation import NoiseLevels, describe_argument

__all__ = ["FlowConfig", "ImageFlow", "at_least_one", "in_mode", "initialize_from_data", "log_mean_exp"]


class FlowConfig(Protocol):
    """The configuration of a flow over images."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    @property
    def num_dims(self) -> int:
        """The number of values in an image."""

    @property
    def num_layers(self) -> int:
        """The number of layers that have weights of their own."""

    @property
    def num_classes(self) -> int:
        """The number of classes, 0 without labels."""

    @property
    def summary(self) -> str:
        """The architecture in one line."""

    def activation_bytes(self, itemsize: int = 4) -> int:
        """Estimate the bytes that autograd keeps of one image."""

    def for_data(self, image_size: int, in_channels: int, num_classes: int) -> Self:
        """Return the configuration of the same architecture for other images; ValueError where they do not fit."""


class ImageFlow(nn.Module):
    """A flow over images ``(B, C, H, W)``, float in [-1, 1].

    Subclasses bring ``config_class``, ``forward``, ``inverse``, ``log_prior``, ``sample`` and ``stages``. A class that
    is derived from this one is found by ``from_pretrained``.

    Dropout is for training alone: in training mode, ``forward`` and :meth:`dequantize` have it, so that
    ``inverse(forward(x))`` is not x there. Scores and samples are without dropout, whatever the mode of the model.

    Args:
        config: the configuration.
        dequantizer: module of variational dequantization; None where noise is uniform (or Gaussian, for samples).
    """

    config_class: type[Any]
    network_name: ClassVar[str] = "networks"
    """Name of the parts that run in low precision under autocast."""
    decoders: ClassVar[tuple[str, ...]] = ("auto",)
    """Names of the decoders that :meth:`sample` takes."""
    supports_guidance: ClassVar[bool] = False
    """Whether :meth:`sample` takes guidance and denoises."""
    calibration: Sequence[Timing] = ()
    """Timings that the ``auto`` decoder follows."""

    def __init__(self, config: Any, dequantizer: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.dequantizer = dequantizer
        self.metadata: dict[str, Any] = {}
        """What ``config.json`` told beside the configuration, see :func:`tarflow.load_pretrained`."""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        pretrained.FLOWS.append(cls)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype

    @property
    def prior_adapts(self) -> bool:
        """Whether the prior follows the latents, see :meth:`update_prior`."""
        return False

    @property
    def stages(self) -> list[str]:
        """Names of the frames of a trajectory that follow the latent."""
        raise NotImplementedError

    @property
    def noise_levels(self) -> NoiseLevels:
        """The smallest and the largest noise level of a model that is conditioned on one, else None."""
        return None

    def log_prob(self, x: Tensor, labels: Tensor | None = None, *, noise_level: float | Tensor | None = None) -> Tensor:
        """Return the log-density of images in [-1, 1], in nats, ``(B,)``, without dropout.

        That of a model with :attr:`noise_levels` is one of images with noise of ``noise_level``, a positive number or
        ``(B,)``, one for each image.
        """
        with in_mode(self, training=False):
            z, logdet = self(x, labels, noise_level=noise_level)
        return self.log_prior(z) + logdet

    def denoising_levels(self, sigma: float, denoising: Denoising | None = None) -> list[float]:
        """Return the noise levels at which noise of sigma is removed, one for each step, and 0."""
        return [sigma] * ((denoising and denoising.steps) or 1) + [0.0]

    def log_prior(self, z: Tensor) -> Tensor:
        """Return the log-density of latents in nats, ``(B,)``."""
        raise NotImplementedError

    def inverse(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map latents to images ``(B, C, H, W)``."""
        raise NotImplementedError

    def sample(
        self,
        num: int,
        labels: Tensor | None = None,
        guidance: Guidance | None = None,
        denoise_sigma: float | None = None,
        decoder: str | Decoder = "auto",
        generator: torch.Generator | None = None,
        return_trajectory: bool = False,
        chunk_size: int | None = None,
        progress: ProgressCallback = lambda statistics: None,
        denoising: Denoising | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Draw ``num`` images.

        Args:
            num: number of images.
            labels: int64 ``(num,)``, or None for an unconditional model.
            guidance: see :class:`tarflow.Guidance`; None samples the model's own distribution.
            denoise_sigma: the standard deviation of the noise in training, to be removed from the samples; 0 leaves it.
                Of a model with :attr:`noise_levels` it is the level at which samples are drawn, the largest for 0.
                None is what the ``config.json`` of a model says that was read from a folder or a hub, and 0 without.
            decoder: a :class:`tarflow.Decoder` or the name of one, see :attr:`decoders`: ``"sequential"``,
                ``"jacobi"``, or ``"auto"``, the faster of these for each block where the model was calibrated (at the
                end of training, or by ``tarflow calibrate``), and elsewhere parallel passes for as long as they pay.
            generator: source of randomness, on the device of the model. It makes the samples reproducible, whatever the
                chunks (to the tolerance, where ``auto`` decodes chunks of different sizes differently).
            return_trajectory: whether to return the image at every stage as well.
            chunk_size: number of images to decode at a time; by default as many as half of the free memory holds. No
                more than these are denoised at a time, and fewer where their activations need more memory.
            progress: a function that is called after every block of every chunk with a
                :class:`tarflow.decoding.BlockStatistics`.
            denoising: in which steps the noise is removed; None is in as many as ``config.json`` says, else
                :class:`tarflow.Denoising` as it is.

        Returns:
            images ``(num, C, H, W)``, nominally in [-1, 1] but not clipped, and, if asked for, their trajectory
            ``(len(stages) + 1, num, C, H, W)`` from the latent to the image before denoising, with one more frame for
            each of the :meth:`denoising_levels` between the first and the last.

        Raises:
            ValueError, TypeError: num below 1, or more than there is memory for; labels that do not fit; a guidance
                that can have no effect; a denoise_sigma beyond [0, 10] or the noise levels of the model; an unknown
                decoder; an argument that the model does not support.
        """
        raise NotImplementedError

    def dequantize(self, pixels: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Add noise to 8-bit pixels within their bins; return images in [-1, 1] and the log-density of the noise.

        The noise is that of the dequantizer, or uniform, whose log-density is 0; it is in nats, ``(B,)``.
        """
        if self.dequantizer is None:
            return add_uniform_noise(pixels, generator).to(self.dtype), torch.zeros(len(pixels), device=pixels.device)
        eps = torch.randn(pixels.shape, generator=generator, device=pixels.device, dtype=self.dtype)
        return self.dequantizer(pixels, eps)

    @renamed_arguments(draws="num_samples")
    def discrete_log_prob(
        self,
        pixels: Tensor,
        labels: Tensor | None = None,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return a lower bound on the log-probability of 8-bit images, in nats, ``(B,)``.

        ``log mean_k p(pixels + u_k) / q(u_k | pixels)`` over K samples of noise, with p the density in units of pixels:
        in expectation the evidence lower bound for K = 1, and rising to the exact log-probability with K. It is without
        dropout.

        Args:
            pixels: uint8 ``(B, C, H, W)``.
            labels: int64 ``(B,)``, or None for an unconditional model.
            num_samples: K, the number of importance-weighted samples.
            generator: source of the noise, on the device of the model.

        Raises:
            TypeError: pixels are no tensor of uint8, or num_samples no integer.
            ValueError: pixels of another shape, labels that do not fit, num_samples below 1.

        Source: importance weighting, Burda et al. (arXiv 1509.00519).
        """
        return log_mean_exp(self.importance_log_weights(pixels, labels, num_samples, generator))

    def importance_log_weights(
        self,
        pixels: Tensor,
        labels: Tensor | None = None,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return ``log p(pixels + u_k) - log q(u_k | pixels)``, the log-weights of :meth:`discrete_log_prob`.

        They are float64 ``(K, B)``. Their mean over the samples is the one-sample bound, with less variance than a
        single sample has. Arguments and errors are those of :meth:`discrete_log_prob`.
        """
        self._check_pixels(pixels)
        log_weights = []
        with in_mode(self, training=False):
            for _ in range(at_least_one("num_samples", num_samples)):
                x, log_q = self.dequantize(pixels, generator)
                log_weights.append((self.log_prob(x, labels) - log_q).double())
        return torch.stack(log_weights) - self.config.num_dims * math.log(128)

    @renamed_arguments(draws="num_samples")
    def bounds(self, *arguments: Any, **options: Any) -> Tensor:
        """Call :meth:`importance_log_weights`, whose former name this is, with a DeprecationWarning."""
        warnings.warn("bounds: is now called importance_log_weights", DeprecationWarning, stacklevel=3)
        return self.importance_log_weights(*arguments, **options)

    def initialize(
        self, pixels: Tensor, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> None:
        """Set the scales of all convolutions and norms by a batch of 8-bit images; transformers need no data.

        Each layer does so when it first sees its inputs, which come through layers that have done so already, with the
        dropout of training.
        """
        self._check_pixels(pixels)
        if not len(pixels):
            raise ValueError("pixels: expected at least one image, whose values set the scales; got none")
        with in_mode(self, training=True):
            initialize_from_data(self, lambda: self(self.dequantize(pixels, generator)[0], labels))

    def update_prior(self, z: Tensor, rate: float | Tensor) -> None:
        """Adapt the prior to the latents of a batch, if it is one that adapts."""

    @classmethod
    def from_pretrained(cls, source: Path | str, **download: Any) -> Self:
        """Read a model of this class or one derived from it, see :func:`tarflow.pretrained.load_pretrained`.

        ``ImageFlow.from_pretrained`` returns whichever flow it finds.
        """
        model, _ = pretrained.load_pretrained(source, cls, **download)
        return model

    def save_pretrained(self, folder: Path | str, **metadata: Any) -> None:
        """Write the model into a folder, see :func:`tarflow.pretrained.save_pretrained`."""
        pretrained.save_pretrained(self, folder, **metadata)

    def push_to_hub(self, repo_id: str, *, license: str, **options: Any) -> str:
        """Publish the model as it is now, its metadata and a card that tells of them, see :func:`tarflow.hub.push`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.push(self, folder, repo_id, license=license, **options)

    def save_weights(self, path: Path | str) -> None:
        """Write the weights alone, see :func:`tarflow.pretrained.save_weights`."""
        pretrained.save_weights(self, path)

    def load_calibration(self, folder: Path) -> None:
        """Read the timings that lie beside the weights, if there is a decoder to choose."""
        if len(self.decoders) > 1:
            self.calibration = calibration.load(folder)

    def config_dict(self) -> dict[str, Any]:
        """Return the entries of ``config.json`` that describe the model: the name of its class, its configuration."""
        return {"flow": type(self).__name__, "model": asdict(self.config)}

    def check_state(self, state: dict[str, Tensor], origin: str) -> None:
        """Raise ValueError for a state dict of another model, see :func:`tarflow.pretrained.check_state`."""
        pretrained.check_state(self.state_dict(), state, origin)

    def check_num(self, num: int) -> int:
        """Return a number of samples as an int; raise ValueError where memory cannot hold so many."""
        num = at_least_one("num", num)
        # The latents and the images of all of them, however few are decoded at a time.
        needed = 2 * num * self.config.num_dims * self.dtype.itemsize
        hardware.check_memory(needed, self.device, f"num = {num} samples")
        return num

    def _check_pixels(self, pixels: Tensor) -> None:
        self._check_shape(pixels, "pixels")
        if pixels.dtype != torch.uint8:
            raise TypeError(f"pixels: expected uint8; got {pixels.dtype}")

    def _check_images(self, images: Tensor, name: str) -> None:
        self._check_shape(images, name)
        if not images.is_floating_point():
            raise TypeError(f"{name}: expected floating-point images in [-1, 1]; got {images.dtype}")

    def _check_shape(self, images: Tensor, name: str) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; got {describe_argument(images)}")
        expected = self.config.image_shape
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"{name}: expected images of shape (B, {', '.join(map(str, expected))}); got {tuple(images.shape)}"
            )


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Within the block, put all modules in training or in evaluation mode; after it, restore the mode of each."""
    changed = [module for module in model.modules() if module.training != training]
    for module in changed:
        module.training = training
    try:
        yield
    finally:
        for module in changed:
            module.training = not training


def initialize_from_data(model: nn.Module, run: Callable[[], object]) -> None:
    """Run a model once; every layer that has a method ``initialize`` first sets itself by its inputs."""
    layers = [layer for layer in model.modules() if layer is not model and hasattr(layer, "initialize")]
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: layer.initialize(*inputs)) for layer in layers]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Return the importance-weighted bound ``(B,)`` of log-weights ``(K, B)``."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def at_least_one(name: str, value: int) -> int:
    """Convert an integer of any library to an int; raise TypeError where it is none, ValueError below 1."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer; got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name}: expected at least 1; got {number}")
    return number
