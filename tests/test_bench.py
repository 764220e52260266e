"""The benchmark: its command line, its files, and that it says nothing of what is wrong."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cuda_report, gpu_check, gpu_measure, kernels, measure, plan, report, worker
from bench.__main__ import main
from bench.formats import TRIPLES
from bench.measure import Effort, Worker
from bench.providers import PEERS, TORCH, Provider
from bench.workloads import fitted, workload
from fused_optim.rules import RULES

ROOT = Path(__file__).resolve().parents[1]
TINY = Effort(rounds=2, turn=0.001, most=1.0, timeout=100)


# The command line


BAD = {
    "step gpt3": "no workload 'gpt3'",
    "step 2^10 --dtype fp8": "invalid choice: 'fp8'",
    "kernels --target cuda:1": "invalid choice: 'cuda:1'",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_options_are_named(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    assert BAD[arguments] in capsys.readouterr().err


def test_a_run_writes_results(tmp_path: Path) -> None:
    chosen = ["--only", TORCH, "--only", "AdaBelief cpu fp32 flat"]
    assert main(["step", "2^10", *chosen, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "step.json").read_text())
    assert {"device_name", "versions", "commit", "date", "threads"} <= results["environment"].keys()
    records = {r["provider"]: r for r in results["records"]}
    measured = {name: r for name, r in records.items() if "median" in r}
    assert TORCH in measured
    for record in measured.values():
        assert 0 < record["p20"] <= record["median"] <= record["p80"] and record["checked"]
        assert record["loop"] or record["of_roofline"] > 0
    # float32: a parameter and two states are read and written, a gradient is read.
    assert records[TORCH]["bytes_moved"] == 7 * 4 * 2**10 and records[TORCH]["state_bytes_each"] == 8
    assert f"| {TORCH} " in (tmp_path / "step.md").read_text()
    ours = records["AdaBelief cpu fp32 flat"]
    assert "eager's bits" in ours["checked"] if "median" in ours else ours["status"] == "absent"


def test_host_times() -> None:
    found = plan.Comparison("3x1", only=(TORCH,), measure="host").run("cpu", TINY)
    failed = [r for r in found if r["status"] not in ("measured", "absent")]
    assert failed == []
    names = [r["provider"] for r in found]
    assert TORCH in names and any("addresses in Python" in name for name in names)


def test_bad_conditions() -> None:
    names = ("3x64", "3x64:busy-cores", "3x64:unaligned")
    cases = [worker.Case(workload(name), "float32", "cpu", TORCH) for name in names]
    found = plan.in_turns(cases, 1, TINY)
    assert [r["status"] for r in found] == ["measured"] * 3 and found[0]["of_ordinary"] == 1
    assert all(r["provider"].startswith("3 x 64") and r["p99_of_ordinary"] > 0 for r in found)


# Measuring


class Adam:
    """Adam without bias correction, which is not AdamW."""

    def __init__(self, groups: list[list[torch.Tensor]]) -> None:
        self.params = [p for group in groups for p in group]

    @torch.no_grad()
    def step(self) -> None:
        for p in self.params:
            assert p.grad is not None
            p -= 0.01 * p.grad.sign() + 0.001 * p


class Dies(Adam):
    def step(self) -> None:
        os._exit(3)


@pytest.mark.filterwarnings("ignore:os.fork")  # JAX, if another test has imported it
@pytest.mark.parametrize(
    "make, status, why",
    [(Adam, "failed check", "differs from adamw in float64"), (Dies, "error", "BrokenProcessPool")],
)
def test_what_is_wrong_or_dies_has_no_time(make: Any, status: str, why: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(worker.PROVIDERS, "wrong", Provider("wrong", "adamw", make))
    # The process is forked from this one, to know the provider too.
    context = measure.multiprocessing.get_context("fork")
    monkeypatch.setattr(measure, "_context", lambda: context)
    (line,) = measure.compare([worker.Case(workload("3x64"), "float32", "cpu", "wrong")], TINY)
    assert line["status"] == status and why in line["why"]
    assert "median" not in line and "gb_per_s" not in line


def test_what_hangs_is_ended() -> None:
    case = worker.Case(workload("2^10"), "float32", "cpu", TORCH)
    stuck = Worker(case, Effort(timeout=1e-9))
    assert not stuck.well and "TimeoutError" in stuck.said["why"]
    stuck.stop()


def test_absent_providers_are_named_with_the_reason() -> None:
    absent = Provider("absent", "adamw", Adam, "no_such_package")
    assert absent.why_not("cpu", "float32", 1) == "no_such_package is not installed"
    assert "only" in str(absent.why_not("cpu", "float16", 1))
    assert len({p.name for p in PEERS}) == len(PEERS)


def test_figures() -> None:
    assert measure.figures([1, 2, 3, 4, 100]) == {
        "median": 3, "p20": pytest.approx(1.8), "p80": pytest.approx(23.2), "runs": 5,
    }  # fmt: skip


GPT2, LLAMA = ("gpt2", 148, 124_439_808), ("llama-7b", 291, 6_738_415_616)


@pytest.mark.parametrize(
    "name, tensors, parameters", [("2^20", 1, 2**20), GPT2, LLAMA, ("500-groups", 500, 500 * 4096)]
)
def test_workloads(name: str, tensors: int, parameters: int) -> None:
    found = workload(name)
    assert (len(found.shapes), found.numel) == (tensors, parameters)
    small = fitted(found, parameters // 5)
    assert small.numel <= parameters // 5 and len(small.shapes) == tensors
    assert "/" in small.title


def test_the_readme_has_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"kind": "CPU", "device_name": "some CPU", "threads": 2, "versions": {"torch": "2"}}
    about |= {"commit": "c", "date": "d"}
    same = {"measure": "step", "workload": "gpt2", "title": "GPT-2", "dtype": "float32", "loop": False}
    ours = {"provider": "x", "rule": "adamaxw", "format": "fp32", "layout": "list", "of_roofline": 0.96}
    peer = {"provider": TORCH, "rule": "", "format": "", "layout": "", "median": 2.5}
    report.write(tmp_path / "cpu.json", about, [{**same, **ours, "median": 2.0}, {**same, **peer}])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.updated("before\n<!-- measured -->\nold\n<!-- /measured -->\nafter")
    assert "old" not in text and text.startswith("before\n") and text.endswith("\nafter")
    (row,) = (line for line in text.splitlines() if line.startswith("| GPT-2"))
    assert "2 (0.96)" in row and "2.5" in row
    assert report.updated(text) == text


# The compiled kernels


def test_kernels_that_are_read_are_found_in_csrc() -> None:
    assert len(cuda_report.instances()) == len(RULES) * len(TRIPLES) + 2


GOOD: dict[str, Any] = {
    "compiler": "nvcc", "target": "cuda:90", "kernel": "step", "rule": "adamaxw", "param": "fp32",
    "grad": "fp32", "state": "fp32", "registers": 46, "spill_bytes": 0, "wide_loads": 4, "wide_stores": 3,
    "half_wide_loads": 0, "half_wide_stores": 0, "byte_loads": 0, "byte_stores": 0, "contracted": 0,
    "approximate": 0, "flushed": 0, "nan_dropping_max": 0, "nan_keeping_max": 5,
}  # fmt: skip


LOSSES = [
    ("wide_loads", 0, "0 128-bit loads where 4 are needed: not vectorised"),
    ("half_wide_stores", 1, "1 64-bit stores of bytes where 0 are needed"),
    ("spill_bytes", 8, "8 bytes spilled"),
    ("registers", 66, "66 registers, at most 64"),
    ("contracted", 1, "contracted"),
    ("nan_keeping_max", 0, "no max that keeps NaN"),
]


def test_losses_are_caught_in_a_report() -> None:
    assert kernels.problems(GOOD) == []
    for name, value, problem in LOSSES:
        assert kernels.problems({**GOOD, name: value}) == [problem]


# The GPU check


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu-check", "--out", str(tmp_path / "out")]) == 2
    assert "There is no GPU here" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_gpu_check_rehearsed(tmp_path: Path) -> None:
    """The quick parts; ``--dry-run`` alone rehearses all of them."""
    failed = main(["gpu-check", "--dry-run", "--out", str(tmp_path / "out"), "--only=tests"])
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "A rehearsal without a GPU" in text and "| tests | passed |" in text
    assert not failed, text


def test_gpu_check_goes_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(name: str, code: str, seconds: float = 30) -> gpu_check.Part:
        return gpu_check.Part(name, "something", seconds, (sys.executable, "-c", code), {})

    tried = [part("bad", "print('the reason'); exit(1)"), part("slow", "import time; time.sleep(60)", 5)]
    monkeypatch.setattr(gpu_check, "parts", lambda *_: [*tried, part("good", "print(7)")])
    assert gpu_check.main(tmp_path / "out", dry=True, seconds=100, only=()) == 1
    text = (tmp_path / "out" / "summary.md").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.tar.gz", "summary.md"]
    assert "1 of 3 parts passed" in text and "the reason" in text
    assert "| slow | TIMED OUT |" in text and "| good | passed |" in text


def test_gpu_check_cut_off_loses_nothing(tmp_path: Path) -> None:
    """A machine that goes away in a long part leaves the logs of those before it."""
    code = f"""
import sys
import tarfile
from pathlib import Path
from bench import gpu_check
part = lambda name, code: gpu_check.Part(name, "something", 60, (sys.executable, "-c", code), {{}})
gpu_check.parts = lambda *_: [part("good", "print(7)"), part("endless", "import time; time.sleep(60)")]
gpu_check.main(Path({str(tmp_path / "out")!r}), True, 100, ())
"""
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    while not process.stdout.readline().startswith(b"endless"):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        files = ("good.log", "summary.md")
        text = {name: archive.extractfile(name).read().decode() for name in files}  # type: ignore[union-attr]
    assert text["good.log"] == "7\n" and "| good | passed |" in text["summary.md"]
    assert "| endless | not done |" in text["summary.md"] and "1 of 2 parts passed" in text["summary.md"]


def test_gpu_measurements_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = plan.Comparison("3x64:zero-rows", rules=("adamw",), peers=(TORCH,))
    monkeypatch.setattr(gpu_measure, "QUESTIONS", (question,))
    assert gpu_measure.main("cpu", str(tmp_path / "gpu.json")) == 0
    records = json.loads((tmp_path / "gpu.json").read_text())["records"]
    assert len(records) in (2, 3)  # Triton's interpreter, where it is chosen
    assert all(r["status"] == "measured" and r["host_us"] > 0 for r in records)
