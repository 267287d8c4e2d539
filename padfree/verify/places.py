"""Whether tables and indices that a model keeps still meet maps of the size they were made for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from padfree.errors import Refusal
from padfree.record.recorder import Op
from padfree.record.recording import Recording, path_of
from padfree.record.trees import Ref


def check_places(before: Recording, after: Recording) -> None:
    """Tables and indices that a model keeps mean places of a map: of another map they would mean others."""
    sides = {side for value in before.values if value.live and len(value.shape) == 4 for side in value.shape[2:]}
    were, are = _readings(before), _readings(after)
    for place, now in are.items():
        whole = [replace(reading, length=reading.of[0]) for reading in now if not reading.index]  # no operation cuts it
        for old, new in zip(were.get(place, whole), now, strict=False):
            if old.length == new.length or old.of != new.of or (old.length in sides and not new.index):
                continue
            what = f"by {new.of} indices of its own a map of" if new.index else "from a table of its own"
            where = f"`{place[1]}`" if place[1] else "the model's own forward"
            raise Refusal(f"{where} reads {what} {old.length} places, and there would be {new.length}")
    _check_operators(before, after)


def _check_operators(before: Recording, after: Recording) -> None:
    """Operators of other libraries that read a table of a map's size beside the map, and may compare nothing."""
    were: dict[tuple[str, str, str], list[tuple[int, ...]]] = {}
    for place, shape, _ in _beside(before):
        were.setdefault(place, []).append(shape)
    for place, shape, table in _beside(after):
        old = were[place].pop(0) if were.get(place) else shape
        if old[2:] == table[-2:] != shape[2:]:
            where = f"`{place[1]}`" if place[1] else "the model's own forward"
            raise Refusal(
                f"in {where} {place[0]} reads a table of its own of {table} beside a map that would be {shape}"
            )


def _beside(recording: Recording) -> Iterator[tuple[tuple[str, str, str], tuple[int, ...], tuple[int, ...]]]:
    """(kind, module, table) with the shapes of map and table, of each operator of another library that reads both."""
    for op in recording.ops:
        read = [recording.values[arg.value] for arg in op.args[0] if isinstance(arg, Ref)] if op.foreign else []
        maps = [value.shape for value in read if value.live and len(value.shape) == 4]
        for table in read if maps else ():
            if table.name and not table.live and len(table.shape) > 1:
                yield (op.kind, path_of(recording, op), table.name), maps[0], table.shape


@dataclass(frozen=True)
class _Reading:
    """Rows read from a table, `of` all of them; or a map's rows that kept indices, of shape `of`, pick from."""

    table: str
    index: bool
    length: int
    of: tuple[int, ...]


def _readings(recording: Recording) -> dict[tuple[str, str, str], list[_Reading]]:
    """By kind of operation, module and table."""
    found: dict[tuple[str, str, str], list[_Reading]] = {}
    for op in recording.ops:
        reading = _reading(recording, op)
        if reading is not None:
            found.setdefault((op.kind, path_of(recording, op), reading.table), []).append(reading)
    return found


def _reading(recording: Recording, op: Op) -> _Reading | None:
    args = op.args[0]
    if not args or not isinstance(args[0], Ref):
        return None
    data = recording.values[args[0].value]
    if op.kind == "slice" and data.name and not data.live:
        axis = args[1] if len(args) > 1 else 0
        return _Reading(data.name, False, recording.values[op.outputs[0]].shape[axis], (data.shape[axis],))
    if op.kind == "embedding" and len(args) > 1 and not recording.values[args[1].value].live:
        return _Reading(data.name, False, math.prod(recording.values[args[1].value].shape), data.shape[:1])
    if not data.live:
        return None
    if op.kind in ("index_select", "gather"):
        picked = [(args[1], args[2])]
    elif op.kind in ("index", "_unsafe_index"):
        picked = [(axis, ref) for axis, ref in enumerate(args[1]) if isinstance(ref, Ref)]
    else:
        return None
    for axis, ref in picked:
        indices = recording.values[ref.value]
        if not indices.live:
            return _Reading("", True, data.shape[axis], indices.shape)
    return None
