"""tarflow: transformer autoregressive normalizing flows with exact likelihoods and fast, exact sampling."""

from .decoding import Decoder
from .flow import TokenFlow
from .flowpp.dequantizer import Dequantizer, DequantizerConfig
from .flowpp.model import FlowPP, FlowPPConfig
from .guidance import Guidance
from .image_flow import ImageFlow
from .model import TarFlow, TarFlowConfig

__version__ = "0.1.0"
__all__ = [
    "Decoder",
    "Dequantizer",
    "DequantizerConfig",
    "FlowPP",
    "FlowPPConfig",
    "Guidance",
    "ImageFlow",
    "TarFlow",
    "TarFlowConfig",
    "TokenFlow",
]
