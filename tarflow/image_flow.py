"""What TarFlow and Flow++ have in common: densities of images, probabilities of 8-bit pixels, and files."""

import contextlib
import functools
import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from reprlib import repr as short
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from . import memory
from .files import replacing
from .flow import described
from .flowpp.dequantizer import Dequantizer, DequantizerConfig
from .flowpp.networks import initialize_from_data
from .noise import add_uniform_noise

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ImageFlow(nn.Module):
    """A flow over images ``(B, C, H, W)``, float in [-1, 1].

    Subclasses bring ``config``, ``forward``, ``inverse``, ``log_prior`` and ``sample``. A configuration has
    ``dequantizer``, ``image_shape``, ``num_dims`` and ``num_layers``.

    Dropout is for training alone: in training mode, ``forward`` and :meth:`dequantize` have it, so that
    ``inverse(forward(x))`` is not x there. All that scores or samples goes without, in whichever mode the model is.

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

        Each layer does so when it first sees its inputs, which come through layers that have done so already, with the
        dropout of training.
        """
        self._check_pixels(pixels)
        with in_mode(self, training=True):
            initialize_from_data(self, lambda: self(self.dequantize(pixels, generator)[0], labels))

    def update_prior(self, z: Tensor, rate: float | Tensor) -> None:
        """Adapt the prior to the latents of a batch, where it is one that adapts."""

    def log_prob(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The log-density of images in [-1, 1], in nats, ``(B,)``; without dropout."""
        with in_mode(self, training=False):
            z, logdet = self(x, labels)
        return self.log_prior(z) + logdet

    def dequantize(self, pixels: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """8-bit pixels with noise in their bins: images in [-1, 1], and the log-density of the noise, ``(B,)`` nats.

        The noise is that of :attr:`dequantizer`, or uniform, whose log-density is 0.
        """
        if self.dequantizer is None:
            return add_uniform_noise(pixels, generator).to(self.dtype), torch.zeros(len(pixels), device=pixels.device)
        eps = torch.randn(pixels.shape, generator=generator, device=pixels.device, dtype=self.dtype)
        return self.dequantizer(pixels, eps)

    def discrete_log_prob(
        self, pixels: Tensor, labels: Tensor | None = None, draws: int = 1, generator: torch.Generator | None = None
    ) -> Tensor:
        """A lower bound on the log-probability of 8-bit images, in nats, ``(B,)``.

        ``log mean_k p(pixels + u_k) / q(u_k | pixels)`` over K draws of noise, with p the density in units of pixels:
        in expectation the evidence lower bound for K = 1, and rising to the exact log-probability with K. There is no
        dropout in it.

        Args:
            pixels: uint8 ``(B, C, H, W)``.
            labels: int64 ``(B,)``, or None for an unconditional model.
            draws: K, the importance-weighted samples.
            generator: of the noise, on the device of the model.

        Raises:
            TypeError: pixels are no tensor of uint8, or draws no integer.
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
        self._check_pixels(pixels)
        bounds = []
        with in_mode(self, training=False):
            for _ in range(at_least_one("draws", draws)):
                x, log_q = self.dequantize(pixels, generator)
                bounds.append((self.log_prob(x, labels) - log_q).double())
        return torch.stack(bounds) - self.config.num_dims * math.log(128)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``config.json`` and ``model.safetensors``, and remove the calibration of what was there before."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "calibration.json").unlink(missing_ok=True)
        self.save_weights(folder / "model.safetensors")
        with replacing(folder / "config.json") as path:
            path.write_text(json.dumps(self.describe(), indent=2) + "\n")

    def save_weights(self, path: Path | str) -> None:
        """Write the weights alone, as safetensors, beside what may be there and then over it.

        Its metadata hold a checksum of the weights, ``sha256``, which reading them verifies.
        """
        state = {name: tensor.contiguous().cpu() for name, tensor in self.state_dict().items()}
        with replacing(path) as beside:
            beside.write_bytes(save(state, metadata={"sha256": _digest(state)}))

    def describe(self) -> dict[str, Any]:
        """What ``config.json`` says of the model: the name of its class and its configuration."""
        return {"flow": type(self).__name__, "model": asdict(self.config)}

    @classmethod
    def from_pretrained(cls, source: Path | str) -> Self:
        """The model that :func:`load_pretrained` reads, of this class or one derived from it.

        So ``ImageFlow.from_pretrained`` returns whichever flow it finds.
        """
        model, _ = load_pretrained(source, cls)
        return model

    @classmethod
    def from_state(cls, config: Any, state: dict[str, Tensor], origin: str) -> Self:
        """A model of that configuration with these weights, which are checked before it takes any memory.

        It is in evaluation mode, and in float32, or in float64 where any of its weights are: float16 and bfloat16 are
        read as float32.

        Raises:
            ValueError: as :meth:`check_state`, or more weights than the machine has memory for.
        """
        if config.num_layers > len(state):  # even without memory of their own, many layers take long to build
            raise ValueError(
                f"{origin}: weights of another configuration: expected those of {config.num_layers} layers; "
                f"got {len(state)} tensors"
            )
        with torch.device("meta"):
            cls(config).check_state(state, origin)
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in state.values()), torch.float32)
        needed = dtype.itemsize * sum(tensor.numel() for tensor in state.values())
        memory.check(needed, torch.device("cpu"), f"the weights of {origin}")
        model = cls(config).to(dtype)
        model.load_state_dict(state)
        return model.eval()

    def _load_beside(self, folder: Path) -> None:
        """Read what else a kind of flow keeps beside its weights."""

    def load_checked(self, state: dict[str, Tensor], origin: str) -> None:
        """Load a state dict; errors are those of :meth:`check_state`."""
        self.check_state(state, origin)
        self.load_state_dict(state)

    def check_state(self, state: dict[str, Tensor], origin: str) -> None:
        """Look whether a state dict has the names and shapes of this model's, and finite floating-point weights.

        Raises:
            ValueError: it has not, or weights of another dtype than float16, bfloat16, float32 and float64 where the
                model's are floating-point; the message names ``origin``.
        """
        own = self.state_dict()
        for name in sorted(own.keys() | state.keys()):
            expected, given = (tuple(s[name].shape) if name in s else "nothing" for s in (own, state))
            if expected != given:
                raise ValueError(
                    f"{origin}: weights of another configuration: expected {name} of shape {expected}; got {given}"
                )
        for name, tensor in state.items():
            dtypes = FLOATS if own[name].is_floating_point() else (own[name].dtype,)
            if tensor.dtype not in dtypes:
                names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise ValueError(f"{origin}: expected {name} in {names}; got {tensor.dtype}")
            if not tensor.isfinite().all():
                raise ValueError(f"{origin}: expected finite weights; got nan or inf in {name}")

    def _check_pixels(self, pixels: Tensor) -> None:
        self._check_shape(pixels, "pixels")
        if pixels.dtype != torch.uint8:
            raise TypeError(f"pixels: expected uint8; got {pixels.dtype}")

    def _check(self, x: Tensor, name: str) -> None:
        self._check_shape(x, name)
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected floating-point images in [-1, 1]; got {x.dtype}")

    def check_num(self, num: int) -> int:
        """How many images to sample, if that is a number of images that there is memory for."""
        num = at_least_one("num", num)
        # The latents and the images of all of them, however few are decoded at a time.
        memory.check(2 * num * self.config.num_dims * self.dtype.itemsize, self.device, f"num = {num} samples")
        return num

    def _check_shape(self, images: Tensor, name: str) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; got {described(images)}")
        expected = self.config.image_shape
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"{name}: expected images of shape (B, {', '.join(map(str, expected))}); got {tuple(images.shape)}"
            )


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Within the block all modules are in training or in evaluation mode; after it, or an error, each is in its own."""
    changed = [module for module in model.modules() if module.training != training]
    for module in changed:
        module.training = training
    try:
        yield
    finally:
        for module in changed:
            module.training = not training


def at_least_one(name: str, value: int) -> int:
    """An integer of whatever library as an int; TypeError where it is none, ValueError below 1."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer; got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name}: expected at least 1; got {number}")
    return number


def log_mean_exp(bounds: Tensor) -> Tensor:
    """The importance-weighted bound ``(B,)`` of bounds ``(K, B)``."""
    return bounds.logsumexp(0) - math.log(len(bounds))


def load_pretrained(source: Path | str, kind: type[ImageFlow] = ImageFlow) -> tuple[ImageFlow, dict[str, Any]]:
    """Read what :meth:`ImageFlow.save_pretrained` or a training run wrote: the model, and what is known of it.

    Args:
        source: a folder, or, where there is none of that name, a repository on the Hugging Face hub: ``"owner/name"``.
        kind: the class of the model, or one that it is derived from.

    Returns:
        the model, on the CPU and in evaluation mode, of the precision that :meth:`ImageFlow.from_state` tells; and the
        settings: ``sigma``, the standard deviation of the Gaussian noise that it was trained with, 0 without;
        ``class_names``, a list; ``train``, the settings of its training run, or {}; and what else ``config.json`` has
        beside the shape of the model.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: a file is truncated, corrupt or not what it should be; the weights are those of another
            configuration; the flow is of another kind; there is not enough memory for it.
    """
    folder = Path(source)
    if not folder.exists() and str(source).count("/") == 1 and not str(source).startswith("."):
        folder = _download(str(source))
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(f"source: expected a folder with config.json and model.safetensors; no {path}")
    settings = {"flow": "TarFlow", "sigma": 0.0, "class_names": [], "train": {}} | read_config(folder)
    model_class, config = _find(kind, settings.pop("flow"), settings.pop("model", None), config_path)
    model = model_class.from_state(config, _read_weights(weights_path), str(weights_path))
    model._load_beside(folder)
    return model, settings


def _find(kind: type[ImageFlow], name: Any, shape: Any, origin: Path) -> tuple[type[ImageFlow], Any]:
    """The class of that name among ``kind`` and all that is derived from it, and its configuration."""
    kinds: dict[str, type[ImageFlow]] = {}
    found = [kind]
    for candidate in found:  # which grows: the nearest of a name is taken
        found += candidate.__subclasses__()
        if hasattr(candidate, "config_class"):
            kinds.setdefault(candidate.__name__, candidate)
    if not isinstance(name, str) or name not in kinds:
        expected = f"{' or '.join(kinds)}, or a class derived from it that is imported"
        raise ValueError(f"{origin}: flow: expected {expected}; got {short(name)}")
    try:
        if not isinstance(shape, dict):
            raise TypeError(f"model: expected an object; got {short(shape)}")
        return kinds[name], kinds[name].config_class(**read_dequantizer(shape))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{origin}: expected the configuration of a {name}; {error}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a safetensors file; ValueError where it is damaged, in its data too if it has our checksum."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or corrupt: {error}") from error
    if metadata.get("sha256", digest := _digest(state)) != digest:
        raise ValueError(f"{path}: corrupt: the weights are not those that its checksum was made of")
    return state


def _digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of each tensor's name, dtype, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """What ``config.json`` says: ``flow`` and ``model`` are :meth:`ImageFlow.describe`'s, the rest is the writer's.

    Raises:
        ValueError: it is no JSON, or a setting that :func:`load_pretrained` tells of is not what it should be.
    """
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: truncated or corrupt: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected the configuration of a flow; got {type(settings).__name__}")
    for name, (expected, is_valid) in _SETTINGS.items():
        if name in settings and not is_valid(settings[name]):
            raise ValueError(f"{path}: {name}: expected {expected}; got {short(settings[name])}")
    return settings


_SETTINGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "sigma": ("a number in [0, 10]", lambda value: type(value) in (int, float) and 0 <= value <= 10),
    "class_names": ("a list of strings", lambda value: isinstance(value, list) and all(type(v) is str for v in value)),
    "train": ("an object", lambda value: isinstance(value, dict)),
}


def read_dequantizer(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a model as JSON has them, with a dequantizer's made a :class:`DequantizerConfig` again."""
    dequantizer = settings.get("dequantizer")
    if not isinstance(dequantizer, dict | None):
        raise TypeError(f"dequantizer: expected an object or null; got {short(dequantizer)}")
    return settings | {"dequantizer": None if dequantizer is None else DequantizerConfig(**dequantizer)}


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f'source: no folder {repository!r}; reading it from the hub needs: pip install "tarflow[hub]"'
        ) from error
    return Path(snapshot_download(repository, allow_patterns=["config.json", "model.safetensors", "calibration.json"]))
