"""One parameter's moments and master weights in ``optimizer.state[p]``: made, kept, converted. They say in
which format they are: an 8-bit moment has block exponents beside it, under a key that ends with the format's
name, a ``remainder`` of int16 or int8 is split16's or split8's."""

from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .layout import freed, is_lazy, local, placed_like, same_layout
from .reference import MAX_COUNT
from .rounding import MU, NU
from .storage import BLOCK, BLOCK_FORMATS, REMAINDERS, Format, Formats, Part, formats_of

State = dict[str, Any]
Keys = tuple[str, str]


@cache
def _moment_parts(key: str, format: Format, dtype: torch.dtype) -> tuple[Part, ...]:
    aux = format.aux_of(key)
    return Part(key, dtype if dtype.is_complex else format.dtype), *([aux] if aux else [])


@cache
def state_parts(keys: Keys, formats: Formats, dtype: torch.dtype) -> tuple[Part, ...]:
    """All that a parameter of this dtype keeps in its state, but for ``step``."""
    parts = *_moment_parts(keys[0], formats.mu, dtype), *_moment_parts(keys[1], formats.nu, dtype)
    return (*parts, formats.param.aux) if formats.param.aux else parts


def _in_blocks(key: str, state: State) -> tuple[str, Format] | None:
    """Where the block exponents of an 8-bit moment are, and its format; None of one in another format."""
    found = ((key + suffix, f) for suffix, f in BLOCK_FORMATS.items() if key + suffix in state)
    return next(found, None) if key in state and state[key].dtype == torch.uint8 else None


def portable(state: State, keys: Keys) -> State:
    """What is saved of a state. 8-bit moments are decoded, exactly: block exponents belong to what lies here
    of a parameter. Of a remainder the 16 bits, those that split8 lacks zero, are called bfloat16: no
    collective gathers int16, FSDP1 no integers, and others cast what they do not know to the parameter's
    dtype."""
    saved = dict(state)
    for key in keys:
        if block := _in_blocks(key, state):
            values = block[1].decode(local(state[key]).contiguous(), saved.pop(block[0]))
            saved[key] = placed_like(state[key], values.to(torch.bfloat16))
    remainder = state.get("remainder")
    if remainder is not None:
        bits = local(remainder).to(torch.int16) << (16 - 8 * remainder.dtype.itemsize)
        saved["remainder"] = placed_like(remainder, bits.view(torch.bfloat16))
    return saved


def from_saved(saved: State, keys: Keys, format: Format) -> State:
    """The inverse of :func:`portable`, with a remainder of ``format`` where that has all of its bits. Up to
    version 0.1 the keys of block exponents did not name their format."""
    suffixes = {f.operands[0]: suffix for suffix, f in BLOCK_FORMATS.items()}
    renamed = {key + "_base": key + suffixes[operand] for key, operand in zip(keys, (MU, NU))}
    state = {renamed.get(k, k): v for k, v in saved.items()}
    remainder = state.get("remainder")
    if isinstance(remainder, Tensor) and remainder.dtype == torch.bfloat16:
        bits = remainder.view(torch.int16)
        narrow = (bits >> 8).to(torch.int8)
        wanted = format.aux is not None and format.aux.dtype == torch.int8
        exact = wanted and torch.equal(bits, narrow.to(torch.int16) << 8)
        state["remainder"] = narrow if exact else bits
    return state


def _zeros(part: Part, dense: Tensor) -> Tensor:
    if part.block == 1:
        return torch.empty_strided(dense.shape, dense.stride(), dtype=part.dtype, device=dense.device).zero_()
    return torch.zeros(part.shape(dense), dtype=part.dtype, device=dense.device)


def _fits(t: Any, part: Part, dense: Tensor) -> bool:
    if not isinstance(t, Tensor) or (t.dtype, t.device) != (part.dtype, dense.device) or is_lazy(t):
        return False
    return t.shape == part.shape(dense) and (t.is_contiguous() if part.block > 1 else same_layout(t, dense))


def in_formats(state: State, param: Tensor, keys: Keys, formats: Formats, dense: Tensor) -> State:
    """A checked state with all that an optimizer of these formats keeps, and nothing that only others do,
    laid out like ``dense``. What fits is taken as it is; what is missing becomes zeros (of a master: what the
    parameter holds); the rest is converted, exactly where it gets wider, else rounded to nearest."""
    obsolete = {"master", "remainder", *(key + suffix for key in keys for suffix in BLOCK_FORMATS)}
    return {
        **{k: v for k, v in state.items() if k not in obsolete},
        **_moment(keys[0], formats.mu, state, dense),
        **_moment(keys[1], formats.nu, state, dense),
        **_remainder(formats.param, state, param, dense),
    }


def _moment(key: str, format: Format, state: State, dense: Tensor) -> dict[str, Tensor]:
    parts = _moment_parts(key, format, dense.dtype)
    if all(_fits(state.get(part.key), part, dense) for part in parts):
        return {part.key: state[part.key] for part in parts}
    made = {part.key: _zeros(part, dense) for part in parts}
    if (old := state.get(key)) is None:
        return made
    if block := _in_blocks(key, state):
        old = block[1].decode(old.contiguous(), state[block[0]])
    if format.index_dependent:
        old, aux = format.encode(old.to(dense.device, format.working).contiguous(), None)
        if aux is not None:
            made[parts[1].key].copy_(aux)
    made[key].copy_(old)
    return made


def _remainder(format: Format, state: State, param: Tensor, dense: Tensor) -> dict[str, Tensor]:
    """What is left of a master beside a split parameter. A master in the state, or one split in
    another way, is rounded to the nearest that the parameter as it is allows."""
    if format.aux is None:
        return {}
    key = format.aux.key
    if _fits(state.get(key), format.aux, dense):
        return {key: state[key]}
    master = _master(state, param).to(param.device)
    return {key: _zeros(format.aux, dense).copy_(format.remainder_of(param.detach(), master))}


def _master(state: State, param: Tensor) -> Tensor:
    """The float32 that a split parameter stands for: the state's master, by a remainder, or its own value."""
    master = state.get("master")
    if master is None and state.get("remainder") is not None:
        remainder = state["remainder"].to(param.device)
        return REMAINDERS[remainder.dtype].decode(param.detach(), remainder)
    return (param.detach() if master is None else master).to(torch.float32)


def decoded(state: State, param: Tensor, keys: Keys, split: bool, dense: Tensor) -> State:
    """A checked state as values: copies of the moments, of the master of a split parameter, and ``step``."""
    plain = in_formats(state, param, keys, formats_of(param.dtype, "fp32", None, False), dense)
    step = torch.as_tensor(state.get("step", 0), dtype=torch.int64, device=param.device)
    masters = {"master": _master(state, param)} if split else {}
    return {key: own(t) for key, t in {"step": step, **masters, **{key: plain[key] for key in keys}}.items()}


def own(value: Any) -> Any:
    """With a copy of each tensor, list and dict; anything else is kept. A tensor whose storage was freed is a
    ValueError: to copy it would end the process."""
    if isinstance(value, dict):
        return {key: own(x) for key, x in value.items()}
    if isinstance(value, list):
        return [own(x) for x in value]
    if not isinstance(value, Tensor):
        return value
    here = local(value)
    if here.layout == torch.strided and here.untyped_storage().device.type != "meta" and freed(here):
        raise ValueError(
            f"a tensor of shape {tuple(value.shape)} has no memory to copy: its storage was freed"
        )
    return value.detach().clone(memory_format=torch.preserve_format)


def check_state(name: str, p: Tensor, state: State, keys: Keys, error: type[Exception]) -> None:
    """Raise where something in the state of ``p`` is not what a moment or master can be."""
    for key in (key for key in (*keys, "master", "remainder") if key in state):
        value = state[key]
        dtype = value.dtype if isinstance(value, Tensor) else None
        right = "a floating-point tensor"
        fits = dtype is not None and dtype.is_floating_point
        if key == "remainder":
            right, fits = "a tensor of dtype int16 or int8", dtype in REMAINDERS
        elif key in keys and p.is_complex():
            right, fits = "a complex tensor", dtype is not None and dtype.is_complex
        in_blocks = key in keys and dtype == torch.uint8
        if not fits and not in_blocks:
            given = dtype or f"type {type(value).__name__}"
            like = f", like the parameter's {p.dtype}" if key in keys else ""
            raise error(f"the state {key!r} of parameter {name} must be {right}{like}, got {given}")
        if value.shape != p.shape:
            advice = "" if error is ValueError else "; delete optimizer.state[p] to start it anew"
            shapes = f"shape {tuple(value.shape)}, the parameter {tuple(p.shape)}"
            raise error(f"the state {key!r} of parameter {name} has {shapes}{advice}")
        if in_blocks:
            _check_exponents(name, p, state, key, error)


def _check_exponents(name: str, p: Tensor, state: State, key: str, error: type[Exception]) -> None:
    block, shape = _in_blocks(key, state), (-(-p.numel() // BLOCK),)
    exponents = state[block[0]] if block else None
    if not isinstance(exponents, Tensor) or (exponents.dtype, exponents.shape) != (torch.uint8, shape):
        names = " or ".join(repr(key + suffix) for suffix in BLOCK_FORMATS)
        raise error(
            f"the state {key!r} of parameter {name} has dtype uint8, that of an 8-bit format, and no "
            f"{names} of dtype uint8 and shape {shape} beside it"
        )


def check_saved(name: str, p: Tensor, state: State, keys: Keys, optimizer: str) -> int:
    """The step number of a saved state. A ValueError where it cannot become that of ``p`` names both."""
    missing = [key for key in (*keys, "step") if state.get(key) is None]
    if missing:
        raise ValueError(
            f"the saved state of parameter {name} has no tensor {missing[0]!r}; it has {sorted(state)}: "
            f"was it saved by another optimizer than {optimizer}?"
        )
    check_state(name, p, state, keys, ValueError)
    for found, format in filter(None, (_in_blocks(key, state) for key in keys)):
        if (state[found] > format.max_exponent).any():
            raise ValueError(
                f"the saved state {found!r} of parameter {name} must be at most {format.max_exponent}, that "
                f"of the largest float32, got {int(state[found].max())}"
            )
    return checked_step(name, state["step"], ValueError)


def checked_step(name: str, step: Any, error: type[Exception]) -> int:
    """The step number as an integer from 0 to 2^31 - 1."""
    result = -1
    with suppress(TypeError, ValueError, RuntimeError, OverflowError):
        result = int(step) if int(step) == step else -1
    if not 0 <= result <= MAX_COUNT:
        right = f"an integer from 0 to {MAX_COUNT}"
        raise error(f"the state 'step' of parameter {name} must be {right}, got {step!r}")
    return result


def bytes_in_use(params: list[Tensor], states: dict[Any, State], tables: list[Tensor]) -> dict[str, int]:
    """Bytes by purpose; a tensor that several hold is counted once."""
    held = [(key, t) for state in states.values() for key, t in state.items() if isinstance(t, Tensor)]
    parts = {
        "parameters": params,
        "gradients": [p.grad for p in params if p.grad is not None],
        "moments": [t for key, t in held if key not in ("step", "remainder")],
        "master": [t for key, t in held if key == "remainder"],
        "metadata": [*tables, *(t for key, t in held if key == "step")],
    }
    return {part: sum(local(t).nbytes for t in {id(t): t for t in ts}.values()) for part, ts in parts.items()}
