"""How values lie in memory: a load and a store for each format of
``fused_optim.storage``, under its name.

A codec is given ``row``, a pointer to the operand's address in the table (its second part's is
``EXTRA`` columns on), and ``at``, the elements. Where ``at.mask`` is None the chunk is full and
all addresses are multiples of 16 bytes: then accesses are 128 bits wide. A store is also told
its ``OPERAND``. Values of a format with few bits are made of integers alone: Triton's
interpreter rounds float32 to bfloat16 otherwise than a GPU does.
"""

from __future__ import annotations

from collections import namedtuple

import triton
import triton.language as tl

EXTRA = tl.constexpr(3)
BLOCK = tl.constexpr(128)
"""Elements that share one base in the 8-bit formats."""
INF = tl.constexpr(0x7F800000)

PARAM, MU, NU = tl.constexpr(0xA54FF53B), tl.constexpr(0x6A09E667), tl.constexpr(0xBB67AE85)
"""The operands that are stored, by what each multiplies an element's index by for its dither."""

At = namedtuple("At", "start offset mask block block_mask count key")
"""Elements of one row.

``start``: the first one's index, a multiple of BLOCK. ``offset`` and ``mask``: every one's index, and
which there are; None for all. ``block`` and ``block_mask``: their blocks likewise. ``count``: the bits
of the step number, in the working precision. ``key``: of the parameter's random bits.
"""


@triton.jit
def _pointer(row, dtype: tl.constexpr, at):
    pointer = tl.load(row).to(tl.pointer_type(dtype))
    if at.mask is None:
        # On the pointer, not on the integer: the hint does not survive the cast.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(row, dtype: tl.constexpr, at):
    return tl.load(_pointer(row, dtype, at) + at.offset, at.mask)


@triton.jit
def _store(row, at, x):
    tl.store(_pointer(row, x.dtype, at) + at.offset, x, at.mask)


@triton.jit
def load_fp32(row, at):
    return _load(row, tl.float32, at)


@triton.jit
def store_fp32(row, at, x, OPERAND: tl.constexpr):
    _store(row, at, x)


@triton.jit
def load_fp64(row, at):
    return _load(row, tl.float64, at)


@triton.jit
def store_fp64(row, at, x, OPERAND: tl.constexpr):
    _store(row, at, x)


@triton.jit
def load_fp16(row, at):
    return _load(row, tl.float16, at).to(tl.float32)


@triton.jit
def store_fp16(row, at, x, OPERAND: tl.constexpr):
    _store(row, at, x.to(tl.float16))


@triton.jit
def load_bf16(row, at):
    return _float_of(_load(row, tl.uint16, at).to(tl.uint32) << 16)


@triton.jit
def store_bf16(row, at, x, OPERAND: tl.constexpr):
    _store(row, at, _nearest_bf16(x))


@triton.jit
def _bits_of(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _magnitude(x):
    return (_bits_of(x) & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _canonical_bits(x):
    return tl.where(_magnitude(x) > INF, 0x7FC00000, _bits_of(x))


@triton.jit
def _nearest_bf16(x):
    bits = _canonical_bits(x)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)


# Random bits, as in fused_optim.rounding.


@triton.jit
def _dither(at, OPERAND: tl.constexpr, BITS: tl.constexpr):
    weyl = _bits_of(at.count) * 0x9E3779B9
    return (at.offset.to(tl.uint32) * OPERAND + weyl) >> (32 - BITS)


@triton.jit
def _random_words(at):
    """16 bits for each element. Eight neighbours, which one thread holds, share one evaluation."""
    N: tl.constexpr = at.offset.shape[0] // 8
    group = (at.start >> 3) + tl.arange(0, N)
    c0 = group.to(tl.uint32)
    c1 = (group >> 32).to(tl.uint32)
    c2 = tl.zeros([N], tl.uint32) + _bits_of(at.count)
    c3 = tl.zeros([N], tl.uint32)
    k0 = at.key.to(tl.uint32)
    k1 = (at.key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    neighbour = tl.arange(0, 8)[None, :]
    low = tl.where(neighbour < 2, c0[:, None], c1[:, None])
    high = tl.where(neighbour < 6, c2[:, None], c3[:, None])
    word = tl.where(neighbour < 4, low, high) >> (16 * (neighbour & 1)).to(tl.uint32)
    return tl.reshape(word & 0xFFFF, [8 * N])


# Parameters.


@triton.jit
def load_bf16_master(row, at):
    master = load_fp32(row + EXTRA, at)
    param = _load(row, tl.uint16, at).to(tl.uint32) << 16
    # Half a unit apart at most, unless somebody wrote to the parameter; in int32, which wraps.
    apart = (_bits_of(master) - param).to(tl.int32, bitcast=True)
    return tl.where((apart >= -0x8000) & (apart <= 0x8000), master, _float_of(param))


@triton.jit
def store_bf16_master(row, at, x, OPERAND: tl.constexpr):
    store_bf16(row, at, x, OPERAND)
    store_fp32(row + EXTRA, at, x, OPERAND)


@triton.jit
def load_fp16_master(row, at):
    master = load_fp32(row + EXTRA, at)
    stored = _load(row, tl.float16, at)
    ours = master.to(tl.float16).to(tl.uint16, bitcast=True) == stored.to(tl.uint16, bitcast=True)
    return tl.where(ours, master, stored.to(tl.float32))


@triton.jit
def store_fp16_master(row, at, x, OPERAND: tl.constexpr):
    store_fp16(row, at, x, OPERAND)
    store_fp32(row + EXTRA, at, x, OPERAND)


@triton.jit
def _joined(high, rest):
    # A zero has no negative rest unless somebody wrote it to the parameter: then there is none.
    written = ((high & 0x7FFF) == 0) & (rest < 0)
    return _float_of((high << 16) + tl.where(written, 0, rest).to(tl.uint32))


@triton.jit
def load_split16(row, at):
    return _joined(_load(row, tl.uint16, at).to(tl.uint32), _load(row + EXTRA, tl.int16, at).to(tl.int32))


@triton.jit
def store_split16(row, at, x, OPERAND: tl.constexpr):
    bits = _canonical_bits(x)
    _store(row, at, ((bits + 0x8000) >> 16).to(tl.uint16))
    _store(row + EXTRA, at, bits.to(tl.uint16))


@triton.jit
def load_split8(row, at):
    rest = _load(row + EXTRA, tl.int8, at).to(tl.int32) << 8
    return _joined(_load(row, tl.uint16, at).to(tl.uint32), rest)


@triton.jit
def store_split8(row, at, x, OPERAND: tl.constexpr):
    bits = _canonical_bits(x)
    # The largest finite values are cut: no dither carries them to infinity.
    bits += tl.where((bits & 0x7FFFFFFF) >= 0x7F7FFF00, 0, _dither(at, OPERAND, 8))
    bits = bits & 0xFFFFFF00
    _store(row, at, ((bits + 0x8000) >> 16).to(tl.uint16))
    _store(row + EXTRA, at, (bits >> 8).to(tl.uint8))


@triton.jit
def _round_to_bf16(x, word):
    word = tl.where(_magnitude(x) >= 0x7F7F0000, 0x8000, word)
    return ((_canonical_bits(x) + word) >> 16).to(tl.uint16)


@triton.jit
def _round_to_fp16(x, word):
    magnitude = _magnitude(x)
    word = tl.where(magnitude >= 0x477FE000, 0x8000, word).to(tl.int32)  # the largest float16
    normal = (magnitude - 0x38000000 + (word >> 3)) >> 13
    small = magnitude < 0x38800000  # 2^-14
    fixed = (tl.where(small, tl.abs(x), 0.0) * 1099511627776.0).to(tl.int32)  # 2^40
    h = tl.where(small, (fixed + word) >> 16, normal)
    h = tl.where(magnitude >= 0x47800000, 0x7C00, h).to(tl.uint32) | ((_bits_of(x) >> 16) & 0x8000)
    return tl.where(magnitude > INF, 0x7E00, h).to(tl.uint16)


@triton.jit
def load_bf16_stochastic(row, at):
    return load_bf16(row, at)


@triton.jit
def store_bf16_stochastic(row, at, x, OPERAND: tl.constexpr):
    _store(row, at, _round_to_bf16(x, _random_words(at)))


@triton.jit
def load_fp16_stochastic(row, at):
    return load_fp16(row, at)


@triton.jit
def store_fp16_stochastic(row, at, x, OPERAND: tl.constexpr):
    _store(row, at, _round_to_fp16(x, _random_words(at)).to(tl.float16, bitcast=True))


# Moments.


@triton.jit
def load_bf16_dither(row, at):
    return load_bf16(row, at)


@triton.jit
def store_bf16_dither(row, at, x, OPERAND: tl.constexpr):
    _store(row, at, _round_to_bf16(x, _dither(at, OPERAND, 16)))


@triton.jit
def _bases(row, at):
    return tl.load(row + EXTRA).to(tl.pointer_type(tl.uint8)) + at.block


@triton.jit
def _of_elements(base):
    """A block's base for each of its elements."""
    N: tl.constexpr = base.shape[0]
    return tl.reshape(tl.broadcast_to(base[:, None], [N, BLOCK]), [N * BLOCK])


@triton.jit
def _load_base(row, at):
    return tl.load(_bases(row, at), at.block_mask).to(tl.int32)


@triton.jit
def _power_of_two(exponent):
    return _float_of((exponent + 127) << 23)


@triton.jit
def _new_base(row, at, magnitude, ORDERS: tl.constexpr):
    """For each block the exponent that is ORDERS below that of its largest finite value, stored."""
    N: tl.constexpr = magnitude.shape[0] // BLOCK
    # One exponent more makes infinities and NaN negative.
    finite = (magnitude.to(tl.uint32) + 0x00800000).to(tl.int32)
    if at.mask is not None:
        finite = tl.where(at.mask, finite, 0)
    largest = tl.max(tl.reshape(finite, [N, BLOCK]), 1)
    base = tl.maximum((largest >> 23) - (ORDERS + 1), 0)
    # 16 threads hold a block in a full chunk and one of them stores: stored as one value a block,
    # bases go through shared memory. ``+ lane`` tells the compiler which threads are neighbours.
    lane = tl.arange(0, 16)[None, :]
    first = lane == 0
    if at.mask is not None:
        first = first & at.block_mask[:, None]
    stored = tl.broadcast_to(base.to(tl.uint8)[:, None], [N, 16])
    tl.store(_bases(row, at)[:, None] + lane, stored, first)
    return base


@triton.jit
def _or_special(code, magnitude, INFINITY: tl.constexpr):
    """``code``, or INFINITY of infinities and the next one of NaN."""
    return tl.where(magnitude >= INF, tl.minimum(magnitude - (INF - INFINITY), INFINITY + 1), code)


@triton.jit
def load_e5m3(row, at):
    code = _load(row, tl.uint8, at).to(tl.int32)
    bits = (code << 20) + _of_elements(_load_base(row, at) << 23)
    bits = tl.where(code == 0, 0, bits)
    return _float_of(tl.where(code >= 254, ((code - 254) << 22) + INF, bits))


@triton.jit
def store_e5m3(row, at, x, OPERAND: tl.constexpr):
    magnitude = _magnitude(x)
    base = _new_base(row, at, magnitude, 30)
    code = ((magnitude + _dither(at, OPERAND, 20).to(tl.int32)) >> 20) - _of_elements(8 * base)
    # At least 1, but for zero; at most 248 and the largest finite float32's, 2039.
    limit = _of_elements(tl.minimum(248, 2039 - 8 * base))
    code = tl.minimum(tl.maximum(code, tl.minimum(magnitude, 1)), limit)
    code = _or_special(code, magnitude, 254)
    _store(row, at, code.to(tl.uint8))


# A finite code, shifted, is a float32 of the value under base 0, subnormal values too: the base is a
# power of two to multiply by, in two factors since float32 has none above 2^127.


@triton.jit
def load_e4m3(row, at):
    stored = _load(row, tl.int8, at).to(tl.int32)
    x = (stored << 20) & -0x78100000
    base = _load_base(row, at)
    half = tl.minimum(base, 127)
    y = _float_of(x) * _of_elements(_power_of_two(half)) * _of_elements(_power_of_two(base - half))
    special = ((x << 2) + (INF - (126 << 22))) | (x & -0x80000000)
    return tl.where((x & 0x7FFFFFFF) >= (126 << 20), _float_of(special), y)


@triton.jit
def store_e4m3(row, at, x, OPERAND: tl.constexpr):
    magnitude = _magnitude(x)
    base = _new_base(row, at, magnitude, 14)
    # The larger power first: a product that it rounds is zero after the other.
    half = tl.minimum(base, 126)
    y = tl.abs(x) * _of_elements(_power_of_two(half - base)) * _of_elements(_power_of_two(-half))
    code = (_magnitude(y) + _dither(at, OPERAND, 20).to(tl.int32)) >> 20
    code = tl.minimum(code, _of_elements(tl.minimum(120, 2039 - 8 * base)))
    code = _or_special(code, magnitude, 126)
    _store(row, at, (code.to(tl.uint32) | ((_bits_of(x) >> 24) & 0x80)).to(tl.uint8))
