"""A generated forward looks, whenever it is called, whether what was baked into it still is what it was."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import types
from typing import Any

import torch
from torch import nn

from padfree.errors import LockedStateError
from padfree.record.trees import first_line
from padfree.types import NEW

CHECK = f"{NEW}check"
TENSORS = "padfree_tensors(self)"  # that names its parameters and buffers, where it walks over those
CHILDREN = "padfree_children(self)"  # the text that counts the children of a block which walks over them
SAME = "padfree_same"  # what asks whether two names mean one object
NUMPY = "padfree_numpy"  # what makes a value of numpy's one of Python's
FOREIGN = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "padfree"}  # packages whose state is not the user's
_MODULES = re.compile(r"padfree_modules\['([\w.]+)'\]")


def is_watched(name: str) -> bool:
    """Whether an entry of what is locked is Python text to evaluate, and not the name of an attribute."""
    return not name.isidentifier() and not name.startswith("<")


def check_member(base: type[nn.Module], locked: dict[str, Any]) -> dict[str, Any]:
    """The method that compares.

    Args:
        base: the block's original class.
        locked: values by attribute name, or by the Python text that reads them: `self.cfg.scale`.
    """
    texts = [name for name in locked if is_watched(name)]
    found = {name for text in texts for name in _MODULES.findall(text)}
    namespace: dict[str, Any] = {
        "padfree_children": _children,
        "padfree_name": name_of,
        "padfree_modules": {name: importlib.import_module(name) for name in found},
        "padfree_cells": _cells(base) if any("padfree_cells" in text for text in texts) else {},
        "padfree_values": tuple(locked[text] for text in texts),
        "padfree_tensors": own_tensors,
        "padfree_compiling": torch.compiler.is_dynamo_compiling,
        SAME: _same,
        NUMPY: python,
        "padfree_stale": _stale,
        "padfree_failed": _failed,
        "padfree_error": LockedStateError,
    }
    lines = [f"def {CHECK}(self):", "    try:", "        pass"]
    own = inspect.getattr_static(base, "forward", None)
    if isinstance(own, types.FunctionType):  # what is read off the class is the function itself
        namespace |= {"padfree_base": base, "padfree_forward": own, "padfree_patched": _patched}
        lines += [
            "        if padfree_base.forward is not padfree_forward:",
            "            padfree_patched(padfree_base)",
        ]
    for index, text in enumerate(texts):
        value = f"padfree_values[{index}]"
        looked = f"not padfree_compiling() and {text}" if NUMPY in text else text  # compilers make tensors of numpy's
        lines += [f"        if {looked} != {value}:", f"            padfree_stale(self, {text!r}, {value}, {text})"]
    lines += ["    except padfree_error:", "        raise"]
    lines += ["    except Exception as error:", "        padfree_failed(self, error, globals())"]
    exec("\n".join(lines), namespace)  # our own text, from the names that a forward is written with
    namespace["padfree_texts"] = tuple(texts)
    return {CHECK: namespace[CHECK]}


def _failed(module: nn.Module, error: Exception, namespace: dict[str, Any]) -> None:
    """A text that cannot be read any more: what it read is not what it was."""
    for text, was in zip(namespace["padfree_texts"], namespace["padfree_values"], strict=True):
        try:
            found = eval(text, namespace, {"self": module}) != was  # our own text, as above
            reason = "another value" if found else ""
        except Exception as why:  # whatever the user's objects raise
            reason = f"{type(why).__name__}: {first_line(why)}"
        if reason:
            raise LockedStateError(
                f"`{_worded(text)}` is baked into the converted forward of {type(module).__name__} as {was!r} and "
                f"cannot be read now ({reason}); set it back, or change it on the original model and convert again"
            ) from error
    raise error


def _same(one: Any, other: Any) -> bool:
    return one is other or one.__dict__ is other.__dict__  # an export hands out children by proxies, one for each name


def python(value: Any) -> Any:
    """A number of numpy's as one of Python's, the bytes of an array; other values as they are."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return value.tobytes()
    return value.item() if numpy is not None and isinstance(value, numpy.generic) else value


def own_tensors(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's own parameters and buffers that are not None."""
    tables = (module._parameters, module._buffers)
    return tuple(name for table in tables for name, tensor in table.items() if tensor is not None)


def _children(module: nn.Module) -> int:
    """How many children a block has, those that padfree added left out."""
    return sum(not name.startswith(NEW) for name in module._modules)


def name_of(function: Any) -> str:
    """What tells one function from another in a converted file: they are saved by name."""
    return str(getattr(function, "__qualname__", type(function).__qualname__))


_WORDS = {
    "padfree_modules": "sys.modules",
    "padfree_cells": "closure",
    "padfree_name": "name",
    SAME: "is the same",
    f"{NUMPY}(": "(",
    CHILDREN: "the number of its children",
    TENSORS: "the names of its parameters and buffers",
}


def _worded(text: str) -> str:
    for ours, word in _WORDS.items():
        text = text.replace(ours, word)
    return text


def _stale(module: nn.Module, text: str, was: Any, now: Any) -> None:
    raise LockedStateError(
        f"`{_worded(text)}` is baked into the converted forward of {type(module).__name__} as {was!r} and is {now!r} "
        "now; set it back, or change it on the original model and convert again"
    )


def _patched(base: type[nn.Module]) -> None:
    raise LockedStateError(
        f"{base.__name__}.forward is another function than the one that the converted forward was made of; "
        "set it before the conversion, and convert the original model again"
    )


def own_function(value: Any) -> types.FunctionType | None:
    """The function behind a method, a property, ... if it is a user's."""
    for name in ("fget", "__func__", "func", "__wrapped__"):
        value = getattr(value, name, value)
    ours = isinstance(value, types.FunctionType) and str(value.__module__).partition(".")[0] not in FOREIGN
    return value if ours else None


def _cells(kind: type) -> dict[str, Any]:
    """The closed-over variables of a class's functions, as cells by name."""
    found: dict[str, Any] = {}
    for owner in kind.__mro__:
        for value in vars(owner).values():
            function = own_function(value)
            if function is not None:
                found = {**dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)), **found}
    return found
