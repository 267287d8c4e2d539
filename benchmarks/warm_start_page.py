"""The warm start's figures as a page and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.clock import title
from benchmarks.training import Cell, asked, draw, spread

ROWS = (
    "original",
    "naive",
    "naive, norms measured again",
    "preserve",
    "preserve, norms measured again",
    "calibrate",
    "preserve, wider",
    "calibrate, wider",
)
CONTROLS = {
    "grid": "moved grid",
    "border": "no zeros at the border",
    "positions": "last row and column gone",
    "stem": "stem alone",
}
TUNED = {"naive": "naive", "calibrate": "calibrate", "original": "original continued"}


def page(found: Sequence[Cell], about: dict[str, Any], picture: str | None) -> str:
    """The Markdown of all cells."""
    lines = [
        "# Warm start: figures",
        "",
        f"Written by `python -m benchmarks.warm_start {asked(found, 'set')}`, which goes on from what it has",
        "(`--report` measures nothing; the default is 5 seeds and all sets);",
        "[warm-start.md](warm-start.md) says what the rows are and how to read them. The original's accuracy is in",
        "percent of the test images; of all others, what is kept: their accuracy over the same original's, before any",
        "training. Mean ± sample standard deviation over seeds.",
        f"On {title(about)}.",
        "",
    ]
    sets = list(dict.fromkeys(cell["key"]["set"] for cell in found))
    for name in sets:
        mine = [cell for cell in found if cell["key"]["set"] == name]
        begun = [cell for cell in mine if "before" in cell]
        lines += [f"## {name}", "", _settings(begun), "", *_kept(begun), "", *_controls(begun), "", *_tuned(mine)]
    if picture:
        lines += [f"![Test accuracy while fine-tuning]({picture})", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _settings(found: Sequence[Cell]) -> str:
    steps = " and ".join(str(steps) for steps in sorted({cell["key"]["steps"] for cell in found}))
    wider = sorted({cell["wider_side"] for cell in found if cell["wider_side"] is not None})
    told = (
        f" *Wider*: images of {' or '.join(map(str, wider))} pixels, on which the last map is the original's."
        if wider
        else ""
    )
    return f"Originals saw {steps} batches of 64.{told}"


def _kept(found: Sequence[Cell]) -> list[str]:
    lines = ["| network | seeds | original % | " + " | ".join(ROWS[1:]) + " |", "|" + "---|" * (len(ROWS) + 2)]
    columns: dict[str, list[float]] = {row: [] for row in ROWS[1:]}
    for family in _families(found):
        mine = [cell for cell in found if cell["key"]["family"] == family]
        cells = [spread([cell["before"]["original"] for cell in mine])]
        for row in ROWS[1:]:
            values = [kept(cell, row) for cell in mine if cell["before"][row] is not None]
            cells.append(spread(values, 3) if values else "")
            columns[row] += [statistics.fmean(values)] if values else []
        lines.append(f"| {family} | {len(mine)} | " + " | ".join(cells) + " |")
    means = [f"{statistics.fmean(columns[row]):.3f}" if columns[row] else "" for row in ROWS[1:]]
    lines.append("| mean of networks | | | " + " | ".join(means) + " |")
    return lines


def kept(cell: Cell, row: str) -> float:
    """An accuracy before training over the original's."""
    return float(cell["before"][row]) / float(cell["before"]["original"])


def _controls(found: Sequence[Cell]) -> list[str]:
    lines = ["What the loss is made of: originals that lose one thing each (kept).", ""]
    lines += ["| network | " + " | ".join(CONTROLS.values()) + " |", "|" + "---|" * (len(CONTROLS) + 1)]
    for family in _families(found):
        mine = [cell for cell in found if cell["key"]["family"] == family]
        cells = []
        for key in CONTROLS:
            values = [cell["controls"][key] / cell["before"]["original"] for cell in mine]
            cells.append(spread(values, 3))
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return lines


def _tuned(everything: Sequence[Cell]) -> list[str]:
    lines: list[str] = []
    for epochs in sorted({cell["key"]["epochs"] for cell in everything if "tuned" in cell}, key=float):
        mine = [cell for cell in everything if cell["key"]["epochs"] == epochs]
        lines += [f"Fine-tuned for {epochs} epochs of 64 batches; minus the original before them, in points:", ""]
        lines += ["| network | seeds | " + " | ".join(TUNED.values()) + " | calibrate minus naive |"]
        lines += ["|" + "---|" * (len(TUNED) + 3)]
        columns: dict[str, list[float]] = {name: [] for name in (*TUNED, "gain")}
        for family in _families(mine):
            curves = [cell["tuned"] for cell in mine if cell["key"]["family"] == family]
            bases = [_at(curve["original"], min) for curve in curves]
            ends = {name: [_at(curve[name], max) for curve in curves] for name in TUNED}
            found = {name: [a - b for a, b in zip(ends[name], bases, strict=True)] for name in TUNED}
            found["gain"] = [a - b for a, b in zip(ends["calibrate"], ends["naive"], strict=True)]
            for name, values in found.items():
                columns[name].append(statistics.fmean(values))
            cells = [spread(values, sign=True) for values in found.values()]
            lines.append(f"| {family} | {len(curves)} | " + " | ".join(cells) + " |")
        means = [f"{statistics.fmean(values):+.1f}" for values in columns.values()]
        lines.append("| mean of networks | | " + " | ".join(means) + " |")
        lines.append("")
    return lines


def _at(curve: dict[Any, float], which: Callable[..., Any]) -> float:
    """The accuracy at the first (min) or last (max) step of a curve, whose steps are text once they are read back."""
    return curve[which(curve, key=int)]


def _families(found: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell["key"]["family"] for cell in found))


def picture(found: Sequence[Cell], target: Path) -> None:
    """Draw test accuracy while fine-tuning for the longer time: one panel a network and set."""
    panels: dict[str, dict[str, list[dict[Any, float]]]] = {}
    tuned = [cell for cell in found if "tuned" in cell]
    longest = max((cell["key"]["epochs"] for cell in tuned), key=float, default="")
    for cell in tuned:
        if cell["key"]["epochs"] == longest:
            panel = panels.setdefault(f"{cell['key']['family']}, {cell['key']['set']}", {})
            for name, label in TUNED.items():
                panel.setdefault(label, []).append(cell["tuned"][name])
    if panels:
        draw(panels, target, f"batches of 64 ({longest} epochs)")
