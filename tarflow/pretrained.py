"""Models in folders and on the Hugging Face hub, written whole or not at all, and read with what is known of them.

A folder holds ``config.json`` (the class of the model, its configuration, metadata), ``model.safetensors`` (the weights
with a checksum) and perhaps ``calibration.json`` (timings of the decoders).
"""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from . import hardware
from .decoding import calibration
from .denoising import MAX_STEPS
from .files import atomic_write
from .guidance import Guidance

if TYPE_CHECKING:
    from .image_flow import ImageFlow
__all__ = [
    "build_model",
    "check_state",
    "config_from_dict",
    "load_pretrained",
    "read_config",
    "save_pretrained",
    "save_weights",
    "weights_digest",
    "write_config",
]

Flow = TypeVar("Flow", bound="ImageFlow")

FLOWS: list[type["ImageFlow"]] = []
"""All classes of models, in the order of their definition: each adds itself."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save_pretrained(model: "ImageFlow", folder: Path | str, **metadata: Any) -> None:
    """Write a model into a folder, with its calibration, or without that of the model that was there before.

    Args:
        metadata: further entries of ``config.json``, such as ``sigma`` and ``class_names``, see
            :func:`load_pretrained`. Those that the model was read with, its ``metadata``, are kept where not given.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / calibration.FILE).unlink(missing_ok=True)
    save_weights(model, folder / "model.safetensors")
    write_config(folder, **model.config_dict(), **(model.metadata | metadata))
    calibration.write(folder, model.calibration)


def save_weights(model: "ImageFlow", path: Path | str) -> None:
    """Write the weights of a model as safetensors, whose metadata hold a checksum, ``sha256``."""
    state = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    with atomic_write(path) as beside:
        beside.write_bytes(save(state, metadata={"sha256": _digest(state)}))


def weights_digest(folder: Path) -> str | None:
    """Return the checksum that the weights in a folder carry, if they do."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return (file.metadata() or {}).get("sha256")


def write_config(folder: Path, **entries: Any) -> None:
    """Write ``config.json``: the class and the configuration of a model, and metadata."""
    with atomic_write(folder / "config.json") as path:
        path.write_text(json.dumps(entries, indent=2, default=str) + "\n")


def load_pretrained(source: Path | str, kind: type[Flow] | None = None, **download: Any) -> tuple[Flow, dict[str, Any]]:
    """Read a model that :func:`save_pretrained` or a training run wrote, and what is known of it.

    Args:
        source: a folder, or, where there is none of that name, a repository on the Hugging Face hub: ``"owner/name"``.
        kind: the class of the model, or one from which it is derived; any, unless given.
        download: how a repository is fetched, by arguments of ``huggingface_hub.snapshot_download``: ``revision``,
            ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

    Returns:
        the model, on the CPU, in evaluation mode and in the precision that :func:`build_model` tells; and its metadata:
        ``sigma``, the standard deviation of the Gaussian noise of training, 0 without, and of a model with noise levels
        the largest; ``denoising_steps``, in which it is removed from samples, or None; ``guidance``, the fields of a
        :class:`tarflow.Guidance` for samples, or None; ``class_names``, a list; ``train``, the settings of the training
        run, or {}; and whatever else ``config.json`` holds beside the configuration of the model, all of which is the
        model's ``metadata`` too.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: a file is truncated, corrupt or not what it should be; the weights are those of another
            configuration; the model is of another class; there is not enough memory for it.
    """
    folder = Path(source)
    if not folder.exists() and str(source).count("/") == 1 and not str(source).startswith("."):
        folder = _download(str(source), download)
    config_path, weights_path = folder / "config.json", folder / "model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(f"source: expected a folder with config.json and model.safetensors; no {path}")
    told = read_config(folder)
    model_class, config = _find_class(kind, told.pop("flow", "TarFlow"), told.pop("model", None), config_path)
    model = build_model(model_class, config, _read_weights(weights_path), str(weights_path))
    model.load_calibration(folder)
    model.metadata = told
    sigma = model.noise_levels[1] if model.noise_levels else 0.0
    untold: dict[str, Any] = {"sigma": sigma, "denoising_steps": None, "guidance": None, "class_names": [], "train": {}}
    return model, untold | told


def build_model(model_class: type[Flow], config: Any, state: dict[str, Tensor], origin: str) -> Flow:
    """Make a model of a configuration with these weights, which are checked before it takes any memory.

    It is in evaluation mode, and in float32, or in float64 where any of its weights are: float16 and bfloat16 are read
    as float32.

    Raises:
        ValueError: as :func:`check_state`, or more weights than the machine has memory for.
    """
    if config.num_layers > len(state):  # even without memory of their own, many layers take long to build
        raise ValueError(
            f"{origin}: weights of another configuration: expected those of {config.num_layers} layers; "
            f"got {len(state)} tensors"
        )
    with torch.device("meta"):
        model_class(config).check_state(state, origin)
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in state.values()), torch.float32)
    needed = dtype.itemsize * sum(tensor.numel() for tensor in state.values())
    hardware.check_memory(needed, torch.device("cpu"), f"the weights of {origin}")
    model = model_class(config).to(dtype)
    model.load_state_dict(state)
    return model.eval()


def check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor], origin: str) -> None:
    """Check that a state dict has the names and shapes of a model's own, and finite floating-point weights.

    Raises:
        ValueError: it has not, or weights of another dtype than float16, bfloat16, float32 and float64 where the
            model's are floating-point; the message names ``origin``.
    """
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


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        ValueError: it is no JSON, or an entry that :func:`load_pretrained` tells of is not what it should be.
    """
    path = folder / "config.json"
    try:
        entries = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: truncated or corrupt: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: expected the configuration of a flow; got {type(entries).__name__}")
    for name, (expected, is_valid) in _ENTRIES.items():
        if name in entries and not is_valid(entries[name]):
            raise ValueError(f"{path}: {name}: expected {expected}; got {short(entries[name])}")
    return entries


def _is_guidance(value: Any) -> bool:
    try:
        Guidance(**value)
    except (TypeError, ValueError):
        return False
    return True


_ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "sigma": ("a number in [0, 10]", lambda value: type(value) in (int, float) and 0 <= value <= 10),
    "denoising_steps": (
        f"an integer from 1 to {MAX_STEPS}, or null",
        lambda value: value is None or (type(value) is int and 1 <= value <= MAX_STEPS),
    ),
    "guidance": ("an object with fields of a Guidance, or null", lambda value: value is None or _is_guidance(value)),
    "class_names": ("a list of strings", lambda value: isinstance(value, list) and all(type(v) is str for v in value)),
    "train": ("an object", lambda value: isinstance(value, dict)),
    **dict.fromkeys(("autoencoder", "text_encoder"), ("a name, or null", lambda value: isinstance(value, str | None))),
    "text_length": ("an integer, or null", lambda value: value is None or type(value) is int),
}


def config_from_dict(config_class: type, settings: Any) -> Any:
    """Make the configuration of a model from its JSON object, in which the dequantizer is an object too.

    Raises:
        TypeError, ValueError: it is no object, or not one of such a configuration.
    """
    if not isinstance(settings, dict):
        raise TypeError(f"model: expected an object; got {short(settings)}")
    dequantizer = settings.get("dequantizer")
    if not isinstance(dequantizer, dict | None):
        raise TypeError(f"dequantizer: expected an object or null; got {short(dequantizer)}")
    if dequantizer is not None:
        dequantizer_class, _ = get_args(get_type_hints(config_class)["dequantizer"])
        settings = settings | {"dequantizer": dequantizer_class(**dequantizer)}
    return config_class(**settings)


def _find_class(kind: type[Flow] | None, name: Any, settings: Any, origin: Path) -> tuple[type[Flow], Any]:
    """Find the first class of that name that is ``kind`` or derived from it, and make its configuration."""
    kinds: dict[str, Any] = {}
    for flow in FLOWS:
        if hasattr(flow, "config_class") and (kind is None or issubclass(flow, kind)):
            kinds.setdefault(flow.__name__, flow)
    if not isinstance(name, str) or name not in kinds:
        expected = f"{' or '.join(kinds)}, or a class derived from it that is imported"
        raise ValueError(f"{origin}: flow: expected {expected}; got {short(name)}")
    try:
        return kinds[name], config_from_dict(kinds[name].config_class, settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{origin}: expected the configuration of a {name}; {error}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; raise ValueError where it is damaged, in its data too if it has our checksum."""
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
    """Return the SHA-256 of each tensor's name, dtype, shape and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        data: Any = tensor.flatten().view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()


def _download(repository: str, options: dict[str, Any]) -> Path:
    """Fetch a repository of the Hugging Face hub into its cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f'source: no folder {repository!r}; reading it from the hub needs: pip install "tarflow[hub]"'
        ) from error
    files = ["config.json", "model.safetensors", calibration.FILE]
    return Path(snapshot_download(repository, allow_patterns=files, **options))
