"""The emulator that the other tests trust: each operation against known answers, each thing that a
kernel must not do against a kernel that does it."""

import math
import re
import struct
from collections.abc import Callable, Sequence

import ptx
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.kernels
THREADS = 64


def kernel(body: str) -> ptx.Kernel:
    """A kernel of two warps. In %rd1 is the address of 16 bytes for each thread, in %r1 the thread, in %r2
    the block; the body may go to DONE."""
    (parsed,) = ptx.parse(f"""
.visible .entry tried(
    .param .u64 tried_param_0
)
.reqntid {THREADS}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<40>;
    .reg .b64 %rd<9>;
    ld.param.u64 %rd0, [tried_param_0];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mul.wide.u32 %rd2, %r1, 16;
    add.s64 %rd1, %rd0, %rd2;
    {body}
$DONE:
    ret;
}}
""")
    return parsed


def run(body: str, data: Tensor, blocks: int = 1, constants: Sequence[Tensor] = (), shared: int = 0) -> None:
    tensors = [] if constants else [data]
    ptx.run(kernel(body), blocks, [struct.pack("q", data.data_ptr())], tensors, constants, shared)


def result(operation: str, *inputs: int) -> int:
    """What ``operation`` makes in %rd8 of %rd3, %rd4 and %rd5, or of %r and %rs registers of the same
    numbers, which hold their low bits."""
    data = torch.zeros(1, 2, dtype=torch.int64)
    moves = [f"mov.u64 %rd{i}, {x};" for i, x in enumerate(inputs, 3)]
    moves += [f"cvt.u32.u64 %r{i}, %rd{i}; cvt.u16.u64 %rs{i}, %rd{i};" for i in range(3, 3 + len(inputs))]
    moves += ["mov.u64 %rd8, 0; mov.u32 %r8, 0; mov.u16 %rs8, 0; setp.ne.u32 %p1, %r1, 0; @%p1 bra $DONE;"]
    for name in ("%rd8", "%r8", "%rs8"):
        if re.search(rf"{name}\b", operation):
            widths = {"%rd8": "", "%r8": "cvt.u64.u32 %rd8, %r8;", "%rs8": "cvt.u64.u16 %rd8, %rs8;"}
            run(" ".join([*moves, operation, widths[name], "st.global.u64 [%rd1], %rd8;"]), data)
            return int(data[0, 0]) & (2**64 - 1)
    raise AssertionError(f"{operation} has no result")


def float_bits(whole: str, real: str) -> Callable[[float], int]:
    return lambda x: struct.unpack(whole, struct.pack(real, x))[0]


f16, f32, f64 = float_bits("H", "e"), float_bits("I", "f"), float_bits("Q", "d")
NAN = 0x7FFFFFFF
M = 2**32 - 1
KNOWN = [
    ("add.rn.f32 %r8, %r3, %r4;", (f32(1.0), f32(2.0**-24)), f32(1.0)),
    ("add.rn.f32 %r8, %r3, %r4;", (f32(1.0), f32(3 * 2.0**-24)), f32(1 + 2.0**-22)),
    ("add.rn.f32 %r8, %r3, %r4;", (f32(math.inf), f32(-math.inf)), NAN),
    ("add.rn.f32 %r8, %r3, %r4;", (0xFFC00001, f32(1.0)), NAN),
    ("add.rn.f32 %r8, %r3, 0f3F800000;", (f32(2.0),), f32(3.0)),
    ("add.rn.f32.f16 %r8, %rs3, %r4;", (f16(0.5), f32(0.25)), f32(0.75)),
    ("neg.f32 %r8, %r3;", (f32(0.0),), f32(-0.0)),
    ("abs.f32 %r8, %r3;", (f32(-1.5),), f32(1.5)),
    ("mul.rn.f32 %r8, %r3, %r4;", (f32(2.0**-126), f32(0.5)), 0x00400000),
    ("mul.rn.f64 %rd8, %rd3, %rd4;", (f64(0.1), f64(3.0)), f64(0.1 * 3.0)),
    ("mul.rn.f32x2 %rd8, %rd3, %rd4;", (f32(2.0) << 32 | f32(3.0), f32(5.0) << 32 | f32(7.0)),
     f32(10.0) << 32 | f32(21.0)),
    ("div.rn.f32 %r8, %r3, %r4;", (f32(1.0), f32(3.0)), 0x3EAAAAAB),
    ("div.rn.f32 %r8, %r3, %r4;", (3, f32(2.0)), 2),
    ("sqrt.rn.f32 %r8, %r3;", (f32(2.0),), 0x3FB504F3),
    ("sqrt.rn.f32 %r8, %r3;", (f32(-1.0),), NAN),
    ("max.NaN.f32 %r8, %r3, %r4;", (0xFFC00000, f32(1.0)), NAN),
    ("max.NaN.f32 %r8, %r3, %r4, %r5;", (f32(1.0), f32(3.0), f32(2.0)), f32(3.0)),
    ("max.NaN.f32 %r8, %r3, %r4, %r5;", (f32(1.0), f32(3.0), 0xFFC00000), NAN),
    ("max.f32 %r8, %r3, %r4;", (0xFFC00000, f32(1.0)), f32(1.0)),
    ("max.f32 %r8, %r3, %r4;", (f32(-0.0), f32(0.0)), f32(0.0)),
    ("max.s32 %r8, %r3, %r4;", (M, 1), 1),
    ("min.s64 %rd8, %rd3, -1;", (5,), 2**64 - 1),
    ("add.s32 %r8, %r3, 1;", (M,), 0),
    ("sub.s32 %r8, %r3, %r4;", (0, 1), M),
    ("mul.lo.s32 %r8, %r3, %r4;", (0x10001, 0x10001), 0x20001),
    ("mul.wide.s32 %rd8, %r3, 4;", (M,), 2**64 - 4),
    ("mad.lo.s32 %r8, %r3, %r4, %r5;", (M, 2, 3), 1),
    ("shl.b32 %r8, %r3, %r4;", (3, 31), 2**31),
    ("shl.b32 %r8, %r3, %r4;", (3, 32), 0),
    ("shr.u32 %r8, %r3, %r4;", (M, 40), 0),
    ("shr.s32 %r8, %r3, %r4;", (2**31, 40), M),
    ("and.b32 %r8, %r3, %r4;", (5, 6), 4),
    ("bfe.u32 %r8, %r3, 4, 8;", (0xABCDE,), 0xCD),
    ("bfe.s32 %r8, %r3, 4, 4;", (0x90,), M - 6),
    ("bfe.s32 %r8, %r3, 4, 0;", (0xDEADBEEF,), 0),
    ("bfe.u32 %r8, %r3, 4, 100;", (0xDEADBEEF,), 0xDEADBEE),
    ("bfe.s32 %r8, %r3, 60, 8;", (0xDEADBEEF,), M),
    ("bfe.u64 %rd8, %rd3, 60, 8;", (0xDEADBEEFDEADBEEF,), 0xD),
    ("prmt.b32 %r8, %r3, %r4, 0x7531U;", (0x44332211, 0x88776655), 0x88664422),
    ("prmt.b32 %r8, %r3, %r4, 0x8888U;", (0x80, 0), M),
    ("cvt.s64.s32 %rd8, %r3;", (M,), 2**64 - 1),
    ("cvt.u16.u32 %rs8, %r3;", (0x12345,), 0x2345),
    ("cvt.s32.s16 %r8, %rs3;", (0x8000,), 0xFFFF8000),
    ("cvt.rzi.s32.f32 %r8, %r3;", (f32(-1.9),), M),
    ("cvt.rzi.s32.f32 %r8, %r3;", (f32(3e9),), 2**31 - 1),
    ("cvt.rzi.s32.f32 %r8, %r3;", (NAN,), 0),
    ("cvt.rn.f32.f64 %r8, %rd3;", (f64(1 + 2.0**-24),), f32(1.0)),
    ("cvt.f64.f32 %rd8, %r3;", (f32(0.1),), f64(struct.unpack("f", struct.pack("f", 0.1))[0])),
    ("cvt.rn.f16.f32 %rs8, %r3;", (f32(65520.0),), f16(math.inf)),
    ("cvt.rn.f16x2.f32 %r8, %r3, %r4;", (0xFFC00001, f32(2.0)), 0x7FFF << 16 | f16(2.0)),
    ("cvt.rn.bf16x2.f32 %r8, %r3, %r4;", (0x3F808000, 0xBF818000), 0x3F80 << 16 | 0xBF82),
    ("cvt.rn.bf16x2.f32 %r8, %r3, %r4;", (0xFF800001, 0x7F7FFFFF), 0x7FFF << 16 | 0x7F80),
    ("cvt.rn.f16x2.e4m3x2 %r8, %rs3;", (0x81 << 8 | 0x7E,), f16(-(2.0**-9)) << 16 | f16(448.0)),
    ("cvt.rn.f16x2.e4m3x2 %r8, %rs3;", (0x3880,), f16(1.0) << 16 | f16(-0.0)),
    ("cvt.rn.f16x2.e4m3x2 %r8, %rs3;", (0x7FFF,), 0x7FFF7FFF),
    ("cvt.f32.f16 %r8, %rs3;", (1,), f32(2.0**-24)),
    ("cvt.f32.f16 %r8, %rs3;", (0xFE00,), NAN),
    ("mov.b64 {%r6, %r8}, %rd3;", (7 << 32 | 5,), 7),
    ("mov.b32 %r8, {%rs3, %rs4};", (5, 7), 7 << 16 | 5),
    ("setp.lt.s32 %p2, %r3, %r4; selp.b32 %r8, 10, 20, %p2;", (M, 1), 10),
    ("setp.le.s32 %p2, %r3, %r4; selp.b32 %r8, 10, 20, %p2;", (4, 4), 10),
    ("setp.ne.f32 %p2, %r3, %r3; selp.b32 %r8, 10, 20, %p2;", (NAN,), 20),
    ("setp.neu.f32 %p2, %r3, %r3; selp.b32 %r8, 10, 20, %p2;", (NAN,), 10),
    ("setp.geu.f32 %p2, %r3, %r4; selp.b32 %r8, 10, 20, %p2;", (NAN, 0), 10),
    ("setp.nan.f64 %p2, %rd3, %rd3; not.pred %p3, %p2; selp.b32 %r8, 10, 20, %p3;", (f64(1.0),), 10),
    ("setp.eq.u32 %p2, %r1, 0; @!%p2 mov.u32 %r3, 9; mov.u32 %r8, %r3;", (4,), 4),
    ("rcp.rn.f32 %r8, %r3;", (f32(-3.0),), 0xBEAAAAAB),
    ("{fma.rn.f32 %r8, %r3, %r4, %r5;}", (f32(1 + 2.0**-23), f32(1 - 2.0**-23), f32(-1.0)), f32(-(2.0**-46))),
    *((f"// begin inline asm\n{operation}\n// end inline asm\n", *known) for operation, *known in (
        ("fma.rn.f32 %r8, %r3, %r4, %r5;", (f32(1 + 2.0**-23), f32(1 - 2.0**-23), f32(-1.0)), f32(-2.0**-46)),
        # 2^-70 below a tie, which it would be if it were rounded to float64 first.
        ("fma.rn.f32 %r8, %r3, %r4, %r5;", (f32(2.0**-12 * (1 + 2.0**-23)),
         f32(2.0**-12 * (1 - 2.0**-23)), f32(1 + 2.0**-23)), f32(1 + 2.0**-23)),
        ("fma.rn.f32 %r8, %r3, %r4, %r5;", (f32(2.0**-75), f32(2.0**-75), f32(-0.0)), 0),
        ("fma.rn.f32 %r8, %r3, %r4, %r5;", (f32(2.0**100), f32(2.0**100), f32(-math.inf)), f32(-math.inf)),
        ("fma.rn.f32 %r8, %r3, %r4, %r5;", (f32(math.inf), 0, f32(1.0)), NAN),
        ("rcp.approx.ftz.f32 %r8, %r3;", (f32(4.0),), f32(0.25)),
        ("rcp.approx.ftz.f32 %r8, %r3;", (f32(-3.0),), 0xBEAAAAAB),
        ("rcp.approx.ftz.f32 %r8, %r3;", (0x807FFFFF,), f32(-math.inf)),
        ("rcp.approx.ftz.f32 %r8, %r3;", (f32(2.0**127),), 0),
        ("rsqrt.approx.ftz.f32 %r8, %r3;", (f32(2.0**-126),), f32(2.0**63)),
        ("rsqrt.approx.ftz.f32 %r8, %r3;", (f32(2.0),), 0x3F3504F3),
        ("rsqrt.approx.ftz.f32 %r8, %r3;", (1,), f32(math.inf)),
        ("rsqrt.approx.ftz.f32 %r8, %r3;", (f32(math.inf),), 0),
        ("rsqrt.approx.ftz.f32 %r8, %r3;", (f32(-1.0),), NAN),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "inputs", "expected"), KNOWN)
def test_known_answers(operation: str, inputs: tuple[int, ...], expected: int) -> None:
    assert result(operation, *inputs) == expected


def test_threads_of_a_warp_exchange() -> None:
    data = torch.zeros(2 * THREADS, 4, dtype=torch.int32)
    body = """
        mul.wide.u32 %rd3, %r2, 1024; add.s64 %rd1, %rd1, %rd3;
        mov.u32 %r9, -1; mov.u32 %r10, 31; mov.u32 %r11, 5;
        shfl.sync.bfly.b32 %r3|%p1, %r1, %r11, %r10, %r9;
        redux.sync.max.s32 %r4, %r1, %r9;
        setp.eq.u32 %p2, %r1, 40; vote.sync.any.pred %p3, %p2, %r9; selp.b32 %r5, 1, 0, %p3;
        st.global.v4.b32 [%rd1], {%r3, %r4, %r5, %r2};
    """
    run(body, data, blocks=2)
    thread = torch.arange(2 * THREADS)
    lane = thread % THREADS
    expected = [lane ^ 5, lane // 32 * 32 + 31, lane // 32, thread // THREADS]
    assert torch.equal(data, torch.stack(expected, 1).int())


def test_threads_go_apart_and_meet_again() -> None:
    """A loop of as many turns as the thread's number, a barrier, and the last threads stop."""
    data = torch.zeros(THREADS, 4, dtype=torch.int32)
    body = """
        mov.u32 %r3, 0; mov.u32 %r4, 0;
    $LOOP:
        setp.ge.u32 %p2, %r3, %r1; @%p2 bra $END;
        add.s32 %r4, %r4, %r3; add.s32 %r3, %r3, 1; bra $LOOP;
    $END:
        shl.b32 %r5, %r1, 2; sub.s32 %r7, 252, %r5;
        st.shared.b32 [%r5], %r4;
        bar.sync 0;
        ld.shared.b32 %r6, [%r7];
        setp.ge.u32 %p1, %r1, 50; @%p1 ret;
        st.global.v2.b32 [%rd1], {%r4, %r6};
    """
    run(body, data, shared=4 * THREADS)
    sums = torch.tensor([n * (n - 1) // 2 for n in range(THREADS)]).int()
    assert torch.equal(data[:50, :2], torch.stack([sums, sums.flip(0)], 1)[:50])
    assert not data[50:].any()


FAULTS = {
    "contracted": ("fma.rn.f32 %r3, %r1, %r1, %r1;", "does not know this"),
    "free to be contracted": ("add.f32 %r3, %r1, %r1;", "does not know this"),
    "approximate reciprocal": ("rcp.approx.ftz.f32 %r3, %r1;", "does not know this"),
    "approximate division": ("div.full.f32 %r3, %r1, %r1;", "does not know this"),
    "division of integers": ("div.u32 %r3, %r1, %r1;", "does not know this"),
    "another barrier": ("bar.sync 1;", "does not know this"),
    "a fence": ("membar.gl;", "does not know this"),
    "a negated operand": ("setp.eq.u32 %p1, %r1, 0; selp.b32 %r3, 1, 0, !%p1;", "does not know this"),
    "a decimal float": ("add.rn.f32 %r3, %r1, 1.5;", "does not know this"),
    "an unknown name": ("mov.u32 %r3, somewhere;", "does not know this"),
    "another instruction": ("atom.global.add.u32 %r3, [%rd1], 1;", "does not know this"),
    "unwritten register": ("add.s32 %r3, %r4, 1;", "%r4 is read before it is written"),
    "unaligned": ("ld.global.v2.b32 {%r3, %r4}, [%rd1+4];", "thread 0 of block 0 is not aligned"),
    "before": ("ld.global.b32 %r3, [%rd1+-4];", "thread 0 of block 0 is outside"),
    "behind": ("ld.global.b32 %r3, [%rd1+16];", "thread 63 of block 0 is outside"),
    "across the end": ("add.s64 %rd1, %rd1, 8; ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd1];", "outside"),
    "nowhere": ("mov.u64 %rd3, 0; ld.global.b32 %r3, [%rd3];", "is outside what was allocated at 0x0"),
    "behind shared memory": ("mov.u32 %r3, 256; ld.shared.b32 %r4, [%r3];", "is outside"),
    "two write": ("st.global.b32 [%rd0], %r1;", "is in a race"),
    "blocks write": ("st.global.b32 [%rd1], %r2;", "is in a race"),
    "read what another wrote": ("st.global.b32 [%rd1], %r1; ld.global.b32 %r3, [%rd0];", "is in a race"),
    "write what another read": ("ld.global.b32 %r3, [%rd0]; st.global.b32 [%rd1], %r1;", "is in a race"),
    "shared, no barrier": ("""
        mov.u32 %r3, 0; shl.b32 %r4, %r1, 2; st.shared.b32 [%r4], %r1;
        ld.shared.b32 %r5, [%r3];""", "is in a race"),
    "an exchange is no barrier of memory": ("""
        mov.u32 %r3, 0; shl.b32 %r4, %r1, 2; st.shared.b32 [%r4], %r1; mov.u32 %r9, -1;
        redux.sync.max.s32 %r5, %r1, %r9; ld.shared.b32 %r5, [%r3];""", "thread 1 of block 0 is in a race"),
    "what nobody wrote": ("mov.u32 %r3, 0; ld.shared.b32 %r4, [%r3];", "reads what nobody wrote"),
    "what may be written is no constant": ("ld.global.nc.b32 %r3, [%rd1];", "reads as a constant"),
    "a barrier for some": ("""
        setp.lt.u32 %p1, %r1, 32; @%p1 bra $ONE; bar.sync 0; bra $DONE;
    $ONE:
        bar.sync 0; bra $DONE;""", "threads wait at a barrier"),
    "a barrier for those that are left": (
        "setp.lt.u32 %p1, %r1, 16; @%p1 bra $DONE; bar.sync 0;", "threads wait at a barrier"),
    "an exchange of some": ("""
        setp.lt.u32 %p1, %r1, 8; mov.u32 %r9, -1; @%p1 redux.sync.max.s32 %r5, %r1, %r9;""",
        "threads of one warp are apart"),
    "an exchange within less than a warp": (
        "mov.u32 %r9, 255; redux.sync.max.s32 %r5, %r1, %r9;", "not for the whole warp"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_faults(what: str) -> None:
    body, message = FAULTS[what]
    data = torch.zeros(THREADS, 4, dtype=torch.int32)
    with pytest.raises(ptx.Fault, match=message):
        run(body, data, blocks=2, shared=256)
    assert not data.any(), "something was written"


def test_what_is_ordered_is_no_race() -> None:
    """Across a barrier, and to write after others of the warp read, across an exchange of what they read."""
    body = """
        shl.b32 %r4, %r1, 2; xor.b32 %r5, %r4, 4; sub.s32 %r6, 252, %r4; mov.u32 %r9, -1;
        st.shared::cta.b32 [%r4], %r1;
        bar.sync 0;
        ld.shared.b32 %r7, [%r5];
        redux.sync.max.s32 %r3, %r7, %r9;
        st.shared.b32 [%r4], %r7;
        bar.sync 0;
        ld.shared.b32 %r8, [%r6];
        st.global.b32 [%rd1], %r8;
    """
    data = torch.zeros(THREADS, 4, dtype=torch.int32)
    run(body, data, shared=256)
    assert torch.equal(data[:, 0], (THREADS - 1 - torch.arange(THREADS)).int() ^ 1)


def test_constants_are_only_read() -> None:
    data = torch.ones(THREADS, 4, dtype=torch.int32)
    run("ld.global.nc.b32 %r3, [%rd1];", data, constants=[data])
    with pytest.raises(ptx.Fault, match="writes what is only to be read"):
        run("st.global.b32 [%rd1], %r1;", data, constants=[data])


def test_what_overlaps_waits_for_the_kernel_before() -> None:
    """Each thread, before it reads or writes."""
    data = torch.zeros(THREADS, 4, dtype=torch.int32)
    given = 1, [struct.pack("q", data.data_ptr())], [data], [], 0
    wait = "griddepcontrol.launch_dependents; griddepcontrol.wait;"
    some_wait = f"setp.lt.u32 %p1, %r1, 8; @%p1 bra $LATE; {wait} $LATE:"
    for waits in ("", "griddepcontrol.launch_dependents;", some_wait):
        for access in ("st.global.b32 [%rd1], %r1;", "ld.global.b32 %r3, [%rd1];"):
            with pytest.raises(ptx.Fault, match="thread 0 of block 0 does not wait for the kernel before"):
                ptx.run(kernel(f"{waits} {access}"), *given, overlaps=True)
    assert not data.any()
    ptx.run(kernel(f"{wait} st.global.b32 [%rd1], %r1;"), *given, overlaps=True)
    assert torch.equal(data[:, 0], torch.arange(THREADS).int())


def test_what_is_not_written_stays() -> None:
    """Not what it was when the kernel began, in memory that something else writes to meanwhile."""
    data = torch.zeros(THREADS, 4, dtype=torch.int32)
    writes = kernel("st.global.b32 [%rd1], %r1;")
    launch = ptx.Launch(writes, 1, [struct.pack("q", data.data_ptr())], [data], [], 0, overlaps=False)
    data.fill_(7)
    launch.run()
    assert torch.equal(data[:, 0], torch.arange(THREADS).int()) and bool((data[:, 1:] == 7).all())
