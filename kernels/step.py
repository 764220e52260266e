"""The one kernel that makes a step, the small one that goes before it, and the launcher.

The prologue works out every counter's coefficients in float64, rounds them once, and
advances the counter. The step kernel gets the rule and the codecs as functions: a program
takes one chunk of one row of the table (see ``fused_optim.table``). A full chunk whose
addresses are multiples of 16 bytes takes an unmasked body; what is left takes the same
rule and codecs one element a thread, in a loop, which keeps registers low (two bodies of
whole blocks take 94 to 168).
"""

from __future__ import annotations

from collections import namedtuple
from functools import cache
from typing import Any

import triton
import triton.language as tl

from . import codecs, rules

MAX_COUNT = tl.constexpr(2**31 - 1)
HYPER_COLUMNS = tl.constexpr(8)
ROW_COLUMNS = tl.constexpr(10)
GRAD = tl.constexpr(2)
PARAM = tl.constexpr(3)
MU = tl.constexpr(4)
NU = tl.constexpr(5)
KEY = tl.constexpr(9)
"""Columns of ``fused_optim.table``'s rows, after numel and counter."""

COEFFICIENT_COLUMNS = tl.constexpr(16)
NUM_COEFFICIENTS = tl.constexpr(13)
"""Columns of ``fused_optim.reference.Coefficients``; then come found_inf and the bits of the
step number."""

PROLOGUE_LANES = 128
PROLOGUE_REGISTERS = 72
THREADS = 256

Coefficients = namedtuple(
    "Coefficients",
    "beta1 one_minus_beta1 beta2 one_minus_beta2 eps eps_root bias_correction1 bias_correction1_next "
    "bias_correction2 neg_lr decay decay_kind grad_divisor skips_ones",
)
"""Those of the prologue, and ``skips_ones``, None or True when compiling: see ``rules.corrected``."""


def chunk_size(*element_bytes: int) -> int:
    """Elements of one program: as many to a thread as make 16 bytes of the smallest operand,
    but 8 for one of single bytes."""
    return THREADS * 16 // max(min(element_bytes), 2)


@cache
def step_constants(rule: str, param: str, grad: str, mu: str, nu: str, chunk: int) -> dict[str, Any]:
    """The constexpr arguments of :func:`step_kernel` for a rule and formats, by name."""
    return {
        "MOMENTS": getattr(rules, f"{rule}_moments"),
        "RULE": getattr(rules, rule),
        "LOAD_GRAD": getattr(codecs, f"load_{grad}"),
        "DECODE_GRAD": getattr(codecs, f"decode_{grad}"),
        "LOAD_PARAM": getattr(codecs, f"load_{param}"),
        "DECODE_PARAM": getattr(codecs, f"decode_{param}"),
        "STORE_PARAM": getattr(codecs, f"store_{param}"),
        "LOAD_MU": getattr(codecs, f"load_{mu}"),
        "DECODE_MU": getattr(codecs, f"decode_{mu}"),
        "STORE_MU": getattr(codecs, f"store_{mu}"),
        "LOAD_NU": getattr(codecs, f"load_{nu}"),
        "DECODE_NU": getattr(codecs, f"decode_{nu}"),
        "STORE_NU": getattr(codecs, f"store_{nu}"),
        "NARROW_PARAM": param in codecs.NARROW,
        "NARROW_MOMENTS": mu in codecs.NARROW,
        "SPECIAL_MU": getattr(codecs, f"special_{mu}", None),
        "SPECIAL_NU": getattr(codecs, f"special_{nu}", None),
        "CHUNK": chunk,
        "TAIL": THREADS,
    }


def registers(param: str, grad: str, mu: str) -> int:
    """Registers that a thread of :func:`step_kernel` may take. With these no kernel of
    ``bench.formats.TRIPLES`` spills. 64 leave room for four blocks of 256 threads in 65,536, up
    to 80 for three. Left to itself NVIDIA's compiler takes up to 108 with narrow moments, and up
    to 79 with float32 ones, but 5% more instructions."""
    if mu in codecs.NARROW and (param, grad) == ("fp32", "fp32"):
        return 64
    if mu in codecs.NARROW and param.endswith("_master"):
        return 80
    return 72


def launch_options(target: str, warp_size: int, threads: int, registers: int) -> dict[str, Any]:
    """Compiler options of a launch: nothing contracted, nothing flushed to zero."""
    options: dict[str, Any] = {"num_warps": threads // warp_size, "enable_fp_fusion": False}
    if target == "cuda":
        options |= {"enable_reflect_ftz": False, "maxnreg": registers}
    return options


@triton.jit
def _bias_correction(beta, count, DTYPE: tl.constexpr):
    base = beta.to(DTYPE).to(tl.float64)
    power = base * 0 + 1
    for bit in range(31):
        power = tl.where((count >> bit) & 1 == 1, power * base, power)
        base = base * base
    return 1 - power.to(DTYPE)


@triton.jit(do_not_specialize=["n"])
def prologue_kernel(
    counters, n, hyper, grad_scale, found_inf, coefficients, DTYPE: tl.constexpr, LANES: tl.constexpr
):
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    live = lane < n
    step = tl.load(counters + 2 * lane, live, other=0).to(tl.pointer_type(tl.int64))
    h = hyper + tl.load(counters + 2 * lane + 1, live, other=0) * HYPER_COLUMNS
    lr = tl.load(h + 0, live, other=0)
    weight_decay = tl.load(h + 1, live, other=0)
    beta1 = tl.load(h + 2, live, other=0)
    beta2 = tl.load(h + 3, live, other=0)
    initial_lr = tl.load(h + 6, live, other=0)

    count = tl.minimum(tl.load(step, live, other=0) + 1, MAX_COUNT)
    count_next = tl.minimum(count + 1, MAX_COUNT)
    decoupled = initial_lr != 0
    # None is known when compiling; a tensor of no effect would have to be made and kept.
    skip = tl.zeros([LANES], tl.float32)
    if found_inf is not None:
        skip += tl.load(found_inf)

    c = coefficients + lane * COEFFICIENT_COLUMNS
    tl.store(c + 0, beta1.to(DTYPE), live)
    tl.store(c + 1, (1 - beta1).to(DTYPE), live)
    tl.store(c + 2, beta2.to(DTYPE), live)
    tl.store(c + 3, (1 - beta2).to(DTYPE), live)
    tl.store(c + 4, tl.load(h + 4, live, other=0).to(DTYPE), live)
    tl.store(c + 5, tl.load(h + 5, live, other=0).to(DTYPE), live)
    tl.store(c + 6, _bias_correction(beta1, count, DTYPE), live)
    tl.store(c + 7, _bias_correction(beta1, count_next, DTYPE), live)
    tl.store(c + 8, _bias_correction(beta2, count, DTYPE), live)
    # Times -1: a minus is a difference from zero in Triton 3.6, in which a learning rate of 0 stays +0.
    tl.store(c + 9, (-1.0 * lr).to(DTYPE), live)
    relative_lr = lr / tl.where(decoupled, initial_lr, 1.0)
    tl.store(c + 10, tl.where(decoupled, weight_decay * relative_lr, weight_decay).to(DTYPE), live)
    tl.store(c + 11, tl.where(weight_decay != 0, tl.where(decoupled, 2.0, 1.0), 0.0).to(DTYPE), live)
    divisor = tl.full([LANES], 1, DTYPE)
    if grad_scale is not None:
        divisor *= tl.load(grad_scale).to(DTYPE)
    tl.store(c + 12, tl.where(tl.load(h + 7, live, other=0) != 0, -1.0 * divisor, divisor), live)
    tl.store(c + NUM_COEFFICIENTS, skip.to(DTYPE), live)
    if DTYPE == tl.float32:  # float64 has no format that rounds by the step number
        tl.store(c + NUM_COEFFICIENTS + 1, count.to(tl.int32).to(tl.float32, bitcast=True), live)
    tl.store(step, count, live & (skip == 0))


@triton.jit
def _read(
    row, at, LOAD_PARAM: tl.constexpr, LOAD_GRAD: tl.constexpr, LOAD_MU: tl.constexpr, LOAD_NU: tl.constexpr
):  # fmt: skip
    """What is stored of parameter, gradient and moments."""
    p = LOAD_PARAM(row + PARAM, at)
    g = LOAD_GRAD(row + GRAD, at)
    return p, g, LOAD_MU(row + MU, at), LOAD_NU(row + NU, at)


@triton.jit
def _new_moments(
    g, mu, nu, at, c, MOMENTS: tl.constexpr, DECODE_GRAD: tl.constexpr, DECODE_MU: tl.constexpr,
    DECODE_NU: tl.constexpr,
):  # fmt: skip
    """The gradient and the moments after the step, from what is stored."""
    g = DECODE_GRAD(g, at)
    if c.grad_divisor != 1:
        g = rules.divide(g, c.grad_divisor)
    mu, nu = MOMENTS(g, DECODE_MU(mu, at), DECODE_NU(nu, at), c)
    return g, mu, nu


@triton.jit
def _new_param(p, g, mu, nu, at, c, RULE: tl.constexpr, DECODE_PARAM: tl.constexpr):
    # The parameter is decoded last: until then it takes fewer registers.
    u = RULE(g, mu, nu, c)
    return rules.apply_update(DECODE_PARAM(p, at), u, c)


@triton.jit
def _finish(
    row, p, g, mu, nu, at, c, RULE: tl.constexpr, DECODE_PARAM: tl.constexpr, STORE_PARAM: tl.constexpr,
    STORE_MU: tl.constexpr, STORE_NU: tl.constexpr,
):  # fmt: skip
    # Moments first: stored after the rule they take up to 16 registers more.
    STORE_NU(row + NU, at, nu, codecs.NU)
    STORE_MU(row + MU, at, mu, codecs.MU)
    STORE_PARAM(row + PARAM, at, _new_param(p, g, mu, nu, at, c, RULE, DECODE_PARAM), codecs.PARAM)


@triton.jit
def _special(mu, nu, SPECIAL_MU: tl.constexpr, SPECIAL_NU: tl.constexpr):
    """For each eight elements, not zero where what is stored holds an infinity or NaN."""
    words = SPECIAL_MU(mu[0]) | SPECIAL_NU(nu[0])
    first, second = tl.split(tl.reshape(words, [words.shape[0] // 2, 2]))
    return first | second


@triton.jit
def _is_usual(new_p, mu, nu, special):
    """``At.usual`` of a full chunk, where moments are narrow. One test of all costs less than a select for
    each value; with float32 moments it would cost more."""
    if special is None:
        # The magnitudes' sum is at least as large as each, and NaN where one is.
        total = tl.abs(mu) + tl.abs(nu)
        if new_p is not None:
            total += tl.abs(new_p)
        largest = codecs.largest_of_eight(codecs.magnitude_bits(total))
    else:
        # Magnitudes that the bases need anyway.
        largest = codecs.largest_of_eight(codecs.magnitude_bits(mu))
        largest = tl.maximum(largest, codecs.largest_of_eight(codecs.magnitude_bits(nu)))
        if new_p is not None:
            largest = tl.maximum(largest, codecs.largest_of_eight(codecs.magnitude_bits(new_p)))
        largest = tl.where(special == 0, largest, codecs.INF)
    return tl.max(largest, 0) < 0x7F000000


@triton.jit
def step_kernel(
    rows, chunks, coefficients, MOMENTS: tl.constexpr, RULE: tl.constexpr,
    LOAD_GRAD: tl.constexpr, DECODE_GRAD: tl.constexpr,
    LOAD_PARAM: tl.constexpr, DECODE_PARAM: tl.constexpr, STORE_PARAM: tl.constexpr,
    LOAD_MU: tl.constexpr, DECODE_MU: tl.constexpr, STORE_MU: tl.constexpr,
    LOAD_NU: tl.constexpr, DECODE_NU: tl.constexpr, STORE_NU: tl.constexpr,
    NARROW_PARAM: tl.constexpr, NARROW_MOMENTS: tl.constexpr,
    SPECIAL_MU: tl.constexpr, SPECIAL_NU: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(chunks + 2 * program).to(tl.int64) * ROW_COLUMNS
    chunk = tl.load(chunks + 2 * program + 1).to(tl.int64)
    k = coefficients + tl.load(row + 1) * COEFFICIENT_COLUMNS
    c = Coefficients(
        tl.load(k),
        tl.load(k + 1),
        tl.load(k + 2),
        tl.load(k + 3),
        tl.load(k + 4),
        tl.load(k + 5),
        tl.load(k + 6),
        tl.load(k + 7),
        tl.load(k + 8),
        tl.load(k + 9),
        tl.load(k + 10),
        tl.load(k + 11),
        tl.load(k + 12),
        True if NARROW_MOMENTS else None,
    )
    count = tl.load(k + NUM_COEFFICIENTS + 1)
    if tl.load(k + NUM_COEFFICIENTS) == 0:
        if chunk >= 0:
            start = chunk * CHUNK
            offset = start + tl.arange(0, CHUNK)
            at = codecs.At(start, offset, None, None, count, row + KEY, True if NARROW_MOMENTS else None)
            p, g, mu, nu = _read(row, at, LOAD_PARAM, LOAD_GRAD, LOAD_MU, LOAD_NU)
            stored_mu, stored_nu = mu, nu
            g, mu, nu = _new_moments(g, mu, nu, at, c, MOMENTS, DECODE_GRAD, DECODE_MU, DECODE_NU)
            special = None
            if SPECIAL_MU is not None:
                # Before the rule, in which what was read would take registers.
                special = _special(stored_mu, stored_nu, SPECIAL_MU, SPECIAL_NU)
            if NARROW_MOMENTS:
                new_p = None
                if NARROW_PARAM:
                    new_p = _new_param(p, g, mu, nu, at, c, RULE, DECODE_PARAM)
                if _is_usual(new_p, mu, nu, special):
                    STORE_NU(row + NU, at, nu, codecs.NU)
                    STORE_MU(row + MU, at, mu, codecs.MU)
                    if not NARROW_PARAM:
                        new_p = _new_param(p, g, mu, nu, at, c, RULE, DECODE_PARAM)
                    STORE_PARAM(row + PARAM, at, new_p, codecs.PARAM)
                else:
                    chunk = -1 - chunk
            else:
                _finish(row, p, g, mu, nu, at, c, RULE, DECODE_PARAM, STORE_PARAM, STORE_MU, STORE_NU)
        if chunk < 0:
            start = (-1 - chunk) * CHUNK
            end = tl.minimum(start + CHUNK, tl.load(row))
            while start < end:
                offset = start + tl.arange(0, TAIL)
                block = start // codecs.BLOCK + tl.arange(0, TAIL // codecs.BLOCK)
                at = codecs.At(
                    start, offset, offset < end, block * codecs.BLOCK < end, count, row + KEY, None
                )
                p, g, mu, nu = _read(row, at, LOAD_PARAM, LOAD_GRAD, LOAD_MU, LOAD_NU)
                g, mu, nu = _new_moments(g, mu, nu, at, c, MOMENTS, DECODE_GRAD, DECODE_MU, DECODE_NU)
                _finish(row, p, g, mu, nu, at, c, RULE, DECODE_PARAM, STORE_PARAM, STORE_MU, STORE_NU)
                start += TAIL


def launch_prologue(
    counters: Any,
    n: int,
    hyper: Any,
    grad_scale: Any,
    found_inf: Any,
    coefficients: Any,
    options: dict[str, Any],
) -> None:
    """Work out ``coefficients`` for ``n`` counters, and advance these."""
    dtype = getattr(tl, str(coefficients.dtype).removeprefix("torch."))
    prologue_kernel[(triton.cdiv(n, PROLOGUE_LANES),)](
        counters,
        n,
        hyper,
        grad_scale,
        found_inf,
        coefficients,
        DTYPE=dtype,
        LANES=PROLOGUE_LANES,
        **options,
    )


def launch_step(
    rows: Any, chunks: Any, coefficients: Any, constants: dict[str, Any], options: dict[str, Any]
) -> None:
    """Step every chunk."""
    step_kernel[(len(chunks),)](rows, chunks, coefficients, **constants, **options)
