"""Prove everything at once on a machine with a GPU: build, tests, sanitizer, benchmark.

Needs Python, torch, Triton and pytest, nvcc for the CUDA backend, and no network: nothing is
installed but into the folder of the results. Each part has its share of the time; one that fails or
runs over does not stop the others, and the summary is written anew after each.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .environment import ROOT, describe


class Part(NamedTuple):
    """One thing that is tried: a command, which may take so many seconds."""

    name: str
    what: str
    seconds: float
    command: tuple[str, ...]
    environment: dict[str, str]
    why_not: str | None = None


class Outcome(NamedTuple):
    """``verdict``: passed, FAILED, TIMED OUT, not tried. ``last``: of the log, or why it was not tried."""

    part: Part
    verdict: str
    seconds: float
    last: str


def _tool(name: str) -> str | None:
    """On the PATH, or where CUDA is installed."""
    folders = (os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", "") + "/bin", "/usr/local/cuda/bin")
    return shutil.which(name, path=os.pathsep.join(folders))


def parts(out: Path, gpu: bool) -> list[Part]:
    """What is tried, the cheapest proofs first."""
    nvcc, sanitizer = _tool("nvcc"), _tool("compute-sanitizer")
    device, backends = ("cuda", "triton,cuda") if gpu else ("cpu", "triton,cpu")
    interpreter = {} if gpu else {"TRITON_INTERPRET": "1"}
    kind, building = "cuda" if nvcc and gpu else "cpu", {}
    if nvcc and not shutil.which("nvcc"):  # the build looks on the PATH and under CUDA_HOME alone
        building["CUDA_HOME"] = str(Path(nvcc).parents[1])
    if gpu:  # this GPU's alone: nvcc takes half a minute for each
        building["FUSED_OPTIM_CUDA_ARCHS"] = "".join(map(str, torch.cuda.get_device_capability()))
    python = shlex.quote(sys.executable)
    install = f"{python} -m pip install -q --no-index --no-deps --no-build-isolation --upgrade"
    install += f" --target {shlex.quote(str(out / 'site'))} {shlex.quote(str(ROOT))}"
    # Without compilers there are still the Triton kernels, for the parts that follow.
    build = f"FUSED_OPTIM_BUILD={kind} {install} || {{ FUSED_OPTIM_BUILD=none {install}; exit 1; }}"
    run = (sys.executable, "-m")
    proofs = (*run, "bench.gpu_proofs", device, backends)
    # The installed package, not the sources, which have no compiled part.
    tests = (*run, "pytest", "-q", "-rs", "-p", "no:cacheprovider", f"--rootdir={ROOT}")
    tests += (f"-opythonpath={ROOT}/tests", f"-c{ROOT}/pyproject.toml", f"{ROOT}/tests/test_on_gpu.py")
    # torch and Triton ask CUDA some things that it may answer with an error, and go on.
    memcheck = (sanitizer, "--error-exitcode", "9", "--report-api-errors", "no") if gpu and sanitizer else ()
    bench = (*run, "bench", "all", "--device", device, "--out", str(out), "--seconds", "140")
    # torch's allocator hands out parts of large blocks, within which nothing is out of bounds.
    uncached = interpreter | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Part("build", f"the package builds with what is here ({kind})", 150, ("sh", "-c", build), building),
        Part("self-check", "each backend that is ready makes one step with eager's bits", 60,
             (*run, "fused_optim"), interpreter),
        Part("bits", "every backend has eager's bits: rules, formats, layouts, sizes, 2^31", 150, proofs,
             interpreter),
        Part("tests", "capture and replay, streams, devices, no waiting", 120, tests, interpreter),
        Part("sanitizer", "memcheck finds no bad access on a small case", 90, (*memcheck, *proofs, "--small"),
             uncached, None if sanitizer or not gpu else "there is no compute-sanitizer"),
        Part("bench", "the benchmark", 200, bench if gpu else (*bench, "--rehearse"), {}),
    ]  # fmt: skip


def run(part: Part, seconds: float, folder: Path) -> Outcome:
    """Try a part for so long at most; its output goes to a log."""
    if part.why_not is not None or seconds < 5:
        return Outcome(part, "not tried", 0, part.why_not or "no time is left")
    log, begin = folder / f"{part.name}.log", time.monotonic()
    # The package that was built here comes first.
    paths = [str(folder / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment |= part.environment
    with log.open("wb") as file:
        output = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        # Not in the sources' folder, which Python would import from first.
        process = subprocess.Popen(part.command, cwd=folder, env=environment, **output)
    try:
        verdict = "FAILED" if process.wait(seconds) else "passed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its children would go on holding the GPU
        process.wait()
        verdict = "TIMED OUT"
    return Outcome(part, verdict, time.monotonic() - begin, ([""] + _end(log))[-1].strip())


def _end(log: Path) -> list[str]:
    return log.read_text(errors="replace").strip().splitlines()[-25:] if log.exists() else []


def summary(outcomes: list[Outcome], device: str, folder: Path) -> str:
    """The report, in Markdown."""
    failed = [o for o in outcomes if o.verdict != "passed"]
    lines = ["# GPU check" if device == "cuda" else "# A rehearsal without a GPU: no GPU figure", ""]
    lines += [f"- {name}: {value}" for name, value in describe(device).items()]
    lines += ["", "| part | verdict | seconds | what it shows | last line |", "|---|---|---|---|---|"]
    for o in outcomes:
        last = o.last.replace("|", "/")[:160]
        lines.append(f"| {o.part.name} | {o.verdict} | {o.seconds:.0f} | {o.part.what} | {last} |")
    lines += ["", f"{len(failed)} of {len(outcomes)} parts did not pass." if failed else "Every part passed."]
    for o in failed:
        lines += [
            "",
            f"## The end of {o.part.name}.log",
            "",
            "```",
            *_end(folder / f"{o.part.name}.log"),
            "```",
        ]
    measured = folder / f"{device}.md"
    lines += ["", "## Measured", "", measured.read_text()] if measured.exists() else []
    return "\n".join(lines) + "\n"


def main(folder: Path, dry: bool, seconds: float, only: Sequence[str]) -> int:
    """The exit code is 0 only if every part passed. ``dry`` rehearses each part on the CPU, the Triton
    kernels in Triton's interpreter."""
    gpu = torch.cuda.is_available() and not dry
    if not gpu and not dry:
        print("There is no GPU here (torch.cuda.is_available() is False): nothing was checked.")
        print("`python -m bench gpu-check --dry-run` rehearses each part on the CPU.")
        return 2
    folder = folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    for part in parts(folder, gpu):
        if only and part.name not in only:
            continue
        print(f"{part.name}: {part.what}", flush=True)
        outcomes.append(run(part, min(part.seconds, deadline - time.monotonic()), folder))
        print("  {1}, {2:.0f} s: {3}".format(*outcomes[-1]), flush=True)
        (folder / "summary.md").write_text(summary(outcomes, "cuda" if gpu else "cpu", folder))
    print(f"wrote {folder / 'summary.md'}")
    return int(any(o.verdict != "passed" for o in outcomes))
