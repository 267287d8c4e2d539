"""What `padfree.border_effect` found: numbers by map and by shift, and tables of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from padfree.borders.layers import Sides
from padfree.columns import plural, table
from padfree.errors import PadfreeError
from padfree.geometry import size_text


@dataclass(frozen=True)
class LayerEffect:
    """One map; `border_effect` defines the numbers.

    Attributes:
        name: path of the module that returns it, with "#2" and so on from its second call.
        size: (H, W).
        difference: (H, W), in units of the features' own root mean square.
        asymmetry: (vertical, horizontal), in units of the features' mean magnitude; positive: larger at the top, or
            at the left, than the content explains.
    """

    name: str
    size: tuple[int, int]
    difference: Tensor = field(repr=False, compare=False)
    asymmetry: tuple[float, float]

    @property
    def sides(self) -> Sides:
        """Mean of `difference` over the first row, the last row, the first and the last column."""
        edges = (self.difference[0], self.difference[-1], self.difference[:, 0], self.difference[:, -1])
        top, bottom, left, right = (float(edge.mean()) for edge in edges)
        return top, bottom, left, right

    @property
    def centre(self) -> float:
        """Mean of `difference` over the middle half of the rows and columns."""
        (top, height), (left, width) = ((side // 4, max(1, side - 2 * (side // 4))) for side in self.size)
        return float(self.difference[top : top + height, left : left + width].mean())

    def to_dict(self, maps: bool = False) -> dict[str, Any]:
        """A JSON-ready dictionary; `maps` adds the differences as rows of numbers."""
        data: dict[str, Any] = {"name": self.name, "size": list(self.size), "mean": float(self.difference.mean())}
        data |= {"sides": list(self.sides), "centre": self.centre, "asymmetry": list(self.asymmetry)}
        if maps:
            data["map"] = [[round(value, 6) for value in row] for row in self.difference.tolist()]
        return data


@dataclass(frozen=True)
class Shift:
    """Predictions for frames moved by some pixels; `border_effect` defines the numbers."""

    pixels: int
    consistency: float
    change: float


@dataclass(frozen=True)
class BorderEffect:
    """How much a network's features depend on where the border is; see `border_effect` for the definitions.

    Attributes:
        model: its class.
        input_size: (C, H, W) of the frame.
        margin: pixels of the scene around it.
        images: how many were measured.
        layers: the maps, in order.
        shifts: predictions for moved frames; empty where the model is no classifier.
        notes: what could not be measured.
    """

    model: str
    input_size: tuple[int, ...]
    margin: int
    images: int
    layers: tuple[LayerEffect, ...]
    shifts: tuple[Shift, ...]
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> LayerEffect:
        """The map of that name.

        Raises:
            PadfreeError: there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise PadfreeError(f"{self.model} has no map {name!r}; see the names in border_effect(...).layers")

    def to_dict(self, maps: bool = False) -> dict[str, Any]:
        """A JSON-ready dictionary; `maps` adds every map, which is large."""
        return {
            "model": self.model,
            "input_size": list(self.input_size),
            "margin": self.margin,
            "images": self.images,
            "layers": [layer.to_dict(maps) for layer in self.layers],
            "shifts": [vars(shift) for shift in self.shifts],
            "notes": list(self.notes),
        }

    def rows(self) -> list[tuple[str, ...]]:
        """The table of `str()`, its heading first."""
        heading = ("map", "size", "top", "bottom", "left", "right", "centre", "vertical", "horizontal")
        lines: list[tuple[str, ...]] = [heading]
        for layer in self.layers:
            figures = (*layer.sides, layer.centre)
            signed = (f"{figure:+.3f}" for figure in layer.asymmetry)
            lines.append((layer.name, size_text(layer.size), *(f"{figure:.3f}" for figure in figures), *signed))
        return lines

    def __str__(self) -> str:
        rows = self.rows()
        frame = f"{size_text(self.input_size)} with {self.margin} pixels around"
        lines = [f"border effect of {self.model} at {frame}, {plural(self.images, 'image')}"]
        lines += table(rows, right=range(2, len(rows[0])), width=None, indent="  ")
        for shift in self.shifts:
            moved = f"moved by {plural(shift.pixels, 'pixel')}"
            lines.append(f"  {moved}: {shift.consistency:.1%} same class, logits change by {shift.change:.3f}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])
