"""tarflow: transformer autoregressive normalizing flows with exact likelihoods and fast, exact sampling."""

from .decoding import Decoder
from .flow import TokenFlow
from .guidance import Guidance
from .model import TarFlow, TarFlowConfig

__version__ = "0.1.0"
__all__ = ["Decoder", "Guidance", "TarFlow", "TarFlowConfig", "TokenFlow"]
