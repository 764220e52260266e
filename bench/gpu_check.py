"""Prove everything at once on a machine with a GPU: bits, measurements, tests, sanitizers, profiles.

Needs torch, Triton, pytest with xdist, nvcc for the CUDA backend, and no network. What is worth most comes
first. The machine may go away at any moment, and perhaps only a few small files can be had from it: after
each part, and every few seconds within one, the folder of the results has all that is known in two files,
``summary.md`` and ``results.tar.gz``. All else is in a temporary folder.
"""

import importlib.util
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
from dataclasses import dataclass
from pathlib import Path

import torch

from .environment import ROOT, describe

PATH = os.pathsep.join([os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"])
"""With the folder of CUDA's tools."""


@dataclass
class Part:
    """One thing that is tried: a command, which may take so many seconds, and what became of it. With
    ``beside`` it begins with the first part, and may take so many seconds more when its turn comes."""

    name: str
    what: str
    seconds: float
    command: tuple[str, ...]
    environment: dict[str, str]
    why_not: str = ""
    beside: bool = False
    process: subprocess.Popen[bytes] | None = None
    took: float = 0.0
    verdict: str = "not done"  # or passed, FAILED, TIMED OUT

    def start(self, work: Path, sites: Sequence[Path]) -> None:
        """Begin, and write to a log in ``work``; ``sites``: where the package was installed."""
        self.took = -time.monotonic()
        paths = [*map(str, sites), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PATH": PATH, "PYTHONPATH": os.pathsep.join(paths)}
        environment |= {"PYTHONUNBUFFERED": "1", **self.environment}
        with (work / f"{self.name}.log").open("wb") as log:
            how = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True, "cwd": work}
            # Not in the sources' folder, which Python would import from first.
            self.process = subprocess.Popen(self.command, env=environment, **how)

    def finish(self, end: float, save: Callable[[], None]) -> None:
        """Wait, until ``end`` at most; ``save`` is called every few seconds."""
        assert self.process is not None
        end = min(end, time.monotonic() + self.seconds)
        while self.verdict == "not done":
            try:
                code = self.process.wait(min(5, max(0.1, end - time.monotonic())))
                self.verdict = "FAILED" if code else "passed"
            except subprocess.TimeoutExpired:
                save()
                if time.monotonic() > end:
                    self.stop()
                    self.verdict = "TIMED OUT"
        self.took += time.monotonic()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its children would go on holding the GPU
            self.process.wait()

    def log(self, work: Path) -> list[str]:
        """Its end, or why there is none."""
        path = work / f"{self.name}.log"
        text = path.read_text(errors="replace") if path.exists() else self.why_not
        return text.strip().splitlines()[-25:]


def _install(kind: str, site: Path) -> tuple[str, ...]:
    # A copy: two builds in the sources' folder would write the same files.
    python, copy = shlex.quote(sys.executable), shlex.quote(str(site.with_suffix(".src")))
    install = f"{python} -m pip install -q --no-index --no-deps --no-build-isolation --target"
    sources = "csrc fused_optim kernels setup.py pyproject.toml MANIFEST.in README.md LICENSE"
    text = f"mkdir {copy} && cd {shlex.quote(str(ROOT))} && cp -r {sources} {copy} && "
    return "sh", "-c", f"{text}FUSED_OPTIM_BUILD={kind} {install} {shlex.quote(str(site))} {copy}"


def _tests(file: str, *chosen: str) -> tuple[str, ...]:
    """Tests of the installed package, not of the sources, which have no compiled part. Warnings of other
    libraries turn none red."""
    command = (sys.executable, "-m", "pytest", "-v", "-Wdefault", "-p", "no:cacheprovider")
    command += (f"--rootdir={ROOT}", f"-opythonpath={ROOT}/tests", f"-c{ROOT}/pyproject.toml")
    return *command, *(f"{ROOT}/tests/{file}{test}" for test in chosen or ("",))


def _steps(rules: Sequence[str], formats: Sequence[str], backends: Sequence[str]) -> tuple[str, ...]:
    """Tests of a step beside eager's, by their names in the tests' tables."""
    of_each = [f"{f}-{rule}-{backend}" for backend in backends for f in formats for rule in rules]
    return _tests("test_backends.py", *(f"::test_every_rule_in_every_format[{name}]" for name in of_each))


def parts(work: Path, gpu: bool) -> list[Part]:
    """What is tried, what is worth most first."""
    nvcc, sanitizer, profiler = (shutil.which(t, path=PATH) for t in ("nvcc", "compute-sanitizer", "ncu"))
    device, backends = ("cuda", ("triton", "cuda")) if gpu else ("cpu", ("triton", "cpu"))
    kind = "cuda" if nvcc and gpu else "cpu"
    # This GPU's alone: nvcc takes half a minute for each.
    archs = "".join(map(str, torch.cuda.get_device_capability())) if gpu else ""
    run = (sys.executable, "-m")
    few = _steps(("adabelief",), ("fp32", "split8+8bit"), backends)
    at_once = ("-n8",) if importlib.util.find_spec("xdist") else ()  # Triton compiles some 50 kernels
    all_steps = (*_tests("test_backends.py"), *at_once, "-k", "triton or cuda") if gpu else few
    sanitize = (sanitizer or "", "--error-exitcode", "9") if gpu else ()
    # torch and Triton ask CUDA some things that it may answer with an error, and go on.
    memcheck = (*sanitize, "--report-api-errors", "no") if gpu else ()
    racecheck = (*sanitize, "--tool", "racecheck") if gpu else ()
    no_sanitizer = "" if sanitizer or not gpu else "there is no compute-sanitizer"
    ncu = (profiler or "", "--set", "full", "--clock-control", "none", "-k", "regex:step_kernel")
    profile = (*(ncu if gpu else ()), *run, "bench.gpu_measure", device)
    no_profiler = "" if profiler or not gpu else "there is no ncu"
    # torch's allocator hands out parts of large blocks, within which nothing is out of bounds.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Part("install", "the package without its compiled parts", 30, _install("none", work / "install"), {}),
        Part("first-bits", "Triton has eager's bits in float32 and all in bfloat16", 60,
             _steps(("adabelief", "adamaxw", "adamw"), ("fp32", "bf16+bf16"), ("triton",)), {}),
        Part("build", f"the package builds with what is here ({kind})", 100,
             _install(kind, work / "build"), {"FUSED_OPTIM_CUDA_ARCHS": archs}, beside=True),
        Part("self-check", "each backend that is ready makes one step with eager's bits", 30,
             (*run, "fused_optim"), {} if gpu else {"TRITON_INTERPRET": "1"}),
        Part("measured", "bandwidth, peers, host time and replay, in one process", 150,
             (*run, "bench.gpu_measure", device, str(work / "gpu.json")), {}),
        Part("tests", "capture and replay, streams, devices, no waiting, 2^31 elements", 90,
             _tests("test_on_gpu.py"), {}),
        Part("bits", "every backend has eager's bits: rules, formats, layouts, sizes", 120, all_steps, {}),
        Part("memcheck", "no bad access in four combinations", 60, (*memcheck, *few), uncached, no_sanitizer),
        Part("racecheck", "no race in shared memory", 60, (*racecheck, *few), {}, no_sanitizer),
        Part("profile", "two kernels of each language", 60, profile, {}, no_profiler),
    ]  # fmt: skip


def summary(chosen: Sequence[Part], device: str, work: Path) -> str:
    """The report, in Markdown, as far as it goes."""
    others = [part for part in chosen if part.verdict != "passed"]
    lines = ["# GPU check" if device == "cuda" else "# A rehearsal without a GPU: no GPU figure", ""]
    lines += [f"- {name}: {value}" for name, value in describe(device).items()]
    lines += ["", "| part | verdict | seconds | what it shows | last line |", "|---|---|---|---|---|"]
    for part in chosen:
        last = "".join(part.log(work)[-1:]).replace("|", "/")[:160]
        lines.append(f"| {part.name} | {part.verdict} | {max(part.took, 0):.0f} | {part.what} | {last} |")
    lines += ["", f"{len(chosen) - len(others)} of {len(chosen)} parts passed."]
    for part in others:
        lines += ["", f"## The end of {part.name}.log", "", "```", *part.log(work), "```"]
    measured = work / "gpu.md"
    lines += ["", "## Measured", "", measured.read_text()] if measured.exists() else []
    return "\n".join(lines) + "\n"


def _archive(work: Path, folder: Path) -> None:
    """All logs and results in one file, which is whole at every moment."""
    unfinished = folder / "results.new"
    with tarfile.open(unfinished, "w:gz") as archive:
        for path in sorted(work.iterdir()):
            if path.suffix in (".log", ".json", ".md"):
                archive.add(path, path.name)
    unfinished.replace(folder / "results.tar.gz")


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
    end = time.monotonic() + seconds
    chosen = [part for part in parts(work, gpu) if not only or part.name in only]
    sites: list[Path] = []

    def save() -> None:
        (work / "summary.md").write_text(text := summary(chosen, "cuda" if gpu else "cpu", work))
        (folder / "summary.md").write_text(text)
        _archive(work, folder)

    try:
        for part in (p for p in chosen if p.beside):
            part.start(work, ())
        for part in chosen:
            print(f"{part.name}: {part.what}", flush=True)
            if not part.why_not:
                if part.process is None:
                    part.start(work, sites)
                part.finish(end, save)
            print(f"  {part.verdict}, {part.took:.0f} s: {''.join(part.log(work)[-1:])}", flush=True)
            if part.name in ("install", "build") and part.verdict == "passed":
                sites.insert(0, work / part.name)  # what was installed last comes first
            save()
    finally:
        for part in chosen:
            part.stop()
        shutil.rmtree(work, ignore_errors=True)
    print(f"wrote {folder / 'summary.md'}")
    return int(any(part.verdict != "passed" for part in chosen))
