"""The update rules in Triton: ``fused_optim.reference`` once more, the same operations in
the same order. A rule is two functions, for the new moments and, from these, for the new parameter:
moments that are stored between the two need no registers in the second.

The plain ``/`` and ``tl.sqrt`` are approximate in float32 on a GPU, and the interpreter
does not show it: :func:`divide` and :func:`square_root` are not. Nothing here may be
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
def first_moment(g, m, c):
    return c.one_minus_beta1 * g + c.beta1 * m


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
def adabelief(p, g, m, s, c):
    m_hat = divide(m, c.bias_correction1)
    u = divide(m_hat, square_root(divide(s, c.bias_correction2)) + c.eps)
    return apply_update(p, u, c)


adabelief_nesterov_moments = adabelief_moments


@triton.jit
def adabelief_nesterov(p, g, m, s, c):
    # The divisor first: after m_hat it makes split8 with 8-bit moments spill 8 bytes (Triton 3.6, sm_100).
    divisor = square_root(divide(s, c.bias_correction2)) + c.eps
    m_hat = c.beta1 * divide(m, c.bias_correction1_next) + c.one_minus_beta1 * divide(g, c.bias_correction1)
    u = divide(m_hat, divisor)
    return apply_update(p, u, c)


@triton.jit
def adamaxw_moments(g, m, v, c):
    m = first_moment(g, m, c)
    v = tl.maximum(tl.abs(g) + c.eps, c.beta2 * v, propagate_nan=tl.PropagateNan.ALL)
    return m, v


@triton.jit
def adamaxw(p, g, m, v, c):
    u = divide(divide(m, c.bias_correction1), v)
    return apply_update(p, u, c)
