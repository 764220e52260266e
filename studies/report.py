"""The tables and plots of docs/formats.md from the studies' results."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import fidelity, training

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "formats.md"

COLORS = {"fp32": "black", "bf16 states": "tab:blue", "split16+bf16": "tab:orange", "split8+8bit": "tab:red"}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratio_cell(ratios: list[list[float]], bounds: tuple[float, float] | None) -> str:
    """The last ratio; bold where it is out of bounds."""
    mean, _, zeros = ratios[-1]
    text = f"{mean:.3g}" if mean < 0.1 or mean >= 10 else f"{mean:.2f}" if bounds is None else f"{mean:.3f}"
    if bounds is not None and not bounds[0] <= mean <= bounds[1]:
        text = f"**{text}**"
    return f"{text} ({100 * zeros:.0f}% are zero)" if zeros >= 0.005 else text


def fidelity_tables(results: dict[str, Any]) -> str:
    found = results["found"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    rows = []
    for name, columns in (found["ours"] | found["peers"]).items():
        state_format = "bf16" if "bf16" in name else "8bit"
        cells = [ratio_cell(columns[c], fidelity.bounds(state_format, c)) for c in fidelity.COLUMNS]
        rows.append([name, *cells])
    steady = [
        [name, *(ratio_cell(found[f"mean {m}"][name]["stationary"], None) for m in fidelity.STEADINESS)]
        for name in found["mean 1"]
    ]
    about = (
        f"Geometric mean of decoded over true, {results['elements']:,} elements, {versions}, "
        f"{results['date']}. Bold: outside 0.98 to 1.02 (bf16), or, in 8 bits, outside 0.95 to 1.05 "
        "(stationary) or 0.7 to 1.3 (after a fall)."
    )
    table = markdown(["second moment", *fidelity.COLUMNS], rows)
    about_steady = "The same, stationary, by the mean of an element's gradients over the standard deviation "
    about_steady += "of their noise:"
    steady_table = markdown(["second moment", *(f"mean {m}" for m in fidelity.STEADINESS)], steady)
    return f"{about}\n\n{table}\n\n{about_steady}\n\n{steady_table}"


class Comparison(NamedTuple):
    """One format against float32, paired by seed; differences are relative to the loss."""

    task: str
    rule: str
    format: str
    loss: float
    differences: list[float]

    @property
    def mean(self) -> float:
        return fmean(self.differences)

    @property
    def error(self) -> float:
        """The mean's standard error."""
        return stdev(self.differences) / len(self.differences) ** 0.5

    @property
    def verdict(self) -> str:
        within = {"1%": abs(self.mean) <= 0.01, "2 standard errors": abs(self.mean) <= 2 * self.error}
        outside = [name for name, holds in within.items() if not holds]
        return "within both" if not outside else f"**not within {' and '.join(outside)}**"


def comparisons(runs: dict[training.Run, dict[str, Any]]) -> list[Comparison]:
    """Every task, rule and format that has at least three seeds."""
    losses = {(r.task, r.rule, r.format, r.seed): training.final_loss(x) for r, x in runs.items()}
    found = []
    for task in training.TASKS:
        for rule in training.RULES:
            for name in training.FORMATS:
                pairs = [
                    (loss, losses[task, rule, training.REFERENCE, seed])
                    for (*key, seed), loss in sorted(losses.items())
                    if key == [task, rule, name] and (task, rule, training.REFERENCE, seed) in losses
                ]
                if name != training.REFERENCE and len(pairs) >= 3:
                    differences = [loss / reference - 1 for loss, reference in pairs]
                    found.append(Comparison(task, rule, name, fmean(b for _, b in pairs), differences))
    return found


def training_table(runs: dict[training.Run, dict[str, Any]], torch_version: str) -> str:
    rows = [
        [
            training.TITLES[c.task],
            training.RULES[c.rule],
            c.format,
            f"{len(c.differences)}",
            f"{c.loss:.4f}",
            f"{100 * c.mean:+.2f}%",
            f"{100 * c.error:.2f}%",
            c.verdict,
        ]
        for c in comparisons(runs)
    ]
    head = ["task", "rule", "format", "seeds", "loss in fp32", "mean difference", "its standard error", ""]
    steps = sorted({run.steps for run in runs})
    return (
        f"{len(runs)} runs of {', '.join(f'{s:,}' for s in steps)} steps, torch {torch_version}.\n\n"
        + markdown(head, rows)
    )


def finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def plain_ticks(axes: Axes, ticks: Sequence[float]) -> None:
    """A logarithmic axis with these numbers, as one writes them."""
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def draw_fidelity(results: dict[str, Any], path: Path) -> None:
    """Decoded over true after the gradients of half of each block fell hundredfold, step by step."""
    column = fidelity.Scenario(fidelity.HALF, 100).title
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    groups = [
        *(
            (o.__name__, [n for n in results["found"]["ours"] if o.__name__ in n])
            for o in fidelity.OPTIMIZERS.values()
        ),
        ("Adam of others", list(results["found"]["peers"])),
    ]
    everything = results["found"]["ours"] | results["found"]["peers"]
    for axes, (title, names) in zip(panels, groups):
        for i, name in enumerate(names):
            ratios = everything[name][column]
            steps = [fidelity.CHECK_EVERY * (k + 1) for k in range(len(ratios))]
            style = "--" if fidelity.NEAREST in name else "-"
            label = name.removeprefix(title).strip()
            width = 4 if style == "--" and "bf16" in name else 1.8
            axes.plot(steps, [r[0] for r in ratios], style, label=label, color=f"C{i}", linewidth=width)
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set(title=title, xlabel="steps after half of a block's gradients fell hundredfold", yscale="log")
        plain_ticks(axes, (0.3, 0.5, 1, 2, 5, 10))
        axes.legend(frameon=False)
        finish(axes)
    panels[0].set_ylabel("second moment, decoded / true")
    figure.savefig(path, dpi=130)


def draw_training(runs: dict[training.Run, dict[str, Any]], path: Path) -> None:
    """Loss curves on the left, paired differences on the right."""
    compared = comparisons(runs)
    tasks = [task for task in training.TASKS if any(c.task == task for c in compared)]
    figure = Figure(figsize=(13, 4.5 * len(tasks)), layout="constrained")
    rows = figure.subplots(len(tasks), 2, squeeze=False, width_ratios=[3, 2])
    for (left, right), task in zip(rows, tasks):
        for rule, style in zip(training.RULES, ("-", "--")):
            for name, color in COLORS.items():
                curves = [
                    x["val"] for r, x in runs.items() if (r.task, r.rule, r.format) == (task, rule, name)
                ]
                points = [(at[0][0], fmean(loss for _, loss in at)) for at in zip(*curves) if at[0][0] >= 100]
                label = f"{training.RULES[rule]} {name}"
                width = 3 if name == training.REFERENCE else 1.2
                left.plot(*zip(*points), style, color=color, label=label, linewidth=width, alpha=0.7)
        left.set(title=f"{training.TITLES[task]}: validation loss, mean over seeds", xlabel="step")
        left.set_ylabel("validation loss (nats)")
        left.legend(frameon=False, ncols=2, fontsize=8)
        mine = [c for c in compared if c.task == task]
        for y, c in enumerate(mine):
            color = COLORS[c.format]
            percent = [100 * d for d in c.differences]
            right.plot(percent, [y + 0.18] * len(percent), "|", color=color, alpha=0.6)
            right.errorbar(100 * c.mean, y, xerr=200 * c.error, fmt="o", color=color, capsize=4)
        right.set_yticks(
            range(len(mine)), [f"{training.RULES[c.rule]}\n{c.format}" for c in mine], fontsize=8
        )
        right.invert_yaxis()
        right.axvline(0, color="gray", linewidth=0.8)
        right.axvspan(-1, 1, color="tab:green", alpha=0.08)
        right.set_title(f"{training.TITLES[task]}: paired difference from fp32")
        right.set_xlabel("% of the loss; ticks: seeds, bar: mean ± 2 standard errors")
        finish(left)
        finish(right)
    figure.savefig(path, dpi=130)


def updated(text: str) -> str:
    """The page with the tables of the last results."""
    tables = {}
    if fidelity.RESULTS.exists():
        tables["fidelity"] = fidelity_tables(json.loads(fidelity.RESULTS.read_text()))
    if training.RESULTS.exists():
        version = json.loads(training.RESULTS.read_text())["torch"]
        tables["training"] = training_table(training.load(training.RESULTS), version)
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        pattern = re.compile(f"{begin}.*{end}", re.DOTALL)
        assert pattern.search(text), f"docs/{PAGE.name} has no {begin} ... {end}"
        text = pattern.sub(lambda _, block=f"{begin}\n{table}\n{end}": block, text)
    return text


def write() -> None:
    """Write the tables into the page, and the plots beside it."""
    PAGE.write_text(updated(PAGE.read_text()))
    if fidelity.RESULTS.exists():
        draw_fidelity(json.loads(fidelity.RESULTS.read_text()), DOCS / "states.png")
    runs = training.load(training.RESULTS)
    if comparisons(runs):
        draw_training(runs, DOCS / "training.png")
