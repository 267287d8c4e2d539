"""A stand-in for a module that notes which state its own forward reads and writes while it is traced.

What a forward reads is baked into its graph, so it becomes *locked*; what it writes stops the rewrite.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from padfree.rewrite.classes import quiet_subclass
from padfree.rewrite.effects import SIMPLE, Watch
from padfree.rewrite.stale import CHECK

Locked = tuple[tuple[str, Any], ...]

_TABLES = ("_modules", "_parameters", "_buffers")
OPAQUE = "<object>"  # what is locked and does not compare simply
ABSENT = "<absent>"  # what `hasattr` found missing


class Spy:
    """A stand-in for a module that shares its children and notes what its own forward touches."""

    def __init__(self, module: nn.Module) -> None:
        self.reads: dict[str, Any] = {}
        self.writes: set[str] = set()
        self.methods: set[str] = set()
        self.names: set[str] = set()  # of children, parameters and buffers, as the forward reads them
        base = type(module)
        plain = set(nn.Module().__dict__)

        def __getattribute__(this: Any, name: str) -> Any:
            value = base.__getattribute__(this, name)
            if name not in plain and not (name.startswith("__") and name.endswith("__")):
                if name in object.__getattribute__(this, "__dict__") or is_class_state(base, name):
                    self.reads.setdefault(name, value)
                elif inspect.ismethod(value) and not hasattr(nn.Module, name) and name not in ("forward", CHECK):
                    torchs = str(value.__func__.__module__).partition(".")[0] == "torch"  # as those of a ModuleDict
                    self.methods |= set() if torchs else {name}
            return value

        def __getattr__(this: Any, name: str) -> Any:
            try:
                value = base.__getattr__(this, name)
            except AttributeError:  # `hasattr(self, ...)`: that there is none is baked
                if not name.startswith("__"):
                    self.reads.setdefault(name, ABSENT)
                raise
            own = object.__getattribute__(this, "__dict__")
            if any(name in own[table] for table in _TABLES):
                self.names.add(name)
            elif not (name.startswith("__") or callable(value) or isinstance(value, torch.Tensor)):
                self.reads.setdefault(name, value)  # what a `__getattr__` of the user's answers
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
            CHECK: lambda this: None,  # what an earlier conversion baked is carried over, not read again
            "__module__": base.__module__,
        }
        self.kind = quiet_subclass(base, members)
        self.module = module
        self.stand_in: nn.Module = module

    def fresh(self, training: bool) -> nn.Module:
        """A new stand-in; the spy starts to note from here."""
        stand_in: nn.Module = self.kind.__new__(self.kind)
        state = dict(self.module.__dict__)
        for name in _TABLES:
            state[name] = state[name].copy()
        state["training"] = training
        own: dict[str, Any] = object.__getattribute__(stand_in, "__dict__")
        own.update(state)
        self.watch = Watch(self.module, own)
        return stand_in

    def locked(self) -> Locked:
        """What the forward read, as (name, value); values that do not compare simply are opaque."""
        return tuple(sorted((name, value if _is_simple(value) else OPAQUE) for name, value in self.reads.items()))


def is_class_state(base: type[nn.Module], name: str) -> bool:
    """Whether `name` is a plain value, or a slot, of a user's class: an instance could be given its own."""
    if hasattr(nn.Module, name):
        return False
    value = inspect.getattr_static(base, name, SIMPLE)
    return value is not SIMPLE and (inspect.ismemberdescriptor(value) or not hasattr(type(value), "__get__"))


def _is_simple(value: Any) -> bool:
    if isinstance(value, tuple):
        return type(value) is tuple and all(_is_simple(item) for item in value)
    return type(value) in SIMPLE
