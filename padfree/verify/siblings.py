"""Whether the methods that a network offers beside `forward` still give what its forward gives.

`forward_intermediates`, `forward_head` and their like, and all methods of a module whose own forward was rewritten that
name its children and take what the forward takes, run code of their own over the same children: past the forwards
that the conversion generated, or with sizes that it changed. Each is run on weightless tensors, and values are told by
how they were computed: operations, their arguments and the weights they read, views left out. A method agrees when

1. it runs where it ran before;
2. it returns as many tensors, of as many channels;
3. where it returned a value of the original forward, it returns what the converted forward has in that value's place:
   what the same modules read, or else what the same module returns;
4. where it made something else of values of the forward, it computes what is in their places now;
5. beside the convolutions that it runs on what the forward runs them on, it runs the max-pools that the forward does.

A method that the forward itself calls is the forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from padfree.analysis.kinds import VIEWS, plain_kind
from padfree.errors import PadfreeError
from padfree.indices import ValueId
from padfree.record.copies import full_copy
from padfree.record.recorder import NO_OP, Op, Recorder, Value
from padfree.record.recording import Call, Recording, record
from padfree.record.trees import Ref, first_line, storage, tensors
from padfree.rewrite.effects import methods_naming
from padfree.rewrite.forward import has_generated_forward, original_class
from padfree.rewrite.operations import Refuse
from padfree.rewrite.refusing import refused_methods

_NAMED = ("get_intermediate_layers",)
_PREFIX = "forward_"
_ACTING = frozenset({"backward", "step", "zero_grad", "save", "open", "print", "log", "write"})
"""What a method that does more than compute is written with; it is not run."""
_FEATURES, _HEAD = "forward_features", "forward_head"


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
        calls = before.calls_of.get(path, [])
        if len(calls) == 1 and not calls[0].arguments[1]:  # its arguments are positional
            pair = _Pair(before, path, original.get_submodule(path), converted.get_submodule(path))
            refused = tuple((name, why) for name in names if (why := pair.difference(name)))
            found += [Refuse(path, refused)] if refused else []
    return tuple(found)


def _methods(module: nn.Module) -> list[str]:
    kind = type(module)
    offered = [name for name in dir(kind) if name.startswith(_PREFIX) or name in _NAMED]
    if has_generated_forward(module):
        found = methods_naming(original_class(module), module._modules, but=_ACTING)
        offered += [name for name, _ in found if name not in offered]
    refused = dict(refused_methods(kind))
    return [name for name in offered if inspect.isfunction(inspect.getattr_static(kind, name)) and name not in refused]


@dataclass(frozen=True)
class _Run:
    """What a method did: the values it returned, how each value was computed, and from which others."""

    returned: tuple[Value, ...]
    prints: list[int]
    ops: list[Op]
    values: list[Value]

    def made_of(self, known: frozenset[int], value: ValueId) -> set[int]:
        """Those of the `known` prints that a value is made of by way of none other."""
        found: set[int] = set()
        seen, stack = {value}, [value]
        while stack:
            current = stack.pop()
            if self.prints[current] in known:
                found.add(self.prints[current])
            elif self.values[current].producer != NO_OP:
                new = set(self.ops[self.values[current].producer].inputs) - seen
                seen |= new
                stack += new
        return found


class _Pair:
    """A module as it was and as it is, run on the arguments that it was called on."""

    def __init__(self, before: Recording, path: str, original: nn.Module, converted: nn.Module) -> None:
        self._before = before
        self._path = path
        self._original = original
        self._converted = converted
        self._example: tuple[Any, ...] = before.calls_of[path][0].arguments[0]
        self._called: set[str] = set()  # methods that the converted forward itself calls
        self._after = self._noted_forward()

    def difference(self, name: str) -> str:
        """Why a method does not agree any more; "" where it does, or where it does not run on such arguments."""
        inner = (_FEATURES, _HEAD) if name == _HEAD else (name,)
        if self._after is None or self._called.issuperset(inner):  # it takes no map of the size that it had, or is it
            return ""
        was = self._tried(self._original, name)
        if was is None:
            return ""
        try:
            now = _run(self._converted, _method(self._converted, name), self._example)
        except PadfreeError:  # it raises by itself, and says what to do
            return ""
        except Exception as error:  # whatever its code does with other sizes
            return f"it fails with {type(error).__name__}: {first_line(error)}"
        if len(was.returned) != len(now.returned):
            return f"it returns {len(now.returned)} tensors instead of {len(was.returned)}"
        pairs = enumerate(zip(was.returned, now.returned, strict=True))
        reasons = ((index, self._compared(was, now, *pair)) for index, pair in pairs)
        found = next((f"tensor {index} that it returns {why}" for index, why in reasons if why), "")
        return found or ("it runs past a max-pool of the forward" if self._lost_pool(now) else "")

    def _lost_pool(self, now: _Run) -> bool:
        """Whether a method runs a convolution of the forward, on what that runs it on, without the max-pool beside."""
        assert self._after is not None
        recording, prints = self._after, self._prints_after
        wanted: dict[int, set[int]] = {}
        for op in recording.ops:
            if op.kind == "convolution" and op.inputs:  # else of what no image is in: a position encoding
                readers = (recording.ops[reader] for reader in recording.consumers.get(op.inputs[0], ()))
                pools = {prints[pool.outputs[0]] for pool in readers if "max_pool" in pool.kind}
                wanted.setdefault(prints[op.outputs[0]], set()).update(pools)
        made = set(now.prints)
        return any(not pools <= made for conv, pools in wanted.items() if conv in made)

    def _compared(self, was: _Run, now: _Run, old: Value, new: Value) -> str:
        how = was.prints[old.index]
        there = self._places.get(how)
        if there:
            if now.prints[new.index] not in there:
                return "is not what the forward has there"
        elif how not in self._places:
            made_of = (self._places[inner] for inner in was.made_of(frozenset(self._places), old.index))
            if any(places and places.isdisjoint(now.prints) for places in made_of):
                return "is made of other values than the forward's"
        a, b = old.shape, new.shape
        if len(a) != len(b) or (len(a) > 1 and a[1] != b[1] and a[-1] != b[-1]):
            return f"would be of shape {b} instead of {a}"
        return ""

    @functools.cached_property
    def _places(self) -> dict[int, set[int]]:
        """By how a value of the original forward was computed, how those were that the converted one has in its place.

        None are known for a value that no module reads or returns.
        """
        before = self._before
        if self._path:
            before = record(self._original, like=replace(before, example=self._example))
        assert self._after is not None
        was, now = _prints(before.values, before.ops, before.inputs), self._prints_after
        places: dict[int, set[int]] = {was[value.index]: set() for value in before.values if value.live}
        there = dict(_numbered(self._after.calls))
        pairs = [(call, there[key]) for key, call in _numbered(before.calls) if key in there]
        for old, new in pairs:
            for value, instead in zip(old.inputs, new.inputs, strict=False):
                places.setdefault(was[value], set()).add(now[instead])
        for old, new in pairs:  # the outermost first
            for value, instead in zip(old.outputs, new.outputs, strict=False):
                if not places.setdefault(was[value], set()):
                    places[was[value]].add(now[instead])
        return places

    @functools.cached_property
    def _prints_after(self) -> list[int]:
        assert self._after is not None
        return _prints(self._after.values, self._after.ops, self._after.inputs)

    def _noted_forward(self) -> Recording | None:
        module = self._converted
        names = [name for name in _methods(module) if name not in module.__dict__]
        for name in names:
            module.__dict__[name] = _noting(getattr(module, name), name, self._called)
        try:
            return record(module, like=replace(self._before, example=self._example))
        except Exception:  # it takes no map of the size that it had
            return None
        finally:
            for name in names:
                del module.__dict__[name]

    def _tried(self, module: nn.Module, name: str) -> _Run | None:
        try:
            return _run(module, _method(module, name), self._example)
        except Exception:  # it takes other arguments
            return None


def _numbered(calls: Iterable[Call]) -> Iterator[tuple[tuple[str, int], Call]]:
    """Calls by module path and how often it was called before."""
    count: dict[str, int] = {}
    for call in calls:
        count[call.path] = count.get(call.path, -1) + 1
        yield (call.path, count[call.path]), call


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


def _run(module: nn.Module, run: Callable[..., Any], example: tuple[Any, ...]) -> _Run:
    named = (*module.named_parameters(), *module.named_buffers())
    recorder = Recorder({storage(tensor): name for name, tensor in named})
    given = [recorder.enter(tensor) for tensor in tensors(example)]
    with recorder:
        result = run(*example)
    returned = tuple(recorder.values[recorder.value(tensor)] for tensor in tensors((result,)))
    return _Run(returned, _prints(recorder.values, recorder.ops, given), recorder.ops, recorder.values)


def _prints(values: Sequence[Value], ops: Iterable[Op], given: Iterable[ValueId]) -> list[int]:
    """What tells by value index how each was computed."""
    prints = [hash((value.name, value.shape)) for value in values]
    for position, index in enumerate(given):
        prints[index] = hash(("input", position))
    for op in ops:
        if plain_kind(op) in VIEWS and len(op.inputs) == 1:
            for out in op.outputs:
                prints[out] = prints[op.inputs[0]]
            continue
        whole = hash((plain_kind(op), *_resolved(op.args, prints)))
        for place, out in enumerate(op.outputs):
            prints[out] = hash((whole, place))
    return prints


def _resolved(tree: Iterable[Any], prints: list[int]) -> Iterator[Any]:
    """Recorded arguments, tensors as how they were computed, everything else as text."""
    for item in tree:
        if isinstance(item, Ref):
            yield prints[item.value]
        elif isinstance(item, tuple):
            yield tuple(_resolved(item, prints))
        else:
            yield repr(item)
