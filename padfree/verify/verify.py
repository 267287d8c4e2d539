"""Whether a converted copy still is the network it was.

It runs, in train mode too where a forward asks for the mode; it keeps its keys, the number of its outputs, their
batch and channels; it pads, resizes, stretches and rolls no more than before; and what it keeps for a map of one size
(a table of positions, indices) still meets a map of that size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from padfree.errors import Refusal
from padfree.record.copies import in_mode
from padfree.record.recording import ForwardFailedError, Recording, path_of, record, shape_at
from padfree.record.trees import repeat_batch
from padfree.rewrite.effects import asks_for_mode
from padfree.verify.places import check_places
from padfree.verify.resizing import check_broadcasting, check_resizing

_COUNTING = ("nonzero", "nonzero_numpy", "masked_select", "nms", "unique", "_unique2")


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
    check_places(original, after)
    check_broadcasting(original, after)
    if not allow_resize:
        check_resizing(original, after)
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


def _settings(module: nn.Module) -> list[str]:
    values = [vars(module).get(name) for name in ("stride", "padding", "kernel_size")]
    return [repr(value) if isinstance(value, (int, str, tuple, list)) else "" for value in values]


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
        path = path_of(after, op) if op.kind == "convolution" else ""
        for name, position in (("stride", 3), ("padding", 4)):
            value, used = given.get(path, {}).get(name), tuple(op.args[0][position]) if path else ()
            if isinstance(value, tuple) and len(value) == len(used) and value != used:
                raise Refusal(f"`{path}` runs with {name} {used} whatever its attribute `{name}` says")


def _blame(original: Recording, error: ForwardFailedError) -> str:
    """One line: the module that stops the conversion, the sizes it was given before and now, what it said."""
    was = shape_at(original, error.path)
    now = str(error.shapes[0]) if error.shapes else "no tensor"
    where = f"`{error.path}`" if error.path else "the model's own forward"
    return f"{where} fails on {was}: {error}" if was == now else f"{where} takes {was} and would get {now}: {error}"
