"""What a network says of itself in `pretrained_cfg` and `default_cfg`, made true of its converted copy.

timm computes with it: `apply_test_time_pool` pools windows of `pool_size`, `resolve_data_config` builds images of
`input_size`. `feature_info` keeps its reductions: strides are not changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import nn

from padfree.record.recording import Recording, record
from padfree.rewrite.operations import Describe

_NAMES = ("pretrained_cfg", "default_cfg")
_SIZES = ("input_size", "min_input_size")
_Size = tuple[int, ...]


def descriptions(before: Recording, converted: nn.Module) -> tuple[Describe, ...]:
    """The fields that no longer hold, as operations that set them.

    `pool_size` becomes that of the same map of the converted network at the description's own `input_size`; a size of
    an image that the converted network does not take becomes the one that it was converted at.

    Args:
        before: the recording of the model as it was.
        converted: a copy of its model that the operations of a conversion were carried out on.
    """
    found = []
    names = tuple(name for name in _NAMES if _is_description(getattr(converted, name, None)))
    for name in names:
        same = tuple(other for other in names if getattr(converted, other) is getattr(converted, name))
        values = _values(before, converted, getattr(converted, name)) if same[0] == name else {}
        if values:
            found.append(Describe("", same, tuple(values.items())))
    return tuple(found)


def _is_description(held: Any) -> bool:
    return isinstance(held, MutableMapping) or (dataclasses.is_dataclass(held) and not isinstance(held, type))


def _get(held: Any, name: str) -> Any:
    return held.get(name) if isinstance(held, Mapping) else getattr(held, name, None)


def _values(before: Recording, converted: nn.Module, held: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in _SIZES:
        size = _get(held, name)
        if _is_size(size, 3) and tuple(size) != before.input_size:
            fits = size[0] == before.input_size[0]  # else it was built for images of other channels
            if fits and _at(converted, size) is None and _at(before.model, size) is not None:
                values[name] = type(size)(before.input_size)
    size, pool = values.get("input_size", _get(held, "input_size")), _get(held, "pool_size")
    if _is_size(size, 3) and _is_size(pool, 2):
        size = (before.input_size[0], *size[1:])
        was = before if size == before.input_size else _at(before.model, size)
        now = _at(converted, size)
        new = None if was is None or now is None else _same_map(was, now, tuple(pool))
        if new is not None and new != tuple(pool):
            values["pool_size"] = type(pool)(new)
    return values


def _is_size(size: Any, length: int) -> bool:
    return type(size) in (tuple, list) and len(size) == length and all(type(side) is int and side > 0 for side in size)


def _at(model: nn.Module, size: Any) -> Recording | None:
    """One forward at a size, weightless; None where it does not run."""
    try:
        return record(model, tuple(size))
    except Exception:  # any failure means that this size is not taken
        return None


def _same_map(was: Recording, now: Recording, pool: _Size) -> _Size | None:
    """The sides, after the conversion, of the last map that had these sides.

    Nothing is converted behind it, so the two recordings count alike from the end.
    """
    for old, new in zip(_maps(was), _maps(now), strict=False):
        for sides in (slice(2, 4), slice(1, 3)):  # channels first, or last
            if old[sides] == pool:
                return new[sides]
    return None


def _maps(recording: Recording) -> list[_Size]:
    """Shapes of what the forward makes of its input, four axes each, the last first."""
    made = (recording.values[out] for op in reversed(recording.ops) if op.inputs for out in op.outputs)
    return [value.shape for value in made if len(value.shape) == 4]
