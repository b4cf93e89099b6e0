"""The Flow++ model over images.

Source: Flow++ (arXiv 1902.00275).
"""

import math

import torch
from torch import Tensor

from .. import hardware
from ..decoding import Decoder, ProgressCallback
from ..denoising import Denoising
from ..guidance import Guidance
from ..image_flow import ImageFlow, at_least_one, in_mode
from ..noise import log_normal
from ..validation import describe_argument
from .config import FlowPPConfig
from .dequantizer import Dequantizer
from .layers import MultiScaleFlow
from .splits import squeeze, unsqueeze

__all__ = ["FlowPP", "FlowPPConfig"]


class FlowPP(ImageFlow):
    """Flow++ over images ``(B, C, H, W)``, float in [-1, 1]: the logit of an image, then a stack of couplings.

    The scales of convolutions and norms come from data: see :meth:`ImageFlow.initialize`, with which training begins.
    A model without it is a flow too, but trains worse.

    In training mode :meth:`forward` has dropout; :meth:`inverse` never has.

    >>> model = FlowPP(FlowPPConfig(image_size=8, filters=8, blocks_per_coupling=1, num_mixtures=4, stack="stripe2"))
    >>> x = torch.rand(3, 1, 8, 8) * 2 - 1
    >>> z, logdet = model(x)
    >>> z.shape, logdet.shape
    (torch.Size([3, 1, 8, 8]), torch.Size([3]))
    >>> torch.allclose(model.inverse(z), x, atol=1e-5)
    True
    """

    config_class = FlowPPConfig
    network_name = "conditioners"
    decoders = ("auto",)
    supports_guidance = False
    # The distance of images from 0 and 1, where there is no logit.
    MARGIN = 0.05

    def __init__(self, config: FlowPPConfig):
        super().__init__(config, Dequantizer.of(config.dequantizer, config.image_shape))
        self.flow = MultiScaleFlow(config.stack, config.image_shape, config)

    @property
    def stages(self) -> list[str]:
        """The names of the frames of a trajectory after the latent, see :meth:`sample`."""
        kinds = [kind for kind in reversed(self.flow.levels) if kind != "squeeze"]
        return [*(f"after {kind} couplings" for kind in kinds), "image"]

    def forward(self, x: Tensor, labels: Tensor | None = None, *, noise_level: None = None) -> tuple[Tensor, Tensor]:
        """Map images to latents ``(B, C', H', W')``, and return the log-det in nats, ``(B,)``, both float32.

        ``z = flow(logit(0.05 + 0.9 (x + 1) / 2))``. An image from outside [-1.1, 1.1] has no logit and becomes nan.
        """
        self._check_images(x, "x")
        _check_no_labels(labels)
        if noise_level is not None:
            raise ValueError(f"noise_level: expected None, since Flow++ takes none; got {noise_level}")
        p = self.MARGIN + (0.5 - self.MARGIN) * (x + 1)
        log_p, log_q = p.log(), (1 - p).log()
        z, logdet = self.flow(log_p - log_q)
        constant = self.config.num_dims * math.log(0.5 - self.MARGIN)
        return z, logdet - (log_p + log_q).sum((1, 2, 3)) + constant

    def inverse(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map latents to images ``(B, C, H, W)``, within [-1.11, 1.11]: the inverse of :meth:`forward`."""
        _check_no_labels(labels)
        if not isinstance(z, Tensor) or not z.is_floating_point():
            raise TypeError(f"z: expected a floating-point torch.Tensor; got {describe_argument(z)}")
        if z.shape[1:] != self.config.latent_shape:
            raise ValueError(f"z: expected shape (B, *{self.config.latent_shape}); got {tuple(z.shape)}")
        with in_mode(self, training=False):
            y, _ = self.flow.inverse(z)
        return self._from_logits(y)

    def log_prior(self, z: Tensor) -> Tensor:
        """Return the log-density of latents under N(0, I) in nats, ``(B,)``."""
        return log_normal(z)

    @torch.no_grad()
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
        """Draw ``num`` images, within [-1.11, 1.11]; arguments and errors are those of :meth:`ImageFlow.sample`.

        There is one way to decode and nothing to guide or to denoise: labels, guidance and denoising other than None, a
        denoise_sigma other than 0 and decoders other than "auto" are ValueErrors, and ``progress`` is never called.

        A trajectory, ``(levels + 2, num, C, H, W)``, holds the latent in the shape of an image, what follows each level
        of couplings, and the image, see :attr:`stages`; all but the images are logits.
        """
        num = self.check_num(num)
        _check_no_labels(labels)
        if guidance is not None:
            raise ValueError(f"guidance: expected None, since Flow++ is never guided; got {guidance}")
        if denoise_sigma:
            raise ValueError(f"denoise_sigma: expected 0, since Flow++ has no Gaussian noise; got {denoise_sigma}")
        if denoising is not None:
            raise ValueError(f"denoising: expected None, since Flow++ has no Gaussian noise; got {denoising}")
        if Decoder.of(decoder).name not in self.decoders:
            raise ValueError(f"decoder: expected auto, since Flow++ has one way to decode; got {decoder}")
        eps = torch.randn(num, *self.config.image_shape, generator=generator, device=self.device, dtype=self.dtype)
        if chunk_size is None:
            chunk_size = hardware.chunk_size(self.config.activation_bytes() // self.config.num_couplings, eps.device)
        chunk_size = at_least_one("chunk_size", chunk_size)
        with in_mode(self, training=False):
            chunks = [self._decode(chunk) for chunk in eps.split(chunk_size)]
        images = torch.cat([self._from_logits(frames[-1]) for frames in chunks])
        if not return_trajectory:
            return images
        return images, torch.cat([torch.cat(chunks, dim=1), images[None]])

    def _decode(self, eps: Tensor) -> Tensor:
        """Map normal numbers in the shape of images to logits: before the flow, and after each level of couplings."""
        z = eps
        for _ in range(self.flow.levels.count("squeeze")):
            z = squeeze(z)
        frames = [eps]
        for kind, (x, _) in zip(reversed(self.flow.levels), self.flow.trajectory(z), strict=True):
            if kind != "squeeze":
                while x.shape[1] > self.config.in_channels:  # put squeezed values where they belong in the image
                    x = unsqueeze(x)
                frames.append(x)
        return torch.stack(frames)

    def _from_logits(self, logits: Tensor) -> Tensor:
        return (logits.sigmoid() - self.MARGIN) / (0.5 - self.MARGIN) - 1


def _check_no_labels(labels: Tensor | None) -> None:
    if labels is not None:
        raise ValueError(f"labels: expected None, since Flow++ is unconditional; got {type(labels).__name__}")
