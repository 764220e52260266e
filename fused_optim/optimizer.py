"""The ``torch.optim.Optimizer`` contract: groups, state, ``step()``, checkpoints, AMP.

:class:`FusedOptimizer` knows no rule's arithmetic and no backend's; a subclass names its
rule, and a backend makes the step. A step goes: closure, hyperparameters, plan, launch.
The plan (which tensors, at which addresses) is kept until something moved.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import count as count_from
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .backends import BACKENDS, Inputs, check_name, select, to_device, used_on_current_stream
from .flat import FlatSet, flat_sets, reset_grad
from .memory import Memory, nbytes
from .plan import Plan
from .reference import MAX_COUNT, Hyperparameters
from .rounding import MU, NU, random_key
from .rules import Rule
from .state import (
    BASE,
    check_kinds,
    check_saved,
    checked_step,
    copy_state,
    master,
    moment,
    state_parts,
    without_obsolete,
)
from .storage import MASTER_WEIGHTS, STATE_FORMATS, Formats, Part, check_formats, formats_of, plain_format
from .table import (
    Batch,
    BatchKey,
    Operands,
    check_address,
    check_grad,
    check_no_overlap,
    check_parameter,
    dense_like,
    operands,
)

_HYPER_KEYS = ("eps", "eps_root", "weight_decay", "maximize", "nesterov", "differentiable")

_LOOKED_AT = 32
"""Parameters that a step with ``flatten="static"`` looks at, in turn: 1.5 us."""

Schedule = Callable[[int], float]
"""A value as a function of the number of earlier ``step()`` calls, as in Optax."""
WeightDecayMask = Callable[[str, Tensor], bool] | Mapping[str, bool] | Sequence[bool]


def _number(name: str, value: Any, below: float = math.inf) -> float:
    """``value`` as a float, checked to lie in [0, below)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    number = float(value)
    if not 0 <= number < below:
        limits = "finite and not negative" if below == math.inf else f"in [0, {below:g})"
        raise ValueError(f"{name} must be {limits}, got {value!r}")
    return number


def _plain(value: Any) -> Any:
    """A tensor of one element as a number: schedulers keep ``initial_lr`` as they find ``lr``."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _checked_seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r} of type {type(seed).__name__}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {seed}")
    return seed


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


class _FormatOptions(NamedTuple):
    """The arguments of :func:`~.storage.formats_of` after the dtype."""

    state_format: str
    master_weights: str | None
    stochastic_rounding: bool


def _checked_formats(state_format: Any, master_weights: Any, stochastic_rounding: Any) -> _FormatOptions:
    for name, value, choices in (
        ("state_format", state_format, STATE_FORMATS),
        ("master_weights", master_weights, MASTER_WEIGHTS),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    if _flag("stochastic_rounding", stochastic_rounding) and master_weights is not None:
        raise ValueError(
            f"stochastic_rounding=True is for parameters without a master, got master_weights={master_weights!r}; "
            "give one of the two"
        )
    return _FormatOptions(state_format, master_weights, stochastic_rounding)


class _Live(NamedTuple):
    """A parameter that has a gradient."""

    name: str
    param: Tensor
    grad: Tensor
    group: int
    decay: bool
    formats: Formats
    stream: int
    """Which of all parameters it is: its random bits go by it."""


def _extras(
    x: _Live, rule: Rule, state: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The second parts of the parameter and its moments."""
    param = x.formats.param.aux
    mu, nu = (state.get(key + suffix) for key, suffix in zip(rule.states, BASE))
    return (None if param is None else state[param.key]), mu, nu


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _unknown(step: Tensor) -> tuple[int, Any]:
    """The token of a step number that somebody else has set. Reading it would make the host
    wait for a GPU, where such a parameter gets a row of its own instead."""
    return (int(step), None) if step.device.type == "cpu" else (0, object())


class FusedOptimizer(torch.optim.Optimizer):
    """What AdaBelief and AdamaxW share: everything but the rule. Not for direct use."""

    _step_supports_amp_scaling = True
    """``torch.amp.GradScaler`` hands over ``grad_scale`` and ``found_inf`` and lets the
    step unscale and skip, with no wait for the device."""

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        weight_decay_mask: WeightDecayMask | None,
        decoupled_lr: bool,
        state_format: str,
        master_weights: str | None,
        stochastic_rounding: bool,
        flatten: bool | Literal["static"],
        backend: str | None,
    ) -> None:
        check_name(backend)
        self._backend_name = backend
        self._formats = _checked_formats(state_format, master_weights, stochastic_rounding)
        self._seed = 0
        if not isinstance(flatten, bool) and flatten != "static":
            raise TypeError(f'flatten must be True, False or "static", got {flatten!r}')
        self._flatten = flatten
        self._decoupled_lr = _flag("decoupled_lr", decoupled_lr)
        if not (
            weight_decay_mask is None
            or callable(weight_decay_mask)
            or isinstance(weight_decay_mask, (Mapping, list, tuple))
        ):
            raise TypeError(
                "weight_decay_mask must be a callable of (name, parameter), a mapping from name to "
                f"bool or a list of bools, got {type(weight_decay_mask).__name__}"
            )
        self._mask = weight_decay_mask
        self._mask_used = 0
        self._count = 0
        self._schedules: list[dict[str, Schedule]] = []
        self._reset()
        defaults = {**defaults, "differentiable": False}
        super().__init__(params, defaults)
        if isinstance(weight_decay_mask, (list, tuple)) and self._mask_used != len(weight_decay_mask):
            raise ValueError(
                f"weight_decay_mask has {len(weight_decay_mask)} entries for {self._mask_used} parameters"
            )
        if isinstance(weight_decay_mask, Mapping):
            known = {n for g in self.param_groups for n in g.get("param_names", ())}
            unknown = sorted(set(weight_decay_mask) - known)
            if unknown:
                raise ValueError(f"weight_decay_mask names {unknown[0]!r}, which is no parameter's name")
        for device in {p.device for p in self._all_params() if p.device.type != "meta"}:
            select(backend, device)
        if flatten:
            self._flat.extend(flat_sets(p for p in self._all_params() if self._can_be_flat(p)))

    def _reset(self) -> None:
        """Forget all that can be worked out again."""
        self._plan: Plan | None = None
        self._flat: list[FlatSet] = []
        self._hyper_keys: list[Any] = []
        self._hyper_values: list[Hyperparameters] = []
        self._hyper: dict[torch.device, Tensor] = {}
        self._history: dict[Tensor, tuple[int, Any]] = {}
        self._step_versions: dict[Tensor, int] = {}
        self._captured: list[Any] = []
        self._warned: set[str] = set()

    def _rule(self, group: dict[str, Any]) -> Rule:
        """The rule for a group's options."""
        raise NotImplementedError

    @property
    def seed(self) -> int:
        """Of the random bits of ``stochastic_rounding``, in [0, 2^32); 0 unless set, so that the
        replicas of data-parallel training round alike. Saved in the state dict."""
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed = _checked_seed(seed)
        self._drop_plan()

    def _formats_of(self, p: Tensor) -> Formats:
        return formats_of(p.dtype, *self._formats)

    def _dense_like(self, p: Tensor) -> Tensor:
        return dense_like(p, self._formats_of(p).index_dependent)

    def _can_be_flat(self, p: Tensor) -> bool:
        """Whether a parameter can live in a flat buffer; those with gaps stay where they are."""
        return p.device.type != "meta" and plain_format(p.dtype) is not None and self._dense_like(p) is p

    def _parts(self, p: Tensor, group: dict[str, Any]) -> list[Part]:
        return state_parts(self._rule(group).states, self._formats_of(p), p.dtype)

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _name(self, group: int, index: int) -> str:
        names = self.param_groups[group].get("param_names")
        return repr(names[index]) if names else f"{index} of group {group}"

    def _name_of(self, p: Tensor) -> str:
        for i, group in enumerate(self.param_groups):
            for j, member in enumerate(group["params"]):
                if member is p:
                    return self._name(i, j)
        return "of no group"

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=4)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as :meth:`torch.optim.Optimizer.add_param_group`; ``lr`` and
        ``weight_decay`` may be callables, as in the constructor.

        Raises:
            ValueError, TypeError: a hyperparameter is out of range, or a parameter is
                given twice or overlaps another in memory. Nothing is added then.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        index = len(self.param_groups)
        group = {**self.defaults, **param_group}
        schedules = {key: group[key] for key in ("lr", "weight_decay") if callable(group.get(key))}
        for key, schedule in schedules.items():
            group[key] = self._scheduled(key, schedule)
        self._check_group(group, f" of group {index}" if index else "")
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        elif not isinstance(group["params"], set):
            group["params"] = list(group["params"])
            self._check_twice(group["params"], index)
        if self._decoupled_lr:
            self._set_initial_lr(group, schedules)
        mask_used = self._mask_used
        super().add_param_group(group)
        try:
            added = self.param_groups[index]
            for j, p in enumerate(added["params"]):
                check_formats(self._name(index, j), p.dtype, *self._formats)
            added["weight_decay_mask"] = self._mask_of(added)
            check_no_overlap(
                [
                    (self._name(i, j), p)
                    for i, g in enumerate(self.param_groups)
                    for j, p in enumerate(g["params"])
                ]
            )
        except Exception:
            self.param_groups.pop()
            self._mask_used = mask_used
            raise
        self._schedules.append(schedules)
        self._drop_plan()

    def _check_twice(self, params: list[Any], index: int) -> None:
        seen = {
            id(p): self._name(i, j)
            for i, g in enumerate(self.param_groups)
            for j, p in enumerate(g["params"])
        }
        for j, p in enumerate(params):
            name = f"{j} of group {index}"
            if isinstance(p, tuple):
                name, p = repr(p[0]), p[1]
            if id(p) in seen:
                raise ValueError(f"parameters {seen[id(p)]} and {name} are the same tensor; give it once")
            seen[id(p)] = name

    def _set_initial_lr(self, group: dict[str, Any], schedules: dict[str, Schedule]) -> None:
        lr = float(group["lr"])
        if "lr" in schedules or lr == 0:
            raise ValueError(
                "decoupled_lr=True scales weight decay by lr / initial_lr: lr must be a number or tensor "
                f"other than 0, got {schedules.get('lr', lr)!r}"
            )
        group.setdefault("initial_lr", lr)

    def _mask_of(self, group: dict[str, Any]) -> list[bool] | None:
        """Which of a group's parameters decay; None for all."""
        n = len(group["params"])
        mask = group.get("weight_decay_mask")
        if mask is None:
            mask = self._mask
            if isinstance(mask, (list, tuple)):
                mask = mask[self._mask_used : self._mask_used + n]
                self._mask_used += n
        if mask is None:
            return None
        names = group.get("param_names")
        if callable(mask):
            mask = [mask(name, p) for name, p in zip(names or map(str, range(n)), group["params"])]
        elif isinstance(mask, Mapping):
            if names is None:
                raise ValueError(
                    "weight_decay_mask is a mapping from name to bool, but the parameters have no names: "
                    "give model.named_parameters()"
                )
            missing = [name for name in names if name not in mask]
            if missing:
                raise ValueError(f"weight_decay_mask has no entry for parameter {missing[0]!r}")
            mask = [mask[name] for name in names]
        if len(mask) != n:
            raise ValueError(f"weight_decay_mask has {len(mask)} entries for {n} parameters")
        return [bool(m) for m in mask]

    def _check_group(self, group: dict[str, Any], where: str = "") -> None:
        """Raise what is wrong with a group's hyperparameters, naming it."""
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1 or not lr.is_floating_point():
                raise ValueError(
                    f"lr{where} must be a number or a floating-point tensor of one element, "
                    f"got a tensor of shape {tuple(lr.shape)} and dtype {lr.dtype}"
                )
            if lr.device.type == "cpu":
                _number(f"lr{where}", lr.item())
        else:
            _number(f"lr{where}", lr)
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            kind = ValueError if isinstance(betas, (tuple, list)) else TypeError
            raise kind(f"betas{where} must be two numbers, got {betas!r}")
        for i, beta in enumerate(betas):
            _number(f"betas[{i}]{where}", beta, below=1)
        for key in ("eps", "eps_root", "weight_decay"):
            if key in group:
                _number(f"{key}{where}", group[key])
        if (
            self._decoupled_lr
            and "initial_lr" in group
            and not _number(f"initial_lr{where}", _plain(group["initial_lr"]))
        ):
            raise ValueError(
                f"initial_lr{where} must not be 0 with decoupled_lr=True: weight decay is divided by it"
            )
        for key in ("maximize", "nesterov"):
            if key in group:
                _flag(f"{key}{where}", group[key])
        if group.get("differentiable"):
            raise ValueError("differentiable=True is not supported")

    def _scheduled(self, key: str, schedule: Schedule) -> float:
        value = schedule(self._count)
        if isinstance(value, Tensor):
            value = _plain(value)
        return _number(f"{key} at count {self._count}", value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, else None.

        Raises:
            ValueError, TypeError, RuntimeError: a hyperparameter, parameter or gradient
                is wrong; the text names it. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if capturing:
            self._check_capture()
        device_lrs = self._hyperparameters()
        plan = self._current_plan()
        for device, inputs in self._inputs(plan, device_lrs).items():
            for backend, batch in plan.batches:
                if batch.key.device == device:
                    for o in batch.staged:
                        o.load_sources()
                    backend.step(batch, inputs)
                    for o in batch.staged:
                        o.store_sources()
        plan.bump_versions()
        if self._flatten:
            plan.remember_steps()
        if capturing:
            self._keep_captured(plan)
        if getattr(self, "found_inf", None) is None and not capturing:
            plan.steps_certain += 1
        else:
            plan.steps_maybe += 1
        self._count = min(self._count + 1, MAX_COUNT)
        return loss

    def _hyperparameters(self) -> list[tuple[int, Tensor]]:
        """Bring the table of hyperparameters up to date: two rows for each group, with and
        without weight decay. Returns the learning rates that live on a GPU, with their row."""
        for group, schedules in zip(self.param_groups, self._schedules):
            for key, schedule in schedules.items():
                group[key] = self._scheduled(key, schedule)
        keys: list[Any] = []
        device_lrs = []
        for i, group in enumerate(self.param_groups):
            lr = group["lr"]
            if isinstance(lr, Tensor):
                if lr.numel() != 1 or not lr.is_floating_point():
                    self._check_group(group, f" of group {i}" if i else "")
                if lr.device.type == "cpu":
                    lr = lr.item()
                else:
                    device_lrs.append((2 * i, lr))
                    lr = 0.0
            betas = group["betas"]
            betas = tuple(betas) if isinstance(betas, list) else betas
            initial_lr = _plain(group.get("initial_lr")) if self._decoupled_lr else None
            keys.append((lr, betas, initial_lr, *map(group.get, _HYPER_KEYS)))
        if keys != self._hyper_keys:
            values = self._checked_values(keys)
            if values != self._hyper_values:
                self._hyper_values, self._hyper = values, {}
            self._hyper_keys = keys
        return device_lrs

    def _checked_values(self, keys: list[Any]) -> list[Hyperparameters]:
        values = []
        for i, (group, (lr, *_)) in enumerate(zip(self.param_groups, keys)):
            self._check_group({**group, "lr": lr}, f" of group {i}" if i else "")
            for decay in (group["weight_decay"], 0.0):
                values.append(
                    Hyperparameters(
                        lr=lr,
                        weight_decay=decay,
                        beta1=group["betas"][0],
                        beta2=group["betas"][1],
                        eps=group["eps"],
                        eps_root=group.get("eps_root", 0.0),
                        initial_lr=float(group["initial_lr"]) if self._decoupled_lr else 0.0,
                        maximize=group["maximize"],
                        nesterov=float(group.get("nesterov", False)),
                    )
                )
        return values

    def _inputs(self, plan: Plan, device_lrs: list[tuple[int, Tensor]]) -> dict[torch.device, Inputs]:
        """What each device's batches are given, uploaded where it changed."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        inputs = {}
        for device in {batch.key.device for _, batch in plan.batches}:
            if device not in self._hyper:
                self._hyper[device] = to_device(
                    torch.tensor(self._hyper_values, dtype=torch.float64, device="cpu"), device
                )
            hyper = used_on_current_stream(self._hyper[device])
            for row, lr in device_lrs:
                hyper[row : row + 2, Hyperparameters._fields.index("lr")] = lr.reshape(()).to(device)
            inputs[device] = Inputs(
                hyper,
                *(
                    # Towards the CPU the copy is waited for: there the step reads it on the host.
                    None
                    if t is None
                    else t.reshape(()).to(device, torch.float32, non_blocking=device.type != "cpu")
                    for t in (scale, found_inf)
                ),
            )
        return inputs

    def _check_capture(self) -> None:
        for i, (group, schedules) in enumerate(zip(self.param_groups, self._schedules)):
            frozen = next(iter(schedules), None)
            if frozen is None and isinstance(group["lr"], Tensor) and group["lr"].device.type == "cpu":
                frozen = "lr"
            if frozen is not None:
                raise RuntimeError(
                    f"{frozen} of group {i} would freeze at its present value in the CUDA graph that is "
                    "being captured; give lr as a tensor on the GPU and fill it between replays, and "
                    "weight_decay as a number"
                )
        for name, p, *_ in self._live():
            if "step" not in self.state.get(p, {}):
                raise RuntimeError(
                    f"parameter {name} has no state yet, and one that is made while a CUDA graph is being "
                    "captured would be made anew at each replay; make a step before the capture"
                )

    def _keep_captured(self, plan: Plan) -> None:
        """Keep for good what a CUDA graph reads, and do not use it again: what was uploaded
        during the capture gets its values when the graph is replayed, and not before."""
        self._captured += [plan, self._hyper, *(batch.on_device for _, batch in plan.batches)]
        self._hyper = {}
        for _, batch in plan.batches:
            batch.on_device = {}

    def _current_plan(self) -> Plan:
        if self._flatten:
            self._check_gradients_arrive()
        if self._plan is not None and self._unchanged(self._plan):
            return self._plan
        if self._plan is not None and self._plan.static:
            self._check_at_home(self._plan)
        if self._flatten:
            self._check_steps()
        if self._plan is None or not self._plan.still_right(self.param_groups, self.state):
            self._drop_plan()
            self._plan = self._make_plan()
        return self._plan

    def _unchanged(self, plan: Plan) -> bool:
        changed = plan.changed_among_next(self.param_groups, self.state, _LOOKED_AT)
        if changed is None:
            return plan.unchanged(self.param_groups, self.state)
        if changed:
            self._raise_not_static(changed[0])
        return True

    def _check_at_home(self, plan: Plan) -> None:
        """Look at all that a static plan steps, before another one is made for whatever reason."""
        homes = {p: home for home in self._flat for p in home.params}
        stepped = set(plan.params)
        for group in self.param_groups:
            for p in stepped.intersection(group["params"]):
                home, state = homes[p], self.state.get(p, {})
                parts = [(part, state.get(part.key)) for part in self._parts(p, group)]
                for part, t in [(home.param, p), (home.grad, p.grad), *parts]:
                    if not isinstance(t, Tensor) or not home.at_home(part, p, t):
                        self._raise_not_static(p)

    def _raise_not_static(self, p: Tensor) -> None:
        self._drop_plan()
        raise RuntimeError(
            f"parameter {self._name_of(p)}, its gradient or its state is not where it was, which "
            'flatten="static" rules out (model.zero_grad(), p.grad = ..., model.to()); earlier steps may have '
            "missed it. Use optimizer.zero_grad(), or flatten=True; the next step() takes all as it is then"
        )

    def _check_steps(self) -> None:
        """Drop a plan whose step numbers somebody else has written to: parameters share a row
        for as long as these are known to be equal."""
        plan = self._plan
        if plan is not None and not plan.steps_unchanged():
            self._drop_plan()
            for step in plan.steps:
                self._history[step] = _unknown(step)

    def _live(self) -> list[_Live]:
        live: list[_Live] = []
        streams = count_from()
        for i, group in enumerate(self.param_groups):
            mask = group["weight_decay_mask"]
            if mask is not None and len(mask) != len(group["params"]):
                raise ValueError(
                    f"weight_decay_mask of group {i} has {len(mask)} entries for {len(group['params'])} parameters"
                )
            for j, (p, stream) in enumerate(zip(group["params"], streams)):
                if p.grad is not None:
                    check_parameter(self._name(i, j), p)
                    check_formats(self._name(i, j), p.dtype, *self._formats)
                    decay = mask is None or mask[j]
                    live.append(_Live(self._name(i, j), p, p.grad, i, decay, self._formats_of(p), stream))
        return live

    def _make_plan(self) -> Plan:
        live = self._live()
        for x in live:
            check_grad(x.name, x.param, x.grad)
        check_no_overlap([(x.name, x.param) for x in live])
        backends = {d: select(self._backend_name, d) for d in {x.param.device for x in live}}
        dense = [dense_like(x.param, x.formats.index_dependent) for x in live]
        new_steps = self._new_steps(live)
        states = self._states(live, dense, new_steps)
        cast = self._warn_of_casts(live, states)
        self._begin_history(states, new_steps)
        if self._flatten:
            live = self._go_home(live, states, warn=not cast)
            dense = [dense_like(x.param, x.formats.index_dependent) for x in live]
        for x, state in zip(live, states):
            self.state[x.param] = state
        homes = {p: home for home in self._flat for p in home.params}
        by_key: dict[BatchKey, list[Operands]] = defaultdict(list)
        for position, (x, d, state) in enumerate(zip(live, dense, states)):
            rule = self._rule(self.param_groups[x.group])
            mu, nu = (state[key] for key in rule.states)
            extras = _extras(x, rule, state)
            o = operands(x.param, x.grad, d, mu, nu, extras, state["step"])
            o.position = position
            o.random_key = random_key(self._seed, x.stream)
            o.hyper_row = 2 * x.group + (not x.decay)
            home = homes.get(x.param)
            if home is not None and not o.staged:
                o.slot = home.slot(x.param)
                o.history = self._history[state["step"]]
            grad_format = plain_format(o.grad.dtype)
            assert grad_format is not None
            formats = x.formats
            key = BatchKey(x.param.device, rule, formats.param, grad_format, formats.mu, formats.nu)
            by_key[key].append(o)
        batches = [(backends[key.device], Batch(key, items)) for key, items in by_key.items()]
        at_home = all(o.slot is not None for items in by_key.values() for o in items) and all(
            homes[x.param].holds_grad(x.param, x.grad) for x in live
        )
        static = self._flatten == "static" and at_home and BACKENDS["eager"] not in backends.values()
        return Plan(
            batches,
            [x.param for x in live],
            at_home,
            static,
            [state["step"] for state in states],
            bool(self._flatten),
            {x.param: homes[x.param].param_buffer for x in live} if static else {},
            self.param_groups,
            self.state,
        )

    def _new_steps(self, live: list[_Live]) -> dict[torch.device, list[Tensor]]:
        """Step numbers for the parameters that have none, one allocation a device."""
        missing = Counter(x.param.device for x in live if "step" not in self.state.get(x.param, {}))
        return {
            device: list(torch.zeros(n, dtype=torch.int64, device=device)) for device, n in missing.items()
        }

    def _states(
        self, live: list[_Live], dense: list[Tensor], new_steps: dict[torch.device, list[Tensor]]
    ) -> list[dict[str, Any]]:
        """Every parameter's state, made, converted or laid out anew where need be."""
        unused = {device: iter(steps) for device, steps in new_steps.items()}
        states = []
        for x, d in zip(live, dense):
            group = self.param_groups[x.group]
            state = dict(self.state.get(x.param, {}))
            self._check_state(x, state, self._rule(group).states)
            state["step"] = (
                self._step_tensor(state["step"], x) if "step" in state else next(unused[x.param.device])
            )
            states.append(self._in_formats(x.param, group, state, d))
        return states

    def _warn_of_casts(self, live: list[_Live], states: list[dict[str, Any]]) -> bool:
        cast = [
            f"parameter {x.name} ({old.dtype} to {new[key].dtype})"
            for x, new in zip(live, states)
            for key, old in self.state.get(x.param, {}).items()
            if isinstance(old, Tensor) and key != "step" and key in new and old.dtype != new[key].dtype
        ]
        if cast:
            names = ", ".join(dict.fromkeys(cast[:6])) + (", ..." if len(cast) > 6 else "")
            warnings.warn(
                f"parameters changed their dtype, and their states are converted once: {names}",
                UserWarning,
                stacklevel=6,
            )
        return bool(cast)

    @staticmethod
    def _step_tensor(step: Any, x: _Live) -> Tensor:
        if (
            isinstance(step, Tensor)
            and step.dtype == torch.int64
            and step.dim() == 0
            and step.device == x.param.device
        ):
            return step
        return torch.tensor(
            checked_step(x.name, step, RuntimeError), dtype=torch.int64, device=x.param.device
        )

    def _in_formats(
        self, p: Tensor, group: dict[str, Any], state: dict[str, Any], dense: Tensor
    ) -> dict[str, Any]:
        """The state with all that this optimizer keeps, in its formats and in the layout of ``dense``."""
        formats, keys = self._formats_of(p), self._rule(group).states
        made = {
            **moment(MU, keys[0], formats.mu, state, dense),
            **moment(NU, keys[1], formats.nu, state, dense),
            **master(formats.param, state, p, dense),
        }
        return {**without_obsolete(state, self._parts(p, group)), **made}

    def _check_state(self, x: _Live, state: dict[str, Any], keys: tuple[str, str]) -> None:
        check_kinds(x.name, x.param, state, keys, RuntimeError)
        for key in (*keys, "master", "remainder"):
            value = state.get(key)
            if value is None:
                continue
            if value.shape != x.param.shape:
                raise RuntimeError(
                    f"parameter {x.name} now has shape {tuple(x.param.shape)}, but its state {key!r} has "
                    f"{tuple(value.shape)}; delete optimizer.state[p] to start it anew"
                )
        for part in self._parts(x.param, self.param_groups[x.group]):
            if part.key in state:
                check_address(f"state {part.key!r} of parameter {x.name}", state[part.key])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients. With ``flatten`` the gradients that lie in the flat
        buffer are zeroed in one pass and stay there, whatever ``set_to_none`` says; a
        gradient that is None stays None."""
        if not self._flat:
            super().zero_grad(set_to_none)
            return
        plan = self._plan
        groups, state = self.param_groups, self.state
        if plan and plan.at_home and (plan.asked_in_turn(groups, state) or plan.unchanged(groups, state)):
            for home in self._flat:
                home.zero_grads_at_home()
            return
        flat = set()
        for home in self._flat:
            home.zero_grad(set_to_none)
            flat.update(home.params)
        for p in self._all_params():
            if p not in flat and p.grad is not None:
                reset_grad(p, set_to_none)

    def _check_gradients_arrive(self) -> None:
        for home in self._flat:
            if home.gradient_arrived():
                continue
            grads = [(p, p.grad) for p in home.params if p.grad is not None]
            if grads and all(home.holds_grad(p, g) for p, g in grads):
                self._warn_once(
                    "step() without any gradient since zero_grad(): if the model's parameters were replaced "
                    "(load_state_dict(assign=True)), make a new optimizer for the new ones"
                )

    def _go_home(self, live: list[_Live], states: list[dict[str, Any]], warn: bool) -> list[_Live]:
        """Bring every parameter, gradient and state to its slot in the flat buffers."""
        params = [p for p in self._all_params() if self._can_be_flat(p)]
        lost = any(not home.at_home(home.param, p, p) for home in self._flat for p in home.params)
        if lost and warn:
            self._warn_once(
                "parameters were moved out of the flat buffers of flatten=True (model.to(), p.data = ...); "
                "they are gathered again, which costs a copy"
            )
        if lost or {p for home in self._flat for p in home.params} != set(params):
            self._flat = flat_sets(params)
        homes = {p: home for home in self._flat for p in home.params}
        result = []
        moves: list[tuple[Tensor, Tensor]] = []
        grads: list[tuple[Tensor, Tensor]] = []
        for x, state in zip(live, states):
            home = homes.get(x.param)
            if home is None:
                result.append(x)
                continue
            for part in self._parts(x.param, self.param_groups[x.group]):
                if not home.at_home(part, x.param, state[part.key]):
                    slot = home.view(part, x.param)
                    moves.append((slot, state[part.key]))
                    state[part.key] = slot
            if not home.holds_grad(x.param, x.grad) and x.grad.dtype == x.param.dtype:
                slot = home.view(home.grad, x.param)
                moves.append((slot, x.grad))
                grads.append((x.param, slot))
                x = x._replace(grad=slot)
            result.append(x)
        # Two may have changed places: what lies in a buffer is copied before any slot is written.
        buffers = {slot.untyped_storage().data_ptr() for slot, _ in moves}
        sources = [t.clone() if t.untyped_storage().data_ptr() in buffers else t for _, t in moves]
        for (slot, _), source in zip(moves, sources):
            slot.copy_(source)
        for param, slot in grads:
            param.grad = slot
        return result

    def memory(self) -> Memory:
        """Bytes of parameters, gradients, moments, master weights and metadata as they are now,
        and what a step takes beside: for all backends but eager that grows with the number of
        tensors, not of elements.

        Example:
            >>> import torch
            >>> from fused_optim import AdamaxW
            >>> model = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
            >>> optimizer = AdamaxW(model.parameters(), state_format="8bit", master_weights="split8")
            >>> model(torch.ones(2, 64, dtype=torch.bfloat16)).sum().backward()
            >>> optimizer.step()
            >>> memory = optimizer.memory()
            >>> {part: round(memory.per_parameter()[part], 2) for part in ("parameters", "moments", "master")}
            {'parameters': 2.0, 'moments': 2.02, 'master': 1.0}
        """
        params = self._all_params()
        states = [state for state in self.state.values() if isinstance(state, dict)]
        extras = [nbytes(state.get("master"), state.get("remainder")) for state in states]
        steps = [nbytes(*(t for t in [state.get("step")] if isinstance(t, Tensor))) for state in states]
        all_bytes = [nbytes(*(t for t in state.values() if isinstance(t, Tensor))) for state in states]
        batches = self._plan.batches if self._plan is not None else []
        in_step = [backend.step_bytes(batch) for backend, batch in batches]
        tables = sum(batch.table_bytes for _, batch in batches) + nbytes(*self._hyper.values())
        return Memory(
            numel=sum(p.numel() for p in params),
            parameters=nbytes(*params),
            gradients=nbytes(*(p.grad for p in params)),
            moments=sum(all_bytes) - sum(extras) - sum(steps),
            master=sum(extras),
            metadata=sum(steps) + tables + sum(home.padding_bytes for home in self._flat),
            copies=sum(batch.copy_bytes for _, batch in batches),
            step=None if None in in_step else sum(n for n in in_step if n is not None),
        )

    def _drop_plan(self) -> None:
        """Forget the plan, and enter in ``_history`` the steps that were made with it.

        ``_history`` maps a step tensor to a token; equal tokens mean equal numbers, which
        lets parameters share a row without reading them. A step that ``found_inf`` may have
        skipped counts for all parameters of its plan or for none.
        """
        plan, self._plan = self._plan, None
        if plan is None:
            return
        marks: dict[Any, object] = defaultdict(object)  # equal before, equal after
        for step in plan.steps:
            certain, maybe = self._history[step]
            self._history[step] = (certain + plan.steps_certain, marks[maybe] if plan.steps_maybe else maybe)

    def _begin_history(
        self, states: list[dict[str, Any]], new_steps: dict[torch.device, list[Tensor]]
    ) -> None:
        for steps in new_steps.values():
            self._history.update({step: (0, None) for step in steps})
        known = (state.get("step") for state in (*self.state.values(), *states))
        self._know_steps({step: self._token(step) for step in known if isinstance(step, Tensor)})

    def _token(self, step: Tensor) -> tuple[int, Any]:
        version = _version(step)
        written_to = self._step_versions.get(step, version) != version
        return _unknown(step) if written_to or step not in self._history else self._history[step]

    def _know_steps(self, history: dict[Tensor, tuple[int, Any]]) -> None:
        """Take ``history`` for what is known of step numbers, for as long as nobody writes to them."""
        self._history = history
        self._step_versions = {step: _version(step) for step in history}

    def state_dict(self) -> dict[str, Any]:
        """The state as a dict of plain numbers and tensors, as
        :meth:`torch.optim.Optimizer.state_dict`, and under ``"count"`` the number of
        ``step()`` calls that schedules see. No tensor in it drags a larger buffer along."""
        result = super().state_dict()
        result["state"] = {
            key: {k: _own_bytes(v) for k, v in state.items()} if isinstance(state, dict) else state
            for key, state in result["state"].items()
        }
        result["count"] = self._count
        if self._formats.stochastic_rounding:
            result["seed"] = self._seed
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, here or from another optimizer with the
        same state keys (``torch.optim.Adamax`` for AdamaxW, AdaBelief ports for AdaBelief).

        Moments take this optimizer's dtype and layout, ``step`` becomes an integer, and
        nothing aliases ``state_dict``.

        Raises:
            ValueError: a state lacks a key or has another shape; names both. The
                optimizer keeps its old state.
        """
        loaded: dict[Tensor, dict[str, Any]] = {}
        steps: list[int] = []
        count, seed = 0, self._seed

        def check(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            nonlocal loaded, steps, count, seed
            groups = self._complete_groups(saved["param_groups"])
            loaded = self._loaded_states(saved["state"], groups)
            steps = [int(state["step"]) for state in loaded.values()]
            count = int(saved.get("count", max(steps, default=0)))
            seed = _checked_seed(saved.get("seed", seed))
            return {**saved, "param_groups": groups, "state": {}}

        def install(_: torch.optim.Optimizer) -> None:
            self.state.update(loaded)
            self._know_steps({s["step"]: (step, None) for s, step in zip(loaded.values(), steps)})
            self._count, self._seed = count, seed

        # torch's own method casts moments to the parameter's dtype and cannot be told not to.
        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(install, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _complete_groups(self, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The saved groups, with what another optimizer's lack taken from ours."""
        groups = []
        for i, group in enumerate(saved):
            own = self.param_groups[i] if i < len(self.param_groups) else {}
            group = {**{k: v for k, v in own.items() if k not in ("params", "param_names")}, **group}
            mask = group.get("weight_decay_mask")
            if mask is not None and len(mask) != len(group["params"]):
                raise ValueError(
                    f"weight_decay_mask of saved group {i} has {len(mask)} entries for "
                    f"{len(group['params'])} parameters"
                )
            self._check_group(group, f" of saved group {i}")
            groups.append(group)
        return groups

    def _loaded_states(
        self, saved: dict[Any, Any], groups: list[dict[str, Any]]
    ) -> dict[Tensor, dict[str, Any]]:
        loaded: dict[Tensor, dict[str, Any]] = {}
        numbers: dict[torch.device, dict[Tensor, int]] = defaultdict(dict)
        for i, (group, own) in enumerate(zip(groups, self.param_groups)):
            for j, (key, p) in enumerate(zip(group["params"], own["params"])):
                state = saved.get(key)
                if state:
                    number, loaded[p] = self._loaded_state(self._name(i, j), p, state, group)
                    numbers[p.device][p] = number
        for device, of_params in numbers.items():
            # One allocation, and one counter of versions for all.
            for p, step in zip(of_params, torch.tensor(list(of_params.values()), device=device)):
                loaded[p]["step"] = step
        return loaded

    def _loaded_state(
        self, name: str, p: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        step = state.get("step", group.get("step"))
        if step is None:
            raise ValueError(f"the saved state of parameter {name} has no 'step'; it has {sorted(state)}")
        number = checked_step(name, step, ValueError)
        check_saved(name, p, state, self._rule(group).states, type(self).__name__)
        return number, self._in_formats(p, group, copy_state(state), self._dense_like(p))

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "_backend_name", "_formats", "_seed", "_flatten", "_decoupled_lr", "_mask", "_mask_used", "_count",
            "_schedules",
        )  # fmt: skip
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_schedules" in state:
            self._reset()
        self._plan = None


def _own_bytes(value: Any) -> Any:
    """A tensor whose storage holds its own elements and no others."""
    if isinstance(value, Tensor) and value.untyped_storage().nbytes() != value.numel() * value.element_size():
        return value.clone()
    return value
