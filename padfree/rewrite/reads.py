"""What a forward reads through other objects: `self.cfg.scale`, a class attribute, a global, the layers of a list.

A trace bakes these values into its graph. They are found by the words that the forward, and what it calls, are written
with: attributes, globals and closed-over variables that its code names, keys and indices that it may use. A generated
forward compares them with what they were whenever it is called (not under TorchScript, which bakes them itself).
"""

from __future__ import annotations

import dis
import enum
import functools
import inspect
import itertools
import re
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from padfree.rewrite.asked import Questions
from padfree.rewrite.effects import is_array
from padfree.rewrite.forward import Locked, access
from padfree.rewrite.stale import CHILDREN, FOREIGN, name_of, own_function
from padfree.types import NEW

STEPS = 2  # from an attribute on: `self.cfg.model.scale`
_LONGEST = 64  # elements of a list that are looked at one by one
_LEAVES = (bool, int, float, str, type(None), enum.Enum, torch.dtype, torch.device)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)
_CHILDREN = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
_LARGEST = 1 << 16  # bytes of an array that are compared
_WALKS = frozenset({"items", "values", "keys"})


@dataclass
class _Words:
    """What the code of a forward, and of the functions it calls, is written with."""

    attributes: set[str] = field(default_factory=set)
    keys: set[Any] = field(default_factory=set)
    variables: dict[str, tuple[str, Any]] = field(default_factory=dict)  # Python text that reads it, by that text
    questions: Questions = field(default_factory=Questions)


def watched(module: nn.Module, reads: Mapping[str, Any], called: set[str]) -> Locked:
    """Python text that reads each value baked into a trace of `module`, with the value.

    Args:
        module: whose forward was traced.
        reads: its own attributes that the forward read.
        called: targets of the calls and tensors in the trace, by path.
    """
    words = _words(type(module), reads)
    words.keys |= {value for value in reads.values() if type(value) in (str, int)}
    own = {id(inner): path for path, inner in module.named_modules()}
    found: dict[str, Any] = {}
    for name, value in reads.items():
        of_class = name not in module.__dict__  # past the lock
        if name.isidentifier() and (hasattr(type(module), name) if of_class else not isinstance(value, _LEAVES)):
            found |= _leaves(f"self.{name}", value, words, STEPS, own)
    for text, value in words.variables.values():
        found |= _leaves(text, value, words, STEPS, own)
    if isinstance(module, _CONTAINERS) or _CHILDREN & words.attributes:  # it walks over its own
        found[CHILDREN] = sum(not name.startswith(NEW) for name in module._modules)
        named = set(module._modules)
    else:
        named = words.attributes
    by_name = words.attributes | {str(key) for key in words.keys}
    layers = [(path, child) for path, child in module.named_modules() if path and path.count(".") < STEPS]
    asked = ((path, child) for path, child in layers if _first(path) in named)
    found |= words.questions.answers(
        (path, child) for path, child in asked if _own(path, called) or by_name.issuperset(path.split("."))
    )
    for path, child in layers:
        if _first(path) in words.attributes:
            found |= _layers(path, child, words, called)
            if isinstance(child, nn.Module) and not isinstance(child, torch.jit.ScriptModule):
                found |= _attributes(access(path), child, words, 0, own)
    sizes = ("len(", "tuple(")  # first, since the others may read what is not there any more
    return tuple(sorted(found.items(), key=lambda item: (not item[0].startswith(sizes), item[0])))


def _first(path: str) -> str:
    return path.partition(".")[0]


def _own(path: str, called: set[str]) -> bool:
    """Whether no module is called that this one lies in, whose business it would be."""
    names = path.split(".")
    return not any(".".join(names[:depth]) in called for depth in range(1, len(names)))


def without_reads(locked: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """What is locked, without what is read of these children, which are others now."""
    texts = [re.compile(rf"{re.escape(access(path))}(?!\w)") for path in paths]
    return {name: value for name, value in locked.items() if not any(text.search(name) for text in texts)}


def _layers(path: str, child: nn.Module, words: _Words, called: set[str]) -> dict[str, Any]:
    """The length of a container that the forward takes apart, its keys where it walks over them."""
    if not isinstance(child, _CONTAINERS) or path in called or not _own(path, called):
        return {}
    text = access(path)
    if isinstance(child, (nn.ModuleDict, nn.ParameterDict)):
        by_key = set(child.keys()) <= words.keys and not (_WALKS & words.attributes)
        return {} if by_key else {f"tuple({text}.keys())": tuple(child.keys())}
    return {f"len({text})": len(child)}


def _leaves(text: str, value: Any, words: _Words, steps: int, own: dict[int, str]) -> dict[str, Any]:
    """Plain values that `value` is, or leads to in so many steps, by the text that reads them."""
    if isinstance(value, _LEAVES):
        return {text: value} if value == value else {}  # NaN equals nothing
    if isinstance(value, (torch.Tensor, torch.jit.ScriptModule)):
        return {}
    if isinstance(value, _FUNCTIONS):
        return _functions(text, value, words, steps, own)
    if isinstance(value, weakref.ref):
        return _leaves(f"{text}()", value(), words, steps, own)
    if is_array(value):
        return {f"{text}.tobytes()": value.tobytes()} if value.nbytes <= _LARGEST else {}
    if isinstance(value, (set, frozenset)):
        return {text: frozenset(value)} if all(isinstance(item, _LEAVES) for item in value) else {}
    if isinstance(value, (list, tuple, deque)):
        found: dict[str, Any] = {f"len({text})": len(value)}
        for index, item in enumerate(itertools.islice(value, _LONGEST if steps else 0)):
            found |= _leaves(f"{text}[{index}]", item, words, steps - 1, own)
        return found
    if isinstance(value, (dict, Mapping)) or (callable(getattr(value, "keys", None)) and not isinstance(value, type)):
        return _items(text, value, words, steps, own) | _attributes(text, value, words, steps, own)
    found = _attributes(text, value, words, steps, own)
    return found | {f"({text} is {access(own[id(value)])})": True} if own.get(id(value)) else found


def _functions(text: str, value: Any, words: _Words, steps: int, own: dict[int, str]) -> dict[str, Any]:
    """The name of a function, and what it holds: closed-over variables, bound arguments, the object of a method."""
    if isinstance(value, functools.partial):
        held = {f"{text}.func": value.func, f"{text}.args": value.args, f"{text}.keywords": value.keywords}
    elif isinstance(value, types.MethodType):
        held = {f"{text}.__func__": value.__func__, f"{text}.__self__": value.__self__}
    else:
        held = {}
        if own_function(value) is not None:
            held = {f"{text}.__closure__[{index}].cell_contents": content for index, _, content in _closed(value)}
            held[f"{text}.__defaults__"] = value.__defaults__
    found: dict[str, Any] = (
        {} if isinstance(value, (functools.partial, types.MethodType)) else {f"padfree_name({text})": name_of(value)}
    )
    for inner, content in held.items() if steps else ():
        if not isinstance(content, (nn.Module, types.ModuleType)):
            found |= _leaves(inner, content, words, steps - 1, own)
    return found


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not _NOTHING
    except ValueError:  # not yet
        return False


def _items(text: str, value: Any, words: _Words, steps: int, own: dict[int, str]) -> dict[str, Any]:
    keys = [key for key in value.keys() if type(key) in (str, int, bool)]  # noqa: SIM118 - not every mapping is one
    named = [key for key in keys if key in words.keys]
    walked = bool(_WALKS & words.attributes) or (not named and type(value) is dict)
    found: dict[str, Any] = {f"len({text})": len(keys)} if walked and len(keys) == len(value) else {}
    for key in (keys if walked else named)[:_LONGEST] if steps else ():
        found |= _leaves(f"{text}[{key!r}]", value[key], words, steps - 1, own)
    return found


def _attributes(text: str, value: Any, words: _Words, steps: int, own: dict[int, str]) -> dict[str, Any]:
    foreign = type(value).__module__.partition(".")[0] in FOREIGN and not isinstance(value, (type, types.ModuleType))
    if foreign and not isinstance(getattr(value, "__dict__", None), dict):
        return {}
    found: dict[str, Any] = {}
    for name in sorted(words.attributes):
        if name.startswith("__") or (name == "training" and id(value) in own):
            continue
        held = _held(value, name)
        if isinstance(held, _LEAVES) or (steps and not isinstance(held, (nn.Module, type)) and held is not _NOTHING):
            found |= _leaves(f"{text}.{name}", held, words, steps - 1, own)
    return found


_NOTHING = object()


def _held(value: Any, name: str) -> Any:
    """An attribute of an object, where it is state and no method."""
    if isinstance(value, (type, types.ModuleType)):
        held = (
            vars(value).get(name, _NOTHING) if isinstance(value, types.ModuleType) else getattr(value, name, _NOTHING)
        )
    elif isinstance(value, nn.Module):
        held = value.__dict__.get(name, inspect.getattr_static(type(value), name, _NOTHING))
    else:
        try:
            held = getattr(value, name, _NOTHING)
        except Exception:  # a property of the user's, which may raise anything: then the forward does not read it
            return _NOTHING
    if isinstance(held, _FUNCTIONS) and name in getattr(value, "__dict__", {}) and not isinstance(value, type):
        return (
            _NOTHING if isinstance(value, types.ModuleType) else held
        )  # given to the object, and no method of its class
    return _NOTHING if callable(held) or hasattr(type(held), "__get__") else held


def _words(kind: type, reads: Mapping[str, Any]) -> _Words:
    """What a forward is written with, and the functions that it calls: its class's, and those of what it reads."""
    words = _Words()
    kinds = [kind]
    class_own = {own_function(value) for owner in kind.__mro__ for value in vars(owner).values()}
    waiting: list[tuple[Any, str]] = [(inspect.getattr_static(kind, "forward", None), "")]  # with text that reads it
    for value in reads.values():
        for each in (value, value() if isinstance(value, weakref.ref) else None, *_inside(value)):
            if isinstance(each, _FUNCTIONS):
                waiting.append((each.func if isinstance(each, functools.partial) else each, ""))
            elif not isinstance(each, (nn.Module, torch.Tensor, type, *_LEAVES)):
                kinds.append(type(each))
                waiting.append((inspect.getattr_static(type(each), "__call__", None), ""))
    seen: set[int] = set()
    while waiting:
        value, text = waiting.pop()
        function = own_function(value)
        if function is None or id(function) in seen:
            continue
        seen.add(id(function))
        for code in _codes(function.__code__):
            words.questions.read(function, code)
            words.keys |= {const for const in code.co_consts if type(const) in (str, int)}
            for const in code.co_consts:  # `("a", "b")` to walk over
                words.keys |= set(const) if isinstance(const, tuple) and all(map(_is_key, const)) else set()
            for step in dis.get_instructions(code):
                if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                    words.attributes.add(step.argval)
                    waiting += [(inspect.getattr_static(each, step.argval, None), "") for each in kinds]
                elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                    waiting.append(_global(words, function, step.argval))
        for index, name, content in _closed(function):
            inner = f"padfree_cells[{name!r}].cell_contents" if function in class_own else ""
            if not inner and text and function is value:
                inner = f"{text}.__closure__[{index}].cell_contents"
            if inner and not isinstance(content, types.FunctionType):
                words.variables[f"{function.__qualname__}:{name}"] = (inner, content)
            waiting.append((content, inner))
    words.attributes |= words.questions.names
    return words


def _inside(value: Any) -> list[Any]:
    """What an object or a container holds, one step from it."""
    if isinstance(value, (list, tuple, deque)):
        return list(itertools.islice(value, _LONGEST))
    held = getattr(value, "__dict__", None)
    found = list(held.values()) if isinstance(held, dict) and not isinstance(value, (nn.Module, type)) else []
    return [*found, *(list(value.values()) if type(value) is dict else ())][:_LONGEST]


def _is_key(value: Any) -> bool:
    return type(value) in (str, int)


def _global(words: _Words, function: types.FunctionType, name: str) -> tuple[Any, str]:
    """Notes a global that can be read by its module's name; what it holds, and the text that reads it."""
    value = function.__globals__.get(name, _NOTHING)
    module = str(function.__globals__.get("__name__"))
    importable = vars(sys.modules.get(module, types.ModuleType(""))) is function.__globals__
    text = f"padfree_modules[{module!r}].{name}" if importable else ""
    if value is _NOTHING or isinstance(value, types.FunctionType) or module.partition(".")[0] in FOREIGN:
        return value, text
    if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] in FOREIGN:
        return None, ""
    if isinstance(value, type) and (issubclass(value, enum.Enum) or value.__module__.partition(".")[0] in FOREIGN):
        return None, ""
    if importable:
        words.variables[f"{module}:{name}"] = (text, value)
    return None, ""


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _closed(function: types.FunctionType) -> Iterator[tuple[int, str, Any]]:
    """The closed-over variables of a function: position, name and content."""
    for index, (name, cell) in enumerate(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)):
        if name != "__class__" and _filled(cell):
            yield index, name, cell.cell_contents
