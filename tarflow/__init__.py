"""tarflow: transformer autoregressive normalizing flows with exact likelihoods and fast, exact sampling."""

from .flow import TokenFlow
from .guidance import Guidance
from .model import TarFlow, TarFlowConfig

__version__ = "0.1.0"
__all__ = ["Guidance", "TarFlow", "TarFlowConfig", "TokenFlow"]
