"""What the Triton kernels compile to, for GPUs that are not here, on the newest Triton and
on 3.6, which torch 2.11 brings: the interpreter shows no approximate division, no
contraction, no narrow access, no spill and no race. The reports are looked at, and
NVIDIA's kernels are launched on an emulated GPU.

``make test`` puts Triton 3.6 under ``.venv/triton-3.6``; FUSED_OPTIM_TRITON_3_6 names
another place.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")

from bench.formats import TRIPLES
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


def environment_of(version: str) -> dict[str, str]:
    """Of a process with that Triton, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if version == "3.6":
        environment["PYTHONPATH"] = str(OLD)
    return environment


@cache
def report(version: str, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "bench.triton_report", *arguments]
    ran = subprocess.run(
        command, check=False, cwd=ROOT, env=environment_of(version), capture_output=True, text=True
    )
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


SOME = "fp32:fp32:fp32 or fp16:fp16:fp32 or bf16:bf16:bf16 or split8:bf16:8bit"
PARTS = ("sizes and adamaxw", "sizes and nesterov", "sizes and not (adamaxw or nesterov)", "not sizes")
EMULATED = [
    *((version, "90", tests) for version in ("installed", "3.6") for tests in PARTS),
    *(("installed", capability, f"sizes and ({SOME})") for capability in ("80", "100")),
]


@pytest.mark.parametrize(("version", "capability", "tests"), EMULATED)
def test_on_an_emulated_gpu(version: str, capability: str, tests: str) -> None:
    """In a process of its own, for Triton has its interpreter here."""
    if version == "3.6" and not OLD.exists():
        pytest.skip("Triton 3.6 is not under .venv/triton-3.6; make test puts it there")
    environment = {k: v for k, v in environment_of(version).items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "0", "FUSED_OPTIM_EMULATED": capability}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/on_emulated_gpu.py"]
    ran = subprocess.run(
        [*command, "-k", tests], check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
