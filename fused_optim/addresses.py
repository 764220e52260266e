"""The one place that asks where tensors are.

Kernels are given addresses, and torch tells nobody when a tensor is moved, replaced or freed. So each
step asks all of them, through documented interfaces alone: in C++ where it was built
(``csrc/addresses.h``), else here.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .backends import extension
from .layout import freed, is_lazy, may_be_lazy
from .table import int64_tensor


class Answer(IntEnum):
    """What :meth:`Addresses.ask` found. The numbers are those of ``csrc/addresses.h``."""

    CHANGED = 0
    SAME = 1
    GRADS_MOVED = 2


def _same(a: Iterable[Any], b: list[Any]) -> bool:
    """Whether both are the very same objects."""
    a = list(a)
    return len(a) == len(b) and all(map(is_, a, b))


def _kinds(tensors: list[Tensor]) -> list[Any]:
    """All that says how to read what lies at an address."""
    return [
        [t.dtype for t in tensors],
        [t.shape for t in tensors],
        list(map(Tensor.stride, tensors)),
        [is_lazy(t) for t in tensors if may_be_lazy(t)],
    ]


class Addresses:
    """The tensors of an optimizer and where they are.

    Args:
        param_lists: the groups' lists of parameters.
        state: the optimizer's state.
    """

    def __init__(self, param_lists: list[list[Tensor]], state: dict[Any, Any]) -> None:
        self.params = list(chain.from_iterable(param_lists))
        grads = [p.grad for p in self.params]
        self._has_grad = [g is not None for g in grads]
        self._keys, self._states = list(state), list(state.values())
        dicts = [s for s in self._states if isinstance(s, dict)]
        self._lengths = list(map(len, dicts))
        self._names = list(chain.from_iterable(dicts))
        self._values = list(chain.from_iterable(map(dict.values, dicts)))
        held = {id(v): v for v in self._values if isinstance(v, Tensor)}
        self._tensors = list(held.values())
        self._fixed = [p for p, has in zip(self.params, self._has_grad) if has] + self._tensors
        self._places = list(map(Tensor.data_ptr, self._fixed))
        self._kinds = _kinds(self._fixed)
        live_grads = [g for g in grads if g is not None]
        self._grad_kinds = _kinds(live_grads)
        self.grads = int64_tensor(list(map(Tensor.data_ptr, live_grads)))
        """The addresses of the gradients that there are; kept up to date."""
        cpu = extension("_cpu")[0]
        # In C++ there are numbers alone, and the objects stay here, where Python's garbage collector
        # sees them.
        self._known = (self.params, self._tensors, self._keys, self._states, self._names, self._values)
        native = cpu and cpu.Addresses(self.params, self._tensors, self.grads.data_ptr())
        self._native = native if native and native.works() else None

    def ask(self, param_lists: list[list[Tensor]], state: dict[Any, Any]) -> Answer:
        """Whether all is where it was; gradients of the same kind that have only moved are followed."""
        if self._native is not None:
            return Answer(self._native.ask(*self._known, param_lists, state))
        return self.ask_in_python(param_lists, state)

    def ask_in_python(self, param_lists: list[list[Tensor]], state: dict[Any, Any]) -> Answer:
        """What ``csrc/addresses.h`` does where it was built."""
        grads = [p.grad for p in self.params]
        dicts = [s for s in self._states if isinstance(s, dict)]
        if not (
            _same(chain.from_iterable(param_lists), self.params)
            and [g is not None for g in grads] == self._has_grad
            and _same(state, self._keys)
            and _same(state.values(), self._states)
            and list(map(len, dicts)) == self._lengths
            and _same(chain.from_iterable(dicts), self._names)
            and _same(chain.from_iterable(map(dict.values, dicts)), self._values)
        ):
            return Answer.CHANGED
        live = [g for g in grads if g is not None]
        if any(g.layout is not torch.strided for g in live):
            return Answer.CHANGED
        places = list(map(Tensor.data_ptr, live))
        if (
            list(map(Tensor.data_ptr, self._fixed)) != self._places
            or _kinds(self._fixed) != self._kinds
            or _kinds(live) != self._grad_kinds
        ):
            return Answer.CHANGED
        before = self.grads.tolist()
        if places == before:
            return Answer.SAME
        if any((a ^ b) % 16 for a, b in zip(places, before)) or any(map(freed, live)):
            return Answer.CHANGED
        self.grads.copy_(int64_tensor(places))
        return Answer.GRADS_MOVED
