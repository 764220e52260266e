"""How values lie in memory: a load, a decode and a store for each format of
``fused_optim.storage``, under its name.

A codec is given ``row``, a pointer to the operand's address in the table (its second part's is
``EXTRA`` columns on), and ``at``, the elements. Where ``at.mask`` is None the chunk is full and
all addresses are multiples of 16 bytes: then accesses are 128 bits wide. What a load returns is
for the decode, which comes later: values take more registers than what lies in memory. A store is
also told its ``OPERAND``. Values of a format with few bits are made of integers alone: Triton's
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

NARROW = frozenset(
    ["bf16", "bf16_master", "split16", "split8", "bf16_stochastic", "bf16_dither", "e4m3", "e5m3"]
)
"""Formats of few bits, which take half the instructions where ``at.usual``."""

PARAM, MU, NU = tl.constexpr(0xA54FF53B), tl.constexpr(0x6A09E667), tl.constexpr(0xBB67AE85)
"""The operands that are stored, by what each multiplies an element's index by for its dither."""

At = namedtuple("At", "start offset mask block_mask count key usual")
"""Elements of one row.

``start``: the first one's index, a multiple of BLOCK. ``offset`` and ``mask``: every one's index, and
which there are; None for all. ``block_mask``: their blocks likewise. ``count``: the bits of the step
number, in the working precision. ``key``: where that of the parameter's random bits is. ``usual``: whether
values to be stored in a format of NARROW are below 2^127, which need no care for infinities, NaN and what
rounds to infinity, and no moment in memory is infinite or NaN: see ``step._is_usual``.
"""


@triton.jit
def _pointer(row, dtype: tl.constexpr, at):
    pointer = tl.load(row).to(tl.pointer_type(dtype))
    if at.mask is None:
        # On the pointer, not on the integer: the hint does not survive the cast.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _pointers(row, dtype: tl.constexpr, at, EACH: tl.constexpr):
    """To every item, each of EACH elements."""
    return _pointer(row, dtype, at) + (at.start // EACH + tl.arange(0, at.offset.shape[0] // EACH))


@triton.jit
def _load(row, dtype: tl.constexpr, at):
    return tl.load(_pointers(row, dtype, at, 1), at.mask)


@triton.jit
def _store(row, at, x):
    tl.store(_pointers(row, x.dtype, at, 1), x, at.mask)


# Narrow values are read as words that hold neighbours, and taken out by shifts and masks, and bytes are
# written so too. Left to itself LLVM makes vectors of bytes and halves, in two or three instructions a
# value. (Halves beside float32 moments are few, and take up to 12 registers less as they are; written,
# two take one instruction less as they are.)


@triton.jit
def _load_halves(row, at):
    if at.usual is not None:
        return tl.load(_pointers(row, tl.uint32, at, 2))
    else:
        return _load(row, tl.uint16, at)


@triton.jit
def _high_halves(halves):
    """What :func:`_load_halves` read, each in the high half of 32 bits."""
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
    """What :func:`_load_bytes` read, each in the highest byte of 32 bits, with others below."""
    if b.dtype == tl.uint32:
        even = tl.join(b << 24, b << 8)
        odd = tl.join(b << 16, b)
        return tl.reshape(tl.join(even, odd), [4 * b.shape[0]])
    else:
        return b.to(tl.uint32) << 24


@triton.jit
def _store_bytes(row, at, x):
    """``x``: at most 255 in a full chunk."""
    if at.mask is None:
        even, odd = tl.split(tl.reshape(x, [x.shape[0] // 4, 2, 2]))
        b0, b2 = tl.split(even)
        b1, b3 = tl.split(odd)
        # A shift and an addition are one instruction, a shift and an "or" are two.
        words = ((b3 * 256 + b2) * 256 + b1) * 256 + b0
        tl.store(_pointers(row, tl.uint32, at, 4), words)
    else:
        _store(row, at, x.to(tl.uint8))


@triton.jit
def load_fp32(row, at):
    return _load(row, tl.float32, at)


@triton.jit
def decode_fp32(x, at):
    return x


@triton.jit
def store_fp32(row, at, x, OPERAND: tl.constexpr):
    _store(row, at, x)


@triton.jit
def load_fp64(row, at):
    return _load(row, tl.float64, at)


@triton.jit
def decode_fp64(x, at):
    return x


@triton.jit
def store_fp64(row, at, x, OPERAND: tl.constexpr):
    _store(row, at, x)


@triton.jit
def load_fp16(row, at):
    return _load(row, tl.float16, at)


@triton.jit
def decode_fp16(x, at):
    return x.to(tl.float32)


@triton.jit
def store_fp16(row, at, x, OPERAND: tl.constexpr):
    _store(row, at, x.to(tl.float16))


@triton.jit
def load_bf16(row, at):
    return _load_halves(row, at)


@triton.jit
def decode_bf16(halves, at):
    return _float_of(_high_halves(halves))


@triton.jit
def store_bf16(row, at, x, OPERAND: tl.constexpr):
    _store_high_halves(row, at, _nearest_bf16(x, at))


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
    """Of each eight neighbours, which a thread holds in a full chunk."""
    return tl.max(tl.reshape(x, [x.shape[0] // 8, 8]), 1)


@triton.jit
def _canonical_bits(x, at):
    bits = _bits_of(x)
    if at.usual is None:
        bits = tl.where(magnitude_bits(x) > INF, 0x7FC00000, bits)
    return bits


@triton.jit
def _nearest_bf16(x, at):
    """In the high half of 32 bits; what is below does not count."""
    bits = _canonical_bits(x, at)
    return bits + 0x7FFF + ((bits >> 16) & 1)


# Random bits, as in fused_optim.rounding.


@triton.jit
def _dither(at, OPERAND: tl.constexpr, BITS: tl.constexpr):
    weyl = _bits_of(at.count) * 0x9E3779B9
    # Eight neighbours, which one thread holds, are constants apart.
    N: tl.constexpr = at.offset.shape[0] // 8
    first = at.start.to(tl.uint32) + 8 * tl.arange(0, N).to(tl.uint32)
    dither = (first * OPERAND + weyl)[:, None] + (tl.arange(0, 8).to(tl.uint32) * OPERAND)[None, :]
    return tl.reshape(dither, [8 * N]) >> (32 - BITS)


@triton.jit
def _random_words(at):
    """16 bits for each element. Eight neighbours, which one thread holds, share one evaluation."""
    N: tl.constexpr = at.offset.shape[0] // 8
    group = (at.start >> 3) + tl.arange(0, N)
    c0 = group.to(tl.uint32)
    c1 = (group >> 32).to(tl.uint32)
    c2 = tl.zeros([N], tl.uint32) + _bits_of(at.count)
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
    neighbour = tl.arange(0, 8)[None, :]
    low = tl.where(neighbour < 2, c0[:, None], c1[:, None])
    high = tl.where(neighbour < 6, c2[:, None], c3[:, None])
    word = tl.where(neighbour < 4, low, high) >> (16 * (neighbour & 1)).to(tl.uint32)
    return tl.reshape(word & 0xFFFF, [8 * N])


# Parameters.


@triton.jit
def load_bf16_master(row, at):
    return _load_halves(row, at), load_fp32(row + EXTRA, at)


@triton.jit
def decode_bf16_master(parts, at):
    halves, master = parts
    param = _high_halves(halves)
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
    return _load(row, tl.float16, at), master


@triton.jit
def decode_fp16_master(parts, at):
    stored, master = parts
    ours = master.to(tl.float16).to(tl.uint16, bitcast=True) == stored.to(tl.uint16, bitcast=True)
    return tl.where(ours, master, stored.to(tl.float32))


@triton.jit
def store_fp16_master(row, at, x, OPERAND: tl.constexpr):
    store_fp16(row, at, x, OPERAND)
    store_fp32(row + EXTRA, at, x, OPERAND)


@triton.jit
def _signed(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _joined(high, rest, at):
    """``high``: a bfloat16's bits, in the high half of 32. ``rest``: int32."""
    joined = high + rest.to(tl.uint32, bitcast=True)
    if at.usual is None:
        # A zero has no negative rest unless somebody wrote it to the parameter: then there is none. No
        # other sum changes its sign. (Where it is, the sum is a NaN, and so is the new parameter.)
        joined = tl.where(_signed(joined ^ high) < 0, high, joined)
    return _float_of(joined)


@triton.jit
def load_split16(row, at):
    return _load_halves(row, at), _load_halves(row + EXTRA, at)


@triton.jit
def decode_split16(parts, at):
    high, rest = parts
    return _joined(_high_halves(high), _signed(_high_halves(rest)) >> 16, at)


@triton.jit
def store_split16(row, at, x, OPERAND: tl.constexpr):
    bits = _canonical_bits(x, at)
    _store_high_halves(row, at, bits + 0x8000)
    _store_high_halves(row + EXTRA, at, bits << 16)


@triton.jit
def load_split8(row, at):
    return _load_halves(row, at), _load_bytes(row + EXTRA, at)


@triton.jit
def decode_split8(parts, at):
    high, rest = parts
    return _joined(_high_halves(high), (_signed(_high_bytes(rest)) >> 16) & -0x100, at)


@triton.jit
def store_split8(row, at, x, OPERAND: tl.constexpr):
    bits, dither = _canonical_bits(x, at), _dither(at, OPERAND, 8)
    if at.usual is None:
        # The largest finite values are cut: no dither carries them to infinity.
        dither = tl.where((bits & 0x7FFFFFFF) >= 0x7F7FFF00, 0, dither)
    bits += dither
    _store_high_halves(row, at, bits + 0x8000)
    _store_bytes(row + EXTRA, at, (bits >> 8) & 0xFF)


@triton.jit
def _round_to_bf16(x, word, at):
    """In the high half of 32 bits; what is below does not count."""
    if at.usual is None:
        word = tl.where(magnitude_bits(x) >= 0x7F7F0000, 0x8000, word)
    return _canonical_bits(x, at) + word


@triton.jit
def _round_to_fp16(x, word):
    magnitude = magnitude_bits(x)
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
def decode_bf16_stochastic(halves, at):
    return decode_bf16(halves, at)


@triton.jit
def store_bf16_stochastic(row, at, x, OPERAND: tl.constexpr):
    _store_high_halves(row, at, _round_to_bf16(x, _random_words(at), at))


@triton.jit
def load_fp16_stochastic(row, at):
    return load_fp16(row, at)


@triton.jit
def decode_fp16_stochastic(x, at):
    return decode_fp16(x, at)


@triton.jit
def store_fp16_stochastic(row, at, x, OPERAND: tl.constexpr):
    _store(row, at, _round_to_fp16(x, _random_words(at)).to(tl.float16, bitcast=True))


# Moments.


@triton.jit
def load_bf16_dither(row, at):
    return load_bf16(row, at)


@triton.jit
def decode_bf16_dither(halves, at):
    return decode_bf16(halves, at)


@triton.jit
def store_bf16_dither(row, at, x, OPERAND: tl.constexpr):
    _store_high_halves(row, at, _round_to_bf16(x, _dither(at, OPERAND, 16), at))


@triton.jit
def _of_elements(base):
    """A block's base for each of its elements."""
    N: tl.constexpr = base.shape[0]
    return tl.reshape(tl.broadcast_to(base[:, None], [N, BLOCK]), [N * BLOCK])


@triton.jit
def _of_threads(base):
    """A block's base for each of the 16 threads that hold it in a full chunk."""
    N: tl.constexpr = base.shape[0]
    return tl.reshape(tl.broadcast_to(base[:, None], [N, 16]), [16 * N])


@triton.jit
def _load_base(row, at):
    block = at.start // BLOCK + tl.arange(0, at.offset.shape[0] // BLOCK)
    return tl.load(tl.load(row + EXTRA).to(tl.pointer_type(tl.uint8)) + block, at.block_mask).to(tl.int32)


@triton.jit
def _power_of_two(exponent):
    return _float_of((exponent + 127) << 23)


@triton.jit
def _new_base(row, at, magnitude, ORDERS: tl.constexpr):
    """For each block the exponent that is ORDERS below that of its largest finite value, stored."""
    N: tl.constexpr = magnitude.shape[0] // BLOCK
    if at.mask is not None:
        magnitude = tl.where(at.mask & (magnitude < INF), magnitude, 0)
    largest = tl.max(tl.reshape(magnitude, [N, BLOCK]), 1)
    base = tl.maximum((largest >> 23) - ORDERS, 0)
    # Stored as one value a block, bases would go through shared memory.
    thread = tl.arange(0, 16 * N)
    first = (thread & 15) == 0
    if at.mask is not None:
        first = first & _of_threads(at.block_mask)
    bases = tl.load(row + EXTRA).to(tl.pointer_type(tl.uint8))
    tl.store(bases + (at.start // BLOCK + (thread >> 4)), _of_threads(base.to(tl.uint8)), first)
    return base


@triton.jit
def _unusual(code, magnitude, base, INFINITY: tl.constexpr):
    """Codes of infinity and, after it, NaN; and no finite value is rounded to infinity, of which 2040
    is the code under base 0."""
    code = tl.minimum(code, _of_elements(2039 - 8 * base))
    return tl.where(magnitude >= INF, tl.minimum(magnitude - (INF - INFINITY), INFINITY + 1), code)


@triton.jit
def load_e5m3(row, at):
    return _load_bytes(row, at), _of_elements(_load_base(row, at) << 23)


@triton.jit
def decode_e5m3(parts, at):
    stored, base = parts
    code = ((_high_bytes(stored) >> 4) & 0x0FF00000).to(tl.int32)
    bits = tl.where(code == 0, 0, code + base)
    if at.usual is None:
        bits = tl.where(code >= (254 << 20), (code << 2) + (INF - (254 << 22)), bits)
    return _float_of(bits)


@triton.jit
def special_e5m3(words):
    """Not zero where a byte is 254 or 255."""
    return ((words & 0x7F7F7F7F) + 0x02020202) & words & 0x80808080


@triton.jit
def store_e5m3(row, at, x, OPERAND: tl.constexpr):
    magnitude = magnitude_bits(x)
    base = _new_base(row, at, magnitude, 30)
    code = ((magnitude + _dither(at, OPERAND, 20).to(tl.int32)) >> 20) - _of_elements(8 * base)
    code = tl.minimum(tl.maximum(code, 1), magnitude)  # zero is the only one below its code
    if at.usual is None:
        code = _unusual(code, magnitude, base, 254)
    _store_bytes(row, at, code.to(tl.uint32))


# A finite code, shifted, is a float32 of the value under base 0, subnormal values too: the base is a
# power of two to multiply by, in two factors since float32 has none above 2^127.


@triton.jit
def load_e4m3(row, at):
    return _load_bytes(row, at), _load_base(row, at)


@triton.jit
def decode_e4m3(parts, at):
    stored, base = parts
    x = (_signed(_high_bytes(stored)) >> 4) & -0x78100000
    y = _float_of(x) * 2.0**120 * _of_elements(_power_of_two(base - 120))
    if at.usual is None:
        special = ((x << 2) + (INF - (126 << 22))) | (x & -0x80000000)
        y = tl.where((x & 0x7FFFFFFF) >= (126 << 20), _float_of(special), y)
    return y


@triton.jit
def special_e4m3(words):
    """Not zero where a byte is 126 or 127, or that with a sign."""
    return ((words & 0x7F7F7F7F) + 0x02020202) & 0x80808080


@triton.jit
def store_e4m3(row, at, x, OPERAND: tl.constexpr):
    magnitude = magnitude_bits(x)
    base = _new_base(row, at, magnitude, 14)
    # The larger power first: a product that it rounds is zero after the other.
    half = tl.minimum(base, 126)
    y = tl.abs(x) * _of_elements(_power_of_two(half - base)) * _of_elements(_power_of_two(-half))
    code = (_bits_of(y) + _dither(at, OPERAND, 20)) >> 20
    sign = (_bits_of(x) >> 24) & 0x80
    if at.usual is None:
        code = _unusual(code.to(tl.int32), magnitude, base, 126).to(tl.uint32)
        # A NaN has no sign here: devices give the NaN of an operation different ones.
        sign = tl.where(magnitude > INF, 0, sign)
    _store_bytes(row, at, code | sign)
