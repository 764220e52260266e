"""Prove everything at once on a machine with a GPU: build, tests, sanitizer, benchmark, report.

    python -m bench.gpu_check

Needs Python, torch, Triton and pytest, nvcc for the CUDA backend, and no network: nothing is
installed. Each part has its share of the time; one that fails or runs over does not stop the
rest. One folder is written: a Markdown summary, JSON, CSV, plots, and each part's log. The exit
code is 0 only if every part passed. Without a GPU it says so; ``--dry-run`` then rehearses each
part on the CPU, the Triton kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 480.0
"""Seconds of all parts."""


@dataclass(frozen=True)
class Part:
    """One thing that is tried.

    Attributes:
        name: of its log.
        what: what it shows.
        seconds: that it may take.
        command: of a process.
        why_not: why it cannot be tried here; None if it can.
        environment: variables of the process.
    """

    name: str
    what: str
    seconds: float
    command: tuple[str, ...]
    why_not: str | None = None
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Outcome:
    part: Part
    verdict: str
    """passed, FAILED, TIMED OUT, not tried."""
    seconds: float
    last: str
    """The last line of the log, or why it was not tried."""


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def _setuptools_too_old() -> str | None:
    """Older ones do not know how pyproject.toml states the licence, and say so at length."""
    version = importlib.metadata.version("setuptools")
    needed = 77
    return (
        f"setuptools {version} is installed, {needed} is needed"
        if int(version.split(".")[0]) < needed
        else None
    )


def parts(out: Path, gpu: bool) -> list[Part]:
    """What is tried, the cheapest proofs first."""
    on_path = shutil.which("nvcc")
    nvcc = on_path or _beside_nvcc("nvcc")
    # The build looks on the PATH and under CUDA_HOME alone.
    home = (("CUDA_HOME", str(Path(nvcc).parents[1])),) if nvcc and not on_path else ()
    sanitizer = shutil.which("compute-sanitizer") or _beside_nvcc("compute-sanitizer")
    # torch and Triton ask CUDA some things that it may answer with an error, and go on.
    options = ("--error-exitcode", "9", "--report-api-errors", "no")
    memcheck = (sanitizer, *options) if gpu and sanitizer else ()
    device = "cuda" if gpu else "cpu"
    backends = "triton,cuda" if gpu else "triton,cpu"
    tests = None if _has("pytest") else "pytest is not installed"
    interpreter = () if gpu else (("TRITON_INTERPRET", "1"),)
    # Installed into a folder of its own: the machine's Python is left as it is.
    install = f"{shlex.quote(sys.executable)} -m pip install -q --no-index --no-deps --no-build-isolation"
    install += f" --upgrade --target {shlex.quote(str(out / 'site'))} {shlex.quote(str(ROOT))}"
    wanted = "cuda" if nvcc and gpu else "cpu"
    missing = [name for name in ("pip", "setuptools", "pybind11") if not _has(name)]
    no_build = f"not installed: {', '.join(missing)}" if missing else _setuptools_too_old()
    return [
        Part(
            "build",
            f"the package builds with what is here ({wanted})",
            150,
            # Without compilers there are still the Triton kernels, for the parts that follow.
            (
                "sh",
                "-c",
                f"FUSED_OPTIM_BUILD={wanted} {install} || {{ FUSED_OPTIM_BUILD=none {install}; exit 1; }}",
            ),
            no_build,
            (*architectures(gpu), *home),
        ),
        Part(
            "self-check",
            "each backend that is ready makes one step with eager's bits",
            60,
            _python("-m", "fused_optim"),
            environment=interpreter,
        ),
        Part(
            "bits",
            "every backend against eager on the CPU: rules, dtypes, layouts, sizes, streams, capture, 2^31",
            150,
            _python("-m", "bench.gpu_proofs", "--device", device, "--backends", backends),
            environment=interpreter,
        ),
        Part(
            "tests",
            "tests that want a GPU: capture and replay, streams, devices, no waiting",
            120,
            # The installed package, not the sources, which have no compiled part.
            _python(
                "-m",
                "pytest",
                "-q",
                "-rs",
                "-p",
                "no:cacheprovider",
                "-o",
                f"pythonpath={ROOT / 'tests'}",
                "--rootdir",
                str(ROOT),
                "-c",
                str(ROOT / "pyproject.toml"),
                str(ROOT / "tests" / "test_on_gpu.py"),
            ),
            tests,
            interpreter,
        ),
        Part(
            "sanitizer",
            "compute-sanitizer memcheck finds no bad access on a small case",
            90,
            (
                *memcheck,
                *_python("-m", "bench.gpu_proofs", "--device", device, "--backends", backends, "--small"),
            ),
            None if sanitizer or not gpu else "compute-sanitizer is not on the PATH or beside nvcc",
            # torch's allocator hands out parts of large blocks, within which nothing is out of bounds.
            (*interpreter, ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")),
        ),
        Part(
            "bench",
            "the benchmark: JSON, CSV, tables, plots",
            200,
            _python("-m", "bench.gpu_bench", "--device", device, "--out", str(out)),
        ),
    ]


def architectures(gpu: bool) -> tuple[tuple[str, str], ...]:
    """This GPU's alone: nvcc takes half a minute for each."""
    if not gpu:
        return ()
    import torch

    major, minor = torch.cuda.get_device_capability()
    return (("FUSED_OPTIM_CUDA_ARCHS", f"{major}{minor}"),)


def _beside_nvcc(name: str) -> str | None:
    nvcc = shutil.which("nvcc")
    folders = [os.environ.get("CUDA_HOME", "") + "/bin", "/usr/local/cuda/bin"]
    folders += [str(Path(nvcc).resolve().parent)] if nvcc else []
    return shutil.which(name, path=os.pathsep.join(folders))


def run(part: Part, seconds: float, folder: Path) -> Outcome:
    """Try a part for so long at most; its output goes to a log."""
    if part.why_not is not None:
        return Outcome(part, "not tried", 0, part.why_not)
    if seconds < 5:
        return Outcome(part, "not tried", 0, "no time is left")
    log = folder / f"{part.name}.log"
    begin = time.monotonic()
    paths = [str(folder / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment["GPU_CHECK_SECONDS"] = str(seconds)
    with open(log, "wb") as file:
        process = subprocess.Popen(
            part.command,
            # Not the sources' folder, which Python would import from first.
            cwd=folder,
            env={**environment, **dict(part.environment)},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            verdict = "passed" if code == 0 else "FAILED"
        except subprocess.TimeoutExpired:
            # Its children would go on holding the GPU.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            verdict = "TIMED OUT"
    lines = log.read_text(errors="replace").strip().splitlines()
    return Outcome(part, verdict, time.monotonic() - begin, lines[-1].strip() if lines else "no output")


def machine(gpu: bool, folder: Path) -> list[str]:
    """What the summary says of the machine: read in a process, for the package may be broken."""
    device = "cuda" if gpu else "cpu"
    code = f"import json, bench.environment as e; print(json.dumps(e.describe({device!r}, 0)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(ROOT)])}
    ran = subprocess.run(
        _python("-c", code), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    try:
        found = json.loads(ran.stdout)
    except ValueError:
        return [f"- {ran.stderr.strip()[-300:]}"]
    return [f"- {key}: {value}" for key, value in found.items() if key != "threads"]


def summary(outcomes: list[Outcome], about: list[str], dry: bool, folder: Path) -> str:
    """The report, in Markdown."""
    failed = [o for o in outcomes if o.verdict != "passed"]
    head = "A rehearsal without a GPU: no GPU figure" if dry else "GPU check"
    lines = [f"# {head}", "", *about, "", "| part | verdict | seconds | what it shows | last line |"]
    lines.append("|---|---|---|---|---|")
    for o in outcomes:
        last = o.last.replace("|", "/")[:160]
        lines.append(f"| {o.part.name} | {o.verdict} | {o.seconds:.0f} | {o.part.what} | {last} |")
    lines.append("")
    lines.append(
        "Every part passed." if not failed else f"{len(failed)} of {len(outcomes)} parts did not pass."
    )
    for o in failed:
        log = folder / f"{o.part.name}.log"
        if log.exists():
            tail = log.read_text(errors="replace").strip().splitlines()[-25:]
            lines += ["", f"## {o.part.name}: the end of its log", "", "```", *tail, "```"]
    table = folder / "tables.md"
    if table.exists():
        lines += ["", "## Measured", "", table.read_text()]
    for plot in sorted(folder.glob("*.png")):
        lines += ["", f"![{plot.stem}]({plot.name})"]
    return "\n".join(lines) + "\n"


def main(say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "gpu_check_output", help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="rehearse without a GPU")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="of all parts together")
    parser.add_argument("--only", action="append", help="a part's name; may be repeated")
    arguments = parser.parse_args()

    import torch

    gpu = torch.cuda.is_available() and not arguments.dry_run
    if not gpu and not arguments.dry_run:
        say("There is no GPU here (torch.cuda.is_available() is False): nothing was checked.")
        say("`python -m bench.gpu_check --dry-run` rehearses each part on the CPU.")
        return 2
    folder = arguments.out.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    deadline = time.monotonic() + arguments.seconds
    outcomes = []
    for part in parts(folder, gpu):
        if arguments.only and part.name not in arguments.only:
            continue
        say(f"{part.name}: {part.what}")
        outcome = run(part, min(part.seconds, deadline - time.monotonic()), folder)
        outcomes.append(outcome)
        say(f"  {outcome.verdict}, {outcome.seconds:.0f} s: {outcome.last[:200]}")
    text = summary(outcomes, machine(gpu, folder), arguments.dry_run, folder)
    (folder / "summary.md").write_text(text)
    say(f"wrote {folder / 'summary.md'}")
    return int(any(o.verdict != "passed" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
