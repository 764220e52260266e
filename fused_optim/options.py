"""Hyperparameters: what a group holds, checked; schedules and masks; the table of numbers that a step reads.

A group is a plain dict, as everywhere in ``torch.optim``. What belongs to it lives in it: its
numbers, ``weight_decay_mask`` (a bool for each parameter, or None for all), ``reference_lr`` (what
``decoupled_lr`` divides lr by), ``schedules`` (each callable, with the value that it last gave), and what
is the optimizer's: ``count`` (of ``step()`` calls, which schedules see), ``seed`` and ``version``.
"""

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .backends import Inputs, uploaded
from .reference import Hyperparameters
from .storage import MASTER_WEIGHTS, STATE_FORMATS

Schedule = Callable[[int], Any]  # a value by the number of earlier step() calls, as in Optax
WeightDecayMask = Callable[[str, Tensor], bool] | Mapping[str, bool] | Sequence[bool]
Group = dict[str, Any]
_NOT_HERE = {
    "amsgrad": "the running maximum of second moments has no place in these rules; torch.optim.AdamW has it",
    "differentiable": "the step is made by kernels that autograd does not see",
}
_BESIDE_LR = (
    "betas", "weight_decay", "eps", "eps_root", "reference_lr", "maximize", "nesterov", "differentiable",
)  # fmt: skip
TORCHS = ("foreach", "fused", "capturable", *_NOT_HERE)  # in the order of the constructors
VERSION = 2  # of state dicts; those of 0.1 have none


def number(name: str, value: Any, where: str = "", below: float = math.inf, words: str = "") -> float:
    """``value`` as a float, checked to lie in [0, below); ``words`` are torch's for one that does not."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}{where} must be a number, got {value!r} of type {type(value).__name__}")
    result = math.inf
    with suppress(OverflowError):
        result = float(value)
    if not 0 <= result < below:
        limits = "finite and not negative" if below == math.inf else f"in [0, {below:g})"
        words = words or f"Invalid {name} value"
        raise ValueError(f"{words}: {result}; {name}{where} must be {limits}")
    return result


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def whole_number(name: str, value: Any, below: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < below:
        raise ValueError(f"{name} must be an integer in [0, {below}), got {value!r}")
    return value


def check_choices(state_format: Any, master_weights: Any, stochastic_rounding: Any) -> None:
    """Raise what is wrong with the arguments of :func:`~.storage.formats_of` after the dtype."""
    if state_format not in STATE_FORMATS:
        raise ValueError(f"state_format must be one of {STATE_FORMATS}, got {state_format!r}")
    if master_weights not in MASTER_WEIGHTS:
        raise ValueError(f"master_weights must be one of {MASTER_WEIGHTS}, got {master_weights!r}")
    if flag("stochastic_rounding", stochastic_rounding) and master_weights is not None:
        given = f"stochastic_rounding=True and master_weights={master_weights!r}"
        raise ValueError(f"give one of the two, not both: {given}")


def check_torchs(given: Mapping[str, Any]) -> None:
    """Raise what is wrong with the options of torch's optimizers that factories pass to every optimizer."""
    for key in TORCHS:
        if given.get(key) is not None and flag(key, given[key]) and key in _NOT_HERE:
            raise ValueError(f"{key}=True is not supported: {_NOT_HERE[key]}")


def check_max_grad_norm(value: Any) -> float | None:
    """``max_grad_norm`` as a float or None; infinity asks for the norm alone."""
    if value is None or (isinstance(value, float) and value == math.inf):
        return value
    checked = number("max_grad_norm", value)
    if checked == 0:
        raise ValueError("Invalid max_grad_norm value: 0.0; max_grad_norm must be positive, or None")
    return checked


def common_of(groups: list[Group]) -> Group:
    """Where ``"count"`` and ``"seed"`` are. All groups have the same, since all that saves optimizers saves
    groups."""
    return groups[0] if groups else {"count": 0, "seed": 0}


def where_of(index: int) -> str:  # the first group, which most optimizers have alone, is not named
    return f" of group {index}" if index else ""


def names_of(groups: list[Group], index: int) -> list[str]:
    """What error texts call a group's parameters."""
    names, n = groups[index].get("param_names", ()), len(groups[index]["params"])
    return [repr(name) for name in names] if len(names) == n else [f"{j} of group {index}" for j in range(n)]


def check_entries(mask: Any, n: int, where: str = "") -> None:
    if mask is not None and len(mask) != n:
        raise ValueError(f"weight_decay_mask{where} has {len(mask)} entries for {n} parameters")


def numbered(groups: list[Group]) -> Iterator[tuple[str, Tensor, int]]:
    """Every parameter: its name for error texts, itself, and its row in :class:`HyperparameterTable`."""
    for i, group in enumerate(groups):
        mask = group["weight_decay_mask"]
        check_entries(mask, len(group["params"]), f" of group {i}")
        for j, (name, p) in enumerate(zip(names_of(groups, i), group["params"])):
            yield name, p, 2 * i + (mask is not None and not mask[j])


def name_of(param: Tensor, groups: list[Group]) -> str:
    """What error texts call a parameter; a ValueError where no group holds it."""
    for name, p, _ in numbered(groups):
        if p is param:
            return name
    raise ValueError(f"the parameter of shape {tuple(param.shape)} is in no group of this optimizer")


def lr_value(lr: Any, where: str = "") -> float | None:
    """A checked learning rate as a float; None for one on a GPU, which is not waited for."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or not lr.is_floating_point():
            raise ValueError(
                f"Tensor lr must be 1-element: lr{where} must be a number or a floating-point tensor of one "
                f"element, got a tensor of shape {tuple(lr.shape)} and dtype {lr.dtype}"
            )
        if lr.device.type != "cpu":
            return None
        lr = lr.item()
    return number("lr", lr, where, words="Invalid learning rate")


def check_group(group: Group, where: str = "") -> None:
    """Raise what is wrong with a group's hyperparameters, naming it."""
    lr_value(group["lr"], where)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        kind = ValueError if isinstance(betas, (tuple, list)) else TypeError
        raise kind(f"betas{where} must be two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        number(f"betas[{i}]", beta, where, 1, f"Invalid beta parameter at index {i}")
    for key in ("eps", "eps_root", "weight_decay", "reference_lr"):
        if key in group:
            number(key, group[key], where)
    if group.get("reference_lr") == 0:
        raise ValueError(f"reference_lr{where} must not be 0: decoupled_lr divides by it")
    for key in ("maximize", "nesterov"):
        if key in group:
            flag(f"{key}{where}", group[key])
    check_torchs({"differentiable": group.get("differentiable")})


@torch.no_grad()
def _scheduled_value(key: str, schedule: Schedule, count: int) -> float:
    value = schedule(count)
    if not isinstance(value, (Real, str)):
        with suppress(TypeError, ValueError, RuntimeError):  # number() says what is wrong
            value = float(value)
    return number(f"{key} at count {count}", value)


def complete_group(group: Group, others: list[Group], settings: dict[str, Any]) -> None:
    """Check a new group and give it all that belongs in one; ``settings`` are the whole optimizer's."""
    index, common = len(others), common_of(others)
    for key, value in settings.items():
        if group.pop(key, value) != value:  # ZeroRedundancyOptimizer gives the constructor's here too
            raise ValueError(
                f"{key} is an option of the whole optimizer, and group {index} names it; give it to the "
                "constructor, or make another optimizer for that group"
            )
    check_torchs(group)
    lr = group["lr"]
    # All keys are there always: checkpoints are read by the keys that groups have.
    group.update(schedules={}, count=common["count"], seed=common["seed"], version=VERSION)
    for key in ("lr", "weight_decay"):
        if callable(schedule := group[key]):
            group[key] = _scheduled_value(key, schedule, group["count"])
            group["schedules"][key] = [schedule, group[key]]
    check_group(group, where_of(index))
    if settings["decoupled_lr"]:
        if callable(lr) or float(lr) == 0:
            raise ValueError(
                "decoupled_lr=True scales weight decay by lr / reference_lr: lr must be a number or tensor "
                f"other than 0, got {lr!r}"
            )
        group.setdefault("reference_lr", float(group["lr"]))
    params = group["params"]
    if not isinstance(params, set):  # which torch refuses
        group["params"] = [params] if isinstance(params, Tensor) else list(params)


def run_schedules(groups: list[Group], count: int) -> None:
    """Give every group the values of its callables, but for what somebody else wrote there since."""
    values = []
    for group in groups:
        for key, (schedule, last) in group.get("schedules", {}).items():
            value = group[key]
            if value is last or (not isinstance(value, Tensor) and value == last):
                value = _scheduled_value(key, schedule, count)
            values.append((group, key, [schedule, value]))
    for group, key, scheduled in values:
        group["schedules"][key], group[key] = scheduled, scheduled[1]


def mask_of(mask: Any, group: Group, earlier: int) -> list[bool] | None:
    """Which of a group's parameters decay, as a list; None for all. The optimizer's ``mask``, for groups that
    have none of their own, begins with the ``earlier`` parameters of other groups if it is a list."""
    if group.get("weight_decay_mask") is not None:
        mask, earlier = group["weight_decay_mask"], 0
    if mask is None:
        return None
    n = len(group["params"])
    names = group.get("param_names") or [str(i) for i in range(n)]
    if callable(mask):
        mask = [mask(name, p) for name, p in zip(names, group["params"])]
    elif isinstance(mask, Mapping):
        for name in (name for name in names if name not in mask):
            hint = "names are those of model.named_parameters()"
            raise ValueError(f"weight_decay_mask has no entry for parameter {name!r}; {hint}")
        mask = [mask[name] for name in names]
    elif isinstance(mask, (list, tuple)):
        mask = mask[earlier : earlier + n]
    else:
        raise TypeError(
            "weight_decay_mask must be a callable of (name, parameter), a mapping from name to "
            f"bool or a list of bools, got {type(mask).__name__}"
        )
    check_entries(mask, n)
    return [bool(m) for m in mask]


def check_mask(mask: Any, groups: list[Group]) -> None:
    """Raise a ValueError where the optimizer's mask has entries that are no parameter's."""
    if isinstance(mask, (list, tuple)):
        check_entries(mask, sum(len(group["params"]) for group in groups))
    names = {name for group in groups for name in group.get("param_names", ())}
    for name in sorted(set(mask) - names) if isinstance(mask, Mapping) else []:
        raise ValueError(f"weight_decay_mask names {name!r}, which is no parameter's name")


def check_picklable(groups: list[Group], mask: Any) -> None:
    """Raise a PicklingError that says what to do about a callable that pickle cannot save."""
    callables = [("weight_decay_mask", mask)]
    for i, group in enumerate(groups):
        schedules = group.get("schedules", {}).items()
        callables += [(f"{key}{where_of(i)}", schedule) for key, (schedule, _) in schedules]
    for what, given in callables:
        try:
            pickle.dumps(given)
        except Exception as error:
            raise pickle.PicklingError(
                f"{what} is {given!r}, which pickle cannot save ({error}): give a function with a name in a "
                "module, or let torch.optim.lr_scheduler.LambdaLR set lr; state_dict() leaves callables out"
            ) from error


class HyperparameterTable:
    """Two rows for each group, with and without weight decay; float64, on each device that asks."""

    def __init__(self) -> None:
        self._read: list[Any] = []
        self.shape: list[Any] = []  # how many parameters each group has, and which of them decay
        self._rows = torch.empty(0, device="cpu")
        self.on_device: dict[torch.device, Tensor] = {}
        self._device_lrs = False  # whether a learning rate is on a GPU
        # For these devices, what each step is given, where it is always the same.
        self._steady: tuple[set[torch.device] | None, dict[torch.device, Inputs]] = None, {}

    def read(self, groups: list[Group], count: int) -> None:
        """Take the groups' numbers as they are now, of callables at ``count``. They are checked where they
        have changed."""
        for group in groups:
            if group.get("schedules"):
                run_schedules(groups, count)
                break
        read: list[list[Any]] = []
        for group in groups:
            lr, mask = group["lr"], group["weight_decay_mask"]
            lr = lr if type(lr) is float else lr_value(lr, where_of(len(read)))
            shape = len(group["params"]), mask and tuple(mask)
            read.append([lr, *map(group.get, _BESIDE_LR), *shape])
        if read == self._read:
            return
        for i, group in enumerate(groups):
            check_group(group, where_of(i))
        rows = [
            Hyperparameters(*(number or 0.0 for number in (lr, decay, *betas, *others)))
            for lr, betas, weight_decay, *others, _, _, _ in read
            for decay in (weight_decay, 0.0)
        ]
        # Forgotten until it is whole: it may be interrupted.
        self._read, self.on_device, self._steady = [], {}, (None, {})
        self.shape = [about[-2:] for about in read]
        self._device_lrs = any(lr is None for lr, *_ in read)
        self._rows = torch.tensor(rows, dtype=torch.float64, device="cpu")
        self._read = [[lr, copy.copy(betas), *others] for lr, betas, *others in read]  # betas may be a list

    def inputs(
        self, groups: list[Group], devices: set[torch.device], *amp: Tensor | None
    ) -> dict[torch.device, Inputs]:
        """What a step is given on each of these devices, with grad_scale and found_inf."""
        if amp == (None, None) and self._steady[0] is devices:
            return self._steady[1]
        inputs = {device: self._on(device, groups, *amp) for device in devices}
        # On a GPU another stream may ask, and a learning rate there may be another one each time.
        steady = amp == (None, None) and not self._device_lrs and all(d.type == "cpu" for d in devices)
        self._steady = (devices, inputs) if steady else (None, {})
        return inputs

    def _on(self, device: torch.device, groups: list[Group], *amp: Tensor | None) -> Inputs:
        table, on_gpu = self._rows, device.type != "cpu"
        if on_gpu:
            [table] = uploaded(self.on_device, device, [device], lambda _: self._rows)
        if self._device_lrs:  # all at once: a copy of each is a launch of each
            with torch.no_grad():
                column = table[:, Hyperparameters._fields.index("lr")].view(-1, 2)
                lrs = [
                    groups[i]["lr"].reshape(()).to(device) if lr is None else column[i, 0]
                    for i, (lr, *_) in enumerate(self._read)
                ]
                column.copy_(torch.stack(lrs)[:, None])
        # A copy to the CPU is waited for: there the host reads it.
        scalars = (t if t is None else t.reshape(()).to(device, torch.float32, on_gpu) for t in amp)
        return Inputs(table, *scalars)


def check_capture(groups: list[Group]) -> None:
    """Raise what would freeze in a CUDA graph that is being captured."""
    for i, group in enumerate(groups):
        frozen = list(group.get("schedules", ()))
        if isinstance(group["lr"], Tensor) and group["lr"].device.type == "cpu":
            frozen.append("lr")
        if frozen:
            raise RuntimeError(
                f"{frozen[0]} of group {i} would freeze at its value in the CUDA graph that is captured; "
                "give lr as a tensor on the GPU and fill it between replays, and weight_decay as a number"
            )


def warn_of_graphs(captured: list[Any], what: str) -> None:
    """Say that ``what`` was called, which captured steps do not notice."""
    if captured:
        text = (
            f"a CUDA graph has captured a step of this optimizer, and {what} made new tensors for it: "
            "replays go on with the old ones; make a step, and capture it again"
        )
        warnings.warn(text, RuntimeWarning, stacklevel=3)
