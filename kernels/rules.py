"""The update rules in Triton: ``fused_optim.reference`` once more, the same operations in
the same order. A rule is two functions: ``<rule>_moments`` gives the new moments and
``<rule>`` the update. Moments that are stored between the two need no registers in the
second, which is given how to divide and to take roots: ``DIVIDE(x, y)`` is ``x / y`` and
``ROOT(x, eps)`` is ``sqrt(x) + eps``.

The plain ``/`` and ``tl.sqrt`` are approximate in float32 on a GPU, and the interpreter
does not show it: use :func:`divide` and :func:`square_root`. Nothing here may be
contracted to a fused multiply-add: every launch passes ``enable_fp_fusion=False``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divide(x, y):
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def square_root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def root(x, eps):
    return square_root(x) + eps


# The same bits on NVIDIA's GPUs, if moments and new parameters are below 2^40: what ptxas makes of div.rn and sqrt.rn,
# without a test and a branch for each element. What is still out of range gives infinity or NaN. docs/numerics.md has
# the proof.


def _quotients() -> str:
    """PTX for the eight elements of a thread: operands 0 to 7 are the quotients, then come what is divided and
    the divisors. If one is divided that is not zero and below 2^-80, a residual may be rounded: then all eight
    are divided as usual."""
    least, bits, y, e, q = "%exacti0", "%exacti1", "%exactf0", "%exactf1", "%exactf2"
    lines = [f".reg .b32 %exacti<2>; .reg .f32 %exactf<3>; .reg .pred %exactp<1>; mov.b32 {least}, -1;"]
    for x in range(8, 16):
        # Twice the bits have no sign, and those of a zero, less 1, are the largest.
        lines += [f"mov.b32 {bits}, ${x}; add.u32 {bits}, {bits}, {bits}; add.u32 {bits}, {bits}, -1;"]
        lines += [f"min.u32 {least}, {least}, {bits};"]
    lines += [f"setp.lt.u32 %exactp0, {least}, {2 * (127 - 80 << 23) - 1}; @%exactp0 bra $$SMALL_${{:uid}};"]
    for x in range(8, 16):
        lines += [f"rcp.approx.ftz.f32 {y}, ${x + 8}; neg.f32 {e}, ${x + 8};"]
        lines += [f"fma.rn.f32 {e}, {e}, {y}, 0f3F800000; fma.rn.f32 {y}, {e}, {y}, {y};"]
        # The residual's sign is such that -0 over a positive number stays -0.
        lines += [f"mul.rn.f32 {q}, ${x}, {y}; neg.f32 {e}, ${x}; fma.rn.f32 {e}, {q}, ${x + 8}, {e};"]
        lines += [f"neg.f32 {e}, {e}; fma.rn.f32 ${x - 8}, {e}, {y}, {q};"]
    lines += ["bra $$DONE_${:uid};", "$$SMALL_${:uid}:"]
    lines += [f"div.rn.f32 ${x - 8}, ${x}, ${x + 8};" for x in range(8, 16)]
    return "\n".join(["{", *lines, "$$DONE_${:uid}: }"])


QUOTIENTS = tl.constexpr(_quotients())
OF_EIGHT = tl.constexpr(",".join(8 * ["=&f"] + 16 * ["f"]))

ROOT_OF_ONE = tl.constexpr("""{
    .reg .f32 %exactf<4>;
    fma.rn.f32 %exactf0, $1, 0f5D800000, $2;
    rsqrt.approx.ftz.f32 %exactf1, %exactf0;
    mul.rn.f32 %exactf2, %exactf0, %exactf1;
    mul.rn.f32 %exactf1, %exactf1, 0f3F000000;
    neg.f32 %exactf3, %exactf2;
    fma.rn.f32 %exactf0, %exactf3, %exactf2, %exactf0;
    fma.rn.f32 %exactf2, %exactf0, %exactf1, %exactf2;
    fma.rn.f32 $0, %exactf2, 0f30800000, $3; }""")
"""PTX for ``sqrt($1) + $3``, from ``$1 * 2**60 + $2``: no residual is subnormal then."""


@triton.jit
def divide_in_range(x, y):
    return tl.inline_asm_elementwise(QUOTIENTS, OF_EIGHT, [x, y], tl.float32, is_pure=True, pack=8)


@triton.jit
def root_in_range(x, eps):
    # x times 2^60, so that no residual is subnormal. For x = 0 it is 2^-126, whose root does not change eps unless
    # that is tiny. A large eps would make a divisor's reciprocal subnormal.
    zero = tl.where(eps >= 2.0**-66, 2.0**-126, 0.0)
    zero = tl.where(eps < 2.0**40, zero, float("nan"))
    return tl.inline_asm_elementwise(ROOT_OF_ONE, "=f,f,f,f", [x, zero, eps], tl.float32, is_pure=True, pack=1)


@triton.jit
def corrected(x, bias_correction):
    """``x / bias_correction``, without a division by 1, which changes no bit: 10 instructions less for each
    element, in float32 from step 165 on with beta 0.9 and from 17,321 on with 0.999."""
    if bias_correction != 1:
        x = divide(x, bias_correction)
    return x


@triton.jit
def first_moment(g, m, c):
    return c.one_minus_beta1 * g + c.beta1 * m


@triton.jit
def corrected_first_moment(g, m, c):
    """Nesterov's look-ahead takes the moment of the next step, as if the same gradient came again."""
    # Both cases whole: a select of the correction, and one division for both, spill up to 32 bytes.
    if c.nesterov != 0:
        g = corrected(g, c.bias_correction1)
        m = first_moment(g, corrected(m, c.bias_correction1_next), c)
    else:
        m = corrected(m, c.bias_correction1)
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
def adabelief(g, m, s, c, DIVIDE: tl.constexpr, ROOT: tl.constexpr):
    m_hat = corrected_first_moment(g, m, c)
    return DIVIDE(m_hat, ROOT(corrected(s, c.bias_correction2), c.eps))


@triton.jit
def adamaxw_moments(g, m, v, c):
    m = first_moment(g, m, c)
    v = tl.maximum(tl.abs(g) + c.eps, c.beta2 * v, propagate_nan=tl.PropagateNan.ALL)
    return m, v


@triton.jit
def adamaxw(g, m, v, c, DIVIDE: tl.constexpr, ROOT: tl.constexpr):
    return DIVIDE(corrected(m, c.bias_correction1), v)


@triton.jit
def adamw_moments(g, m, v, c):
    m = first_moment(g, m, c)
    v = c.one_minus_beta2 * (g * g) + c.beta2 * v
    return m, v


@triton.jit
def adamw(g, m, v, c, DIVIDE: tl.constexpr, ROOT: tl.constexpr):
    m_hat = corrected_first_moment(g, m, c)
    return DIVIDE(m_hat, ROOT(corrected(v, c.bias_correction2) + c.eps_root, c.eps))
