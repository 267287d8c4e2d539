"""The border effect of several networks, as the pages show it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from padfree.borders.results import BorderEffect
from padfree.geometry import size_text
from padfree.page.pictures import picture

_TOP = 1.5  # the brightest colour stands for this much at most


def effects_content(found: Sequence[tuple[str, BorderEffect]]) -> dict[str, Any]:
    """What the templates' `border` shows of networks that were measured on the same images.

    Args:
        found: a title, and what `padfree.border_effect` found, of each; at least one.
    """
    top = min(max((float(layer.difference.max()) for _, each in found for layer in each.layers), default=1.0), _TOP)
    columns = []
    for title, each in found:
        last = {layer.size: layer for layer in each.layers}  # one for each size
        maps = [
            {
                "name": layer.name,
                "size": size_text(layer.size),
                "picture": picture(layer.difference, top),
                "sides": [f"{side:.2f}" for side in layer.sides],
                "centre": f"{layer.centre:.2f}",
            }
            for layer in last.values()
        ]
        columns.append({"title": title, "maps": maps, "table": each.rows(), "notes": each.notes})
    return {
        "images": found[0][1].images,
        "margin": found[0][1].margin,
        "top": f"{top:.2f}",
        "columns": columns,
        "shifts": _shifts(found),
    }


def _shifts(found: Sequence[tuple[str, BorderEffect]]) -> list[tuple[str, ...]]:
    """Predictions for moved frames as a table, its heading first; empty where no network is a classifier."""
    measured = [(title, {shift.pixels: shift for shift in each.shifts}) for title, each in found if each.shifts]
    if not measured:
        return []
    heading = ["frame moved by (pixels)", *(f"same class, {title}" for title, _ in measured)]
    heading += [f"change of logits, {title}" for title, _ in measured]
    rows: list[tuple[str, ...]] = [tuple(heading)]
    for pixels in sorted(set.intersection(*(set(shifts) for _, shifts in measured))):
        same = (f"{shifts[pixels].consistency:.1%}" for _, shifts in measured)
        change = (f"{shifts[pixels].change:.3f}" for _, shifts in measured)
        rows.append((str(pixels), *same, *change))
    return rows
