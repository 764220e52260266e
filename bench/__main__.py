"""What a step of fused_optim costs, beside the memory's roofline and what people use today.

Each provider is checked against a reference before it is timed, in a process of its own, in turns with
the others, on random data. Results go to a folder as JSON and Markdown.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from . import cuda_report, environment, gpu_check, kernels, plan, report
from .measure import Effort, Record
from .workloads import KNOWN, workload


def measure(given: argparse.Namespace, runs: Sequence[Callable[[str, Effort], list[Record]]]) -> int:
    """Measure, print and write; after each comparison, so that what was measured is there whatever
    ends this."""
    about, effort, records = environment.describe(given.device), Effort(), list[Record]()
    path = given.out / f"{given.device if given.command == 'all' else given.command}.json"
    for run in runs:
        records += (found := run(given.device, effort))
        report.write(path, about, records)
        print(report.tables(found), flush=True)
    print(f"wrote {path}")
    wrong = [r for r in records if r["status"] in ("failed check", "error") and r["rule"]]
    for r in wrong:
        print(f"{r['measure']} {r['workload']}: {r['provider']}: {r['status']}: {r['why']}")
    return int(bool(wrong) or not any("median" in r for r in records))


def report_kernels(targets: Sequence[str], out: Path) -> int:
    """The exit code is 1 if a kernel has what it must not have: a spill, too many registers, an access
    that is not vectorised, contracted or approximate arithmetic."""
    rows = kernels.triton_rows(targets)
    if cuda_report.WHY_NOT:
        print(f"no report of the CUDA kernels: {cuda_report.WHY_NOT}")
    for target in () if cuda_report.WHY_NOT else {"cuda:80", "cuda:90"}.intersection(targets):
        rows += map(kernels.described, cuda_report.report(target.removeprefix("cuda:")))
    out.mkdir(parents=True, exist_ok=True)
    for target in targets:
        chosen = [row for row in rows if row["target"] == target]
        print(f"\n{target}\n\n{report.markdown(kernels.HEADS, map(kernels.cells, chosen))}")
        path = out / f"kernels_{target.replace(':', '_')}.json"
        path.write_text(json.dumps({"target": target, "kernels": chosen}, indent=1) + "\n")
    bad = [row for row in rows if row["problems"]]
    for row in bad:
        print(f"{row['target']} {' '.join(kernels.cells(row)[:2])}: {'; '.join(row['problems'])}")
    print(f"\n{len(rows)} kernels, {len(bad)} with problems")
    return int(bool(bad))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m bench", description=str(__doc__).split("\n")[0])
    commands = found.add_subparsers(dest="command", required=True)
    measuring = argparse.ArgumentParser(add_help=False)
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    measuring.add_argument("--device", choices=devices, default=devices[-1])
    measuring.add_argument("--out", type=Path, default=Path("bench_output"), help="folder of the results")
    commands.add_parser("all", parents=[measuring], help="everything that is timed")
    command = commands.add_parser("step", parents=[measuring], help="the time of a step on chosen workloads")
    command.add_argument("workloads", nargs="+", type=workload, metavar="WORKLOAD", help=KNOWN)
    command.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float16"))
    command.add_argument("--only", action="append", default=[], help="a part of providers' names")
    commands.add_parser("host", parents=[measuring], help="the time until step() returns")
    commands.add_parser("cliffs", parents=[measuring], help="a step in bad conditions, busy cores among them")
    command = commands.add_parser("kernels", help="what the kernels compile to, without a GPU")
    command.add_argument("--target", action="append", choices=kernels.TARGETS)
    command.add_argument("--out", type=Path, default=Path("bench_output"))
    commands.add_parser("readme", help="write the README's figures from bench/results/")
    command = commands.add_parser("gpu-check", help="prove everything on a machine with a GPU")
    command.add_argument("--out", type=Path, default=gpu_check.ROOT / "gpu_check_output")
    command.add_argument("--dry-run", action="store_true", help="rehearse without a GPU")
    command.add_argument("--seconds", type=float, default=480, help="of all parts together")
    command.add_argument("--only", action="append", default=[], help="a part's name; may be repeated")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    if given.command == "kernels":
        return report_kernels(given.target or kernels.TARGETS, given.out)
    if given.command == "gpu-check":
        return gpu_check.main(given.out, given.dry_run, given.seconds, given.only)
    if given.command == "readme":
        readme = environment.ROOT / "README.md"
        readme.write_text(report.updated(readme.read_text()))
        return 0
    if given.command == "cliffs":
        return measure(given, [plan.cliffs])
    chosen = plan.everything(given.device) if given.command == "all" else plan.HOST
    if given.command == "step":
        every = plan.Comparison("", formats=tuple(plan.OPTIONS), layouts=plan.LAYOUTS, only=tuple(given.only))
        dtypes = given.dtype or ("float32",)
        chosen = [replace(every, workload=w.name, dtype=dtype) for w in given.workloads for dtype in dtypes]
    return measure(given, [c.run for c in chosen])


if __name__ == "__main__":
    sys.exit(main())
