"""What a step of fused_optim costs, beside the memory's roof and what people use today.

Each provider is checked against a reference before it is timed, runs in a process of its own,
in turns with the others, on random data, with cold caches. Results go to a folder as JSON, CSV
and PNG plots. `bench all` measures everything in a few minutes on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from . import environment, plan, report
from .formats import FORMATS
from .measure import QUICK, Effort, default_threads
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
    with report.progress(total, name) as (say, done):
        records = plan.execute(runs, options, say, done)
    report.show(records)
    paths = report.write(out, name, described, records)
    if plots:
        paths += draw(records, described, out)
    print(f"{described['kind']}: {described['device']}, {described['threads']} threads; commit {described['commit']}")
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
        layout: Annotated[list[str] | None, _strings("Of fused_optim: list, flat.")] = None,
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
    device: Device = "",
    threads: Threads = 0,
    out: Out = OUT,
    plots: Plots = True,
    verbose: Verbose = False,
) -> None:
    """Everything that the other commands measure, in minutes; with --full, over every workload."""
    options = _options(device, Effort() if full else QUICK, threads, False, verbose)
    runs = (plan.full_set if full else plan.quick_set)(options.device)
    measure(options.device, runs, options, out, plots)
