"""The update rules in Triton: ``fused_optim.reference`` once more, the same operations in
the same order. A rule is two functions: ``<rule>_moments`` gives the new moments and
``<rule>`` the update. Moments that are stored between the two need no registers in the
second. ``RANGE`` says who looks whether numbers are in the range of the fast division: None, each
operation for each element; "tested", once for the eight elements of a thread, in PTX; "known", the caller,
who promises that moments and new parameters are below 2^40.

The plain ``/`` and ``tl.sqrt`` are approximate in float32 on a GPU, and the interpreter
does not show it: use :func:`divide` and :func:`square_root`. Nothing here may be
contracted to a fused multiply-add: every launch passes ``enable_fp_fusion=False``.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

# What ptxas makes of div.rn and sqrt.rn, but with one test for the eight elements of a thread, and with zeros
# in range. docs/numerics.md has the proofs.

_TEST = """mov.b32 %exacti1, {x}; add.u32 %exacti1, %exacti1, %exacti1; add.u32 %exacti1, %exacti1, -1;
    min.u32 %exacti0, %exacti0, %exacti1;"""  # twice the bits have no sign; a zero's, less 1, are the largest
_WATCH = "abs.f32 {t}, {%s}; max.NaN.f32 %%exactf0, %%exactf0, {t};"
_ROOT = """fma.rn.f32 {d}, {v}, 0f5D800000, {zero}; rsqrt.approx.ftz.f32 {y}, {d}; mul.rn.f32 {t}, {d}, {y};
    mul.rn.f32 {y}, {y}, 0f3F000000; neg.f32 {e}, {t}; fma.rn.f32 {d}, {e}, {t}, {d};
    fma.rn.f32 {t}, {d}, {y}, {t}; fma.rn.f32 {d}, {t}, 0f30800000, {eps};"""
_RECIPROCAL = """rcp.approx.ftz.f32 {y}, {d}; neg.f32 {e}, {d};
    fma.rn.f32 {e}, {e}, {y}, 0f3F800000; fma.rn.f32 {y}, {e}, {y}, {y};"""
# The residual's sign is such that -0 over a positive number stays -0.
_QUOTIENT = """mul.rn.f32 {t}, {x}, {y}; neg.f32 {e}, {x}; fma.rn.f32 {e}, {t}, {d}, {e};
    neg.f32 {e}, {e}; fma.rn.f32 {q}, {e}, {y}, {t};"""
_OWN = {name: f"%exactf{k}" for k, name in enumerate("yted", 1)}  # registers
_SLOW_ROOT, _SLOW_QUOTIENT = "sqrt.rn.f32 {d}, {v}; add.rn.f32 {d}, {d}, {eps};", "div.rn.f32 {q}, {x}, {d};"


def _for_eight(
    operands: str, fast: str, slow: str, least: int, watched: str = "", most: int = 40
) -> tuple[Any, Any]:
    """PTX for {q} of eight elements, and its constraints: ``fast``, or ``slow`` if an {x} is not zero and
    below 2^``least``, or something ``watched`` is 2^``most`` or more, or NaN."""
    names = ["q", *operands.split()]

    def each(text: str) -> list[str]:
        return [text.format(**_OWN | {n: f"${8 * k + i}" for k, n in enumerate(names)}) for i in range(8)]

    lines = ["{ .reg .b32 %exacti<2>; .reg .f32 %exactf<5>; .reg .pred %exactp<2>;"]
    lines += ["mov.b32 %exacti0, -1; mov.f32 %exactf0, 0f00000000;"]
    lines += each(_TEST + fast + "".join(_WATCH % name for name in watched.split()))
    lines += [f"setp.lt.u32 %exactp0, %exacti0, {2 * (127 + least << 23) - 1};"]
    if watched:
        lines += [f"setp.geu.f32 %exactp1, %exactf0, 0f{127 + most << 23:08X};"]
        lines += ["or.pred %exactp0, %exactp0, %exactp1;"]
    lines += ["@!%exactp0 bra $$DONE_${:uid};", *each(slow), "$$DONE_${:uid}: }"]
    constraints = ",".join(8 * ["=&f"] + 8 * (len(names) - 1) * ["f"])
    return tl.constexpr("\n".join(lines)), tl.constexpr(constraints)


_BY_DIVISOR = ("x d", _RECIPROCAL + _QUOTIENT, _SLOW_QUOTIENT, -80)
BY_DIVISOR, OF_DIVISOR = _for_eight(*_BY_DIVISOR, watched="q d")
BY_DIVISOR_IN_RANGE, _ = _for_eight(*_BY_DIVISOR)
BY_ROOT, OF_ROOT = _for_eight(
    "x v zero eps", _ROOT + _RECIPROCAL + _QUOTIENT, _SLOW_ROOT + _SLOW_QUOTIENT, -80, watched="q"
)
_IN_RANGE = "{{ .reg .f32 %exactf<5>;" + _ROOT + "mov.f32 $0, {d}; }}"
ROOT_IN_RANGE = tl.constexpr(_IN_RANGE.format(**_OWN, v="$1", zero="$2", eps="$3"))
_BY_NUMBER = ("x d y", _QUOTIENT, _SLOW_QUOTIENT, -100)
BY_NUMBER, OF_NUMBER = _for_eight(*_BY_NUMBER, watched="q", most=112)
BY_NUMBER_IN_RANGE, _ = _for_eight(*_BY_NUMBER)


@triton.jit
def divide(x, d, RANGE: tl.constexpr = None):
    if RANGE is not None:
        text: tl.constexpr = BY_DIVISOR if RANGE == "tested" else BY_DIVISOR_IN_RANGE
        return tl.inline_asm_elementwise(text, OF_DIVISOR, [x, d], tl.float32, True, pack=8)
    elif x.dtype == tl.float32:
        return tl.div_rn(x, d)
    else:
        return x / d


@triton.jit
def square_root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def divide_by_root(x, v, eps, RANGE: tl.constexpr):
    """``x / (sqrt(v) + eps)``"""
    if RANGE is not None:
        # v is taken times 2^60, so that no residual is subnormal. For v = 0 it is 2^-126, whose root does not
        # change eps unless that is tiny. A large eps would make a divisor's reciprocal subnormal.
        zero = tl.where(eps >= 2.0**-66, 2.0**-126, 0.0)
        zero = tl.where(eps < 2.0**40, zero, float("nan"))
        if RANGE == "tested":
            return tl.inline_asm_elementwise(BY_ROOT, OF_ROOT, [x, v, zero, eps], tl.float32, True, pack=8)
        else:  # v is not needed again; kept, it made a kernel spill
            d = tl.inline_asm_elementwise(ROOT_IN_RANGE, "=f,f,f,f", [v, zero, eps], tl.float32, True, pack=1)
            return divide(x, d, RANGE)
    else:
        return divide(x, square_root(v) + eps)


@triton.jit
def divide_by_number(x, d, RANGE: tl.constexpr):
    """``x / d``, where all divide by the same."""
    if RANGE is not None:
        # With NaN all are divided as usual.
        reciprocal = tl.div_rn(tl.full([], 1, tl.float32), d)
        reciprocal = tl.where((d >= 2.0**-24) & (d <= 2.0**24), reciprocal, float("nan"))
        text: tl.constexpr = BY_NUMBER if RANGE == "tested" else BY_NUMBER_IN_RANGE
        return tl.inline_asm_elementwise(text, OF_NUMBER, [x, d, reciprocal], tl.float32, True, pack=8)
    else:
        return divide(x, d)


@triton.jit
def corrected(x, bias_correction, RANGE: tl.constexpr):
    """``x / bias_correction``, without a division by 1, which changes no bit: in float32 from step 165 on
    with beta 0.9, and from 17,321 on with 0.999."""
    if bias_correction != 1:
        x = divide_by_number(x, bias_correction, RANGE)
    return x


@triton.jit
def first_moment(g, m, c):
    return c.one_minus_beta1 * g + c.beta1 * m


@triton.jit
def corrected_first_moment(g, m, c, RANGE: tl.constexpr):
    """Nesterov's look-ahead takes the moment of the next step, as if the same gradient came again."""
    # Both cases whole: a select of the correction, and one division for both, spill up to 32 bytes.
    if c.nesterov != 0:
        g = corrected(g, c.bias_correction1, RANGE)
        m = first_moment(g, corrected(m, c.bias_correction1_next, RANGE), c)
    else:
        m = corrected(m, c.bias_correction1, RANGE)
    return m


@triton.jit
def apply_update(p, u, c):
    decay = c.decay * p
    u = tl.where(c.decay_kind == 1, u + decay, u)
    new = p + c.neg_lr * u
    return tl.where(c.decay_kind == 2, new - decay, new)


@triton.jit
def adabelief_moments(g, m, s, c):
    m = first_moment(g, m, c)
    e = g - m
    s = (c.one_minus_beta2 * (e * e) + c.beta2 * s) + c.eps_root
    return m, s


@triton.jit
def adabelief(g, m, s, c, RANGE: tl.constexpr):
    m_hat = corrected_first_moment(g, m, c, RANGE)
    return divide_by_root(m_hat, corrected(s, c.bias_correction2, RANGE), c.eps, RANGE)


@triton.jit
def adamaxw_moments(g, m, v, c):
    m = first_moment(g, m, c)
    v = tl.maximum(tl.abs(g) + c.eps, c.beta2 * v, propagate_nan=tl.PropagateNan.ALL)
    return m, v


@triton.jit
def adamaxw(g, m, v, c, RANGE: tl.constexpr):
    return divide(corrected(m, c.bias_correction1, RANGE), v, RANGE)


@triton.jit
def adamw_moments(g, m, v, c):
    m = first_moment(g, m, c)
    v = c.one_minus_beta2 * (g * g) + c.beta2 * v
    return m, v


@triton.jit
def adamw(g, m, v, c, RANGE: tl.constexpr):
    m_hat = corrected_first_moment(g, m, c, RANGE)
    return divide_by_root(m_hat, corrected(v, c.bias_correction2, RANGE) + c.eps_root, c.eps, RANGE)
