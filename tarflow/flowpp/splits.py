"""Cuts an image in two for a coupling and joins it again; squeezes it, which trades space for channels.

Images are ``(B, C, H, W)``. Each function on them is a permutation of values: its log-det is zero. A stack, such as
``"stripe4 squeeze channel2"``, says in which order a flow splits and squeezes: see :func:`parse_stack`.

Source: Flow++ (arXiv 1902.00275), whose "checkerboard" split is one of columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SPLITS", "Halves", "count_couplings", "parse_stack", "split_stripes", "squeeze", "unsqueeze"]

Halves = tuple[Tensor, Tensor]


def split_stripes(x: Tensor) -> Halves:
    """Split into the even and the odd columns, each ``(B, C, H, W / 2)``.

    >>> left, right = split_stripes(torch.arange(4.0).view(1, 1, 1, 4))
    >>> left.flatten().tolist(), right.flatten().tolist()
    ([0.0, 2.0], [1.0, 3.0])
    """
    return x[..., 0::2], x[..., 1::2]


def merge_stripes(even: Tensor, odd: Tensor) -> Tensor:
    """Invert :func:`split_stripes`."""
    return torch.stack((even, odd), dim=-1).flatten(-2)


def split_channels(x: Tensor) -> Halves:
    """Split into the first and the second half of the channels, each ``(B, C / 2, H, W)``.

    In a squeezed image these are the upper and the lower rows of its squares.
    """
    first, second = x.chunk(2, dim=1)
    return first, second


def merge_channels(first: Tensor, second: Tensor) -> Tensor:
    """Invert :func:`split_channels`."""
    return torch.cat((first, second), dim=1)


def squeeze(x: Tensor) -> Tensor:
    """Turn the four pixels of each square into channels: ``(B, C, H, W)`` to ``(B, 4 C, H / 2, W / 2)``.

    Channel c of the pixel in row i and column j of its square goes to channel ``(2 i + j) C + c``, as TensorFlow orders
    them; :func:`torch.nn.functional.pixel_unshuffle` puts it at ``4 c + 2 i + j``, and leaves an empty batch as it is.

    >>> squeeze(torch.arange(8.0).view(1, 2, 2, 2)).flatten().tolist()
    [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]
    """
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


def unsqueeze(x: Tensor) -> Tensor:
    """Invert :func:`squeeze`."""
    return F.pixel_shuffle(x.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2), 2)


SPLITS = {"stripe": (split_stripes, merge_stripes), "channel": (split_channels, merge_channels)}


def parse_stack(stack: str, shape: tuple[int, int, int]) -> list[tuple[str, int, tuple[int, int, int]]]:
    """Read the levels of a stack: their kind, their number of couplings, and the shape (C, H, W) that comes in.

    Raises:
        ValueError: a level that is not ``squeeze``, ``stripe<n>`` or ``channel<n>`` with n of at least 1, an odd number
            to be halved, or squeezes alone.

    >>> parse_stack("stripe4 squeeze channel2", (1, 28, 28))
    [('stripe', 4, (1, 28, 28)), ('squeeze', 0, (1, 28, 28)), ('channel', 2, (4, 14, 14))]
    """
    levels = []
    for word in stack.split():
        kind = word.rstrip("0123456789")
        number = word.removeprefix(kind)
        if kind not in ("squeeze", *SPLITS) or bool(number) != (kind != "squeeze") or (number and int(number) < 1):
            raise ValueError(
                f"stack: expected words squeeze, stripe<n> and channel<n>, n at least 1; got {word!r} in {stack!r}"
            )
        channels, height, width = shape
        halved = {"squeeze": (height, width), "stripe": (width,), "channel": (channels,)}[kind]
        if any(size % 2 for size in halved):
            raise ValueError(f"stack: expected even sizes where {word} halves them; got (C, H, W) = {shape}")
        levels.append((kind, int(number or 0), shape))
        if kind == "squeeze":
            shape = (4 * channels, height // 2, width // 2)
    if all(kind == "squeeze" for kind, _, _ in levels):
        raise ValueError(f"stack: expected couplings, as in 'stripe4 squeeze channel2'; got {stack!r}")
    return levels


def count_couplings(stack: str, shape: tuple[int, int, int]) -> int:
    """Count the couplings of all levels; errors are those of :func:`parse_stack`."""
    return sum(number for _, number, _ in parse_stack(stack, shape))
