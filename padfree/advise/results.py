"""What is advised, and the figures behind it, as data and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from padfree.columns import WIDTH, broken, plural, table
from padfree.geometry import size_text

_HEAD = ("form", "params", "MACs", "ms", "time", "smallest")


@dataclass(frozen=True)
class Ratio:
    """Time over the original's: the median of all turns, and the quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Row:
    """One form of the network.

    Attributes:
        form: "original", "stem", "downsampling" or "both"; for a place alone, the module that leads it.
        rules: what `convert(model, rules=...)` makes it with; for a place alone, those of its matches.
        places: how many matches are rewritten.
        params: number of parameters.
        macs: multiply-adds of one image as fvcore counts them; None where it cannot.
        milliseconds: of one call, the median.
        time: as a ratio to the original's.
        minimum_input: the least square side in pixels that it takes; None where it was not found.
        reason: why it was not measured (the figures are None then), or which form measured before it equals.
    """

    form: str
    rules: tuple[str, ...]
    places: int
    params: int | None = None
    macs: int | None = None
    milliseconds: float | None = None
    time: Ratio | None = None
    minimum_input: int | None = None
    reason: str = ""

    def cells(self, name: str) -> tuple[str, ...]:
        """Its line of the table."""
        if self.time is None:
            return (name, self.reason)  # it stands in the columns behind
        macs = "?" if self.macs is None else f"{self.macs / 1e6:,.1f}M"
        smallest = "?" if self.minimum_input is None else str(self.minimum_input)
        return (name, f"{(self.params or 0) / 1e6:.2f}M", macs, f"{self.milliseconds:.2f}", str(self.time), smallest)


@dataclass(frozen=True)
class Advice:
    """What the forms of a network cost in one runtime, and which to take.

    Attributes:
        model: the network's class.
        input_size: (C, H, W).
        batch: images a call.
        runtime: where time was measured.
        rows: the forms, the original first.
        control: the original against itself, built again.
        recommended: the form to take.
        reason: why.
        places: the network with one place rewritten, by place; empty where that was not asked for.
    """

    model: str
    input_size: tuple[int, ...]
    batch: int
    runtime: str
    rows: tuple[Row, ...]
    control: Ratio
    recommended: str
    reason: str
    places: tuple[Row, ...] = ()

    @property
    def rules(self) -> tuple[str, ...]:
        """What `convert(model, rules=...)` makes the recommended form with; empty for the original."""
        return next(row.rules for row in self.rows if row.form == self.recommended)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        data = asdict(self)
        data["input_size"] = list(self.input_size)
        for key in ("rows", "places"):
            data[key] = [{**row, "rules": list(row["rules"])} for row in data[key]]
        return data

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [_HEAD]
        lines += [row.cells(_with_places(row)) for row in self.rows]
        if self.places:
            lines += [("one place alone:", "")]
            lines += [row.cells(f"  {row.form}") for row in self.places]
        chosen = self.recommended if not self.rules else f"{self.recommended} (rules {' '.join(self.rules)})"
        notes = [
            f"control: the original against itself {self.control}",
            f"recommended: {chosen}",
            f"  {self.reason}",
            "  (time alone was looked at, not accuracy)",
        ]
        where = f"{self.model} at {size_text(self.input_size)}, batch {self.batch}, {self.runtime}, one thread"
        return "\n".join(
            [
                where,
                *table(lines, right=range(1, len(_HEAD))),
                *(part for note in notes for part in broken(note, WIDTH)),
            ]
        )


def _with_places(row: Row) -> str:
    return f"{row.form}, {plural(row.places, 'place')}" if row.places else row.form
