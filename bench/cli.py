"""What a step of fused_optim costs, beside the memory's roof and what people use today.

Each provider is checked against a reference before it is timed, runs in a process of its own,
in turns with the others, on random data, with cold caches. Results go to a folder as JSON, CSV
and PNG plots. `bench all` measures everything in a few minutes on two CPU cores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from . import compare, cuda_report, environment, kernels, plan, report
from .formats import FORMATS
from .measure import QUICK, Effort, Record, default_threads
from .plan import Filter, Options, Run
from .providers import LAYOUTS, OUR_BACKENDS, OUR_RULES
from .worker import Setting
from .workloads import NAMES, workload

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help=__doc__,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

OUT = Path("bench_output")

Device = Annotated[str, typer.Option(help="cpu or cuda; by default a GPU if there is one.")]
Rounds = Annotated[int, typer.Option(min=1, help="Turns that each provider gets.")]
Seconds = Annotated[float, typer.Option(help="Most seconds of one provider in one comparison.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 for as many as torch takes.")]
Out = Annotated[Path, typer.Option(help="Folder for JSON, CSV and plots.")]
Plots = Annotated[bool, typer.Option(help="Draw PNG plots (needs matplotlib).")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what the measured processes print.")]
Warm = Annotated[bool, typer.Option("--warm", help="Leave caches filled between steps.")]
Extra = Annotated[Path | None, typer.Option(help="A Python file with a list PROVIDERS of your own.")]


def _strings(help: str) -> Any:
    return typer.Option(help=help + " May be repeated.")


def _options(device: str, effort: Effort, threads: int, warm: bool, verbose: bool) -> Options:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: torch sees no GPU here")
    setting = Setting(threads or default_threads(), quiet=not verbose)
    return Options(device, setting, effort, cold=not warm)


def _one_of(option: str, given: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    for value in given or ():
        if value not in known:
            raise typer.BadParameter(f"{option} must be one of {', '.join(known)}; got {value!r}")
    return tuple(given or ())


def measure(name: str, runs: Sequence[Run], options: Options, out: Path, plots: bool) -> None:
    """Measure, print, and write."""
    described = environment.describe(options.device, options.setting.threads)
    total = sum(len(plan.comparisons(run)) for run in runs)
    paths: list[Path] = []
    with report.progress(total, name) as (say, done):

        def write(text: str, records: list[Record]) -> None:
            # After each comparison, so that what was measured is there whatever ends this.
            paths[:] = report.write(out, name, described, records)
            done(text)

        records = plan.execute(runs, options, say, write)
    report.show(records)
    if plots:
        paths += draw(records, described, out)
    print(
        f"{described['kind']}: {described['device_name']}, {described['threads']} threads; commit {described['commit']}"
    )
    print("wrote " + ", ".join(map(str, paths)))
    if not any("median" in record for record in records):
        raise typer.Exit(1)


def draw(records: Sequence[Any], described: Any, out: Path) -> list[Path]:
    """Plots, or a word where matplotlib is missing."""
    try:
        from . import plots
    except ImportError as error:
        print(f"no plots: {error}")
        return []
    return plots.draw(records, described, out)


def _register(name: str) -> None:
    known = plan.MEASURES[name]

    def command(
        workloads: Annotated[
            list[str] | None,
            _strings(f"{', '.join(NAMES)}, any 2^n, or NxM: N tensors of M."),
        ] = None,
        dtype: Annotated[list[str] | None, _strings("float32, bfloat16 or float16.")] = None,
        provider: Annotated[list[str] | None, _strings("A part of a provider's name.")] = None,
        rule: Annotated[list[str] | None, _strings(f"Of fused_optim: {', '.join(OUR_RULES)}.")] = None,
        backend: Annotated[list[str] | None, _strings(f"Of fused_optim: {', '.join(OUR_BACKENDS)}.")] = None,
        format: Annotated[list[str] | None, _strings(f"Of fused_optim: {', '.join(FORMATS)}.")] = None,
        layout: Annotated[list[str] | None, _strings("Of fused_optim: list, flat, static.")] = None,
        extra: Extra = None,
        device: Device = "",
        rounds: Rounds = Effort.rounds,
        seconds: Seconds = Effort.most,
        threads: Threads = 0,
        warm: Warm = False,
        out: Out = OUT,
        plots: Plots = True,
        verbose: Verbose = False,
    ) -> None:
        names = tuple(workloads or known.workloads)
        if name != "train":
            for text in names:
                try:
                    workload(text)
                except ValueError as error:
                    raise typer.BadParameter(str(error)) from None
        dtypes = _one_of("--dtype", dtype, ("float32", "bfloat16", "float16")) or known.dtypes
        chosen = Filter(
            tuple(provider or ()),
            _one_of("--rule", rule, tuple(OUR_RULES)),
            _one_of("--backend", backend, tuple(OUR_BACKENDS)),
            _one_of("--format", format, tuple(FORMATS)),
            _one_of("--layout", layout, LAYOUTS),
            extra,
        )
        effort = replace(Effort(), rounds=rounds, most=seconds)
        measure(
            name,
            [Run(name, names, dtypes, chosen)],
            _options(device, effort, threads, warm, verbose),
            out,
            plots,
        )

    defaults = ", ".join(known.workloads)
    app.command(name, help=f"{known.help} By default: {defaults}; {' and '.join(known.dtypes)}.")(command)


for _name in plan.MEASURES:
    _register(_name)


@app.command("all")
def all_(
    full: Annotated[bool, typer.Option("--full", help="All workloads and providers: an hour or so.")] = False,
    seconds: Annotated[
        float | None,
        typer.Option(help="Most seconds of one provider in one comparison; 10 with --full, else 1."),
    ] = None,
    device: Device = "",
    threads: Threads = 0,
    out: Out = OUT,
    plots: Plots = True,
    verbose: Verbose = False,
) -> None:
    """Everything that the other commands measure, in minutes; with --full, over every workload."""
    effort = Effort() if full else QUICK
    effort = replace(effort, most=effort.most if seconds is None else seconds)
    options = _options(device, effort, threads, False, verbose)
    runs = (plan.full_set if full else plan.quick_set)(options.device)
    measure(options.device, runs, options, out, plots)


@app.command("compare")
def compare_(
    before: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSON of an earlier run.")],
    after: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSON of a later run.")],
    every: Annotated[bool, typer.Option("--every", help="Show what did not change, too.")] = False,
) -> None:
    """What got slower or faster from BEFORE to AFTER, beyond the noise.

    A change is one where the spans between the 20th and the 80th percentile do not meet and the
    medians differ by more than 5%. The exit code is 1 if anything got slower or was lost.
    """
    try:
        results = [report.read(path) for path in (before, after)]
        found = compare.changes(*results)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    rows = [
        [c.what, report.number(c.before), report.number(c.after), c.unit, f"{c.ratio:.2f}", c.verdict]
        for c in sorted(found, key=lambda c: -c.ratio)
        if every or c.verdict != "same"
    ]
    if rows:
        report.print_table(f"{before} -> {after}", ["case", "before", "after", "unit", "ratio", ""], rows)
    lost = compare.lost(*results)
    for line in lost:
        print(f"lost: {line}")
    moved = [c for c in found if "roof:" in c.what and c.verdict != "same"]
    if moved:
        print("The roofs changed too: the machine was not the same, and nothing above is certain.")
    worse = [c for c in found if c.verdict in ("slower", "more") and c not in moved]
    print(
        f"{len(found)} cases in both: {len(worse)} worse, {sum(c.verdict == 'same' for c in found)} the same"
    )
    if worse or lost:
        raise typer.Exit(1)


@app.command("kernels")
def kernels_(
    target: Annotated[list[str] | None, _strings(f"One of {', '.join(kernels.TARGETS)}.")] = None,
    out: Out = OUT,
) -> None:
    """What the kernels compile to, for GPUs that need not be there: registers, spills, the width of
    each access, bytes and instructions a parameter, occupancy.

    The exit code is 1 if one has what it must not have: a spill, too many registers, an access that
    is not vectorised, contracted or approximate arithmetic.
    """
    targets = _one_of("--target", target, kernels.TARGETS) or kernels.TARGETS
    rows = kernels.triton_rows(targets)
    missing = cuda_report.why_not()
    if missing is None:
        rows += kernels.cuda_rows(targets)
    else:
        print(f"no report of the CUDA kernels: {missing}")
    out.mkdir(parents=True, exist_ok=True)
    for name in targets:
        chosen = [row for row in rows if row["target"] == name]
        report.print_table(
            f"{name}: {chosen[0]['compiler']}", kernels.HEADS, list(map(kernels.cells, chosen))
        )
        path = out / f"kernels_{name.replace(':', '_')}.json"
        path.write_text(json.dumps({"target": name, "kernels": chosen}, indent=1) + "\n")
        print(f"wrote {path}")
    bad = [row for row in rows if row["problems"]]
    for row in bad:
        print(f"{row['target']} {' '.join(kernels.cells(row)[:2])}: {'; '.join(row['problems'])}")
    print(f"{len(rows)} kernels, {len(bad)} with problems")
    if bad:
        raise typer.Exit(1)
