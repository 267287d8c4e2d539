"""Functions that a model holds: after it has been copied, those of the copy read the copy.

`copy.deepcopy` copies modules and tensors and leaves functions as they are, so that a loss or a hook which closes over
a layer would go on to read the original's, and send gradients there.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


class Copies:
    """What stands for what in a copy.

    Args:
        copied: the copies of modules, parameters and buffers, by the `id` of the original.
    """

    def __init__(self, copied: dict[int, Any]) -> None:
        self._made = dict(copied)
        self._kept: list[Any] = []  # so that no id is given out anew

    def of(self, value: Any) -> Any:
        """The copy of a module or tensor; a function, `partial` or plain container with copies for what it holds.

        What leads to nothing that was copied is returned as it is.
        """
        if id(value) in self._made:
            return self._made[id(value)]
        return self._rebuilt(value) if self._leads_to_copies(value, set()) else value

    def _leads_to_copies(self, value: Any, seen: set[int]) -> bool:
        if isinstance(value, (nn.Module, torch.Tensor)):
            return id(value) in self._made
        if id(value) in seen:
            return False
        seen.add(id(value))
        return any(self._leads_to_copies(part, seen) for part in _parts(value))

    def _rebuilt(self, value: Any) -> Any:
        self._kept.append(value)
        made: Any
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.CellType):
            made = self._made[id(value)] = types.CellType()
            made.cell_contents = self.of(value.cell_contents)
        elif isinstance(value, types.MethodType):
            made = types.MethodType(self.of(value.__func__), value.__self__)
        elif isinstance(value, functools.partial):
            made = functools.partial(self.of(value.func), *self.of(value.args), **self.of(value.keywords))
        elif type(value) is tuple:
            made = tuple(self.of(item) for item in value)
        elif type(value) is list:
            made = self._made[id(value)] = []
            made.extend(self.of(item) for item in value)
        else:
            made = self._made[id(value)] = type(value)()
            made.update((key, self.of(item)) for key, item in value.items())
        return made

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        cells = tuple(self.of(cell) for cell in function.__closure__ or ())
        if id(function) in self._made:  # it closes over itself
            made: types.FunctionType = self._made[id(function)]
            return made
        made = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
        self._made[id(function)] = made
        made.__defaults__, made.__kwdefaults__ = self.of(function.__defaults__), self.of(function.__kwdefaults__)
        made.__dict__.update(function.__dict__)
        made.__doc__, made.__qualname__, made.__module__ = function.__doc__, function.__qualname__, function.__module__
        return made


def _parts(value: Any) -> tuple[Any, ...]:
    """What a function or container holds, for those that `Copies` rebuilds."""
    if isinstance(value, types.FunctionType):
        return (*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__)
    if isinstance(value, types.CellType):
        try:
            return (value.cell_contents,)
        except ValueError:  # not filled yet
            return ()
    if isinstance(value, types.MethodType):
        return (value.__func__,)
    if type(value) is functools.partial:
        return (value.func, value.args, value.keywords)
    if type(value) in (list, tuple):
        return tuple(value)
    return tuple(value.values()) if type(value) in (dict, OrderedDict) else ()
