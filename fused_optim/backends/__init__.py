"""The backends: who can step which device, and who does. A new one is a module here that makes a
:class:`Backend`, and a name in ``BACKENDS``."""

import torch

from .base import Backend, Inputs, uploaded, valid_now
from .eager import EAGER
from .native import CPU, CUDA, extension
from .triton import TRITON

__all__ = ["BACKENDS", "Backend", "Inputs", "extension", "select", "uploaded", "valid_now"]

BACKENDS = {backend.name: backend for backend in (TRITON, CUDA, CPU, EAGER)}  # in order of preference


def select(name: str | None, device: torch.device) -> Backend:
    """The backend of this name, or for None the device's best; a RuntimeError says why it cannot be had."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be None or one of {sorted(BACKENDS)}, got {name!r}")
    if name is None:
        return next(b for b in BACKENDS.values() if b.why_not(device) is None)
    reason = BACKENDS[name].why_not(device)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available for {device}: {reason}")
    return BACKENDS[name]
