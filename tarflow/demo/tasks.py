"""Samples as they are decoded, scores of an image, and images between two others, of a trained TarFlow."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..datasets.formats import Unreadable, opened_image, to_tensor
from ..decoding import BlockStatistics, Decoder
from ..denoising import Denoising
from ..evaluation import Estimate, class_log_likelihoods
from ..guidance import Guidance
from ..model import TarFlow, unpatchify
from ..noise import Quantization, add_gaussian_noise, quantization, to_image, to_pixels
from ..noise import bits_per_dim as to_bits_per_dim

__all__ = ["Score", "Settings", "Stage", "Trained", "draw", "interpolate", "read", "score", "slerp", "to_model"]


@dataclass(frozen=True)
class Trained:
    """A trained TarFlow, its name, and the metadata of :func:`tarflow.load_pretrained`."""

    model: TarFlow
    metadata: dict[str, Any]
    name: str

    @property
    def sigma(self) -> float:
        """The standard deviation of the Gaussian noise of training, 0 where noise was within bins."""
        return self.metadata["sigma"]

    @property
    def noise_level(self) -> float | None:
        """The level of a model with noise levels at which it is scored and sampled; None for any other."""
        return self.sigma if self.model.noise_levels else None

    @property
    def quantization(self) -> Quantization:
        """The rounding of samples to 8-bit pixels."""
        return quantization(self.sigma)

    @property
    def class_names(self) -> list[str]:
        """The name of every class, its number where it has none."""
        named = self.metadata["class_names"]
        return [*named, *(f"class {k}" for k in range(len(named), self.model.config.num_classes))]

    def labels(self, num: int, label: int | None) -> Tensor | None:
        """Labels of as many images: all of one class, or for None the classes in turn; None for a model without."""
        classes = self.model.config.num_classes
        if not classes:
            return None
        chosen = torch.arange(num) % classes if label is None else torch.full((num,), label)
        return chosen.to(self.model.device)

    def generator(self, seed: int) -> torch.Generator:
        """Make a generator on the device of the model."""
        return torch.Generator(self.model.device).manual_seed(seed)

    def add_noise(self, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Add the noise of training to 8-bit pixels; also return its log-density within bins, 0 for Gaussian noise."""
        pixels = pixels.to(self.model.device)
        if not self.sigma:
            return self.model.dequantize(pixels, generator)
        return add_gaussian_noise(pixels, self.sigma, generator).to(self.model.dtype), torch.zeros(1)


@dataclass(frozen=True)
class Settings:
    """How samples are drawn.

    Args:
        num: number of images.
        label: their class, -1 for no label, None for the classes in turn.
        guidance, decoder: as in :meth:`tarflow.TarFlow.sample`.
        denoising_steps: steps that remove the noise of training; 0 leaves it.
        seed: seed of the latents.
    """

    num: int = 8
    label: int | None = None
    guidance: Guidance | None = None
    decoder: Decoder = Decoder()  # noqa: RUF009 (it is frozen)
    denoising_steps: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Stage:
    """Images ``(B, C, H, W)`` on their way from latents, and the cost until here.

    Attributes:
        name: such as ``after block 2``.
        images: on the CPU.
        seconds: time that was computed.
        passes: passes of the transformers so far, where the sequential decoder takes ``steps``.
    """

    name: str
    images: Tensor
    seconds: float
    passes: int
    steps: int


def draw(trained: Trained, settings: Settings) -> Iterator[Stage]:
    """Yield samples at every stage, as soon as it is computed: the latent, after every block, after denoising.

    The last stage has the images of :meth:`tarflow.TarFlow.sample` with the same settings.
    """
    model, generator = trained.model, trained.generator(settings.seed)
    num = model.check_num(settings.num)
    labels = trained.labels(num, settings.label)
    blocks: list[BlockStatistics] = []
    seconds, start = 0.0, time.perf_counter()
    for name, images in _stages(trained, settings, num, labels, generator, blocks):
        images = images.cpu()
        seconds += time.perf_counter() - start
        yield Stage(name, images, seconds, sum(b.passes for b in blocks), sum(b.steps for b in blocks))
        start = time.perf_counter()


def _stages(trained, settings, num, labels, generator, blocks) -> Iterator[tuple[str, Tensor]]:
    model, config = trained.model, trained.model.config
    z = model.flow.sample_prior(num, generator)
    decoded = model.flow.trajectory(
        z, labels, settings.guidance, settings.decoder, blocks.append, noise_level=trained.noise_level
    )
    images = unpatchify(z, config.patch_size, config.image_size)
    yield "latent", images
    for name, tokens in zip(model.stages, decoded, strict=True):
        images = unpatchify(tokens, config.patch_size, config.image_size)
        yield name, images
    steps = settings.denoising_steps
    if steps:
        denoised = model.remove_noise(images, trained.sigma, labels, Denoising(steps), num, generator)
        for step, images in enumerate(denoised, 1):
            yield f"denoising, step {step} of {steps}", images


def read(path: Path, shape: tuple[int, int, int], invert: bool) -> tuple[Tensor, str]:
    """Read an image of any size as :func:`to_model` does; ValueError, by the name of the file, where it is none."""
    try:
        with opened_image(path) as image:
            return to_model(image, shape, invert)
    except Unreadable as error:
        raise ValueError(str(error).replace(str(path), path.name)) from error


def to_model(image: Image.Image, shape: tuple[int, int, int], invert: bool) -> tuple[Tensor, str]:
    """Convert an image to what a model of images (C, H, W) takes, and say what was done to it.

    It is resized and cropped to its centre; what is transparent lies on white. For a model of grey images,
    ``invert`` makes dark on light light on dark: it inverts an image whose border is lighter than the middle grey.

    Returns:
        pixels, uint8 ``(1, C, H, W)``, and a sentence.
    """
    channels, size, _ = shape
    if channels not in (1, 3):
        raise ValueError(f"image: expected a model of grey or RGB images; got one of {channels} channels")
    done = [f"{image.width} x {image.height} pixels"]
    if image.width != image.height:
        done.append("cropped to its centre")
    if size not in image.size:
        done.append(f"resized to {size} x {size} (Lanczos)")
    mode = "L" if channels == 1 else "RGB"
    if image.mode != mode:
        done.append("converted to grey" if channels == 1 else "converted to RGB")
    pixels = to_tensor(image, mode, size, "lanczos")[None]
    if invert and channels == 1 and _border(pixels).float().mean() > 127.5:
        pixels = 255 - pixels
        done.append("inverted, since its border is light")
    return pixels, ", ".join(done)


def _border(pixels: Tensor) -> Tensor:
    rows, columns = pixels[..., [0, -1], :], pixels[..., [0, -1]]
    return torch.cat((rows.flatten(), columns.flatten()))


@dataclass(frozen=True)
class Score:
    """The score of an image by a model, and the image on its way through it.

    Attributes:
        bits_per_dim: mean and standard error over draws of noise; the classes of a model count equally.
        posterior: probability of each class by Bayes' rule, a mean over the draws, ``(num_classes,)``; None without.
        latents: those of the image without noise, given its most probable class, laid out as an image.
        reconstruction: the image of these latents, by the sequential decoder.
        largest_error: the largest difference of a value, in [-1, 1], between the image and its reconstruction.
        same_bytes: whether the reconstruction has the same 8-bit pixels.
    """

    bits_per_dim: Estimate
    posterior: Tensor | None
    latents: Tensor
    reconstruction: Tensor
    largest_error: float
    same_bytes: bool


@torch.no_grad()
def score(trained: Trained, pixels: Tensor, num_samples: int = 8, seed: int = 0) -> Score:
    """Score an image, uint8 ``(1, C, H, W)``, over draws of the noise of training, and map it there and back."""
    model, config, level = trained.model, trained.model.config, trained.noise_level
    x, log_q = trained.add_noise(pixels.expand(num_samples, -1, -1, -1), trained.generator(seed))
    posterior = labels = None
    if config.num_classes:
        log_likelihoods = class_log_likelihoods(model, x, level).cpu()
        posterior = log_likelihoods.softmax(1).mean(0)
        labels = posterior.argmax()[None].to(model.device)
    else:
        log_likelihoods = model.log_prob(x, noise_level=level).cpu()[:, None]
    log_prob = log_likelihoods.logsumexp(1) - math.log(log_likelihoods.shape[1]) - log_q.cpu()
    clean = pixels.to(model.device, model.dtype)
    clean = clean / 127.5 - 1 if trained.sigma else to_image(clean, torch.full_like(clean, 0.5))
    z, _ = model(clean, labels, noise_level=level)
    back = model.inverse(z, labels, decoder="sequential", noise_level=level)
    return Score(
        Estimate.of(to_bits_per_dim(log_prob, config.num_dims)),
        posterior,
        unpatchify(z, config.patch_size, config.image_size).cpu(),
        back.cpu(),
        (back - clean).abs().max().item(),
        torch.equal(to_pixels(back, trained.quantization).cpu(), pixels),
    )


@torch.no_grad()
def interpolate(trained: Trained, first: Tensor, second: Tensor, num: int = 8, seed: int = 0) -> Tensor:
    """Decode latents on the arc between those of two images, uint8 ``(1, C, H, W)``, to ``(num, C, H, W)``.

    The images get the noise of training first, which is removed from the results, and no label.
    """
    model, level = trained.model, trained.noise_level
    generator = trained.generator(seed)
    x, _ = trained.add_noise(torch.cat((first, second)), generator)
    z, _ = model(x, trained.labels(2, -1), noise_level=level)
    between = slerp(z[0], z[1], torch.linspace(0, 1, num, device=z.device, dtype=z.dtype))
    labels = trained.labels(num, -1)
    images = model.inverse(between, labels, noise_level=level)
    steps = Denoising(trained.metadata["denoising_steps"])
    *_, images = images, *model.remove_noise(images, trained.sigma, labels, steps, num, generator)
    return images.cpu()


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Interpolate along the arc from a to b, of one shape: ``(sin((1-t) w) a + sin(t w) b) / sin(w)``, w their angle.

    Points between two draws of a Gaussian in many dimensions are thus about as far from 0 as the draws are; on a
    straight line they would be nearer. Returns ``(T, ...)`` for t ``(T,)``.

    >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([0.5]))
    tensor([[0.7071, 0.7071]])
    """
    angle = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1).acos()
    of_a, of_b = ((share * (share * angle / math.pi).sinc() / (angle / math.pi).sinc()) for share in (1 - t, t))
    spread = (len(t), *[1] * a.dim())
    return of_a.view(spread) * a + of_b.view(spread) * b
