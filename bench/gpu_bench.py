"""The benchmark as ``gpu_check`` runs it: without typer, and with an end.

python -m bench.gpu_bench --device cuda --out folder
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from . import environment, plan, report
from .measure import QUICK, Record, default_threads
from .worker import Setting


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    # gpu_check ends this process after so many seconds; the last comparison and plots take some.
    seconds = max(1.0, float(os.environ.get("GPU_CHECK_SECONDS", "240")) - 60)
    parser.add_argument("--seconds", type=float, default=seconds, help="after which nothing is begun")
    arguments = parser.parse_args()
    device = arguments.device
    options = plan.Options(device, Setting(default_threads()), QUICK)
    described = environment.describe(device, options.setting.threads)
    end = time.monotonic() + arguments.seconds
    runs = plan.quick_set(device) if device == "cuda" else plan.rehearsal_set()
    records: list[Record] = []
    # One comparison at a time, so that little time is lost at the end.
    left = [
        replace(run, workloads=(workload,), dtypes=(dtype,))
        for run in runs
        for workload, dtype in plan.comparisons(run)
    ]
    while left and time.monotonic() < end:
        run = left.pop(0)
        records += plan.execute([run], options, done=lambda text, _: print(text, flush=True))
        # Written after each, so that what was measured is there whatever ends this.
        report.write(arguments.out, device, described, records)
        (arguments.out / "tables.md").write_text(report.as_markdown(records))
    for run in left:
        print(f"no time was left for {run.measure} {' '.join(run.workloads)}")
    report.show(records)
    try:
        from . import plots
    except ImportError as error:
        print(f"no plots: {error}")
    else:
        print("plots: " + ", ".join(p.name for p in plots.draw(records, described, arguments.out)))
    wrong = [r for r in records if r["status"] in ("failed check", "error") and r["rule"]]
    for r in wrong:
        print(f"{r['provider']}, {r['measure']} {r['workload']}: {r['status']}: {r['why']}")
    measured = sum("median" in r for r in records)
    print(f"{measured} figures; {len(wrong)} of our own failed; {len(left)} measures had no time left")
    return int(bool(wrong) or not measured)


if __name__ == "__main__":
    sys.exit(main())
