"""The one kernel that makes a step, the small one that goes before it, and their launches.

The prologue works out every counter's coefficients in float64 and rounds them once; nothing
that lasts is written. The step kernel gets the rule and the codecs as constants. Its first
program advances the counters, and each other one takes one chunk of one row of the table (see
``fused_optim.table``). A full chunk whose addresses are multiples of 16 bytes takes an
unmasked body; what is left takes the same rule and codecs one element a thread, in a loop,
which keeps registers low (two bodies of whole blocks take 94 to 168).
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fused_optim import reference
from fused_optim.storage import FORMATS
from fused_optim.table import ROW_COLUMNS as COLUMNS_OF_ROW

from . import codecs, rules

MAX_COUNT = tl.constexpr(reference.MAX_COUNT)
HYPER_COLUMNS = tl.constexpr(len(reference.Hyperparameters._fields))
ROW_COLUMNS = tl.constexpr(len(COLUMNS_OF_ROW))
PARAM_COLUMN, MU_COLUMN, NU_COLUMN, KEY_COLUMN = (
    tl.constexpr(COLUMNS_OF_ROW.index(name)) for name in ("param", "mu", "nu", "key")
)
NUM_COEFFICIENTS = tl.constexpr(len(reference.Coefficients._fields))
LIMIT = tl.constexpr(127 + 40 << 23)
"""The bits of 2^40. Values that are all below are stored, divided and taken roots of by fast paths."""
COEFFICIENT_COLUMNS = tl.constexpr(len(reference.Coefficients._fields) + 2)
"""The coefficients are followed by found_inf and the bits of the step number."""

PROLOGUE_LANES = 128
PROLOGUE_REGISTERS = 128
THREADS = 256

Coefficients = namedtuple("Coefficients", reference.Coefficients._fields)
Launch = Callable[..., None]  # given: the number of programs, and a kernel's arguments


def chunk_size(*formats: str) -> int:
    """Elements of one program: eight to a thread, in 16 bytes of a 16-bit operand and twice that of float32,
    of which four blocks then have 128 KiB in flight; two of float64."""
    return THREADS * (2 if max(FORMATS[name].dtype.itemsize for name in formats) == 8 else 8)


def overlaps(target: Any) -> bool:
    """Whether the step kernel's programs take their places while the prologue runs (programmatic dependent
    launch). Drivers older than CUDA 12.3 cannot capture that; torch for CUDA 13 needs newer ones."""
    return codecs.is_nvidia(target, 90) and not str(torch.version.cuda).startswith("12.")


@cache
def step_constants(rule: str, param: str, grad: str, mu: str, nu: str, target: Any) -> dict[str, Any]:
    """The constexpr arguments of :func:`step_kernel` for a rule and formats, by name. ``target``: the
    ``GPUTarget`` that is compiled for, and None in the interpreter."""
    return {
        "MOMENTS": getattr(rules, f"{rule}_moments"),
        "UPDATE": getattr(rules, rule),
        "PARAM": codecs.codec(param, target),
        "GRAD": codecs.codec(grad, target),
        "MU": codecs.codec(mu, target),
        "NU": codecs.codec(nu, target),
        "CHUNK": chunk_size(param, grad, mu, nu),
        "THREADS": THREADS,
        # What is inlined needs an A100 or newer: no T4 rounds to bfloat16 or has a largest that keeps NaN.
        "PTX": True if codecs.is_nvidia(target, 80) else None,
        "OVERLAPS": overlaps(target),
    }


def registers(param: str, grad: str, mu: str, target: Any) -> int:
    """Registers that a thread of :func:`step_kernel` may take: 64 leave room for four blocks of 256
    threads in 65,536, up to 80 for three. With these nothing spills."""
    all_float32 = (param, grad, mu) == ("fp32", "fp32", "fp32")
    return 64 if all_float32 and target is not None and target.arch in (80, 86, 87, 89, 90) else 80


def launch_options(target: str, warp_size: int, threads: int, registers: int) -> dict[str, Any]:
    """Compiler options of a launch: nothing contracted, nothing flushed to zero."""
    options: dict[str, Any] = {"num_warps": threads // warp_size, "enable_fp_fusion": False}
    if target == "cuda":
        options |= {"enable_reflect_ftz": False, "maxnreg": registers}
    return options


@triton.jit
def _bias_correction(beta, count, DTYPE: tl.constexpr):
    square = beta.to(DTYPE).to(tl.float64)
    power = square * 0 + 1
    for bit in range(31):
        power = tl.where((count >> bit) & 1 == 1, power * square, power)
        square = square * square
    return 1 - power.to(DTYPE)


@triton.jit
def _next_count(counters, lane, live):
    """Where step numbers are, and the next ones."""
    step = tl.load(counters + 2 * lane, live, other=0).to(tl.pointer_type(tl.int64))
    return step, tl.minimum(tl.load(step, live, other=0) + 1, MAX_COUNT)


# Not specialised on their alignment: these may lie anywhere in tensors of the user's.
@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["grad_scale", "found_inf"])
def prologue_kernel(
    counters, n, hyper, grad_scale, found_inf, clip, coefficients, DTYPE: tl.constexpr, LANES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        gdc_launch_dependents()
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    live = lane < n
    _, count = _next_count(counters, lane, live)
    count_next = tl.minimum(count + 1, MAX_COUNT)
    h = hyper + tl.load(counters + 2 * lane + 1, live, other=0) * HYPER_COLUMNS
    lr = tl.load(h + 0, live, other=0)
    weight_decay = tl.load(h + 1, live, other=0)
    beta1 = tl.load(h + 2, live, other=0)
    beta2 = tl.load(h + 3, live, other=0)
    initial_lr = tl.load(h + 6, live, other=0)
    decoupled = initial_lr != 0
    relative_lr = lr / tl.where(decoupled, initial_lr, 1.0)
    # None specialises the kernel; a dummy tensor would need an allocation.
    divisor = tl.full([LANES], 1, DTYPE)
    if grad_scale is not None:
        divisor *= tl.load(grad_scale).to(DTYPE)
    skip = tl.zeros([LANES], tl.float32)
    if found_inf is not None:
        skip += tl.load(found_inf)
    factor = tl.full([LANES], 1, tl.float64)
    if clip is not None:
        factor *= tl.load(clip + 2)
        skip += tl.load(clip + 3).to(tl.float32)

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
    tl.store(c + 10, tl.where(decoupled, weight_decay * relative_lr, weight_decay).to(DTYPE), live)
    tl.store(c + 11, tl.where(weight_decay != 0, tl.where(decoupled, 2.0, 1.0), 0.0).to(DTYPE), live)
    tl.store(c + 12, divisor, live)
    tl.store(c + 13, tl.load(h + 8, live, other=0).to(DTYPE), live)
    tl.store(c + 14, tl.where(tl.load(h + 7, live, other=0) != 0, -1.0 * factor, factor).to(DTYPE), live)
    tl.store(c + NUM_COEFFICIENTS, skip.to(DTYPE), live)
    if DTYPE == tl.float32:  # float64 has no format that rounds by the step number
        tl.store(c + NUM_COEFFICIENTS + 1, count.to(tl.int32).to(tl.float32, bitcast=True), live)


@triton.jit
def _advance(counters, n, coefficients, LANES: tl.constexpr):
    """Write the new step numbers."""
    start = tl.program_id(0)  # 0, in a tensor
    while start < n:
        lane = start + tl.arange(0, LANES)
        live = lane < n
        step, count = _next_count(counters, lane, live)
        skip = tl.load(coefficients + lane * COEFFICIENT_COLUMNS + NUM_COEFFICIENTS, live, other=1)
        tl.store(step, count, live & (skip == 0))
        start += LANES


@triton.jit
def _coefficients(k):
    return Coefficients(
        tl.load(k), tl.load(k + 1), tl.load(k + 2), tl.load(k + 3), tl.load(k + 4), tl.load(k + 5),
        tl.load(k + 6), tl.load(k + 7), tl.load(k + 8), tl.load(k + 9), tl.load(k + 10), tl.load(k + 11),
        tl.load(k + 12), tl.load(k + 13), tl.load(k + 14),
    )  # fmt: skip


@triton.jit
def _new_param(p, g, mu, nu, at, k, UPDATE: tl.constexpr, PARAM: tl.constexpr):
    # Coefficients are loaded again, where something was stored in between: kept they take registers.
    c = _coefficients(k)
    if at.finite is not None and at.ptx is not None and PARAM.low_precision:
        if (c.nesterov == 0) & (c.bias_correction1 == 1) & (c.bias_correction2 == 1):
            # These as constants: then moments and what is corrected of them are the same registers, not
            # copies, two instructions an element.
            late = Coefficients(*c[:6], 1.0, 1.0, 1.0, *c[9:13], 0.0, c[14])
            u = UPDATE(g, mu, nu, late, "known")
        else:
            u = UPDATE(g, mu, nu, c, "known")
    elif at.ptx is not None and mu.dtype == tl.float32:
        u = UPDATE(g, mu, nu, c, "tested")
    else:
        u = UPDATE(g, mu, nu, c, None)
    # The parameter is decoded last: until then it takes fewer registers.
    return rules.apply_update(PARAM.decode(p, at), u, c)


@triton.jit
def _special(mu, nu, MU: tl.constexpr, NU: tl.constexpr):
    """For each eight elements, not zero where what is stored holds an infinity or NaN."""
    words = MU.special(mu[0]) | NU.special(nu[0])
    first, second = tl.split(tl.reshape(words, [words.shape[0] // 2, 2]))
    return first | second


@triton.jit
def _all_finite(new_p, mu, nu, special):
    """Whether what is computed with ``At.finite`` is right. One test of all values costs less than a select
    for each; with float32 moments it would cost more."""
    largest = tl.maximum(codecs.largest_of_eight(mu), codecs.largest_of_eight(nu))
    if new_p is not None:
        largest = tl.maximum(largest, codecs.largest_of_eight(new_p))
    if special is not None:
        largest = tl.where(special == 0, largest, codecs.INF)
    return tl.max(largest, 0) < LIMIT


@triton.jit
def _step(
    row, grad, at, k, skip, MOMENTS: tl.constexpr, UPDATE: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MU: tl.constexpr, NU: tl.constexpr,
):  # fmt: skip
    """Step ``at``, if values are as ``at.finite`` promises; whether they are. Where ``skip`` is not 0 nothing
    is stepped."""
    FAST: tl.constexpr = at.finite is not None
    CHECK_PARAM: tl.constexpr = at.finite is not None and PARAM.low_precision
    if CHECK_PARAM or not FAST:
        p = PARAM.load(row + PARAM_COLUMN, at)
    stored_g = GRAD.load(grad, at)
    stored_mu = MU.load(row + MU_COLUMN, at)
    stored_nu = NU.load(row + NU_COLUMN, at)
    done = at.start >= 0
    if skip == 0:  # asked for before and looked at here: tested before these loads it holds them up
        g = GRAD.decode(stored_g, at)
        c = _coefficients(k)
        # One branch for both: a multiplication of its own is a predicated instruction an element, and a copy.
        if (c.grad_divisor != 1) | (c.grad_factor != 1):
            if c.grad_divisor != 1:
                RANGE: tl.constexpr = "tested" if at.ptx is not None and g.dtype == tl.float32 else None
                g = rules.divide_by_number(g, c.grad_divisor, RANGE)
            g *= c.grad_factor
        mu, nu = MOMENTS(g, MU.decode(stored_mu, at), NU.decode(stored_nu, at), c)
        if FAST:
            special = None
            if MU.special is not None:
                # Before the update, in which what was loaded would take registers.
                special = _special(stored_mu, stored_nu, MU, NU)
            new_p = None
            if CHECK_PARAM:
                new_p = _new_param(p, g, mu, nu, at, k, UPDATE, PARAM)
            done = _all_finite(new_p, mu, nu, special)
        if done:
            # Moments first: stored after the update they take up to 16 registers more.
            NU.store(row + NU_COLUMN, at, nu, codecs.NU)
            MU.store(row + MU_COLUMN, at, mu, codecs.MU)
            if FAST and not CHECK_PARAM:
                # Loaded before, it takes registers: of 64 some spill.
                p = PARAM.load(row + PARAM_COLUMN, at)
            if not CHECK_PARAM:
                new_p = _new_param(p, g, mu, nu, at, k, UPDATE, PARAM)
            PARAM.store(row + PARAM_COLUMN, at, new_p, codecs.PARAM)
    return done


@triton.jit
def _find_chunk(rows, grads, chunks, coefficients):
    """Of the chunk of this program: its row, its gradient, its number and its coefficients."""
    entry = chunks + 2 * (tl.program_id(0).to(tl.int64) - 1)
    number = tl.load(entry).to(tl.int64)
    row = rows + number * ROW_COLUMNS
    k = coefficients + tl.load(row + 1) * COEFFICIENT_COLUMNS
    return row, grads + number, tl.load(entry + 1).to(tl.int64), k


@triton.jit(do_not_specialize=["n"])
def step_kernel(
    rows, grads, chunks, counters, n, coefficients, MOMENTS: tl.constexpr, UPDATE: tl.constexpr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MU: tl.constexpr, NU: tl.constexpr,
    CHUNK: tl.constexpr, THREADS: tl.constexpr, PTX: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        gdc_wait()  # for the prologue's end, when all that it wrote can be read
    if tl.program_id(0) == 0:
        _advance(counters, n, coefficients, THREADS)
        return
    skip = tl.load(coefficients + NUM_COEFFICIENTS)  # the first counter's, and all have the same
    row, grad, chunk, k = _find_chunk(rows, grads, chunks, coefficients)
    tail = chunk < 0
    if not tail:
        start = chunk * CHUNK
        offset = start + tl.arange(0, CHUNK)
        finite: tl.constexpr = True if MU.low_precision else None
        at = codecs.At(start, offset, None, None, k + NUM_COEFFICIENTS + 1, row + KEY_COLUMN, finite, PTX)
        tail = not _step(row, grad, at, k, skip, MOMENTS, UPDATE, PARAM, GRAD, MU, NU)
    if tail & (skip == 0):
        # Once more: kept until here they take registers.
        row, grad, chunk, k = _find_chunk(rows, grads, chunks, coefficients)
        start = tl.maximum(chunk, -1 - chunk) * CHUNK
        end = tl.minimum(start + CHUNK, tl.load(row))
        while start < end:
            offset = start + tl.arange(0, THREADS)
            block = start + tl.arange(0, THREADS // codecs.BLOCK) * codecs.BLOCK
            at = codecs.At(
                start, offset, offset < end, block < end, k + NUM_COEFFICIENTS + 1, row + KEY_COLUMN,
                None, None,
            )  # fmt: skip
            _step(row, grad, at, k, 0, MOMENTS, UPDATE, PARAM, GRAD, MU, NU)
            start += THREADS


def load(
    working: torch.dtype, scaled: bool, skippable: bool, clips: bool, constants: dict[str, Any],
    prologue_options: dict[str, Any], step_options: dict[str, Any],
) -> tuple[Launch, Launch]:  # fmt: skip
    """Both kernels, compiled and loaded onto the current device: what fails in that fails before a launch.

    Args:
        scaled, skippable, clips: whether launches have a ``grad_scale``, a ``found_inf`` and a ``clip``.
    """
    scalars = [torch.float32 if given else None for given in (scaled, skippable)]
    scalars.append(torch.float64 if clips else None)
    inputs = (torch.int64, 2, torch.float64, *scalars, working)
    dtype = getattr(tl, str(working).removeprefix("torch."))
    prologue_constants = dtype, PROLOGUE_LANES, constants["OVERLAPS"]
    tables = (torch.int64, torch.int64, torch.int32, torch.int64, 2, working)
    prologue = loaded(prologue_kernel, inputs, prologue_constants, prologue_options)
    pdl = {"launch_pdl": True} if constants["OVERLAPS"] else {}
    return prologue, loaded(step_kernel, tables, tuple(constants.values()), step_options | pdl)


def loaded(kernel: Any, like: tuple[Any, ...], constants: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    """What launches a kernel for arguments ``like`` these, with ``constants`` after them: compiled, and
    loaded onto the current device.

    It goes as ``torch.compile`` launches kernels. Through ``prologue_kernel[grid]`` Triton looks at each
    argument anew, which takes 18 to 31 us; through ``compiled[grid]`` it makes what a profiler's hooks are
    told, though there are none, which takes 1 us.
    """
    compiled = kernel.warmup(*like, *constants, grid=(1,), **options)
    if compiled is None:  # the interpreter compiles nothing
        return lambda programs, *given: kernel[programs,](*given, *constants)
    compiled[1, 1, 1]  # this loads it; compiled.run does not, once a load has failed
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    driver, hooks = triton.runtime.driver.active, triton.knobs.runtime

    def launch(programs: int, *given: Any) -> None:
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            compiled[programs, 1, 1](*given, *constants)
            return
        stream = driver.get_current_stream(driver.get_current_device())
        run(programs, 1, 1, stream, function, metadata, None, None, None, *given, *constants)

    return launch


def launch_prologue(
    launch: Launch, counters: torch.Tensor, hyper: torch.Tensor, grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None, clip: torch.Tensor | None, coefficients: torch.Tensor,
) -> None:  # fmt: skip
    """Work out the coefficients of every counter."""
    n = counters.shape[0]
    launch(-(-n // PROLOGUE_LANES), counters, n, hyper, grad_scale, found_inf, clip, coefficients)


def launch_step(
    launch: Launch, rows: torch.Tensor, grads: torch.Tensor, chunks: torch.Tensor, counters: torch.Tensor,
    coefficients: torch.Tensor,
) -> None:  # fmt: skip
    """Step every chunk and advance every counter."""
    launch(1 + chunks.shape[0], rows, grads, chunks, counters, counters.shape[0], coefficients)
