"""Prove everything at once on a machine with a GPU: bits, measurements, tests, sanitizers, profiles.

Needs Python, torch, Triton and pytest, nvcc for the CUDA backend, and no network. What is worth most comes
first. The machine may go away at any moment, and perhaps only a few small files can be had from it: after
each part, and every few seconds within one, the folder of the results has all that is known in two files,
``summary.md`` and ``results.tar.gz``. All else is in a temporary folder.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .environment import ROOT, describe

SITES = {"install": "site", "build": "built"}
"""Where parts install the package, in the folder of work."""


class Part(NamedTuple):
    """One thing that is tried: a command, which may take so many seconds. With ``beside`` it begins with the
    first part, and may take so many seconds more when its turn comes."""

    name: str
    what: str
    seconds: float
    command: tuple[str, ...]
    environment: dict[str, str]
    why_not: str | None = None
    beside: bool = False


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


def _install(kind: str, site: Path) -> tuple[str, ...]:
    # A copy: two builds in the sources' folder would write the same files.
    python, copy = shlex.quote(sys.executable), shlex.quote(str(site.with_suffix(".src")))
    install = f"{python} -m pip install -q --no-index --no-deps --no-build-isolation --target"
    sources = "csrc fused_optim kernels setup.py pyproject.toml MANIFEST.in README.md LICENSE"
    text = f"mkdir {copy} && cd {shlex.quote(str(ROOT))} && cp -r {sources} {copy} && "
    return "sh", "-c", f"{text}FUSED_OPTIM_BUILD={kind} {install} {shlex.quote(str(site))} {copy}"


def parts(work: Path, gpu: bool) -> list[Part]:
    """What is tried, what is worth most first."""
    nvcc, sanitizer, profiler = _tool("nvcc"), _tool("compute-sanitizer"), _tool("ncu")
    device, backends = ("cuda", "triton,cuda") if gpu else ("cpu", "triton,cpu")
    interpreter = {} if gpu else {"TRITON_INTERPRET": "1"}
    kind, building = "cuda" if nvcc and gpu else "cpu", {}
    if nvcc and not shutil.which("nvcc"):  # the build looks on the PATH and under CUDA_HOME alone
        building["CUDA_HOME"] = str(Path(nvcc).parents[1])
    if gpu:  # this GPU's alone: nvcc takes half a minute for each
        building["FUSED_OPTIM_CUDA_ARCHS"] = "".join(map(str, torch.cuda.get_device_capability()))
    run = (sys.executable, "-m")
    proofs = (*run, "bench.gpu_proofs", device)
    # The installed package, not the sources, which have no compiled part.
    tests = (*run, "pytest", "-q", "-rs", "-p", "no:cacheprovider", f"--rootdir={ROOT}")
    tests += (f"-opythonpath={ROOT}/tests", f"-c{ROOT}/pyproject.toml", f"{ROOT}/tests/test_on_gpu.py")
    # torch and Triton ask CUDA some things that it may answer with an error, and go on.
    sanitize = (sanitizer or "", "--error-exitcode", "9", "--report-api-errors", "no") if gpu else ()
    no_sanitizer = None if sanitizer or not gpu else "there is no compute-sanitizer"
    profile = (profiler or "", "--set", "full", "-k", "regex:step_kernel", "-c", "3") if gpu else ()
    no_profiler = None if profiler or not gpu else "there is no ncu"
    measure = (*run, "bench.gpu_measure", device, str(work / "gpu.json"))
    # torch's allocator hands out parts of large blocks, within which nothing is out of bounds.
    uncached = interpreter | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    few = (*proofs, backends, "few")
    return [
        Part("install", "the package without its compiled parts", 30, _install("none", work / SITES["install"]), {}),
        Part("first-bits", "Triton has eager's bits in float32 and all in bfloat16", 60 if gpu else 120,
             (*proofs, "triton", "first"), interpreter),
        Part("build", f"the package builds with what is here ({kind})", 100,
             _install(kind, work / SITES["build"]), building, beside=True),
        Part("self-check", "each backend that is ready makes one step with eager's bits", 30,
             (*run, "fused_optim"), interpreter),
        Part("measured", "bandwidth, peers, host time and replay, in one process", 150, measure, {}),
        Part("tests", "capture and replay, streams, devices, no waiting", 90, tests, interpreter),
        Part("bits", "every backend has eager's bits: rules, formats, layouts, sizes, 2^31", 120,
             (*proofs, *((backends, "all") if gpu else ("cpu", "small"))), interpreter),
        Part("memcheck", "no bad access in four combinations", 60, (*sanitize, *few), uncached, no_sanitizer),
        Part("racecheck", "no race in shared memory", 60,
             (*sanitize, "--tool", "racecheck", *few) if gpu else few, interpreter, no_sanitizer),
        Part("profile", "three kernels", 60, (*profile, *few), interpreter, no_profiler),
    ]  # fmt: skip


class Run:
    """A part's process, which writes to a log."""

    def __init__(self, part: Part, work: Path, sites: Sequence[Path]) -> None:
        self.part, self.log, self.begin = part, work / f"{part.name}.log", time.monotonic()
        self.process: subprocess.Popen[bytes] | None = None
        if part.why_not is not None:
            return
        paths = [*map(str, sites), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        with self.log.open("wb") as file:
            how = {"stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True, "cwd": work}
            # Not in the sources' folder, which Python would import from first.
            self.process = subprocess.Popen(part.command, env=environment | part.environment, **how)

    def finish(self, seconds: float, save: Callable[[], None]) -> Outcome:
        """Wait for so long at most; ``save`` is called every few seconds."""
        if self.process is None:
            return Outcome(self.part, "not tried", 0, self.part.why_not or "")
        end, verdict = time.monotonic() + seconds, ""
        while not verdict:
            try:
                code = self.process.wait(min(5, max(0.1, end - time.monotonic())))
                verdict = "FAILED" if code else "passed"
            except subprocess.TimeoutExpired:
                save()
                if time.monotonic() > end:
                    self.stop()
                    verdict = "TIMED OUT"
        return Outcome(self.part, verdict, time.monotonic() - self.begin, ([""] + _end(self.log))[-1].strip())

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its children would go on holding the GPU
            self.process.wait()


def _end(log: Path) -> list[str]:
    return log.read_text(errors="replace").strip().splitlines()[-25:] if log.exists() else []


def summary(outcomes: list[Outcome], device: str, work: Path) -> str:
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
        log = f"{o.part.name}.log"
        lines += ["", f"## The end of {log}", "", "```", *_end(work / log), "```"]
    measured = work / "gpu.md"
    lines += ["", "## Measured", "", measured.read_text()] if measured.exists() else []
    return "\n".join(lines) + "\n"


def _archive(work: Path, folder: Path) -> None:
    """All logs and results in one file, which is whole at every moment."""
    unfinished = work / "results.part"
    with tarfile.open(unfinished, "w:gz") as archive:
        for path in sorted(work.iterdir()):
            if path.suffix in (".log", ".json", ".md"):
                archive.add(path, path.name)
    shutil.copyfile(unfinished, folder / "results.new")
    (folder / "results.new").replace(folder / "results.tar.gz")


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
    work = Path(tempfile.mkdtemp(prefix="gpu_check_"))
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []

    def save() -> None:
        (work / "summary.md").write_text(text := summary(outcomes, "cuda" if gpu else "cpu", work))
        (folder / "summary.md").write_text(text)
        _archive(work, folder)

    chosen = [part for part in parts(work, gpu) if not only or part.name in only]
    begun = {part.name: Run(part, work, ()) for part in chosen if part.beside}
    sites: list[Path] = []
    try:
        for part in chosen:
            print(f"{part.name}: {part.what}", flush=True)
            run = begun.get(part.name) or Run(part, work, sites)
            outcomes.append(run.finish(min(part.seconds, deadline - time.monotonic()), save))
            print("  {1}, {2:.0f} s: {3}".format(*outcomes[-1]), flush=True)
            if part.name in SITES and outcomes[-1].verdict == "passed":
                sites.insert(0, work / SITES[part.name])  # what was installed last comes first
            save()
    finally:
        for run in begun.values():
            run.stop()
        shutil.rmtree(work, ignore_errors=True)
    print(f"wrote {folder / 'summary.md'}")
    return int(any(o.verdict != "passed" for o in outcomes))
