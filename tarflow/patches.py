"""Images to tokens and back: every patch of P x P pixels is a token, in raster order."""

import torch.nn.functional as F
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """``(B, C, H, W)`` to ``(B, N, C * P * P)``, laid out as :func:`torch.nn.functional.unfold` does.

    >>> import torch
    >>> images = torch.arange(16.0).view(1, 1, 4, 4)
    >>> patchify(images, 2)[0, 1]  # the upper right patch
    tensor([2., 3., 6., 7.])
    """
    # Not pixel_unshuffle, which returns an empty batch as it was.
    batch, channels, height, width = images.shape
    patches = images.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, patch_size: int, image_size: int) -> Tensor:
    """The inverse of :func:`patchify` for square images: ``(B, N, C * P * P)`` to ``(B, C, H, W)``."""
    side = image_size // patch_size
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), patch_size)
