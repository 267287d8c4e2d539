"""The words that a forward, and what it calls, are written with: attributes, keys, globals, closed-over variables."""

from __future__ import annotations

import dis
import enum
import functools
import importlib.util
import inspect
import itertools
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
from padfree.rewrite.plain import FUNCTIONS, is_plain
from padfree.rewrite.stale import CHECK, FOREIGN, own_function

NOTHING = object()
LONGEST = 64  # elements of a list that are looked at one by one
_SEEKING = frozenset({"get", "pop", "setdefault", "__contains__"})
_PAST_INSTANCE = frozenset({"type", "super"})  # what reads a class, and no attribute of the instance
_GOES_THROUGH = ("GET_ITER", "UNPACK_SEQUENCE", "LIST_EXTEND", "SET_UPDATE", "DICT_UPDATE", "DICT_MERGE")
_CALLS = ("PRECALL", "CALL", "CALL_FUNCTION")
_GOING_THROUGH = frozenset(
    {"all", "any", "dict", "enumerate", "iter", "len", "list", "map", "max", "min", "reversed", "set", "sorted", "sum",
     "tuple", "zip"}
)  # fmt: skip


@dataclass
class Words:
    """What the code of a forward, and of the functions it calls, is written with.

    Attributes:
        attributes: names after a dot, or taken by name.
        keys: constants that may be keys or indices.
        sought: those of code that asks whether there is such a key.
        walked: names of what is gone through: by a loop, a star, `list()`.
        in_dict: constants of code that reads `vars(self)` or `self.__dict__`.
        of_class: whether it may read attributes of the class, past the instance.
        variables: globals and closed-over variables, as (Python text that reads it, value).
        questions: what it asks about objects.
    """

    attributes: set[str] = field(default_factory=set)
    keys: set[Any] = field(default_factory=set)
    sought: set[Any] = field(default_factory=set)
    walked: set[str] = field(default_factory=set)
    in_dict: set[str] = field(default_factory=set)
    of_class: bool = False
    variables: dict[str, tuple[str, Any]] = field(default_factory=dict)
    questions: Questions = field(default_factory=Questions)


def words_of(kind: type, reads: Mapping[str, Any], names: Iterable[str] = ("forward",)) -> Words:
    """What methods of a class are written with, and the functions that they call.

    Args:
        kind: the class; functions of its own are found by the names that its code calls.
        reads: attributes of the instance that were read, with the objects they lead to.
        names: the methods or properties to begin with.
    """
    reader = _Reader(kind)
    for value in reads.values():
        for each in (value, value() if isinstance(value, weakref.ref) else None, *_inside(value)):
            reader.meet(each)
    reader.read([(inspect.getattr_static(kind, name, None), "") for name in names])
    return reader.words


class _Reader:
    """Goes through the code of functions and of what they call."""

    def __init__(self, kind: type) -> None:
        self.words = Words()
        self.kind = kind
        self.kinds: list[Any] = [kind]  # whose functions may be called by name: classes and modules
        self.waiting: list[tuple[Any, str]] = []  # functions, with text that reads them
        self.class_own = {own_function(value) for owner in kind.__mro__ for value in vars(owner).values()}

    def meet(self, value: Any) -> None:
        """Notes an object whose functions may be called."""
        if isinstance(value, FUNCTIONS):
            self.waiting.append((value.func if isinstance(value, functools.partial) else value, ""))
        elif not isinstance(value, (nn.Module, torch.Tensor, type)) and not is_plain(value):
            self.kinds.append(type(value))
            self.waiting.append((inspect.getattr_static(type(value), "__call__", None), ""))

    def read(self, functions: list[tuple[Any, str]]) -> None:
        """Reads the code of these, and of all that they lead to."""
        self.waiting += functions
        seen: set[int] = set()
        while self.waiting:
            value, text = self.waiting.pop()
            function = own_function(value)
            if function is None or id(function) in seen:
                continue
            seen.add(id(function))
            for code in _codes(function.__code__):
                self._code(function, code)
            for index, name, content in closed(function):
                inner = f"padfree_cells[{name!r}].cell_contents" if function in self.class_own else ""
                if not inner and text and function is value:
                    inner = f"{text}.__closure__[{index}].cell_contents"
                if inner and not isinstance(content, types.FunctionType):
                    self.words.variables[f"{function.__qualname__}:{name}"] = (inner, content)
                self.waiting.append((content, inner))
        self.words.attributes |= self.words.questions.names

    def _code(self, function: types.FunctionType, code: types.CodeType) -> None:
        words = self.words
        steps = list(dis.get_instructions(code))
        words.questions.read(function, code)
        constants = {const for const in code.co_consts if _is_key(const)}
        for const in code.co_consts:  # `("a", "b")` to walk over, or a key
            if isinstance(const, tuple) and all(map(_is_key, const)):
                constants |= {*const, const}
        words.keys |= constants
        named = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        said = constants - {function.__doc__}
        if _SEEKING & set(code.co_names) or any(step.opname == "CONTAINS_OP" for step in steps):
            words.sought |= said
        if "vars" in named or "__dict__" in code.co_names:
            words.in_dict |= {const for const in said if isinstance(const, str) and const.isidentifier()}
        words.of_class = words.of_class or bool(_PAST_INSTANCE & named) or "__class__" in code.co_names
        self._walks(steps, named)
        inherited = "super" in named or any(function.__globals__.get(name) in self.kind.__mro__[1:] for name in named)
        for index, step in enumerate(steps):
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                if step.argval == CHECK:  # what it baked is carried over
                    continue
                words.attributes.add(step.argval)
                self.waiting += [(inspect.getattr_static(each, step.argval, None), "") for each in self.kinds]
                if inherited:
                    self.waiting += [(vars(owner).get(step.argval), "") for owner in self.kind.__mro__]
            elif step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                self._variable(function.__globals__, step.argval)
            elif step.opname == "IMPORT_NAME":
                self._imported(function, steps[index:], steps[index - 2].argval if index >= 2 else 0)

    def _walks(self, steps: list[dis.Instruction], named: set[Any]) -> None:
        """Notes the names of what is gone through, and not read by key."""
        local: dict[Any, str] = {}
        builtin = bool(_GOING_THROUGH & named)
        for step, following in itertools.pairwise(steps):
            name = step.argval if step.opname in ("LOAD_ATTR", "LOAD_GLOBAL", "LOAD_DEREF") else None
            if step.opname.startswith("LOAD_FAST"):
                name = local.get(step.argval)
            if name is None:
                continue
            if following.opname == "STORE_FAST":
                local[following.argval] = name
            elif following.opname in _GOES_THROUGH or (builtin and following.opname in _CALLS):
                self.words.walked.add(name)

    def _imported(self, function: types.FunctionType, steps: list[dis.Instruction], level: Any) -> None:
        """Notes a module that code imports, and what it takes from it."""
        name = "." * (level if type(level) is int else 0) + steps[0].argval
        try:
            module = sys.modules.get(importlib.util.resolve_name(name, function.__globals__.get("__package__")))
        except (ImportError, ValueError):
            return
        if module is None or is_foreign(module.__name__):
            return
        self.words.variables[f"{module.__name__}:"] = (f"padfree_modules[{module.__name__!r}]", module)
        self.kinds.append(module)
        for step in steps[1:]:
            if step.opname == "IMPORT_FROM":
                self._variable(vars(module), step.argval)
            elif not step.opname.startswith("STORE"):
                return

    def _variable(self, names: dict[str, Any], name: str) -> None:
        """Notes a global that can be read by its module's name; what it holds, and the text that reads it."""
        value = names.get(name, NOTHING)
        module = str(names.get("__name__"))
        importable = vars(sys.modules.get(module, types.ModuleType(""))) is names
        text = f"padfree_modules[{module!r}].{name}" if importable else ""
        if value is NOTHING or isinstance(value, types.FunctionType) or is_foreign(module):
            self.waiting.append((value, text))
            if not (text and isinstance(value, types.FunctionType) and vars(value)) or is_foreign(module):
                return  # else it may have state
        elif isinstance(value, types.ModuleType):
            if is_foreign(value.__name__):
                return
            self.kinds.append(value)
        elif isinstance(value, type):
            if issubclass(value, enum.Enum) or is_foreign(value.__module__):
                return
            self.kinds += [] if issubclass(value, nn.Module) else [value]
        elif not is_foreign(type(value).__module__) and not isinstance(value, (nn.Module, torch.Tensor)):
            self.kinds.append(type(value))
        if importable:
            self.words.variables[f"{module}:{name}"] = (text, value)


def is_foreign(module: str) -> bool:
    """Whether the state of a module of this name is not the user's."""
    return module.partition(".")[0] in FOREIGN


def _inside(value: Any) -> list[Any]:
    """What an object or a container holds, one step from it."""
    if isinstance(value, (list, tuple, deque)):
        return list(itertools.islice(value, LONGEST))
    held = getattr(value, "__dict__", None)
    found = list(held.values()) if isinstance(held, dict) and not isinstance(value, (nn.Module, type)) else []
    return [*found, *(list(value.values()) if type(value) is dict else ())][:LONGEST]


def _is_key(value: Any) -> bool:
    return type(value) in (str, int)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def closed(function: types.FunctionType) -> Iterator[tuple[int, str, Any]]:
    """The closed-over variables of a function: position, name and content."""
    for index, (name, cell) in enumerate(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)):
        if name != "__class__" and _filled(cell):
            yield index, name, cell.cell_contents


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not NOTHING
    except ValueError:  # not yet
        return False
