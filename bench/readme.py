"""Write the README's table of measurements from ``bench/results/cpu.json``.

python -m bench.readme
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def table(results: dict[str, Any]) -> str:
    head = (
        f"CPU: {results['cpu']}, {results['threads']} threads, torch {results['torch']}, {results['date']}; medians of "
        f"{results['repeats']} interleaved runs, float32 (`make bench`)."
    )
    rows = [f"| {name} | {ratio:.2f} |" for name, ratio in results["ratios"].items()]
    return "\n".join([head, "", "| ratio | measured |", "|---|---|", *rows])


def updated(text: str) -> str:
    """The README with the figures of the last results."""
    results = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())
    begin, end = "<!-- measured -->", "<!-- /measured -->"
    pattern = re.compile(f"{begin}.*{end}", re.DOTALL)
    assert pattern.search(text), f"README.md has no {begin} ... {end}"
    return pattern.sub(lambda _: f"{begin}\n{table(results)}\n{end}", text)


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))


if __name__ == "__main__":
    main()
