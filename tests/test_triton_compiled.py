"""What the Triton kernels compile to, for GPUs that are not here, on the newest Triton and
on 3.6, which torch 2.11 brings: the interpreter shows no approximate division, no
contraction, no narrow access, no spill and no race. The reports are looked at, and what
NVIDIA's kernels are assembled from is run by an emulator.

``make test`` puts Triton 3.6 under ``.venv/triton-3.6``; FUSED_OPTIM_TRITON_3_6 names
another place.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import ptx
import pytest
import torch
from helpers import built_once
from torch import Tensor
from worlds import (
    FP32,
    FP64,
    GRAD_EXPONENTS,
    Formats,
    Work,
    check_64_bit_offsets,
    check_all_codes_under_all_bases,
    check_corrections_that_become_one,
    check_counters,
    check_found_inf_changes_nothing,
    check_sizes_and_alignments,
    named,
    step_both,
    unusual_worlds,
)

pytest.importorskip("triton", reason="Triton is for Linux only")

from bench.formats import STATES, TRIPLES
from bench.kernels import problems
from bench.triton_report import RULES

ROOT = Path(__file__).parents[1]
OLD = Path(os.environ.get("FUSED_OPTIM_TRITON_3_6", ROOT / ".venv" / "triton-3.6"))
VERSIONS = [
    "installed",
    pytest.param(
        "3.6",
        marks=pytest.mark.skipif(
            not OLD.exists(), reason="Triton 3.6 is not under .venv/triton-3.6; make test puts it there"
        ),
    ),
]
TARGETS = ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"]
PLAIN = (
    "fp32:fp32:fp32",
    "bf16:bf16:fp32",
    "fp16:fp16:fp32",
    "fp32:bf16:fp32",
    "bf16:fp32:fp32",
    "fp64:fp64:fp64",
)
HEAVY = (
    "fp32:fp32:8bit",
    "bf16:bf16:8bit",
    "bf16_stochastic:bf16:8bit",
    "split8:bf16:8bit",
    "split8:bf16:fp32",
    "bf16_master:bf16:fp32",
)
"""The formats of the highest registers, looked at on every target; the others on one."""


@cache
def report(version: str, *arguments: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if version == "3.6":
        environment["PYTHONPATH"] = str(OLD)
    command = [sys.executable, "-m", "bench.triton_report", *arguments]
    ran = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert rows[0]["triton"].startswith("3.6.") or version != "3.6"
    return rows


def formats(*names: str) -> tuple[str, ...]:
    return tuple(f"--formats={name}" for name in names)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiled_kernels(version: str, target: str) -> None:
    rows = report(version, "--target", target, *formats(*PLAIN, *HEAVY))
    assert len(rows) == 3 * len(PLAIN + HEAVY) + 2
    assert [(row, problem) for row in rows if (problem := problems(row))] == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("rule", RULES)
def test_every_format(version: str, rule: str) -> None:
    others = [":".join(f) for f in TRIPLES if ":".join(f) not in (*PLAIN, *HEAVY)]
    rows = report(version, "--target", "cuda:90", "--rule", rule, *formats(*others))
    assert len(rows) == len(others) + 2
    assert [(row, problem) for row in rows if (problem := problems(row))] == []


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_contraction_is_caught(target: str) -> None:
    rows = report("installed", "--target", target, "--rule", "adamaxw", "--fp-fusion", *formats(*PLAIN))
    assert all("contracted" in problems(row) for row in rows if row["kernel"] == "step")


LOSSES = {
    "narrow accesses": ("codecs.py", "pointer = tl.multiple_of(pointer, 16)", "pass", "128-bit loads"),
    "masked full chunks": (
        "step.py",
        "codecs.At(start, offset, None,",
        "codecs.At(start, offset, offset < tl.load(row),",
        "128-bit loads",
    ),
    "narrow bytes": ("codecs.py", "pointer = tl.multiple_of(pointer, 16)", "pass", "64-bit stores of bytes"),
    "a base for each element": (
        "codecs.py",
        "_of_elements(_load_base(row, at) << 23)",
        "(tl.load(_pointer(row + EXTRA, tl.uint8, at) + at.offset // BLOCK, at.mask).to(tl.int32) << 23)",
        "byte loads where",
    ),
    "approximate division": ("rules.py", "return tl.div_rn(x, y)", "return x / y", "approximate"),
    "approximate square root": ("rules.py", "return tl.sqrt_rn(x)", "return tl.sqrt(x)", "approximate"),
    "lost NaN": ("rules.py", ", propagate_nan=tl.PropagateNan.ALL", "", "nan_dropping_max"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_caught(loss: str, tmp_path: Path) -> None:
    file, good, bad, expected = LOSSES[loss]
    folder = Path(shutil.copytree(ROOT / "kernels", tmp_path / "kernels"))
    text = (folder / file).read_text()
    assert good in text
    (folder / file).write_text(text.replace(good, bad))
    rule = "adamaxw" if loss == "lost NaN" else "adabelief"
    state = "8bit" if loss in ("narrow bytes", "a base for each element") else "fp32"
    rows = report(
        "installed",
        "--target",
        "cuda:90",
        "--rule",
        rule,
        "--kernels",
        str(folder),
        f"--formats=fp32:fp32:{state}",
    )
    row = next(row for row in rows if row["kernel"] == "step")
    assert any(expected in problem for problem in problems(row)), (row, problems(row))


class Emulated:
    """The kernels' PTX, run by the emulator, as ``fused_optim.backends.triton`` launches them."""

    def __init__(self, folder: Path) -> None:
        from fused_optim.kernels import step

        self.folder = folder
        self.module: Any = step
        self.shared_bytes = json.loads((folder / "shared_bytes.json").read_text())

    def chunk_size(self, formats: Formats) -> int:
        return int(self.module.chunk_size(*(f.dtype.itemsize for f in formats)))

    def step(self, work: Work) -> int:
        formats, inputs = work.formats, work.inputs
        columns = len(work.counters) * self.module.COEFFICIENT_COLUMNS.value
        coefficients = torch.full((columns,), torch.nan, dtype=formats.param.working)
        # Compiled for both to be there; with these they have no effect.
        grad_scale = torch.ones(()) if inputs.grad_scale is None else inputs.grad_scale
        found_inf = torch.zeros(()) if inputs.found_inf is None else inputs.found_inf
        constants = [inputs.hyper, grad_scale, found_inf]
        self._launch(
            "prologue-fp64" if formats == FP64 else "prologue-fp32",
            -(-len(work.counters) // self.module.PROLOGUE_LANES),
            [work.counters, len(work.counters), *constants, coefficients],
            [coefficients, *work.steps],
            [work.counters, *constants],
        )
        (state,) = (name for name, pair in STATES.items() if pair == (formats.mu.name, formats.nu.name))
        name = f"step-{work.rule}-{formats.param.name}-{formats.grad.name}-{state}"
        arguments = [work.rows, work.chunks, coefficients]
        self._launch(name, len(work.chunks), arguments, work.stored, [*arguments, *work.grads])
        return 2

    def _launch(
        self, name: str, blocks: int, arguments: Sequence[Tensor | int], tensors: Sequence[Tensor],
        constants: Sequence[Tensor],
    ) -> None:  # fmt: skip
        (kernel,) = ptx.parse((self.folder / f"{name}.ptx").read_text())
        packed = [
            struct.pack("i", a) if isinstance(a, int) else struct.pack("q", a.data_ptr()) for a in arguments
        ]
        packed += [struct.pack("q", 0)] * 2  # Triton's scratch memory, of which there is none
        ptx.run(kernel, blocks, packed, tensors, constants, self.shared_bytes[name])


FORMATS = {":".join(names): named(*names[:2], *STATES[names[2]]) for names in TRIPLES}
FEW = [FP32, FP64, FORMATS["bf16:bf16:bf16"], FORMATS["split8:bf16:8bit"]]


def write_ptx(folder: Path, version: str, *arguments: str) -> None:
    """What kernels compile to, and how much shared memory each takes."""
    rows = report(version, "--ptx", str(folder), *arguments)
    names = [[row[key] for key in ("kernel", "rule", "param", "grad", "state")] for row in rows]
    shared = {"-".join(filter(None, name)): row["shared_bytes"] for name, row in zip(names, rows)}
    (folder / "shared_bytes.json").write_text(json.dumps(shared))


@pytest.fixture(scope="session", params=VERSIONS)
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    """For sm_90."""
    version = request.param
    name = f"triton_ptx_{version}"
    return Emulated(built_once(tmp_path_factory, name, lambda folder: write_ptx(folder, version)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
def test_ptx_of_sizes_and_alignments(emulated: Emulated, rule: str, formats: Formats) -> None:
    check_sizes_and_alignments(emulated, rule, formats)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("formats", [f for f in FORMATS.values() if f.mu.dtype.itemsize < 4], ids=str)
def test_ptx_of_unusual_values(emulated: Emulated, rule: str, formats: Formats) -> None:
    worlds, _ = unusual_worlds(rule, formats, emulated.chunk_size(formats))
    step_both(emulated, worlds)


def test_ptx_of_all_codes_under_all_bases(emulated: Emulated) -> None:
    for grad_exponents in GRAD_EXPONENTS:
        check_all_codes_under_all_bases(emulated, grad_exponents)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("formats", FEW, ids=str)
def test_ptx_of_corrections_that_become_one(emulated: Emulated, rule: str, formats: Formats) -> None:
    check_corrections_that_become_one(emulated, rule, formats)


@pytest.mark.parametrize("formats", FEW, ids=str)
def test_ptx_of_counters_and_found_inf(emulated: Emulated, formats: Formats) -> None:
    check_counters(emulated, "adamaxw", formats, steps=5)
    for found_inf in (1.0, torch.nan):
        check_found_inf_changes_nothing(emulated, "adamaxw", formats, found_inf)


@pytest.mark.parametrize("formats", FEW, ids=str)
def test_ptx_of_64_bit_offsets(emulated: Emulated, formats: Formats, monkeypatch: pytest.MonkeyPatch) -> None:
    check_64_bit_offsets(emulated, formats, monkeypatch)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:100"])
def test_ptx_for_other_gpus(target: str, tmp_path: Path) -> None:
    names = ("fp32:fp32:fp32", "fp16:fp16:fp32", "bf16:bf16:bf16", "split8:bf16:8bit")
    write_ptx(tmp_path, "installed", "--target", target, *formats(*names))
    for name in names:
        for rule in RULES:
            check_sizes_and_alignments(Emulated(tmp_path), rule, FORMATS[name])


PTX_LOSSES = {
    "barriers": ("bar.sync \t0;", "", "is in a race"),
    "a bound": ("setp.lt.s64", "setp.le.s64", "is outside what was allocated"),
    "correct division": ("div.rn.f32", "div.full.f32", "does not know this: div.full.f32"),
    "separate roundings": ("add.rn.f32", "add.f32", "does not know this: add.f32"),
}


@pytest.mark.parametrize("loss", PTX_LOSSES)
def test_losses_in_ptx_are_caught(emulated: Emulated, loss: str, tmp_path: Path) -> None:
    good, bad, expected = PTX_LOSSES[loss]
    folder = Path(shutil.copytree(emulated.folder, tmp_path / "ptx"))
    path = folder / "step-adabelief-split8-bf16-8bit.ptx"
    assert good in path.read_text()
    path.write_text(path.read_text().replace(good, bad))
    with pytest.raises(ptx.Fault, match=expected):
        check_sizes_and_alignments(Emulated(folder), "adabelief", FORMATS["split8:bf16:8bit"])
