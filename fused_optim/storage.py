"""How values lie in memory. A rule sees the working precision only; a format says how
to get there (``decode``) and back (``encode``).

A new format is a line here, a load/store pair in ``kernels/codecs.py`` and one in
``csrc/codecs.h`` under the same name. This file is the definition; see ``docs/formats.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .rounding import MASK, Place, dither, random_words

BLOCK = 128
"""Elements that share one base in the 8-bit formats."""

STATE_FORMATS = ("fp32", "bf16", "8bit")
MASTER_WEIGHTS = (None, "fp32", "split16", "split8")

Encoded = tuple[Tensor, Tensor | None]
"""What lies in memory, and the format's second part if it has one."""


class Part(NamedTuple):
    """One tensor of ``optimizer.state[p]``."""

    key: str
    dtype: torch.dtype
    block: int
    """Elements of the parameter for each element of this tensor: with 1 it has the parameter's
    shape, else it is a vector."""

    def numel(self, parameter_numel: int) -> int:
        return -(-parameter_numel // self.block)


@dataclass(frozen=True)
class Format:
    """One way to store values.

    Attributes:
        name: the codec's name in every language.
        dtype: what lies in memory.
        working: the precision that the arithmetic is done in.
        decode: ``(stored, extra) -> values``.
        encode: ``(values, place) -> (stored, extra)``; with None for the place, to nearest.
        extra: a second tensor: ("master", ...) of a parameter, ("_base", ...) of a moment.
        by_place: whether an element's bits depend on its place in its parameter.
    """

    name: str
    dtype: torch.dtype
    working: torch.dtype
    decode: Callable[[Tensor, Tensor | None], Tensor]
    encode: Callable[[Tensor, Place | None], Encoded]
    extra: Part | None = None
    by_place: bool = False

    def attach(self, param: Tensor, master: Tensor) -> Tensor | None:
        """The second part that makes of ``param``, as it is, the value nearest to ``master``."""
        if self.extra is None or self.extra.key == "master":
            return None if self.extra is None else master.clone()
        difference = bits_of(master) - (_half_bits(param) << 16)
        if self.extra.dtype == torch.int8:
            difference = (difference + 0x80) >> 8
        info = torch.iinfo(self.extra.dtype)
        near = (difference >= info.min) & (difference <= info.max + 1)
        return torch.where(near, difference.clamp(max=info.max), 0).to(self.extra.dtype)


def bits_of(x: Tensor) -> Tensor:
    """The bits of float32 values, as int64 in [0, 2^32)."""
    return x.view(torch.int32).to(torch.int64) & MASK


def float_of(bits: Tensor) -> Tensor:
    """The float32 values of bits given as int64."""
    return _signed(bits).to(torch.int32).view(torch.float32)


def _signed(bits: Tensor) -> Tensor:
    return (bits ^ 1 << 31) - (1 << 31)


def _half_bits(x: Tensor) -> Tensor:
    return x.view(torch.int16).to(torch.int64) & 0xFFFF


def _half_of(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return ((bits ^ 0x8000) - 0x8000).to(torch.int16).view(dtype)


def _index(values: Tensor) -> Tensor:
    """Every element's logical index in its parameter."""
    return torch.arange(values.numel(), device=values.device).view(values.shape)


def _dither(values: Tensor, place: Place | None, n_bits: int) -> Tensor:
    if place is None:
        return torch.full(values.shape, 1 << (n_bits - 1), device=values.device)
    return dither(_index(values), place) >> (32 - n_bits)


def _plain(dtype: torch.dtype, working: torch.dtype) -> tuple[Callable[..., Tensor], Callable[..., Encoded]]:
    return lambda stored, extra: stored.to(working), lambda values, place: (values.to(dtype), None)


def round_to_bf16(values: Tensor, word: Tensor) -> Tensor:
    """bfloat16: up if the 16 bits that are cut off, plus ``word`` in [0, 65536), carry. A finite
    value becomes infinite only where rounding to nearest makes it so."""
    b = bits_of(values)
    word = torch.where(b & 0x7FFFFFFF >= 0x7F7F0000, 0x8000, word)
    return _half_of(torch.where(values.isnan(), 0x7FC0, (b + word) >> 16), torch.bfloat16)


def round_to_fp16(values: Tensor, word: Tensor) -> Tensor:
    """float16: likewise; below 2^-14, where the unit is 2^-24, what lies below 2^-40 is dropped."""
    b = bits_of(values)
    magnitude = b & 0x7FFFFFFF
    word = torch.where(magnitude >= 0x477FE000, 0x8000, word)  # the largest float16
    normal = (magnitude - 0x38000000 + (word >> 3)) >> 13
    small = values.abs() < 2**-14
    fixed = (torch.where(small, values.abs(), 0) * 2**40).to(torch.int64)
    h = torch.where(small, (fixed + word) >> 16, normal)
    h = torch.where(magnitude >= 0x47800000, 0x7C00, h)
    h = torch.where(values.isnan(), 0x7E00, h)
    return _half_of(torch.where(values.isnan(), h, h | b >> 16 & 0x8000), torch.float16)


def _encode_bf16_dither(values: Tensor, place: Place | None) -> Encoded:
    return round_to_bf16(values, _dither(values, place, 16)), None


def _encode_stochastic(round_to: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Encoded]:
    def encode(values: Tensor, place: Place | None) -> Encoded:
        assert place is not None
        return round_to(values, random_words(_index(values), place)), None

    return encode


def _decode_bf16_master(stored: Tensor, master: Tensor | None) -> Tensor:
    assert master is not None
    # Where somebody wrote to the parameter, that is its value. Else the two are half a unit apart
    # at most, whichever way a tie was rounded.
    apart = bits_of(master) - (_half_bits(stored) << 16)
    return torch.where((apart + 0x8000) & MASK <= 0x10000, master, stored.to(torch.float32))


def _decode_fp16_master(stored: Tensor, master: Tensor | None) -> Tensor:
    assert master is not None
    ours = _half_bits(master.to(torch.float16)) == _half_bits(stored)
    return torch.where(ours, master, stored.to(torch.float32))


def _encode_master(dtype: torch.dtype) -> Callable[..., Encoded]:
    return lambda values, place: (values.to(dtype), values)


def _joined(stored: Tensor, remainder: Tensor) -> Tensor:
    """The float32 of a bfloat16 and the rest, int64. A zero has no negative rest unless somebody
    wrote it to the parameter: then there is none, since its sum with the old one would be a NaN."""
    half = _half_bits(stored)
    written = (half & 0x7FFF == 0) & (remainder < 0)
    return float_of(((half << 16) + torch.where(written, 0, remainder)) & MASK)


def _decode_split16(stored: Tensor, remainder: Tensor | None) -> Tensor:
    assert remainder is not None
    return _joined(stored, remainder.to(torch.int64))


def _split(b: Tensor) -> tuple[Tensor, Tensor]:
    """Bits as a bfloat16, rounded half away from zero, and what is left: int64 in 16 bits."""
    high = (b + 0x8000) >> 16
    return _half_of(high, torch.bfloat16), b - (high << 16)


def _canonical_bits(values: Tensor) -> Tensor:
    return torch.where(values.isnan(), 0x7FC00000, bits_of(values))


def _encode_split16(values: Tensor, place: Place | None) -> Encoded:
    param, remainder = _split(_canonical_bits(values))
    return param, remainder.to(torch.int16)


def _decode_split8(stored: Tensor, remainder: Tensor | None) -> Tensor:
    assert remainder is not None
    return _joined(stored, remainder.to(torch.int64) << 8)


def _encode_split8(values: Tensor, place: Place | None) -> Encoded:
    b = _canonical_bits(values)
    # The largest finite values are cut: no dither carries them to infinity.
    r = torch.where(b & 0x7FFFFFFF >= 0x7F7FFF00, 0, _dither(values, place, 8))
    param, remainder = _split((b + r) & ~0xFF)
    return param, (remainder >> 8).to(torch.int8)


def _blocks(x: Tensor) -> Tensor:
    """``x`` in rows of one block, the last filled up with zeros."""
    x = x.reshape(-1)
    return torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)


_E4M3_ORDERS, _E5M3_ORDERS = 14, 30
"""Binary orders from a block's base to its largest value's exponent."""

MAX_BASE = {"e4m3": 254 - _E4M3_ORDERS, "e5m3": 254 - _E5M3_ORDERS}
"""The base of a block with the largest float32 in it."""


def _block_base(magnitude: Tensor, orders: int) -> Tensor:
    """For each block the exponent that is ``orders`` below that of its largest finite value."""
    finite = torch.where(magnitude < 0x7F800000, magnitude, 0)
    return ((_blocks(finite).amax(1) >> 23) - orders).clamp(min=0)


def _of_elements(base: Tensor, shape: torch.Size) -> Tensor:
    """A block's base for each of its elements, as int64."""
    return base.to(torch.int64).repeat_interleave(BLOCK)[: shape.numel()].view(shape)


def _encode_e5m3(values: Tensor, place: Place | None) -> Encoded:
    magnitude = bits_of(values) & 0x7FFFFFFF
    base = _block_base(magnitude, _E5M3_ORDERS)
    base_of = _of_elements(base, values.shape)
    code = ((magnitude + _dither(values, place, 20)) >> 20) - 8 * base_of
    # 2039 is the largest finite float32's.
    code = torch.minimum(code.clamp(1, 248), 2039 - 8 * base_of)
    code = torch.where(magnitude == 0, 0, code)
    code = torch.where(magnitude == 0x7F800000, 254, code)
    code = torch.where(magnitude > 0x7F800000, 255, code)
    return code.to(torch.uint8), base.to(torch.uint8)


def _decode_e5m3(code: Tensor, base: Tensor | None) -> Tensor:
    assert base is not None
    b = (code.to(torch.int64) + 8 * _of_elements(base, code.shape)) << 20
    b = torch.where(code == 0, 0, b)
    b = torch.where(code == 254, 0x7F800000, b)
    return float_of(torch.where(code == 255, 0x7FC00000, b))


def _encode_e4m3(values: Tensor, place: Place | None) -> Encoded:
    b = bits_of(values)
    magnitude = b & 0x7FFFFFFF
    base = _block_base(magnitude, _E4M3_ORDERS)
    base_of = _of_elements(base, values.shape)
    # Below the smallest normal value codes are the mantissa's first bits of a sum with it.
    one = (base_of + 1) << 23
    subnormal = bits_of(values.abs() + float_of(one)) - one
    scaled = torch.where(magnitude < one, subnormal, magnitude - (base_of << 23))
    code = (scaled + _dither(values, place, 20)) >> 20
    code = torch.minimum(code.clamp(max=120), 2039 - 8 * base_of)
    code = torch.where(magnitude == 0x7F800000, 126, code)
    code = torch.where(magnitude > 0x7F800000, 127, code)
    # A NaN has no sign here: devices give the NaN of an operation different ones.
    sign = torch.where(magnitude > 0x7F800000, 0, b >> 24 & 0x80)
    return (code | sign).to(torch.uint8), base.to(torch.uint8)


def _decode_e4m3(stored: Tensor, base: Tensor | None) -> Tensor:
    assert base is not None
    code, base_of = stored.to(torch.int64) & 0x7F, _of_elements(base, stored.shape)
    one = (base_of + 1) << 23
    subnormal = float_of((code << 20) + one) - float_of(one)
    value = torch.where(code < 8, subnormal, float_of((code + 8 * base_of) << 20))
    value = torch.where(code == 126, torch.inf, value)
    value = torch.where(code == 127, torch.nan, value)
    return torch.where(stored > 0x7F, -value, value)


_MASTER = Part("master", torch.float32, 1)
_BASE = Part("_base", torch.uint8, BLOCK)
_F32, _F64, _BF16, _F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

FORMATS = {
    f.name: f
    for f in (
        Format("fp32", _F32, _F32, *_plain(_F32, _F32)),
        Format("fp64", _F64, _F64, *_plain(_F64, _F64)),
        Format("bf16", _BF16, _F32, *_plain(_BF16, _F32)),
        Format("fp16", _F16, _F32, *_plain(_F16, _F32)),
        # Parameters.
        Format("bf16_master", _BF16, _F32, _decode_bf16_master, _encode_master(_BF16), _MASTER),
        Format("fp16_master", _F16, _F32, _decode_fp16_master, _encode_master(_F16), _MASTER),
        Format("split16", _BF16, _F32, _decode_split16, _encode_split16, Part("remainder", torch.int16, 1)),
        Format("split8", _BF16, _F32, _decode_split8, _encode_split8, Part("remainder", torch.int8, 1), True),
        Format("bf16_stochastic", _BF16, _F32, _plain(_BF16, _F32)[0], _encode_stochastic(round_to_bf16), by_place=True),
        Format("fp16_stochastic", _F16, _F32, _plain(_F16, _F32)[0], _encode_stochastic(round_to_fp16), by_place=True),
        # Moments.
        Format("bf16_dither", _BF16, _F32, _plain(_BF16, _F32)[0], _encode_bf16_dither, by_place=True),
        Format("e4m3", torch.uint8, _F32, _decode_e4m3, _encode_e4m3, _BASE, True),
        Format("e5m3", torch.uint8, _F32, _decode_e5m3, _encode_e5m3, _BASE, True),
    )
}  # fmt: skip

_PLAIN = {f.dtype: f for f in list(FORMATS.values())[:4]}

REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}
"""A complex number is two independent real ones."""


def plain_format(dtype: torch.dtype) -> Format | None:
    """Values of this dtype as they are, None if no rule takes it."""
    return _PLAIN.get(REAL.get(dtype, dtype))


class Formats(NamedTuple):
    """How one parameter and its moments lie in memory."""

    param: Format
    mu: Format
    nu: Format

    @property
    def by_place(self) -> bool:
        """Whether an element's bits depend on its place in its parameter."""
        return any(format.by_place for format in self)


@cache
def formats_of(
    dtype: torch.dtype, state_format: str, master_weights: str | None, stochastic_rounding: bool
) -> Formats:
    """The formats of a parameter of this dtype. Only a parameter of 16 bits has a choice of its own."""
    param = _PLAIN[REAL.get(dtype, dtype)]
    mu = nu = _PLAIN[param.working]
    if state_format == "bf16":
        mu = nu = FORMATS["bf16_dither"]
    elif state_format == "8bit":
        mu, nu = FORMATS["e4m3"], FORMATS["e5m3"]
    if dtype.itemsize == 2 and stochastic_rounding:
        param = FORMATS[f"{param.name}_stochastic"]
    elif dtype.itemsize == 2 and master_weights is not None:
        param = FORMATS[f"{param.name}_master" if master_weights == "fp32" else master_weights]
    return Formats(param, mu, nu)


def check_formats(
    name: str, dtype: torch.dtype, state_format: str, master_weights: str | None, stochastic_rounding: bool
) -> None:
    """Raise a ValueError where a parameter cannot have the formats that were asked for, naming it."""
    if state_format != "fp32" and dtype not in (_F32, _BF16, _F16):
        raise ValueError(
            f"state_format={state_format!r} is for float32, bfloat16 and float16 parameters, and parameter "
            f"{name} has dtype {dtype}; give it an optimizer of its own with state_format='fp32'"
        )
    if master_weights in ("split16", "split8") and dtype == _F16:
        raise ValueError(
            f"master_weights={master_weights!r} splits a float32 between a bfloat16 parameter and a remainder, "
            f"and parameter {name} has dtype {dtype}; use master_weights='fp32' for it"
        )
