"""Plain state that a forward could write into unseen, and whether it did.

A generated forward repeats operations on tensors and nothing else. So whatever the names in a forward lead to is
looked at before and after it is traced: containers and objects among the module's attributes, the attributes of its
children, the globals and closures of its class's functions, its class's own attributes.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

SIMPLE = (bool, int, float, str, type(None))
_CONTAINERS = (list, dict, set, deque)
_WITHOUT = (torch.Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType,
            types.MethodType, functools.partial, logging.Logger)  # fmt: skip
_PLAIN = frozenset(nn.Module().__dict__)
_UNWATCHED = _PLAIN - {"training", "_parameters", "_buffers", "_modules"}  # hooks and the like
_TRACERS = "_tensor_constant"  # what torch.fx calls the tensors that it finds in a forward
_LARGEST = 1 << 20  # bytes of an array that are looked at


class _Mark(str):
    """A leaf of a snapshot that compares by what it says."""


class Watch:
    """What a module's own forward could write into, as it is now.

    Args:
        module: its children and class are watched.
        attributes: the `__dict__` of the stand-in for it whose forward will run.
    """

    def __init__(self, module: nn.Module, attributes: dict[str, Any]) -> None:
        self._kind = type(module)
        self._own = attributes
        self._outside = {name: value for name, value in _named(self._kind) if has_state(value)}
        self._objects = self._look()
        self._numbers = _Numbers([self._kind])
        self._children = {path: child for path, child in module.named_modules() if path}
        self._kept = {path: dict(child.__dict__) for path, child in self._children.items()}
        self._attributes = {path: _attributes(child) for path, child in self._children.items()}
        self._class = _class_attributes(self._kind)

    def changed(self) -> list[str]:
        """What was written into since, in words; children get their attributes back."""
        found = _differences(self._look(), self._objects)
        found += _differences(_class_attributes(self._kind), self._class)
        found += self._numbers.put_back()
        for path, child in self._children.items():
            if written := _differences(_attributes(child), self._attributes[path]):
                found += [f"its child's attribute `{path}.{name}`" for name in written]
                child.__dict__.clear()
                child.__dict__.update(self._kept[path])
        return found

    def _look(self) -> dict[str, Any]:
        own = {name: value for name, value in self._own.items() if not name.startswith(_TRACERS) and name not in _PLAIN}
        named = {f"its own attribute `{name}`": value for name, value in own.items()} | self._outside
        return {name: snapshot(value) for name, value in named.items()}


@contextmanager
def kept_globals(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Leave the containers that a model's classes name as they were: a cache must not keep what a look at it made.

    Yields:
        what makes them so at once, between a forward on meta tensors and one on real ones.
    """
    kinds = {type(module) for module in model.modules()}
    held = {id(value): value for kind in kinds for _, value in _named(kind) if type(value) in _CONTAINERS}
    before = {key: copy.copy(value) for key, value in held.items()}
    counted = {kind: {name: value for name, value in vars(kind).items() if type(value) in SIMPLE} for kind in kinds}
    numbers = _Numbers(kinds)

    def put_back() -> None:
        numbers.put_back()
        for key, value in held.items():
            if not alike(snapshot(value, 1), snapshot(before[key], 1)):
                value.clear()
                (value.update if isinstance(value, (dict, set)) else value.extend)(before[key])
        for kind, attributes in counted.items():
            for name, value in attributes.items():
                if not alike(vars(kind).get(name), value):
                    setattr(kind, name, value)

    try:
        yield put_back
    finally:
        put_back()


class _Numbers:
    """Globals and closed-over variables that hold a plain value, and such attributes of what they hold.

    Args:
        kinds: whose functions name them.
    """

    def __init__(self, kinds: Iterable[type]) -> None:
        self._kept: dict[tuple[int, str], tuple[str, Any, str, Any]] = {}
        for kind in kinds:
            for what, holder, name, value in _held(kind):
                if type(value) in SIMPLE:
                    self._kept[id(holder), name] = (what, holder, name, value)
                elif has_state(value) and isinstance(getattr(value, "__dict__", None), dict):
                    for inner, number in value.__dict__.items():
                        if type(number) in SIMPLE:
                            self._kept[id(value.__dict__), inner] = (what, value.__dict__, inner, number)

    def put_back(self) -> list[str]:
        """Names of those that have changed since; they are what they were again."""
        found = []
        for what, holder, name, value in self._kept.values():
            if not alike(_content(holder, name), value):
                found.append(what)
                if isinstance(holder, dict):
                    holder[name] = value
                else:
                    holder.cell_contents = value
        return found


def _content(holder: Any, name: str) -> Any:
    try:
        return holder.get(name, ...) if isinstance(holder, dict) else holder.cell_contents
    except ValueError:  # an empty cell
        return ...


def has_state(value: Any) -> bool:
    """Whether a forward could write into `value` unseen: a container, a generator, an object of a user's class."""
    if type(value) in SIMPLE:
        return False
    if isinstance(value, _CONTAINERS) or is_array(value):
        return True
    if isinstance(value, _WITHOUT) or type(value).__module__.partition(".")[0] == "torch":
        return False
    return isinstance(getattr(value, "__dict__", None), dict) or _generator(value) is not None or bool(_slots(value))


def snapshot(value: Any, depth: int = 3) -> Any:
    """Containers (and attributes of objects) as nested tuples; leaves are the objects themselves."""
    if type(value) is tuple and depth:
        return tuple(snapshot(item, depth) for item in value)
    if not depth or not has_state(value):
        return value
    drawn = _generator(value)
    if drawn is not None:
        return _Mark(drawn)
    if is_array(value):
        return _Mark(hash((value.shape, value.tobytes()))) if value.nbytes <= _LARGEST else value
    parts: list[Any] = []
    if isinstance(value, _CONTAINERS):
        parts += list(dict.items(value)) if isinstance(value, dict) else list(value)
    parts += getattr(value, "__dict__", {}).items()
    parts += [(name, getattr(value, name, ...)) for name in _slots(value)]
    return tuple(snapshot(part, depth - 1) for part in parts)


def alike(a: Any, b: Any) -> bool:
    """Whether two snapshots hold the same objects, or equal plain values."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) is tuple:
        return len(a) == len(b) and all(map(alike, a, b))
    return (type(a) in SIMPLE or type(a) is _Mark) and bool(a == b)


def asks_for_mode(kind: type) -> bool:
    """Whether a class of a user's or a library's reads `training` in a function of its own."""
    return any("training" in names for _, names in _functions(kind))


def methods_naming(kind: type, names: Iterable[str], but: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """Methods beside `forward` of a user's or a library's class that name one of these attributes, and which.

    Args:
        kind: the class.
        names: the attributes.
        but: words that leave a method out if its code has one.
    """
    wanted = tuple(names)
    for name in dir(kind):
        function = inspect.getattr_static(kind, name)
        owner = next((owner for owner in _own_classes(kind) if vars(owner).get(name) is function), None)
        if owner is None or not isinstance(function, types.FunctionType) or name.startswith("__") or name == "forward":
            continue
        used = set(_names(function.__code__))
        found = next((each for each in wanted if each in used), None)
        if found is not None and but.isdisjoint(used):
            yield name, found


def _differences(after: dict[str, Any], before: dict[str, Any]) -> list[str]:
    names = dict.fromkeys((*before, *after))
    return [name for name in names if not alike(after.get(name, ...), before.get(name, ...))]


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: snapshot(value) for name, value in module.__dict__.items() if name not in _UNWATCHED}


def _class_attributes(kind: type) -> dict[str, Any]:
    return {
        f"the class attribute `{owner.__name__}.{name}`": snapshot(value)
        for owner in _own_classes(kind)
        for name, value in vars(owner).items()
        if not name.startswith("__") and (type(value) in SIMPLE or has_state(value))
    }


def _named(kind: type) -> Iterator[tuple[str, Any]]:
    """Globals and closure contents that the functions of a class name."""
    return ((what, value) for what, _, _, value in _held(kind))


def _held(kind: type) -> Iterator[tuple[str, Any, str, Any]]:
    """The same, with the dictionary or cell that holds each, and its name there."""
    for function, names in _functions(kind):
        for name in names:
            if name in function.__globals__:
                yield f"the global `{name}`", function.__globals__, name, function.__globals__[name]
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                yield f"the variable `{name}`", cell, name, cell.cell_contents
            except ValueError:  # not filled yet
                continue


@functools.lru_cache(maxsize=256)  # holds the classes: bounded
def _functions(kind: type) -> tuple[tuple[types.FunctionType, tuple[str, ...]], ...]:
    found = []
    for owner in _own_classes(kind):
        for value in vars(owner).values():
            function = getattr(value, "fget", getattr(value, "__func__", value))
            if isinstance(function, types.FunctionType):
                found.append((function, tuple(dict.fromkeys(_names(function.__code__)))))
    return tuple(found)


def _own_classes(kind: type) -> tuple[type, ...]:
    """A class and its bases down to torch's."""
    return tuple(k for k in kind.__mro__ if k is not object and k.__module__.partition(".")[0] not in ("torch", "abc"))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _slots(value: Any) -> list[str]:
    slots = (getattr(kind, "__slots__", ()) for kind in type(value).__mro__)
    return [name for names in slots for name in ([names] if isinstance(names, str) else names)]


def is_array(value: Any) -> bool:
    """Whether it is an array of numpy's, which need not be there."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _generator(value: Any) -> str | None:
    """The state of a generator of random numbers that is not torch's; None for anything else."""
    if isinstance(value, random.Random):
        return str(hash(value.getstate()))
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return str(value.bit_generator.state)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return str(hash(tuple(str(part) for part in value.get_state()[1:3])))
    return None
