"""Forwards that a class wrote itself: which names their code reads, and which functions of torch's they call."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["Calls", "names_no_more"]

_LIBRARY = (torch, F, nn)
_OTHER_EFFECTS = ("MAKE_FUNCTION", "IMPORT_NAME", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_SUBSCR", "YIELD_VALUE")


@functools.lru_cache(maxsize=512)
def names_no_more(
    forward: Any,
    attributes: frozenset[str],
    *,
    functions: tuple[Callable[..., Any], ...] = (),
    builtins: tuple[str, ...] = (),
    written: tuple[str, ...] = (),
) -> bool:
    """Whether a function's code reads and writes no more than this.

    Args:
        forward: the function.
        attributes: names of the attributes that it may read.
        functions: what may lie under global names, beside torch, `torch.nn` and `torch.nn.functional`.
        builtins: names of Python's that it may read.
        written: names of the attributes that it may set.
    """
    if not isinstance(forward, types.FunctionType) or forward.__code__.co_freevars not in ((), ("__class__",)):
        return False
    for step in dis.get_instructions(forward):
        name, value = step.opname, step.argval
        if name in ("LOAD_GLOBAL", "LOAD_NAME"):
            found = forward.__globals__.get(value, ...)
            if not (any(found is known for known in (*_LIBRARY, *functions)) or (found is ... and value in builtins)):
                return False
        elif name in ("STORE_ATTR", "DELETE_ATTR"):
            if value not in written:
                return False
        elif name in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            if value not in attributes:
                return False
        elif name in _OTHER_EFFECTS:
            return False
    return True


class Calls(TorchFunctionMode):
    """Keeps the functions of torch's that are called, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call and keep."""
        out = func(*args, **(kwargs or {}))
        self.seen.append((func, args, kwargs or {}, out))
        return out
