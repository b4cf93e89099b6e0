"""Inverting a block: latents to tokens."""

from collections.abc import Callable

from torch import Tensor

from .sequential import sequential

DECODERS: dict[str, Callable[..., Tensor]] = {"sequential": sequential}


def get_decoder(name: str) -> Callable[..., Tensor]:
    """The decoder of that name; ``auto`` is the fastest one that is exact, today ``sequential``."""
    if name == "auto":
        return sequential
    if name not in DECODERS:
        raise ValueError(f"decoder: expected one of auto, {', '.join(DECODERS)}; got {name!r}")
    return DECODERS[name]
