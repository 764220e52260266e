"""PNG plots of results."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from .measure import Record

OPERATIONS = {"adabelief": 18, "adamaxw": 13, "adamw": 15, "adamax": 10}
"""Floating-point operations a parameter, weight decay included."""
_OURS = ("#d62728", "#1f77b4", "#ff7f0e", "#17becf", "#8c2d04", "#08306b")
_PEERS = ("#555555", "#7f7f7f", "#9467bd", "#2ca02c", "#bcbd22", "#e377c2", "#8c564b", "#98df8a", "#c5b0d5")
_MARKERS = "osD^vP*Xd<>"


class _Styles:
    """The same line for a provider in every plot: fused_optim's in strong colours, peers' thin."""

    def __init__(self, records: Sequence[Record]) -> None:
        names = dict.fromkeys((r["provider"], bool(r["rule"])) for r in records if not r["roof"])
        ours = [name for name, rule in names if rule]
        peers = [name for name, rule in names if not rule]
        self.known: dict[str, dict[str, Any]] = {}
        for i, name in enumerate(ours):
            style = {"color": _OURS[i % len(_OURS)], "linewidth": 2.2, "zorder": 3}
            self.known[name] = style | {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 7}
        for i, name in enumerate(peers):
            style = {"color": _PEERS[i % len(_PEERS)], "linewidth": 1.1, "linestyle": "--"}
            self.known[name] = style | {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 5}

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self.known[name]


DTYPES_SHOWN = "full markers: float32 parameters; empty: of 16 bits"


def short(name: str) -> str:
    """A provider's name as legends have room for it."""
    return name.replace("fused_optim ", "ours: ")


def _figure(title: str, described: dict[str, Any]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.add_subplot()
    where = f"{described['kind']}: {described['device_name']}"
    if described["kind"] == "CPU":
        where += f", {described['threads']} threads"
    figure.suptitle(title, fontsize=13)
    torch = described["versions"].get("torch", "unknown")
    axes.set_title(f"{where}; torch {torch}; {described['date']}", fontsize=9)
    axes.grid(True, which="major", alpha=0.3)
    return figure, axes


def _legend(axes: Axes, title: str | None = None) -> None:
    """Beside the axes, each label once, in as many columns as the height asks for."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(reversed(labels), reversed(handles)))
    columns = 1 + (len(once) - 1) // 24
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.set_figwidth(10 + 2.5 * (columns - 1))
    axes.legend(
        list(reversed(once.values())),
        list(reversed(once)),
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        fontsize=8,
        frameon=False,
        ncols=columns,
        title=title,
        title_fontsize=8,
    )


def _measured(records: Sequence[Record], measure: str, dtype: str | None = None) -> list[Record]:
    return [
        r
        for r in records
        if r["measure"] == measure and "median" in r and (dtype is None or r["dtype"] == dtype)
    ]


def _series(
    records: Sequence[Record], x: str, y: str, fewest: int = 2
) -> dict[str, list[tuple[float, float]]]:
    """Points by provider, in the order of x; providers with enough of them."""
    found: dict[str, dict[float, float]] = {}
    for r in records:
        if y in r:
            found.setdefault(r["provider"], {})[r[x]] = r[y]
    return {name: sorted(points.items()) for name, points in found.items() if len(points) >= fewest}


def _powers_of_two(value: float, _: Any = None) -> str:
    return f"$2^{{{round(math.log2(value))}}}$" if value > 0 else ""


def roof_fraction(records: Sequence[Record], described: dict[str, Any], styles: _Styles) -> Figure | None:
    """Fraction of the roof against the size of one tensor."""
    single = [r for r in _measured(records, "step", "float32") if r["tensors"] == 1 and not r["roof"]]
    series = _series(single, "parameters", "of_roof")
    if not series:
        return None
    figure, axes = _figure("One tensor: how much of the memory's speed a step reaches (float32)", described)
    for name, points in series.items():
        axes.plot(*zip(*points), label=short(name), **styles[name])
    axes.axhline(1, color="black", linewidth=1.5, label="roof: a loop with the same reads and writes")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(_powers_of_two))
    axes.set_xlabel("parameters in the tensor")
    axes.set_ylabel("fraction of the roof's bandwidth")
    axes.set_ylim(0, max(1.15, 1.08 * max(y for points in series.values() for _, y in points)))
    _legend(axes)
    return figure


def _against_tensors(
    records: Sequence[Record], described: dict[str, Any], styles: _Styles, measure: str, title: str
) -> Figure | None:
    many = [r for r in _measured(records, measure, "float32") if not r["roof"] and _is_count(r["workload"])]
    series = _series(many, "tensors", "median")
    if not series:
        return None
    figure, axes = _figure(title, described)
    for name, points in series.items():
        axes.plot(*zip(*points), label=short(name), **styles[name])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sorted({x for points in series.values() for x, _ in points}), minor=False)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("number of tensors")
    axes.set_ylabel("milliseconds a step")
    return figure


def _is_count(workload: str) -> bool:
    """``NxM``: N tensors of M elements."""
    return workload.replace("x", "", 1).isdigit()


def tensors(records: Sequence[Record], described: dict[str, Any], styles: _Styles) -> Figure | None:
    """Step time against the number of tensors of 64 elements, with the roof."""
    title = "Many tensors of 64 elements: time of a step (float32)"
    figure = _against_tensors(records, described, styles, "step", title)
    if figure is None:
        return None
    axes = figure.axes[0]
    loops = [r for r in _measured(records, "step", "float32") if r["roof"] and _is_count(r["workload"])]
    loops = [r for r in loops if r["format"] == "fp32"]
    for name, points in _series(loops, "tensors", "median").items():
        axes.plot(*zip(*points), color="black", linewidth=1.5, label=f"{name}, as one tensor")
    _legend(axes)
    return figure


def host(records: Sequence[Record], described: dict[str, Any], styles: _Styles) -> Figure | None:
    """Host time against the number of tensors of one element."""
    title = "Time until step() returns: tensors of one element (float32)"
    figure = _against_tensors(records, described, styles, "host", title)
    if figure is not None:
        _legend(figure.axes[0])
    return figure


def _largest_single(records: Sequence[Record]) -> list[Record]:
    """Records of the largest tensor that more than one dtype or provider was measured on."""
    single = [r for r in _measured(records, "step") if r["tensors"] == 1]
    if not single:
        return []
    most = max(r["parameters"] for r in single)
    return [r for r in single if r["parameters"] == most]


def bytes_and_time(records: Sequence[Record], described: dict[str, Any], styles: _Styles) -> Figure | None:
    """Bytes that a parameter takes against the time of a step."""
    largest = _largest_single(records)
    points = [r for r in largest if not r["roof"]]
    if not points:
        return None
    figure, axes = _figure(
        f"One tensor of {_powers_of_two(points[0]['parameters'])}: memory and time, left and low is better",
        described,
    )
    for r in points:
        style = dict(styles[r["provider"]], linestyle="none")
        filled = r["dtype"] == "float32"
        axes.plot(
            r["bytes_per_parameter"],
            r["median"],
            markerfacecolor=style["color"] if filled else "white",
            label=short(r["provider"]),
            **style,
        )
    loops = [r for r in largest if r["roof"] and r["format"] == "fp32" and r["dtype"] == "float32"]
    if loops:
        speed = loops[0]["gb_per_s"]
        n = points[0]["parameters"]
        low, high = (f(r["bytes_per_parameter"] for r in points) for f in (min, max))
        # All bytes are read, and all but the gradient's, a quarter of them, are written.
        ends = [(x, 1.75 * x * n / speed / 1e6) for x in (low, high)]
        axes.plot(*zip(*ends), color="black", linewidth=1.5, label="roof: time to read and write as much")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("bytes a parameter (parameter, gradient, states)")
    axes.set_ylabel("milliseconds a step")
    _legend(axes, DTYPES_SHOWN)
    return figure


def roofline(
    records: Sequence[Record], described: dict[str, Any], styles: _Styles, algorithms: Callable[[str], str]
) -> Figure | None:
    """Operations a second against operations a byte."""
    largest = _largest_single(records)
    points = [r for r in largest if not r["roof"] and "bytes_moved" in r]
    if not points:
        return None
    figure, axes = _figure("Roofline: speed of the arithmetic, and what the memory allows", described)
    intensities = []
    for r in points:
        operations = OPERATIONS[algorithms(r["provider"])]
        intensity = operations * r["parameters"] / r["bytes_moved"]
        intensities.append(intensity)
        style = dict(styles[r["provider"]], linestyle="none")
        axes.plot(
            intensity,
            operations * r["parameters"] / r["median"] / 1e6,
            markerfacecolor=style["color"] if r["dtype"] == "float32" else "white",
            label=short(r["provider"]),
            **style,
        )
    ends = (0.8 * min(intensities), 1.25 * max(intensities))
    wanted = {"roof: copy": ":", "roof: triad": "-.", "roof: streams of a step, fp32 states": "-"}
    for r in largest:
        if r["dtype"] == "float32" and r["provider"] in wanted:
            speeds = [r["gb_per_s"] * x for x in ends]
            label = f"{r['provider']}, {r['gb_per_s']:.0f} GB/s"
            axes.plot(
                ends, speeds, color="black", linewidth=1.5, linestyle=wanted[r["provider"]], label=label
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(which="minor", labelsize=7)
    axes.set_xlabel("floating-point operations a byte moved")
    axes.set_ylabel("billion floating-point operations a second")
    _legend(axes, DTYPES_SHOWN)
    return figure


def draw(records: Sequence[Record], described: dict[str, Any], folder: Path, prefix: str = "") -> list[Path]:
    """Draw what the records have enough points for; the paths."""
    from .providers import PEERS

    styles = _Styles(records)
    known = {p.name: p.algorithm for p in PEERS} | {r["provider"]: r["rule"] for r in records if r["rule"]}
    figures = {
        "roof_fraction": roof_fraction(records, described, styles),
        "tensors": tensors(records, described, styles),
        "host": host(records, described, styles),
        "bytes_and_time": bytes_and_time(records, described, styles),
        "roofline": roofline(
            [r for r in records if r["roof"] or r["provider"] in known], described, styles, known.__getitem__
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"{prefix}{name}.png")
            figure.savefig(paths[-1], dpi=130)
    return paths
