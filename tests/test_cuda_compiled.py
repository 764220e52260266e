"""The CUDA backend without a GPU: the same source run on the host, and the machine code read.

``cuda_on_host.cpp`` compiles ``csrc/step_cuda.cu`` with the host's compiler over a runtime that
runs each kernel at once; its results must be the eager backend's, bit for bit. So must those of the
PTX that nvcc makes of the same file, run by an emulator; and its machine code is searched for what a
host cannot show: contracted or approximate arithmetic, spilled registers, narrow accesses.
"""

import ast
import ctypes
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple

import ptx
import pytest
import torch
import worlds
from helpers import assert_same_bits, built_once
from torch import Tensor
from worlds import COVERING, FEW, FP32, FP64, GUARD, LOW_PRECISION, Formats, Row, Work, World, each, named

import bench.kernels
from fused_optim.rules import RULES
from fused_optim.storage import FORMATS
from fused_optim.table import Batch

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"


def setup_flags(name: str) -> list[str]:
    """A list of compiler flags in setup.py, which cannot be imported."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=found)]) if found == name:
                return ast.literal_eval(node.value)
    raise LookupError(f"setup.py has no {name}")


# The step on the host


def task_of(work: Work, coefficients: Tensor) -> list[int]:
    """The fields of CudaTask."""
    inputs, chunks, counters = work.inputs, work.chunks, work.batch.counters
    tables = [*map(address, (work.rows, work.addresses, chunks)), len(chunks)]
    tensors = (inputs.hyper, coefficients, inputs.grad_scale, inputs.found_inf, inputs.clip)
    return [*tables, address(counters), len(counters), *map(address, tensors)]


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def norm_task(batch: Batch, grad_scale: Tensor | None, sums: Tensor) -> list[int]:
    """The fields of NormTask."""
    chunks = batch.norm_chunks
    return [*map(address, (batch.rows, batch.grads, chunks)), len(chunks), address(grad_scale), address(sums)]


def clip_task(sums: Tensor, max_grad_norm: Tensor, clip: Tensor, skipped: Tensor | None) -> list[int]:
    """The fields of ClipTask."""
    return [sums.data_ptr(), len(sums), max_grad_norm.data_ptr(), clip.data_ptr(), address(skipped)]


class Host:
    """The extension's bindings over the runtime of cuda_on_host.cpp, and what that tells."""

    def __init__(self, path: Path) -> None:
        spec = importlib.util.spec_from_file_location("_cuda", path)
        self.cuda = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.cuda)
        self.library = ctypes.CDLL(str(path))
        self.library.e4m3_differences.restype = ctypes.c_int64
        self.library.launch_of_last_step.restype = ctypes.POINTER(ctypes.c_int64)
        self.library.refuse_launches.argtypes = [ctypes.c_bool]

    def step(self, work: Work, stream: int = 0) -> int:
        size = len(work.batch.counters) * self.cuda.coefficients_bytes
        coefficients = torch.full((size + GUARD,), 255, dtype=torch.uint8)
        names = [work.batch.key.rule.name, *(f.name for f in work.formats)]
        self.cuda.step(names, task_of(work, coefficients), stream)
        assert bool((coefficients[size:] == 255).all()), "written past the coefficients"
        return self.library.launches()

    def square_sums(self, batch: Batch, grad_scale: Tensor | None, sums: Tensor) -> None:
        self.cuda.square_sums(batch.key.grad.name, norm_task(batch, grad_scale, sums), 0)
        assert self.library.launches() == 1

    def clip(self, sums: Tensor, max_grad_norm: Tensor, skipped: Tensor | None) -> Tensor:
        clip = torch.empty(4, dtype=torch.float64)
        self.cuda.clip(clip_task(sums, max_grad_norm, clip, skipped), 0)
        assert self.library.launches() == 1
        return clip

    def chunk_size(self, formats: Formats | None = None) -> int:
        return self.cuda.chunk_size


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    include = [pybind11.get_include(), sysconfig.get_paths()["include"], CSRC]

    def build(folder: Path) -> None:
        (folder / "cuda_runtime.h").touch()
        flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
        included = [f"-I{path}" for path in (folder, *include)]
        command = [compiler, *flags, *setup_flags("EXACT"), *included, ROOT / "tests" / "cuda_on_host.cpp"]
        subprocess.run([*command, "-o", folder / "library.so"], check=True)

    return Host(built_once(tmp_path_factory, "cuda_on_host", build) / "library.so")


def in_turns(*others: Iterable[Any]) -> list[tuple[Any, ...]]:
    """The rules taking turns with what does not depend on them."""
    return [(rule, *of) for rule, of in zip(cycle(RULES), product(*others))]


SKIPPED, SKIPPING = (named("bf16", "fp32", "fp32", "fp32"), FEW[-1]), (1.0, -1.0, torch.inf, torch.nan)
A_WARP = 256  # the elements that one steps at once, or twice as many
ON_HOST = [
    *((worlds.check_sizes_and_alignments, *of) for of in product(RULES, COVERING)),
    *((worlds.check_edges_of_ranges, *of, A_WARP) for of in product(RULES, (FP32, worlds.SHOWS_EACH_BIT))),
    *((worlds.check_counters, *of, 8) for of in in_turns((FP32, FP64))),
    *((worlds.check_corrections_that_become_one, *of) for of in product(RULES, (FP32, FP64))),
    *((worlds.check_corrections_that_become_one, *of) for of in in_turns(LOW_PRECISION)),
    *((worlds.check_64_bit_offsets, f) for f in COVERING),
    *((worlds.check_found_inf_changes_nothing, *of) for of in in_turns(SKIPPED, SKIPPING)),
    *((worlds.check_square_sums, f) for f in worlds.OF_GRADIENTS),
    (worlds.check_clip,),
]


@each(ON_HOST)
def test_a_step_on_the_host(host: Host, check: Callable[[Host], Any]) -> None:
    check(host)


@pytest.mark.parametrize(("rule", "formats"), in_turns([FP32, *LOW_PRECISION]), ids=str)
def test_special_values(host: Host, rule: str, formats: Formats) -> None:
    host.library.yes_votes()
    both, noticed = worlds.check_special_values(host, rule, formats)
    assert host.library.yes_votes() == sum(noticed), "a warp notices its own, and no other does"
    for world in both:
        world.new_gradients()
    worlds.step_both(host, both)


@pytest.mark.parametrize("grad_exponents", worlds.GRAD_EXPONENTS, ids=str)
def test_all_codes_under_all_exponents(host: Host, grad_exponents: tuple[int, int]) -> None:
    host.library.yes_votes()
    worlds.check_all_codes_under_all_exponents(host, grad_exponents)
    # Of 720 warps, those that step once more: for tiny numerators, and for values from 2^40 on.
    most = {(-149, -20): 663, (-20, 20): 312, (20, 126): 713}
    assert host.library.yes_votes() <= most[grad_exponents]


def test_e4m3_is_rounded_as_on_the_cpu(host: Host) -> None:
    """By the GPU's own arithmetic, to the last of the bits that rounding depends on."""
    assert host.library.e4m3_differences(ctypes.c_int64(1000)) == 0


def test_launches(host: Host) -> None:
    chunk = host.chunk_size()
    world = World("adamaxw", FP32, [Row(2 * chunk + 1), Row(0), Row(5)] + [Row(0)] * 200)
    world.new_gradients()
    assert world.step(host, world.inputs(None, None), stream=1234) == 2
    prologue, step = (host.library.launch_of_last_step(i)[:3] for i in range(2))
    assert prologue[0] * prologue[1] >= 203 > (prologue[0] - 1) * prologue[1]
    assert step[0] == 4 + 1 and chunk % step[1] == 0
    assert prologue[2] == step[2] == 1234
    assert [int(s) for s in world.steps] == [1] * 203

    empty = World("adamaxw", FP32, [Row(0), Row(0)])
    assert empty.step(host, empty.inputs(None, None)) == 2
    assert [int(s) for s in empty.steps] == [1, 1]
    host.cuda.step(["adamaxw", *["fp32"] * 4], [0] * 11, 0)
    assert host.library.launches() == 0


def test_refused_launches_are_errors(host: Host) -> None:
    world = World("adabelief", named("bf16", "fp32", "e4m3", "e5m3"), [Row(5)])
    before = world.contents()
    host.library.refuse_launches(True)
    try:
        prologue = (
            r"launch of the prologue of adabelief for parameters in bf16.* failed: the error's text.*80,90"
        )
        with pytest.raises(RuntimeError, match=prologue):
            world.step(host, world.inputs(None, None))
        for load in (host.cuda.check, lambda: host.cuda.load(["adabelief", *["fp32"] * 4])):
            with pytest.raises(RuntimeError, match="^loading a.* failed: the error's text.*80,90"):
                load()
    finally:
        host.library.refuse_launches(False)
    host.cuda.check()
    host.cuda.load(["adabelief", *["fp32"] * 4])
    assert_same_bits(world.contents(), before)


UNKNOWN = [
    ("adam", "fp32", "fp32", "fp32", "fp32"), ("adamaxw", "int8", "fp32", "fp32", "fp32"),
    ("adamaxw", "fp32", "fp64", "fp32", "fp32"), ("adamaxw", "fp16", "bf16", "fp32", "fp32"),
    ("adamaxw", "fp32", "fp32", "bf16", "bf16"), ("adamaxw", "fp32", "fp32", "e4m3", "fp32"),
    ("adamaxw", "fp64", "fp64", "fp32", "fp32"), ("adamaxw", "e4m3", "fp32", "fp32", "fp32"),
]  # fmt: skip


@pytest.mark.parametrize("names", UNKNOWN)
def test_unknown_names_are_errors(host: Host, names: tuple[str, ...]) -> None:
    for use in (lambda: host.cuda.step(names, [0] * 11, 0), lambda: host.cuda.load(names)):
        with pytest.raises(ValueError, match=".*".join(names)):
            use()


def test_the_extension() -> None:
    cuda = pytest.importorskip("fused_optim._cuda", reason="fused_optim._cuda is not built")
    assert cuda.chunk_size % 2048 == 0
    numbers, divisors, words = 9, 4, 3
    assert cuda.coefficients_bytes == 8 * (numbers + 3 * divisors) + 4 * (words + 1)
    assert re.fullmatch(r"\d+(,\d+)*", cuda.archs) and cuda.compiler.startswith("nvcc ")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="^loading a kernel failed: .* driver"):
            cuda.check()


# The machine code

ARCHS = ("80", "90")
EXACT_IN_PTX = re.compile(
    r"(add|sub|mul|div|rcp|sqrt)\.rn\.f(32|64)"
    r"|(neg|abs|mov|selp|setp\.\w+|max\.NaN|ld(\.\w+)+|st(\.\w+)+)\.f(32|64)"
    r"|cvt\.rn\.f32\.f64|cvt\.f64\.f32|cvt\.rn\.(f16|bf16x2)\.f32|cvt\.f32\.f16"
)
"""Each a single correctly rounded operation, or none at all."""


class Kernel(NamedTuple):
    name: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}<{', '.join(self.arguments)}>"


class Resources(NamedTuple):
    registers: int
    stack: int  # in bytes, as is what was spilled


class Code(NamedTuple):
    """What nvcc made of the kernels, by architecture and kernel."""

    resources: dict[str, dict[Kernel, Resources]]
    sass: dict[str, dict[Kernel, list[str]]]
    ptx: dict[str, dict[Kernel, str]]


def nvcc() -> str:
    """The command, or a skip with the reason."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if found is None or shutil.which("c++filt") is None:
        pytest.skip("needs c++filt, and nvcc on the PATH or under CUDA_HOME")
    return found


def cuobjdump() -> Path:
    """The one that Triton's wheel carries, or a skip."""
    pytest.importorskip("triton", reason="needs cuobjdump from Triton's wheel, which is for Linux only")
    return bench.kernels.cuobjdump()


def output_of(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def demangled(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def kernel_of(demangled_name: str) -> Kernel:
    name, arguments = re.search(r"(\w+)<(.*)>\(", demangled_name).groups()
    return Kernel(name, tuple(a.split("::")[-1].strip() for a in arguments.split(",")))


def by_kernel(text: str, part: str, arch: str, function: str, read: Callable[[str], Any]) -> dict[str, Any]:
    """By architecture and kernel what ``read`` makes of the text about it. ``part`` is what one that is for
    an architecture begins with, and ``function`` what stands before a kernel's name."""
    found: dict[str, dict[Kernel, Any]] = {}
    for of_arch in re.split(part, demangled(text), flags=re.MULTILINE)[1:]:
        kernels = found.setdefault(re.search(arch, of_arch, re.MULTILINE)[1], {})
        for body in re.split(function, of_arch)[1:]:
            kernels[kernel_of(body.partition("\n")[0])] = read(body)
    return found


def resources_of(body: str) -> Resources:
    return Resources(*map(int, re.search(r"REG:(\d+) STACK:(\d+)", body).groups()))


def operations_of(body: str) -> list[str]:
    """In the order of their addresses."""
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", body, re.MULTILINE)


def read_resources(text: str) -> dict[str, dict[Kernel, Resources]]:
    return by_kernel(text, "Fatbin elf code:", r"arch = sm_(\w+)", "Function ", resources_of)


def read_sass(text: str) -> dict[str, dict[Kernel, list[str]]]:
    return by_kernel(text, "Fatbin elf code:", r"arch = sm_(\w+)", "Function : ", operations_of)


def read_ptx(text: str) -> dict[str, dict[Kernel, str]]:
    return by_kernel(text, r"^\.version", r"^\.target sm_(\w+)", r"\.entry ", str)


def classes(source: str) -> dict[str, str]:
    """Names of rules or formats in C++, and what they are called elsewhere."""
    return dict(
        re.findall(r'struct (\w+)[^{};]*\{[^{}]*?static constexpr const char\* name = "(\w+)"', source)
    )


FORMAT_CLASSES = classes((CSRC / "codecs.h").read_text())
RULE_CLASSES = classes((CSRC / "rules.h").read_text())
FORMAT_CLASS = {name: key for key, name in FORMAT_CLASSES.items()}
RULE_CLASS = {name: key for key, name in RULE_CLASSES.items()}


def step_kernels(pairs: Iterable[tuple[str, Formats]]) -> list[Kernel]:
    classes = [(RULE_CLASS[rule], *(FORMAT_CLASS[f.name] for f in formats)) for rule, formats in pairs]
    return [Kernel("step_kernel", arguments) for arguments in classes]


def formats_of(kernel: Kernel) -> Formats:
    return named(*(FORMAT_CLASSES[x] for x in kernel.arguments[1:]))


# AdaBelief, which has the most operands and operations, in all formats of parameters and moments; other
# rules where formats differ most.
PAIRS = [("adabelief", f) for f in COVERING] + [("adamaxw", f) for f in (*FEW, worlds.WITH_CODES)]
COMPILED = step_kernels(PAIRS)
COMPILED_TO_LOSE = step_kernels((rule, f) for f in FEW for rule in ("adabelief", "adamaxw"))


CLIP = Kernel("clip_kernel", ("double",))
SQUARE_SUMS = [Kernel("square_sums_kernel", (FORMAT_CLASS[f.grad.name],)) for f in worlds.OF_GRADIENTS]


def write_source(folder: Path, kernels: Iterable[Kernel]) -> Path:
    """A .cu with these kernels and the prologues."""
    lines = ['#include "cuda_kernels.h"', "namespace fused_optim {"]
    lines += [f"template __global__ void {kernel}(CudaTask);" for kernel in kernels]
    lines += [f"template __global__ void prologue_kernel<{t}>(CudaTask);" for t in ("float", "double")]
    lines += [f"template __global__ void {kernel}(NormTask);" for kernel in SQUARE_SUMS]
    lines.append(f"template __global__ void {CLIP}(ClipTask);")
    path = folder / "kernels.cu"
    path.write_text("\n".join([*lines, "}  // namespace fused_optim", ""]))
    return path


def compile_code(target: Path, archs: Iterable[str], kernels: Iterable[Kernel], csrc: Path = CSRC) -> None:
    """By setup.py's flags."""
    for_archs = [f"-gencode=arch=compute_{a},code=[sm_{a},compute_{a}]" for a in archs]
    command = [nvcc(), "-c", "-O3", "-std=c++17", *setup_flags("NVCC_EXACT"), *for_archs, f"-I{csrc}"]
    output_of(*command, write_source(target.parent, kernels), "-o", target)


def read_code(target: Path) -> Code:
    readers = (read_resources, "-res-usage"), (read_sass, "-sass"), (read_ptx, "-ptx")
    return Code(*(read(output_of(cuobjdump(), option, target)) for read, option in readers))


@pytest.fixture(scope="session")
def code(tmp_path_factory: pytest.TempPathFactory) -> Code:
    cuobjdump()  # skips before anything is compiled
    built = built_once(tmp_path_factory, "cuda_code", lambda to: compile_code(to / "code.o", ARCHS, COMPILED))
    return read_code(built / "code.o")


def resource_problems(resources: dict[Kernel, Resources]) -> list[str]:
    """More registers than leave room for the blocks that hide the memory's latency, or spills."""
    problems = []
    for kernel, used in resources.items():
        limit = 80 if "Fp64" in kernel.arguments else 64
        if used.registers > limit or used.stack:
            problems.append(f"{kernel}: {used}, at most {limit} registers")
    return problems


def expected_accesses(formats: Formats, n: int) -> tuple[Counter[str], Counter[str]]:
    """The widths in bytes of a thread's reads and writes of ``n`` neighbours."""
    reads: Counter[int] = Counter()
    writes: Counter[int] = Counter()
    for f, written in zip(formats, (True, False, True, True)):
        sizes = [n * f.dtype.itemsize]
        if f.aux is not None:
            sizes.append((n if f.aux.block == 1 else 1) * f.aux.dtype.itemsize)
        for size in sizes:
            widths = {min(size, 16): max(size // 16, 1)}
            reads.update(widths)
            if written:
                writes.update(widths)
    return reads, writes


def accesses(operations: Iterable[str]) -> list[tuple[Counter[int], Counter[int]]]:
    """The same of each body in the code: reads, arithmetic, and then writes with what is left of it.
    Reads of the table are LDG.CONSTANT, those of tensors other LDG."""
    bodies: list[tuple[Counter[int], Counter[int]]] = []
    reading = False
    for operation in operations:
        name, *suffixes = operation.split(".")
        if name in ("FADD", "FMUL", "FFMA", "MUFU", "FCHK", "DADD", "DMUL", "DFMA", "STG"):
            reading = False
        if name not in ("LDG", "STG") or "CONSTANT" in suffixes:
            continue
        of_suffix = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        width = next((of_suffix[suffix] for suffix in suffixes if suffix in of_suffix), 4)
        if name == "LDG" and not reading:
            bodies.append((Counter(), Counter()))
            reading = True
        if bodies:
            bodies[-1][name == "STG"][width] += 1
    return bodies


def access_problems(sass: dict[Kernel, list[str]]) -> list[str]:
    """In a full chunk every operand is read and written in the widest accesses that its elements
    fill, all reads before all arithmetic and all writes; in a tail, one element an operand; and step
    numbers are written one by one."""
    problems = []
    for kernel, operations in sass.items():
        if kernel.name != "step_kernel":
            continue
        generic = [o for o in operations if o.split(".")[0] in ("LD", "ST", "LDL", "STL", "LDS", "STS")]
        if generic:
            problems.append(f"{kernel}: {generic}")
        formats = formats_of(kernel)
        smallest = min(f.dtype.itemsize for f in formats)
        expected = [expected_accesses(formats, n) for n in (1, min(8, 16 // smallest))]
        found = accesses(operations)
        if "E4M3" in kernel.arguments:
            # Behind the shuffles ptxas may put the same writes on two paths, one of which is taken.
            for k, (reads, writes) in enumerate(found):
                once = next((w for r, w in expected if r == reads), writes)
                if set(writes) == set(once) and writes >= once:
                    found[k] = (reads, once)
        expected.append((Counter({8: 1}), Counter({8: 1})))  # where a step number lies, and the number
        if len(found) != len(expected) or any(body not in found for body in expected):
            problems.append(f"{kernel}: accesses {found}, expected {expected}")
    return problems


def arithmetic_problems(ptx: dict[Kernel, str]) -> list[str]:
    """Floating-point operations that are not one IEEE operation, rounded to nearest; or none
    of those that the rule is made of. ptxas may contract only what has no explicit rounding."""
    problems = []
    for kernel, text in ptx.items():
        chosen = bench.kernels.INLINE.sub("", text)
        operations = Counter(
            o for o in re.findall(r"\b[a-z]\w*(?:\.\w+)+", chosen) if re.search(r"\.(b?f16|f32|f64)", o)
        )
        problems += [f"{kernel}: {n} {o}" for o, n in operations.items() if not EXACT_IN_PTX.fullmatch(o)]
        if kernel.name == "step_kernel":
            t = "f64" if "Fp64" in kernel.arguments else "f32"
            needed = ["add.rn", "mul.rn", "div.rn"] + ["sqrt.rn"] * ("AdaBelief" in kernel.arguments[0])
            problems += [f"{kernel}: no {o}.{t}" for o in needed if operations[f"{o}.{t}"] == 0]
    return problems


PROLOGUES = {Kernel("prologue_kernel", ("float",)), Kernel("prologue_kernel", ("double",))}


def test_every_name_is_found() -> None:
    assert sorted(RULE_CLASSES.values()) == sorted(RULES)
    assert sorted(FORMAT_CLASSES.values()) == sorted(FORMATS)


def test_every_kernel_is_built_without_spills() -> None:
    cuda = pytest.importorskip("fused_optim._cuda", reason="fused_optim._cuda is not built")
    built = read_resources(output_of(cuobjdump(), "-res-usage", cuda.__file__))
    assert set(built) == set(cuda.archs.split(","))
    for resources in built.values():
        assert {*COMPILED, CLIP} <= set(resources)
        assert resource_problems(resources) == []


@pytest.mark.kernels
@pytest.mark.parametrize("arch", ARCHS)
def test_the_code(code: Code, arch: str) -> None:
    resources, sass, ptx = (of[arch] for of in code)
    for found in (resources, sass, ptx):
        assert set(found) == {*COMPILED, *PROLOGUES, *SQUARE_SUMS, CLIP}
    assert [*resource_problems(resources), *access_problems(sass), *arithmetic_problems(ptx)] == []


class Emulated:
    """The kernels' PTX, run by the emulator."""

    def __init__(self, host: Host, code: dict[Kernel, str]) -> None:
        self.host = host
        self.code = code

    def chunk_size(self, formats: Formats) -> int:
        return self.host.chunk_size()

    def step(self, work: Work) -> int:
        formats, inputs = work.formats, work.inputs
        counters = work.batch.counters
        size = len(counters) * self.host.cuda.coefficients_bytes
        coefficients = torch.full((size,), 255, dtype=torch.uint8)
        given = [t for t in inputs[1:] if t is not None]
        task = struct.pack("11q", *task_of(work, coefficients))
        working = "double" if formats == FP64 else "float"
        prologue = self._kernel("prologue_kernel", working)
        constants = [counters, inputs.hyper, *given]
        blocks = -(-len(counters) // prologue.threads)
        ptx.run(prologue, blocks, [task], [coefficients], [*constants, *work.steps])
        rule = RULE_CLASS[work.batch.key.rule.name]
        step = self._kernel("step_kernel", rule, *(FORMAT_CLASS[f.name] for f in formats))
        constants = [work.rows, work.addresses, work.chunks, counters, coefficients, *given, *work.grads]
        ptx.run(step, len(work.chunks) + 1, [task], [*work.stored, *work.steps], constants)
        return 2

    def square_sums(self, batch: Batch, grad_scale: Tensor | None, sums: Tensor) -> None:
        task = struct.pack("6q", *norm_task(batch, grad_scale, sums))
        kernel = self._kernel("square_sums_kernel", FORMAT_CLASS[batch.key.grad.name])
        constants = [batch.rows, batch.grads, batch.norm_chunks, *(o.grad for o in batch.items)]
        constants += [] if grad_scale is None else [grad_scale]
        ptx.run(kernel, -(-len(batch.norm_chunks) // (kernel.threads // ptx.WARP)), [task], [sums], constants)

    def clip(self, sums: Tensor, max_grad_norm: Tensor, skipped: Tensor | None) -> Tensor:
        clip = torch.empty(4, dtype=torch.float64)
        task = struct.pack("5q", *clip_task(sums, max_grad_norm, clip, skipped))
        written = [clip] if skipped is None else [clip, skipped]
        ptx.run(self._kernel(CLIP.name, *CLIP.arguments), 1, [task], written, [sums, max_grad_norm])
        return clip

    def _kernel(self, name: str, *arguments: str) -> ptx.Kernel:
        return ptx.parse_entry(self.code[Kernel(name, arguments)])


@pytest.fixture(scope="session")
def emulated(host: Host, code: Code) -> Emulated:
    return Emulated(host, code.ptx["90"])


OF_PTX = [
    *((worlds.check_sizes_and_alignments, *pair) for pair in PAIRS),
    *((worlds.check_special_values, *pair) for pair in PAIRS if pair[1] in LOW_PRECISION),
    *((worlds.check_edges_of_ranges, *p, A_WARP) for p in PAIRS if p[1] in (FP32, worlds.SHOWS_EACH_BIT)),
    *((worlds.check_all_codes_under_all_exponents, given) for given in worlds.GRAD_EXPONENTS),
    *((worlds.check_corrections_that_become_one, *pair) for pair in PAIRS if pair[1] in FEW),
    *((worlds.check_counters, "adamaxw", f, 5) for f in FEW),
    *((worlds.check_found_inf_changes_nothing, "adamaxw", f, x) for f in FEW for x in (1.0, torch.nan)),
    *((worlds.check_64_bit_offsets, f) for f in FEW),
    *((worlds.check_square_sums, f) for f in worlds.OF_GRADIENTS),
    (worlds.check_clip,),
]


@pytest.mark.kernels
@each(OF_PTX)
def test_a_step_of_ptx(emulated: Emulated, check: Callable[[Emulated], Any]) -> None:
    check(emulated)


LOST = [
    ("-fmad=true", ["fma.rn.f32", "fma.rn.f64"]),
    ("-use_fast_math", ["div.approx.ftz.f32", "fma.rn.ftz.f32", "mul.ftz.f32"]),
]


@pytest.mark.kernels
@pytest.mark.parametrize(("flag", "found"), LOST)
def test_lost_exactness_is_seen(tmp_path: Path, flag: str, found: list[str]) -> None:
    command = [nvcc(), "-ptx", "-O3", "-std=c++17", flag, "-arch=compute_90", f"-I{CSRC}"]
    output_of(*command, write_source(tmp_path, COMPILED_TO_LOSE), "-o", tmp_path / "ptx")
    problems = arithmetic_problems(read_ptx((tmp_path / "ptx").read_text())["90"])
    steps = [str(k) for k in COMPILED_TO_LOSE]
    assert all(any(problem.startswith(f"{kernel}:") for problem in problems) for kernel in steps)
    for operation in found:
        assert any(problem.endswith(f" {operation}") for problem in problems), operation


@pytest.mark.kernels
def test_lost_vectors_and_registers_are_seen(tmp_path: Path) -> None:
    cuobjdump()
    csrc = Path(shutil.copytree(CSRC, tmp_path / "csrc"))
    text = (csrc / "cuda_kernels.h").read_text()
    for old, new in (("struct alignas(bytes) Access", "struct Access"), ("sizeof(T) == 8 ? 3 : 4", "8")):
        assert text.count(old) == 1, f"{old!r} is not in cuda_kernels.h"
        text = text.replace(old, new)
    (csrc / "cuda_kernels.h").write_text(text)
    compile_code(tmp_path / "code.o", ["90"], COMPILED_TO_LOSE, csrc)
    lost = read_code(tmp_path / "code.o")
    steps = [str(k) for k in COMPILED_TO_LOSE]
    problems = access_problems(lost.sass["90"])
    assert all(any(problem.startswith(f"{kernel}:") for problem in problems) for kernel in steps)
    assert any(used.stack for used in lost.resources["90"].values())
    assert resource_problems(lost.resources["90"])
