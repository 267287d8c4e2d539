"""The smallest image that a network takes."""

from __future__ import annotations

import functools

import torch

from padfree.record.inputs import example_inputs
from padfree.record.quick import QuickMeta
from padfree.record.recording import Recording

# Networks that cut maps into windows take multiples only, so bisection may pass by a lesser side.
_FACTORS = (7, 8)


def minimum_input(original: Recording, converted: Recording) -> int | None:
    """The least square side both networks take; see `Comparison.minimum_input`.

    Tried on the recordings' own copies, which hold meta tensors, so nothing is computed.
    """
    if not (original.meta and converted.meta):
        return None
    top = max(converted.input_size[1:])
    if not _runs(converted, top):
        return None
    side = _least(converted, top)
    if _runs(original, side):
        return side
    return _least(converted, top, original) if _runs(original, top) else None


def _least(recording: Recording, top: int, *others: Recording) -> int:
    """The least side that these recordings' models take; `top` is known to be one."""

    @functools.cache
    def works(side: int) -> bool:
        return all(_runs(each, side) for each in (recording, *others))

    low, high = 0, top  # low fails, high works
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    lesser = (side for side in range(1, high) if any(side % factor == 0 for factor in _FACTORS))
    side = next((side for side in lesser if works(side)), high)
    while side > 1 and works(side - 1):
        side -= 1
    return side


def _runs(recording: Recording, side: int) -> bool:
    channels = recording.input_size[:-2]
    kind = len(recording.example), type(recording.example[0])
    try:
        for example in example_inputs(recording.model, (*channels, side, side), meta=True):
            if (len(example), type(example[0])) == kind:
                with torch.no_grad(), QuickMeta():  # type: ignore[no-untyped-call]
                    recording.model(*example)
                return True
    except Exception:  # any failure means that this size is not taken
        return False
    return False
