"""From an optimizer's tensors to the batches that are launched, kept until something changes."""

import warnings
import weakref
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy as is_uninitialized

from . import addresses, layout
from .backends import Backend, select
from .clip import Clipping
from .flat import FlatLayout
from .layout import is_distributed, local, placed_alike
from .options import Group, numbered
from .rounding import random_key
from .rules import Rule
from .state import State, check_state, checked_step, in_formats, state_parts
from .storage import Formats, Part, check_formats, formats_of, plain_format
from .table import Batch, BatchKey, Operands

# The seed, how many parameters groups have and which decay, and whether there are grad_scale and found_inf.
Given = tuple[int, list[Any], bool, bool]


@dataclass(frozen=True)
class Settings:
    """What is the same for all of an optimizer's groups."""

    rule: Rule
    formats: tuple[str, str | None, bool]  # the arguments of storage.formats_of after the dtype
    flatten: bool
    backend: str | None
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    decoupled_lr: bool = False
    unscale_in_step: bool = False

    @property
    def clips(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite

    @property
    def by_name(self) -> dict[str, Any]:  # as the constructor's arguments
        formats = zip(("state_format", "master_weights", "stochastic_rounding"), self.formats)
        names = (f.name for f in fields(self) if f.name not in ("rule", "formats"))
        return dict(formats) | {name: getattr(self, name) for name in names}

    def formats_of(self, p: Tensor) -> Formats:
        return formats_of(p.dtype, *self.formats)

    def dense_like(self, p: Tensor) -> Tensor:
        return layout.dense_like(local(p), self.formats_of(p).index_dependent or self.clips)

    def offset_of(self, name: str, p: Tensor) -> int:
        return layout.first_index(name, p) if self.formats_of(p).index_dependent else 0

    def parts_of(self, p: Tensor) -> Sequence[Part]:
        """What a parameter keeps in its state, but for ``step``."""
        return state_parts(self.rule.states, self.formats_of(p), p.dtype)

    def placed(self, p: Tensor, state: State) -> State:
        """A state of which nothing is a DTensor yet, placed like its parameter; block exponents are a
        shard's own."""
        whole = {part.key for part in self.parts_of(p) if part.block == 1}
        plain = [(k, t) for k, t in state.items() if k in whole and not is_distributed(t)]
        return state | {k: layout.placed_like(p, t) for k, t in plain}

    def can_be_flat(self, p: Tensor) -> bool:
        """Whether a parameter can live in a flat buffer; one with gaps, or freed, stays where it is."""
        stepped = not is_uninitialized(p) and p.device.type != "meta" and plain_format(p.dtype) is not None
        return stepped and self.dense_like(p) is p and not layout.freed(p)

    def check_new(self, group: Group, groups: list[Group]) -> None:
        """Raise what is wrong with the parameters of a new group beside those of others."""
        named = [(f"parameter {name}", p) for name, p, _ in numbered(groups)]
        for j, p in enumerate(group["params"]):
            name, p = (repr(p[0]), p[1]) if isinstance(p, tuple) else (f"{j} of group {len(groups)}", p)
            if isinstance(p, Tensor):  # torch refuses other things
                layout.check_kind(name, p, self.flatten)
                if plain_format(p.dtype) is not None:
                    check_formats(name, p.dtype, self.formats)
                    self.offset_of(name, p)
                named.append((f"parameter {name}", p))
        layout.check_no_overlap(named)


class Plan:
    """The batches of a step, and where their tensors are: as they are now. What is wrong with them is raised
    before anything is written. States are made, converted or laid out anew where need be; with ``flatten``
    parameters, gradients and states are moved into ``flat``."""

    @torch.no_grad()
    def __init__(
        self, optimizer: torch.optim.Optimizer, settings: Settings, given: Given, flat: FlatLayout,
        skipped: Tensor | None,
    ) -> None:  # fmt: skip
        groups, state = optimizer.param_groups, optimizer.state
        items = _operands(groups, state, settings, given[0])
        mesh = layout.common_mesh(o.source for o in items) if settings.clips else None
        backends = {d: select(settings.backend, d) for d in {o.source.device for o in items}}
        by_key: dict[BatchKey, list[Operands]] = defaultdict(list)
        for o in items:
            by_key[o.key].append(o)
        for key in by_key:
            backends[key.device].load(key, *given[2:], settings.clips)
        made = {o.source: o.state for o in items}
        others = {p: s for p, s in state.items() if isinstance(s, dict) and p not in made}
        _share_steps(items, list(others.values()), backends)
        _warn_of_casts(items, state)
        if settings.flatten:
            flat.hold(p for group in groups for p in group["params"] if settings.can_be_flat(p))
            flat.take_states({**others, **made}, settings.parts_of)
            flat.take_grads([p for p in made if p.grad is not None])
            for o in items:
                if flat.takes_grad(o.source):
                    o.grad_copy, o.slot = None, flat.buffers_of[o.source].bounds(o.source)
        state.update(made)
        for o in items:
            o.owner = weakref.proxy(optimizer)
        clips = settings.clips
        self.batches = [(backends[k.device], Batch(k, same, merged=not clips)) for k, same in by_key.items()]
        self.clipping = Clipping(self.batches, settings.max_grad_norm, skipped, mesh) if clips else None
        self._stepped = {o.source: o.grad_optional for o in items}
        self.addresses = addresses.Addresses([group["params"] for group in groups], state, self._stepped)
        self._depends_on = given
        self._flat = flat if settings.flatten else None
        self._copied_at_replays: list[Tensor | None] = []  # gradients, in graphs of this step
        self._find_present()

    def _find_present(self) -> None:
        """Which batches have a gradient to step with now, and which parameters."""
        self.live = [x for x in self.batches if any(o.grad is not None for o in x[1].items)]
        self.copied = [batch for _, batch in self.live if batch.has_copies]
        self.devices = {batch.key.device for _, batch in self.live}
        self._present = [p for p in self._stepped if p.grad is not None]
        self.versioned = [p for p in self._present if not p.is_inference()]  # whose versions autograd counts

    def refresh(self, groups: list[Group], state: dict[Any, Any], given: Given, capturing: bool) -> bool:
        """Whether this plan still describes the optimizer. Gradients that have moved are followed: in
        the table, or into their slots in a flat buffer. Those that came or went are, unless a CUDA graph
        captures the step: the tables that change then would be made at each replay."""
        if self._depends_on != given:
            return False
        params = [group["params"] for group in groups]
        answer = self.addresses.ask(params, state)
        if answer == addresses.SAME:
            return True
        toggled = answer == addresses.GRADS_TOGGLED
        if answer == addresses.CHANGED or (toggled and capturing):
            return False
        if toggled:
            self._find_present()
        if self._flat is not None:
            if capturing:
                self._copied_at_replays += [p.grad for p in self._present]
            self._flat.take_grads(self._present)
            if self.addresses.ask(params, state) == addresses.CHANGED:
                return False
        return all(batch.follow(self.addresses.grads, toggled) for _, batch in self.batches)


def _operands(groups: list[Group], state: dict[Any, Any], settings: Settings, seed: int) -> list[Operands]:
    """What is stepped, in order, with states as they will be; nothing is changed yet. A parameter with a
    state and no gradient now is there, as if it had one like itself: one that comes needs no other plan."""
    items: list[Operands] = []
    for k, (name, p, hyper_row) in enumerate(numbered(groups)):
        old, random = state.get(p, {}), random_key(seed, k)
        if p.grad is not None:
            items.append(_operands_of(name, p, old, settings, hyper_row, random, len(items)))
        elif p.requires_grad and "step" in old and not settings.clips:
            with suppress(ValueError, TypeError, RuntimeError):  # raised when it has a gradient
                o = _operands_of(name, p, old, settings, hyper_row, random, len(items))
                same = o.state.keys() == old.keys() and all(o.state[key] is old[key] for key in old)
                items += [o] if same and o.grad_optional else []
    layout.check_no_overlap([(f"parameter {o.name}", o.source) for o in items])
    stepped = {o.source: o for o in items}
    states = [(f" of parameter {o.name}", o.state) for o in items]
    states += [("", s) for p, s in state.items() if isinstance(s, dict) and p not in stepped]
    tensors = [(f"state {k!r}{of}", t) for of, s in states for k, t in s.items() if k != "step"]
    layout.check_no_overlap([x for x in tensors if isinstance(x[1], Tensor)])
    return items


def _operands_of(
    name: str, p: Tensor, old: State, settings: Settings, row: int, random: int, number: int
) -> Operands:
    """One parameter's, with ``old`` made into a state as it will be; raises what is wrong with any of it."""
    layout.check_stepped(name, p)
    check_formats(name, p.dtype, settings.formats)
    (param, mu, nu), dense = settings.formats_of(p), settings.dense_like(p)
    given = p if p.grad is None else p.grad
    grad, grad_copy = local(given), None
    if not placed_alike(given, p) or not layout.gradient_is_native(grad, local(p), dense):
        dtype = p.dtype if grad.dtype == p.dtype or p.is_complex() else param.working
        grad = grad_copy = torch.empty_strided(dense.shape, dense.stride(), dtype=dtype, device=p.device)
    grad_format = plain_format(grad.dtype)
    assert grad_format is not None
    key = BatchKey(p.device, settings.rule, param, grad_format, mu, nu)
    made = _state_of(name, p, dense, old, settings)
    offset = settings.offset_of(name, p)
    # With copies of the parameter, or a norm, a missing gradient must be known in more places than tables.
    like_param = grad_copy is None and (grad.dtype, grad.stride()) == (p.dtype, dense.stride())
    # By the address: to_local() gives another tensor of the same memory each time.
    copy = None if dense.data_ptr() == local(p).data_ptr() else dense
    owner = SimpleNamespace(state={p: made})
    optional = like_param and copy is None and dense.numel() > 0 and not settings.clips
    return Operands(name, p, copy, grad_copy, owner, key, row, random, offset, number, grad_optional=optional)


def _state_of(name: str, p: Tensor, dense: Tensor, old: State, settings: Settings) -> State:
    keys = settings.rule.states
    for key, value in old.items():
        if is_distributed(value) and not placed_alike(value, p):
            raise RuntimeError(
                f"the state {key!r} of parameter {name} has placements {value.placements} and not its "
                "parameter's; redistribute() it, or delete optimizer.state[p] to start it anew"
            )
    here = {key: local(value) for key, value in old.items()}
    check_state(name, local(p), here, keys, RuntimeError)
    for key in (*(part.key for part in settings.parts_of(p)), "step"):
        if isinstance(here.get(key), Tensor):
            layout.check_address(f"state {key!r} of parameter {name}", here[key])
    made = in_formats(here, local(p), keys, settings.formats_of(p), dense)
    made = settings.placed(p, {k: old[k] if v is here.get(k) else v for k, v in made.items()})
    step = old.get("step")
    right = isinstance(step, Tensor) and (step.dtype, step.dim(), step.device) == (torch.int64, 0, p.device)
    if "step" in old and not right:
        number = checked_step(name, step, RuntimeError)
        made["step"] = torch.tensor(number, dtype=torch.int64, device=p.device)
    return made


def init_states(groups: list[Group], state: dict[Any, Any], settings: Settings) -> None:
    """Make the states that a step would make, of step number 0; those that there are stay as they are."""
    made: dict[Tensor, State] = {}
    steps: dict[Any, Tensor] = {}
    for name, p, hyper_row in numbered(groups):
        if p.requires_grad and not is_uninitialized(p) and not state.get(p):
            made[p] = _state_of(name, p, settings.dense_like(p), {}, settings)
            zero = torch.zeros((), dtype=torch.int64, device=p.device)
            made[p]["step"] = steps.setdefault((hyper_row, p.device), zero)
    state.update(made)


def _warn_of_casts(items: list[Operands], state: dict[Any, Any]) -> None:
    cast = [
        f"parameter {o.name} ({old.dtype} to {o.state[key].dtype})"
        for o in items
        for key in o.key.rule.states
        if isinstance(old := state.get(o.source, {}).get(key), Tensor) and old.dtype != o.state[key].dtype
    ]
    if cast:
        text = "parameters changed their dtype, and their states are converted once: "
        warnings.warn(text + ", ".join(cast[:6] + ["..."] * (len(cast) > 6)), UserWarning, stacklevel=6)


def _share_steps(items: list[Operands], others: list[State], backends: dict[torch.device, Backend]) -> None:
    """Let parameters share a step number from their first step on, if one launch steps them with the same
    hyperparameters. Who shares one with a parameter that is left out, or of another launch, gets a copy."""
    # A backend that steps one parameter after another may be interrupted between two of them.
    cohorts: list[tuple[State, Any]] = []
    for o in items:
        group = o.hyper_row if backends[o.key.device].steps_all_at_once else o.name
        cohorts.append((o.state, (o.key, o.grad is None, group)))
    cohorts += [(s, "left out") for s in others if isinstance(s.get("step"), Tensor)]
    shared: dict[Any, Tensor] = {}
    kept = set()
    for state, cohort in cohorts:
        step = state.get("step")
        which = id(step), cohort
        if which not in shared and step is not None:
            shared[which] = step.clone() if id(step) in kept else step
        elif step is None and which not in shared:
            shared[which] = torch.zeros((), dtype=torch.int64, device=cohort[0].device)
        kept.add(id(step))
        state["step"] = shared[which]
