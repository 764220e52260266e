"""The benchmark: its command line, its files, and that it says nothing of what is wrong or
not certain."""

from __future__ import annotations

import copy
import csv
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import compare, kernels, report
from bench.measure import Effort, figures, quantile
from bench.plan import MEASURES, Filter, Options, Run, execute
from bench.providers import PEERS, Provider, TorchStepper, providers
from bench.references import ALGORITHMS
from bench.worker import Setting
from bench.workloads import fitted, workload

ROOT = Path(__file__).resolve().parents[1]
TINY = Options("cpu", Setting(threads=1), Effort(rounds=2, turn=0.001, most=1.0, timeout=60))


def python(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "150", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


# The command line


def test_help_names_every_command() -> None:
    pytest.importorskip("typer", reason="the command line needs typer")
    ran = python("-m", "bench", "--help")
    assert ran.returncode == 0, ran.stderr
    for command in (*MEASURES, "kernels", "compare", "all"):
        assert f"\n  {command} " in ran.stdout


def invoke(*arguments: object) -> Any:
    """The command line, in this process."""
    pytest.importorskip("typer", reason="the command line needs typer")
    from typer.testing import CliRunner

    from bench.cli import app

    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "150"})


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["step", "--workloads", "gpt3"], "no workload 'gpt3'"),
        (["step", "--dtype", "fp8"], "--dtype must be one of float32"),
        (["step", "--format", "4bit"], "--format must be one of fp32"),
        (["step", "--device", "tpu"], "--device must be cpu or cuda"),
        (["compare", ROOT / "pyproject.toml", ROOT / "pyproject.toml"], "is no result of python -m bench"),
    ],
)
def test_bad_options_are_named(arguments: list[object], text: str) -> None:
    ran = invoke(*arguments)
    assert ran.exit_code == 2
    assert text in " ".join(ran.output.replace("│", " ").split())


def test_a_run_writes_json_and_csv(tmp_path: Path) -> None:
    pytest.importorskip("typer", reason="the command line needs typer")
    command = ["-m", "bench", "step", "--workloads", "2^10", "--dtype", "float32", "--rounds", "2"]
    command += ["--provider", "torch AdamW fused", "--provider", "eager fp32", "--rule", "adabelief"]
    ran = python(*command, "--threads", "1", "--no-plots", "--out", tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    results = report.read(tmp_path / "step.json")
    assert {"device_name", "versions", "commit", "date", "threads"} <= results["environment"].keys()
    measured = {r["provider"]: r for r in results["records"] if "median" in r}
    assert {"torch AdamW fused", "fused_optim AdaBelief eager fp32 list", "roof: copy"} <= measured.keys()
    for record in measured.values():
        assert 0 < record["p20"] <= record["median"] <= record["p80"] and record["checked"]
    fused = measured["torch AdamW fused"]
    # float32: a parameter and two states are read and written, a gradient is read.
    assert fused["bytes_moved"] == 7 * 4 * 2**10 and fused["bytes_per_parameter"] == 16
    with open(tmp_path / "step.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == [r["provider"] for r in results["records"]]
    assert all(row["commit"] and row["device_name"] and "torch=" in row["versions"] for row in rows)


# Measuring

MINE = '''
import os

import torch

from bench.providers import Provider, TorchStepper
from bench.references import HYPER


class Adam(torch.optim.Optimizer):
    """Adam without bias correction."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p -= HYPER.lr * p.grad / (p.grad.abs() + HYPER.eps) + HYPER.lr * HYPER.weight_decay * p


class Dies(Adam):
    def step(self):
        os._exit(3)


def make(optimizer):
    return lambda groups: TorchStepper(optimizer([{"params": group} for group in groups]))


PROVIDERS = [Provider("mine", "adamw", make(Adam)), Provider("dies", "adamw", make(Dies))]
'''


def test_what_is_wrong_or_dies_prints_no_time(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    chosen = Filter(("mine", "dies", "torch AdamW foreach"), extra=file)
    records = {r["provider"]: r for r in execute([Run("step", ("2^9",), filter=chosen)], TINY)}
    assert "median" in records["torch AdamW foreach"]
    for name, status, why in (
        ("mine", "failed check", "differs from adamw in float64"),
        ("dies", "error", "exit code 3"),
    ):
        record = records[name]
        assert record["status"] == status and why in record["why"]
        assert not {"median", "p20", "gb_per_s", "of_roof"} & record.keys()


def test_every_measure_runs() -> None:
    few = Filter(("torch AdamW fused",))
    runs = [Run(name, ("3x8",), filter=few) for name in ("host", "memory", "launches", "first-step")]
    records = execute(runs, TINY)
    assert [r["measure"] for r in records] == ["host", "memory", "launches", "first-step"]
    assert all("median" in r for r in records), records
    assert records[1]["unit"] == "bytes/parameter" and records[2]["median"] >= 1


def test_absent_providers_are_named_with_the_reason() -> None:
    absent = Provider("absent", "adamw", TorchStepper, packages=("no_such_package",))
    assert absent.why_not("cpu", "float32") == "no_such_package is not installed"
    assert all(provider.algorithm in ALGORITHMS for provider in PEERS)
    assert len(providers()) == len({p.name for p in providers().values()})


def test_figures() -> None:
    assert quantile([3, 1, 2], 0.5) == 2 and quantile([0, 10], 0.2) == 2
    assert figures([1, 2, 3, 4, 100]) == {"median": 3, "p20": 1.8, "p80": pytest.approx(23.2), "runs": 5}


@pytest.mark.parametrize(
    "name, tensors, parameters",
    [
        ("2^20", 1, 2**20),
        ("10000x64", 10000, 640000),
        ("gpt2", 148, 124_439_808),
        ("llama-7b", 291, 6_738_415_616),
        ("resnet50", 161, 25_557_032),
        ("lora", 448, 39_976_960),
        ("500-groups", 500, 500 * 4096),
    ],
)
def test_workloads(name: str, tensors: int, parameters: int) -> None:
    found = workload(name)
    assert (len(found.shapes), found.numel) == (tensors, parameters)
    small = fitted(found, parameters // 5)
    assert small.numel <= parameters // 5 and len(small.shapes) == tensors
    assert "/" in small.title


# Comparing


def results(slower: float = 1.0, seed: int = 0) -> dict[str, Any]:
    """Thirty cases with 3% of noise, every third ``slower`` times as slow."""
    rng = random.Random(seed)
    records = []
    for i in range(30):
        times = [(slower if i % 3 == 0 else 1.0) * (i + 1) * rng.gauss(1, 0.03) for _ in range(15)]
        head = {"measure": "step", "workload": f"2^{i}", "parameters": 2**i, "dtype": "float32"}
        head |= {"device": "cpu", "provider": "some", "unit": "ms", "status": "measured"}
        records.append(head | figures(times))
    return {"environment": {"device_name": "some CPU"}, "records": records}


def test_compare_finds_a_planted_regression() -> None:
    found = compare.changes(results(), results(slower=1.25, seed=1))
    assert [c.verdict for c in found] == ["slower", "same", "same"] * 10
    back = compare.changes(results(slower=1.25), results(seed=1))
    assert [c.verdict for c in back] == ["faster", "same", "same"] * 10


@pytest.mark.parametrize("seed", range(1, 6))
def test_compare_is_silent_on_noise(seed: int) -> None:
    assert {c.verdict for c in compare.changes(results(), results(seed=seed))} == {"same"}


def test_compare_needs_one_device_and_names_what_was_lost() -> None:
    before, after = results(), copy.deepcopy(results())
    after["records"][3] = {k: v for k, v in after["records"][3].items() if k not in figures([1])}
    after["records"][3] |= {"status": "failed check", "why": "other bits"}
    assert compare.lost(before, after) == ["step 2^3 float32: some: other bits"]
    after["environment"]["device_name"] = "another CPU"
    with pytest.raises(ValueError, match="some CPU, the second on another CPU"):
        compare.changes(before, after)


def test_compare_on_the_command_line(tmp_path: Path) -> None:
    paths = []
    for name, content in (("a", results()), ("b", results(slower=1.25, seed=1))):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(content))
    assert invoke("compare", paths[0], paths[0]).exit_code == 0
    ran = invoke("compare", *paths)
    assert ran.exit_code == 1 and "10 worse, 20 the same" in ran.output


# The compiled kernels


def test_lost_vectors_are_caught_in_triton(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    folder = Path(shutil.copytree(ROOT / "kernels", tmp_path / "kernels"))
    text = (folder / "codecs.py").read_text()
    hint = "pointer = tl.multiple_of(pointer, 16)"
    assert hint in text
    (folder / "codecs.py").write_text(text.replace(hint, "pass"))
    rows = kernels.triton_rows(["cuda:90"], folder, ["adamaxw"])
    fp32 = next(r for r in rows if (r["kernel"], r["param"], r["grad"]) == ("step", "fp32", "fp32"))
    assert any("not vectorised" in problem for problem in fp32["problems"]), fp32
    assert fp32["bytes_per_parameter"] == 28 and 0 < fp32["occupancy"] <= 1


@pytest.mark.parametrize(
    "loss, problem",
    [
        ({"loads": {"4": 20}}, "0 128-bit loads where 4 are needed: not vectorised"),
        ({"stores": {"16": 2, "4": 7}}, "2 128-bit stores where 3 are needed: not vectorised"),
        ({"spill_bytes": 8}, "8 bytes spilled"),
        ({"registers": 66}, "66 registers, at most 64"),
        ({"contracted": 1}, "contracted"),
    ],
)
def test_losses_are_caught_in_a_report(loss: dict[str, Any], problem: str) -> None:
    """``tests/test_cuda_compiled.py`` shows that nvcc's output is read so."""
    saved = json.loads((ROOT / "bench" / "results" / "kernels_cuda_90.json").read_text())["kernels"]
    row = next(
        r
        for r in saved
        if [r[k] for k in ("compiler", "kernel", "param", "grad", "state")]
        == ["nvcc", "step", "fp32", "fp32", "fp32"]
    )
    assert kernels.problems(row) == []
    assert problem in kernels.problems({**row, **loss})


def test_committed_kernel_report_is_whole() -> None:
    saved = json.loads((ROOT / "bench" / "results" / "kernels_cuda_90.json").read_text())
    assert saved["target"] == "cuda:90"
    assert {row["compiler"].split()[0] for row in saved["kernels"]} == {"triton", "nvcc"}
    assert [row for row in saved["kernels"] if row["problems"]] == []


@pytest.mark.parametrize(
    "target, registers, expected",
    [("cuda:90", 32, 1.0), ("cuda:90", 64, 0.5), ("cuda:80", 65, 0.375), ("hip:gfx942", 128, 0.5)],
)
def test_occupancy(target: str, registers: int, expected: float) -> None:
    assert kernels.occupancy(target, registers, 256) == expected


# The GPU check


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu_says_so(tmp_path: Path) -> None:
    ran = python("-m", "bench.gpu_check", "--out", tmp_path / "out")
    assert ran.returncode == 2 and "There is no GPU here" in ran.stdout
    assert not (tmp_path / "out").exists()


def test_gpu_check_rehearsed(tmp_path: Path) -> None:
    """The quick parts; ``--dry-run`` alone rehearses the build and the benchmark too."""
    parts = ["--only", "self-check", "--only", "tests", "--only", "no such part"]
    ran = python("-m", "bench.gpu_check", "--dry-run", "--out", tmp_path / "out", *parts)
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "A rehearsal without a GPU" in text and "| self-check | passed |" in text
    assert ran.returncode == 0, ran.stdout + text


def test_gpu_check_builds_with_the_nvcc_that_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import gpu_check

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "_beside_nvcc", "/usr/local/cuda/bin/".__add__)
    build = gpu_check.parts(tmp_path, gpu=False)[0]
    assert build.environment == (("CUDA_HOME", "/usr/local/cuda"),)


def test_gpu_check_goes_on_after_a_failure(tmp_path: Path) -> None:
    from bench.gpu_check import Part, run, summary

    def part(name: str, code: str, seconds: float = 30) -> Part:
        return Part(name, "something", seconds, (sys.executable, "-c", code))

    tried = [part("bad", "print('the reason'); exit(1)"), part("slow", "import time; time.sleep(60)", 5)]
    outcomes = [run(p, p.seconds, tmp_path) for p in (*tried, part("good", "print(7)"))]
    assert [o.verdict for o in outcomes] == ["FAILED", "TIMED OUT", "passed"]
    text = summary(outcomes, [], False, tmp_path)
    assert "2 of 3 parts did not pass" in text and "the reason" in text
