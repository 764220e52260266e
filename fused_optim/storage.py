"""How values lie in memory. A rule sees the working precision only; a format says how to get there
(``decode``) and back (``encode``). ``docs/formats.md`` describes the formats, ``docs/design.md`` says what a
new one takes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .rounding import MASK, MU, NU, PARAM, Place, dither, random_words

BLOCK = 128  # elements that share one exponent in the 8-bit formats
Encoded = tuple[Tensor, Tensor | None]  # what lies in memory, and the format's auxiliary tensor


class Part(NamedTuple):
    """One tensor of ``optimizer.state[p]``: of the parameter's shape where ``block`` is 1, else a vector."""

    key: str
    dtype: torch.dtype
    block: int = 1  # elements of the parameter for each element of this tensor

    def numel(self, parameter_numel: int) -> int:
        return -(-parameter_numel // self.block)

    def shape(self, p: Tensor) -> tuple[int, ...]:
        return p.shape if self.block == 1 else (self.numel(p.numel()),)


@dataclass(frozen=True, eq=False)  # there is one object of each, and dicts by them are asked often
class Format:
    """One way to store values. All that Python knows of a format is said here."""

    name: str  # the codec's, in every language
    dtype: torch.dtype  # of what lies in memory
    working: torch.dtype  # the precision that the arithmetic is done in
    decode: Callable[..., Tensor]  # (stored, aux) -> values
    encode: Callable[..., Encoded]  # (values, place) -> (stored, aux); to nearest where the place is None
    operands: tuple[int, ...]  # which of PARAM, MU and NU may be stored so
    # What asks for it: a value of ``state_format`` for a moment, of ``master_weights`` for a parameter, or
    # "stochastic_rounding". Formats that have none are taken by dtype.
    choice: str | None = None
    # A second tensor in the state. A moment's has a suffix for its key, which says the moment's format.
    aux: Part | None = None
    index_dependent: bool = False  # whether an element's bits depend on its index in its parameter
    low_precision: bool = False  # whether kernels have a shorter way where all new values are finite
    max_exponent: int | None = None  # the block exponent of a block with the largest float32 in it

    @property
    def plain(self) -> bool:
        """Whether values of its dtype are stored as they are, rounded to nearest."""
        return self.aux is None and not self.index_dependent

    def aux_of(self, key: str) -> Part | None:
        """The auxiliary part of the moment with this state key; of a parameter the key is ``""``."""
        return None if self.aux is None else self.aux._replace(key=key + self.aux.key)

    def remainder_of(self, param: Tensor, master: Tensor) -> Tensor:
        """The remainder that makes of ``param``, as it is, the value nearest to the float32 ``master``;
        zero where that is none of the values which ``param`` is rounded from."""
        assert self.aux is not None
        info = torch.iinfo(self.aux.dtype)
        shift = 16 - info.bits
        difference = (bits_of(master) - bits_of(param.to(torch.float32)) + (1 << shift >> 1)) >> shift
        near = (difference >= info.min) & (difference <= info.max + 1)
        return torch.where(near, difference.clamp(max=info.max), 0).to(self.aux.dtype)


def bits_of(x: Tensor) -> Tensor:
    """The bits of float32 values, as int64 in [0, 2^32)."""
    return x.view(torch.int32).to(torch.int64) & MASK


def float_of(bits: Tensor) -> Tensor:
    """The float32 values of the low 32 bits of int64."""
    return bits.to(torch.int32).view(torch.float32)


def _index(values: Tensor, place: Place) -> Tensor:
    """Every element's logical index in its parameter."""
    return place.offset + torch.arange(values.numel(), device=values.device).view(values.shape)


def _dither(values: Tensor, place: Place | None, n_bits: int) -> Tensor:
    if place is None:
        return torch.full(values.shape, 1 << n_bits >> 1, device=values.device)
    return dither(_index(values, place), place) >> (32 - n_bits)


def _plain(dtype: torch.dtype, working: torch.dtype) -> tuple[Callable[..., Tensor], Callable[..., Encoded]]:
    return lambda stored, aux: stored.to(working), lambda values, place: (values.to(dtype), None)


def round_to_bf16(values: Tensor, word: Tensor) -> Tensor:
    """bfloat16: up if the 16 bits that are cut off, plus ``word`` in [0, 65536), carry. A finite
    value becomes infinite only where rounding to nearest makes it so."""
    b = bits_of(values)
    word = torch.where(b & 0x7FFFFFFF >= 0x7F7F0000, 0x8000, word)
    rounded = torch.where(values.isnan(), 0x7FC0, (b + word) >> 16)
    return rounded.to(torch.int16).view(torch.bfloat16)


def _encode_bf16(values: Tensor, place: Place | None) -> Encoded:
    """A parameter's rounding is random, a moment's goes by the dither."""
    if place is not None and place.operand == PARAM:
        return round_to_bf16(values, random_words(_index(values, place), place)), None
    return round_to_bf16(values, _dither(values, place, 16)), None


def _decode_split(stored: Tensor, remainder: Tensor) -> Tensor:
    """A zero has a negative remainder only where somebody wrote it to the parameter. The remainder then
    counts as 0, since the sum would be a NaN."""
    high = bits_of(stored.to(torch.float32))
    low = remainder.to(torch.int64) << 16 - torch.iinfo(remainder.dtype).bits
    written = (high & 0x7FFFFFFF == 0) & (low < 0)
    return float_of(high + torch.where(written, 0, low))


def _encode_split(dtype: torch.dtype, values: Tensor, place: Place | None) -> Encoded:
    """A bfloat16, rounded half away from zero, and the remainder, whose lowest bits are cut off after
    a dither was added."""
    shift = 16 - torch.iinfo(dtype).bits
    b = torch.where(values.isnan(), 0x7FC00000, bits_of(values))
    # The largest finite values are cut: no dither carries them to infinity.
    b = (b + torch.where(b & 0x7FFFFFFF >= 0x7F7FFF00, 0, _dither(values, place, shift))) >> shift << shift
    high = (b + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), ((b - (high << 16)) >> shift).to(dtype)


# The 8-bit formats. A code is an exponent of ``width`` bits, which counts from the block's, and 3 bits of
# mantissa; the last two codes are infinity and NaN. e4m3 has width 4, a sign, and subnormal values below
# code 8. e5m3 has width 5, no sign, and code 0 for zero alone.


def _of_elements(exponent: Tensor, shape: torch.Size) -> Tensor:
    """A block's exponent for each of its elements, as int64."""
    return exponent.to(torch.int64).repeat_interleave(BLOCK)[: shape.numel()].view(shape)


def _encode_8bit(width: int, values: Tensor, place: Place | None) -> Encoded:
    b, nan = bits_of(values), (8 << width) - 1
    magnitude = b & 0x7FFFFFFF
    orders = (1 << width) - 2  # from a block's exponent to that of its largest finite value
    finite = torch.where(magnitude < 0x7F800000, magnitude, 0).reshape(-1)
    blocks = torch.nn.functional.pad(finite, (0, -finite.numel() % BLOCK)).view(-1, BLOCK)
    # To nearest, a largest value that is a power of two takes the larger of the two codes that it has, under
    # the smaller exponent: what was decoded is encoded exactly, also where the largest was rounded up.
    exponent = (((blocks.amax(1) - int(place is None)) >> 23) - orders).clamp(min=0)
    each = _of_elements(exponent, values.shape)
    scaled = magnitude - (each << 23)
    if width == 4:
        # Below the smallest normal value codes are the mantissa's first bits of a sum with it.
        one = (each + 1) << 23
        scaled = torch.where(magnitude < one, bits_of(values.abs() + float_of(one)) - one, scaled)
    code = ((scaled + _dither(values, place, 20)) >> 20).clamp(max=nan - 7)
    if width == 5:
        code = torch.where(magnitude == 0, 0, code.clamp(min=1))
    # The largest float32 has the code 2039 under an exponent of 0. No finite value has one above that.
    code = torch.minimum(code, 2039 - 8 * each)
    code = torch.where(magnitude == 0x7F800000, nan - 1, code)
    code = code if width == 5 else code | b >> 24 & 0x80
    # A NaN has no sign: devices give the NaN of an operation different ones.
    code = torch.where(magnitude > 0x7F800000, nan, code)
    return code.to(torch.uint8), exponent.to(torch.uint8)


def _decode_8bit(width: int, stored: Tensor, exponent: Tensor) -> Tensor:
    nan, each = (8 << width) - 1, _of_elements(exponent, stored.shape)
    code = stored.to(torch.int64) & nan
    value = torch.where(code == 0, 0.0, float_of((code + 8 * each) << 20))
    if width == 4:
        one = (each + 1) << 23
        value = torch.where(code < 8, float_of((code << 20) + one) - float_of(one), value)
    value = torch.where(code == nan - 1, torch.inf, value)
    value = torch.where(code == nan, torch.nan, value)
    return torch.where(stored > nan, -value, value)


_F32, _F64, _BF16, _F16, _U8 = torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8
_from_bf16 = _plain(_BF16, _F32)[0]
_RECORDS = (
    Format("fp32", _F32, _F32, *_plain(_F32, _F32), (PARAM, MU, NU), "fp32"),
    Format("fp64", _F64, _F64, *_plain(_F64, _F64), (PARAM, MU, NU)),
    Format("bf16", _BF16, _F32, *_plain(_BF16, _F32), (PARAM,), low_precision=True),
    Format("fp16", _F16, _F32, *_plain(_F16, _F32), (PARAM,)),
    Format("split16", _BF16, _F32, _decode_split, partial(_encode_split, torch.int16), (PARAM,), "split16",
           Part("remainder", torch.int16), low_precision=True),
    Format("split8", _BF16, _F32, _decode_split, partial(_encode_split, torch.int8), (PARAM,), "split8",
           Part("remainder", torch.int8), index_dependent=True, low_precision=True),
    Format("bf16_stochastic", _BF16, _F32, _from_bf16, _encode_bf16, (PARAM,), "stochastic_rounding",
           index_dependent=True, low_precision=True),
    Format("bf16_dither", _BF16, _F32, _from_bf16, _encode_bf16, (MU, NU), "bf16",
           index_dependent=True, low_precision=True),
    Format("e4m3", _U8, _F32, partial(_decode_8bit, 4), partial(_encode_8bit, 4), (MU,), "8bit",
           Part("_e4m3", _U8, BLOCK), index_dependent=True, low_precision=True, max_exponent=240),
    Format("e5m3", _U8, _F32, partial(_decode_8bit, 5), partial(_encode_8bit, 5), (NU,), "8bit",
           Part("_e5m3", _U8, BLOCK), index_dependent=True, low_precision=True, max_exponent=224),
)  # fmt: skip
FORMATS = {f.name: f for f in _RECORDS}
_CHOSEN = {(operand, f.choice): f for f in _RECORDS for operand in f.operands}
_PLAIN = {f.dtype: f for f in _RECORDS if f.plain}
_PLAIN |= {torch.complex64: _PLAIN[_F32], torch.complex128: _PLAIN[_F64]}  # two independent real numbers
plain_format = _PLAIN.get  # values of a dtype as they are, None if no rule takes it
STATE_FORMATS = tuple(dict.fromkeys(f.choice for f in _RECORDS if f.choice and MU in f.operands))
MASTER_WEIGHTS = (None, *(f.choice for f in _RECORDS if f.aux and PARAM in f.operands))
REMAINDERS = {f.aux.dtype: f for f in _RECORDS if f.aux and PARAM in f.operands}  # by the remainder's dtype
BLOCK_FORMATS = {f.aux.key: f for f in _RECORDS if f.aux and f.aux.block > 1}  # by the exponents' key suffix


def native_gradient(param: torch.dtype, grad: torch.dtype) -> bool:
    """Whether kernels for parameters of one dtype read gradients of another as they are: of the
    parameter's own dtype and of its working precision. The rest is copied first."""
    p, g = plain_format(param), plain_format(grad)
    return p is not None and g is not None and g.dtype in (p.dtype, p.working)


class Formats(NamedTuple):
    """How one parameter and its moments lie in memory."""

    param: Format
    mu: Format
    nu: Format

    @property
    def index_dependent(self) -> bool:
        return any(format.index_dependent for format in self)


@cache
def formats_of(
    dtype: torch.dtype, state_format: str, master_weights: str | None, stochastic_rounding: bool
) -> Formats:
    """The formats of a parameter of this dtype. Only a parameter of 16 bits has a choice of its own."""
    param = _PLAIN[dtype]
    mu = nu = _PLAIN[param.working]
    if param.working == _F32:
        mu, nu = _CHOSEN[MU, state_format], _CHOSEN[NU, state_format]
    choice = "stochastic_rounding" if stochastic_rounding else master_weights
    if dtype.itemsize == 2 and choice is not None:
        param = _CHOSEN[PARAM, choice]
    return Formats(param, mu, nu)


def check_formats(name: str, dtype: torch.dtype, formats: tuple[str, str | None, bool]) -> None:
    """Raise a ValueError where a parameter cannot have the formats that were asked for, naming it."""
    why, instead = None, "give it an optimizer of its own"
    param, (state_format, master_weights, stochastic_rounding) = formats_of(dtype, *formats).param, formats
    if state_format != "fp32" and (dtype.is_complex or dtype == _F64):
        why = f"state_format={state_format!r} is for float32, bfloat16 and float16 parameters"
        instead += " with state_format='fp32'"
    elif param.dtype != _PLAIN[dtype].dtype:
        why = f"master_weights={master_weights!r} splits a float32 into a bfloat16 parameter and a remainder"
        why = "stochastic_rounding is for bfloat16 parameters" if stochastic_rounding else why
    if why is not None:
        raise ValueError(f"{why}, and parameter {name} has dtype {dtype}; {instead}")
