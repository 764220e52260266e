"""Division and roots without a test for each element, in ``kernels/rules.py``: the part of the proof in
docs/numerics.md that is a search, and what kernels inline, run by an emulator on every significand."""

import re
import struct

import numpy as np
import ptx
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("triton", reason="Triton is for Linux only")

from fused_optim.kernels import rules

pytestmark = pytest.mark.kernels
Floats, Doubles = NDArray[np.float32], NDArray[np.float64]
ALL_ONES = 2 - 2.0**-23
SLICE = 2**20


def from_one(first: int, count: int = SLICE) -> Floats:
    """The numbers from 1 on, without the first so many."""
    return (np.arange(first, first + count, dtype=np.uint32) + np.uint32(0x3F800000)).view(np.float32)


def approximations(exact: Doubles, error: Doubles) -> list[tuple[Floats, NDArray[np.bool_]]]:
    """Numbers near ``exact``, and which of them are within ``error``."""
    near = exact.astype(np.float32).view(np.uint32)
    found = [(near + np.uint32(k % 2**32)).view(np.float32) for k in range(-2, 3)]
    return [(y, np.abs(y.astype(np.float64) - exact) <= error) for y in found]


def test_one_step_makes_the_rounded_reciprocal() -> None:
    """From every approximation within a unit, of every number in [1, 2), but one of the last number's."""
    wrong = []
    for first in range(0, 2**23, SLICE):
        d = from_one(first)
        exact = 1 / d.astype(np.float64)
        for y, near in approximations(exact, np.where(d == 1, 2.0**-23, 2.0**-24)):
            stepped = ptx.fused(ptx.fused(-d, y, np.ones_like(d)), y, y)
            bad = near & (stepped != exact.astype(np.float32))
            wrong += [*zip(d[bad].tolist(), y[bad].tolist(), stepped[bad].tolist())]
    assert wrong == [(ALL_ONES, 0.5, 0.5)]
    # And with that one only powers of two are divided wrongly.
    x = from_one(0, 2**23)
    q = x * np.float32(0.5)
    q = ptx.fused(-ptx.fused(q, np.full_like(x, ALL_ONES), -x), np.full_like(x, 0.5), q)
    assert x[q != x / np.float32(ALL_ONES)].tolist() == [1.0]


def test_one_step_makes_the_rounded_root() -> None:
    """From every approximate reciprocal root within 2^-22.9, of every number in [1, 4), but one of two."""
    wrong = []
    for first in range(0, 2**24, SLICE):
        s = from_one(first)
        exact = np.sqrt(s.astype(np.float64))
        for y, near in approximations(1 / exact, 2**-22.9 / exact):
            g = s * y
            stepped = ptx.fused(ptx.fused(-g, g, s), y * np.float32(0.5), g)
            bad = near & (stepped != exact.astype(np.float32))
            units = (y.astype(np.float64) * exact - 1) * 2.0**23
            wrong += zip(s[bad].tolist(), units[bad].round(2).tolist())
    assert wrong == [(float.fromhex("0x1.f82294p+0"), 0.95), (float.fromhex("0x1.dd26e4p+1"), 0.82)]


def run(text: str, outputs: int, x: Floats, *others: float) -> Floats:
    """What PTX for inlining makes of ``x`` and numbers that are the same for all."""
    threads = len(x) // outputs
    named = {i: f"%r{i + 4}" for i in range(outputs * (2 + len(others)))}
    body = re.sub(r"\$(\d+)", lambda m: named[int(m[1])], text.replace("${:uid}", "").replace("$$", "$L"))
    loads = [f"ld.global.b32 {named[outputs + i]}, [%rd3+{4 * i}];" for i in range(outputs)]
    for k, number in enumerate(others):
        bits = struct.unpack("I", struct.pack("f", number))[0]
        loads += [f"mov.b32 {named[outputs * (2 + k) + i]}, {bits};" for i in range(outputs)]
    stores = [f"st.global.b32 [%rd4+{4 * i}], {named[i]};" for i in range(outputs)]
    newline = "\n"
    (kernel,) = ptx.parse(f"""
.visible .entry tried(
    .param .u64 tried_param_0,
    .param .u64 tried_param_1
)
.reqntid 32
{{
    .reg .b32 %r<40>;
    .reg .b64 %rd<9>;
    ld.param.u64 %rd0, [tried_param_0];
    ld.param.u64 %rd1, [tried_param_1];
    mov.u32 %r1, %tid.x; mov.u32 %r2, %ctaid.x; shl.b32 %r2, %r2, 5; add.u32 %r1, %r1, %r2;
    mul.wide.u32 %rd2, %r1, {4 * outputs};
    add.s64 %rd3, %rd0, %rd2; add.s64 %rd4, %rd1, %rd2;
    {newline.join(loads)}
    // begin inline asm
    {body}
    // end inline asm
    {newline.join(stores)}
    ret;
}}
""")
    given, made = torch.from_numpy(x), torch.zeros(len(x))
    pointers = [struct.pack("q", t.data_ptr()) for t in (given, made)]
    ptx.run(kernel, threads // 32, pointers, [made], [given])
    return made.numpy()


def assert_same(made: Floats, expected: Floats) -> None:
    different = made.view(np.uint32) != expected.view(np.uint32)
    assert not (different & ~(np.isnan(made) & np.isnan(expected))).any()


@pytest.mark.parametrize(("divisor", "every"), [(1.5, 4), (ALL_ONES, 1), (3e-18, 4), (1.1 * 2.0**40, 1)])
def test_every_significand_is_divided(divisor: float, every: int) -> None:
    """Or, of slices of them, every so many."""
    for first in range(0, 2**23, every * SLICE):
        x = from_one(first) * np.float32(-1.0 if first % (2 * SLICE) else 2.0**-80)
        assert_same(run(rules.BY_DIVISOR_IN_RANGE.value, 8, x, divisor), x / np.float32(divisor))


@pytest.mark.parametrize(("number", "every"), [(1 - 0.999, 4), (1 - 2.0**-24, 1), (2.0**-24 * ALL_ONES, 1),
                                               (3.0, 4)])  # fmt: skip
def test_every_significand_is_divided_by_one_number(number: float, every: int) -> None:
    d = np.float32(number)
    for first in range(0, 2**23, every * SLICE):
        x = from_one(first) * np.float32(-1.0 if first % (2 * SLICE) else 2.0**-100)
        assert_same(run(rules.BY_NUMBER_IN_RANGE.value, 8, x, number, 1 / d), x / d)


@pytest.mark.parametrize(("exponent", "eps", "every"), [(-149, 1e-16, 4), (-100, 0.0, 1), (66, 1e12, 4)])
def test_every_significand_has_a_root(exponent: int, eps: float, every: int) -> None:
    for first in range(0, 2**24, every * SLICE):
        x = np.ldexp(from_one(first), exponent).astype(np.float32)
        expected = np.sqrt(x.astype(np.float64)).astype(np.float32) + np.float32(eps)
        assert_same(run(rules.ROOT_IN_RANGE.value, 1, x, 2.0**-126 if eps else 0.0, eps), expected)


EDGES = [0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 2.0**-101, 2.0**-100, 2.0**-81, 2.0**-80, 2.0**-66, 1e-20, 1.0,
         ALL_ONES, 3.0, 2.0**24, 2.0**40, 2.0**41, 2.0**67, 2.0**68, 2.0**112, 1e38, 3e38, torch.inf,
         torch.nan]  # fmt: skip
NUMBERS = np.array([*EDGES, *(-x for x in EDGES)], np.float32)


def anything() -> Floats:
    """Numbers in range, among which each thread has at most a few of all bit patterns and of edges."""
    rng = np.random.default_rng(0)
    n = 2**12
    x = np.ldexp(from_one(0)[rng.integers(0, SLICE, n)], rng.integers(-80, 38, n)).astype(np.float32)
    bits = rng.integers(0, 2**32, n, np.uint32).view(np.float32)
    edges = NUMBERS[rng.integers(0, len(NUMBERS), n)]
    kind = rng.integers(0, 30, n)
    return np.where(kind == 0, bits, np.where(kind == 1, edges, x))


def test_whatever_is_given_is_divided() -> None:
    """What is tested for eight elements needs no promise, but that rules divide by nothing negative."""
    x = anything()
    with np.errstate(all="ignore"):
        for d in NUMBERS:
            if not d < 0:
                assert_same(run(rules.BY_DIVISOR.value, 8, x, d), x / d)
            inverse = 1 / d if 2.0**-24 <= d <= 2.0**24 else np.float32(np.nan)
            assert_same(run(rules.BY_NUMBER.value, 8, x, d, inverse), x / d)
            for eps in NUMBERS[NUMBERS >= 0][::3]:
                zero = 2.0**-126 if eps >= 2.0**-66 else 0.0
                root = np.sqrt(d.astype(np.float64)).astype(np.float32) + eps
                given = d, zero if eps < 2.0**40 else np.nan, eps
                assert_same(run(rules.BY_ROOT.value, 8, x, *given), x / root)
