"""Fused AdaBelief and AdamaxW for PyTorch, with the semantics of Optax, bit for bit."""

from ._version import __version__
from .adabelief import AdaBelief
from .adamaxw import AdamaxW

__all__ = ["AdaBelief", "AdamaxW", "__version__"]
