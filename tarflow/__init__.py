"""tarflow: transformer autoregressive normalizing flows with exact likelihoods and fast, exact sampling."""

from tarflow_kernels import __version__ as __version__

from .decoding import Decoder
from .denoising import Denoising
from .flow import TokenFlow
from .flowpp.dequantizer import Dequantizer, DequantizerConfig
from .flowpp.model import FlowPP, FlowPPConfig
from .guidance import Guidance
from .image_flow import ImageFlow
from .model import TarFlow, TarFlowConfig
from .pretrained import load_pretrained
from .published import load_published

__all__ = [
    "Decoder",
    "Denoising",
    "Dequantizer",
    "DequantizerConfig",
    "FlowPP",
    "FlowPPConfig",
    "Guidance",
    "ImageFlow",
    "TarFlow",
    "TarFlowConfig",
    "TokenFlow",
    "load_pretrained",
    "load_published",
]

# The model cannot import what reads published checkpoints into it.
TarFlow.from_published = staticmethod(load_published)
