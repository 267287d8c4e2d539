"""Values that compare by themselves, and text that reads them again where they are keys."""

from __future__ import annotations

import enum
import functools
import math
import numbers
import sys
import types
from typing import Any

import torch

from padfree.rewrite.asked import class_text

FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
_LEAVES = (
    bool, int, float, str, bytes, type(None), enum.Enum, range, numbers.Number,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
_KEYS = (bool, int, float, str, bytes, type(None))


def is_plain(value: Any) -> bool:
    """Whether a value compares by itself: a number, a string, a slice, ..."""
    if isinstance(value, slice):
        return all(map(is_plain, (value.start, value.stop, value.step)))
    return isinstance(value, _LEAVES) or _is_number_of_numpy(value)


def is_item(value: Any) -> bool:
    """Whether it is plain, or a tuple of such."""
    return all(map(is_item, value)) if isinstance(value, (tuple, frozenset)) else is_plain(value)


def _is_number_of_numpy(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.number, numpy.bool_, numpy.str_))


def key_text(key: Any) -> str | None:
    """Python text of a key; "" where it is plain and has none, None for other keys."""
    if isinstance(key, enum.Enum):
        kind = class_text(type(key))
        return f"{kind}[{key.name!r}]" if kind else ""
    if type(key) is tuple:
        parts = [key_text(part) for part in key]
        if None in parts:
            return None
        written = [part for part in parts if part]
        return "" if len(written) < len(parts) else f"({''.join(f'{part}, ' for part in written)})"
    if type(key) is float and not math.isfinite(key):
        return ""
    return repr(key) if type(key) in _KEYS else None
