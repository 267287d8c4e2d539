"""What each position of a map sees of the image: a rectangle, and the share of its weight-free paths.

A `Field` is made of other fields by three steps: windows over a map, a mean of operands, and a choice of positions.
Each step knows its way back as well: which positions of its sources a set of its own positions reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from padfree.borders.taps import LEFT_OUT, Taps, Window

Back = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True, eq=False)
class Field:
    """P positions, those of a map of `grid` (H, W) in rows where it is one.

    Attributes:
        spans: (4, P) pixels: top, bottom, left and right edge of the receptive field, bottom and right exclusive;
            negative and past the image's sides where it sticks out. A position that reads nothing: inf and -inf.
        inside: (P,) share of its paths that end at a pixel of the image; nan where nothing can be read (the -inf
            around a max-pool's map).
        pace: pixels of the image from one position to the next, (rows, columns).
        notes: what was left out or taken for granted on the way.
        sources: the fields that it was made of.
        back: from a mask (P,) of positions to a mask of each source's positions that they read.
    """

    grid: tuple[int, int] | None
    spans: Tensor = field(repr=False)
    inside: Tensor = field(repr=False)
    pace: tuple[float, float] = (1.0, 1.0)
    notes: frozenset[str] = frozenset()
    sources: tuple[Field, ...] = field(default=(), repr=False)
    back: Back = field(default=lambda mask: [], repr=False)

    @property
    def blank(self) -> bool:
        """Whether it is one position that sees nothing of the image."""
        return len(self.inside) == 1 and bool(self.spans[0, 0] == math.inf)

    def map(self, values: Tensor) -> Tensor:
        """(H, W) of (P,)."""
        assert self.grid is not None
        return values.view(self.grid)


def image(height: int, width: int) -> Field:
    """The field of an image: each pixel sees itself."""
    rows, columns = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
    top, left = (grid.reshape(-1) for grid in torch.meshgrid(rows, columns, indexing="ij"))
    spans = torch.stack([top, top + 1, left, left + 1])
    return Field((height, width), spans, torch.ones(height * width, dtype=torch.float64))


def constant(inside: float) -> Field:
    """One position that sees nothing of the image: 1 for a parameter, 0 for zeros that were filled in."""
    spans = torch.tensor([[math.inf], [-math.inf], [math.inf], [-math.inf]], dtype=torch.float64)
    return Field(None, spans, torch.full((1,), inside, dtype=torch.float64))


def through(source: Field, window: Window) -> Field:
    """The field of what a window operation writes.

    Each position's paths spread evenly over its taps. Zeros outside the map are taps whose paths end there; taps that
    are left out (`taps.LEFT_OUT`) are not taken at all.
    """
    rows, columns = window.rows, window.columns
    if rows.whole and columns.whole:
        return source
    grid = (len(rows.at), len(columns.at))
    up, across = rows.matrix(), columns.matrix()
    inside = source.map(source.inside)
    found = up @ inside.nan_to_num(0.0) @ across.T
    if window.fill == LEFT_OUT:
        taps = up @ (~inside.isnan()).double() @ across.T
    else:
        taps = torch.outer(rows.read.sum(1).double(), columns.read.sum(1).double())
    if window.kind == "pad":  # one tap each: zeros where there is no pixel, or nothing that could be chosen
        share = torch.where(taps > 0, found / taps, math.nan)
    else:
        share = torch.where(taps > 0, found / taps.clamp(min=1), 1.0)
    spans = torch.stack([_spans(source, edge, window) for edge in range(4)])
    pace = (source.pace[0] * rows.pace, source.pace[1] * columns.pace)

    def back(mask: Tensor) -> list[Tensor]:
        read = up.T @ mask.view(grid).double() @ across
        return [(read > 0).reshape(-1)]

    return Field(grid, spans.reshape(4, -1), share.reshape(-1), pace, source.notes, (source,), back)


def _spans(source: Field, edge: int, window: Window) -> Tensor:
    """(M, M'): the outermost edge over the taps; those outside the map lie as far out as the map's own pace says."""
    values, least = source.map(source.spans[edge]), edge % 2 == 0
    for axis, taps in enumerate((window.rows, window.columns)):
        step = source.pace[axis] if axis == edge // 2 else 0.0
        values = _outermost(values.transpose(0, axis), taps, step, least).transpose(0, axis)
    return values


def _outermost(values: Tensor, taps: Taps, step: float, least: bool) -> Tensor:
    """Over axis 0: (N, *) to (M, *)."""
    worst = math.inf if least else -math.inf
    known = taps.at.clamp(0, taps.size - 1)
    found = []
    for tap in range(taps.at.shape[1]):
        beyond = (taps.at[:, tap] - known[:, tap]).double() * step
        edge = values[known[:, tap]] + beyond[:, None]
        found.append(torch.where(taps.read[:, tap, None], edge, worst))
    return torch.stack(found).amin(0) if least else torch.stack(found).amax(0)


def mean(fields: Sequence[Field], weights: Sequence[float] | None = None) -> Field:
    """Operands of a sum, or parts of a concatenation, position by position; receptive fields become their hull."""
    if all(each is fields[0] for each in fields):
        return fields[0]
    shares = torch.tensor(weights or [1.0] * len(fields), dtype=torch.float64)
    inside = torch.stack([each.inside.nan_to_num(0.0) for each in fields])
    spans = torch.stack([each.spans for each in fields])
    grid = next((each.grid for each in fields if each.grid is not None), None)
    pace = (max(each.pace[0] for each in fields), max(each.pace[1] for each in fields))
    share = (inside * shares[:, None]).sum(0) / shares.sum()
    notes = frozenset().union(*(each.notes for each in fields))
    return Field(grid, _hull(spans, 0), share, pace, notes, tuple(fields), lambda mask: [mask] * len(fields))


def side_by_side(fields: Sequence[Field]) -> Field:
    """All positions of several fields, one after the other."""
    if len(fields) == 1:
        return fields[0]
    lengths = [len(each.inside) for each in fields]
    pace = (max(each.pace[0] for each in fields), max(each.pace[1] for each in fields))
    notes = frozenset().union(*(each.notes for each in fields))
    spans, inside = torch.cat([each.spans for each in fields], 1), torch.cat([each.inside for each in fields])
    return Field(None, spans, inside, pace, notes, tuple(fields), lambda mask: list(torch.split(mask, lengths)))


def chosen(source: Field, positions: Tensor, grid: tuple[int, int] | None = None) -> Field:
    """Positions that each read K positions of the source: (P, K) indices; evenly, each as often as it is there."""
    if grid is not None and source.grid == grid and positions.shape[1] == 1:
        flat = positions[:, 0]
        if len(flat) == len(source.inside) and bool((flat == torch.arange(len(flat))).all()):
            return source
    inside, spans = source.inside[positions].nanmean(1), _hull(source.spans[:, positions], 2)
    pace = source.pace
    if grid is not None:
        tops, lefts = spans[0].view(grid), spans[2].view(grid)
        pace = (_step(tops[:, 0], pace[0]), _step(lefts[0], pace[1]))

    def back(mask: Tensor) -> list[Tensor]:
        read = torch.zeros(len(source.inside), dtype=torch.bool)
        read[positions[mask].reshape(-1)] = True
        return [read]

    return Field(grid, spans, inside, pace, source.notes, (source,), back)


def _step(edges: Tensor, otherwise: float) -> float:
    """Pixels between two positions in the middle of an axis; at its ends pixels may be written around."""
    middle = len(edges) // 2
    step = float(edges[middle] - edges[middle - 1]) if len(edges) > 1 else math.nan
    return step if math.isfinite(step) and step > 0 else otherwise


def everything(fields: Sequence[Field], note: str) -> Field:
    """One position that reads all positions of these fields."""
    joined = side_by_side(fields)
    whole = chosen(joined, torch.arange(len(joined.inside))[None])
    return noted(whole, note)


def noted(source: Field, note: str, also: Sequence[Field] = ()) -> Field:
    """The same field with a note; `also` is read as well, but is no part of its paths and receptive fields."""
    notes = source.notes.union({note}, *(each.notes for each in also))

    def back(mask: Tensor) -> list[Tensor]:
        read = bool(mask.any())
        return [mask, *(torch.full((len(each.inside),), read) for each in also)]

    return Field(source.grid, source.spans, source.inside, source.pace, notes, (source, *also), back)


def _hull(spans: Tensor, axis: int) -> Tensor:
    """The rectangles around rectangles: (4, ...) or (K, 4, P) with `axis` reduced."""
    edges = spans.unbind(1) if axis == 0 else spans.unbind(0)
    reduce = axis if axis == 0 else axis - 1
    return torch.stack([e.amin(reduce) if i % 2 == 0 else e.amax(reduce) for i, e in enumerate(edges)])


def pixels_read(image_field: Field, outputs: Sequence[Field]) -> Tensor:
    """(H, W): the pixels that some path from these fields reaches."""
    order: dict[int, Field] = {}

    def visit(start: Field) -> None:
        stack = [(start, iter(start.sources))]
        seen.add(id(start))
        while stack:
            current, rest = stack[-1]
            following = next(rest, None)
            if following is None:
                order[id(current)] = current
                stack.pop()
            elif id(following) not in seen:
                seen.add(id(following))
                stack.append((following, iter(following.sources)))

    seen: set[int] = set()
    for output in outputs:
        if id(output) not in seen:
            visit(output)
    masks: dict[int, Tensor] = {id(each): torch.ones(len(each.inside), dtype=torch.bool) for each in outputs}
    for current in reversed(order.values()):
        mask = masks.get(id(current))
        if mask is None:
            continue
        for source, read in zip(current.sources, current.back(mask), strict=True):
            known = masks.get(id(source))
            masks[id(source)] = read if known is None else known | read
    assert image_field.grid is not None
    return masks.get(id(image_field), torch.zeros(len(image_field.inside), dtype=torch.bool)).view(image_field.grid)
