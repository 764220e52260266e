"""What got slower or faster between two results, beyond the noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .measure import Record

SMALLEST = 0.05
"""Relative change below which two runs of the same code differ on a quiet machine."""
FEWEST = 3
"""With fewer runs the percentiles are the extremes, and say nothing of noise."""


@dataclass(frozen=True)
class Change:
    """A figure in both results.

    Attributes:
        what: the case.
        before, after: medians.
        unit: of these.
        verdict: slower, faster, or same; more and less for what is not a time.
    """

    what: str
    before: float
    after: float
    unit: str
    verdict: str

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else float("inf")


def _key(record: Record) -> tuple[Any, ...]:
    names = ("measure", "workload", "parameters", "dtype", "device", "provider")
    return tuple(record[name] for name in names)


def _verdict(before: Record, after: Record) -> str:
    """Slower (or faster) where the spans between the 20th and 80th percentiles do not meet and
    the medians differ by more than :data:`SMALLEST`."""
    a, b = before["median"], after["median"]
    timed = before["unit"] == "ms"
    worse, better = ("slower", "faster") if timed else ("more", "less")
    if abs(b - a) <= SMALLEST * max(abs(a), 1e-9):
        return "same"
    if timed and "p20" in before and min(before["runs"], after["runs"]) < FEWEST:
        return "same"
    if after.get("p20", b) > before.get("p80", a):
        return worse
    if after.get("p80", b) < before.get("p20", a):
        return better
    return "same"


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Every case that both measured, in the order of ``after``.

    Raises:
        ValueError: they were measured on different devices, or have no case in common.
    """
    devices = [results["environment"]["device_name"] for results in (before, after)]
    if devices[0] != devices[1]:
        raise ValueError(f"the first was measured on {devices[0]}, the second on {devices[1]}")
    known = {_key(record): record for record in before["records"] if "median" in record}
    found = []
    for record in after["records"]:
        old = known.get(_key(record))
        if old is None or "median" not in record:
            continue
        what = f"{record['measure']} {record['workload']} {record['dtype']}: {record['provider']}"
        verdict = _verdict(old, record)
        found.append(Change(what, old["median"], record["median"], record["unit"], verdict))
    if not found:
        raise ValueError("the two results have no case in common")
    return found


def lost(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Cases that ``before`` measured and ``after`` tried and could not."""
    known = {_key(record) for record in before["records"] if "median" in record}
    failed = [r for r in after["records"] if "median" not in r and _key(r) in known]
    return [f"{r['measure']} {r['workload']} {r['dtype']}: {r['provider']}: {r['why']}" for r in failed]
