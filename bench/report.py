"""Results as JSON, as tables in Markdown and in the README."""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from .environment import ROOT
from .measure import Record
from .providers import DEEPSPEED, OUR_RULES, TORCH

RESULTS = ROOT / "bench" / "results"
SHOWN = re.compile(r"2\^(26|28|30) .*|(gpt2|10000x64|500-groups) float32")
"""Workloads in the README, with their dtypes."""


def write(path: Path, environment: dict[str, Any], records: Sequence[Record]) -> None:
    """Write the results whole, or leave the file as it was."""
    rounded = [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in r.items()} for r in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps({"environment": environment, "records": rounded}, indent=1) + "\n")
    unfinished.replace(path)
    path.with_suffix(".md").write_text(tables(records))


def number(value: Any) -> str:
    """A figure in at most four digits."""
    if isinstance(value, str) or value is None:
        return value or ""
    return f"{value:,.0f}" if value == 0 or abs(value) >= 100 else f"{value:.3g}"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, in columns that are aligned to read in a terminal too."""
    lines = [[cell.replace("|", "/") for cell in line] for line in (heads, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths))} |" for line in lines)


_COLUMNS = {
    "median": "ms", "p20": "20%", "p80": "80%", "of_ordinary": "of ordinary",
    "p99_of_ordinary": "99% of ordinary", "gb_per_s": "GB/s", "of_roofline": "of roofline",
    "times_torch": "x torch fused", "host_us": "host us", "replay_us": "replay, host us",
    "checked": "checked against",
}  # fmt: skip


def table(title: str, lines: Sequence[Record]) -> str:
    """A comparison, the fastest first, and what was not measured, by reason."""
    measured = sorted((r for r in lines if "median" in r), key=lambda r: (not r["loop"], r["median"]))
    columns = [key for key in _COLUMNS if any(key in r for r in measured)]
    rows = [[r["provider"], *(number(r.get(key)) for key in columns)] for r in measured]
    missing: dict[str, list[str]] = {}
    for r in lines:
        if "median" not in r:
            missing.setdefault(f"{r['status']}: {r.get('why', '')}", []).append(r["provider"])
    notes = "".join(f"- {why} ({', '.join(names)})\n" for why, names in missing.items())
    body = markdown(["provider", *(_COLUMNS[key] for key in columns)], rows) if rows else ""
    return f"### {title}\n\n{body}\n\n{notes}"


def tables(records: Iterable[Record]) -> str:
    grouped = groupby(records, lambda r: f"{r['measure']}: {r['title']}, {r['dtype']}")
    return "\n".join(table(title, list(lines)) for title, lines in grouped)


def step_rows(records: Sequence[Record]) -> list[list[str]]:
    """One row a comparison: each rule as a list of tensors, on the fastest backend; with bfloat16
    parameters the moments have as many bits, as torch's do."""
    rows = []
    steps = (r for r in records if r["measure"] == "step")
    steps = (r for r in steps if SHOWN.fullmatch(f"{r['workload']} {r['dtype']}"))
    for (title, dtype), group in groupby(steps, lambda r: (r["title"], r["dtype"])):
        lines = sorted((r for r in group if "median" in r), key=lambda r: r["median"])
        kind = ("bf16" if dtype == "bfloat16" else "fp32", "list")
        row = [f"{title}, {dtype}"]
        for rule in OUR_RULES:
            best = next((r for r in lines if (r["rule"], r["format"], r["layout"]) == (rule, *kind)), None)
            share = f" ({best['of_roofline']:.2f})" if best and "of_roofline" in best else ""
            row.append(number(best["median"]) + share if best else "")
        peers = {r["provider"]: number(r["median"]) for r in lines if not r["loop"] and not r["rule"]}
        rows.append([*row, *(peers.get(name, "") for name in (TORCH, DEEPSPEED))])
    return rows


def section(results: dict[str, Any]) -> str:
    """The tables of one file, and what it was measured on."""
    about, records = results["environment"], results["records"]
    place = f"{about['threads']} threads" if about["kind"] == "CPU" else f"driver {about['driver']}"
    where = f"{about['kind']}: {about['device_name']}, {place}; torch {about['versions']['torch']}; "
    where += f"commit {about['commit']}, {about['date']}."
    titles = [title for title, _ in OUR_RULES.values()]
    steps = markdown(["step", *titles, TORCH, DEEPSPEED], step_rows(records))
    host = [r for r in records if r["measure"] == "host" and "median" in r]
    times = {(r["provider"], r["title"]): number(1e3 * r["median"]) for r in host}
    titles = list(dict.fromkeys(r["title"] for r in host))
    shown = (next(iter(OUR_RULES.values()))[0], TORCH)  # the rules cost the same
    names = [n for n in dict.fromkeys(r["provider"] for r in host) if n.startswith(shown) and "flat" not in n]
    rows = [[name, *(times.get((name, title), "") for title in titles)] for name in names]
    return (
        f"{where} Median milliseconds of a step, and in brackets the share of the roofline's speed.\n\n"
        f"{steps}\n\nMedian microseconds until `step()` returns.\n\n{markdown(['host', *titles], rows)}"
    )


def updated(text: str) -> str:
    """The README with the figures of the last results; as it is where there are none."""
    paths = [path for path in (RESULTS / "cuda.json", RESULTS / "cpu.json") if path.exists()]
    found = "\n\n".join(section(json.loads(path.read_text())) for path in paths)
    if paths and paths[0].stem != "cuda":
        found = f"No GPU figure has been measured yet: these are CPU figures.\n\n{found}"
    begin, end = "<!-- measured -->\n", "\n<!-- /measured -->"
    return f"{text.split(begin)[0]}{begin}{found}{end}{text.split(end)[1]}" if paths else text
