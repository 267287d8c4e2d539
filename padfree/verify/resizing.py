"""Whether a converted copy pads, stretches, rolls or spreads out maps that the original did not."""

from __future__ import annotations

from collections import Counter

from padfree.analysis.kinds import AFFINE
from padfree.errors import Refusal
from padfree.record.recorder import Op
from padfree.record.recording import Recording, path_of, shape_at

_ADAPTIVE = ("_adaptive_avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")


_RESIZING = ("constant_pad_nd", "reflection_pad2d", "replication_pad2d", "roll", "grid_sampler_2d")


_RESAMPLING = ("upsample", "_upsample")  # what an interpolation's kinds begin with


def check_broadcasting(before: Recording, after: Recording) -> None:
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
                found.append(((op.kind, path_of(recording, op)), shapes))
    return found


def check_resizing(before: Recording, after: Recording) -> None:
    """Pads, interpolations, stretching pools and rolls that the original did not make."""
    had, has = _resizing(before), _resizing(after)
    for (kind, path), count in has.items():
        if count > had[(kind, path)]:
            op = next(o for o in after.ops if _resizes(after, o) and (o.kind, path_of(after, o)) == (kind, path))
            shape = [after.values[value].shape for value in (op.inputs[0], op.outputs[0])]
            was = shape_at(before, path)
            raise Refusal(
                f"`{path}` would newly run {kind} ({shape[0]} to {shape[1]}; before: {was}); "
                "Options(allow_resize=True) accepts that"
            )


def _resizing(recording: Recording) -> Counter[tuple[str, str]]:
    return Counter((op.kind, path_of(recording, op)) for op in recording.ops if _resizes(recording, op))


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
