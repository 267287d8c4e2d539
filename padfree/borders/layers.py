"""What a footprint says: maps, what their windows read, and tables of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from padfree.columns import table
from padfree.errors import PadfreeError
from padfree.geometry import size_text

SIDES = ("top", "bottom", "left", "right")
Sides = tuple[float, float, float, float]


@dataclass(frozen=True)
class Reads:
    """What the windows of one convolution or pool read of the map in front of it, a pad in front of it included.

    All shares are of (position, tap) pairs, from 0 to 1.

    Attributes:
        kernel, stride, dilation: (rows, columns).
        fill: what taps outside the map read: "zero"; "left out" (a max-pool never chooses them, an average pool does
            not count them); "reflect" or "replicate" (they read the map again, so none lies outside).
        positions: share of the positions with at least one tap outside the map.
        taps: share of the taps outside the map.
        sides: share of the taps above, below, left and right of the map; corners are in two of them.
        unread: rows at the top, rows at the bottom, columns at the left and at the right that no window reads.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    fill: str
    positions: float
    taps: float
    sides: Sides
    unread: tuple[int, int, int, int]


@dataclass(frozen=True)
class Layer:
    """One map of a network: what a convolution, a pool, a sum or a concatenation of maps writes.

    Attributes:
        name: path of the module whose forward makes it ("" for the model's own), with "#2" and so on from its second.
        kind: "conv", "depthwise conv", "transposed conv", "max pool", "average pool", "adaptive pool", "sum",
            "concatenation".
        before, size: (H, W) of the map that is read (before a pad) and written.
        reads: the operation's own taps; None for sums and concatenations.
        padded: (H, W) share of the paths of each position that end in padding.
        outside: (H, W) share of the area of each position's receptive field that lies outside the image.
        receptive_field: (height, width) in pixels of the receptive field in the middle of the map.
        notes: what was left out or taken for granted on the way.
        unknown: the operation that stands in the way, or ""; `padded` and `outside` are None then.
    """

    name: str
    kind: str
    before: tuple[int, int]
    size: tuple[int, int]
    reads: Reads | None
    padded: Tensor | None = field(default=None, repr=False, compare=False)
    outside: Tensor | None = field(default=None, repr=False, compare=False)
    receptive_field: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    unknown: str = ""

    @property
    def edges(self) -> Sides | None:
        """Mean of `padded` over the first row, the last row, the first and the last column."""
        if self.padded is None:
            return None
        edges = (self.padded[0], self.padded[-1], self.padded[:, 0], self.padded[:, -1])
        top, bottom, left, right = (float(edge.mean()) for edge in edges)
        return top, bottom, left, right

    @property
    def small(self) -> bool:
        """Whether tables leave it out: a map of one pixel, or a 1x1 convolution without padding."""
        pointwise = self.reads is not None and self.reads.kernel == (1, 1) and not self.reads.taps
        return self.size == (1, 1) or (pointwise and self.kind != "adaptive pool")

    def to_dict(self, maps: bool = False) -> dict[str, Any]:
        """A JSON-ready dictionary; `maps` adds the two maps as rows of numbers."""
        data: dict[str, Any] = {"name": self.name, "kind": self.kind, "before": list(self.before)}
        data |= {"size": list(self.size), "reads": None}
        if self.reads is not None:
            data["reads"] = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self.reads).items()}
        for name, grid in (("padded", self.padded), ("outside", self.outside)):
            data[name] = None if grid is None else {"mean": float(grid.mean()), "max": float(grid.max())}
            if grid is not None and maps:
                data[name]["map"] = [[round(value, 6) for value in row] for row in grid.tolist()]
        data["edges"] = None if self.edges is None else list(self.edges)
        data["receptive_field"] = None if self.receptive_field is None else list(self.receptive_field)
        return data | {"notes": list(self.notes), "unknown": self.unknown}


@dataclass(frozen=True)
class Footprint:
    """What padding a network reads, map by map; see `footprint` for the definitions.

    Attributes:
        model: its class.
        input_size: (C, H, W) it was recorded at.
        layers: its maps in the order in which they are made.
        outputs: share of the paths of each output that end in padding, by its place in what the model returns
            ("" for a bare tensor); None where it is unknown.
        read: (H, W) of booleans: the pixels of the image that some path reaches; None if it is unknown.
        notes: what was left out, taken for granted, or stands in the way.
    """

    model: str
    input_size: tuple[int, ...]
    layers: tuple[Layer, ...]
    outputs: dict[str, float | None]
    read: Tensor | None = field(default=None, repr=False, compare=False)
    notes: tuple[str, ...] = ()

    @property
    def unread(self) -> int | None:
        """Pixels of the image that nothing the model returns depends on."""
        return None if self.read is None else int((~self.read).sum())

    def __getitem__(self, name: str) -> Layer:
        """The map of that name.

        Raises:
            PadfreeError: there is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise PadfreeError(f"{self.model} has no map {name!r}; see the names in footprint.layers")

    def compare(self, converted: Footprint) -> FootprintChange:
        """This footprint beside that of the converted network."""
        return FootprintChange(self, converted)

    def to_dict(self, maps: bool = False) -> dict[str, Any]:
        """A JSON-ready dictionary; `maps` adds every map, which is large."""
        return {
            "model": self.model,
            "input_size": list(self.input_size),
            "layers": [layer.to_dict(maps) for layer in self.layers],
            "outputs": self.outputs,
            "unread_pixels": self.unread,
            "unread": self.unread_text(),
            "notes": list(self.notes),
        }

    def unread_text(self) -> str:
        """In words, which pixels of the image are not read."""
        if self.read is None:
            return "unknown"
        rows, columns = (~self.read.any(axis) for axis in (1, 0))
        if int((~self.read).sum()) != int((rows[:, None] | columns).sum()):
            return f"{self.unread} pixels, scattered"
        parts = [text for text in (_lines(rows, "row"), _lines(columns, "column")) if text]
        return f"{self.unread} pixels: {' and '.join(parts)}" if parts else "none"

    def rows(self) -> list[tuple[str, ...]]:
        """The table of `str()`, its heading first: maps of one pixel and 1x1 convolutions without padding left out."""
        heading = (
            "map",
            "made by",
            "size",
            "taps",
            "top",
            "bottom",
            "left",
            "right",
            "padded",
            "worst",
            "outside",
            "unread",
        )
        lines: list[tuple[str, ...]] = [heading]
        for layer in self.layers:
            reads = layer.reads
            if layer.small:
                continue
            shares = (reads.taps, *reads.sides) if reads is not None else ()
            own = tuple(_percent(share) for share in shares) or ("",) * 5
            if layer.padded is None or layer.outside is None:
                carried: tuple[str, ...] = ("?",) * 3
            else:
                figures = (layer.padded.mean(), layer.padded.max(), layer.outside.mean())
                carried = tuple(_percent(float(figure)) for figure in figures)
            unread = "" if reads is None else _unread(reads.unread)
            lines.append((layer.name or "(model)", made_by(layer), size_text(layer.size), *own, *carried, unread))
        return lines

    def __str__(self) -> str:
        rows = self.rows()
        lines = [f"footprint of {self.model} at {size_text(self.input_size)}"]
        lines += table(rows, right=range(3, len(rows[0]) - 1), width=None, indent="  ")
        for name, share in self.outputs.items():
            lines.append(f"  output{' ' * bool(name)}{name}: {'?' if share is None else _percent(share)} padded")
        lines.append(f"  pixels that nothing reads: {self.unread_text()}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@dataclass(frozen=True)
class FootprintChange:
    """Two footprints side by side: of a network and of its converted form.

    Attributes:
        before, after: the footprints.
    """

    before: Footprint
    after: Footprint

    def pairs(self) -> list[tuple[Layer | None, Layer | None]]:
        """The same map before and after: of the same module and kind, in order; None where one network has none."""
        left: dict[tuple[str, str], list[Layer]] = {}
        for layer in self.before.layers:
            left.setdefault(_identity(layer), []).append(layer)
        pairs: list[tuple[Layer | None, Layer | None]] = []
        for layer in self.after.layers:
            same = left.get(_identity(layer))
            pairs.append((same.pop(0) if same else None, layer))
        return pairs + [(layer, None) for layers in left.values() for layer in layers]

    def to_dict(self, maps: bool = False) -> dict[str, Any]:
        """A JSON-ready dictionary: both footprints, and the names of the maps that belong together."""
        names = [[None if layer is None else layer.name for layer in pair] for pair in self.pairs()]
        return {"before": self.before.to_dict(maps), "after": self.after.to_dict(maps), "pairs": names}

    def __str__(self) -> str:
        rows = [("map", "made by", "size", "taps in padding", "padded", "outside")]
        for before, after in self.pairs():
            shown = [layer for layer in (before, after) if layer is not None]
            if all(layer.small for layer in shown):
                continue
            sizes, own, padded, outside = (
                _change(before, after, figure) for figure in (_size_of, _taps_of, _padded_of, _outside_of)
            )
            rows.append((shown[0].name or "(model)", made_by(shown[0]), sizes, own, padded, outside))
        lines = [f"footprint of {self.before.model} at {size_text(self.before.input_size)}, before -> after"]
        lines += table(rows, width=None, indent="  ")
        unread = (self.before.unread_text(), self.after.unread_text())
        return "\n".join([*lines, f"  pixels that nothing reads: {unread[0]} -> {unread[1]}"])


def _identity(layer: Layer) -> tuple[str, str]:
    return layer.name.partition("#")[0], layer.kind


def _change(before: Layer | None, after: Layer | None, figure: Callable[[Layer], str]) -> str:
    old, new = ("-" if layer is None else figure(layer) for layer in (before, after))
    return old if old == new else f"{old} -> {new}"


def _size_of(layer: Layer) -> str:
    return size_text(layer.size)


def _taps_of(layer: Layer) -> str:
    return "" if layer.reads is None else _percent(layer.reads.taps)


def _padded_of(layer: Layer) -> str:
    return "?" if layer.padded is None else _percent(float(layer.padded.mean()))


def _outside_of(layer: Layer) -> str:
    return "?" if layer.outside is None else _percent(float(layer.outside.mean()))


def made_by(layer: Layer) -> str:
    """The operation with its kernel and stride: "conv 3x3 /2"."""
    if layer.reads is None:
        return layer.kind
    stride = f" /{layer.reads.stride[0]}" if layer.reads.stride != (1, 1) else ""
    return f"{layer.kind} {size_text(layer.reads.kernel)}{stride}"


def _unread(lines: tuple[int, int, int, int]) -> str:
    """Rows and columns that no window reads, by side."""
    return " ".join(f"{side} {count}" for side, count in zip(SIDES, lines, strict=True) if count)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share else "0"


def _lines(missing: Tensor, name: str) -> str:
    """Rows or columns in words: "1 row at the bottom"."""
    at = missing.nonzero().flatten().tolist()
    if not at:
        return ""
    first = 0
    while first in at:
        first += 1
    last = 0
    while len(missing) - 1 - last in at and last < len(missing):
        last += 1
    ends = ("the top", "the bottom") if name == "row" else ("the left", "the right")
    parts = [(first, f"at {ends[0]}"), (last, f"at {ends[1]}"), (len(at) - first - last, "between")]
    if first == len(missing):
        parts = [(first, "(all)")]
    return " and ".join(f"{count} {name}{'s' * (count > 1)} {where}" for count, where in parts if count)
