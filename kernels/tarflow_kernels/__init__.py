"""Kernels of transformer autoregressive flows: one public function for each op, for any PyTorch flow."""

from . import reference, scales
from .affine import affine_forward, affine_inverse
from .attention import causal_attention
from .decode import KVCache, decode_attention
from .dispatch import use_backend
from .embed import embed_next
from .incremental import fixed_point_inverse, incremental_inverse
from .masked import MaskedNetwork
from .mixture import mixture_logistic, mixture_logistic_inverse
from .norm import residual_norm
from .self_attention import CausalSelfAttention

__version__ = "0.1.0"  # of both distributions
__all__ = [
    "CausalSelfAttention",
    "KVCache",
    "MaskedNetwork",
    "affine_forward",
    "affine_inverse",
    "causal_attention",
    "decode_attention",
    "embed_next",
    "fixed_point_inverse",
    "incremental_inverse",
    "mixture_logistic",
    "mixture_logistic_inverse",
    "reference",
    "residual_norm",
    "scales",
    "use_backend",
]
