"""What the Triton kernels compile to, for GPUs that are not here: the interpreter shows no
approximate division, no contraction, no narrow access, no spill and no race. The reports are
looked at, and NVIDIA's kernels are launched on an emulated GPU.

Beside the Triton that is installed, each that is in a folder ``.venv/triton-<version>`` is tried;
``make test-kernels`` puts there what supported releases of torch bring.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is for Linux only")

from bench.formats import TRIPLES
from bench.kernels import ordinary_path, problems
from bench.triton_report import RULES

ROOT = Path(__file__).parents[1]
OTHERS = {path.name.removeprefix("triton-"): path for path in sorted(ROOT.glob(".venv/triton-*"))}
FORMATS = [":".join(names) for names in TRIPLES]
FEW = ["fp32:fp32:fp32", "fp32:fp32:8bit", "bf16:bf16:bf16", "split8:bf16:8bit"]
COMPILED = [
    ("installed", "cuda:90", FORMATS),
    *(("installed", target, FEW) for target in ("cuda:75", "cuda:80", "cuda:89", "cuda:100", "hip:gfx942")),
    *((version, target, FEW) for version in OTHERS for target in ("cuda:80", "cuda:90", "cuda:100")),
]
"""Everything by one compiler for one target, and by the others what is at its limit of registers."""


def environment_of(version: str) -> dict[str, str]:
    """Of a process with that Triton, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if version in OTHERS:
        environment["PYTHONPATH"] = str(OTHERS[version])
    return environment


def report(version: str, target: str, *arguments: str) -> list[dict[str, Any]]:
    """Of each kernel what it compiles to, and its problems."""
    command = [sys.executable, "-m", "bench.triton_report", "--target", target, *arguments]
    ran = subprocess.run(
        command, check=False, cwd=ROOT, env=environment_of(version), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert version == "installed" or rows[0]["triton"].startswith(version)
    for row in rows:
        row["problems"] = problems(row)
    return rows


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("version", "target", "formats"), COMPILED, ids=lambda x: x if isinstance(x, str) else ""
)
def test_compiled_kernels(version: str, target: str, formats: list[str]) -> None:
    """No spill, no access that is narrow, nothing contracted, approximate or flushed: with each Triton."""
    rows = report(version, target, *(f"--formats={name}" for name in formats))
    assert len(rows) == len(RULES) * len(formats) + 2
    assert [row for row in rows if row["problems"]] == []


@pytest.mark.kernels
@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_contraction_is_caught(target: str) -> None:
    rows = report("installed", target, "--rule=adamaxw", "--fp-fusion", "--formats=fp32:fp32:fp32")
    assert all("contracted" in row["problems"] for row in rows if row["kernel"] == "step")


def test_the_shortest_way_without_calls_is_counted() -> None:
    """From the first wide load to the last wide store: 6 of these, after 1."""
    code = ["S2R R0, SR_TID.X", "LDG.E.128 R4, [R2]", "@P0 BRA 0x50", "CALL.REL.NOINC 0xb0",
            "FADD R1, R1, R1", "MUFU.RCP R1, R4", "@!P1 BRA P2, 0x90", "FMUL R1, R1, R1", "FMUL R1, R1, R1",
            "FADD R1, R1, R1", "STG.E.128 [R2], R4", "EXIT"]  # fmt: skip
    disassembly = "\n".join(f"        /*{16 * i:04x}*/ {line} ;" for i, line in enumerate(code))
    assert ordinary_path(disassembly) == {"before": 1, "all": 6}


ALIGNED = "pointer = tl.multiple_of(pointer, 16)"
MASKED = "codecs.At(start, offset, offset < tl.load(row),"
LOSSES = {
    "narrow accesses": ("codecs.py", ALIGNED, "pass", "128-bit loads"),
    "narrow bytes": ("codecs.py", ALIGNED, "pass", "64-bit stores of bytes"),
    "masked full chunks": ("step.py", "codecs.At(start, offset, None,", MASKED, "128-bit loads"),
    "approximate division": ("rules.py", "return tl.div_rn(x, d)", "return x / d", "approximate"),
    "approximate square root": ("rules.py", "return tl.sqrt_rn(x)", "return tl.sqrt(x)", "approximate"),
    "lost NaN": ("rules.py", ", propagate_nan=tl.PropagateNan.ALL", "", "nan_dropping_max"),
}


@pytest.mark.kernels
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_caught(loss: str, tmp_path: Path) -> None:
    file, good, bad, expected = LOSSES[loss]
    folder = Path(shutil.copytree(ROOT / "kernels", tmp_path / "kernels"))
    text = (folder / file).read_text()
    assert good in text
    (folder / file).write_text(text.replace(good, bad))
    rule, state = "adamaxw" if loss == "lost NaN" else "adabelief", "8bit" if "bytes" in loss else "fp32"
    options = (f"--rule={rule}", f"--kernels={folder}", f"--formats=fp32:fp32:{state}")
    row, *_ = report("installed", "cuda:90", *options)
    assert any(expected in problem for problem in row["problems"]), row


SOME = "optimizers or edges and adabelief or sizes and (fp32-fp32-fp32 or split8-bf16-e4m3)"
EMULATED = [
    ("installed", "90", "sizes"),
    ("installed", "90", "not sizes"),
    *(("installed", capability, SOME) for capability in ("75", "80", "89", "100")),
    *((version, "90", SOME) for version in OTHERS),
]


def run_on_emulated_gpu(version: str, capability: str, tests: str) -> None:
    """In a process of its own, for Triton has its interpreter here."""
    environment = {k: v for k, v in environment_of(version).items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "0", "FUSED_OPTIM_EMULATED": capability}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/on_emulated_gpu.py"]
    ran = subprocess.run(
        [*command, "-k", tests], check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.kernels
@pytest.mark.parametrize(("version", "capability", "tests"), EMULATED)
def test_on_an_emulated_gpu(version: str, capability: str, tests: str) -> None:
    run_on_emulated_gpu(version, capability, tests)


def test_a_kernel_of_each_rule_on_an_emulated_gpu() -> None:
    """What ``make test`` runs of all this."""
    run_on_emulated_gpu("installed", "90", "sizes and split8-bf16-e4m3 or interrupted")
