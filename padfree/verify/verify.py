"""Whether a converted copy still is the network it was.

It runs, in train mode too where a forward asks for the mode; it keeps its keys, the number of its outputs, their
batch and channels, and the image's sides where they had those; it calls the same modules and runs the same functional
layers in the same order; it pads, crops, resizes, stretches and rolls no more than before; and what it keeps for a map
of one size (a table of positions, indices) still meets a map of that size. `padfree.verify.real` runs it for real.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from padfree.analysis.kinds import COUNTING
from padfree.errors import Refusal
from padfree.record.copies import full_copy, in_mode
from padfree.record.recording import ForwardFailedError, Recording, path_of, record, shape_at
from padfree.record.trees import repeat_batch
from padfree.rewrite.effects import asks_for_mode
from padfree.rewrite.forward import acting_class
from padfree.rewrite.operations import Operation, Resize, SetAttributes, Substitute
from padfree.verify.calls import Changed, check_calls
from padfree.verify.places import check_places
from padfree.verify.resizing import check_broadcasting, check_resizing, check_sides


@dataclass(frozen=True)
class Original:
    """The model as it was, in eval mode and, where a forward asks for the mode, in train mode."""

    recording: Recording

    @functools.cached_property
    def trained(self) -> Recording | ForwardFailedError | None:
        """Recorded in train mode; why it does not run (it wants labels, say); None where no forward asks."""
        model = self.recording.model
        if not any(asks_for_mode(type(module)) for module in model.modules()):
            return None
        try:
            return _in_training(full_copy(model), self.recording)
        except ForwardFailedError as error:
            return error


def verify(
    original: Original, converted: nn.Module, operations: Iterable[Operation], *, allow_resize: bool = False
) -> Recording:
    """Run the converted copy on the recording's input size and compare.

    Args:
        original: the model as it was.
        converted: a copy of `original.recording.model` that the operations were carried out on.
        operations: what was done to it.
        allow_resize: accept new pads, crops, interpolations and rolls, and smaller returned maps.

    Returns:
        the recording of the converted copy.

    Raises:
        Refusal: what differs, with the sizes.
    """
    operations = tuple(operations)
    before, changed = original.recording, Changed.by(operations)
    _check_state(before.model, converted, operations)
    try:
        after = record(converted, like=before)
    except ForwardFailedError as error:
        raise Refusal(blame(before, error)) from error
    _check_outputs(before, after)
    _check_obeyed(after, {op.path: dict(op.values) for op in operations if isinstance(op, SetAttributes)})
    _compare(before, after, changed, allow_resize)
    if isinstance(original.trained, Recording):
        _check_training(original.trained, converted, after, changed, allow_resize)
    return after


def _compare(before: Recording, after: Recording, changed: Changed, allow_resize: bool) -> None:
    check_places(before, after)
    check_broadcasting(before, after)
    check_calls(before, after, changed)
    if not allow_resize:
        check_resizing(before, after, changed.rewritten, changed.place)
        check_sides(before, after)


def _check_outputs(before: Recording, after: Recording) -> None:
    """The number of outputs, their batch and channels."""
    shapes = [before.values[value].shape for value in before.outputs]
    after_shapes = [after.values[value].shape for value in after.outputs]
    kept = slice(1 if _counts(before) else 0, 2)
    if len(shapes) != len(after_shapes) or any(
        len(a) != len(b) or a[kept] != b[kept] for a, b in zip(shapes, after_shapes, strict=True)
    ):
        raise Refusal(f"the model's output changes from {shapes} to {after_shapes}")


def _in_training(model: nn.Module, like: Recording) -> Recording:
    """A copy recorded in train mode, on a batch of two."""
    with in_mode(model.modules(), True):
        return record(model, like=replace(like, example=repeat_batch(like.example)))


def _check_training(
    before: Recording, converted: nn.Module, evaluated: Recording, changed: Changed, allow_resize: bool
) -> None:
    """Branches that run in training only, such as auxiliary heads."""
    try:
        after = _in_training(converted, evaluated)
    except ForwardFailedError as error:
        raise Refusal(f"in train mode {blame(before, error)}") from error
    for path, module in converted.named_modules():
        kept = before.modules.get(path)
        different = (
            kept is None or acting_class(kept) is not acting_class(module) or _settings(kept) != _settings(module)
        )
        calls, more = (len(recording.calls_of.get(path, ())) for recording in (evaluated, after))
        if different and 0 < calls < more:
            raise Refusal(f"`{path}` is called {calls} times in eval mode and {more} times in train mode")
    if len(before.outputs) != len(after.outputs):
        raise Refusal(f"in train mode it returns {len(after.outputs)} tensors instead of {len(before.outputs)}")
    try:
        _compare(before, after, changed, allow_resize)
    except Refusal as refusal:
        raise Refusal(f"in train mode {refusal}") from refusal


def _settings(module: nn.Module) -> list[str]:
    values = [vars(module).get(name) for name in ("stride", "padding", "kernel_size")]
    return [repr(value) if isinstance(value, (int, str, tuple, list)) else "" for value in values]


def _counts(recording: Recording) -> bool:
    """Whether the length of an output may depend on pixel values: a detector returns as many boxes as it finds."""
    return not recording.meta and any(op.kind in COUNTING and op.inputs for op in recording.ops)


def _check_state(original: nn.Module, converted: nn.Module, operations: tuple[Operation, ...]) -> None:
    """The keys of the state dict, their order and shapes, but those of modules that gave their place to others."""
    resized = {op.path for op in operations if isinstance(op, Resize)}
    gone = {id(original.get_submodule(op.path)) for op in operations if isinstance(op, Substitute)}
    names = [(name, module) for name, module in original.named_modules(remove_duplicate=False)] if gone else []
    under = tuple(f"{name}." for name, module in names if id(module) in gone)
    before, after = (
        {  # extra state has no shape
            key: tuple(getattr(entry, "shape", ()))
            for key, entry in model.state_dict().items()
            if not key.startswith(under)
        }
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


def blame(original: Recording, error: ForwardFailedError) -> str:
    """One line: the module that stops the conversion, the sizes it was given before and now, what it said."""
    was = shape_at(original, error.path)
    now = str(error.shapes[0]) if error.shapes else "no tensor"
    where = f"`{error.path}`" if error.path else "the model's own forward"
    return f"{where} fails on {was}: {error}" if was == now else f"{where} takes {was} and would get {now}: {error}"
