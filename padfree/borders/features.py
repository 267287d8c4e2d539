"""Which maps of a network are measured, and their values on real images."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from padfree.borders.seen import Unknown
from padfree.borders.walk import Walk
from padfree.record.recording import Recording
from padfree.record.trees import tensors


@dataclass(frozen=True)
class Place:
    """A map that a module call returns.

    Attributes:
        path: the module; turn: which of its calls.
        size: (H, W) for the frame. pace: pixels of the image from one position to the next.
    """

    path: str
    turn: int
    size: tuple[int, int]
    pace: tuple[float, float]

    @property
    def name(self) -> str:
        """The path, with "#2" and so on from the second call."""
        return self.path + (f"#{self.turn + 1}" if self.turn else "") or "(model)"


Features = tuple[Any, dict[Place, Tensor]]


def places(recording: Recording) -> tuple[tuple[Place, ...], tuple[str, ...]]:
    """The maps to measure in order, and notes on those that cannot be.

    Of what one convolution, pool or sum makes, its norm and activation included, only the last that a module returns.
    """
    walk, turns = Walk(recording), Counter[str]()
    last: dict[int, tuple[int, Place]] = {}
    notes: dict[str, None] = {}
    kept = []  # so that no identity is used twice
    for call in recording.calls:
        turn = turns[call.path]
        turns[call.path] += 1
        shape = recording.values[call.outputs[0]].shape if len(call.outputs) == 1 else ()
        if len(shape) != 4 or shape[2:] == (1, 1) or call.outputs[0] in recording.inputs:
            continue
        field = walk.map_of(call.outputs[0])
        if isinstance(field, Unknown):
            notes[f"not measured past {field.reason}"] = None
            continue
        kept.append(field)
        end = call.ops.stop
        if id(field) not in last or end >= last[id(field)][0]:
            last[id(field)] = (end, Place(call.path, turn, (shape[2], shape[3]), field.pace))
    in_order = sorted(last.values(), key=lambda pair: pair[0])
    found: dict[Place, None] = {}
    for _, place in in_order:
        if place.path or not found:  # the model's own output is its last module's
            found[place] = None
    return tuple(found), tuple(notes)


def stride_of(found: Sequence[Place]) -> int:
    """Pixels by which an image must move for all maps to move by whole positions."""
    paces = [round(side) for place in found for side in place.pace if side >= 1 and side == round(side)]
    return math.lcm(*paces) if paces else 1


def run(model: nn.Module, batch: Tensor, found: Sequence[Place], around: int) -> Features:
    """What a model returns for a batch, and its maps: the part that lies `around` pixels from every side."""
    wanted = {(place.path, place.turn): place for place in found}
    features: dict[Place, Tensor] = {}
    turns: Counter[str] = Counter()
    handles = []

    def keep(path: str, result: Any) -> None:
        place = wanted.get((path, turns[path]))
        turns[path] += 1
        made = tensors((result,))
        if place is None or len(made) != 1 or made[0].dim() != 4:
            return
        first = [around / pace for pace in place.pace]
        sides = [round(2 * at) + side for at, side in zip(first, place.size, strict=True)]
        if all(at == round(at) for at in first) and list(made[0].shape[2:]) == sides:
            (top, left), (height, width) = map(round, first), place.size
            features[place] = made[0][..., top : top + height, left : left + width].clone()

    for path, module in model.named_modules():
        if any(place.path == path for place in found):
            handles.append(module.register_forward_hook(lambda m, a, out, path=path: keep(path, out)))
    try:
        return model(batch), features
    finally:
        for handle in handles:
            handle.remove()
