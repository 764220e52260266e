"""The flat buffers behind ``flatten=True``: one each for the parameters, gradients and
states of a device and dtype, with the tensors as views of them.

Nothing else knows of them: a parameter that is at home is like any other to the rest of
the package, except that neighbours share one row of the table.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .storage import state_dtype
from .table import dense_like

ALIGN = 16
"""Slots start at multiples of this many elements: 32 bytes or more in every dtype."""


class FlatSet:
    """Parameters of one device and dtype, each with a slot in every buffer.

    Args:
        params: dense parameters of one device and dtype. Their data moves into the
            buffer; shape, strides and values stay.
    """

    def __init__(self, params: list[Tensor]) -> None:
        self.device, self.dtype = params[0].device, params[0].dtype
        self.params = params
        self.starts = [0]
        for p in params:
            self.starts.append(self.starts[-1] + -(-p.numel() // ALIGN) * ALIGN)
        self.index = {p: i for i, p in enumerate(params)}
        self._buffers: dict[str, Tensor] = {}
        self._grad_version = -1
        for p in params:
            home = self.view("param", p)
            home.copy_(p.detach())
            p.data = home

    def _buffer(self, role: str) -> Tensor:
        if role not in self._buffers:
            dtype = self.dtype if role in ("param", "grad") else state_dtype(self.dtype)
            self._buffers[role] = torch.zeros(self.starts[-1], dtype=dtype, device=self.device)
        return self._buffers[role]

    def view(self, role: str, p: Tensor) -> Tensor:
        """The slot of ``p`` in the buffer of ``role`` ("param", "grad" or a state's key)."""
        return self._buffer(role).as_strided(p.shape, p.stride(), self.starts[self.index[p]])

    def at_home(self, role: str, p: Tensor, t: Tensor) -> bool:
        """Whether ``t`` is the slot of ``p`` in the buffer of ``role``."""
        buffer = self._buffer(role)
        start = self.starts[self.index[p]]
        return (
            t.dtype == buffer.dtype
            and t.device == buffer.device
            and (t.numel() == 0 or t.data_ptr() == buffer.data_ptr() + start * buffer.element_size())
            and t.numel() <= self.starts[self.index[p] + 1] - start
        )

    def slot(self, p: Tensor) -> tuple[int, int]:
        """Where the slot of ``p`` starts and ends, in real elements."""
        i, pairs = self.index[p], 2 if self.dtype.is_complex else 1
        return self.starts[i] * pairs, self.starts[i + 1] * pairs

    def zero_grad(self, set_to_none: bool) -> None:
        """Zero the gradients that are at home, in one pass; drop or zero the others."""
        if "grad" in self._buffers:
            self._buffers["grad"].zero_()
            self._grad_version = self._buffers["grad"]._version
        for p in self.params:
            if p.grad is not None and not self.at_home("grad", p, p.grad):
                if set_to_none:
                    p.grad = None
                else:
                    p.grad.detach_().zero_()

    def gradient_arrived(self) -> bool:
        """Whether anything was written to the gradient buffer since ``zero_grad``."""
        return "grad" not in self._buffers or self._buffers["grad"]._version != self._grad_version


def can_be_flat(p: Tensor) -> bool:
    """Whether a parameter can live in a flat buffer; those with gaps stay where they are."""
    return p.device.type != "meta" and dense_like(p) is p


def flat_sets(params: Iterable[Tensor]) -> list[FlatSet]:
    """Move parameters into flat buffers, one set for each device and dtype; those that
    cannot be flat stay where they are."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        if can_be_flat(p):
            by_kind.setdefault((p.device, p.dtype), []).append(p)
    return [FlatSet(members) for members in by_kind.values()]
