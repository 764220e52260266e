"""The flat buffers behind ``flatten=True``: one each for the parameters, gradients and
states of a device and dtype, with the tensors as views of them.

Nothing else knows of them: a parameter that is at home is like any other to the rest of
the package, except that neighbours share one row of the table.
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


class FlatSet:
    """Parameters of one device and dtype, each with a slot in every buffer.

    Args:
        params: dense parameters of one device and dtype. Their data moves into the
            buffer; shape, strides and values stay.
    """

    def __init__(self, params: list[Tensor]) -> None:
        self.device, self.dtype = params[0].device, params[0].dtype
        self.params = params
        self.param, self.grad = (Part(key, self.dtype, 1) for key in ("param", "grad"))
        self.index = {p: i for i, p in enumerate(params)}
        self._starts: dict[int, list[int]] = {}
        self._buffers: dict[Part, Tensor] = {}
        self._grad_version = -1
        for p in params:
            home = self.view(self.param, p)
            home.copy_(p.detach())
            p.data = home

    def _slot(self, part: Part, p: Tensor) -> tuple[int, int]:
        if part.block not in self._starts:
            slots = (-(-part.numel(p.numel()) // ALIGN) * ALIGN for p in self.params)
            self._starts[part.block] = [0, *accumulate(slots)]
        starts, i = self._starts[part.block], self.index[p]
        return starts[i], starts[i + 1]

    def _buffer(self, part: Part) -> Tensor:
        if part not in self._buffers:
            end = self._slot(part, self.params[-1])[1]
            self._buffers[part] = torch.zeros(end, dtype=part.dtype, device=self.device)
        return self._buffers[part]

    def view(self, part: Part, p: Tensor) -> Tensor:
        """The slot of ``p`` in the buffer of ``self.param``, ``self.grad`` or a part of the state."""
        start, buffer = self._slot(part, p)[0], self._buffer(part)
        if part.block == 1:
            return buffer.as_strided(p.shape, p.stride(), start)
        return buffer[start : start + part.numel(p.numel())]

    def at_home(self, part: Part, p: Tensor, t: Tensor) -> bool:
        """Whether ``t`` is the slot of ``p`` in the buffer of ``part``."""
        buffer = self._buffer(part)
        start, end = self._slot(part, p)
        return (
            t.layout is torch.strided
            and t.dtype == buffer.dtype
            and t.device == buffer.device
            and (t.numel() == 0 or t.data_ptr() == buffer.data_ptr() + start * buffer.element_size())
            and t.numel() <= end - start
        )

    def holds_grad(self, p: Tensor, grad: Tensor) -> bool:
        return self.at_home(self.grad, p, grad)

    def slot(self, p: Tensor) -> tuple[int, int]:
        """Where the slot of ``p`` starts and ends, in real elements."""
        pairs = 2 if self.dtype.is_complex else 1
        start, end = self._slot(self.param, p)
        return start * pairs, end * pairs

    @property
    def param_buffer(self) -> Tensor:
        return self._buffer(self.param)

    @property
    def padding_bytes(self) -> int:
        """Memory of the buffers that is no tensor's."""
        used = sum(nbytes(self.view(part, p)) for part in self._buffers for p in self.params)
        return nbytes(*self._buffers.values()) - used

    def zero_grads_at_home(self) -> None:
        """Zero the gradients that are at home, in one pass."""
        if self.grad in self._buffers:
            self._buffers[self.grad].zero_()
            self._grad_version = self._buffers[self.grad]._version

    def zero_grad(self, set_to_none: bool) -> None:
        """Zero the gradients that are at home; drop or zero the others."""
        self.zero_grads_at_home()
        for p in self.params:
            if p.grad is not None and not self.holds_grad(p, p.grad):
                reset_grad(p, set_to_none)

    def gradient_arrived(self) -> bool:
        """Whether anything was written to the gradient buffer since ``zero_grad``."""
        return self.grad not in self._buffers or self._buffers[self.grad]._version != self._grad_version


def reset_grad(p: Tensor, set_to_none: bool) -> None:
    """Drop or zero the gradient of ``p``, which has one."""
    assert p.grad is not None
    if set_to_none:
        p.grad = None
    elif p.grad.grad_fn is not None:
        p.grad.detach_().zero_()
    else:  # perhaps a view (of DDP's buckets), which cannot be detached in place
        p.grad.requires_grad_(False).zero_()


def flat_sets(params: Iterable[Tensor]) -> list[FlatSet]:
    """Move parameters into flat buffers, one set for each device and dtype."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        by_kind.setdefault((p.device, p.dtype), []).append(p)
    return [FlatSet(members) for members in by_kind.values()]
