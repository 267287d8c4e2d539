"""A stand-in for a module that notes which state its own forward reads and writes while it is traced.

What a forward reads is baked into its graph, so it becomes *locked*; what it writes stops the rewrite.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from padfree.rewrite.classes import quiet_subclass
from padfree.rewrite.effects import SIMPLE, Watch

Locked = tuple[tuple[str, Any], ...]

OPAQUE = "<object>"  # what is locked and does not compare simply
_ABSENT = "<absent>"


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
                    torchs = str(value.__func__.__module__).partition(".")[0] == "torch"  # as those of a ModuleDict
                    self.methods |= set() if torchs else {name}
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
        own: dict[str, Any] = object.__getattribute__(stand_in, "__dict__")
        own.update(state)
        self.watch = Watch(self.module, own)
        return stand_in

    def locked(self) -> Locked:
        """What the forward read, as (name, value); values that do not compare simply are opaque."""
        return tuple(sorted((name, value if _is_simple(value) else OPAQUE) for name, value in self.reads.items()))


def _is_class_state(base: type[nn.Module], name: str) -> bool:
    """Whether `name` is a plain value, or a slot, of a user's class: an instance could be given its own."""
    if hasattr(nn.Module, name):
        return False
    value = inspect.getattr_static(base, name, SIMPLE)
    return value is not SIMPLE and (inspect.ismemberdescriptor(value) or not hasattr(type(value), "__get__"))


def _is_simple(value: Any) -> bool:
    if isinstance(value, tuple):
        return type(value) is tuple and all(_is_simple(item) for item in value)
    return type(value) in SIMPLE
