"""TarFlow: the flow over the patches of an image, its configuration and its samples."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import memory
from .coupling import make_coupling
from .decoding import Decoder, Report, calibration
from .denoising import tweedie
from .flow import TokenFlow, check_labels
from .flowpp.dequantizer import DequantizerConfig
from .flowpp.layers import parse
from .guidance import Guidance
from .image_flow import ImageFlow, at_least_one
from .patches import patchify, unpatchify
from .sizes import check_fields, check_totals


@dataclass(frozen=True)
class TarFlowConfig:
    """The shape of a TarFlow. The paper writes it as [patch_size-channels-num_blocks-layers_per_block].

    ``dequantizer`` is that of variational dequantization, Flow++'s; without one, the noise of training is uniform or
    Gaussian, and no part of the model.

    Raises:
        ValueError: a size that is no positive integer or beyond :mod:`tarflow.sizes`, an image that is not a whole
            number of patches, a width that is not a whole number of heads, an unknown coupling, a mixture that is to
            preserve volumes.
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
    coupling: str = "affine"
    num_mixtures: int = 8
    dequantizer: DequantizerConfig | None = None

    def __post_init__(self):
        check_fields(self)
        check_totals("layers_per_block", self.num_layers, self.image_shape)
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size: expected a divisor of image_size {self.image_size}; got {self.patch_size}")
        if self.channels % self.head_dim:
            raise ValueError(f"head_dim: expected a divisor of channels {self.channels}; got {self.head_dim}")
        make_coupling(self.coupling, self.num_mixtures, self.volume_preserving)
        if self.dequantizer is not None:
            parse(self.dequantizer.stack, self.image_shape)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.in_channels, self.image_size, self.image_size

    @property
    def num_layers(self) -> int:
        """Of all blocks; each has weights of its own."""
        return self.num_blocks * self.layers_per_block

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

    @property
    def summary(self) -> str:
        """In a line."""
        return (
            f"TarFlow {self.patch_size}-{self.channels}-{self.num_blocks}-{self.layers_per_block} "
            f"(patch-channels-blocks-layers), {self.num_tokens} tokens of {self.token_dim}"
        )

    def activation_bytes(self, itemsize: int = 4) -> int:
        """What autograd keeps of one image."""
        return memory.activation_bytes(self, itemsize)


class TarFlow(ImageFlow):
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

    config_class = TarFlowConfig

    def __init__(self, config: TarFlowConfig):
        super().__init__(config)
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
            coupling=config.coupling,
            num_mixtures=config.num_mixtures,
        )

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Image to latent: z ``(B, N, D)`` and the log-det of the map in nats, ``(B,)``."""
        return self.flow(self._to_tokens(x), labels)

    def log_prior(self, z: Tensor) -> Tensor:
        """The log-density of latents ``(B, N, D)`` in nats, ``(B,)``."""
        return self.flow.log_prior(z)

    def update_prior(self, z: Tensor, rate: float | Tensor) -> None:
        """See :meth:`TokenFlow.update_prior`; only that of a volume-preserving flow adapts."""
        if self.config.volume_preserving:
            self.flow.update_prior(z, rate)

    def inverse(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        guidance: Guidance | None = None,
        decoder: str | Decoder = "auto",
    ) -> Tensor:
        """Latent ``(B, N, D)`` to image ``(B, C, H, W)``, the inverse of :meth:`forward`; not differentiable.

        A calibrated model may decode in parallel, to a tolerance: ``"sequential"`` is exact. See :meth:`sample`.
        """
        return self._to_images(self.flow.inverse(z, labels, guidance, decoder))

    def denoise(self, y: Tensor, sigma: float, labels: Tensor | None = None) -> Tensor:
        """``y + sigma^2 grad_y log p(y)``, the mean of clean images given images with the noise of training.

        ValueError for a sigma that is no number in [0, 10].
        """
        self._check(y, "y")
        check_sigma("sigma", sigma)
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
            ValueError, TypeError: num below 1, or more than there is memory for; labels that do not fit; a guidance
                that can have no effect; a denoise_sigma beyond [0, 10]; an unknown decoder.
        """
        num = self.check_num(num)
        check_sigma("denoise_sigma", denoise_sigma)
        check_labels(labels, num, self.config.num_classes)
        z = self.flow.sample_prior(num, generator)
        labels = None if labels is None else labels.to(z.device)
        if chunk_size is None:
            per_sample = memory.decoding_bytes(self.config, branches=2)
            if denoise_sigma:
                per_sample = max(per_sample, self.config.activation_bytes())
            chunk_size = memory.chunk_size(per_sample, z.device)
        chunk_size = at_least_one("chunk_size", chunk_size)
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
        """Write ``config.json`` and ``model.safetensors``, and the calibration of the decoders, or remove another's."""
        super().save_pretrained(folder)
        calibration.replace(Path(folder), self.flow.calibration)

    def check_state(self, state: dict[str, Tensor], origin: str) -> None:
        """See :meth:`ImageFlow.check_state`; the variance of the prior has to be positive."""
        super().check_state(state, origin)
        least = state["flow.prior_variance"].min()
        if not least > 0:
            raise ValueError(f"{origin}: expected positive numbers in flow.prior_variance; got {least:g}")

    def _load_beside(self, folder: Path) -> None:
        self.flow.calibration = calibration.load(folder)

    @classmethod
    def from_published(cls, source: Path | str | dict[str, Tensor], in_channels: int = 3) -> "TarFlow":
        """Read a checkpoint of the paper's code; see :func:`tarflow.published.load`."""
        from .published import load

        return load(source, in_channels)

    def _to_tokens(self, x: Tensor) -> Tensor:
        self._check(x, "x")
        return patchify(x, self.config.patch_size)

    def _to_images(self, tokens: Tensor) -> Tensor:
        return unpatchify(tokens, self.config.patch_size, self.config.image_size)


def check_sigma(name: str, sigma: float) -> None:
    """ValueError for a standard deviation of noise that is no number in [0, 10], five times the range of images."""
    if not 0 <= sigma <= 10:
        raise ValueError(f"{name}: expected a number from 0 to 10, images being in [-1, 1]; got {sigma}")
