"""The flat buffers behind ``flatten=True``, with tensors in slots of them. A parameter in its flat slot is
like any other to the rest of the package, except that neighbours share one row of the table."""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .layout import freed
from .storage import Part

ALIGN = 16  # slots start at multiples of this many elements: 32 bytes or more in every dtype


class FlatBuffers:
    """Dense parameters of one device and dtype, each with a slot in every buffer. Their data moves into the
    first; shape, strides and values stay."""

    def __init__(self, params: list[Tensor]) -> None:
        self.device, self.dtype = self.kind = params[0].device, params[0].dtype
        self.params = params
        self.param, self.grad = Part("param", self.dtype), Part("grad", self.dtype)
        self._index = {p: i for i, p in enumerate(params)}
        self._starts: dict[int, list[int]] = {}
        self.buffers: dict[Part, Tensor] = {}
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

    def slot(self, part: Part, p: Tensor) -> Tensor:
        """The slot of ``p`` in the buffer of ``self.param``, ``self.grad`` or a part of the state."""
        shape, stride = part.shape(p), p.stride() if part.block == 1 else (1,)
        # torch exports tensors on the current device alone.
        with torch.inference_mode(False), torch.accelerator.device_index(self.device.index):
            if part not in self.buffers:
                end = self._bounds(part, self.params[-1])[1]
                self.buffers[part] = torch.zeros(end, dtype=part.dtype, device=self.device)
            # A storage of its own, and no view to autograd: to code that saves single tensors, and to
            # in-place operations, slots have nothing in common.
            return from_dlpack(self.buffers[part].as_strided(shape, stride, self._bounds(part, p)[0]))

    def contains(self, t: Tensor) -> bool:
        """Whether a tensor lies in one of the buffers."""
        starts = ((b.data_ptr(), b.nbytes) for b in self.buffers.values() if b.device == t.device)
        return any(0 <= t.data_ptr() - start < n for start, n in starts)

    def in_slot(self, part: Part, p: Tensor, t: Tensor) -> bool:
        buffer, start = self.buffers.get(part), self._bounds(part, p)[0]
        if buffer is None or (t.dtype, t.device) != (buffer.dtype, buffer.device):
            return False
        at = t.numel() == 0 or t.data_ptr() == buffer.data_ptr() + start * buffer.element_size()
        return at and (part.block > 1 or t.stride() == p.stride())

    def bounds(self, p: Tensor) -> tuple[int, int]:  # in real elements
        start, end = self._bounds(self.param, p)
        return (2 * start, 2 * end) if self.dtype.is_complex else (start, end)


class FlatLayout:
    """All flat buffers of an optimizer, one set for each device and dtype."""

    def __init__(self) -> None:
        self.buffers: list[FlatBuffers] = []
        self.buffers_of: dict[Any, FlatBuffers] = {}
        self._left: set[Any] = set()

    def hold(self, params: Iterable[Tensor]) -> None:
        """Have exactly these parameters in flat buffers; if they are not, gather them anew. What somebody put
        elsewhere on its device stays there from then on, for they may need it there, as
        ZeroRedundancyOptimizer does its bucket views."""
        params = list(params)
        out = [p for p, b in self.buffers_of.items() if not b.in_slot(b.param, p, p)]
        left = self._left.union(p for p in out if (p.device, p.dtype) == self.buffers_of[p].kind)
        self._left = left.intersection(params)
        params = [p for p in params if p not in self._left]
        if not out and self.buffers_of.keys() == set(params):
            return
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in params:
            by_kind.setdefault((p.device, p.dtype), []).append(p)
        self.buffers = [FlatBuffers(members) for members in by_kind.values()]
        self.buffers_of = {p: b for b in self.buffers for p in b.params}

    def take_states(self, states: dict[Any, Any], parts_of: Callable[[Tensor], Sequence[Part]]) -> None:
        """Move states into their slots, and out of those of others; ``parts_of`` says what a state has."""
        moves = []
        for p, state in states.items():
            parts = {part.key: part for part in parts_of(p)} if p in self.buffers_of else {}
            for k, t in state.items():
                part = parts.get(k)
                if isinstance(t, Tensor):
                    # A state that is not what a step would make of it stays as it is until there is one.
                    fits = part is not None and (t.dtype, t.shape) == (part.dtype, part.shape(p))
                    moves.append((p, part if fits and not freed(t) else None, t, state, k))
        for (*_, state, key), t in zip(moves, self._placed([move[:3] for move in moves])):
            state[key] = t

    def takes_grad(self, p: Tensor) -> bool:
        return p in self.buffers_of and (p.grad is None or p.grad.dtype == p.dtype)

    def take_grads(self, params: list[Tensor]) -> None:
        """Bring gradients into their slots; autograd and users make new ones elsewhere."""
        moves = [(p, self.buffers_of[p].grad if self.takes_grad(p) else None, p.grad) for p in params]
        for p, grad in zip(params, self._placed(moves)):
            if p.grad is not grad:
                p.grad = grad

    @torch.no_grad()
    def _placed(self, moves: list[tuple[Any, Part | None, Any]]) -> list[Tensor]:
        """Tensors, given as (parameter, part, tensor), in their slots; out of slots where part is None."""
        placed, copies = [], []
        for p, part, t in moves:
            b = self.buffers_of.get(p)
            if part is not None and b is not None and b.in_slot(part, p, t):
                placed.append(t)
                continue
            if any(b.contains(t) for b in self.buffers):
                t = t.clone(memory_format=torch.preserve_format)  # it may lie in another's slot
            if part is not None and b is not None:
                copies.append((b.slot(part, p), t))
                t = copies[-1][0]
            placed.append(t)
        for slot, t in copies:
            slot.copy_(t)
        return placed
