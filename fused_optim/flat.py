"""The flat buffers behind ``flatten=True``: one each for the parameters, gradients and
states of a device and dtype, with the tensors as views of them.

A parameter in its flat slot is like any other to the rest of the package, except that neighbours
share one row of the table.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .memory import nbytes
from .state import State
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

    def tensors(self) -> list[Tensor]:
        return list(self._buffers.values())

    @property
    def padding_bytes(self) -> int:
        """Memory of the buffers that is no tensor's."""
        used = sum(nbytes(self.slot(part, p)) for part in self._buffers for p in self.params)
        return nbytes(*self._buffers.values()) - used


class FlatLayout:
    """All flat buffers of an optimizer, one set for each device and dtype."""

    def __init__(self) -> None:
        self.buffers: list[FlatBuffers] = []
        self.buffers_of: dict[Any, FlatBuffers] = {}

    def hold(self, params: Iterable[Tensor]) -> None:
        """Have exactly these parameters in flat buffers; if they are not, gather them anew."""
        params = list(params)
        moved = [p for p, b in self.buffers_of.items() if not b.in_slot(b.param, p, p)]
        if not moved and self.buffers_of.keys() == set(params):
            return
        if moved:
            warnings.warn(
                "parameters were moved out of the flat buffers of flatten=True (model.to(), p.data = ...); "
                "they are gathered again, which costs a copy",
                UserWarning,
                stacklevel=7,
            )
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in params:
            by_kind.setdefault((p.device, p.dtype), []).append(p)
        self.buffers = [FlatBuffers(members) for members in by_kind.values()]
        self.buffers_of = {p: b for b in self.buffers for p in b.params}

    def take_states(
        self, stepped: dict[Any, State], others: dict[Any, State], parts_of: Callable[[Tensor], list[Part]]
    ) -> None:
        """Move states into their slots, and out of those of others.

        Args:
            others: states of what is not stepped.
            parts_of: what a parameter keeps in its state.
        """
        storages = self._storages()
        moves = []
        for p, state in {**others, **stepped}.items():
            b = self.buffers_of.get(p)
            parts = {} if b is None else {part.key: part for part in parts_of(p)}
            for key, t in state.items():
                if b is None or key not in parts or not isinstance(t, Tensor):
                    state[key] = _apart(t, storages)
                elif not b.in_slot(parts[key], p, t):
                    slot = b.slot(parts[key], p)
                    moves.append((slot, t))
                    state[key] = slot
        _move(moves)

    def takes_grad(self, p: Tensor) -> bool:
        """Whether the gradient of ``p`` has a slot."""
        return p in self.buffers_of and p.grad is not None and p.grad.dtype == p.dtype

    def take_grads(self, params: list[Tensor]) -> None:
        """Bring gradients into their slots; autograd and users make new ones elsewhere."""
        storages = self._storages()
        moves = []
        for p in params:
            assert p.grad is not None
            if not self.takes_grad(p):
                p.grad = _apart(p.grad, storages)
                continue
            b = self.buffers_of[p]
            if not b.in_slot(b.grad, p, p.grad):
                slot = b.slot(b.grad, p)
                moves.append((p, slot, p.grad))
        _move([(slot, grad) for _, slot, grad in moves])
        for p, slot, _ in moves:
            p.grad = slot

    def _storages(self) -> set[int]:
        return {t.untyped_storage().data_ptr() for b in self.buffers for t in b.tensors()}


def _apart(t: Any, storages: set[int]) -> Any:
    """A tensor that does not lie in one of these storages."""
    if isinstance(t, Tensor) and t.untyped_storage().data_ptr() in storages:
        return t.clone(memory_format=torch.preserve_format)
    return t


def _move(slots: list[tuple[Tensor, Tensor]]) -> None:
    """Copy tensors into slots, given as (slot, tensor); they may be one another's slots."""
    storages = {slot.untyped_storage().data_ptr() for slot, _ in slots}
    sources = [_apart(t, storages) for _, t in slots]
    for (slot, _), source in zip(slots, sources):
        slot.copy_(source)
