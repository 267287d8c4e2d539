"""A stand-in for a module that notes which state its own forward reads and writes while it is traced.

What a forward reads is baked into its graph, so it becomes *locked*; what it writes stops the rewrite.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict, deque
from typing import Any

import torch
from torch import nn

from padfree.reforward import quiet_subclass

Locked = tuple[tuple[str, Any], ...]


_SIMPLE = (bool, int, float, str, type(None))


_OPAQUE = "<object>"


_ABSENT = "<absent>"


_CONTAINERS = (list, dict, set, OrderedDict, defaultdict, deque)


class Spy:
    """A stand-in for a module that shares its children and notes what its own forward touches."""

    def __init__(self, module: nn.Module) -> None:
        self.reads: dict[str, Any] = {}
        self.writes: set[str] = set()
        self.methods: set[str] = set()
        base = type(module)
        plain = set(nn.Module().__dict__)

        def __getattribute__(this: Any, name: str) -> Any:
            value = base.__getattribute__(this, name)
            if name not in plain and not (name.startswith("__") and name.endswith("__")):
                if name in object.__getattribute__(this, "__dict__") or _is_class_state(base, name):
                    self.reads.setdefault(name, value)
                elif inspect.ismethod(value) and not hasattr(nn.Module, name) and name != "forward":
                    self.methods.add(name)
            return value

        def __getattr__(this: Any, name: str) -> Any:
            try:
                value = base.__getattr__(this, name)
            except AttributeError:  # `hasattr(self, ...)`: that there is none is baked
                if not name.startswith("__"):
                    self.reads.setdefault(name, _ABSENT)
                raise
            if value is None:  # an absent child, parameter or buffer: its absence is baked
                self.reads.setdefault(name, None)
            return value

        def __setattr__(this: Any, name: str, value: Any) -> None:
            if name != "training":
                self.writes.add(name)
            base.__setattr__(this, name, value)

        members = {
            "__getattribute__": __getattribute__,
            "__getattr__": __getattr__,
            "__setattr__": __setattr__,
            "__module__": base.__module__,
        }
        self.kind = quiet_subclass(base, members)
        self.module = module
        self.stand_in: nn.Module = module

    def fresh(self, training: bool) -> nn.Module:
        """A new stand-in; the spy starts to note from here."""
        stand_in: nn.Module = self.kind.__new__(self.kind)
        state = dict(self.module.__dict__)
        for name in ("_modules", "_parameters", "_buffers"):
            state[name] = state[name].copy()
        state["training"] = training
        plain = nn.Module().__dict__
        self.held = {name: value for name, value in state.items() if name not in plain and _has_state(value)}
        self.snapshots = {name: _snapshot(value) for name, value in self.held.items()}
        object.__getattribute__(stand_in, "__dict__").update(state)
        return stand_in

    def changed(self) -> list[str]:
        """Attributes whose containers or objects the forward wrote into."""
        return [name for name, value in self.held.items() if not _alike(_snapshot(value), self.snapshots[name])]

    def locked(self) -> Locked:
        """What the forward read, as (name, value); values that do not compare simply are opaque."""
        return tuple(sorted((name, value if _is_simple(value) else _OPAQUE) for name, value in self.reads.items()))


def _is_class_state(base: type[nn.Module], name: str) -> bool:
    """Whether `name` is a plain value, or a slot, of a user's class: an instance could be given its own."""
    if hasattr(nn.Module, name):
        return False
    value = inspect.getattr_static(base, name, _SIMPLE)
    return value is not _SIMPLE and (inspect.ismemberdescriptor(value) or not hasattr(type(value), "__get__"))


def _has_state(value: Any) -> bool:
    """Whether a forward could write into `value` unseen: a container, or an object of a user's class."""
    if type(value) in _CONTAINERS:
        return True
    known = isinstance(value, (torch.Tensor, nn.Module, type, *_SIMPLE[:-1])) or callable(value)
    return not known and isinstance(getattr(value, "__dict__", None), dict)


def _snapshot(value: Any, depth: int = 3) -> Any:
    """Containers (and attributes of objects) as nested tuples, whose leaves compare by identity."""
    if depth and type(value) in _CONTAINERS:
        items = list(value.items()) if isinstance(value, dict) else list(value)
        return tuple(_snapshot(item, depth - 1) for item in items)
    if depth and type(value) is tuple:
        return tuple(_snapshot(item, depth) for item in value)
    if depth and _has_state(value):
        return tuple((name, _snapshot(item, depth - 1)) for name, item in vars(value).items())
    return value


def _alike(a: Any, b: Any) -> bool:
    if type(a) is tuple and type(b) is tuple:
        return len(a) == len(b) and all(map(_alike, a, b))
    return a is b


def _is_simple(value: Any) -> bool:
    if isinstance(value, tuple):
        return type(value) is tuple and all(_is_simple(item) for item in value)
    return type(value) in _SIMPLE
