"""Kernels of transformer autoregressive flows, one public function each, usable in any PyTorch flow."""

from . import reference, scales
from .affine import affine_forward, affine_inverse, guided_affine_inverse
from .attention import causal_attention
from .decode import KVCache, decode_attention
from .dispatch import use_backend

__all__ = [
    "KVCache",
    "affine_forward",
    "affine_inverse",
    "causal_attention",
    "decode_attention",
    "guided_affine_inverse",
    "reference",
    "scales",
    "use_backend",
]
