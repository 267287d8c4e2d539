"""What a conversion changed: parameters, multiply-adds, map sizes, the smallest input.

Multiply-adds are fvcore's (`fvcore.nn.FlopCountAnalysis`): one fused multiply-add counts one, for
convolutions, linear layers and matrix products; its norm and adaptive-pool handlers are in the
total; max-pools, additions and activations are not, and `Comparison.uncounted` lists them.
All of it is measured on copies: both models keep their mode, buffers, hooks and random state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from padfree.columns import labelled, plural, table
from padfree.errors import PadfreeError
from padfree.geometry import size_text
from padfree.layers.new import new_layers
from padfree.record.copies import kept_generators
from padfree.record.inputs import check_input_size, default_input_size
from padfree.record.recording import Recording, record
from padfree.report.costs import NOTHING, costs
from padfree.report.last_map import size_with_last_map
from padfree.report.macs import MacCount, count_macs, count_params
from padfree.report.places import STRIDED, Place, Side, places
from padfree.report.smallest import minimum_input
from padfree.types import PlanData, Returned
from padfree.verify.resizing import returned

Size = tuple[int, ...]


_LISTED = 6  # kinds of uncounted operations that the table names


@dataclass(frozen=True)
class Pair:
    """One figure before and after; None where it could not be had."""

    original: int | None
    converted: int | None

    @property
    def change(self) -> float | None:
        """(converted - original) / original."""
        if self.converted is None or not self.original:
            return None
        return (self.converted - self.original) / self.original


@dataclass(frozen=True)
class StageMap:
    """Side lengths (H, W) that a strided operation writes, before and after."""

    before: Size
    after: Size


@dataclass(frozen=True)
class Comparison:
    """Two networks on one image of `input_size` (C, H, W).

    Attributes:
        params: number of parameters.
        macs: multiply-adds of one image as fvcore counts them.
        maps: the distinct (before, after) sizes that strided convolutions and pools write, in order.
        outputs: the maps that the networks return, with their whole shapes; empty where they return unlike things.
        minimum_input: the least square side, in pixels, that both networks take; one pixel less was
            tried and one of them fails. Found by bisection below `input_size`, then among the multiples
            of 7 and 8 below that. None: not found.
        uncounted: operations that `macs` leaves out, with their number in each network.
        notes: what could not be measured, and why.
        init: how the new layers began, of the last conversion: "fresh" or "preserve"; None: unknown.
        new_layers: number of convolutions and norms that the conversion added; None: unknown.
        last_map_size: (C, H, W) of the image on which the converted network has the original's last map: there it
            keeps most of what a conversion costs a trained network. None: not found, or no map shrinks.
        last_map_macs: its multiply-adds on that image.
        places: what smaller maps save and new layers add, by place, and last in the rest of the network; their sums are
            `params` and `macs`. Empty where the plan of the conversion is not known, or fvcore cannot count.
    """

    model: str
    input_size: Size
    params: Pair
    macs: Pair
    maps: tuple[StageMap, ...]
    minimum_input: int | None
    uncounted: dict[str, Pair]
    notes: tuple[str, ...] = ()
    outputs: tuple[Returned, ...] = ()
    init: str | None = None
    new_layers: int | None = None
    last_map_size: Size | None = None
    last_map_macs: int | None = None
    places: tuple[Place, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `maps` becomes {"before": [[H, W], ...], "after": [...]}."""
        data = asdict(self)
        data["input_size"] = list(self.input_size)
        data["maps"] = {
            "before": [list(stage.before) for stage in self.maps],
            "after": [list(stage.after) for stage in self.maps],
        }
        data["notes"] = list(self.notes)
        data["last_map_size"] = None if self.last_map_size is None else list(self.last_map_size)
        data["places"] = [
            {**asdict(place), "rules": list(place.rules), "after": asdict(place.after)} for place in self.places
        ]
        data["outputs"] = [output.to_dict() for output in self.outputs]
        return data

    def rows(self) -> list[tuple[str, str]]:
        """The table of `str()`: (label, "before -> after") pairs."""
        most = sorted(self.uncounted.items(), key=lambda item: -(item[1].converted or 0))
        listed = [f"{name} {_number(pair.original)} -> {_number(pair.converted)}" for name, pair in most]
        if len(listed) > _LISTED:
            listed[_LISTED:] = [f"{len(listed) - _LISTED} more"]
        rows = [
            ("input", size_text(self.input_size)),
            ("parameters", _line(self.params, _number)),
            ("MACs (fvcore)", _line(self.macs, _short)),
            ("maps before", " ".join(_size(stage.before) for stage in self.maps) or "-"),
            ("maps after", " ".join(_size(stage.after) for stage in self.maps) or "-"),
            *((f"output {output.name}".strip(), output.sizes(" -> ")) for output in self.outputs),
            ("smallest input", _side(self.minimum_input)),
            *self._advice(),
            ("not in the MACs", ", ".join(listed) or "-"),
        ]
        return rows + [("note", note) for note in self.notes]

    def _advice(self) -> list[tuple[str, str]]:
        rows: list[tuple[str, str]] = []
        if self.new_layers:
            begin = "" if self.init is None else f", init {self.init}"
            rows.append(("new layers", f"{self.new_layers}{begin}"))
        if self.last_map_size is not None:
            cost = f", {_short(self.last_map_macs)} MACs"
            rows.append(("last map back", f"on {size_text(self.last_map_size)}{cost}"))
        if self.places and self.total().after.macs > self.total().before.macs:
            most = max(self.places, key=lambda place: place.layers.macs)
            added, saved = _signed(most.layers.macs), _signed(self.total().maps.macs)
            rows.append(
                ("costs more", f"{most.name} adds {added}, smaller maps save {saved}: padfree.advise says what pays")
            )
        return rows

    def __str__(self) -> str:
        lines = labelled(self.rows(), indent="  ")
        if self.places:
            lines += ["", *table(self.place_rows(), right=range(1, 6), indent="  ")]
        return "\n".join([self.model, *lines])

    def place_rows(self) -> list[tuple[str, ...]]:
        """The table of places, its headings first: multiply-adds, but for the last column."""
        rows: list[tuple[str, ...]] = [("place", "MACs", "smaller maps", "new layers", "after", "parameters")]
        rows += [_place_row(place) for place in self.places]
        return [*rows, _place_row(self.total())] if self.places else []

    def total(self) -> Place:
        """All places together."""
        parts = (sum((getattr(place, key) for place in self.places), NOTHING) for key in ("before", "maps", "layers"))
        return Place("sum", (), *parts)


@kept_generators()
def compare(original: nn.Module, converted: nn.Module, input_size: Size | None = None) -> Comparison:
    """Compare a network with its converted form.

    Args:
        original: the network before conversion.
        converted: the network after it.
        input_size: (C, H, W); default: the size that `converted` was converted at.

    Raises:
        PadfreeError: one of them is not a network, or does not run at that size.
    """
    for model in (original, converted):
        if not isinstance(model, nn.Module):
            raise PadfreeError(f"compare takes two torch.nn.Modules, not {type(model).__name__}")
    size = default_input_size(converted) if input_size is None else check_input_size(input_size)
    recordings = record(original, size), record(converted, size)
    counts = count_macs(original, size), count_macs(converted, size)
    names = list(dict.fromkeys([*counts[0].uncounted, *counts[1].uncounted]))
    stages = tuple(_stages(*recordings))
    larger = _larger(recordings[1], stages)
    made = converted.__dict__.get("padfree_plan")
    return Comparison(
        model=type(original).__name__,
        input_size=size,
        params=Pair(*(count_params(model) for model in (original, converted))),
        macs=Pair(counts[0].macs, counts[1].macs),
        maps=tuple(dict.fromkeys(stage for _, stage in stages)),
        minimum_input=minimum_input(*recordings),
        uncounted={name: Pair(counts[0].uncounted[name], counts[1].uncounted[name]) for name in names},
        notes=tuple(dict.fromkeys(count.note for count in counts if count.note)),
        outputs=returned(*recordings) if recordings[0].names == recordings[1].names else (),
        init=getattr(made, "init", None),
        new_layers=len(new_layers(converted)),
        last_map_size=larger,
        last_map_macs=None if larger is None else count_macs(converted, larger).macs,
        places=_places((original, converted), recordings, counts, made),
    )


def _places(
    models: tuple[nn.Module, nn.Module],
    recordings: tuple[Recording, Recording],
    counts: tuple[MacCount, MacCount],
    plan: PlanData | None,
) -> tuple[Place, ...]:
    if plan is None or any(count.macs is None for count in counts):
        return ()
    sides = [
        Side(model, recording, costs(model, recording, count.own))
        for model, recording, count in zip(models, recordings, counts, strict=True)
    ]
    return places(sides[0], sides[1], plan)


def _larger(converted: Recording, stages: tuple[tuple[str, StageMap], ...]) -> Size | None:
    """The image size at which the converted network has the original's last map, where its own is smaller."""
    path, last = min(stages, key=lambda stage: stage[1].before, default=("", None))
    if last is None or last.after == last.before:
        return None
    return size_with_last_map(converted, path, last.before)


def stage_maps(original: Recording, converted: Recording) -> tuple[StageMap, ...]:
    """Distinct (before, after) sizes written by the original's strided operations, in order."""
    return tuple(dict.fromkeys(stage for _, stage in _stages(original, converted)))


def _stages(original: Recording, converted: Recording) -> Iterator[tuple[str, StageMap]]:
    """What the original's strided operations write, before and after, and the path of the module that calls each.

    The converted network has that module too.
    """
    for op in original.ops:
        if op.kind not in STRIDED or not op.inputs or not op.outputs:
            continue
        read, written = (original.values[index].shape for index in (op.inputs[0], op.outputs[0]))
        if len(read) != 4 or len(written) != 4 or not _shrinks(read, written):
            continue
        path = original.calls[op.call].path if op.call >= 0 else ""
        before, after = _written(original, path), _written(converted, path)
        if before is not None and after is not None and before == written[-2:]:
            yield path, StageMap(before, after)


def _shrinks(read: Size, written: Size) -> bool:
    return any(1 < after < before for before, after in zip(read[2:], written[2:], strict=True))


def _written(recording: Recording, path: str) -> Size | None:
    """(H, W) of what the first call of a module returned, if it returned one map."""
    calls = recording.calls_of.get(path, [])
    if not calls or len(calls[0].outputs) != 1:
        return None
    shape = recording.values[calls[0].outputs[0]].shape
    return shape[-2:] if len(shape) == 4 else None


def _place_row(place: Place) -> tuple[str, ...]:
    changes = (_signed(place.maps.macs), _signed(place.layers.macs))
    params = (place.after - place.before).params
    return (
        place.name or "elsewhere",
        _short(place.before.macs),
        *changes,
        _short(place.after.macs),
        f"{params:+,}" if params else "-",
    )


def _signed(value: int) -> str:
    """A change, with a sign; "-" where there is none."""
    if not value:
        return "-"
    return f"{value / 1e9:+.3f}G" if abs(value) >= 1e9 else f"{value / 1e6:+.2f}M"


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _short(value: int | None) -> str:
    if value is None:
        return "?"
    return f"{value / 1e9:.2f}G" if value >= 1e9 else f"{value / 1e6:.1f}M"


def _size(size: Size) -> str:
    return str(size[0]) if len(set(size)) == 1 else size_text(size)


def _side(side: int | None) -> str:
    return "unknown" if side is None else f"{plural(side, 'pixel')} a side"


def _line(pair: Pair, form: Any) -> str:
    change = "" if pair.change is None else f" ({pair.change:+.2%})"
    return f"{form(pair.original)} -> {form(pair.converted)}{change}"
