"""Curves by epoch with their spread, laid out for an inline SVG: it takes the page's colours, light and dark."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 360, 240  # as wide as a phone shows it; a wider page has several side by side
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 8, 10, 36  # room for the ticks and the name of the axis


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        label: what it is of.
        runs: the values by epoch of each run, all equally many.
    """

    label: str
    runs: tuple[tuple[float, ...], ...]

    @property
    def mean(self) -> list[float]:
        """Over the runs, by epoch."""
        return [statistics.fmean(values) for values in zip(*self.runs, strict=True)]

    @property
    def lowest(self) -> list[float]:
        """Of the runs, by epoch."""
        return [min(values) for values in zip(*self.runs, strict=True)]

    @property
    def highest(self) -> list[float]:
        """Of the runs, by epoch."""
        return [max(values) for values in zip(*self.runs, strict=True)]


def chart(title: str, curves: Sequence[Curve]) -> dict[str, Any]:
    """Lines of the means, bands from the lowest to the highest run, ticks of both axes, and the figures as a table."""
    low = min(min(curve.lowest) for curve in curves)
    high = max(max(curve.highest) for curve in curves)
    longest = max(len(curve.mean) for curve in curves)
    across, up = _ticks(1, longest, whole=True), _ticks(low, high)
    low, high = min(low, up[0]), max(high, up[-1])

    def place(epoch: float, value: float) -> tuple[float, float]:
        part = (epoch - 1) / max(1, longest - 1)
        x = _LEFT + part * (WIDTH - _LEFT - _RIGHT)
        y = HEIGHT - _BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    def points(values: Sequence[float], backwards: bool = False) -> str:
        found = [place(epoch, value) for epoch, value in enumerate(values, 1)]
        return " ".join(f"{x},{y}" for x, y in (reversed(found) if backwards else found))

    lines = [
        {
            "label": curve.label,
            "points": points(curve.mean),
            "band": f"{points(curve.lowest)} {points(curve.highest, backwards=True)}" if len(curve.runs) > 1 else "",
            "end": place(len(curve.mean), curve.mean[-1]),
        }
        for curve in curves
    ]
    ends = "; ".join(f"{curve.label} from {curve.mean[0]:.4g} to {curve.mean[-1]:.4g}" for curve in curves)
    return {
        "title": title,
        "words": f"{title} by epoch, means of the runs: {ends}",
        "lines": lines,
        "across": [(place(tick, low)[0], f"{tick:g}") for tick in across],
        "up": [(place(1, tick)[1], f"{tick:g}") for tick in up],
        "left": _LEFT,
        "right": WIDTH - _RIGHT,
        "bottom": HEIGHT - _BOTTOM,
        "table": _table(curves, longest),
    }


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    if low == high and not whole:  # one value: ticks around it, not its digits
        low, high = low - (abs(low) / 20 or 1), high + (abs(high) / 20 or 1)
    found = MaxNLocator(5, integer=whole).tick_values(low, high)
    if whole:  # epochs: none before the first, none behind the last
        return [float(tick) for tick in found if low <= tick <= high] or [low]
    return [float(round(tick, 10)) for tick in found]


def _table(curves: Sequence[Curve], longest: int) -> list[tuple[str, ...]]:
    """Means with lowest and highest, an epoch a row, the heading first."""
    rows: list[tuple[str, ...]] = [("epoch", *(curve.label for curve in curves))]
    for at in range(longest):
        cells = []
        for curve in curves:
            if at >= len(curve.mean):
                cells.append("")
                continue
            spread = f" ({curve.lowest[at]:.4g} to {curve.highest[at]:.4g})" if len(curve.runs) > 1 else ""
            cells.append(f"{curve.mean[at]:.4g}{spread}")
        rows.append((str(at + 1), *cells))
    return rows
