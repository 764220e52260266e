"""From an optimizer's tensors to the batches that are launched, kept until something changes."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy as is_uninitialized

from .addresses import Addresses, Answer
from .backends import Backend, select
from .flat import FlatBuffers, flat_buffers, move_to
from .layout import (
    check_address,
    check_grad,
    check_no_overlap,
    check_parameter,
    dense_like,
    gradient_is_native,
)
from .options import FormatOptions, Group, decays, name_of
from .rounding import random_key
from .rules import Rule
from .state import State, check_state, checked_step, in_formats, state_parts
from .storage import Formats, check_formats, formats_of, plain_format
from .table import GRAD_COLUMN, Batch, BatchKey, Operands


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

    def can_be_flat(self, p: Tensor) -> bool:
        """Whether a parameter can live in a flat buffer; those with gaps stay where they are."""
        return (
            not is_uninitialized(p)
            and p.device.type != "meta"
            and plain_format(p.dtype) is not None
            and self.dense_like(p) is p
        )


class Live(NamedTuple):
    """A parameter that has a gradient."""

    name: str
    param: Tensor
    hyper_row: int
    stream: int
    """Which of all parameters it is: its random bits go by it."""

    @property
    def grad(self) -> Tensor:
        assert self.param.grad is not None
        return self.param.grad


@dataclass
class Plan:
    """The batches of a step, and where their tensors are."""

    batches: list[tuple[Backend, Batch]]
    addresses: Addresses
    options: list[Any]
    seed: int
    grad_slots: list[tuple[Tensor, Tensor]]
    """With ``flatten``: parameters and the slots of their gradients."""
    grad_numbers: list[list[int]]
    """For each batch's rows, the numbers of their gradients among all."""
    stepped: list[Tensor]
    """Parameters whose versions autograd counts."""

    def refresh(self, groups: list[Group], state: dict[Any, Any], seed: int) -> bool:
        """Whether this plan still describes the optimizer. Gradients that have moved are followed: in
        the table, or into their slots in a flat buffer."""
        if self.options != options_of(groups) or self.seed != seed:
            return False
        params = [group["params"] for group in groups]
        answer = self.addresses.ask(params, state)
        if answer is Answer.GRADS_MOVED and self.grad_slots:
            take_grads(self.grad_slots)
            answer = self.addresses.ask(params, state)
        if answer is Answer.GRADS_MOVED:
            for (_, batch), numbers in zip(self.batches, self.grad_numbers):
                batch.rows[:, GRAD_COLUMN] = self.addresses.grads[numbers]
                batch.on_device.pop("rows", None)
        return answer is not Answer.CHANGED


def options_of(groups: list[Group]) -> list[Any]:
    """What a plan depends on beside tensors: how parameters share the rows of hyperparameters."""
    return [(len(g["params"]), g["weight_decay_mask"] and tuple(g["weight_decay_mask"])) for g in groups]


def take_grads(slots: list[tuple[Tensor, Tensor]]) -> None:
    """Bring gradients into their slots; autograd and users make new ones elsewhere."""
    moved = [(p, slot) for p, slot in slots if p.grad is not None and p.grad.data_ptr() != slot.data_ptr()]
    move_to([(slot, p.grad) for p, slot in moved if p.grad is not None])
    for p, slot in moved:
        p.grad = slot


def live_parameters(groups: list[Group], settings: Settings) -> list[Live]:
    live = []
    stream = 0
    for i, (group, decay) in enumerate(zip(groups, decays(groups))):
        for j, p in enumerate(group["params"]):
            if p.grad is not None:
                live.append(Live(name_of(groups, i, j), p, 2 * i + (not decay[j]), stream))
            stream += 1
    for x in live:
        check_parameter(x.name, x.param)
        check_formats(x.name, x.param.dtype, *settings.formats)
        check_grad(x.name, x.param, x.grad)
    check_no_overlap([(f"parameter {x.name}", x.param) for x in live])
    return live


def make_plan(
    groups: list[Group],
    state: dict[Any, Any],
    settings: Settings,
    seed: int,
    flat: list[FlatBuffers],
    warn_of_flat: Callable[[], None],
) -> Plan:
    """A plan for the tensors as they are now. Raises before anything is written.

    States are made, converted or laid out anew where need be; with ``flatten`` parameters, gradients and
    states are moved into ``flat``.
    """
    live = live_parameters(groups, settings)
    backends = {d: select(settings.backend, d) for d in {x.param.device for x in live}}
    dense = [settings.dense_like(x.param) for x in live]
    others = {p: s for p, s in state.items() if isinstance(s, dict) and p not in {x.param for x in live}}
    states = [_state_of(x, d, state.get(x.param, {}), settings) for x, d in zip(live, dense)]
    cast = _warn_of_casts(live, state, states)
    grad_copies = [_grad_copy(x, d) for x, d in zip(live, dense)]
    keys = [_batch_key(x, g, settings) for x, g in zip(live, grad_copies)]
    for device, backend in backends.items():
        for key in {key for key in keys if key.device == device}:
            backend.load(key)
    _check_states_apart(live, states, others)
    _share_steps(live, keys, states, list(others.values()), backends)

    slots: dict[Tensor, FlatBuffers] = {}
    grad_slots: list[tuple[Tensor, Tensor]] = []
    if settings.flatten:
        params = [p for group in groups for p in group["params"] if settings.can_be_flat(p)]
        if _left_flat(flat, params):
            if flat and not cast and _moved_out(flat):
                warn_of_flat()
            flat[:] = flat_buffers(params)
            dense = [settings.dense_like(x.param) for x in live]
        slots = {p: buffers for buffers in flat for p in buffers.params}
        _leave_slots_of_others(
            flat, slots, {**others, **{x.param: s for x, s in zip(live, states)}}, settings
        )
        grad_slots = _move_into(slots, live, states, settings)
        grad_copies = [_grad_copy(x, d) for x, d in zip(live, dense)]
    for x, s in zip(live, states):
        state[x.param] = s

    by_key: dict[BatchKey, list[int]] = defaultdict(list)
    for i, key in enumerate(keys):
        by_key[key].append(i)
    batches, grad_numbers = [], []
    for key, numbers in by_key.items():
        items = [
            _operands(live[i], dense[i], states[i], grad_copies[i], slots.get(live[i].param), settings, seed)
            for i in numbers
        ]
        batch = Batch(key, items)
        batches.append((backends[key.device], batch))
        grad_numbers.append([numbers[i] for i in batch.first_items])
    stepped = [x.param for x in live if not x.param.is_inference()]
    addresses = Addresses([group["params"] for group in groups], state)
    return Plan(batches, addresses, options_of(groups), seed, grad_slots, grad_numbers, stepped)


def _state_of(x: Live, dense: Tensor, old: State, settings: Settings) -> State:
    keys, formats = settings.rule.states, settings.formats_of(x.param)
    advice = "; delete optimizer.state[p] to start it anew"
    check_state(x.name, x.param, old, keys, RuntimeError, advice)
    for part in state_parts(keys, formats, x.param.dtype):
        if part.key in old:
            check_address(f"state {part.key!r} of parameter {x.name}", old[part.key])
    made = in_formats(old, x.param, keys, formats, dense)
    if "step" in old:
        step = old["step"]
        fits = isinstance(step, Tensor) and step.dtype == torch.int64 and step.dim() == 0
        if fits and step.device == x.param.device:
            check_address(f"state 'step' of parameter {x.name}", step)
        else:
            number = checked_step(x.name, step, RuntimeError)
            made["step"] = torch.tensor(number, dtype=torch.int64, device=x.param.device)
    return made


def _warn_of_casts(live: list[Live], old: dict[Any, Any], new: list[State]) -> bool:
    cast = [
        f"parameter {x.name} ({value.dtype} to {made[key].dtype})"
        for x, made in zip(live, new)
        for key, value in old.get(x.param, {}).items()
        if isinstance(value, Tensor) and key != "step" and key in made and value.dtype != made[key].dtype
    ]
    if cast:
        names = ", ".join(dict.fromkeys(cast[:6])) + (", ..." if len(cast) > 6 else "")
        warnings.warn(
            f"parameters changed their dtype, and their states are converted once: {names}",
            UserWarning,
            stacklevel=6,
        )
    return bool(cast)


def _grad_copy(x: Live, dense: Tensor) -> Tensor | None:
    """Memory for a copy of the gradient, where kernels cannot read it as it is."""
    p, g = x.param, x.grad
    if gradient_is_native(g, p, dense):
        return None
    format = plain_format(p.dtype)
    assert format is not None
    dtype = p.dtype if g.dtype == p.dtype or p.is_complex() else format.working
    return torch.empty_strided(p.shape, dense.stride(), dtype=dtype, device=p.device)


def _batch_key(x: Live, grad_copy: Tensor | None, settings: Settings) -> BatchKey:
    grad = plain_format((x.grad if grad_copy is None else grad_copy).dtype)
    assert grad is not None
    formats = settings.formats_of(x.param)
    return BatchKey(x.param.device, settings.rule, formats.param, grad, formats.mu, formats.nu)


def _check_states_apart(live: list[Live], states: list[State], others: dict[Any, State]) -> None:
    """Raise where two parameters' states share memory, but for step numbers."""
    named = [
        (f"state {key!r} of parameter {x.name}", t)
        for x, state in zip(live, states)
        for key, t in state.items()
        if isinstance(t, Tensor) and key != "step"
    ]
    named += [
        (f"state {key!r} of a parameter without a gradient", t)
        for state in others.values()
        for key, t in state.items()
        if isinstance(t, Tensor) and key != "step"
    ]
    check_no_overlap(named, "give each a tensor of its own")


def _share_steps(
    live: list[Live],
    keys: list[BatchKey],
    states: list[State],
    others: list[State],
    backends: dict[torch.device, Backend],
) -> None:
    """Let parameters that have always stepped together share a step number.

    They do so from their first step on, if one launch steps them with the same hyperparameters. Who
    shares one with a parameter that will be left out, or is stepped by another launch, gets a copy.
    """
    owner: dict[int, Any] = {}
    copies: dict[Any, Tensor] = {}
    for i, (x, key, state) in enumerate(zip(live, keys, states)):
        # A backend that steps one parameter after another may be interrupted between two of them.
        together = (key, x.hyper_row) if backends[key.device].steps_all_at_once else i
        step = state.get("step")
        if step is None:
            if together not in copies:
                copies[together] = torch.zeros((), dtype=torch.int64, device=x.param.device)
            state["step"] = copies[together]
        elif owner.setdefault(id(step), together) != together:
            state["step"] = _copied(copies, step, together)
    for state in others:
        step = state.get("step")
        if step is not None and id(step) in owner:
            state["step"] = _copied(copies, step, "left out")


def _copied(copies: dict[Any, Tensor], step: Tensor, together: Any) -> Tensor:
    key = (id(step), together)
    if key not in copies:
        copies[key] = step.clone()
    return copies[key]


def _moved_out(flat: list[FlatBuffers]) -> bool:
    return any(not buffers.in_slot(buffers.param, p, p) for buffers in flat for p in buffers.params)


def _left_flat(flat: list[FlatBuffers], params: list[Tensor]) -> bool:
    """Whether the flat buffers hold other parameters than these, or have lost one."""
    return {p for buffers in flat for p in buffers.params} != set(params) or _moved_out(flat)


def _leave_slots_of_others(
    flat: list[FlatBuffers], slots: dict[Tensor, FlatBuffers], states: dict[Any, State], settings: Settings
) -> None:
    """Give memory of their own to states that lie in a flat buffer, but in another parameter's slot."""
    storages = {address for buffers in flat for address in buffers.storages()}
    for p, state in states.items():
        own = {
            part.key: part
            for part in (
                state_parts(settings.rule.states, settings.formats_of(p), p.dtype) if p in slots else ()
            )
        }
        for key, t in state.items():
            if not isinstance(t, Tensor) or t.untyped_storage().data_ptr() not in storages:
                continue
            if key not in own or not slots[p].in_slot(own[key], p, t):
                state[key] = t.clone(memory_format=torch.preserve_format)


def _move_into(
    slots: dict[Tensor, FlatBuffers], live: list[Live], states: list[State], settings: Settings
) -> list[tuple[Tensor, Tensor]]:
    """Move states and gradients into the flat buffers; returns parameters and slots of gradients."""
    grad_slots = []
    moves = []
    for x, state in zip(live, states):
        buffers = slots.get(x.param)
        if buffers is None:
            continue
        for part in state_parts(settings.rule.states, settings.formats_of(x.param), x.param.dtype):
            if not buffers.in_slot(part, x.param, state[part.key]):
                slot = buffers.slot(part, x.param)
                moves.append((slot, state[part.key]))
                state[part.key] = slot
        if x.grad.dtype == x.param.dtype:
            grad_slots.append((x.param, buffers.slot(buffers.grad, x.param)))
    move_to(moves)
    take_grads(grad_slots)
    return grad_slots


def _operands(
    x: Live,
    dense: Tensor,
    state: State,
    grad_copy: Tensor | None,
    flat: FlatBuffers | None,
    settings: Settings,
    seed: int,
) -> Operands:
    formats = settings.formats_of(x.param)
    mu, nu = (state[key] for key in settings.rule.states)
    parts = (format.aux_of(key) for key, format in zip(("", *settings.rule.states), formats))
    param_aux, mu_aux, nu_aux = (part and state[part.key] for part in parts)
    param = dense
    if x.param.is_complex():
        param, mu, nu = map(torch.view_as_real, (dense, mu, nu))
    return Operands(
        source=x.param,
        param=param,
        mu=mu,
        nu=nu,
        aux=(param_aux, mu_aux, nu_aux),
        step=state["step"],
        hyper_row=x.hyper_row,
        random_key=random_key(seed, x.stream),
        grad_copy=grad_copy,
        copies_param=dense is not x.param,
        slot=flat.bounds(x.param) if flat is not None and grad_copy is None else None,
    )
