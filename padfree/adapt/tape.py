"""A forward pass as a list of operations that can be run again, from any of them to any other, on other images.

`record` writes down what a network does without computing it; a tape also keeps what the operations were called with,
so that images can be taken through a network piece by piece: to a place where statistics are needed, twice through a
piece with and without its max-pool, on with the weights that were changed meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from padfree.record.quick import TorchDispatchMode
from padfree.record.trees import geometry_key, mapped, storage, tensors


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor among an operation's arguments."""

    number: int


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        func: the operator of torch.
        args, kwargs: what it is called with; `Slot`s stand for tensors.
        reads, writes: slots.
        path: path of the innermost module whose forward issued it.
        mutates: whether it writes into one of its arguments.
    """

    func: Any
    args: Any
    kwargs: Any
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    path: str
    mutates: bool

    @property
    def kind(self) -> str:
        """The operator's name, without its overload."""
        return str(self.func.__name__).split(".")[0]


Env = dict[int, Tensor]
"""The tensors of some slots."""


@dataclass(frozen=True)
class Tape:
    """The operations of one forward pass, for batches of one shape.

    Attributes:
        steps: in order.
        entry: the slot of the images.
        exits: the slots of the tensors that the network returns.
        constants: tensors that no operation makes: parameters, buffers and others.
        sizes: bytes of each slot.
    """

    steps: tuple[Step, ...]
    entry: int
    exits: tuple[int, ...]
    constants: Env = field(repr=False)
    sizes: Mapping[int, int] = field(repr=False)
    storages: Mapping[int, int] = field(repr=False)
    last: Mapping[int, int] = field(repr=False)

    def run(self, env: Env, start: int, stop: int, replaced: Mapping[int, Callable[..., Any]] | None = None) -> None:
        """Carry out steps `start` to `stop` - 1 on `env`, letting go of what no later step reads.

        Args:
            env: the slots that are alive at `start`; becomes those at `stop`.
            start: the first step.
            stop: the step before which it ends.
            replaced: functions that are called in the place of some steps' operators.
        """
        constants, replaced = self.constants, replaced or {}
        for index in range(start, stop):
            step = self.steps[index]

            def held(item: Any) -> Any:
                if type(item) is not Slot:
                    return item
                return constants[item.number] if item.number in constants else env[item.number]

            func = replaced.get(index, step.func)
            made = func(*mapped(step.args, held), **mapped(step.kwargs, held))
            env.update(zip(step.writes, tensors((made,)), strict=True))
            for slot in (*step.reads, *step.writes):
                if self.last[slot] == index:
                    env.pop(slot, None)

    def fork(self, env: Env, start: int, stop: int) -> Env:
        """A copy of `env` that steps `start` to `stop` - 1 may be run on, leaving `env` as it is."""
        if not any(step.mutates for step in self.steps[start:stop]):
            return dict(env)
        return {slot: tensor.clone() for slot, tensor in env.items()}

    def alive(self, position: int) -> tuple[int, ...]:
        """The slots that steps from `position` on read, and earlier ones make."""
        return self._alive[position]

    @property
    def _alive(self) -> list[tuple[int, ...]]:
        found = self.__dict__.get("_alive_table")
        if found is None:
            current, found = {self.entry}, []
            for index, step in enumerate(self.steps):
                found.append(tuple(sorted(current)))
                current.update(step.writes)
                current -= {slot for slot in (*step.reads, *step.writes) if self.last[slot] == index}
            found.append(tuple(sorted(current)))
            self.__dict__["_alive_table"] = found
        return found

    def narrowest(self, low: int, high: int) -> int:
        """The step from `low` to `high` before which the fewest bytes are alive, none of them in two tensors."""
        best, least = low, None
        for position in range(low, high + 1):
            slots = self.alive(position)
            held = [self.storages[slot] for slot in slots]
            if position > low and len(set(held)) < len(held):
                continue
            total = sum(self.sizes[slot] for slot in slots)
            if least is None or total <= least:
                best, least = position, total
        return best

    def find(self, path: str, *kinds: str) -> list[int]:
        """The steps of these kinds that a module's own forward issues."""
        return [index for index, step in enumerate(self.steps) if step.path == path and step.kind in kinds]

    def reader(self, slot: int, *kinds: str) -> int:
        """The step of one of these kinds that reads a slot, or what steps that alone read it make of it."""
        for index, step in enumerate(self.steps):
            if slot in step.reads:
                if step.kind in kinds:
                    return index
                slot = step.writes[0]
        raise KeyError(kinds)

    def source(self, index: int, argument: int = 0) -> int:
        """The slot of a step's tensor argument."""
        slot = self.steps[index].args[argument]
        assert isinstance(slot, Slot)
        return slot.number


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, images: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.stack: list[str] = [""]
        self.constants: Env = {}
        self.sizes: dict[int, int] = {}
        self.storages: dict[int, int] = {}
        self._slots: dict[tuple[Any, ...], int] = {}
        self._roots: dict[int, int] = {}  # storages that live, by what tells them apart now
        self.entry = self._new(images, fresh=True)

    def _new(self, tensor: Tensor, fresh: bool) -> int:
        slot = len(self.sizes)
        self._slots[geometry_key(tensor)] = slot
        place = storage(tensor)
        if fresh or place not in self._roots:
            self._roots[place] = slot
        self.storages[slot] = self._roots[place]
        self.sizes[slot] = tensor.numel() * tensor.element_size()
        return slot

    def slot(self, tensor: Tensor) -> int:
        found = self._slots.get(geometry_key(tensor))
        if found is None:
            found = self._new(tensor, fresh=True)
            self.constants[found] = tensor
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__.startswith("lift_fresh"):  # of a tensor made from Python's numbers
            self._slots.pop(geometry_key(args[0]), None)
        given = tensors((args, kwargs))
        old = {storage(tensor) for tensor in given}

        def described(item: Any) -> Any:
            return Slot(self.slot(item)) if isinstance(item, Tensor) else item

        kept, named = mapped(args, described), mapped(kwargs, described)
        reads = tuple(self.slot(tensor) for tensor in given)
        result = func(*args, **kwargs)
        writes = tuple(self._new(made, fresh=storage(made) not in old) for made in tensors((result,)))
        mutates = bool(func._schema.is_mutable)
        self.steps.append(Step(func, kept, named, reads, writes, self.stack[-1], mutates))
        return result


def record_tape(model: nn.Module, images: Tensor) -> Tape:
    """Run a model once on these images and write down what can be run again.

    Args:
        model: a copy without hooks, in eval mode; its tensors are those that the tape reads.
        images: (N, C, H, W).
    """
    recorder = _Recorder(images)
    with _entered(model, recorder), recorder:
        result = model(images)
    exits = tuple(recorder.slot(tensor) for tensor in tensors((result,)))
    last: dict[int, int] = {}
    for index, step in enumerate(recorder.steps):
        last.update(dict.fromkeys((*step.writes, *step.reads), index))
    last.update(dict.fromkeys(exits, len(recorder.steps)))
    return Tape(
        tuple(recorder.steps),
        recorder.entry,
        exits,
        recorder.constants,
        recorder.sizes,
        recorder.storages,
        last,
    )


def _enter(stack: list[str], path: str, *_: Any) -> None:
    stack.append(path)


class _entered:
    """Hooks on every module that note whose forward runs."""

    def __init__(self, model: nn.Module, recorder: _Recorder) -> None:
        self._handles = list(self._hooks(model, recorder.stack))

    @staticmethod
    def _hooks(model: nn.Module, stack: list[str]) -> Iterator[Any]:
        def left(*_: Any) -> None:
            stack.pop()

        for path, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                yield module.register_forward_pre_hook(functools.partial(_enter, stack, path))
                yield module.register_forward_hook(left)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
