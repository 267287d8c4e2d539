"""The plain values that an object is, or leads to in a few steps, by the Python text that reads them."""

from __future__ import annotations

import enum
import functools
import inspect
import itertools
import re
import types
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from padfree.rewrite.effects import is_array
from padfree.rewrite.forward import access
from padfree.rewrite.plain import FUNCTIONS, is_item, is_plain, key_text
from padfree.rewrite.stale import NUMPY, SAME, name_of, own_function, python
from padfree.rewrite.words import LONGEST, NOTHING, Words, closed, is_foreign

STEPS = 2  # from an attribute on: `self.cfg.model.scale`
WALKS = frozenset({"items", "values", "keys"})
_LARGEST = 1 << 16  # bytes of an array that are compared
_LAST_NAME = re.compile(r"\w+$")


class Values:
    """Finds what code may read of an object.

    Args:
        words: what the code is written with.
        own: paths of the block's own modules, by id.
    """

    def __init__(self, words: Words, own: dict[int, str]) -> None:
        self._words = words
        self._own = own

    def leaves(self, text: str, value: Any, steps: int = STEPS) -> dict[str, Any]:
        """Plain values that `value`, which `text` reads, is or leads to in so many steps."""
        if is_plain(value):
            at = f"{NUMPY}({text})" if python(value) is not value else text
            return {at: python(value)} if value == value else {}  # NaN equals nothing
        if isinstance(value, (torch.Tensor, torch.jit.ScriptModule)):
            return {}
        if isinstance(value, FUNCTIONS):
            return self._functions(text, value, steps)
        if isinstance(value, weakref.ref):
            return self.leaves(f"{text}()", value(), steps)
        if is_array(value):
            return {f"{NUMPY}({text})": python(value)} if value.nbytes <= _LARGEST else {}
        if isinstance(value, (set, frozenset)):
            return {text: frozenset(value)} if all(map(is_item, value)) else {}
        if isinstance(value, (list, tuple, deque)):
            found: dict[str, Any] = {f"len({text})": len(value)}
            for index, item in enumerate(itertools.islice(value, LONGEST if steps else 0)):
                found |= self.leaves(f"{text}[{index}]", item, steps - 1)
            return found
        if isinstance(value, nn.Module):
            return self.attributes(text, value, steps) | self._module(text, value)
        if isinstance(value, (dict, Mapping)) or (
            callable(getattr(value, "keys", None)) and not isinstance(value, type)
        ):
            return self._items(text, value, steps) | self.attributes(text, value, steps)
        found = self.attributes(text, value, steps)
        if not found and steps < STEPS and not isinstance(value, (type, types.ModuleType)):
            return {f"padfree_name(type({text}))": type(value).__qualname__}  # it may become None
        return found

    def _module(self, text: str, value: nn.Module) -> dict[str, Any]:
        """Which of the block's own it is, or else what is asked about it."""
        path = self._own.get(id(value))
        if path is None:
            return self._words.questions.answers([(text, value)])
        return {f"{SAME}({text}, {access(path)})": True} if path else {}

    def _functions(self, text: str, value: Any, steps: int) -> dict[str, Any]:
        """The name of a function, and what it holds: closed-over variables, bound arguments, the object of a method."""
        if isinstance(value, functools.partial):
            held = {f"{text}.func": value.func, f"{text}.args": value.args, f"{text}.keywords": value.keywords}
        elif isinstance(value, types.MethodType):
            held = {f"{text}.__func__": value.__func__, f"{text}.__self__": value.__self__}
        else:
            held = {}
            if own_function(value) is not None:
                held = {f"{text}.__closure__[{index}].cell_contents": content for index, _, content in closed(value)}
                held[f"{text}.__defaults__"] = value.__defaults__
                held |= {f"{text}.{name}": vars(value)[name] for name in self._words.attributes & set(vars(value))}
        found: dict[str, Any] = (
            {}
            if isinstance(value, (functools.partial, types.MethodType))
            else {f"padfree_name({text})": name_of(value)}
        )
        for inner, content in held.items() if steps else ():
            if not isinstance(content, (nn.Module, types.ModuleType)):
                found |= self.leaves(inner, content, steps - 1)
        return found

    def _items(self, text: str, value: Any, steps: int) -> dict[str, Any]:
        words = self._words
        keys = [key for key in value.keys() if key_text(key) is not None]  # noqa: SIM118 - not every mapping is one
        named = [key for key in keys if self._is_named(key)]
        last = _LAST_NAME.search(text)
        walked = bool(WALKS & words.attributes) or (last is not None and last[0] in words.walked)
        walked = walked or (not named and type(value) is dict)
        found: dict[str, Any] = {f"len({text})": len(keys)} if walked and len(keys) == len(value) else {}
        for key in (keys if walked else named)[:LONGEST] if steps else ():
            place = key_text(key)
            at = f"{text}[{place}]" if place else f"tuple({text}.values())[{keys.index(key)}]"
            found |= self.leaves(at, value[key], steps - 1)
        if isinstance(value, Mapping):
            missing = {repr(key) for key in words.sought if key not in value}
            found |= {f"({key} in {text})": False for key in missing}
        return found

    def _is_named(self, key: Any) -> bool:
        """Whether code may take this key."""
        words = self._words
        name = getattr(key, "name", None)  # of an enum's member
        inner = type(key) is tuple and bool(key) and all(map(self._is_named, key))
        return key is None or inner or key in words.keys or (name is not None and name in words.attributes)

    def attributes(self, text: str, value: Any, steps: int) -> dict[str, Any]:
        """Those of an object's attributes that code names."""
        foreign = is_foreign(type(value).__module__) and not isinstance(value, (type, types.ModuleType))
        if foreign and not isinstance(getattr(value, "__dict__", None), dict):
            return {}
        found: dict[str, Any] = {}
        for name in sorted(self._words.attributes):
            if name.startswith("__") or (name == "training" and id(value) in self._own):
                continue
            held = _held(value, name)
            if is_plain(held) or (steps and not isinstance(held, nn.Module) and held is not NOTHING):
                found |= self.leaves(f"{text}.{name}", held, steps - 1)
            elif held is NOTHING and name in self._words.questions.names and not isinstance(value, nn.Module):
                found |= {} if _has(value, name) else {f"hasattr({text}, {name!r})": False}
        return found


def _has(value: Any, name: str) -> bool:
    try:
        return hasattr(value, name)
    except Exception:  # a property of the user's, which may raise anything
        return True


def _held(value: Any, name: str) -> Any:
    """An attribute of an object, where it is state and no method."""
    if isinstance(value, types.ModuleType):
        held = vars(value).get(name, NOTHING)
    elif isinstance(value, type):
        held = getattr(value, name, NOTHING)
    elif isinstance(value, nn.Module):
        held = value.__dict__.get(name, inspect.getattr_static(type(value), name, NOTHING))
    else:
        try:
            held = getattr(value, name, NOTHING)
        except Exception:  # a property of the user's, which may raise anything: then the forward does not read it
            return NOTHING
    if isinstance(held, FUNCTIONS) and name in getattr(value, "__dict__", {}) and not isinstance(value, type):
        return NOTHING if isinstance(value, types.ModuleType) else held  # given to the object, and no method of it
    if isinstance(held, type):  # that of a configuration, nested in another
        return NOTHING if is_foreign(held.__module__) or issubclass(held, (nn.Module, enum.Enum)) else held
    return NOTHING if callable(held) or hasattr(type(held), "__get__") else held
