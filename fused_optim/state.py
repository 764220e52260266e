"""One parameter's moments and master weights in ``optimizer.state[p]``: made, kept, converted.

What lies there says itself in which format it is: a moment of dtype uint8 is an 8-bit one and
has a ``..._base`` beside it, a ``remainder`` of int16 or int8 is split16's or split8's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reference import MAX_COUNT
from .rounding import MU, NU
from .storage import BLOCK, FORMATS, Format, Formats, Part
from .table import same_layout

BASE = "_e4m3", "_e5m3"
_MOMENT_8BIT = {MU: FORMATS["e4m3"], NU: FORMATS["e5m3"]}
_REMAINDERS = {FORMATS[name].aux.dtype: FORMATS[name] for name in ("split16", "split8")}  # type: ignore[union-attr]
_OPTIONAL = ("master", "remainder")


def moment_parts(key: str, format: Format, dtype: torch.dtype) -> list[Part]:
    """What a moment keeps in the state of a parameter of this dtype."""
    parts = [Part(key, dtype if dtype.is_complex else format.dtype, 1)]
    if format.aux is not None:
        parts.append(format.aux_of(key))
    return parts


def state_parts(keys: tuple[str, str], formats: Formats, dtype: torch.dtype) -> list[Part]:
    """All that a parameter of this dtype keeps in its state, but for ``step``."""
    parts = [*moment_parts(keys[0], formats.mu, dtype), *moment_parts(keys[1], formats.nu, dtype)]
    if formats.param.aux is not None:
        parts.append(formats.param.aux)
    return parts


def without_obsolete(state: dict[str, Any], parts: list[Part]) -> dict[str, Any]:
    """The state without what only other formats keep there."""
    kept = {part.key for part in parts}
    return {k: v for k, v in state.items() if k in kept or not (k in _OPTIONAL or k.endswith(BASE))}


def empty_part(part: Part, dense: Tensor) -> Tensor:
    """Uninitialised memory for a part of the state of ``dense``."""
    if part.block == 1:
        return torch.empty_strided(dense.shape, dense.stride(), dtype=part.dtype, device=dense.device)
    return torch.empty(part.numel(dense.numel()), dtype=part.dtype, device=dense.device)


def _fits(t: Any, part: Part, dense: Tensor) -> bool:
    if not isinstance(t, Tensor) or t.dtype != part.dtype or t.device != dense.device:
        return False
    if part.block > 1:
        return t.shape == (part.numel(dense.numel()),) and t.is_contiguous()
    return t.shape == dense.shape and same_layout(t, dense)


def moment(operand: int, key: str, format: Format, state: dict[str, Any], dense: Tensor) -> dict[str, Tensor]:
    """A moment's parts: those in ``state`` where they fit, else zeros or what was there,
    converted. Widening is exact; what gets narrower is rounded to nearest.

    Args:
        operand: MU or NU.
        state: of the right shape, if it has the moment.
        dense: memory that is laid out as the parts must be, of the parameter's dtype.
    """
    parts = moment_parts(key, format, dense.dtype)
    if all(_fits(state.get(part.key), part, dense) for part in parts):
        return {part.key: state[part.key] for part in parts}
    made = {part.key: empty_part(part, dense) for part in parts}
    old = state.get(key)
    if old is None:
        for t in made.values():
            t.zero_()
        return made
    if old.dtype == torch.uint8:
        old = _MOMENT_8BIT[operand].decode(old.contiguous(), state[key + _MOMENT_8BIT[operand].aux.key])
    if format.index_dependent:
        old, base = format.encode(old.to(dense.device, format.working).contiguous(), None)
        if base is not None:
            made[key + format.aux.key].copy_(base)
    made[key].copy_(old)
    return made


def master(format: Format, state: dict[str, Any], param: Tensor, dense: Tensor) -> dict[str, Tensor]:
    """The second part of a parameter's format, if it has one: what is in ``state`` where it fits,
    else made from ``param`` and from what was there. A master that is split, or split into
    fewer bits, is rounded to the nearest that the parameter as it is allows."""
    if format.aux is None:
        return {}
    key = format.aux.key
    if _fits(state.get(key), format.aux, dense):
        return {key: state[key]}
    param = param.detach()
    values = param.to(torch.float32)
    remainder = state.get("remainder")
    if state.get("master") is not None:
        values = state["master"].to(param.device, torch.float32)
    elif remainder is not None and param.dtype == torch.bfloat16:
        values = _REMAINDERS[remainder.dtype].decode(param, remainder.to(param.device))
    attached = format.remainder_of(param, values)
    return {key: empty_part(format.aux, dense).copy_(attached)}


def copy_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state with tensors of its own."""
    return {
        k: v.detach().clone(memory_format=torch.preserve_format) if isinstance(v, Tensor) else v
        for k, v in state.items()
    }


def check_kinds(
    name: str, p: Tensor, state: dict[str, Any], keys: tuple[str, str], error: type[Exception]
) -> None:
    """Raise where something in the state of ``p`` is not what a moment or master can be."""

    def refuse(key: str, right: str) -> None:
        value = state[key]
        given = f"dtype {value.dtype}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise error(f"the state {key!r} of parameter {name} must be {right}, got {given}")

    number = "complex" if p.is_complex() else "floating-point"
    for key in keys:
        value = state.get(key)
        if isinstance(value, Tensor) and value.dtype == torch.uint8:
            _check_base(name, p, state, key, error)
        elif key in state and not (
            isinstance(value, Tensor)
            and (value.is_complex() if p.is_complex() else value.is_floating_point())
        ):
            refuse(key, f"a {number} tensor, like the parameter's {p.dtype}")
    if "master" in state and not (
        isinstance(state["master"], Tensor) and state["master"].is_floating_point()
    ):
        refuse("master", "a floating-point tensor")
    remainder = state.get("remainder")
    if "remainder" in state and not (isinstance(remainder, Tensor) and remainder.dtype in _REMAINDERS):
        refuse("remainder", "a tensor of dtype int16 or int8")


def _check_base(name: str, p: Tensor, state: dict[str, Any], key: str, error: type[Exception]) -> None:
    """Raise where an 8-bit moment has no base that it could be read with."""
    suffix = BASE[key != "exp_avg"]
    base, blocks = state.get(key + suffix), -(-p.numel() // BLOCK)
    if not isinstance(base, Tensor) or base.dtype != torch.uint8 or base.shape != (blocks,):
        raise error(
            f"the state {key!r} of parameter {name} has dtype uint8, that of the 8-bit format, and "
            f"no {key + suffix!r} of dtype uint8 and shape {(blocks,)} beside it"
        )


def checked_step(name: str, step: Any, error: type[Exception]) -> int:
    """The step number as an integer from 0 to 2^31 - 1."""
    try:
        number = int(step)
        whole = number == step
    except (TypeError, ValueError, RuntimeError, OverflowError):
        whole = False
    if not whole or not 0 <= number <= MAX_COUNT:
        raise error(
            f"the state 'step' of parameter {name} must be an integer from 0 to {MAX_COUNT}, got {step!r}"
        )
    return number


def check_saved(name: str, p: Tensor, state: dict[str, Any], keys: tuple[str, str], optimizer: str) -> None:
    """Raise a ValueError where a saved state cannot become that of ``p``, naming both."""
    for key in keys:
        if not isinstance(state.get(key), Tensor):
            raise ValueError(  # noqa: TRY004 (a wrong checkpoint, not a wrong call)
                f"the saved state of parameter {name} has no tensor {key!r}; it has {sorted(state)}: "
                f"was it saved by another optimizer than {optimizer}?"
            )
    check_kinds(name, p, state, keys, ValueError)
    for key, operand in zip(keys, (MU, NU)):
        most, suffix = _MOMENT_8BIT[operand].max_exponent, _MOMENT_8BIT[operand].aux.key
        if state[key].dtype == torch.uint8 and (state[key + suffix] > most).any():
            raise ValueError(
                f"the saved state {key + suffix!r} of parameter {name} must be at most {most}, that of the "
                f"largest float32, got {int(state[key + suffix].max())}"
            )
    for key in (*keys, *_OPTIONAL):
        value = state.get(key)
        if isinstance(value, Tensor) and value.shape != p.shape:
            raise ValueError(
                f"the saved state {key!r} of parameter {name} has shape {tuple(value.shape)}, "
                f"the parameter {tuple(p.shape)}"
            )
