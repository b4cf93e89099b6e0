"""TarFlow: the flow over the patches of an image, its configuration and its samples."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from . import hardware
from .decoding import NAMES, Decoder, ProgressCallback
from .decoding.decoder import Timing
from .denoising import Denoising, denoise_by_levels, tweedie
from .flow import TokenFlow, for_each_block
from .flowpp.dequantizer import Dequantizer, DequantizerConfig
from .flowpp.splits import parse_stack
from .guidance import Guidance
from .image_flow import ImageFlow, at_least_one
from .transformer import RotaryPositions
from .transforms import make_transform
from .validation import NoiseLevels, PerBlock, check_fields, check_sigma, check_totals

__all__ = ["STARFLOW", "TarFlow", "TarFlowConfig", "patchify", "unpatchify"]


STARFLOW: dict[str, Any] = {
    "coupling": "softplus",
    "positions": "rotary",
    "final_norm": True,
    "start_token": True,
    "reversed_blocks": "even",
}
"""The configuration of a STARFlow, beside its sizes and a prefix (arXiv 2506.06276)."""


@dataclass(frozen=True)
class TarFlowConfig:
    """The architecture of a TarFlow; the paper writes it as [patch_size-channels-num_blocks-layers_per_block].

    Args:
        image_size, in_channels: size and channels of the images.
        patch_size: side of a patch.
        channels: width of the transformers, one for all blocks or one for each, beginning with the data.
        num_blocks: number of blocks.
        layers_per_block: number of transformer layers in a block, one for all or one for each.
        num_classes: number of classes, 0 for an unconditional model.
        head_dim: size of an attention head.
        expansion: factor of the hidden layer of the MLPs.
        volume_preserving: whether alpha is 0 throughout.
        coupling: the map of each value: an affine one, one whose scale is a softplus, or a mixture of logistics with an
            affine map behind it.
        num_mixtures: number of logistics in a mixture.
        noise_levels: smallest and largest standard deviation of the Gaussian noise of images, if the model is to be
            conditioned on it, as iTarFlow is (arXiv 2604.20041); None for a model of one noise.
        dequantizer: configuration of variational dequantization, Flow++'s; without one, the noise of training is
            uniform or Gaussian, and no part of the model.
        positions, final_norm, start_token, reversed_blocks, prefix_length, prefix_dim: what STARFlow changes (arXiv
            2506.06276), see :class:`tarflow.TokenFlow`. The prefix is what the images are conditioned on, in place of
            an embedding of a class.

    Raises:
        ValueError: a size that is no positive integer or beyond :mod:`tarflow.validation`, an image that is not a whole
            number of patches, a width that is not a whole number of heads, an unknown coupling, a mixture that is to
            preserve volumes, noise levels that are not two rising positive numbers.
    """

    image_size: int = 28
    in_channels: int = 1
    patch_size: int = 4
    channels: PerBlock = 128
    num_blocks: int = 4
    layers_per_block: PerBlock = 4
    num_classes: int = 0
    head_dim: int = 64
    expansion: int = 4
    volume_preserving: bool = False
    coupling: Literal["affine", "softplus", "mixture"] = "affine"
    num_mixtures: int = 8
    noise_levels: NoiseLevels = None
    dequantizer: DequantizerConfig | None = None
    positions: Literal["learned", "rotary"] = "learned"
    final_norm: bool = False
    start_token: bool = False
    reversed_blocks: Literal["odd", "even"] = "odd"
    prefix_length: int = 0
    prefix_dim: int = 0

    def __post_init__(self):
        check_fields(self)
        check_totals("layers_per_block", self.num_layers, self.image_shape)
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size: expected a divisor of image_size {self.image_size}; got {self.patch_size}")
        if any(channels % self.head_dim for channels in self.channels_of_blocks):
            raise ValueError(f"head_dim: expected a divisor of channels {self.channels}; got {self.head_dim}")
        make_transform(self.coupling, self.num_mixtures, self.volume_preserving)
        if bool(self.prefix_length) != bool(self.prefix_dim):
            raise ValueError(f"prefix_dim: expected a size for a prefix_length alone; got {self.prefix_dim}")
        if self.positions == "rotary":
            RotaryPositions(self.num_tokens, self.head_dim, self.prefix_length)
        if self.dequantizer is not None:
            parse_stack(self.dequantizer.stack, self.image_shape)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.in_channels, self.image_size, self.image_size

    @property
    def channels_of_blocks(self) -> tuple[int, ...]:
        """The width of each block."""
        return for_each_block("channels", self.channels, self.num_blocks)

    @property
    def layers_of_blocks(self) -> tuple[int, ...]:
        """The number of layers of each block."""
        return for_each_block("layers_per_block", self.layers_per_block, self.num_blocks)

    @property
    def num_layers(self) -> int:
        """The number of layers of all blocks; each has weights of its own."""
        return sum(self.layers_of_blocks)

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
        """The architecture in one line."""
        channels, layers = (str(size).strip("()").replace(", ", "/") for size in (self.channels, self.layers_per_block))
        return (
            f"TarFlow {self.patch_size}-{channels}-{self.num_blocks}-{layers} "
            f"(patch-channels-blocks-layers), {self.num_tokens} tokens of {self.token_dim}"
            + ("" if self.noise_levels is None else ", noise levels {:g} to {:g}".format(*self.noise_levels))
            + (f", after {self.prefix_length} embeddings of {self.prefix_dim}" if self.prefix_dim else "")
        )

    def for_data(self, image_size: int, in_channels: int, num_classes: int) -> Self:
        """Return the configuration of the same architecture for other images."""
        return replace(self, image_size=image_size, in_channels=in_channels, num_classes=num_classes)

    def activation_bytes(self, itemsize: int = 4) -> int:
        """Estimate the bytes that autograd keeps of one image.

        Per layer these are the inputs of two norms, which are float32, and in numbers of ``itemsize`` bytes their
        outputs, qkv, attention, the MLP twice; per block the parameters of its mixtures, and about as much again for
        the computation of their map. On a CPU that trains in bfloat16 attention is float32 all the same, which is a
        quarter more.
        """
        blocks = zip(self.layers_of_blocks, self.channels_of_blocks, strict=True)
        per_channel = 2 * 4 + (2 + 3 + 1 + 2 * self.expansion) * itemsize
        per_token = per_channel * sum(layers * channels for layers, channels in blocks)
        of_prefix = self.prefix_length * per_token  # no more than that: all but one block have none
        return self.num_tokens * per_token + of_prefix + 2 * self.num_blocks * self._mixture_bytes

    def decoding_bytes(self, branches: int = 1, itemsize: int = 4) -> int:
        """Estimate the bytes that decoding one image takes.

        These are the key-value cache in the block being decoded, the largest one, and a layer's activations of all its
        tokens; or the parameters of their mixtures, of each branch and guided, and the intermediate results of solving
        for the tokens.
        """
        active = 3 + 2 * self.expansion + 6  # qkv, the MLP before and after its GELU, residuals and norms
        blocks = zip(self.layers_of_blocks, self.channels_of_blocks, strict=True)
        widest = max(channels * (2 * layers + active) for layers, channels in blocks)
        layers = branches * (self.prefix_length + self.num_tokens) * widest * itemsize
        solving = 7  # exponentials, sums and their products, in stock operators, over the parameters
        return layers + (branches + 1 + solving) * self._mixture_bytes

    @property
    def _mixture_bytes(self) -> int:
        """The bytes of the float32 logits, means and log-scales for every value of an image."""
        return 4 * self.num_dims * 3 * self.num_mixtures if self.coupling == "mixture" else 0


class TarFlow(ImageFlow):
    """A transformer autoregressive flow over images ``(B, C, H, W)``, float in [-1, 1].

    Labels are int64 ``(B,)`` in [-1, num_classes), where -1 is a dropped label; None for an unconditional model. With
    noise levels it is a model of noisy images for each level: ``noise_level`` is a positive number, or ``(B,)``, one
    for each image; None for a model without.

    >>> model = TarFlow(TarFlowConfig(image_size=8, patch_size=4, channels=64, num_blocks=2, layers_per_block=1))
    >>> x = torch.rand(3, 1, 8, 8) * 2 - 1
    >>> z, logdet = model(x)
    >>> z.shape, logdet.shape
    (torch.Size([3, 4, 16]), torch.Size([3]))
    >>> torch.allclose(model.inverse(z), x, atol=1e-5)
    True
    """

    config_class = TarFlowConfig
    network_name = "transformers"
    decoders = NAMES
    supports_guidance = True
    from_published: ClassVar[Callable[..., "TarFlow"]]
    """The former name of :func:`tarflow.load_published`."""

    def __init__(self, config: TarFlowConfig):
        super().__init__(config, Dequantizer.of(config.dequantizer, config.image_shape))
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
            takes_noise_level=config.noise_levels is not None,
            positions=config.positions,
            final_norm=config.final_norm,
            start_token=config.start_token,
            reversed_blocks=config.reversed_blocks,
            prefix_length=config.prefix_length,
            prefix_dim=config.prefix_dim,
        )

    @property
    def noise_levels(self) -> NoiseLevels:
        """The smallest and the largest noise level, None for a model without."""
        return self.config.noise_levels

    @property
    def prior_adapts(self) -> bool:
        """Whether the prior follows the latents: that of a volume-preserving flow does."""
        return self.config.volume_preserving

    @property
    def stages(self) -> list[str]:
        """Names of the frames of a trajectory that follow the latent."""
        return [f"after block {t}" for t in range(self.config.num_blocks, 0, -1)]

    @property
    def calibration(self) -> Sequence[Timing]:
        """Timings that the ``auto`` decoder follows."""
        return self.flow.calibration

    @calibration.setter
    def calibration(self, timings: Sequence[Timing]) -> None:
        self.flow.calibration = timings

    def set_prefixes(self, prefixes: Tensor) -> None:
        """Give the model other classes: what each is conditioned on, such as the embedding of a text.

        Args:
            prefixes: those of a dropped label and of every class, ``(1 + num_classes, L, E)``.

        Raises:
            ValueError: they do not fit, or the model is conditioned on no prefix.
        """
        expected = self.config.prefix_length, self.config.prefix_dim
        if not self.config.prefix_dim or prefixes.dim() != 3 or prefixes.shape[1:] != expected or not len(prefixes):
            got, (length, size) = tuple(prefixes.shape), expected
            raise ValueError(f"prefixes: expected shape (1 + num_classes, {length}, {size}); got {got}")
        self.config = replace(self.config, num_classes=len(prefixes) - 1)
        self.flow.num_classes = self.config.num_classes
        self.flow.class_prefixes = prefixes.to(self.flow.prior_variance)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, *, noise_level: float | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map images to latents z ``(B, N, D)``; also return the log-det in nats, ``(B,)``."""
        self._check_images(x, "x")
        return self.flow(patchify(x, self.config.patch_size), labels, noise_level=noise_level)

    def log_prior(self, z: Tensor) -> Tensor:
        """Return the log-density of latents ``(B, N, D)`` in nats, ``(B,)``."""
        return self.flow.log_prior(z)

    def update_prior(self, z: Tensor, rate: float | Tensor) -> None:
        """Adapt the prior to the latents of a batch, where :attr:`prior_adapts`."""
        if self.prior_adapts:
            self.flow.update_prior(z, rate)

    def inverse(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        guidance: Guidance | None = None,
        decoder: str | Decoder = "auto",
        *,
        noise_level: float | Tensor | None = None,
    ) -> Tensor:
        """Map latents ``(B, N, D)`` to images ``(B, C, H, W)``, the inverse of :meth:`forward`; not differentiable.

        ``"auto"`` may decode in parallel, to a tolerance: ``"sequential"`` is exact. See :meth:`sample`.
        """
        return self._to_images(self.flow.inverse(z, labels, guidance, decoder, noise_level=noise_level))

    def denoise(self, y: Tensor, sigma: float, labels: Tensor | None = None) -> Tensor:
        """Return ``y + sigma^2 grad_y log p(y)``, the mean of clean images given images with the noise of training.

        The density of a model with noise levels is that of level sigma. ValueError for a sigma that is no number in
        [0, 10].
        """
        self._check_images(y, "y")
        check_sigma("sigma", sigma)
        level = None if self.noise_levels is None else sigma
        return tweedie(lambda noisy: self.log_prob(noisy, labels, noise_level=level), y, sigma)

    def denoising_levels(self, sigma: float, denoising: Denoising | None = None) -> list[float]:
        """Return the noise levels at which noise of sigma is removed, one for each step, and 0."""
        if self.noise_levels is None:
            return super().denoising_levels(sigma, denoising)
        return (denoising or Denoising()).levels(sigma, self.noise_levels[0])

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
        """Draw ``num`` images; arguments, results and errors are those of :meth:`ImageFlow.sample`."""
        num = self.check_num(num)
        if denoise_sigma is None:
            denoise_sigma = float(self.metadata.get("sigma", 0.0))
        if denoising is None and (steps := self.metadata.get("denoising_steps")):
            denoising = Denoising(steps)
        level = self._drawn_level(denoise_sigma, denoising)
        self.flow.check_labels(labels, num)
        z = self.flow.sample_prior(num, generator)
        labels = None if labels is None else labels.to(z.device)
        if chunk_size is None:
            chunk_size = hardware.chunk_size(self.config.decoding_bytes(branches=2), z.device)
        chunk_size = at_least_one("chunk_size", chunk_size)
        samples, trajectories = [], []
        for start in range(0, num, chunk_size):
            chunk = slice(start, start + chunk_size)
            chunk_labels = None if labels is None else labels[chunk]
            decoded = self.flow.trajectory(z[chunk], chunk_labels, guidance, decoder, progress, noise_level=level)
            frames = [z[chunk], *decoded]
            samples.append(self._to_images(frames[-1]))
            if return_trajectory:
                trajectories.append(torch.stack([self._to_images(frame) for frame in frames]))
        images = torch.cat(samples)
        trajectory = [torch.cat(trajectories, dim=1)] if return_trajectory else []
        denoised = self.remove_noise(images, denoise_sigma, labels, denoising, chunk_size, generator)
        for step, cleaner in enumerate(denoised):
            if return_trajectory and step:
                trajectory.append(images[None])
            images = cleaner
        return (images, torch.cat(trajectory)) if return_trajectory else images

    def remove_noise(
        self,
        images: Tensor,
        sigma: float,
        labels: Tensor | None,
        denoising: Denoising | None,
        chunk_size: int,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:
        """Yield images with less and less noise of ``sigma``, one for each step of the denoising; none for sigma 0.

        No more than ``chunk_size`` images are denoised at a time, and fewer where their activations need more memory.
        The generator is the source of the noise of stochastic steps. See :meth:`sample`.
        """
        if not sigma:
            return
        size = min(chunk_size, hardware.chunk_size(self.config.activation_bytes(), images.device))

        def denoise(noisy: Tensor, level: float) -> Tensor:
            parts = noisy.split(size)
            labels_of_parts = [None] * len(parts) if labels is None else labels.split(size)
            cleaned = (self.denoise(part, level, of) for part, of in zip(parts, labels_of_parts, strict=True))
            return torch.cat([*cleaned])

        levels = self.denoising_levels(sigma, denoising)
        if self.noise_levels is None:
            for level in levels[:-1]:
                images = denoise(images, level)
                yield images
        else:
            yield from denoise_by_levels(denoise, images, levels, denoising or Denoising(), generator)

    def _drawn_level(self, denoise_sigma: float, denoising: Denoising | None) -> float | None:
        """Return the noise level of samples: what is to be removed or, where it is to stay, the largest."""
        if denoise_sigma:
            check_sigma("denoise_sigma", denoise_sigma)
        if self.noise_levels is None:
            if denoising is not None and (denoising.stochastic or denoising.clip):
                raise ValueError(f"denoising: expected steps alone for a model without noise levels; got {denoising}")
            return None
        least, largest = self.noise_levels
        if denoise_sigma and not least <= denoise_sigma <= largest:
            raise ValueError(f"denoise_sigma: expected 0, or a level from {least} to {largest}; got {denoise_sigma}")
        return denoise_sigma or largest

    def check_state(self, state: dict[str, Tensor], origin: str) -> None:
        """Raise ValueError for a state dict that is not one of this model, or has a variance that is not positive."""
        super().check_state(state, origin)
        least = state["flow.prior_variance"].min()
        if not least > 0:
            raise ValueError(f"{origin}: expected positive numbers in flow.prior_variance; got {least:g}")

    def _to_images(self, tokens: Tensor) -> Tensor:
        return unpatchify(tokens, self.config.patch_size, self.config.image_size)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images ``(B, C, H, W)`` into patches, tokens ``(B, N, C * P * P)`` in raster order.

    A token is laid out as :func:`torch.nn.functional.unfold` does it.

    >>> images = torch.arange(16.0).view(1, 1, 4, 4)
    >>> patchify(images, 2)[0, 1]  # the upper right patch
    tensor([2., 3., 6., 7.])
    """
    # Not pixel_unshuffle, which returns an empty batch unchanged.
    batch, channels, height, width = images.shape
    patches = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, patch_size: int, image_size: int) -> Tensor:
    """Join tokens ``(B, N, C * P * P)`` to square images ``(B, C, H, W)``, the inverse of :func:`patchify`."""
    side = image_size // patch_size
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), patch_size)
