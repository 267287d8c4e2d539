"""What a forward reads through other objects: `self.cfg.scale`, a class attribute, a global, the layers of a list.

A trace bakes these values into its graph. They are found by the words that the forward, and what it calls, are written
with (`words.py`): attributes, globals and closed-over variables that its code names, keys and indices that it may use.
A generated forward compares them with what they were whenever it is called (not under TorchScript, which bakes them
itself).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from padfree.rewrite.forward import Locked, access
from padfree.rewrite.plain import is_plain
from padfree.rewrite.spy import ABSENT, Spy, is_class_state
from padfree.rewrite.stale import CHILDREN, SAME, TENSORS, own_function, own_tensors
from padfree.rewrite.values import STEPS, WALKS, Values
from padfree.rewrite.views import SEALED
from padfree.rewrite.words import Words, words_of
from padfree.types import NEW

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)
_CHILDREN = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})
_TENSORS = frozenset({"parameters", "named_parameters", "_parameters", "buffers", "named_buffers", "_buffers"})


def watched(module: nn.Module, spy: Spy, called: set[str], live: set[str]) -> Locked:
    """What is baked into a trace of `module`, but what the spy locks: attributes, or Python text that reads a value.

    Args:
        module: whose forward was traced.
        spy: that watched it.
        called: targets of the calls in the trace, by path.
        live: those of the parameters and buffers that it reads.
    """
    reads = {name: value for name, value in spy.reads.items() if name not in live}
    words = words_of(type(module), reads)
    words.keys |= {value for value in reads.values() if isinstance(value, (str, int)) and is_plain(value)}
    paths = {id(inner): path for path, inner in module.named_modules()}
    values = Values(words, paths)
    past = {name: module.__dict__.get(name, ABSENT) for name in words.in_dict - set(nn.Module().__dict__)}
    found = {name: value for name, value in past.items() if is_plain(value)}  # locked by name
    found |= _own(module, {**past, **reads}, values) | _of_class(module, reads, words, values)
    for text, value in words.variables.values():
        found |= values.leaves(text, value)
    walks = isinstance(module, _CONTAINERS) or bool(_CHILDREN & words.attributes)  # over its own
    if walks:
        found[CHILDREN] = sum(not name.startswith(NEW) for name in module._modules)
    if _TENSORS & words.attributes:
        found[TENSORS] = own_tensors(module)
    named = set(module._modules) if walks else words.attributes
    found |= _children(module, words, values, named, called | live)
    found |= _aliases(module, set(module._modules) if walks else spy.names, called | live)
    sizes = ("len(", "tuple(")  # first, since their change says most
    return tuple(sorted(found.items(), key=lambda item: (not item[0].startswith(sizes), item[0])))


def _own(module: nn.Module, reads: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """What the module's own attributes, and those of its class, lead to."""
    found: dict[str, Any] = {}
    for name, value in reads.items():
        of_class = name not in module.__dict__  # past the lock
        plain = not of_class and is_plain(value)
        if name.isidentifier() and not plain and not (of_class and _is_missing(module, name, value)):
            found |= values.leaves(f"self.{name}", value)
    return found


def _is_missing(module: nn.Module, name: str, value: Any) -> bool:
    """Whether there is none, or it is a child, parameter or buffer that is None: locked by name."""
    tables = (module._modules, module._parameters, module._buffers)
    return value is ABSENT or any(name in table for table in tables)


def _of_class(module: nn.Module, reads: Mapping[str, Any], words: Words, values: Values) -> dict[str, Any]:
    """Attributes that a class has or lacks, where the forward reads them past the instance or found none."""
    kind = type(module)
    found: dict[str, Any] = {}
    for name in sorted(words.attributes) if words.of_class else ():
        if not name.startswith("__") and is_class_state(kind, name):
            found |= values.leaves(f"type(self).{name}", inspect.getattr_static(kind, name), STEPS)
    answers = kind.__getattr__ is not nn.Module.__getattr__  # by code of the user's, from anything
    for name, value in reads.items():
        if value is ABSENT and name.isidentifier() and not hasattr(module if answers else kind, name):
            found[f"hasattr({'self' if answers else 'type(self)'}, {name!r})"] = False
    return found


def _children(module: nn.Module, words: Words, values: Values, named: set[str], called: set[str]) -> dict[str, Any]:
    """What the forward asks and reads of its children, and how many there are in those that it takes apart."""
    found: dict[str, Any] = {}
    by_name = words.attributes | {str(key) for key in words.keys}
    layers = [(path, child) for path, child in module.named_modules() if path and path.count(".") < STEPS]
    asked = [(path, child) for path, child in layers if _first(path) in named]
    found |= words.questions.answers(
        (access(path), child) for path, child in asked if _apart(path, called) or by_name.issuperset(path.split("."))
    )
    for path, child in asked:
        found |= _layers(path, child, words, called) if _first(path) in words.attributes else {}
        if isinstance(child, nn.Module) and not isinstance(child, torch.jit.ScriptModule):
            found |= values.attributes(access(path), child, 0)
            found |= _methods(module, path, child, words)
    return found


def _first(path: str) -> str:
    return path.partition(".")[0]


def _apart(path: str, called: set[str]) -> bool:
    """Whether no module is called that this one lies in, whose business it would be."""
    names = path.split(".")
    return not any(".".join(names[:depth]) in called for depth in range(1, len(names)))


def _layers(path: str, child: nn.Module, words: Words, called: set[str]) -> dict[str, Any]:
    """The length of a container that the forward takes apart, its keys where it walks over them."""
    if not isinstance(child, _CONTAINERS) or path in called or not _apart(path, called):
        return {}
    text = access(path)
    if isinstance(child, (nn.ModuleDict, nn.ParameterDict)):
        walked = bool(WALKS & words.attributes) or path.rpartition(".")[2] in words.walked
        by_key = set(child.keys()) <= words.keys and not walked
        return {} if by_key else {f"tuple({text}.keys())": tuple(child.keys())}
    return {f"len({text})": len(child)}


def _methods(module: nn.Module, path: str, child: nn.Module, words: Words) -> dict[str, Any]:
    """What a child's own methods and properties read, those that the forward may call."""
    kind = type(child)
    names = [
        name
        for name in words.attributes
        if own_function(inspect.getattr_static(kind, name, None)) is not None
        and not (hasattr(nn.Module, name) or hasattr(module, name) or name == "forward")
    ]
    if not names:
        return {}
    inner = words_of(kind, {}, names)
    values = Values(inner, {id(below): "" for below in child.modules()})
    found = values.attributes(access(path), child, STEPS - 1)
    for text, value in inner.variables.values():
        found |= values.leaves(text, value) if text.startswith("padfree_modules") else {}
    return found


def _aliases(module: nn.Module, named: set[str], called: set[str]) -> dict[str, Any]:
    """That two names still mean one child or parameter: a trace calls it by the first, its forward by any.

    Args:
        module: whose forward was traced.
        named: names of children, parameters and buffers that the forward reads.
        called: targets of the calls and tensors in the trace.
    """
    paths: dict[int, list[str]] = {}
    for pairs in (module.named_modules(remove_duplicate=False), module.named_parameters(remove_duplicate=False)):
        for path, each in pairs:
            paths.setdefault(id(each), []).append(path)
    found: dict[str, Any] = {}
    for names in paths.values():
        for target in called.intersection(names) if len(names) > 1 else ():
            others = (name for name in names if name != target and _first(name) in named and _apart(name, called))
            found |= {f"{SAME}({access(name)}, {access(target)})": True for name in others}
    return found


def without_reads(locked: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """What is locked, without what is read of these children or attributes, which are others now."""
    texts = [re.compile(rf"{re.escape(access(path))}(?!\w)") for path in paths]
    return {name: value for name, value in locked.items() if not any(text.search(name) for text in texts)}


def carried(module: nn.Module, live: set[str]) -> dict[str, Any]:
    """What an earlier conversion of this module baked, and a trace of its generated forward does not show."""
    locked: dict[str, Any] = dict(getattr(type(module), "_padfree_recipe", ("", (), ()))[2])
    return {name: value for name, value in locked.items() if name not in live and name != SEALED}
