"""The update rules in Triton: ``fused_optim.reference`` once more, the same operations in
the same order. A rule is two functions: ``<rule>_moments`` gives the new moments and
``<rule>`` the update. Moments that are stored between the two need no registers in the
second.

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
def adabelief(g, m, s, c):
    m_hat = corrected_first_moment(g, m, c)
    return divide(m_hat, square_root(corrected(s, c.bias_correction2)) + c.eps)


@triton.jit
def adamaxw_moments(g, m, v, c):
    m = first_moment(g, m, c)
    v = tl.maximum(tl.abs(g) + c.eps, c.beta2 * v, propagate_nan=tl.PropagateNan.ALL)
    return m, v


@triton.jit
def adamaxw(g, m, v, c):
    return divide(corrected(m, c.bias_correction1), v)


@triton.jit
def adamw_moments(g, m, v, c):
    m = first_moment(g, m, c)
    v = c.one_minus_beta2 * (g * g) + c.beta2 * v
    return m, v


@triton.jit
def adamw(g, m, v, c):
    m_hat = corrected_first_moment(g, m, c)
    return divide(m_hat, square_root(corrected(v, c.bias_correction2) + c.eps_root) + c.eps)
