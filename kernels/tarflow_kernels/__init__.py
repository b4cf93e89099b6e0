"""Kernels of transformer autoregressive flows, one public function each, usable in any PyTorch flow."""

from . import reference, scales
from .affine import affine_forward, affine_inverse, guided_affine_inverse
from .attention import causal_attention
from .decode import KVCache, decode_attention
from .dispatch import use_backend
from .embed import embed_next
from .mixture import mixture_logistic, mixture_logistic_inverse
from .norm import residual_norm

__all__ = [
    "KVCache",
    "affine_forward",
    "affine_inverse",
    "causal_attention",
    "decode_attention",
    "embed_next",
    "guided_affine_inverse",
    "mixture_logistic",
    "mixture_logistic_inverse",
    "reference",
    "residual_norm",
    "scales",
    "use_backend",
]
