"""The plan of a step, the batches to launch, and whether it is still right.

Asking each tensor where it is costs more than stepping it when tensors are small, so
there are two ways to ask: ``_cpu.Watch``, in C++ where it was built, which follows gradients
that are like the old ones and knows "unchanged" and "perhaps not", and the fingerprint in
Python, which decides.
"""

from __future__ import annotations

import weakref
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import has_torch_function

from .backends import BACKENDS, Backend, extension
from .table import GRAD_COLUMN, ROW_COLUMNS, Batch, misaligned

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
        at_home: whether all that is stepped lies in flat buffers.
        static: whether it is promised to stay there.
        steps: their step numbers.
        watch_steps: whether step numbers that somebody else has written to need another plan.
        owners: of each parameter the buffer that it is a view of, if one count of versions is
            to do for all of a buffer; else empty.
        groups, state: the optimizer's, as they are now.
    """

    def __init__(
        self,
        batches: list[tuple[Backend, Batch]],
        params: list[Tensor],
        at_home: bool,
        static: bool,
        steps: list[Tensor],
        watch_steps: bool,
        owners: dict[Tensor, Tensor],
        groups: list[dict[str, Any]],
        state: State,
    ) -> None:
        self.batches = batches
        self.params = params
        self.at_home = at_home
        self.static = static
        self.steps = steps
        self._watch_steps = watch_steps
        self._owners = owners
        self.steps_certain = 0
        """Steps made with this plan that no ``found_inf`` can have skipped."""
        self.steps_maybe = 0
        self._step_versions: list[int] = []
        self._movable = not any(o.slot for _, batch in batches for o in batch.items)
        self._readers = [
            o
            for backend, batch in batches
            for o in (batch.items if backend is BACKENDS["eager"] else batch.staged)
        ]
        """Operands whose gradient is read as a tensor and not at an address of the table."""
        self._remember(_Fingerprint(groups, state), groups, state)

    def _remember(self, fingerprint: _Fingerprint, groups: list[dict[str, Any]], state: State) -> None:
        self._fingerprint = fingerprint
        self._lists = [group["params"] for group in groups]
        self._state = state
        self._watch = None
        self._doubtful = False
        """Whether the watch has said that there is a change, which it may not say again."""
        self._plain = all(type(p) in (Tensor, Parameter) for p in fingerprint.params)
        native = extension("_cpu")[0]
        # The watch cannot see lazy conjugates, of which real tensors have none.
        if native is not None and not any(
            t.is_complex() or t.is_neg()
            for t in (*fingerprint.params, *fingerprint.grads, *fingerprint.values)
        ):
            with torch.inference_mode(False):
                # Not empty: the watch looks for its address in its storage.
                self._scratch = torch.empty(1, device="cpu")
            steps = self.steps if self._watch_steps else []
            watch = native.Watch(self._lists, state, self._grad_cells(), steps, self._owners, self._scratch)
            self._watch = watch if watch.works() else None
        self._buffers = (
            list({id(owner): owner for owner in self._owners.values()}.values())
            if self._watch is not None and self._watch.shares_versions()
            else []
        )
        """What autograd is told of in place of the parameters."""
        del fingerprint.grads

    def _grad_cells(self) -> list[int]:
        """Where the tables keep the gradients' addresses; 0 where these are others' or neighbours
        share a row."""
        cells = [0] * len(self.params)
        if self._movable:
            for _, batch in self.batches:
                first = batch.rows.data_ptr() + 8 * GRAD_COLUMN
                for i, o in enumerate(batch.items):
                    if o.grad_copy is None:
                        cells[o.position] = first + 8 * len(ROW_COLUMNS) * i
        return cells

    def unchanged(self, groups: list[dict[str, Any]], state: State) -> bool:
        """Whether the plan surely describes these tensors and nobody has written to the step
        numbers since ``remember_steps``; gradients that have only moved are followed."""
        if (
            self._watch is None
            or self._doubtful
            or state is not self._state
            or self._fingerprint.options != _options(groups)
        ):
            return False
        native: Any = extension("_cpu")[0]
        answer = self._watch.ask(
            [group["params"] for group in groups],
            state,
            not self._plain or has_torch_function((self._scratch,)),
            torch.get_num_threads(),
        )
        if answer != native.UNCHANGED:
            for _, batch in self.batches:
                batch.on_device.pop("rows", None)
        if answer == native.PERHAPS_NOT or (answer == native.GRADS_MOVED and not self._movable):
            self._doubtful = True
            return False
        for o in self._readers:
            grad = self.params[o.position].grad
            assert grad is not None
            o.grad_source = weakref.ref(grad)
        return True

    def asked_in_turn(self, groups: list[dict[str, Any]], state: State) -> bool:
        """Whether :meth:`changed_among_next` may do in place of :meth:`unchanged`."""
        return (
            self.static
            and self._watch is not None
            and self._plain
            and not self._doubtful
            and state is self._state
            and self._fingerprint.options == _options(groups)
            and not has_torch_function((self._scratch,))
        )

    def changed_among_next(
        self, groups: list[dict[str, Any]], state: State, count: int
    ) -> list[Tensor] | None:
        """Of ``count`` parameters, the next ones in each call, the first that is not where it was, or its
        gradient or state, if there is one; None where all must be asked."""
        if self._watch is None or not self.asked_in_turn(groups, state):
            return None
        native: Any = extension("_cpu")[0]
        found = self._watch.ask_next([group["params"] for group in groups], state, count)
        if found == native.ASK_ALL:
            return None
        if found == native.NONE:
            return []
        params = [p for group in groups for p in group["params"]]
        return [params[found] if found < len(params) else list(state)[found - len(params)]]

    def still_right(self, groups: list[dict[str, Any]], state: State) -> bool:
        """Whether the plan describes these tensors, whatever ``unchanged`` says; gradients that
        have only moved are followed."""
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
        # The watch may have followed some of them.
        moved = self._movable or addresses != self._fingerprint.grad_addresses
        if moved and (not self._movable or any(map(misaligned, grads))):
            return False
        for _, batch in self.batches:
            batch.take_grads([grads[o.position] for o in batch.items], moved)
        return True

    def remember_steps(self) -> None:
        """Take the step numbers as they are now for our own."""
        self._step_versions = []
        if self._watch is not None:
            self._watch.remember_versions()
        else:
            self._step_versions = [t._version for t in self.steps]

    def steps_unchanged(self) -> bool:
        """Whether nobody has written to the step numbers since ``remember_steps``."""
        if self._watch is not None and not self._step_versions:
            return bool(self._watch.versions_unchanged(self.steps))
        return [t._version for t in self.steps] == self._step_versions

    def bump_versions(self) -> None:
        """Tell autograd that the parameters were written to: a compiled backend writes behind
        its back, and a backward pass through an older graph must still notice."""
        if self._buffers:
            torch.autograd.graph.increment_version(self._buffers)
        elif self._watch is not None:
            self._watch.bump_versions(torch.get_num_threads())
        else:
            torch.autograd.graph.increment_version(self.params)
