"""Write the README's figures from ``bench/results/``: never typed, and only what was measured.

python -m bench.readme
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import Any

from . import report
from .environment import ROOT
from .measure import Record

RESULTS = ROOT / "bench" / "results"
TORCH = "torch AdamW fused"
HEADS = ("step", "AdaBelief", "AdamaxW", "of the roof", TORCH, "times", "fastest peer", "times")
WANTED = re.compile(r"2\^2[4-9]|2\^30|gpt2|10000x64|500-groups|llama-7b")


def _ms(record: Record | None) -> str:
    return f"{report.number(record['median'])} ms" if record else ""


def _times(peer: Record | None, ours: list[Record]) -> str:
    return " / ".join(f"{peer['median'] / r['median']:.2f}" for r in ours) if peer else ""


def _row(lines: list[Record]) -> list[str] | None:
    """One comparison: both rules as a list of tensors. With parameters of 16 bits the moments have as
    many, as torch's do, where that was measured."""
    measured = [r for r in lines if "median" in r]
    formats = {r["format"] for r in measured}
    ours_in = "bf16" if lines[0]["dtype"] == "bfloat16" and "bf16" in formats else "fp32"
    ours: dict[str, Record] = {}
    for r in measured:
        if r["layout"] == "list" and r["format"] == ours_in and r["backend"] != "eager":
            # Where two backends were measured, the faster.
            ours[r["rule"]] = min(r, ours.get(r["rule"], r), key=lambda r: r["median"])
    if set(ours) != {"adabelief", "adamaxw"}:
        return None
    pair = [ours["adabelief"], ours["adamaxw"]]
    peers = [r for r in measured if not r["rule"] and not r["roof"]]
    torch = next((r for r in peers if r["provider"] == TORCH), None)
    best = min(peers, key=lambda r: r["median"], default=None)
    roof = " / ".join(f"{r['of_roof']:.2f}" for r in pair if "of_roof" in r)
    return [
        f"{lines[0]['title']}, {'all in ' if ours_in == 'bf16' else ''}{lines[0]['dtype']}",
        *map(_ms, pair),
        roof,
        _ms(torch),
        _times(torch, pair),
        f"{best['provider']}, {_ms(best)}" if best else "",
        _times(best, pair),
    ]


def section(results: dict[str, Any]) -> str:
    """The table of one file, and what it was measured on."""
    about = results["environment"]
    kind = f"{about['kind']}: {about['device_name']}"
    if about["kind"] == "CPU":
        kind += f", {about['threads']} threads"
    else:
        kind += f", driver {about.get('driver', 'unknown')}"
    versions = about["versions"]
    head = f"{kind}; torch {versions['torch']}; commit {about['commit']}, {about['date']}. Medians."
    if "note" in about:
        head += f" {about['note'].capitalize()}."
    steps = [r for r in results["records"] if r["measure"] == "step" and WANTED.fullmatch(r["workload"])]
    rows = [_row(list(group)) for _, group in groupby(steps, lambda r: (r["title"], r["dtype"]))]
    return f"{head}\n\n{report.markdown(HEADS, [row for row in rows if row])}"


def host_section(results: dict[str, Any]) -> str:
    """The time of a step on the host by number of tensors, AdaBelief's by layout."""
    rows: dict[str, dict[str, str]] = {}
    for r in results["records"]:
        if r["measure"] == "host" and "median" in r and r["backend"] != "eager":
            name = f"AdaBelief {r['backend']}, {r['layout']}" if r["rule"] == "adabelief" else r["provider"]
            if name.startswith("AdaBelief") or name == TORCH:
                rows.setdefault(name, {})[r["title"]] = report.number(r["median"])
    if not rows:
        return ""
    titles = list(dict.fromkeys(title for row in rows.values() for title in row))
    order = sorted(rows, key=lambda name: (name == TORCH, name))
    cells = [[name, *(rows[name].get(title, "") for title in titles)] for name in order]
    about = results["environment"]
    head = f"Time until `step()` returns, ms; {about['kind']}: {about['device_name']}, {about['date']}."
    return f"{head}\n\n{report.markdown(('host', *titles), cells)}"


def updated(text: str) -> str:
    """The README with the figures of the last results."""
    paths = [RESULTS / f"{device}.json" for device in ("cuda", "cpu")]
    every = [RESULTS / f"{path.stem}_all.json" for path in paths]
    sections = [section(report.read(path)) for path in paths if path.exists()]
    sections += [host_section(report.read(path)) for path in (*paths, *every) if path.exists()]
    found = "\n\n".join(filter(None, sections))
    if not paths[0].exists():
        found = f"No GPU figure has been measured yet: these are CPU figures.\n\n{found}"
    begin, end = "<!-- measured -->", "<!-- /measured -->"
    pattern = re.compile(f"{begin}.*{end}", re.DOTALL)
    assert pattern.search(text), f"README.md has no {begin} ... {end}"
    return pattern.sub(lambda _: f"{begin}\n{found}\n{end}", text)


def main() -> None:
    readme: Path = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))


if __name__ == "__main__":
    main()
