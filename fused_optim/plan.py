"""From an optimizer's tensors to the batches that are launched, kept until something changes."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy as is_uninitialized

from .addresses import Addresses, Answer
from .backends import Backend, select
from .flat import FlatLayout
from .layout import (
    check_address,
    check_grad,
    check_no_overlap,
    check_parameter,
    dense_like,
    gradient_is_native,
)
from .options import FormatOptions, Group, decays, names_of
from .rounding import random_key
from .rules import Rule
from .state import State, check_state, checked_step, in_formats, state_parts
from .storage import Formats, Part, check_formats, formats_of, plain_format
from .table import GRAD_COLUMN, Batch, BatchKey, Operands, int64_tensor

Amp = tuple[bool, bool]
"""Whether a step is given ``grad_scale`` and ``found_inf``."""


@dataclass(frozen=True)
class Settings:
    """What is the same for all of an optimizer's groups."""

    rule: Rule
    formats: FormatOptions
    flatten: bool
    backend: str | None

    def formats_of(self, p: Tensor) -> Formats:
        return formats_of(p.dtype, *self.formats)

    def dense_like(self, p: Tensor) -> Tensor:
        return dense_like(p, self.formats_of(p).index_dependent)

    def parts_of(self, p: Tensor) -> list[Part]:
        """What a parameter keeps in its state, but for ``step``."""
        return state_parts(self.rule.states, self.formats_of(p), p.dtype)

    def can_be_flat(self, p: Tensor) -> bool:
        """Whether a parameter can live in a flat buffer; those with gaps stay where they are."""
        return (
            not is_uninitialized(p)
            and p.device.type != "meta"
            and plain_format(p.dtype) is not None
            and self.dense_like(p) is p
        )


@dataclass
class Plan:
    """The batches of a step, and where their tensors are."""

    batches: list[tuple[Backend, Batch]]
    addresses: Addresses
    depends_on: list[Any]
    followed: list[tuple[Tensor, Tensor]]
    """For each batch the rows whose gradients are read where they lie, and these gradients' numbers."""
    flat: FlatLayout | None
    live: list[Tensor]
    """Parameters that are stepped."""
    versioned: list[Tensor]
    """Parameters whose versions autograd counts."""

    @property
    def devices(self) -> set[torch.device]:
        return {batch.key.device for _, batch in self.batches}

    def refresh(self, groups: list[Group], state: dict[Any, Any], seed: int, amp: Amp) -> bool:
        """Whether this plan still describes the optimizer. Gradients that have moved are followed: in
        the table, or into their slots in a flat buffer."""
        if self.depends_on != _depends_on(groups, seed, amp):
            return False
        params = [group["params"] for group in groups]
        answer = self.addresses.ask(params, state)
        moved = answer is Answer.GRADS_MOVED
        if moved and self.flat is not None:
            self.flat.take_grads(self.live)
            answer = self.addresses.ask(params, state)
        if moved:
            for (_, batch), (rows, numbers) in zip(self.batches, self.followed):
                batch.rows[rows, GRAD_COLUMN] = self.addresses.grads[numbers]
                batch.on_device.pop("rows", None)
        return answer is not Answer.CHANGED


def _depends_on(groups: list[Group], seed: int, amp: Amp) -> list[Any]:
    """What a plan depends on beside tensors."""
    masks = (group["weight_decay_mask"] for group in groups)
    return [seed, amp, [len(group["params"]) for group in groups], [mask and tuple(mask) for mask in masks]]


def make_plan(
    groups: list[Group], state: dict[Any, Any], settings: Settings, seed: int, amp: Amp, flat: FlatLayout
) -> Plan:
    """A plan for the tensors as they are now. Raises before anything is written.

    States are made, converted or laid out anew where need be; with ``flatten`` parameters, gradients and
    states are moved into ``flat``.
    """
    items = _checked_operands(groups, state, settings, seed)
    backends = {d: select(settings.backend, d) for d in {o.source.device for o in items}}
    by_key: dict[BatchKey, list[Operands]] = defaultdict(list)
    for o in items:
        by_key[_batch_key(o, settings.rule)].append(o)
    for key in by_key:
        backends[key.device].load(key, *amp)
    stepped = {o.source for o in items}
    others = {p: s for p, s in state.items() if isinstance(s, dict) and p not in stepped}
    _share_steps(by_key, list(others.values()), backends)
    _warn_of_casts(items, state)
    if settings.flatten:
        flat.hold(p for group in groups for p in group["params"] if settings.can_be_flat(p))
        flat.take_states({o.source: o.state for o in items}, others, settings.parts_of)
        flat.take_grads([o.source for o in items])
        for o in items:
            if flat.takes_grad(o.source):
                o.grad_copy, o.slot = None, flat.buffers_of[o.source].bounds(o.source)
    state.update({o.source: o.state for o in items})
    batches = [(backends[key.device], Batch(key, batch)) for key, batch in by_key.items()]
    live = [o.source for o in items]
    return Plan(
        batches,
        Addresses([group["params"] for group in groups], state),
        _depends_on(groups, seed, amp),
        [_followed(batch, {p: i for i, p in enumerate(live)}) for _, batch in batches],
        flat if settings.flatten else None,
        live,
        [p for p in live if not p.is_inference()],
    )


def _followed(batch: Batch, numbers: dict[Tensor, int]) -> tuple[Tensor, Tensor]:
    firsts = [(row, batch.items[i]) for row, i in enumerate(batch.first_items)]
    rows = [row for row, o in firsts if o.grad_copy is None]
    return int64_tensor(rows), int64_tensor([numbers[o.source] for _, o in firsts if o.grad_copy is None])


def _checked_operands(
    groups: list[Group], state: dict[Any, Any], settings: Settings, seed: int
) -> list[Operands]:
    """What is stepped, in order, with states as they will be; nothing is changed yet."""
    numbered = [
        (name, p, 2 * i + (not decay))
        for i, (group, decayed) in enumerate(zip(groups, decays(groups)))
        for name, p, decay in zip(names_of(groups, i), group["params"], decayed)
    ]
    live = [(k, *x) for k, x in enumerate(numbered) if x[1].grad is not None]
    for _, name, p, _ in live:
        check_parameter(name, p)
        check_formats(name, p.dtype, *settings.formats)
        check_grad(name, p, p.grad)
    check_no_overlap([(f"parameter {name}", p) for _, name, p, _ in live])
    items = []
    for k, name, p, hyper_row in live:
        dense = settings.dense_like(p)
        made = _state_of(name, p, dense, state.get(p, {}), settings)
        formats, keys = settings.formats_of(p), settings.rule.states
        copy = _grad_copy(p, dense)
        items.append(Operands(name, p, dense, copy, made, keys, formats, hyper_row, random_key(seed, k)))
    stepped = {o.source for o in items}
    states = [(f" of parameter {o.name}", o.state) for o in items]
    states += [("", s) for p, s in state.items() if isinstance(s, dict) and p not in stepped]
    tensors = ((f"state {k!r}{of}", t) for of, s in states for k, t in s.items() if k != "step")
    check_no_overlap([x for x in tensors if isinstance(x[1], Tensor)], "give each a tensor of its own")
    return items


def _state_of(name: str, p: Tensor, dense: Tensor, old: State, settings: Settings) -> State:
    keys = settings.rule.states
    check_state(name, p, old, keys, RuntimeError, "; delete optimizer.state[p] to start it anew")
    for part in (*settings.parts_of(p), Part("step", torch.int64)):
        if isinstance(old.get(part.key), Tensor):
            check_address(f"state {part.key!r} of parameter {name}", old[part.key])
    made = in_formats(old, p, keys, settings.formats_of(p), dense)
    if "step" in old:
        step = old["step"]
        if not (isinstance(step, Tensor) and (step.dtype, step.dim()) == (torch.int64, 0)) or (
            step.device != p.device
        ):
            step = torch.tensor(checked_step(name, step, RuntimeError), dtype=torch.int64, device=p.device)
        made["step"] = step
    return made


def _warn_of_casts(items: list[Operands], old: dict[Any, Any]) -> None:
    cast = [
        f"parameter {o.name} ({value.dtype} to {o.state[key].dtype})"
        for o in items
        for key, value in old.get(o.source, {}).items()
        if isinstance(value, Tensor)
        and key in o.state
        and key != "step"
        and value.dtype != o.state[key].dtype
    ]
    if cast:
        names = ", ".join(dict.fromkeys(cast[:6])) + (", ..." if len(cast) > 6 else "")
        warnings.warn(
            f"parameters changed their dtype, and their states are converted once: {names}",
            UserWarning,
            stacklevel=6,
        )


def _grad_copy(p: Tensor, dense: Tensor) -> Tensor | None:
    """Memory for a copy of the gradient, where kernels cannot read it as it is."""
    assert p.grad is not None
    if gradient_is_native(p.grad, p, dense):
        return None
    format = plain_format(p.dtype)
    assert format is not None
    dtype = p.dtype if p.grad.dtype == p.dtype or p.is_complex() else format.working
    return torch.empty_strided(p.shape, dense.stride(), dtype=dtype, device=p.device)


def _batch_key(o: Operands, rule: Rule) -> BatchKey:
    grad = plain_format(o.grad.dtype)
    assert grad is not None
    return BatchKey(o.source.device, rule, o.formats.param, grad, o.formats.mu, o.formats.nu)


def _share_steps(
    by_key: dict[BatchKey, list[Operands]], others: list[State], backends: dict[torch.device, Backend]
) -> None:
    """Let parameters that have always stepped together share a step number.

    They do so from their first step on, if one launch steps them with the same hyperparameters. Who
    shares one with a parameter that will be left out, or is stepped by another launch, gets a copy.
    """
    owner: dict[int, Any] = {}
    copies: dict[Any, Tensor] = {}
    for key, items in by_key.items():
        for o in items:
            # A backend that steps one parameter after another may be interrupted between two of them.
            together = (key, o.hyper_row if backends[key.device].steps_all_at_once else o.name)
            step = o.state.get("step")
            if step is None:
                if together not in copies:
                    copies[together] = torch.zeros((), dtype=torch.int64, device=key.device)
                o.state["step"] = copies[together]
            elif owner.setdefault(id(step), together) != together:
                o.state["step"] = _copied(copies, step, together)
    for state in others:
        if id(state.get("step")) in owner:
            state["step"] = _copied(copies, state["step"], "left out")


def _copied(copies: dict[Any, Tensor], step: Tensor, together: Any) -> Tensor:
    key = (id(step), together)
    if key not in copies:
        copies[key] = step.clone()
    return copies[key]
