"""The plan of a step, the batches to launch, and whether it is still right.

Asking each tensor where it is costs more than stepping it when tensors are small, so
there are two ways to ask: ``_cpu.Watch``, in C++ where it was built, which knows only
"unchanged" and "perhaps not", and the fingerprint in Python, which decides.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .backends import Backend, extension
from .table import Batch, misaligned

State = dict[Tensor, dict[str, Any]]


def _where(tensors: list[Tensor]) -> tuple[list[int], list[Any]]:
    """Addresses, and all else that says how to read what is there."""
    kinds = [
        list(map(Tensor.stride, tensors)),
        list(map(Tensor.numel, tensors)),
        [t.dtype for t in tensors],
        list(map(Tensor.is_conj, tensors)),
        list(map(Tensor.is_neg, tensors)),
    ]
    return list(map(Tensor.data_ptr, tensors)), kinds


def _options(groups: list[dict[str, Any]]) -> list[Any]:
    return [
        (len(g["params"]), g.get("nesterov"), g["weight_decay_mask"] and tuple(g["weight_decay_mask"]))
        for g in groups
    ]


class _Fingerprint:
    """What a plan depends on: options of the groups, and where every tensor is."""

    def __init__(self, groups: list[dict[str, Any]], state: State) -> None:
        self.params = list(chain.from_iterable(group["params"] for group in groups))
        grads = [p.grad for p in self.params]
        self.live = [g is not None for g in grads]
        self.grads = [g for g in grads if g is not None]
        self.options = _options(groups)
        # Held so that no address in here can be given to another tensor.
        self.inner = list(state.values())
        self.values = [v for inner in self.inner for v in inner.values() if isinstance(v, Tensor)]
        self.fixed = _where(self.params), _where(self.values)
        self.grad_addresses, self.grad_kinds = _where(self.grads)

    def same_but_for_grad_addresses(self, other: _Fingerprint) -> bool:
        return (
            self.live == other.live
            and self.options == other.options
            and self.fixed == other.fixed
            and self.grad_kinds == other.grad_kinds
        )


class Plan:
    """The batches of a step.

    Args:
        batches: what to launch, each with the backend that does.
        params: what is stepped.
        steps: their step numbers.
        groups, state: the optimizer's, as they are now.
    """

    def __init__(
        self,
        batches: list[tuple[Backend, Batch]],
        params: list[Tensor],
        steps: list[Tensor],
        groups: list[dict[str, Any]],
        state: State,
    ) -> None:
        self.batches = batches
        self.params = params
        self.steps = steps
        self.steps_certain = 0
        """Steps made with this plan that no ``found_inf`` can have skipped."""
        self.steps_maybe = 0
        self.step_versions: list[int] = []
        """Of ``steps``, after our own write to them."""
        self._movable = not any(o.slot for _, batch in batches for o in batch.items)
        self._remember(_Fingerprint(groups, state), groups, state)

    def _remember(self, fingerprint: _Fingerprint, groups: list[dict[str, Any]], state: State) -> None:
        self._fingerprint = fingerprint
        self._lists = [group["params"] for group in groups]
        self._state = state
        self._watch = None
        native = extension("_cpu")[0]
        # The watch cannot see lazy conjugates and negatives, of which real gradients have none.
        if native is not None and not any(
            t.is_complex() or t.is_neg() for t in (*fingerprint.params, *fingerprint.grads)
        ):
            self._watch = native.Watch(self._lists, state, torch.Tensor)
        del fingerprint.grads

    def still_right(self, groups: list[dict[str, Any]], state: State) -> bool:
        """Whether the plan describes these tensors; gradients that have only moved are
        followed."""
        if self._watch is not None and state is self._state and self._fingerprint.options == _options(groups):
            native: Any = extension("_cpu")[0]
            answer = self._watch.ask([group["params"] for group in groups], state)
            if answer == native.UNCHANGED:
                return True
            if answer == native.GRADS_MOVED:
                grads = [p.grad for p in self.params if p.grad is not None]
                if not any(map(Tensor.is_neg, grads)):
                    return self._follow(grads)
        every_grad = (p.grad for group in groups for p in group["params"])
        if any(g is not None and g.layout is not torch.strided for g in every_grad):
            return False
        now = _Fingerprint(groups, state)
        if not now.same_but_for_grad_addresses(self._fingerprint) or not self._follow(now.grads):
            return False
        self._remember(now, groups, state)
        return True

    def _follow(self, grads: list[Tensor]) -> bool:
        """Take gradients of the same dtype and layout; False if they need another plan."""
        addresses = list(map(Tensor.data_ptr, grads))
        moved = addresses != self._fingerprint.grad_addresses
        if moved and (not self._movable or any(map(misaligned, grads))):
            return False
        for _, batch in self.batches:
            batch.take_grads([grads[o.position] for o in batch.items], moved)
        self._fingerprint.grad_addresses = addresses
        return True
