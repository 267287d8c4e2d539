"""What a forward asks about its children: `isinstance(self.act, nn.ReLU)`, `hasattr(self.act, "scale")`.

Such a question is answered once, while the forward is traced, and the answer decides what is in the graph. The
generated forward asks again whenever it is called, so that a child of another class, or an attribute that was missing,
is no other network in silence.
"""

from __future__ import annotations

import dis
import importlib
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import nn

_ASKS = frozenset({"isinstance", "issubclass"})
_BY_NAME = frozenset({"hasattr", "getattr"})
_EXACT = frozenset({"__class__", "_get_name"})


@dataclass
class Questions:
    """What the code of a forward asks.

    Attributes:
        classes: of modules, by the text that reads them.
        names: of attributes that it takes by name, present or not.
        exact: whether it may tell any class from any other.
    """

    classes: dict[str, type[nn.Module]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    exact: bool = False

    def read(self, function: types.FunctionType, code: types.CodeType) -> None:
        """Adds what one code object of `function` asks."""
        steps = list(dis.get_instructions(code))
        called = [step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
        if not _BY_NAME.isdisjoint(called):
            self.names |= {name for name in _constants(steps) if isinstance(name, str) and name.isidentifier()}
        self.exact |= "type" in called or not _EXACT.isdisjoint(code.co_names)
        asked = sum(name in _ASKS for name in called) + sum(step.opname == "MATCH_CLASS" for step in steps)
        if asked:
            kinds = list(_named(function, steps))
            self.exact |= len(kinds) < asked  # by a variable or an attribute: it may be any
            for kind in kinds:
                if issubclass(kind, nn.Module):
                    text = class_text(kind)
                    self.classes |= {text: kind} if text else {}
                    self.exact |= not text

    def answers(self, children: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """The answers for modules, each given with the text that reads it, by the text that asks again."""
        found: dict[str, Any] = {}
        for text, child in children:
            for kind, of_class in self.classes.items():
                found[f"isinstance({text}, {kind})"] = isinstance(child, of_class)
            for name in sorted(self.names):
                found[f"hasattr({text}, {name!r})"] = hasattr(child, name)
            if self.exact:  # a rewritten class has its original's name
                found[f"padfree_name(type({text}))"] = type(child).__qualname__
        return found


def _constants(steps: list[dis.Instruction]) -> Iterator[Any]:
    """What code is written with, but for `getattr(self, "scale")`: reads of the block itself are seen elsewhere."""
    for before, step in pairwise(steps):
        if step.opname == "LOAD_CONST" and before.argval != "self":
            yield from step.argval if isinstance(step.argval, tuple) else (step.argval,)


def _named(function: types.FunctionType, steps: list[dis.Instruction]) -> Iterator[type]:
    """The classes that code names: `Act`, `nn.ReLU`, `KINDS`, a tuple of some, or a closed-over variable."""
    closed = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    value: Any = None
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = function.__globals__.get(step.argval)
        elif step.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF"):
            try:
                value = closed[step.argval].cell_contents
            except (KeyError, ValueError):  # a variable of an outer call, or empty yet
                value = None
        elif step.opname == "LOAD_ATTR" and isinstance(value, (types.ModuleType, type)):
            value = getattr(value, step.argval, None)
        else:
            value = None
        if following is not None and following.opname == "LOAD_ATTR" and isinstance(value, types.ModuleType):
            continue
        for kind in value if isinstance(value, (tuple, list, set, frozenset, dict)) else (value,):
            if isinstance(kind, type):
                yield kind


def class_text(kind: type) -> str:
    """Python text that reads a class by its module and name; "" where it is not found so."""
    try:
        found: Any = importlib.import_module(kind.__module__)
        for name in kind.__qualname__.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return ""
    return f"padfree_modules[{kind.__module__!r}].{kind.__qualname__}" if found is kind else ""
