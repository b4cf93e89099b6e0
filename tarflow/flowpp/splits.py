"""How an image is cut in two for a coupling, and put together again; and squeezing, which trades space for channels.

Images are ``(B, C, H, W)``. Each function is a permutation of values: its log-det is zero.

Source: Flow++ (arXiv 1902.00275), whose "checkerboard" split is one of columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Halves = tuple[Tensor, Tensor]


def split_stripes(x: Tensor) -> Halves:
    """Even and odd columns, each ``(B, C, H, W / 2)``.

    >>> left, right = split_stripes(torch.arange(4.0).view(1, 1, 1, 4))
    >>> left.flatten().tolist(), right.flatten().tolist()
    ([0.0, 2.0], [1.0, 3.0])
    """
    return x[..., 0::2], x[..., 1::2]


def merge_stripes(even: Tensor, odd: Tensor) -> Tensor:
    """The inverse of :func:`split_stripes`."""
    return torch.stack((even, odd), dim=-1).flatten(-2)


def split_channels(x: Tensor) -> Halves:
    """The first and the second half of the channels: of a squeezed image, the upper and lower rows of its squares."""
    first, second = x.chunk(2, dim=1)
    return first, second


def merge_channels(first: Tensor, second: Tensor) -> Tensor:
    """The inverse of :func:`split_channels`."""
    return torch.cat((first, second), dim=1)


def squeeze(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` to ``(B, 4 C, H / 2, W / 2)``: the four pixels of a square become channels.

    Channel c of the pixel in row i and column j of its square goes to channel ``(2 i + j) C + c``, as TensorFlow orders
    them; :func:`torch.nn.functional.pixel_unshuffle` puts it at ``4 c + 2 i + j``, and leaves an empty batch as it is.

    >>> squeeze(torch.arange(8.0).view(1, 2, 2, 2)).flatten().tolist()
    [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]
    """
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


def unsqueeze(x: Tensor) -> Tensor:
    """The inverse of :func:`squeeze`."""
    return F.pixel_shuffle(x.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2), 2)


SPLITS = {"stripe": (split_stripes, merge_stripes), "channel": (split_channels, merge_channels)}
