"""How values lie in memory: a :class:`Codec` for each format of ``fused_optim.storage``.

A codec's functions are given ``row``, a pointer to the operand's address in the table (that of its
auxiliary tensor is ``AUX`` columns on), and ``at``, the elements. What a load returns is for the decode,
which comes later: values take more registers than what lies in memory. A store is also told its
``OPERAND``. In a full chunk ``at.mask`` is None and all addresses are multiples of 16 bytes: then accesses
are 128 bits wide. Values of low precision are made of integers alone, since Triton's interpreter does not
round float32 to bfloat16 as a GPU does; NVIDIA's GPUs have instructions for some.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl

from fused_optim import rounding, storage

AUX = tl.constexpr(3)
BLOCK = tl.constexpr(storage.BLOCK)
"""Elements that share one exponent in the 8-bit formats."""
INF = tl.constexpr(0x7F800000)
WEYL = tl.constexpr(rounding.WEYL)
PARAM, MU, NU = map(tl.constexpr, rounding.DITHER_FACTORS)
"""The operands that are stored, by what each multiplies an element's index by for its dither."""


@dataclass(frozen=True)
class Codec:
    """A format's functions.

    Attributes:
        load: ``(row, at) -> parts``
        decode: ``(parts, at) -> values``
        store: ``(row, at, values, OPERAND)``
        special: of an 8-bit format, ``(words) -> bits`` that are not all zero where a byte of the words is
            the code of an infinity or NaN.
    """

    name: str
    load: Any
    decode: Any
    store: Any
    special: Any = None

    @property
    def low_precision(self) -> bool:
        """Whether values take half the instructions where ``at.finite``."""
        return storage.FORMATS[self.name].low_precision

    @property
    def cache_key(self) -> str:
        """What Triton asks of a constant, to know a kernel that it has compiled."""
        functions = (self.load, self.decode, self.store, self.special)
        return "".join(f.cache_key for f in functions if f is not None)

    def __repr__(self) -> str:
        return f"codec_{self.name}"  # a part of names in what is compiled


At = namedtuple("At", "start offset mask block_mask count key finite ptx")
"""Elements of one row.

``start``: the first one's index, a multiple of BLOCK. ``offset`` and ``mask``: the index of each, and
whether it exists; a mask of None for all. ``block_mask``: the same of their blocks. ``count``: the address
of the step number's bits, which are a value of the working precision. ``key``: the address of the key of the
parameter's random bits, after which the first element's index in its parameter lies. ``finite``: values to be
stored with low precision are below ``step.LIMIT``, so that none is infinite or NaN or rounds to infinity, and
no moment in memory is infinite or NaN (see ``step._all_finite``); no second moment is negative. ``ptx``: a
full chunk for NVIDIA's GPUs since the A100. True or None: Triton makes tensors of other constants in a tuple.
"""


@triton.jit
def _pointers(row, dtype: tl.constexpr, at, EACH: tl.constexpr):
    """To every item, each of EACH elements."""
    pointer = tl.load(row).to(tl.pointer_type(dtype))
    if at.mask is None:
        # On the pointer, not on the integer: the hint does not survive the cast.
        pointer = tl.multiple_of(pointer, 16)
    return pointer + (at.start // EACH + tl.arange(0, at.offset.shape[0] // EACH))


@triton.jit
def _load(row, dtype: tl.constexpr, at):
    return tl.load(_pointers(row, dtype, at, 1), at.mask)


@triton.jit
def _store(row, at, x, OPERAND: tl.constexpr = None):
    tl.store(_pointers(row, x.dtype, at, 1), x, at.mask)


# Integers of 8 and 16 bits are loaded as words that hold neighbours, and taken out by shifts and masks;
# bytes are stored so too. Left to itself LLVM makes vectors of bytes and halves, in two or three
# instructions a value. (Halves beside float32 moments are few, and take up to 12 registers less when loaded
# one by one. Stored as words, two halves take one instruction more.)


@triton.jit
def _load_halves(row, at):
    if at.finite is not None:
        return tl.load(_pointers(row, tl.uint32, at, 2))
    else:
        return _load(row, tl.uint16, at)


@triton.jit
def _high_halves(halves):
    """What :func:`_load_halves` loaded, each in the high half of 32 bits."""
    if halves.dtype == tl.uint32:
        pairs = tl.join(halves << 16, halves & 0xFFFF0000)
        return tl.reshape(pairs, [2 * halves.shape[0]])
    else:
        return halves.to(tl.uint32) << 16


@triton.jit
def _store_high_halves(row, at, x):
    _store(row, at, (x >> 16).to(tl.uint16))


@triton.jit
def _load_bytes(row, at):
    if at.mask is None:
        return tl.load(_pointers(row, tl.uint32, at, 4))
    else:
        return _load(row, tl.uint8, at)


@triton.jit
def _high_bytes(b):
    """What :func:`_load_bytes` loaded, each in the highest byte of 32 bits, with others below."""
    if b.dtype == tl.uint32:
        even = tl.join(b << 24, b << 8)
        odd = tl.join(b << 16, b)
        return tl.reshape(tl.join(even, odd), [4 * b.shape[0]])
    else:
        return b.to(tl.uint32) << 24


@triton.jit
def _bytes_of(a, b, selector):
    """Four bytes, which ``selector`` names, of the eight of two words (PTX)."""
    prmt: tl.constexpr = "prmt.b32 $0, $1, $2, $3;"
    return tl.inline_asm_elementwise(prmt, "=r,r,r,r", [a, b, selector], tl.uint32, is_pure=True, pack=1)


@triton.jit
def _store_bytes(row, at, x, BYTE: tl.constexpr):
    """That byte of each word of ``x``, 0 for the lowest."""
    if at.mask is None:
        even, odd = tl.split(tl.reshape(x, [x.shape[0] // 4, 2, 2]))
        b0, b2 = tl.split(even)
        b1, b3 = tl.split(odd)
        if at.ptx is not None:
            selector: tl.constexpr = 0x40 + 0x11 * BYTE
            words = _bytes_of(_bytes_of(b0, b1, selector), _bytes_of(b2, b3, selector), 0x5410)
        else:
            words = (b3 >> (8 * BYTE)) & 0xFF
            for b in tl.static_range(3):
                words = words * 256 + (((b2, b1, b0)[b] >> (8 * BYTE)) & 0xFF)
        tl.store(_pointers(row, tl.uint32, at, 4), words)
    else:
        _store(row, at, (x >> (8 * BYTE)).to(tl.uint8))


@triton.jit
def _bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def magnitude_bits(x):
    return (_bits_of(x) & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def largest_of_eight(x):
    """The bits of the largest magnitude of each eight neighbours, which a thread holds in a full chunk; a NaN
    is the largest. (Maxima of numbers need no instruction to drop a sign, those of bits one for each.)"""
    x = tl.abs(x)
    for _ in tl.static_range(3):
        a, b = tl.split(tl.reshape(x, [x.shape[0] // 2, 2]))
        x = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    return magnitude_bits(x)


@triton.jit
def _canonical_bits(x, at):
    bits = _bits_of(x)
    if at.finite is None:
        bits = tl.where(magnitude_bits(x) > INF, 0x7FC00000, bits)
    return bits


# Random bits, as in fused_optim.rounding.


@triton.jit
def _dither(at, OPERAND: tl.constexpr, BITS: tl.constexpr):
    weyl = _bits_of(tl.load(at.count)) * WEYL
    # Eight neighbours, which one thread holds, are constants apart.
    N: tl.constexpr = at.offset.shape[0] // 8
    first = (at.start + tl.load(at.key + 1)).to(tl.uint32) + 8 * tl.arange(0, N).to(tl.uint32)
    dither = (first * OPERAND + weyl)[:, None] + (tl.arange(0, 8).to(tl.uint32) * OPERAND)[None, :]
    return tl.reshape(dither, [8 * N]) >> (32 - BITS)


@triton.jit
def _random_words(at):
    """16 bits for each element. In a full chunk eight neighbours, which one thread holds, share one
    evaluation; else the first element may be in the middle of eight."""
    EACH: tl.constexpr = 8 if at.mask is None else 1
    N: tl.constexpr = at.offset.shape[0] // EACH
    first = at.start + tl.load(at.key + 1)
    if at.mask is None:
        group = (first >> 3) + tl.arange(0, N)
        neighbour = tl.arange(0, 8)[None, :]
    else:
        group = (first + tl.arange(0, N)) >> 3
        neighbour = ((first + tl.arange(0, N)) & 7).to(tl.int32)[:, None]
    c0 = group.to(tl.uint32)
    c1 = (group >> 32).to(tl.uint32)
    c2 = tl.zeros([N], tl.uint32) + _bits_of(tl.load(at.count))
    c3 = tl.zeros([N], tl.uint32)
    key = tl.load(at.key)
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    low = tl.where(neighbour < 2, c0[:, None], c1[:, None])
    high = tl.where(neighbour < 6, c2[:, None], c3[:, None])
    word = tl.where(neighbour < 4, low, high) >> (16 * (neighbour & 1)).to(tl.uint32)
    return tl.reshape(word & 0xFFFF, [EACH * N])


# Values as they are, and bfloat16.


@triton.jit
def _load_working(row, at):
    return _load(row, at.count.dtype.element_ty, at)


@triton.jit
def _load_fp16(row, at):
    return _load(row, tl.float16, at)


@triton.jit
def _decode_float(x, at):
    return x.to(at.count.dtype.element_ty)


@triton.jit
def _store_fp16(row, at, x, OPERAND: tl.constexpr):
    _store(row, at, x.to(tl.float16), OPERAND)


@triton.jit
def _decode_bf16(halves, at):
    return _float_of(_high_halves(halves))


@triton.jit
def _store_bf16(row, at, x, OPERAND: tl.constexpr):
    if at.ptx is not None:
        # Two values in one instruction, where integers take three for each.
        pair: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
        _store(row, at, tl.inline_asm_elementwise(pair, "=r,f,f", [x], tl.uint16, is_pure=True, pack=2))
    else:
        bits = _canonical_bits(x, at)
        _store_high_halves(row, at, bits + 0x7FFF + ((bits >> 16) & 1))


@triton.jit
def _store_rounded_by(row, at, x, word):
    """Up if the 16 bits that are cut off, plus ``word``, carry."""
    if at.finite is None:
        word = tl.where(magnitude_bits(x) >= 0x7F7F0000, 0x8000, word)
    _store_high_halves(row, at, _canonical_bits(x, at) + word)


@triton.jit
def _store_bf16_stochastic(row, at, x, OPERAND: tl.constexpr):
    _store_rounded_by(row, at, x, _random_words(at))


@triton.jit
def _store_bf16_dither(row, at, x, OPERAND: tl.constexpr):
    _store_rounded_by(row, at, x, _dither(at, OPERAND, 16))


# A float32 split between a bfloat16 and a remainder.


@triton.jit
def _joined(high, remainder, at):
    """``high``: a bfloat16's bits, in the high half of 32. ``remainder``: int32."""
    joined = high + remainder.to(tl.uint32, bitcast=True)
    if at.finite is None:
        # A zero has no negative remainder unless somebody wrote it to the parameter: then there is none.
        # No other sum changes its sign. (Where values are finite, the sum is a NaN, and so is the new one.)
        joined = tl.where((joined ^ high).to(tl.int32) < 0, high, joined)
    return _float_of(joined)


@triton.jit
def _load_split16(row, at):
    return _load_halves(row, at), _load_halves(row + AUX, at)


@triton.jit
def _decode_split16(parts, at):
    high, remainder = parts
    return _joined(_high_halves(high), _high_halves(remainder).to(tl.int32) >> 16, at)


@triton.jit
def _store_split16(row, at, x, OPERAND: tl.constexpr):
    bits = _canonical_bits(x, at)
    _store_high_halves(row, at, bits + 0x8000)
    _store_high_halves(row + AUX, at, bits << 16)


@triton.jit
def _load_split8(row, at):
    return _load_halves(row, at), _load_bytes(row + AUX, at)


@triton.jit
def _decode_split8(parts, at):
    high, remainder = parts
    if at.ptx is not None:
        # A zero, the byte, and its sign twice.
        even = tl.join(_bytes_of(remainder, 0, 0x8804), _bytes_of(remainder, 0, 0xAA24))
        odd = tl.join(_bytes_of(remainder, 0, 0x9914), _bytes_of(remainder, 0, 0xBB34))
        remainder = tl.reshape(tl.join(even, odd), [4 * remainder.shape[0]]).to(tl.int32)
    else:
        remainder = (_high_bytes(remainder).to(tl.int32) >> 16) & -0x100
    return _joined(_high_halves(high), remainder, at)


@triton.jit
def _store_split8(row, at, x, OPERAND: tl.constexpr):
    bits, dither = _canonical_bits(x, at), _dither(at, OPERAND, 8)
    if at.finite is None:
        # The largest finite values are cut: no dither carries them to infinity.
        dither = tl.where((bits & 0x7FFFFFFF) >= 0x7F7FFF00, 0, dither)
    bits += dither
    _store_high_halves(row, at, bits + 0x8000)
    _store_bytes(row + AUX, at, bits, 1)


# Moments of 8 bits, with an exponent for each block.


@triton.jit
def _of_each(exponent, COUNT: tl.constexpr):
    """A block's exponent for each of COUNT: its BLOCK elements, or the 16 threads that hold these."""
    N: tl.constexpr = exponent.shape[0]
    return tl.reshape(tl.broadcast_to(exponent[:, None], [N, COUNT]), [N * COUNT])


@triton.jit
def _load_codes(row, at):
    """Codes and their blocks' exponents."""
    block = at.start // BLOCK + tl.arange(0, at.offset.shape[0] // BLOCK)
    exponents = tl.load(row + AUX).to(tl.pointer_type(tl.uint8)) + block
    return _load_bytes(row, at), tl.load(exponents, at.block_mask).to(tl.int32)


@triton.jit
def _new_exponents(row, at, x, ORDERS: tl.constexpr):
    """For each block the exponent that is ORDERS below that of its largest finite value, stored."""
    N: tl.constexpr = x.shape[0] // BLOCK
    if at.mask is not None:
        magnitude = magnitude_bits(x)
        magnitude = tl.where(at.mask & (magnitude < INF), magnitude, 0)
    else:
        magnitude = largest_of_eight(x)
    largest = tl.max(tl.reshape(magnitude, [N, magnitude.shape[0] // N]), 1)
    exponent = tl.maximum((largest >> 23) - ORDERS, 0)
    # Stored as one value a block, exponents would go through shared memory.
    thread = tl.arange(0, 16 * N)
    first = (thread & 15) == 0
    if at.mask is not None:
        first = first & _of_each(at.block_mask, 16)
    exponents = tl.load(row + AUX).to(tl.pointer_type(tl.uint8)) + (at.start // BLOCK + (thread >> 4))
    tl.store(exponents, _of_each(exponent.to(tl.uint8), 16), first)
    return exponent


@triton.jit
def _with_specials(code, magnitude, exponent, INFINITY: tl.constexpr):
    """Codes of infinity and, after it, NaN. No finite value is rounded to infinity, of which 2040
    is the code under exponent 0."""
    code = tl.minimum(code, _of_each(2039 - 8 * exponent, BLOCK))
    return tl.where(magnitude >= INF, tl.minimum(magnitude - (INF - INFINITY), INFINITY + 1), code)


@triton.jit
def _decode_e5m3(parts, at):
    stored, exponent = parts
    code = ((_high_bytes(stored) >> 4) & 0x0FF00000).to(tl.int32)
    bits = tl.where(code == 0, 0, code + _of_each(exponent << 23, BLOCK))
    if at.finite is None:
        bits = tl.where(code >= (254 << 20), (code << 2) + (INF - (254 << 22)), bits)
    return _float_of(bits)


@triton.jit
def _special_e5m3(words):
    """254 and 255."""
    return ((words & 0x7F7F7F7F) + 0x02020202) & words & 0x80808080


@triton.jit
def _store_e5m3(row, at, x, OPERAND: tl.constexpr):
    magnitude = magnitude_bits(x) if at.finite is None else _bits_of(x).to(tl.int32)
    exponent = _new_exponents(row, at, x, 30)
    code = ((magnitude + _dither(at, OPERAND, 20).to(tl.int32)) >> 20) - _of_each(8 * exponent, BLOCK)
    code = tl.minimum(tl.maximum(code, 1), magnitude)  # zero is the only value below its code
    if at.finite is None:
        code = _with_specials(code, magnitude, exponent, 254)
    _store_bytes(row, at, code.to(tl.uint32), 0)


# A finite code of e4m3, shifted, is a float32 of the value under exponent 0, subnormal values too. The
# exponent is a power of two to multiply by, in two factors since float32 has none above 2^127.


@triton.jit
def _decode_e4m3(parts, at):
    stored, exponent = parts
    x = (_high_bytes(stored).to(tl.int32) >> 4) & -0x78100000
    y = _float_of(x) * 2.0**120 * _of_each(_float_of((exponent + 7) << 23), BLOCK)
    if at.finite is None:
        special = ((x << 2) + (INF - (126 << 22))) | (x & -0x80000000)
        y = tl.where((x & 0x7FFFFFFF) >= (126 << 20), _float_of(special), y)
    return y


# Four codes, which a GPU since sm_89 converts itself: 1.3 to 2.9 instructions less an element. Only finite
# ones, for 126 is 448 to it. Codes have the same bias, so that no factor of 2^120 is needed.
CONVERT_E4M3 = tl.constexpr("""{ .reg .b16 %code<2>; .reg .b16 %half<4>; .reg .b32 %pair<2>;
    mov.b32 {%code0, %code1}, $4; cvt.rn.f16x2.e4m3x2 %pair0, %code0; cvt.rn.f16x2.e4m3x2 %pair1, %code1;
    mov.b32 {%half0, %half1}, %pair0; mov.b32 {%half2, %half3}, %pair1; cvt.f32.f16 $0, %half0;
    cvt.f32.f16 $1, %half1; cvt.f32.f16 $2, %half2; cvt.f32.f16 $3, %half3; }""")


@triton.jit
def _decode_e4m3_sm89(parts, at):
    stored, exponent = parts
    if at.finite is not None:
        x0, x1, x2, x3 = tl.inline_asm_elementwise(
            CONVERT_E4M3, "=f,=f,=f,=f,r", [stored], (tl.float32,) * 4, is_pure=True, pack=1
        )
        even, odd = tl.join(x0, x2), tl.join(x1, x3)
        x = tl.reshape(tl.join(even, odd), [4 * x0.shape[0]])
        return x * _of_each(_float_of((exponent + 7) << 23), BLOCK)
    else:
        return _decode_e4m3(parts, at)


@triton.jit
def _special_e4m3(words):
    """126 and 127, with any sign."""
    return ((words & 0x7F7F7F7F) + 0x02020202) & 0x80808080


@triton.jit
def _store_e4m3(row, at, x, OPERAND: tl.constexpr):
    exponent = _new_exponents(row, at, x, 14)
    # The larger power first: a product that it rounds is zero after the other.
    half = tl.minimum(exponent, 126)
    y = x * _of_each(_float_of((127 + half - exponent) << 23), BLOCK)
    y *= _of_each(_float_of((127 - half) << 23), BLOCK)
    # The sign, and 11 bits lower the code.
    bits = _bits_of(y) + _dither(at, OPERAND, 20)
    if at.finite is None:
        magnitude = magnitude_bits(x)
        code = _with_specials(((bits & 0x7FFFFFFF) >> 20).to(tl.int32), magnitude, exponent, 126)
        # A NaN has no sign here: devices give the NaN of an operation different ones.
        sign = tl.where(magnitude > INF, 0, _bits_of(x) & 0x80000000)
        bits = sign + (code.to(tl.uint32) << 20)
    _store_bytes(row, at, (bits & 0x80000000) | (bits << 4), 3)


CODECS = {
    c.name: c
    for c in (
        Codec("fp32", _load_working, _decode_float, _store),
        Codec("fp64", _load_working, _decode_float, _store),
        Codec("fp16", _load_fp16, _decode_float, _store_fp16),
        Codec("bf16", _load_halves, _decode_bf16, _store_bf16),
        Codec("split16", _load_split16, _decode_split16, _store_split16),
        Codec("split8", _load_split8, _decode_split8, _store_split8),
        Codec("bf16_stochastic", _load_halves, _decode_bf16, _store_bf16_stochastic),
        Codec("bf16_dither", _load_halves, _decode_bf16, _store_bf16_dither),
        Codec("e4m3", _load_codes, _decode_e4m3, _store_e4m3, _special_e4m3),
        Codec("e5m3", _load_codes, _decode_e5m3, _store_e5m3, _special_e5m3),
    )
}
E4M3_SM89 = replace(CODECS["e4m3"], decode=_decode_e4m3_sm89)


def is_nvidia(target: Any, since: int) -> bool:
    """Whether a ``GPUTarget``, None in the interpreter, is an NVIDIA GPU of this architecture or newer."""
    return target is not None and target.backend == "cuda" and target.arch >= since


def codec(name: str, target: Any) -> Codec:
    """A format's functions for ``target``."""
    return E4M3_SM89 if name == "e4m3" and is_nvidia(target, 89) else CODECS[name]
