"""Fused AdaBelief, AdamaxW and AdamW for PyTorch, with the semantics of Optax, bit for bit."""

from ._version import __version__
from .adabelief import AdaBelief
from .adamaxw import AdamaxW
from .adamw import AdamW

__all__ = ["AdaBelief", "AdamW", "AdamaxW", "__version__"]
