"""What a compiler made of a kernel, run with no GPU: an emulator of the part of NVIDIA's PTX that
Triton and nvcc make of ours.

Each instruction runs at once for all threads of all blocks: a register is a NumPy array. It knows no
contracted, approximate or flushing operation but three of inline assembly, which no compiler chose, and
refuses whatever it does not know. Of threads that are apart, those go on that are least far; what holds in
another order too is left to the checks of every access: that it is aligned, within what was allocated, and
ordered by a barrier before or after what another thread does there.

Source: the PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import bench.kernels

WARP = 32
Array = np.ndarray[Any, Any]

TYPES = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "pred": np.dtype(bool),
}


class Fault(Exception):
    """What a kernel must not do, and where it does it."""


class Unknown(Exception):
    """An instruction that the emulator does not know."""


UNREADABLE = (Unknown, AttributeError, IndexError, KeyError, TypeError, ValueError)
"""What comes of an instruction of another form."""


@dataclass(frozen=True)
class Address:
    base: str
    offset: int


@dataclass(frozen=True)
class FloatBits:
    bits: int
    size: int


class Instruction(NamedTuple):
    """``operands``: names, integers, :class:`FloatBits`, :class:`Address` and, for ``{a, b}`` and ``a|b``,
    tuples of them."""

    text: str
    guard: str
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Any, ...]

    @property
    def type(self) -> str:
        return self.modifiers[-1]


def _operand(text: str) -> Any:
    text = text.strip()
    if text.startswith("{"):
        return tuple(map(_operand, text.strip("{}").split(",")))
    if "|" in text:
        return tuple(map(_operand, text.split("|")))
    if text.startswith("["):
        base, _, offset = re.sub(r"\s", "", text.strip("[]")).partition("+")
        return Address(base, int(offset or "0", 0))
    if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}|0[dD][0-9A-Fa-f]{16}", text):
        return FloatBits(int("0x" + text[2:], 0), 4 if len(text) == 10 else 8)
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return text


@dataclass
class Kernel:
    """One entry of a PTX file.

    ``threads``: of a block. ``parameters``: names and sizes in bytes. ``registers``: types by prefix.
    ``labels``: the instructions that they stand before. ``shared``: the name of its shared memory, of the
    size that a launch gives.
    """

    name: str
    threads: int
    parameters: dict[str, int] = field(default_factory=dict)
    registers: dict[str, np.dtype[Any]] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: str = ""


def parse(ptx: str) -> list[Kernel]:
    """The kernels of a PTX file."""
    kernels = [parse_entry(entry) for entry in re.split(r"\.entry\s+", ptx)[1:]]
    for shared in re.findall(r"\.extern \.shared [^;]*?(\w+)\[\];", ptx):
        for kernel in kernels:
            kernel.shared = shared
    return kernels


def parse_entry(text: str) -> Kernel:
    """A kernel, from its name on."""
    # What stands in inline assembly gets names of its own.
    text = bench.kernels.INLINE.sub(lambda m: re.sub(r"\b(fma|rcp|rsqrt)\.", r"inline_\1.", m[0]), text)
    text = re.sub(r"//[^\n]*", "", text)
    head, _, body = re.split(r"^}", text, maxsplit=1, flags=re.MULTILINE)[0].partition("{")
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)(?:, 1)*\s*$", head, re.MULTILINE)
    if threads is None:
        raise Fault(f"{head}: does not say how many threads a block has")
    kernel = Kernel(head.partition("(")[0].strip(), int(threads[1]))
    for kind, name, count in re.findall(
        r"\.param\s+(?:\.align \d+ )?\.(\w+)\s[^,)]*?(\w+)(?:\[(\d+)\])?\s*[,)]", head
    ):
        kernel.parameters[name] = TYPES[kind].itemsize * int(count or 1)
    for kind, prefix in re.findall(r"\.reg\s+\.(\w+)\s+(%\w+?)<\d+>;", body):
        kernel.registers[prefix] = TYPES[kind] if kind == "pred" else np.dtype(f"u{TYPES[kind].itemsize}")
    # What is no instruction begins with a point; braces of a block, unlike an operand's, begin a statement.
    body = re.sub(r"^\s*\.(?!reg)[^\n]*|\.reg [^;]*;", "", body, flags=re.MULTILINE)
    for statement in re.split(r"[;\n]", re.sub(r"(\$?\w+):(?!:)", r"\n\1:\n", body)):
        statement = " ".join(statement.split()).lstrip("{} ")
        if statement.endswith(":"):
            kernel.labels[statement[:-1]] = len(kernel.instructions)
        elif statement:
            found = re.fullmatch(r"(?:@(!?%\w+) )?([a-z][\w.:]*)(?: (.*))?", statement)
            if found is None:
                raise Fault(f"{kernel.name}: cannot read {statement!r}")
            guard, opcode, rest = found.groups()
            name, *modifiers = re.split(r"\.|::", opcode)
            operands = re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{[])+", rest or "")
            kernel.instructions.append(
                Instruction(statement, guard or "", name, tuple(modifiers), tuple(map(_operand, operands)))
            )
    return kernel


# Arithmetic: a function of arrays of the instruction's type for each name.


def _shift_left(a: Array, b: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return np.where(b < bits, a << np.minimum(b, bits - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a: Array, b: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    kept = a >> np.minimum(b, bits - 1).astype(a.dtype)
    return kept if a.dtype.kind == "i" else np.where(b < bits, kept, a.dtype.type(0))


def _largest(a: Array, *others: Array) -> Array:  # of two, or on sm_100 of three
    for b in others:
        # Of a number and a NaN the number, of zeros of both signs the positive one.
        floating = a.dtype.kind == "f" and ((a == b) & np.signbit(b)) | np.isnan(b)
        a = np.where((a > b) | floating, a, b)
    return a


def _permute(a: Array, b: Array, selector: Array) -> Array:
    pair = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(pair)
    for i in range(4):
        nibble = (selector.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
        byte = (pair >> (np.uint64(8) * (nibble & np.uint64(7)))) & np.uint64(255)
        byte = np.where(nibble & np.uint64(8), np.uint64(255) * (byte >> np.uint64(7)), byte)
        result |= byte << np.uint64(8 * i)
    return result.astype(np.uint32)


def _funnel_shift(a: Array, b: Array, c: Array) -> Array:
    pair = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    return (pair << (c & np.uint32(31)).astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def _bit_field(a: Array, position: Array, length: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    spare = bits - np.minimum(length & 255, bits)
    return _shift_right(_shift_left(_shift_right(a, position & 255), spare), spare)


def fused(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c``, rounded once: in float64, where a sum that is not exact gets an odd significand."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    of_c = total - product
    lost = (product - (total - of_c)) + (c - of_c)
    bits = total.view(np.int64)
    towards = np.where((lost > 0) == (total > 0), 1, -1)
    odd = np.where(np.isfinite(lost) & (lost != 0) & (bits & 1 == 0), towards, 0)
    return (bits + odd).view(np.float64).astype(np.float32)


def _flushed(x: Array) -> Array:
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)


def _reciprocal(x: Array) -> Array:
    """Approximate, as PTX promises: off by up to a unit, here always away from zero. (docs/numerics.md has
    the one divisor for which it matters to which side.)"""
    exact = 1 / _flushed(x).astype(np.float64)
    near = exact.astype(np.float32)
    return _flushed(np.where(np.abs(near) < np.abs(exact), np.nextafter(near, 2 * near), near))


def _reciprocal_root(x: Array) -> Array:
    """Approximate, off by up to a unit, here always towards zero."""
    exact = 1 / np.sqrt(_flushed(x).astype(np.float64))
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(0)), near)


OPERATIONS: dict[str, Callable[..., Array]] = {
    "abs": np.abs, "add": np.add, "and": np.bitwise_and, "bfe": _bit_field, "div": np.divide, "max": _largest,
    "min": np.minimum, "mov": lambda a: a, "mul": np.multiply, "neg": np.negative, "not": np.invert,
    "or": np.bitwise_or, "prmt": _permute, "rcp": np.reciprocal, "shf": _funnel_shift, "shl": _shift_left,
    "shr": _shift_right, "sqrt": np.sqrt, "sub": np.subtract, "xor": np.bitwise_xor,
}  # fmt: skip
INLINE = {
    ("inline_fma", ("rn",)): fused, ("inline_rcp", ("approx", "ftz")): _reciprocal,
    ("inline_rsqrt", ("approx", "ftz")): _reciprocal_root,
}  # fmt: skip
ROUNDED = frozenset(["add", "sub", "mul", "div", "rcp", "sqrt"])
"""Operations that must say that they round to nearest: a compiler may contract those that do not."""
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip


def _compare(name: str, a: Array, b: Array) -> Array:
    if a.dtype.kind != "f":
        return COMPARISONS[name](a, b)
    nan = np.isnan(a) | np.isnan(b)
    if name == "nan":
        return nan
    if name in COMPARISONS:
        return COMPARISONS[name](a, b) & ~nan
    return COMPARISONS[name.removesuffix("u")](a, b) | nan


def _canonical(x: Array) -> Array:
    """As the hardware has it: a NaN that an operation makes in float16 or float32 is of one kind."""
    if x.dtype == np.float32:
        return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), x.view(np.uint32)).view(np.float32)
    if x.dtype == np.float16:
        return np.where(np.isnan(x), np.uint16(0x7FFF), x.view(np.uint16)).view(np.float16)
    return x


def _convert(how: tuple[str, ...], a: Array, to: np.dtype[Any]) -> Array:
    kinds = a.dtype.kind, to.kind
    if how == () and "f" not in kinds:
        return a.astype(to)
    if kinds == ("f", "f") and how == (() if to.itemsize > a.dtype.itemsize else ("rn",)):
        return _canonical(a.astype(to))
    if (a.dtype, to, how) == (np.float32, np.int32, ("rzi",)):
        whole = np.clip(np.trunc(a.astype(np.float64)), -(2**31), 2**31 - 1)
        return np.where(np.isnan(a), 0, whole).astype(to)
    raise Unknown


def _to_bf16(x: Array) -> Array:
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _arithmetic(name: str, how: tuple[str, ...], values: Sequence[Array]) -> Array:
    """Of floating-point operations those that are exact or rounded once, to nearest."""
    if values[0].dtype == np.float32 and (name, how) in INLINE:
        return _canonical(INLINE[name, how](*values))
    floating = values[0].dtype.kind == "f"
    allowed = [("rn",)] if floating and name in ROUNDED else [()]
    if floating and name == "max":
        allowed.append(("NaN",))
    if name == "shf":
        allowed = [("l", "wrap")]
    if name not in OPERATIONS or how not in allowed or (floating and name == "min"):
        raise Unknown
    result = OPERATIONS[name](*values)
    if result.dtype != values[0].dtype:
        raise Unknown  # a division of integers
    if how == ("NaN",):
        result = np.where(np.isnan(values).any(0), result.dtype.type(np.nan), result)
    return _canonical(result) if how else result


# Memory.


class Threads(NamedTuple):
    """Of every thread its block and its warp, and how often each of these came together."""

    block: Array
    warp: Array
    block_meetings: Array
    warp_meetings: Array


class Space:
    """Bytes that threads share, and which threads last read and wrote each."""

    def __init__(self, contents: Array, threads: Threads) -> None:
        self.contents = contents
        self.threads = threads
        size = len(contents)
        # Of the threads that wrote last, which may be several that wrote one value, the first and the last,
        # and the meetings of their blocks and warps until then.
        self.writers = np.full((2, size), -1, np.int64)
        self.written_at = np.zeros((2, size), np.int64)
        # Of readers likewise, without those that lie before what reads now.
        self.readers = np.full((2, size), -1, np.int64)
        self.read_at = np.zeros((2, size), np.int64)

    def _after(self, who: Array, when: Array, places: Array, lanes: Array, read: bool = False) -> Array:
        """Whether what ``who`` did at ``places``, read or written, lies before what ``lanes`` do now."""
        t = self.threads
        good = np.ones(len(lanes), bool)
        for before in who[:, places]:
            together = t.block[before] == t.block[lanes]
            together &= t.block_meetings[t.block[lanes]] > when[0, places]
            if read:
                # An exchange is no barrier of memory; it is assumed to give what depends on what was read.
                exchanged = t.warp_meetings[t.warp[lanes]] > when[1, places]
                together |= (t.warp[before] == t.warp[lanes]) & exchanged
            good &= (before < 0) | (before == lanes) | together
        return good

    def _now(self, lanes: Array) -> Array:
        t = self.threads
        return np.stack([t.block_meetings[t.block[lanes]], t.warp_meetings[t.warp[lanes]]])

    def load(self, at: Array, lanes: Array) -> tuple[Array, Array]:
        """Bytes at ``at`` [threads, width], and of which threads the writes before are ordered."""
        flat, each = at.ravel(), np.repeat(lanes, at.shape[1])
        ordered = self._after(self.writers, self.written_at, flat, each)
        forgotten = self._after(self.readers, self.read_at, flat, each, read=True)
        first, last = self.readers[:, flat]
        # Threads are in order: of several that read one byte the last assignment is the last thread's.
        self.readers[1, flat] = np.where(forgotten, each, np.maximum(last, each))
        self.readers[0, flat[::-1]] = np.where(forgotten, each, np.minimum(first, each))[::-1]
        self.read_at[:, flat] = self._now(each)
        return self.contents[at], ordered.reshape(at.shape).all(1)

    def store(self, at: Array, lanes: Array, values: Array) -> Array:
        """Write bytes ``values`` at ``at`` [threads, width]; of which threads that is ordered after what
        others did there."""
        flat, each = at.ravel(), np.repeat(lanes, at.shape[1])
        ordered = self._after(self.writers, self.written_at, flat, each)
        ordered &= self._after(self.readers, self.read_at, flat, each, read=True)
        self.contents[flat] = values.ravel()
        ordered &= self.contents[flat] == values.ravel()  # not so where two threads write different values
        self.writers[1, flat] = each
        self.writers[0, flat[::-1]] = each[::-1]
        self.written_at[:, flat] = self._now(each)
        return ordered.reshape(at.shape).all(1)


class GlobalMemory:
    """Copies of tensors, at the tensors' addresses; those of ``constants`` are only to be read."""

    def __init__(self, tensors: Sequence[Tensor], constants: Sequence[Tensor], threads: Threads) -> None:
        pairs = [*((t, False) for t in tensors), *((t, True) for t in constants)]
        pairs = sorted(((t, c) for t, c in pairs if t.numel()), key=lambda pair: pair[0].data_ptr())
        self.tensors = [t for t, _ in pairs]
        assert all(t.is_contiguous() for t in self.tensors)
        self.constant = np.array([c for _, c in pairs])
        self.starts = np.array([t.data_ptr() for t in self.tensors], np.int64)
        self.sizes = np.array([t.numel() * t.element_size() for t in self.tensors], np.int64)
        assert (self.starts[1:] >= (self.starts + self.sizes)[:-1]).all(), "tensors that overlap"
        self.bases = np.concatenate([[0], np.cumsum(self.sizes)])
        self.space = Space(np.concatenate([self._bytes(t) for t in self.tensors]), threads)

    @staticmethod
    def _bytes(t: Tensor) -> Array:
        return t.detach().reshape(-1).view(torch.uint8).numpy()

    def places(self, addresses: Array, width: int) -> tuple[Array, Array, Array]:
        """Where in ``space`` addresses lie, whether all ``width`` bytes are in one tensor, and whether that
        is only to be read."""
        owner = np.searchsorted(self.starts, addresses, "right") - 1
        offset = addresses - self.starts[owner]
        inside = (owner >= 0) & (offset + width <= self.sizes[owner])
        return np.where(inside, self.bases[owner] + offset, 0), inside, self.constant[owner]

    def write_back(self) -> None:
        """What was written, and nothing beside it: that memory may have changed since it was copied."""
        written = self.space.writers[1] >= 0
        for t, base, end in zip(self.tensors, self.bases, self.bases[1:]):
            np.copyto(self._bytes(t), self.space.contents[base:end], where=written[base:end])


# Threads.


class Launch:
    """A kernel on its way, with the registers of all threads."""

    def __init__(
        self, kernel: Kernel, blocks: int, arguments: Sequence[bytes], tensors: Sequence[Tensor],
        constants: Sequence[Tensor], shared: int, overlaps: bool,
    ) -> None:  # fmt: skip
        assert kernel.threads % WARP == 0
        sizes = list(kernel.parameters.values())
        assert [len(a) for a in arguments] == sizes, f"{kernel.name} takes parameters of {sizes} bytes"
        self.kernel = kernel
        self.arguments = dict(zip(kernel.parameters, arguments))
        n = blocks * kernel.threads
        self.lanes = np.arange(n)
        meetings = np.zeros(blocks, np.int64), np.zeros(n // WARP, np.int64)
        self.threads = Threads(self.lanes // kernel.threads, self.lanes // WARP, *meetings)
        self.memory = GlobalMemory(tensors, constants, self.threads)
        self.shared_bytes = shared
        self.shared = Space(np.zeros(blocks * shared, np.uint8), self.threads)
        self.values: dict[str, Array] = {
            "%tid.x": (self.lanes % kernel.threads).astype(np.uint32),
            "%ctaid.x": (self.lanes // kernel.threads).astype(np.uint32),
        }
        self.next = np.zeros(n, np.int64)
        self.waiting = np.zeros(n, bool)
        self.waited = np.full(n, not overlaps)
        self.issued = 0  # instructions of warps

    def run(self) -> None:
        leaders = {0, *self.kernel.labels.values()}
        end = len(self.kernel.instructions)
        with np.errstate(all="ignore"):
            while (live := self.next < end).any():
                runnable = live & ~self.waiting
                if not runnable.any():
                    self._pass_barriers()
                    continue
                at = int(self.next[runnable].min())
                active = runnable & (self.next == at)
                while True:
                    self.next[active] = at + 1
                    instruction = self.kernel.instructions[at]
                    self.issued += int(active.reshape(-1, WARP).any(1).sum())
                    try:
                        self._execute(instruction, active)
                    except UNREADABLE as error:
                        raise self.fault(instruction, "the emulator does not know this") from error
                    at += 1
                    if at in leaders or at == end or instruction.name in ("bra", "ret", "bar"):
                        break
        self.memory.write_back()

    def fault(self, instruction: Instruction, what: str, lane: int | None = None) -> Fault:
        block, thread = divmod(lane or 0, self.kernel.threads)
        where = "" if lane is None else f"thread {thread} of block {block} "
        return Fault(f"{self.kernel.name}: {where}{what}: {instruction.text}")

    def _value(self, operand: Any, dtype: np.dtype[Any]) -> Array:
        if isinstance(operand, FloatBits):
            if operand.size != dtype.itemsize:
                raise Unknown
            operand = operand.bits
        elif isinstance(operand, int) and dtype.kind == "f":
            raise Unknown
        if isinstance(operand, int):
            bits = np.dtype("u1" if dtype == bool else f"u{dtype.itemsize}")
            number = np.array(operand & (2 ** (8 * bits.itemsize) - 1), bits)
            number = number.astype(bool) if dtype == bool else number.view(dtype)
            return np.broadcast_to(number, len(self.lanes))
        if operand == self.kernel.shared:
            return np.zeros(len(self.lanes), dtype)  # where it begins
        if operand not in self.values:
            if operand.startswith("%"):
                raise Fault(f"{self.kernel.name}: {operand} is read before it is written")
            raise Unknown
        value = self.values[operand]
        if value.dtype.itemsize > dtype.itemsize:
            value = value.astype(f"u{dtype.itemsize}")
        if value.dtype.itemsize < dtype.itemsize:
            raise Unknown
        return value.view(dtype)

    def _assign(self, name: str, value: Array, active: Array) -> None:
        if name == "_":
            return
        prefix = name.rstrip("0123456789")
        register = self.kernel.registers[prefix]
        if value.dtype.kind == "f":
            value = value.view(f"u{value.dtype.itemsize}")
        value = value.astype(register)
        if not active.all():
            old = self.values.get(name)
            unknown = np.ones((), bool) if register == bool else np.array(0xA5A5A5A5A5A5A5A5, np.uint64)
            value = np.where(active, value, unknown.astype(register) if old is None else old)
        self.values[name] = value

    def _execute(self, instruction: Instruction, active: Array) -> None:
        _, guard, name, modifiers, operands = instruction
        if guard:
            wanted = self.values[guard.lstrip("!")]
            active = active & (~wanted if guard.startswith("!") else wanted)
            if not active.any():
                return
        if name in ("bra", "ret") and modifiers not in ((), ("uni",)):
            raise Unknown
        if name == "bra":
            self.next[active] = self.kernel.labels[operands[0]]
        elif name == "ret":
            self.next[active] = len(self.kernel.instructions)
        elif name == "bar":
            # Of a block of one warp a barrier of the warp is one of the block.
            one_warp = (modifiers, operands) == (("warp", "sync"), (-1,)) and self.kernel.threads == WARP
            if (modifiers, operands) != (("sync",), (0,)) and not one_warp:
                raise Unknown
            self.waiting |= active
        elif name in ("ld", "st"):
            self._access(instruction, active)
        elif name == "griddepcontrol" and modifiers in (("wait",), ("launch_dependents",)):
            self.waited |= active & (modifiers == ("wait",))
        elif name in ("shfl", "redux", "vote"):
            self._exchange(instruction, active)
        elif name == "mov" and isinstance(operands[0], tuple):
            whole = self._value(operands[1], TYPES[instruction.type])
            parts = whole[:, None].view(f"u{whole.dtype.itemsize // len(operands[0])}")
            for register, part in zip(operands[0], parts.T):
                self._assign(register, part, active)
        else:
            self._assign(operands[0], self._computed(instruction), active)

    def _computed(self, instruction: Instruction) -> Array:
        _, _, name, modifiers, (_, *operands) = instruction
        if modifiers[-1] == "f32x2":
            pairs = [self._value(x, TYPES["b64"])[:, None].view(np.float32) for x in operands]
            return _arithmetic(name, modifiers[:-1], pairs).view(np.uint64)[:, 0]
        if name == "cvt" and modifiers in (("rn", "f16x2", "f32"), ("rn", "bf16x2", "f32")):
            values = (self._value(x, TYPES["f32"]) for x in operands)
            high, low = (
                _to_bf16(x) if modifiers[1] == "bf16x2" else _convert(("rn",), x, TYPES["f16"])
                for x in values
            )
            return np.stack([low, high], 1).view(np.uint32)[:, 0]
        if name == "cvt" and modifiers == ("rn", "f16x2", "e4m3x2"):
            codes = torch.from_numpy(self._value(operands[0], TYPES["b16"]).copy()).view(torch.float8_e4m3fn)
            return _canonical(codes.half().numpy()).view(np.uint32)
        if name == "cvt":
            *how, to, source = modifiers
            return _convert(tuple(how), self._value(operands[0], TYPES[source]), TYPES[to])
        if name in ROUNDED and modifiers[-2:] == ("f32", "f16"):
            wide = self._value(operands[0], TYPES["f16"]).astype(np.float32)
            return _arithmetic(name, modifiers[:-2], [wide, self._value(operands[1], TYPES["f32"])])
        *how, kind = modifiers
        dtype = TYPES[kind]
        if name == "mov" and isinstance(operands[0], tuple):
            part = np.dtype(f"u{dtype.itemsize // len(operands[0])}")
            parts = [self._value(x, part) for x in operands[0]]
            return np.stack(parts, 1).view(dtype)[:, 0]
        if name in ("mul", "mad") and dtype.kind != "f":
            return self._integer_product(name, how, kind, operands)
        if name == "bfe":
            others = TYPES["u32"], TYPES["u32"]
        elif name in ("shl", "shr"):
            others = (TYPES["u32"],)
        elif name == "selp":
            others = dtype, TYPES["pred"]
        else:
            others = (dtype,) * (len(operands) - 1)
        values = [self._value(x, t) for x, t in zip(operands, (dtype, *others))]
        if name == "selp" and not how:
            return np.where(values[2], values[0], values[1])
        if name == "setp" and len(how) == 1:
            return _compare(how[0], *values)
        if name == "cvta" and how == ["to", "global"]:
            return values[0]
        return _arithmetic(name, tuple(how), values)

    def _integer_product(self, name: str, how: list[str], kind: str, operands: Sequence[Any]) -> Array:
        if how not in (["lo"], ["wide"]):
            raise Unknown
        result = TYPES[kind if how == ["lo"] else f"{kind[0]}{2 * int(kind[1:])}"]
        a, b = (self._value(x, TYPES[kind]).astype(result) for x in operands[:2])
        return a * b + self._value(operands[2], result) if name == "mad" else a * b

    def _access(self, instruction: Instruction, active: Array) -> None:
        space, dtype = instruction.modifiers[0], TYPES[instruction.type]
        store = instruction.name == "st"
        at, registers = instruction.operands if store else instruction.operands[::-1]
        registers = registers if isinstance(registers, tuple) else (registers,)
        known = {"st": {"global", "shared"}, "ld": {"global", "shared", "param"}}
        others = {f"v{len(registers)}"} if len(registers) > 1 else set()
        others |= {"nc"} if space == "global" and not store else set()
        others |= {"cta"} if space == "shared" else set()  # ::cta, whose shared memory it is anyway
        if space not in known[instruction.name] or not {*instruction.modifiers[1:-1]} <= others:
            raise Unknown
        if space == "param":
            (register,) = registers
            number = np.frombuffer(self.arguments[at.base], dtype, 1, at.offset)
            self._assign(register, np.broadcast_to(number, len(self.lanes)), active)
            return
        lanes = self.lanes[active]
        width = dtype.itemsize * len(registers)
        address = self._value(at.base, TYPES["s64" if space == "global" else "s32"])[active].astype(np.int64)
        address = address + at.offset
        if space == "global":
            memory = self.memory.space
            place, inside, constant = self.memory.places(address, width)
        else:
            memory = self.shared
            inside = (address >= 0) & (address + width <= self.shared_bytes)
            place = np.where(inside, address + self.threads.block[lanes] * self.shared_bytes, 0)
            constant = np.zeros(len(lanes), bool)

        def check(good: Array, otherwise: str) -> None:
            if not good.all():
                first = int(np.argmin(good))
                raise self.fault(instruction, f"{otherwise} at {address[first]:#x}", int(lanes[first]))

        if space == "global":
            check(self.waited[active], "does not wait for the kernel before")
        check(inside, "is outside what was allocated")
        check(address % width == 0, "is not aligned")
        places = place[:, None] + np.arange(width)
        if store:
            check(~constant, "writes what is only to be read")
            values = np.stack([self._value(r, np.dtype(f"u{dtype.itemsize}"))[active] for r in registers], 1)
            check(memory.store(places, lanes, values.view(np.uint8)), "is in a race")
            return
        if space == "shared":
            check((memory.writers[0, places] >= 0).all(1), "reads what nobody wrote")
        if constant.all():
            read = memory.contents[places]
        else:
            if "nc" in instruction.modifiers:
                check(constant, "reads as a constant what may be written")
            read, ordered = memory.load(places, lanes)
            check(ordered, "is in a race")
        for register, column in zip(registers, np.ascontiguousarray(read).view(dtype).T):
            whole = np.zeros(len(self.lanes), dtype)
            whole[active] = column
            self._assign(register, whole, active)

    def _pass_barriers(self) -> None:
        """Where all threads of a block wait at one."""
        waiting = self.waiting.reshape(-1, self.kernel.threads)
        at = self.next.reshape(-1, self.kernel.threads)
        met = waiting.all(1) & (at.min(1) == at.max(1))
        if not met.any():
            raise Fault(f"{self.kernel.name}: threads wait at a barrier that others never reach")
        self.threads.block_meetings[met] += 1
        waiting[met] = False

    def _exchange(self, instruction: Instruction, active: Array) -> None:
        """Between the threads of a warp."""
        _, _, name, modifiers, (result, value, *others) = instruction
        warps = active.reshape(-1, WARP)
        if (warps.any(1) != warps.all(1)).any():
            raise self.fault(instruction, "threads of one warp are apart")
        members = self._value(others.pop(), TYPES["u32"])
        if (members[active] != 0xFFFFFFFF).any():
            raise self.fault(instruction, "is not for the whole warp")
        if (name, modifiers) == ("redux", ("sync", "max", "s32")):
            of_warp = self._value(value, TYPES["s32"]).reshape(-1, WARP).max(1)
            self._assign(result, np.repeat(of_warp, WARP), active)
        elif (name, modifiers) == ("vote", ("sync", "any", "pred")):
            of_warp = self._value(value, TYPES["pred"]).reshape(-1, WARP).any(1)
            self._assign(result, np.repeat(of_warp, WARP), active)
        elif (name, modifiers) == ("shfl", ("sync", "bfly", "b32")):
            mask, clamp = (self._value(x, TYPES["u32"]) for x in others)
            if (clamp[active] != WARP - 1).any() or (mask[active] >= WARP).any():
                raise self.fault(instruction, "is not within the whole warp")
            moved = self._value(value, TYPES["b32"])[self.lanes ^ np.where(active, mask, 0)]
            register, there = result if isinstance(result, tuple) else (result, "_")
            self._assign(register, moved, active)
            self._assign(there, np.ones(len(self.lanes), bool), active)
        else:
            raise Unknown
        self.threads.warp_meetings[warps.all(1)] += 1


def run(
    kernel: Kernel, blocks: int, arguments: Sequence[bytes], tensors: Sequence[Tensor],
    constants: Sequence[Tensor] = (), shared_bytes: int = 0, overlaps: bool = False,
) -> int:  # fmt: skip
    """Run ``kernel``, which may read and write ``tensors``, read ``constants``, and touch nothing else; how
    many instructions its warps were issued. ``overlaps``: it begins while the kernel before it runs.

    Raises:
        Fault: for what a kernel must not do, or the emulator does not know. The tensors are as before.
    """
    launch = Launch(kernel, blocks, arguments, tensors, constants, shared_bytes, overlaps)
    launch.run()
    return launch.issued
