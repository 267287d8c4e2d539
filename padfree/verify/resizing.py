"""Whether a converted copy pads, crops, stretches, rolls or spreads out maps that the original did not.

And whether it returns maps of the image's own sides where the original did.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from padfree.analysis.kinds import AFFINE, AVG_POOLS, COUNTING, MAX_POOLS, NONLINEAR, STATISTICS, plain_kind, strides
from padfree.errors import Refusal
from padfree.indices import ValueId
from padfree.record.recorder import Op
from padfree.record.recording import Recording, path_of, shape_at
from padfree.types import Returned

_ADAPTIVE = ("_adaptive_avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")
_ACCEPTS = "; Options(allow_resize=True) accepts that"

PADS = frozenset({"constant_pad_nd", "reflection_pad2d", "replication_pad2d"})
"""Operations that pad."""

RESAMPLING = ("upsample", "_upsample")
"""What the kinds of interpolations begin with."""

_RESIZING = PADS | {"roll", "grid_sampler_2d"}
CUTS = frozenset({"slice", "index_select", "index", "_unsafe_index", "gather", "as_strided"})
"""Operations that may take pixels off a map's sides."""

_INNER = (1, -1)  # start and end of a slice that takes the border off, as the rules write it


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
    statistics: set[ValueId] = set()  # one number a map, which is spread out wherever it is used
    for op in recording.ops:
        kind = plain_kind(op)
        told = kind in NONLINEAR | AFFINE and statistics.issuperset(op.inputs)
        if kind in STATISTICS or (told and op.inputs):
            statistics.update(op.outputs)
        if not statistics.isdisjoint(op.inputs):
            continue
        shapes = [recording.values[value].shape for value in op.inputs]
        if op.kind.rstrip("_") in AFFINE and len(shapes) > 1 and all(len(shape) == 4 for shape in shapes):
            alone = [shape[2:] == (1, 1) for shape in shapes]
            if any(alone) and not all(alone):
                found.append(((op.kind, path_of(recording, op)), shapes))
    return found


def check_resizing(
    before: Recording,
    after: Recording,
    rewritten: frozenset[str] = frozenset(),
    place: Callable[[str], str] = str,
) -> None:
    """Pads, interpolations, stretching pools, rolls and crops that the original did not make.

    Args:
        before: the model as it was.
        after: the converted copy.
        rewritten: paths whose forward was generated; a conversion may take the border off a map in those.
        place: from the path of a module of the copy to that of the module that did its work before.
    """
    had, has = _resizing(before), _resizing(after, place)
    for (kind, path), ops in has.items():
        if len(ops) > len(had.get((kind, path), ())):
            shape = [after.values[value].shape for value in (ops[0].inputs[0], ops[0].outputs[0])]
            was = shape_at(before, path)
            where = f"`{path}`" if path else "the model's own forward"
            raise Refusal(f"{where} would newly run {kind} ({shape[0]} to {shape[1]}; before: {was}){_ACCEPTS}")
    cut, cuts = _cuts(before, frozenset()), _cuts(after, rewritten, place)
    for path, now in cuts.items():
        were = cut.get(path, [])
        for index, (source, out) in enumerate(now):
            if len(now) <= len(were) and not _more(were[index], (source, out)):
                continue
            where = f"`{path}`" if path else "the model's own forward"
            raise Refusal(f"{where} would newly crop a map ({source} to {out}){_ACCEPTS}")


def _resizing(recording: Recording, place: Callable[[str], str] = str) -> dict[tuple[str, str], list[Op]]:
    found: dict[tuple[str, str], list[Op]] = {}
    counted = _counted(recording)
    for op in recording.ops:
        if _resizes(recording, op) and counted.isdisjoint(op.inputs):
            found.setdefault((op.kind, place(path_of(recording, op))), []).append(op)
    return found


def _counted(recording: Recording) -> set[ValueId]:
    """What is made of things found in an image, such as boxes, of which there may be more or fewer.

    They are found in features: behind the last convolution or pool that makes a map smaller.
    """
    found: set[ValueId] = set()
    last = max((op.index for op in recording.ops if _shrinks(op)), default=-1)
    for op in recording.ops[last + 1 :]:
        if (op.kind in COUNTING and op.inputs) or not found.isdisjoint(op.inputs):
            found.update(op.outputs)
    return found


def _shrinks(op: Op) -> bool:
    strided = op.kind in MAX_POOLS | AVG_POOLS or (op.kind == "convolution" and not op.args[0][6])
    return strided and max(strides(op)) > 1


def _resizes(recording: Recording, op: Op) -> bool:
    """Whether an operation makes a map of another size than it had, by padding, stretching or shifting it."""
    if not (op.inputs and op.outputs):
        return False
    source, out = (recording.values[value].shape[-2:] for value in (op.inputs[0], op.outputs[0]))
    if op.kind in _ADAPTIVE:
        return any(new > old for new, old in zip(out, source, strict=True))
    if op.kind.startswith(RESAMPLING):
        return source != out
    return op.kind in _RESIZING and not (op.kind == "constant_pad_nd" and not any(op.args[0][1]))


Cut = tuple[tuple[int, ...], tuple[int, ...]]


def _cuts(recording: Recording, rewritten: frozenset[str], place: Callable[[str], str] = str) -> dict[str, list[Cut]]:
    """By module path, the shapes before and after of each operation that takes pixels off a map's sides."""
    found: dict[str, list[Cut]] = {}
    counted = _counted(recording)
    for op in recording.ops:
        if op.kind not in CUTS or not (op.inputs and op.outputs) or not counted.isdisjoint(op.inputs):
            continue
        path = path_of(recording, op)
        if path in rewritten and op.kind == "slice" and op.args[0][2:] == _INNER:
            continue
        source, out = (recording.values[value].shape for value in (op.inputs[0], op.outputs[0]))
        shorter = any(new < old for new, old in zip(out[2:], source[2:], strict=False))
        if len(source) == len(out) and len(source) in (4, 5) and shorter:
            found.setdefault(place(path), []).append((source, out))
    return found


def _more(before: Cut, after: Cut) -> bool:
    """Whether more pixels go than went; of a smaller map the same part is fewer."""
    lost = [[old - new for old, new in zip(*cut, strict=True)] for cut in (before, after)]
    return any(now > was for was, now in zip(*lost, strict=False))


def returned(before: Recording, after: Recording | None = None) -> tuple[Returned, ...]:
    """The maps (and rows of places) that a model returns, before and after (None: nothing was done to it)."""
    after = before if after is None else after
    shapes = ([recording.values[value].shape for value in recording.outputs] for recording in (before, after))
    return tuple(Returned(name, *pair) for name, *pair in zip(before.names, *shapes, strict=True) if len(pair[0]) > 2)


def check_sides(before: Recording, after: Recording) -> None:
    """A returned map that has the image's own sides (or a multiple: super-resolution) must keep them."""
    images = {before.values[value].shape[-2:] for value in before.inputs if len(before.values[value].shape) > 2}
    for old, new in zip(before.outputs, after.outputs, strict=True):
        was, now = before.values[old].shape, after.values[new].shape
        for image in images if was != now else ():
            times = _multiple(was, image)
            if times:
                sides = "the image's own sides" if times == 1 else f"{times} times the image's sides"
                raise Refusal(
                    f"the model returns a map of {sides}, {_sides(was)}, and would return {_sides(now)}{_ACCEPTS}"
                )


def _multiple(shape: tuple[int, ...], image: tuple[int, ...]) -> int:
    """How many times the image's sides a map has; 0 for anything else."""
    if len(shape) >= 4 and all(side % own == 0 for side, own in zip(shape[-2:], image, strict=True)):
        times = {side // own for side, own in zip(shape[-2:], image, strict=True)}
        return times.pop() if len(times) == 1 else 0
    return int(len(shape) == 3 and shape[-1] == math.prod(image))


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[2:]))
