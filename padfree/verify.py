"""Whether a converted copy still is the network it was.

It runs, in train mode too where a forward asks for the mode; it keeps its keys, the number of its outputs, their
batch and channels; it pads, resizes, stretches and rolls no more than before; and what it keeps for a map of one size
(a table of positions, indices) still meets a map of that size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from padfree.errors import Refusal
from padfree.kinds import AFFINE
from padfree.record import ForwardFailedError, Recording, record
from padfree.recorder import Op, Ref, repeat_batch
from padfree.state import asks_for_mode, in_mode

_ADAPTIVE = ("_adaptive_avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")
_COUNTING = ("nonzero", "nonzero_numpy", "masked_select", "nms", "unique", "_unique2")
_RESIZING = ("constant_pad_nd", "reflection_pad2d", "replication_pad2d", "roll", "grid_sampler_2d")
_RESAMPLING = ("upsample", "_upsample")  # what an interpolation's kinds begin with


def verify(
    original: Recording,
    converted: nn.Module,
    *,
    allow_resize: bool = False,
    resized: Iterable[str] = (),
    given: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Run the converted copy on the recording's input size and compare.

    Args:
        original: recording of the model as it was.
        converted: a copy of `original.model` that the operations were carried out on.
        allow_resize: accept new pads, interpolations and rolls.
        resized: parameters that may have another shape.
        given: attributes that were set, by module path.

    Raises:
        Refusal: what differs, with the sizes.
    """
    _check_state(original.model, converted, set(resized))
    try:
        after = record(converted, like=original)
    except ForwardFailedError as error:
        raise Refusal(_blame(original, error)) from error
    before_shapes = [original.values[value].shape for value in original.outputs]
    after_shapes = [after.values[value].shape for value in after.outputs]
    kept = slice(1 if _counts(original) else 0, 2)
    if len(before_shapes) != len(after_shapes) or any(
        len(a) != len(b) or a[kept] != b[kept] for a, b in zip(before_shapes, after_shapes, strict=True)
    ):
        raise Refusal(f"the model's output changes from {before_shapes} to {after_shapes}")
    _check_obeyed(after, given or {})
    _check_places(original, after)
    _check_broadcasting(original, after)
    if not allow_resize:
        _check_resizing(original, after)
    if any(asks_for_mode(type(module)) for module in original.model.modules() if list(module.children())):
        _check_training(original, converted, after)


def _check_training(original: Recording, converted: nn.Module, after: Recording) -> None:
    """Branches that run in training only, such as auxiliary heads."""
    like = replace(original, example=repeat_batch(original.example))
    try:
        with in_mode(converted.modules(), True):
            trained = record(converted, like=like)
    except ForwardFailedError as error:
        try:
            with in_mode(original.model.modules(), True):
                record(original.model, like=like)
        except ForwardFailedError:  # it wants labels, say: nothing to compare with
            return
        raise Refusal(f"in train mode {_blame(original, error)}") from error
    for path, module in converted.named_modules():
        kept = original.modules.get(path)
        changed = kept is None or type(kept) is not type(module) or _settings(kept) != _settings(module)
        calls, more = (len(recording.calls_of.get(path, ())) for recording in (after, trained))
        if changed and 0 < calls < more:
            raise Refusal(f"`{path}` is called {calls} times in eval mode and {more} times in train mode")


def _settings(module: nn.Module) -> list[Any]:
    return [getattr(module, name, None) for name in ("stride", "padding", "kernel_size")]


def _counts(recording: Recording) -> bool:
    """Whether the length of an output may depend on pixel values: a detector returns as many boxes as it finds."""
    return not recording.meta and any(op.kind in _COUNTING and op.inputs for op in recording.ops)


def _check_state(original: nn.Module, converted: nn.Module, resized: set[str]) -> None:
    before, after = (
        {key: tuple(getattr(entry, "shape", ())) for key, entry in model.state_dict().items()}  # extra state has none
        for model in (original, converted)
    )
    if [key for key in after if key in before] != list(before):
        raise Refusal("the conversion would lose or reorder keys of the state dict")
    for key, shape in before.items():
        if after[key] != shape and key not in resized:
            raise Refusal(f"the conversion would change the shape of `{key}`")


def _check_obeyed(after: Recording, given: Mapping[str, Mapping[str, Any]]) -> None:
    """Convolutions run with the stride and padding they were given, not with numbers of their own."""
    for op in after.ops:
        path = _path(after, op) if op.kind == "convolution" else ""
        for name, position in (("stride", 3), ("padding", 4)):
            value, used = given.get(path, {}).get(name), tuple(op.args[0][position]) if path else ()
            if isinstance(value, tuple) and len(value) == len(used) and value != used:
                raise Refusal(f"`{path}` runs with {name} {used} whatever its attribute `{name}` says")


def _check_broadcasting(before: Recording, after: Recording) -> None:
    """A map that has become a single pixel fits every other, and a sum of two maps would not be one any more."""
    had, has = (Counter(kind for kind, _ in _broadcasts(recording)) for recording in (before, after))
    for where, shapes in _broadcasts(after):
        if has[where] > had[where]:
            sides = f"{shapes[0][2:]} and {shapes[1][2:]}"
            raise Refusal(f"`{where[1]}` would newly combine maps of {sides} pixels, one of them spread out")


def _broadcasts(recording: Recording) -> list[tuple[tuple[str, str], list[tuple[int, ...]]]]:
    """(kind, path) and shapes of the operations on several maps of which some are single pixels."""
    found = []
    for op in recording.ops:
        shapes = [recording.values[value].shape for value in op.inputs]
        if op.kind.rstrip("_") in AFFINE and len(shapes) > 1 and all(len(shape) == 4 for shape in shapes):
            alone = [shape[2:] == (1, 1) for shape in shapes]
            if any(alone) and not all(alone):
                found.append(((op.kind, _path(recording, op)), shapes))
    return found


def _check_resizing(before: Recording, after: Recording) -> None:
    had, has = _resizing(before), _resizing(after)
    for (kind, path), count in has.items():
        if count > had[(kind, path)]:
            op = next(o for o in after.ops if _resizes(after, o) and (o.kind, _path(after, o)) == (kind, path))
            shape = [after.values[value].shape for value in (op.inputs[0], op.outputs[0])]
            was = _shape_at(before, path)
            raise Refusal(
                f"`{path}` would newly run {kind} ({shape[0]} to {shape[1]}; before: {was}); "
                "Options(allow_resize=True) accepts that"
            )


def _resizing(recording: Recording) -> Counter[tuple[str, str]]:
    return Counter((op.kind, _path(recording, op)) for op in recording.ops if _resizes(recording, op))


def _check_places(before: Recording, after: Recording) -> None:
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
            found.setdefault((op.kind, _path(recording, op), reading.table), []).append(reading)
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


def _resizes(recording: Recording, op: Op) -> bool:
    """Whether an operation makes a map of another size than it had, by padding, stretching or shifting it."""
    if not (op.inputs and op.outputs):
        return False
    source, out = (recording.values[value].shape[-2:] for value in (op.inputs[0], op.outputs[0]))
    if op.kind in _ADAPTIVE:
        return any(new > old for new, old in zip(out, source, strict=True))
    if op.kind.startswith(_RESAMPLING):
        return source != out
    return op.kind in _RESIZING and not (op.kind == "constant_pad_nd" and not any(op.args[0][1]))


def _path(recording: Recording, op: Op) -> str:
    return recording.calls[op.call].path if op.call >= 0 else ""


def _shape_at(recording: Recording, path: str) -> str:
    calls = recording.calls_of.get(path, [])
    shapes = [recording.values[value].shape for call in calls[:1] for value in call.inputs[:1]]
    return str(shapes[0]) if shapes else "not called"


def _blame(original: Recording, error: ForwardFailedError) -> str:
    """One line: the module that stops the conversion, the sizes it was given before and now, what it said."""
    was = _shape_at(original, error.path)
    now = str(error.shapes[0]) if error.shapes else "no tensor"
    where = f"`{error.path}`" if error.path else "the model's own forward"
    return f"{where} fails on {was}: {error}" if was == now else f"{where} takes {was} and would get {now}: {error}"
