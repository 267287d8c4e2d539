"""Whether a converted copy still is the network it was: it runs, keeps its keys and its outputs' shapes,
and pads, resizes and rolls no more than before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from padfree.errors import Refusal
from padfree.record import ForwardFailedError, Recording, record
from padfree.recorder import Op

_COUNTING = ("nonzero", "nonzero_numpy", "masked_select", "nms", "unique", "_unique2")
_RESIZING = ("constant_pad_nd", "reflection_pad2d", "replication_pad2d", "roll", "grid_sampler_2d")


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
    if not allow_resize:
        _check_resizing(original, after)


def _counts(recording: Recording) -> bool:
    """Whether the length of an output may depend on pixel values: a detector returns as many boxes as it finds."""
    return not recording.meta and any(op.kind in _COUNTING and op.inputs for op in recording.ops)


def _check_state(original: nn.Module, converted: nn.Module, resized: set[str]) -> None:
    before = {key: tuple(tensor.shape) for key, tensor in original.state_dict().items()}
    after = {key: tuple(tensor.shape) for key, tensor in converted.state_dict().items()}
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


def _check_resizing(before: Recording, after: Recording) -> None:
    had, has = _resizing(before), _resizing(after)
    for (kind, path), count in has.items():
        if count > had[(kind, path)]:
            op = next(o for o in after.ops if _resizes(o) and (o.kind, _path(after, o)) == (kind, path))
            shape = [after.values[value].shape for value in (op.inputs[0], op.outputs[0])]
            was = _shape_at(before, path)
            raise Refusal(
                f"`{path}` would newly run {kind} ({shape[0]} to {shape[1]}; before: {was}); "
                "Options(allow_resize=True) accepts that"
            )


def _resizing(recording: Recording) -> Counter[tuple[str, str]]:
    return Counter((op.kind, _path(recording, op)) for op in recording.ops if _resizes(op))


def _resizes(op: Op) -> bool:
    if not op.inputs or not (op.kind in _RESIZING or op.kind.startswith("upsample")):
        return False
    return not (op.kind == "constant_pad_nd" and not any(op.args[0][1]))


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
