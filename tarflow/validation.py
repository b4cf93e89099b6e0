"""Checks of arguments and of the sizes of models, each with one error that names the argument."""

import math
from dataclasses import fields
from numbers import Integral, Real
from reprlib import repr as short
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from tarflow_kernels.mixture import MAX_COMPONENTS

__all__ = [
    "NoiseLevels",
    "PerBlock",
    "check_fields",
    "check_sigma",
    "check_totals",
    "describe_argument",
    "not_finite",
]

NoiseLevels = tuple[float, float] | None
"""The smallest and the largest level of noise that a model is conditioned on, None where it is on none."""

PerBlock = int | tuple[int, ...]
"""A size that all blocks of a model have, or one for each block."""

LARGEST = {
    "image_size": 8192,
    "in_channels": 65_536,
    "patch_size": 8192,
    "channels": 65_536,
    "num_blocks": 1024,
    "layers_per_block": 1024,
    "num_classes": 1_000_000,
    "head_dim": 65_536,
    "expansion": 64,
    "num_mixtures": MAX_COMPONENTS,
    "prefix_length": 65_536,
    "prefix_dim": 65_536,
    "filters": 16_384,
    "blocks_per_coupling": 1024,
    "context_filters": 16_384,
    "context_blocks": 1024,
}
"""The largest value of each field of a configuration: many times that of the largest published models."""

MAY_BE_ZERO = ("num_classes", "prefix_length", "prefix_dim")

MOST_LAYERS = 1024
"""The largest number of layers of a model: so many take seconds to build."""

MAX_SIGMA = 10
"""The largest standard deviation of noise, 5 times the range of images."""

MOST_VALUES = 2**28
"""The largest number of values in an image."""


def check_fields(config: Any) -> None:
    """Check the fields of a configuration by their annotations; integers of any kind become ints.

    Raises:
        ValueError: an integer that is none or not in [1, ``LARGEST``] (classes and prefixes: [0, ...]), a value of
            another type where a bool, number or string has to be, a name that is not among its choices.

    Sizes that may differ between blocks become a tuple where they do, and one integer where they do not.
    """
    kinds = get_type_hints(type(config))
    for name in (field.name for field in fields(config)):
        kind, value = kinds[name], getattr(config, name)
        if kind is int:
            object.__setattr__(config, name, _integer(name, value))
        elif kind == PerBlock:
            object.__setattr__(config, name, _size_per_block(name, value, config.num_blocks))
        elif kind == NoiseLevels:
            object.__setattr__(config, name, _noise_levels(name, value))
        elif kind is float and (not isinstance(value, Real) or isinstance(value, bool)):
            raise ValueError(f"{name}: expected a number; got {short(value)}")
        elif kind in (bool, str) and not isinstance(value, kind):
            raise ValueError(f"{name}: expected {'True or False' if kind is bool else 'a string'}; got {short(value)}")
        elif type(None) in get_args(kind) and not isinstance(value, kind):
            raise ValueError(f"{name}: expected a {get_args(kind)[0].__name__} or None; got {short(value)}")
        elif get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}; got {short(value)}")


def _integer(name: str, value: Any, otherwise: str = "") -> int:
    least, most = 0 if name in MAY_BE_ZERO else 1, LARGEST.get(name, math.inf)
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        raise ValueError(f"{name}: expected an integer in [{least}, {most}]{otherwise}; got {short(value)}")
    return int(value)


def _size_per_block(name: str, value: Any, num_blocks: int) -> PerBlock:
    otherwise = f", or {num_blocks} of them, one for each block"
    if not isinstance(value, list | tuple) or len(value) != num_blocks:
        return _integer(name, value, otherwise)
    sizes = tuple(_integer(name, size, otherwise) for size in value)
    return sizes[0] if len(set(sizes)) == 1 else sizes


def _noise_levels(name: str, value: Any) -> NoiseLevels:
    if value is None:
        return None
    is_pair = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(t, Real) for t in value)
    if not is_pair or not 0 < value[0] <= value[1] <= MAX_SIGMA:
        raise ValueError(f"{name}: expected two rising numbers > 0, at most {MAX_SIGMA}, or None; got {short(value)}")
    return float(value[0]), float(value[1])


def check_totals(name: str, layers: int, image_shape: tuple[int, ...] = ()) -> None:
    """Raise ValueError, with the name of the field that asks for them, for more layers or values than any model has."""
    if layers > MOST_LAYERS:
        raise ValueError(f"{name}: expected at most {MOST_LAYERS} layers in all; got {layers}")
    if math.prod(image_shape) > MOST_VALUES:
        raise ValueError(f"image_size: expected at most {MOST_VALUES} values in an image; got {image_shape}")


def check_sigma(name: str, sigma: float) -> None:
    """Raise ValueError for a standard deviation of noise that is no number in [0, 10]."""
    if not 0 <= sigma <= MAX_SIGMA:
        raise ValueError(f"{name}: expected a number from 0 to {MAX_SIGMA}, images being in [-1, 1]; got {sigma}")


def describe_argument(value: object) -> str:
    """Describe an argument that should have been a tensor, for an error."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    kind = type(value)
    return repr(value) if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def not_finite(images: Tensor) -> Tensor:
    """Return the indices, on the CPU, of the images ``(B, ...)`` that hold a nan or an infinity."""
    return (~images.isfinite().flatten(1).all(1)).nonzero()[:, 0].cpu()
