"""What the Triton kernels compile to, for GPUs that are not here, on the newest Triton and
on 3.6, which torch 2.11 brings: the interpreter shows no approximate division, no
contraction, no narrow access and no spill.

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
BYTES = {"fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2}


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


def register_limit(row: dict[str, Any]) -> int:
    """64 leaves room for four blocks of 256 threads in 65,536 registers, 80 for three. The
    gradient of another dtype and float16 need up to 80 on sm_100."""
    return {("fp32", "fp32"): 64, ("bf16", "bf16"): 72}.get((row["param"], row["grad"]), 80)


def problems(row: dict[str, Any]) -> list[str]:
    """What a kernel has that it must not have."""
    found = [name for name in ("contracted", "approximate", "flushed", "nan_dropping_max") if row[name]]
    if row["kernel"] == "prologue":
        return found
    if row["spill_bytes"]:
        found.append("spills")
    if row["target"].startswith("cuda") and row["registers"] > register_limit(row):
        found.append(f"{row['registers']} registers")
    p, g, s = BYTES[row["param"]], BYTES[row["grad"]], 8 if row["param"] == "fp64" else 4
    elements = 16 // min(p, g)
    # One 128-bit access for each 16 bytes that a thread has of an operand: an operand that is
    # read or written more narrowly is missing in this count.
    if row["wide_loads"] != elements * (p + g + 2 * s) // 16:
        found.append(f"{row['wide_loads']} wide loads")
    if row["wide_stores"] != elements * (p + 2 * s) // 16:
        found.append(f"{row['wide_stores']} wide stores")
    if row.get("wide_store_instructions", row["wide_stores"]) != row["wide_stores"]:
        found.append(f"{row['wide_store_instructions']} dwordx4 stores")
    if (
        row["rule"] == "adamaxw"
        and row["target"].startswith("cuda")
        and row["param"] != "fp64"
        and not row["nan_keeping_max"]
    ):
        found.append("no max that keeps NaN")
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_compiled_kernels(version: str, target: str) -> None:
    rows = report(version, "--target", target)
    assert len(rows) == 3 * 6 + 2
    assert [(row, problem) for row in rows if (problem := problems(row))] == []


@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_contraction_is_caught(target: str) -> None:
    rows = report("installed", "--target", target, "--rule", "adamaxw", "--fp-fusion")
    assert all("contracted" in problems(row) for row in rows if row["kernel"] == "step")


LOSSES = {
    "narrow accesses": ("codecs.py", "pointer = tl.multiple_of(pointer, 16)", "pass", "wide loads"),
    "masked full chunks": (
        "step.py",
        "_update(row, at, None,",
        "_update(row, at, at < tl.load(row),",
        "wide loads",
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
    rows = report("installed", "--target", "cuda:90", "--rule", rule, "--kernels", str(folder))
    row = next(row for row in rows if (row["kernel"], row["param"]) == ("step", "fp32"))
    assert any(expected in problem for problem in problems(row)), (row, problems(row))
