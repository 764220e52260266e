"""The one place that asks where tensors are. Kernels are given addresses, and torch tells nobody when a
tensor is moved, replaced or freed. So each step asks all of them, through documented interfaces alone: in C++
where it was built (``csrc/addresses.h``), else here."""

from functools import partial
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor

from .backends import extension
from .layout import freed, is_distributed, is_lazy, local
from .table import int64_tensor

CHANGED, SAME, GRADS_MOVED = range(3)  # what Addresses.ask found, here and in csrc/addresses.h


def _objects(param_lists: list[list[Tensor]], state: dict[Any, Any]) -> list[list[Any]]:
    """What must be the very same objects: parameters, and the states' keys, values and these's items."""
    states = list(state.values())
    dicts = [s for s in states if isinstance(s, dict)]
    names, values = chain.from_iterable(dicts), chain.from_iterable(map(dict.values, dicts))
    return [list(chain.from_iterable(param_lists)), list(state), states, list(names), list(values)]


class Addresses:
    """The tensors in an optimizer's lists of parameters and in its state, and where they are."""

    def __init__(self, param_lists: list[list[Tensor]], state: dict[Any, Any]) -> None:
        self._objects = _objects(param_lists, state)
        self._params, values = self._objects[0], self._objects[-1]
        held = list({id(v): v for v in values if isinstance(v, Tensor)}.values())
        self._fixed = [*(p for p in self._params if p.grad is not None), *held]
        # A lazy real tensor is a view of a complex one, and so has gaps unless it has no dimensions.
        self._distributed = any(map(is_distributed, self._fixed))
        self._may_be_lazy = [t for t in self._fixed if t.is_complex() or t.dim() == 0]
        self._seen = self._look()
        self.grads = int64_tensor(self._seen[-1])  # of the gradients that there are; kept up to date
        cpu = extension("_cpu")[0]
        # In C++ there are numbers alone. The objects stay here, where Python's garbage collector sees them.
        items = ((k, s, *chain.from_iterable(s.items() if isinstance(s, dict) else ())) for k, s in state.items())
        self._known = (self._params, held, [*self._params, *chain.from_iterable(items)])
        native = None
        if cpu and not self._distributed:
            native = cpu.addresses(self._params, held, self.grads.data_ptr())
        self._ask_native = partial(cpu.ask, native, *self._known) if cpu and native else None

    def _look(self) -> list[Any]:
        """What parameters, states and gradients are like and where they are; last, where gradients are."""
        grads = [p.grad for p in self._params]
        tensors, placements = [*self._fixed, *(g for g in grads if g is not None)], []
        if self._distributed:
            placements = [t.placements for t in tensors if is_distributed(t)]
            tensors = list(map(local, tensors))
        try:
            strides, places = list(map(Tensor.stride, tensors)), list(map(Tensor.data_ptr, tensors))
        except RuntimeError:  # a sparse gradient has none
            return []
        kinds = [[t.dtype for t in tensors], [t.shape for t in tensors], strides]
        lazy = [is_lazy(local(t)) for p in self._may_be_lazy for t in (p, p.grad) if t is not None]
        n = len(self._fixed)
        return [[g is None for g in grads], *kinds, lazy, placements, places[:n], places[n:]]

    def ask(self, param_lists: list[list[Tensor]], state: dict[Any, Any]) -> int:
        """Whether all is where it was; gradients of the same kind that have only moved are followed."""
        if self._ask_native is not None:
            return int(self._ask_native(param_lists, state))
        for now, before in zip(_objects(param_lists, state), self._objects):
            if len(now) != len(before) or not all(map(is_, now, before)):
                return CHANGED
        seen = self._look()
        if seen[:-1] != self._seen[:-1]:
            return CHANGED
        places, before = seen[-1], self._seen[-1]
        if places == before:
            return SAME
        grads = (local(p.grad) for p in self._params if p.grad is not None)
        if any((a ^ b) % 16 for a, b in zip(places, before)) or any(map(freed, grads)):
            return CHANGED
        self._seen = seen
        self.grads.copy_(int64_tensor(places))
        return GRADS_MOVED
