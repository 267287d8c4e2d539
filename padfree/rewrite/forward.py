"""Classes with a generated forward: a subclass of a block's own class, built once per source.

The block stays the same object with the same children; only its class changes. Pickling and copying
rebuild the class from (base, source, names, locked), so they work in a fresh process.
"""

from __future__ import annotations

import abc
import importlib
import itertools
import keyword
import linecache
import math
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

from padfree.errors import Refusal
from padfree.rewrite.sealed import FUSERS, locking_setattr, sealed, sequential_members

Names = tuple[tuple[str, str, str], ...]  # (global name, module, qualified name)
Locked = tuple[tuple[str, Any], ...]
_MARK = "_padfree_base"


def graph_source(graph: fx.Graph) -> tuple[str, Names]:
    """The Python source of a graph's forward and where its globals come from.

    Raises:
        Refusal: it uses an object that cannot be imported by name, or a child that cannot be named.
    """
    for node in graph.nodes:
        words = str(node.target).split(".") if node.op in ("call_module", "get_attr") else []
        if reserved := next(filter(keyword.iskeyword, words), None):
            raise Refusal(
                f"it calls `{node.target}`, and `{reserved}` is a word of Python's own; name the child otherwise"
            )
    code = graph.python_code("self")
    return code.src.strip() + "\n", tuple(_name(name, value) for name, value in sorted(code.globals.items()))


def _name(name: str, value: Any) -> tuple[str, str, str]:
    if isinstance(value, float) and not math.isfinite(value):
        return (name, "math", "nan" if math.isnan(value) else "inf")
    if isinstance(value, ModuleType):
        return (name, value.__name__, "")
    if value is type(None):
        return (name, "types", "NoneType")
    module = getattr(value, "__module__", None)
    qualified = getattr(value, "__qualname__", getattr(value, "__name__", ""))
    if module is None and getattr(torch, qualified, None) is value:
        module = "torch"
    try:
        if module is None or _resolve(module, qualified) is not value:
            raise AttributeError
    except (ImportError, AttributeError):
        raise Refusal(f"its forward uses {value!r}, which cannot be imported by name") from None
    return (name, module, qualified)


def _resolve(module: str, qualified: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in filter(None, qualified.split(".")):
        found = getattr(found, part)
    return found


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before padfree gave it a generated forward (its own, if it has none)."""
    kind = type(module)  # a class made from a generated one (parametrized, say) is its own base
    base: type[nn.Module] = vars(kind).get(_MARK, kind)
    return base


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class, past a `__setattr__` of the user's."""
    object.__setattr__(module, "__class__", kind)


def is_rewritten(module: nn.Module) -> bool:
    """Whether padfree gave this module a generated class."""
    return _MARK in dir(type(module))


def rewritten_class(base: type[nn.Module], source: str, names: Names, locked: Locked) -> type[nn.Module]:
    """A subclass of `base` whose forward is `source` ("" keeps the base's and only seals its fusers).

    Args:
        base: the module's original class.
        source: text of one `def forward(self, ...)`.
        names: its globals, by module and qualified name.
        locked: plain state that `source` was traced with; changing it raises `LockedStateError`.
    """
    # the same name may mean another function by now: notebooks define their helpers again and again
    key = (base, source, names, repr(locked), tuple(id(_resolve(module, name)) for _, module, name in names))
    found = _CLASSES.get(key)
    if found is None:
        found = _CLASSES[key] = _new_class(base, source, names, locked)
    return found


_CLASSES: dict[tuple[Any, ...], type[nn.Module]] = {}


def sealed_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `base` that keeps its forward, and whose fusing methods raise."""
    return rewritten_class(base, "", (), ())


def _new_class(base: type[nn.Module], source: str, names: Names, locked: Locked) -> type[nn.Module]:
    members: dict[str, Any] = {
        _MARK: base,
        "_padfree_recipe": (source, names, locked),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
    }
    if source:
        members["forward"] = _compile(base, source, names)
        if locked:
            members["__setattr__"] = locking_setattr(base, dict(locked))
        if issubclass(base, nn.Sequential):
            members |= sequential_members(base)
    for name in FUSERS:
        if callable(getattr(base, name, None)):
            members[name] = sealed(name)
    return quiet_subclass(base, members)


def quiet_subclass(base: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    """A subclass of `base`, with its metaclass, made without running the user's class-creation code.

    An `__init_subclass__` or metaclass that registers classes by name would take it for a class of the
    user's, replace the original in the registry, or demand arguments.
    """
    maker = abc.ABCMeta if issubclass(type(base), abc.ABCMeta) else type
    made: type[nn.Module] = maker.__new__(type(base), base.__name__, (nn.Module,), members)
    try:
        made.__bases__ = (base,)  # unlike class creation, this calls no __init_subclass__
    except TypeError:  # a base with slots
        made = maker.__new__(type(base), base.__name__, (base,), members)
    return made


_count = itertools.count()  # of generated sources, so that no two share a file name


def _compile(base: type[nn.Module], source: str, names: Names) -> Any:
    """The forward that the source defines."""
    filename = f"<padfree {base.__module__}.{base.__qualname__} {next(_count)}>"
    namespace: dict[str, Any] = {name: _resolve(module, qualified) for name, module, qualified in names}
    namespace["__name__"] = base.__module__
    exec(compile(source, filename, "exec"), namespace)  # our own text, from a graph
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    forward = namespace["forward"]
    forward.__module__, forward.__qualname__ = base.__module__, f"{base.__qualname__}.forward"
    return forward


def _reduce(self: nn.Module, protocol: Any) -> Any:
    base = original_class(self)
    kind: Any = type(self)
    source, names, locked = kind._padfree_recipe
    getstate: Any = getattr(self, "__getstate__", None)  # object has none before Python 3.11
    state = self.__dict__ if getstate is None else getstate()
    return (rebuild, (base, source, names, locked), state)


def rebuild(base: type[nn.Module], source: str, names: Names, locked: Locked) -> nn.Module:
    """Unpickling entry: an empty instance of the generated class; its state follows."""
    kind = rewritten_class(base, source, names, locked)
    instance: nn.Module = kind.__new__(kind)
    return instance
