"""The one place that asks where tensors are. Kernels are given addresses, and torch tells nobody when a
tensor is moved, replaced or freed. So each step asks all of them, through documented interfaces alone: in C++
where it was built (``csrc/addresses.h``), else here."""

from functools import partial
from itertools import chain, compress
from operator import gt
from typing import Any

from torch import Tensor

from .backends import extension
from .layout import freed, is_distributed, is_lazy, local
from .table import int64_tensor

# What Addresses.ask found, here and in csrc/addresses.h; the last: that gradients came or went.
CHANGED, SAME, GRADS_MOVED, GRADS_TOGGLED = range(4)


def _objects(lists: list[list[Tensor]], state: dict[Any, Any]) -> list[list[Any]]:
    """What must be the very same objects: parameters, and the states' keys, values and these's items."""
    states = list(state.values())
    dicts = [s for s in states if isinstance(s, dict)]
    names, values = chain.from_iterable(dicts), chain.from_iterable(map(dict.values, dicts))
    return [list(chain.from_iterable(lists)), list(state), states, list(names), list(values)]


class Addresses:
    """Where the tensors of an optimizer's lists of parameters and of its state are. Objects are known by
    their ids, so that nothing lives on that is replaced: trainers offload states between two steps."""

    def __init__(self, lists: list[list[Tensor]], state: dict[Any, Any], stepped: dict[Tensor, bool]) -> None:
        """``lists``: of parameters. ``stepped``: those with a gradient, True for what may be without it."""
        objects = _objects(lists, state)
        self._ids = [list(map(id, same_kind)) for same_kind in objects]
        params, *_, self._names, values = objects  # names are kept, for nothing else is asked of them
        held = {id(v): i for i, v in enumerate(values) if isinstance(v, Tensor)}
        self._asked = [held.get(id(v)) == i for i, v in enumerate(values)]  # each tensor once
        self._stepped, self._optional = list(stepped), list(stepped.values())
        self._unstepped = [p for p in params if p not in stepped]
        fixed = [*stepped, *compress(values, self._asked)]
        self._distributed = any(map(is_distributed, fixed))
        # A lazy real tensor is a view of a complex one, with even strides: it has gaps, or one element.
        self._may_be_lazy = [t.is_complex() or (t.numel() == 1 and t.stride()[-1:] != (1,)) for t in fixed]
        self._seen = self._look(fixed)
        self._seen[-1] = [0 if gone else place for gone, place in zip(*self._seen[-2:])]
        # Where gradients are, kept up to date. Of one that is missing: the remainder by 16 of where it was.
        self.grads = int64_tensor(self._seen[-1])
        cpu = extension("_cpu")[0]
        self._ask_native = None
        if cpu and not self._distributed:
            kinds = bytes(1 + stepped[p] if p in stepped else 0 for p in params)
            native = cpu.addresses(lists, state, kinds, set(held), self.grads.data_ptr())
            self._ask_native = native and partial(cpu.ask, native)

    def _look(self, fixed: list[Any]) -> list[Any]:
        """What parameters and states, which are ``fixed``, and gradients are like and where they are; last,
        where gradients are. A gradient that is missing is like its parameter."""
        grads = [p.grad for p in self._stepped]
        missing = [g is None for g in grads]
        like = [p if g is None else g for p, g in zip(self._stepped, grads)]
        tensors = [*fixed, *like]
        placements = []
        if self._distributed:
            placements = [(t.device_mesh, t.placements) for t in tensors if is_distributed(t)]
            tensors = list(map(local, tensors))
        try:
            strides, places = list(map(Tensor.stride, tensors)), list(map(Tensor.data_ptr, tensors))
        except (RuntimeError, TypeError):  # a sparse gradient has none, and what got the id of a tensor
            return []
        kinds = [[t.dtype for t in tensors], [t.shape for t in tensors], strides]
        may_be_lazy = compress(fixed, self._may_be_lazy)
        lazy = [is_lazy(local(t)) for p in may_be_lazy for t in (p, p if p.grad is None else p.grad)]
        n = len(fixed)
        return [*kinds, lazy, placements, places[:n], missing, places[n:]]

    def ask(self, lists: list[list[Tensor]], state: dict[Any, Any]) -> int:
        """Whether all is where it was; gradients of the same kind that have only moved are followed."""
        if self._ask_native is not None:
            return int(self._ask_native(lists, state))
        objects = _objects(lists, state)
        if [list(map(id, same_kind)) for same_kind in objects] != self._ids:
            return CHANGED
        found = self._look([*self._stepped, *compress(objects[-1], self._asked)])
        *seen, missing, places = found or [None, [], []]
        *known, was_missing, before = self._seen
        came = any(p.grad is not None for p in self._unstepped)
        if came or seen != known or any(map(gt, missing, self._optional)):
            return CHANGED
        places = [old % 16 if gone else new for gone, new, old in zip(missing, places, before)]
        if places == before and missing == was_missing:
            return SAME
        if any((a ^ b) % 16 for a, b in zip(places, before)):
            return CHANGED
        if any(g.device != p.device or freed(local(g)) for p in self._stepped if (g := p.grad) is not None):
            return CHANGED
        self._seen = [*seen, missing, places]
        self.grads.copy_(int64_tensor(places))
        return GRADS_MOVED if missing == was_missing else GRADS_TOGGLED
