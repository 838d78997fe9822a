"""A chart as numbers: axes, ticks and lines in pixels, for whatever draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvtrain.runs.read import Curve, Run

WIDTH, HEIGHT = 620, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 34, 30
MOST = 300  # points of a line
COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#e377c2", "#7f7f7f",
    "#bcbd22"
)
CHARTS = {  # what is compared: a title, a curve, and whether it is noise that wants smoothing
    "training loss (average)": ("train/loss", True), "held-out loss": ("eval/loss", False),
    "gradient norm": ("train/grad_norm", True), "learning rate": ("train/lr", False),
    "tokens per second": ("speed/tokens_per_s", True), "model FLOPs utilization": ("speed/mfu", True),
    "waiting for data, share": ("speed/data_share", True), "memory, GiB": ("speed/memory_gib", False),
}


@dataclass(frozen=True)
class CurveLine:
    run: int
    points: tuple[tuple[float, float], ...]  # pixels


@dataclass(frozen=True)
class Tick:
    at: float  # pixels
    label: str


@dataclass(frozen=True)
class Chart:
    title: str
    lines: tuple[CurveLine, ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Those of CHARTS that any run has values for."""
    found = []
    for title, (name, noisy) in CHARTS.items():
        curves = {i: run.curves[name] for i, run in enumerate(runs) if name in run.curves}
        if curves:
            found.append(
                _chart(title, {i: smoothed(curve) if noisy else curve for i, curve in curves.items()})
            )
    return found


def smoothed(curve: Curve, keep: float = 0.95) -> Curve:
    """An average in which the newest values count most; without a pull towards the first."""
    total, weight, out = 0.0, 0.0, []
    for step, value in curve:
        total, weight = keep * total + value, keep * weight + 1
        out.append((step, total / weight))
    return out


def _chart(title: str, curves: Mapping[int, Curve]) -> Chart:
    steps = [step for curve in curves.values() for step, _ in curve]
    values = sorted(value for curve in curves.values() for _, value in curve)
    cut = len(values) // 50  # a wild start must not press all the rest flat
    x, y = _axis(min(steps), max(steps)), _axis(values[0], values[-1 - cut])
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(step: float, value: float) -> tuple[float, float]:
        across, up = (step - x[0]) / (x[-1] - x[0]), (min(value, y[-1]) - y[0]) / (y[-1] - y[0])
        return round(LEFT + across * wide, 1), round(TOP + (1 - up) * high, 1)

    lines = tuple(
        CurveLine(i, tuple(place(*point) for point in _thinned(curve))) for i, curve in curves.items()
    )
    return Chart(
        title, lines, tuple(Tick(place(v, y[0])[0], label(v)) for v in x),
        tuple(Tick(place(x[0], v)[1], label(v)) for v in y)
    )


def label(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _axis(low: float, high: float) -> list[float]:
    """Round numbers from below the lowest to above the highest, four to eight of them."""
    spread = high - low if high - low > 1e-6 * abs(high) else abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(spread / 4))
    unit = next(n * power for n in (1, 2, 5, 10) if spread / (n * power) <= 6)
    first, last = math.floor(low / unit), math.ceil(high / unit)
    return [n * unit for n in range(first, max(last, first + 1) + 1)]


def _thinned(curve: Curve) -> Curve:
    """At most MOST points, each the mean of its neighbours."""
    size = -(-len(curve) // MOST)
    parts = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]
