"""The flat buffers behind ``flatten=True``: one each for the parameters, gradients and
states of a device and dtype, with the tensors as views of them.

A parameter in its flat slot is like any other to the rest of the package, except that neighbours
share one row of the table.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor

from .memory import nbytes
from .storage import Part

ALIGN = 16
"""Slots start at multiples of this many elements: 32 bytes or more in every dtype."""


class FlatBuffers:
    """Parameters of one device and dtype, each with a slot in every buffer.

    Args:
        params: dense parameters of one device and dtype. Their data moves into the
            buffer; shape, strides and values stay.
    """

    def __init__(self, params: list[Tensor]) -> None:
        self.device, self.dtype = params[0].device, params[0].dtype
        self.params = params
        self.param, self.grad = (Part(key, self.dtype, 1) for key in ("param", "grad"))
        self._index = {p: i for i, p in enumerate(params)}
        self._starts: dict[int, list[int]] = {}
        self._buffers: dict[Part, Tensor] = {}
        for p in params:
            slot = self.slot(self.param, p)
            slot.copy_(p.detach())
            p.data = slot

    def _bounds(self, part: Part, p: Tensor) -> tuple[int, int]:
        if part.block not in self._starts:
            lengths = (-(-part.numel(p.numel()) // ALIGN) * ALIGN for p in self.params)
            self._starts[part.block] = [0, *accumulate(lengths)]
        starts, i = self._starts[part.block], self._index[p]
        return starts[i], starts[i + 1]

    def _buffer(self, part: Part) -> Tensor:
        if part not in self._buffers:
            end = self._bounds(part, self.params[-1])[1]
            with torch.inference_mode(False):
                self._buffers[part] = torch.zeros(end, dtype=part.dtype, device=self.device)
        return self._buffers[part]

    def slot(self, part: Part, p: Tensor) -> Tensor:
        """The slot of ``p`` in the buffer of ``self.param``, ``self.grad`` or a part of the state."""
        start, buffer = self._bounds(part, p)[0], self._buffer(part)
        shape, stride = (p.shape, p.stride()) if part.block == 1 else ((part.numel(p.numel()),), (1,))
        # Not a view to autograd: in-place operations on one slot are nothing to the others.
        with torch.inference_mode(False):
            return buffer.new_empty(0).set_(buffer.untyped_storage(), start, shape, stride)

    def in_slot(self, part: Part, p: Tensor, t: Tensor) -> bool:
        """Whether ``t`` is the slot of ``p`` in the buffer of ``part``."""
        buffer, start = self._buffer(part), self._bounds(part, p)[0]
        return (
            t.dtype == buffer.dtype
            and t.device == buffer.device
            and (t.numel() == 0 or t.data_ptr() == buffer.data_ptr() + start * buffer.element_size())
            and (part.block > 1 or t.stride() == p.stride())
        )

    def bounds(self, p: Tensor) -> tuple[int, int]:
        """Where the slot of ``p`` starts and ends, in real elements."""
        pairs = 2 if self.dtype.is_complex else 1
        start, end = self._bounds(self.param, p)
        return start * pairs, end * pairs

    def storages(self) -> list[int]:
        """The addresses of all buffers."""
        return [buffer.untyped_storage().data_ptr() for buffer in self._buffers.values()]

    @property
    def padding_bytes(self) -> int:
        """Memory of the buffers that is no tensor's."""
        used = sum(nbytes(self.slot(part, p)) for part in self._buffers for p in self.params)
        return nbytes(*self._buffers.values()) - used


def flat_buffers(params: Iterable[Tensor]) -> list[FlatBuffers]:
    """Move parameters into flat buffers, one set for each device and dtype."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        by_kind.setdefault((p.device, p.dtype), []).append(p)
    return [FlatBuffers(members) for members in by_kind.values()]


def move_to(slots: list[tuple[Tensor, Tensor]]) -> None:
    """Copy tensors into slots, given as (slot, tensor); they may be one another's slots."""
    buffers = {slot.untyped_storage().data_ptr() for slot, _ in slots}
    sources = [t.clone() if t.untyped_storage().data_ptr() in buffers else t for _, t in slots]
    for (slot, _), source in zip(slots, sources):
        slot.copy_(source)
