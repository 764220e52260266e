"""Fused AdaBelief and AdamaxW for PyTorch, with the semantics of Optax, bit for bit."""

from .adabelief import AdaBelief
from .adamaxw import AdamaxW

__all__ = ["AdaBelief", "AdamaxW"]
__version__ = "0.1.0"
