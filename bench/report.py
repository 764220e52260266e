"""Results as JSON, as CSV and as tables; with rich where it is installed, else as plain text."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from .measure import Record, Say

try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError:
    RICH = False
else:
    RICH = True


# Files


def write(folder: Path, name: str, environment: dict[str, Any], records: Sequence[Record]) -> list[Path]:
    """Write ``name.json`` and ``name.csv``; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_csv = folder / f"{name}.json", folder / f"{name}.csv"
    results = {"environment": environment, "records": [_rounded(r) for r in records]}
    as_json.write_text(json.dumps(results, indent=1) + "\n")
    columns = list(dict.fromkeys(key for record in records for key in record))
    flat = {**environment, "versions": " ".join(f"{k}={v}" for k, v in environment["versions"].items())}
    with open(as_csv, "w", newline="") as file:
        table = csv.DictWriter(file, [*columns, *flat])
        table.writeheader()
        table.writerows({**_rounded(record), **flat} for record in records)
    return [as_json, as_csv]


def _rounded(record: Record) -> Record:
    """Six digits are more than any figure has."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in record.items()}


def read(path: Path) -> dict[str, Any]:
    """What :func:`write` wrote."""
    try:
        results: dict[str, Any] = json.loads(path.read_text())
        if not isinstance(results["records"], list):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no result of python -m bench: it has no list of records") from None
    return results


# Tables


def number(value: Any) -> str:
    """A figure in at most four digits."""
    if isinstance(value, str) or value is None:
        return value or ""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _cells(record: Record) -> list[str]:
    spread = f"{number(record['p20'])} .. {number(record['p80'])}" if "p20" in record else ""
    note = record["checked"]
    if "optimizer_share" in record:
        note = f"{number(record['optimizer_ms'])} ms of it in the optimizer, {record['optimizer_share']:.1%}"
    if "cached_ms" in record:
        note = f"{number(record['cached_ms'])} with filled caches, then {number(record['second_ms'])} a step"
    if record["measure"] == "memory":
        note = f"beside {record['bytes_per_parameter']:.2f} bytes held for parameter, gradient and states"
    return [
        record["provider"],
        number(record["median"]),
        spread,
        number(record.get("gb_per_s")),
        f"{record['of_roof']:.2f}" if "of_roof" in record else "",
        f"{record['times_fastest_peer']:.2f}" if "times_fastest_peer" in record else "",
        note,
    ]


Table_ = tuple[str, list[str], list[list[str]]]
"""Title, heads, rows."""


def tables(records: Iterable[Record]) -> Iterator[tuple[Table_, list[str]]]:
    """Each comparison as a table, the fastest first, and what was not measured, by reason."""

    def comparison(record: Record) -> tuple[str, ...]:
        return (record["measure"], record["title"], record["dtype"], record["unit"])

    for (measure, title, dtype, unit), group in groupby(records, comparison):
        lines = list(group)
        measured = [line for line in lines if "median" in line]
        measured.sort(key=lambda line: (not line["roof"], line["median"]))
        heads = ["provider", unit, "20% .. 80%", "GB/s", "of roof", "x fastest peer"]
        heads.append("note" if measure in ("train", "first-step", "memory") else "checked against")
        rows = [_cells(line) for line in measured]
        # A column that is empty in all rows says nothing.
        kept = [i for i in range(len(heads)) if any(row[i] for row in rows)]
        table = ([heads[i] for i in kept], [[row[i] for i in kept] for row in rows])
        without: dict[str, list[str]] = {}
        for line in lines:
            if "median" not in line:
                without.setdefault(f"{line['status']}: {line['why']}", []).append(line["provider"])
        missing = [f"{reason} ({_short(names)})" for reason, names in without.items()]
        yield (f"{measure}: {title}, {dtype}", *table), missing


def _short(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def show(records: Sequence[Record]) -> None:
    """Print the tables."""
    for table, missing in tables(records):
        print_table(*table)
        for line in missing:
            print(f"  {line}")
        print()


def as_markdown(records: Sequence[Record]) -> str:
    """All tables, and what was not measured."""
    parts = []
    for (title, heads, rows), missing in tables(records):
        parts.append(f"### {title}\n\n{markdown(heads, rows)}\n")
        parts += [f"- {line}" for line in missing]
        parts.append("")
    return "\n".join(parts)


def print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if RICH:
        table = Table(title=title, title_justify="left", title_style="bold")
        for i, head in enumerate(heads):
            table.add_column(head, justify="left" if i in (0, len(heads) - 1) else "right")
        for row in rows:
            table.add_row(*row)
        Console(width=None if Console().is_terminal else 160).print(table)
        return
    print(f"\n{title}")
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    for row in [heads, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table for a README."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


@contextmanager
def progress(total: int, what: str) -> Iterator[tuple[Say, Say]]:
    """(say what is being done, say that one of ``total`` is done)."""
    if not RICH:
        yield lambda text: None, lambda text: print(f"  {text}", flush=True)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield (
            lambda text: bar.update(task, description=text[:70]),
            lambda text: bar.update(task, advance=1, description=text[:70]),
        )
