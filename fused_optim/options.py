"""Hyperparameters: what a group holds, checked; schedules and masks; and the table of numbers that
a step reads.

A group is a plain dict, as everywhere in ``torch.optim``. What belongs to it lives in it: its
numbers, ``weight_decay_mask`` (a bool for each parameter, or None for all), ``reference_lr`` (what
``decoupled_lr`` divides lr by) and ``schedules`` (the callables; a state dict leaves them out).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy as is_uninitialized

from .backends import uploaded
from .layout import is_lazy
from .reference import MAX_COUNT, Hyperparameters
from .storage import MASTER_WEIGHTS, STATE_FORMATS

Schedule = Callable[[int], Any]
"""A value as a function of the number of earlier ``step()`` calls, as in Optax."""
WeightDecayMask = Callable[[str, Tensor], bool] | Mapping[str, bool] | Sequence[bool]
Group = dict[str, Any]

OF_THE_OPTIMIZER = (
    "state_format", "master_weights", "stochastic_rounding", "flatten", "backend", "decoupled_lr"
)  # fmt: skip
"""Arguments of the constructor that are the same for all groups."""

_TORCHS_WORDS = {
    "lr": "Invalid learning rate",
    "eps": "Invalid eps value",
    "weight_decay": "Invalid weight_decay value",
    "betas[0]": "Invalid beta parameter at index 0",
    "betas[1]": "Invalid beta parameter at index 1",
}


class FormatOptions(NamedTuple):
    """The arguments of :func:`~.storage.formats_of` after the dtype."""

    state_format: str
    master_weights: str | None
    stochastic_rounding: bool


def checked_formats(state_format: Any, master_weights: Any, stochastic_rounding: Any) -> FormatOptions:
    for name, value, choices in (
        ("state_format", state_format, STATE_FORMATS),
        ("master_weights", master_weights, MASTER_WEIGHTS),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    if flag("stochastic_rounding", stochastic_rounding) and master_weights is not None:
        raise ValueError(
            f"stochastic_rounding=True is for parameters without a master, got master_weights={master_weights!r}; "
            "give one of the two"
        )
    return FormatOptions(state_format, master_weights, stochastic_rounding)


@dataclass
class Scheduled:
    """A callable in a group, and the value that it last gave: if the group holds another one, somebody
    wrote it there, and that counts for one step."""

    schedule: Schedule
    value: Any


def number(name: str, value: Any, where: str = "", below: float = math.inf) -> float:
    """``value`` as a float, checked to lie in [0, below)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}{where} must be a number, got {value!r} of type {type(value).__name__}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not 0 <= result < below:
        limits = "finite and not negative" if below == math.inf else f"in [0, {below:g})"
        given = "an integer too large for a float" if result == math.inf != value else repr(value)
        raise ValueError(
            f"{_TORCHS_WORDS.get(name, f'Invalid {name} value')}: {given}; {name}{where} must be {limits}"
        )
    return result


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def whole_number(name: str, value: Any, below: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if not 0 <= value < below:
        raise ValueError(f"{name} must be in [0, {below}), got {value}")
    return value


def where_of(index: int) -> str:
    """Which group an error text speaks of; the first is not named, for most optimizers have one."""
    return f" of group {index}" if index else ""


def names_of(groups: list[Group], index: int) -> list[str]:
    """What error texts call a group's parameters."""
    names, n = groups[index].get("param_names", ()), len(groups[index]["params"])
    return [repr(name) for name in names] if len(names) == n else [f"{j} of group {index}" for j in range(n)]


def named(groups: list[Group]) -> list[tuple[str, Tensor]]:
    return [pair for i, group in enumerate(groups) for pair in zip(names_of(groups, i), group["params"])]


def _tensor_lr(lr: Tensor, where: str) -> float | None:
    """The value of a learning rate on the CPU; None for one on a GPU, which is not waited for."""
    if lr.numel() != 1 or not lr.is_floating_point():
        raise ValueError(
            f"Tensor lr must be 1-element: lr{where} must be a number or a floating-point tensor of one "
            f"element, got a tensor of shape {tuple(lr.shape)} and dtype {lr.dtype}"
        )
    return lr.item() if lr.device.type == "cpu" else None


def check_group(group: Group, where: str = "") -> None:
    """Raise what is wrong with a group's hyperparameters, naming it."""
    lr = _tensor_lr(group["lr"], where) if isinstance(group["lr"], Tensor) else group["lr"]
    if not (lr is None and isinstance(group["lr"], Tensor)):
        number("lr", lr, where)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        kind = ValueError if isinstance(betas, (tuple, list)) else TypeError
        raise kind(f"betas{where} must be two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        number(f"betas[{i}]", beta, where, below=1)
    for key in ("eps", "eps_root", "weight_decay", "reference_lr"):
        if key in group:
            number(key, group[key], where)
    if group.get("reference_lr") == 0:
        raise ValueError(f"reference_lr{where} must not be 0: decoupled_lr divides by it")
    for key in ("maximize", "nesterov"):
        if key in group:
            flag(f"{key}{where}", group[key])
    if group.get("differentiable"):
        raise ValueError("differentiable=True is not supported")


def _scheduled_value(key: str, schedule: Schedule, count: int) -> float:
    value = schedule(count)
    if not isinstance(value, (Real, str)):
        try:
            value = float(value)
        except (TypeError, ValueError, RuntimeError):
            pass  # number() says what is wrong
    return number(f"{key} at count {count}", value)


def complete_group(group: Group, index: int, count: int, decoupled_lr: bool) -> None:
    """Check a new group and give it all that belongs in one."""
    for key in OF_THE_OPTIMIZER:
        if key in group:
            raise ValueError(
                f"{key} is an option of the whole optimizer, and group {index} names it; give it to the "
                "constructor, or make another optimizer for that group"
            )
    schedules = {}
    for key in ("lr", "weight_decay"):
        if callable(group[key]):
            schedules[key] = Scheduled(group[key], _scheduled_value(key, group[key], count))
            group[key] = schedules[key].value
    if schedules:
        group["schedules"] = schedules
    check_group(group, where_of(index))
    if decoupled_lr:
        if "lr" in schedules or float(group["lr"]) == 0:
            given = schedules["lr"].schedule if "lr" in schedules else group["lr"]
            raise ValueError(
                "decoupled_lr=True scales weight decay by lr / reference_lr: lr must be a number or tensor "
                f"other than 0, got {given!r}"
            )
        group.setdefault("reference_lr", float(group["lr"]))
    if isinstance(group["params"], Tensor):
        group["params"] = [group["params"]]
    elif not isinstance(group["params"], set):
        group["params"] = list(group["params"])


def check_twice(params: list[Any], groups: list[Group]) -> None:
    """Raise a ValueError where a new group has a parameter twice, or one of an older group."""
    seen = {id(p): name for name, p in named(groups)}
    for j, p in enumerate(params):
        name = f"{j} of group {len(groups)}"
        if isinstance(p, tuple):
            name, p = repr(p[0]), p[1]
        if id(p) in seen:
            raise ValueError(f"parameters {seen[id(p)]} and {name} are the same tensor; give it once")
        seen[id(p)] = name


def check_kind(name: str, p: Tensor, flatten: bool) -> None:
    """Raise where a parameter is of a kind that cannot be stepped at all."""
    if is_uninitialized(p):
        return
    if p.device.type != "meta" and p.untyped_storage().device.type == "meta":
        raise TypeError(
            f"parameter {name} has no memory of its own to step ({type(p).__name__}); make the optimizer for "
            "real parameters: a FakeTensor's FakeTensorMode, say, must have ended before the model is made"
        )
    if flatten and p.device.type == "cpu" and not is_lazy(p) and p.untyped_storage().is_shared():
        raise ValueError(
            f"parameter {name} lies in shared memory, which flatten=True would move it out of; give "
            "flatten=False, or call share_memory() on what optimizer.unflatten() leaves"
        )


def run_schedules(groups: list[Group], count: int) -> None:
    """Give every group the values of its callables, but for what somebody else wrote there since."""
    values = []
    for group in groups:
        for key, scheduled in group.get("schedules", {}).items():
            value = group[key]
            if value is scheduled.value or (not isinstance(value, Tensor) and value == scheduled.value):
                value = _scheduled_value(key, scheduled.schedule, count)
            values.append((group, key, scheduled, value))
    for group, key, scheduled, value in values:
        group[key] = scheduled.value = value


def check_mask_type(mask: Any) -> None:
    if not (mask is None or callable(mask) or isinstance(mask, (Mapping, list, tuple))):
        raise TypeError(
            "weight_decay_mask must be a callable of (name, parameter), a mapping from name to "
            f"bool or a list of bools, got {type(mask).__name__}"
        )


def check_mask_names(mask: Any, groups: list[Group]) -> None:
    """Raise a ValueError where a mapping names what is no parameter."""
    known = {name for group in groups for name in group.get("param_names", ())}
    unknown = sorted(set(mask) - known) if isinstance(mask, Mapping) else []
    if unknown:
        raise ValueError(f"weight_decay_mask names {unknown[0]!r}, which is no parameter's name")


def mask_of(mask: Any, group: Group) -> list[bool] | None:
    """Which of a group's parameters decay, as a list; None for all."""
    if mask is None:
        return None
    n, names = len(group["params"]), group.get("param_names")
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


def decays(groups: list[Group]) -> list[list[bool]]:
    """Of each group's parameters, which decay."""
    result = []
    for i, group in enumerate(groups):
        mask, n = group["weight_decay_mask"], len(group["params"])
        if mask is not None and len(mask) != n:
            raise ValueError(f"weight_decay_mask of group {i} has {len(mask)} entries for {n} parameters")
        result.append([True] * n if mask is None else list(mask))
    return result


class HyperparameterTable:
    """Two rows for each group, with and without weight decay; float64, on each device that asks."""

    def __init__(self) -> None:
        self._read: list[Any] = []
        self._rows: list[Hyperparameters] = []
        self.on_device: dict[torch.device, Tensor] = {}
        self._device_lrs: list[tuple[int, Tensor]] = []

    def read(self, groups: list[Group]) -> None:
        """Take the groups' numbers as they are now; they are checked where they have changed."""
        read: list[tuple[Any, ...]] = []
        device_lrs = []
        for i, group in enumerate(groups):
            lr = group["lr"]
            if isinstance(lr, Tensor):
                value = _tensor_lr(lr, where_of(i))
                if value is None:
                    device_lrs.append((2 * i, lr))
                lr = value or 0.0
            betas = group["betas"]
            read.append(
                (lr, tuple(betas) if isinstance(betas, list) else betas, group.get("reference_lr"))
                + tuple(map(group.get, ("eps", "eps_root", "weight_decay", "maximize", "nesterov")))
                + (group.get("differentiable"),)
            )
        if read != self._read:
            rows = []
            for i, (group, (lr, *_)) in enumerate(zip(groups, read)):
                check_group({**group, "lr": lr}, where_of(i))
                for decay in (group["weight_decay"], 0.0):
                    rows.append(_row(group, float(lr), decay))
            if rows != self._rows:
                self._rows, self.on_device = rows, {}
            self._read = read
        self._device_lrs = device_lrs

    def on(self, device: torch.device) -> Tensor:
        """The table in the memory of ``device``, uploaded where it changed."""
        rows = self._rows
        table = uploaded(
            self.on_device, device, device, lambda: torch.tensor(rows, dtype=torch.float64, device="cpu")
        )
        for row, lr in self._device_lrs:
            table[row : row + 2, Hyperparameters._fields.index("lr")] = lr.reshape(()).to(device)
        return table


def _row(group: Group, lr: float, decay: float) -> Hyperparameters:
    return Hyperparameters(
        lr=lr,
        weight_decay=decay,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        eps_root=group.get("eps_root", 0.0),
        initial_lr=group.get("reference_lr", 0.0),
        maximize=group["maximize"],
        nesterov=group.get("nesterov", False),
    )


def check_capture(groups: list[Group]) -> None:
    """Raise what would freeze in a CUDA graph that is being captured."""
    for i, group in enumerate(groups):
        frozen = next(iter(group.get("schedules", ())), None)
        if frozen is None and isinstance(group["lr"], Tensor) and group["lr"].device.type == "cpu":
            frozen = "lr"
        if frozen is not None:
            raise RuntimeError(
                f"{frozen} of group {i} would freeze at its present value in the CUDA graph that is "
                "being captured; give lr as a tensor on the GPU and fill it between replays, and "
                "weight_decay as a number"
            )


def checked_count(count: Any) -> int:
    """A saved number of ``step()`` calls."""
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_COUNT:
        raise ValueError(f"the saved 'count' must be an integer from 0 to {MAX_COUNT}, got {count!r}")
    return count
