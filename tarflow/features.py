"""Networks that turn 8-bit images into features, by which :mod:`tarflow.scores` compares sets of images.

There are two. :func:`load_inception` has the Inception network in whose features Frechet Inception distances (FID) are
published; its weights are a file that the user brings. :func:`load_classifier` has a small classifier of Fashion-MNIST
whose weights ship with tarflow, so that samples are scored offline: a distance in its features ranks models of those
data, and is no FID.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .datasets.readers import FASHION_MNIST
from .files import read_state

__all__ = [
    "CLASSIFIER",
    "INCEPTION_SHA256",
    "INCEPTION_SOURCE",
    "Classifier",
    "Extractor",
    "load_classifier",
    "load_extractor",
    "load_inception",
]

CLASSIFIER = Path(__file__).parent / "data" / "fashion_mnist_classifier.safetensors"
"""The weights of the classifier; what they were trained and tested on is in their metadata."""

INCEPTION_SOURCE = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
"""The address at which the weights of Inception are published."""

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of that file."""

_WHENCE = f"the Inception weights of torch-fidelity, {INCEPTION_SOURCE}"


@dataclass(frozen=True)
class Extractor:
    """A network whose features are compared, and what a score has to say of it.

    Args:
        features: uint8 images ``(B, C, H, W)`` to features ``(B, D)``.
        classify: features to the classes of the data that it finds, int64 ``(B,)``; None where it knows none of them.
        name: which network it is, and of which version.
        frechet_name, kernel_name: what the two distances in its features are called.
        resize: what is done to images before the network sees them.
        digest: SHA-256 of the file of its weights.
        device: where it runs.
    """

    features: Callable[[Tensor], Tensor]
    classify: Callable[[Tensor], Tensor] | None
    name: str
    frechet_name: str
    kernel_name: str
    resize: str
    digest: str
    device: torch.device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Return the features of images, float32 ``(B, D)`` on the CPU, whatever autocast is in force."""
        with torch.autocast(self.device.type, enabled=False):
            return self.features(pixels.to(self.device)).cpu()


class Classifier(nn.Module):
    """A classifier of Fashion-MNIST by five convolutions: uint8 ``(B, 1, 28, 28)`` to logits ``(B, 10)``.

    Its penultimate features, the means of the last convolution over the image, are standardized: over the images that
    it was trained on, each has mean 0 and variance 1.
    """

    widths = (1, 32, 64, 64, 96, 96)
    strides = (1, 2, 1, 2, 1)

    def __init__(self, num_classes: int = 10):
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer, stride in zip(self.widths[:-1], self.widths[1:], self.strides, strict=True):
            layers += [nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.standardize = nn.BatchNorm1d(self.widths[-1], affine=False)
        self.head = nn.Linear(self.widths[-1], num_classes)

    def features(self, pixels: Tensor) -> Tensor:
        """Return the standardized features ``(B, 96)`` of 8-bit images."""
        return self.standardize(self.convolutions(pixels / 127.5 - 1).mean((2, 3)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits ``(B, 10)`` of 8-bit images."""
        return self.head(self.features(pixels))


def load_extractor(weights: Path | None, class_names: Sequence[str], device: torch.device) -> Extractor:
    """Return Inception with weights of a file or, without one, the classifier, if the data have its classes.

    Raises:
        ValueError: there are no weights, and the data are not Fashion-MNIST; or as :func:`load_inception`.
        ImportError, FileNotFoundError: as :func:`load_inception`.
    """
    if weights is not None:
        return load_inception(weights, device)
    if tuple(class_names) != FASHION_MNIST:
        raise ValueError(f"weights: expected a file for images other than Fashion-MNIST: {_WHENCE}; got none")
    return load_classifier(device)


def load_classifier(device: torch.device) -> Extractor:
    """Return the classifier of Fashion-MNIST that ships with tarflow."""
    network = Classifier()
    network.load_state_dict(load_file(CLASSIFIER))
    network.to(device).eval()
    return Extractor(
        network.features,
        lambda features: network.head(features.to(device)).argmax(1).cpu(),
        name="the classifier of Fashion-MNIST that ships with tarflow",
        frechet_name="Frechet distance in classifier features",
        kernel_name="kernel distance in classifier features",
        resize="none",
        digest=_sha256(CLASSIFIER),
        device=device,
    )


def load_inception(weights: Path, device: torch.device) -> Extractor:
    """Return the Inception network of torch-fidelity, a port of TensorFlow's of 2015, with 2,048 features.

    It resizes images to 299 x 299 as that does, bilinearly and without antialiasing; gray ones count as RGB.

    Args:
        weights: the file of its published weights, which is read only where its SHA-256 is right, and as data.
        device: where it is to run.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is another.
        ImportError: torch-fidelity is not installed, or cannot be imported.
    """
    if not weights.is_file():
        raise FileNotFoundError(f"weights: expected {_WHENCE}; there is no file {weights}")
    if (digest := _sha256(weights)) != INCEPTION_SHA256:
        raise ValueError(f"weights: expected {_WHENCE}, of SHA-256 {INCEPTION_SHA256}; got {digest} of {weights}")
    try:
        from torch_fidelity import __version__ as release
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch ends in a RuntimeError
        expected = 'torch-fidelity (pip install "tarflow[fid]") with a torchvision that fits torch'
        raise ImportError(f"weights: expected {expected}; got {error}") from error
    # Its constructor unpickles whatever it is given: so it gets what has been read without.
    state = io.BytesIO()
    torch.save(read_state(weights), state)
    state.seek(0)
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=state)
    network.to(device)
    return Extractor(
        lambda pixels: network(pixels.expand(-1, 3, -1, -1))[0],
        None,
        name=f"Inception of torch-fidelity {release}, 2,048 features",
        frechet_name="Frechet Inception distance (FID)",
        kernel_name="kernel Inception distance (KID)",
        resize="299 x 299, bilinear as in TensorFlow 1, not antialiased",
        digest=digest,
        device=device,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
