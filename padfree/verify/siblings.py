"""Whether the methods that a network offers beside `forward` still give what its forward gives.

`forward_intermediates`, `forward_head` and their like run code of their own over the same children: past the forwards
that the conversion generated, or with sizes that it changed. Each is run on weightless tensors, and what it returns is
told by how it was computed: operations, their arguments and the weights they read, views left out. A method agrees when

1. it runs where it ran before;
2. it returns as many tensors, of as many channels;
3. what the original forward computed too, the converted forward computes too.

A method that the forward itself calls is the forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from padfree.analysis.kinds import VIEWS, plain_kind
from padfree.record.copies import full_copy
from padfree.record.recorder import Recorder
from padfree.record.recording import Recording
from padfree.record.trees import Ref, first_line, storage, tensors
from padfree.rewrite.operations import Refuse
from padfree.rewrite.refusing import refused_methods

_NAMED = ("get_intermediate_layers",)
_PREFIX = "forward_"
_FEATURES, _HEAD = "forward_features", "forward_head"


@dataclass(frozen=True)
class _Returned:
    """What a method returned: how each tensor was computed, and its shape; `known` is all that was computed."""

    prints: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    known: frozenset[int]


def disagreeing(before: Recording, converted: nn.Module) -> tuple[Refuse, ...]:
    """Methods of a converted copy that no longer agree with its forward, as operations that let them raise.

    Args:
        before: the recording of the model as it was.
        converted: a copy of its model that the operations of a conversion were carried out on.
    """
    offering = {path: names for path, module in converted.named_modules() if (names := _methods(module))}
    if not offering:
        return ()
    original = full_copy(before.model)
    found = []
    for path, names in offering.items():
        example = _example(before, path)
        if example is None:
            continue
        pair = _Pair(original.get_submodule(path), converted.get_submodule(path), example)
        refused = tuple((name, why) for name in names if (why := pair.difference(name)))
        if refused:
            found.append(Refuse(path, refused))
    return tuple(found)


def _methods(module: nn.Module) -> list[str]:
    kind = type(module)
    offered = [name for name in dir(kind) if name.startswith(_PREFIX) or name in _NAMED]
    refused = dict(refused_methods(kind))
    return [name for name in offered if inspect.isfunction(inspect.getattr_static(kind, name)) and name not in refused]


def _example(before: Recording, path: str) -> tuple[Any, ...] | None:
    """What a module is called on, if that is once and without keywords."""
    calls = before.calls_of.get(path, [])
    return calls[0].arguments[0] if len(calls) == 1 and not calls[0].arguments[1] else None


class _Pair:
    """A module as it was and as it is, run on the same arguments."""

    def __init__(self, original: nn.Module, converted: nn.Module, example: tuple[Any, ...]) -> None:
        self._original = original
        self._converted = converted
        self._example = example
        self._called: set[str] = set()  # methods that the converted forward itself calls
        self._forward = self._noted_forward()

    def difference(self, name: str) -> str:
        """Why a method does not agree any more; "" where it does, or where it does not run on such arguments."""
        inner = (_FEATURES, _HEAD) if name == _HEAD else (name,)
        if self._forward is None or self._called.issuperset(inner):  # it takes no map of the size that it had, or is it
            return ""
        try:
            now = _run(self._converted, _method(self._converted, name), self._example)
        except Exception as error:  # whatever its code does with other sizes
            return "" if self._before(name) is None else f"it fails with {type(error).__name__}: {first_line(error)}"
        if self._forward.known.issuperset(now.prints):
            return ""  # what the forward computes has the sizes that it has there
        was = self._before(name)
        return "" if was is None else self._compared(was, now, self._forward.known)

    def _compared(self, was: _Returned, now: _Returned, known: frozenset[int]) -> str:
        if len(was.prints) != len(now.prints):
            return f"it returns {len(now.prints)} tensors instead of {len(was.prints)}"
        known_before = frozenset() if self._forward_before is None else self._forward_before.known
        for index, (before, after) in enumerate(zip(was.prints, now.prints, strict=True)):
            if before in known_before and after not in known:
                return f"tensor {index} that it returns is none that the forward computes"
            shape, new = was.shapes[index], now.shapes[index]
            axes = [axis for axis in range(1, len(shape)) if new[axis : axis + 1] == shape[axis : axis + 1]]
            if len(shape) != len(new) or (len(shape) > 1 and not {1, len(shape) - 1}.intersection(axes)):
                return f"tensor {index} that it returns would be of shape {new} instead of {shape}"
        return ""

    def _noted_forward(self) -> _Returned | None:
        module = self._converted
        names = [name for name in _methods(module) if name not in module.__dict__]
        for name in names:
            module.__dict__[name] = _noting(getattr(module, name), name, self._called)
        try:
            return _tried(module, module, self._example)
        finally:
            for name in names:
                del module.__dict__[name]

    @functools.cached_property
    def _forward_before(self) -> _Returned | None:
        return _tried(self._original, self._original, self._example)

    def _before(self, name: str) -> _Returned | None:
        return _tried(self._original, _method(self._original, name), self._example)


def _method(module: Any, name: str) -> Callable[..., Any]:
    if name != _HEAD or not hasattr(module, _FEATURES):
        method: Callable[..., Any] = getattr(module, name)
        return method
    return lambda *example: module.forward_head(module.forward_features(*example))


def _noting(method: Callable[..., Any], name: str, called: set[str]) -> Callable[..., Any]:
    def noting(*args: Any, **kwargs: Any) -> Any:
        called.add(name)
        return method(*args, **kwargs)

    return noting


def _tried(module: nn.Module, run: Callable[..., Any], example: tuple[Any, ...]) -> _Returned | None:
    try:
        return _run(module, run, example)
    except Exception:  # it takes other arguments, or refuses itself
        return None


def _run(module: nn.Module, run: Callable[..., Any], example: tuple[Any, ...]) -> _Returned:
    named = (*module.named_parameters(), *module.named_buffers())
    recorder = Recorder({storage(tensor): name for name, tensor in named})
    given = [recorder.enter(tensor) for tensor in tensors(example)]
    with recorder:
        result = run(*example)
    returned = tensors((result,))
    last = [recorder.value(tensor) for tensor in returned]
    prints = _prints(recorder, given)
    shapes = tuple(tuple(tensor.shape) for tensor in returned)
    return _Returned(tuple(prints[value] for value in last), shapes, frozenset(prints))


def _prints(recorder: Recorder, given: list[Any]) -> list[int]:
    """What tells by value index how each was computed."""
    prints = [hash((value.name, value.shape)) for value in recorder.values]
    for position, index in enumerate(given):
        prints[index] = hash(("input", position))
    for op in recorder.ops:
        if plain_kind(op) in VIEWS and len(op.inputs) == 1:
            for out in op.outputs:
                prints[out] = prints[op.inputs[0]]
            continue
        whole = hash((plain_kind(op), *_resolved(op.args, prints)))
        for place, out in enumerate(op.outputs):
            prints[out] = hash((whole, place))
    return prints


def _resolved(tree: Any, prints: list[int]) -> Iterator[Any]:
    """Recorded arguments, tensors as how they were computed, everything else as text."""
    for item in tree:
        if isinstance(item, Ref):
            yield prints[item.value]
        elif isinstance(item, tuple):
            yield tuple(_resolved(item, prints))
        else:
            yield repr(item)
