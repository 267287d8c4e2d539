"""One forward pass, written down: every operation, every module call, every value.

The pass runs on a weightless copy with meta tensors, so nothing is computed and the model's own
parameters, buffers, hooks and random state are untouched; where an operation has no meta kernel
the pass is repeated on a real copy. Operations are ATen calls seen by a `TorchDispatchMode`, so
functional code, scripted functions and modules look alike.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from padfree.errors import PadfreeError
from padfree.geometry import size_text
from padfree.indices import CallId, OpId, ValueId
from padfree.record.copies import bare_copy, kept_generators, meta_copy
from padfree.record.inputs import check_input_size, default_input_size, example_inputs, image_channels
from padfree.record.recorder import Op, Recorder, Value
from padfree.record.trees import collect, containers_copied, first_line, storage
from padfree.record.trees import names as names_of


class ForwardFailedError(Exception):
    """A recorded forward raised: the path of the module it was in, the shapes that module was given."""

    def __init__(self, path: str, shapes: list[tuple[int, ...]], cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {first_line(cause)}")
        self.path = path
        self.shapes = shapes
        self.cause = cause


@dataclass(frozen=True)
class Call:
    """One call of one module: the values that went in and out and the operations in between.

    `arguments` keeps the positional and keyword arguments as they were, tensors on meta.
    """

    index: CallId
    path: str
    parent: CallId
    inputs: tuple[ValueId, ...]
    outputs: tuple[ValueId, ...]
    ops: range
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Recording:
    """Everything one forward pass did.

    Attributes:
        model: the copy that was run (its modules are what `Call.path` names).
        example: the arguments it was run on.
        meta: whether it ran on meta tensors.
        outputs: values that came out of the model.
        names: where each of them lies in what the model returns ("" for a bare tensor).
        written: paths of the parameters and buffers that in-place operations met.
    """

    model: nn.Module = field(repr=False)
    input_size: tuple[int, ...]
    example: tuple[Any, ...] = field(repr=False)
    meta: bool
    values: tuple[Value, ...] = field(repr=False)
    ops: tuple[Op, ...] = field(repr=False)
    calls: tuple[Call, ...] = field(repr=False)
    inputs: tuple[ValueId, ...]
    outputs: tuple[ValueId, ...]
    names: tuple[str, ...] = ()
    written: frozenset[str] = frozenset()

    @functools.cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Modules by path, shared ones under their first."""
        return dict(self.model.named_modules())

    @functools.cached_property
    def consumers(self) -> dict[ValueId, list[OpId]]:
        """Operations that read each live value."""
        table: dict[ValueId, list[OpId]] = {}
        for op in self.ops:
            for value in dict.fromkeys(op.inputs):
                table.setdefault(value, []).append(op.index)
        return table

    @functools.cached_property
    def calls_of(self) -> dict[str, list[Call]]:
        """Calls by module path, in order."""
        table: dict[str, list[Call]] = {}
        for call in self.calls:
            table.setdefault(call.path, []).append(call)
        return table

    def ancestors(self, call: CallId) -> Iterator[Call]:
        """The call and those around it, innermost first."""
        while call >= 0:
            yield self.calls[call]
            call = self.calls[call].parent


class CallTracker:
    """Hooks on every module of a copy that note when its calls begin and end."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self.calls: list[Call] = []
        self._recorder = recorder
        self._tables: list[dict[Any, Any]] = []
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # a leaf: its operations are seen, its calls are not
            # what `register_forward_hook` does, without its handles and their weak references, which take longer
            before = functools.partial(self._before, path)
            for name, hook in (("_forward_pre_hooks", before), ("_forward_hooks", self._after)):
                for table, entry in ((name, hook), (f"{name}_with_kwargs", True)):
                    module.__dict__[table][self] = entry
                    self._tables.append(module.__dict__[table])

    def remove(self) -> None:
        """Take the hooks off again."""
        for table in self._tables:
            del table[self]

    def _before(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder, index = self._recorder, CallId(len(self.calls))
        inputs = self._values((args, kwargs))
        start = len(recorder.ops)
        parent = recorder.stack[-1]
        self.calls.append(Call(index, path, parent, inputs, (), range(start, start), containers_copied((args, kwargs))))
        recorder.stack.append(index)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        recorder = self._recorder
        index = recorder.stack.pop()
        call = self.calls[index]
        outputs = self._values(output)
        ops = range(call.ops.start, len(recorder.ops))
        self.calls[index] = Call(index, call.path, call.parent, call.inputs, outputs, ops, call.arguments)

    def _values(self, tree: Any) -> tuple[ValueId, ...]:
        tensors: list[torch.Tensor] = []
        collect((tree,), tensors)
        return tuple(self._recorder.value(tensor) for tensor in tensors)


def record(model: nn.Module, input_size: tuple[int, ...] | None = None, *, like: Recording | None = None) -> Recording:
    """Run `model` once on meta tensors of `input_size` (C, H, W) and write down what it does.

    Args:
        model: any module that takes an image batch (N, C, H, W), a list of images, or a video batch.
        input_size: (C, H, W); `default_input_size(model)` if not given.
        like: `model` is a copy of this recording's model already: run it as it is, on the same arguments.

    Raises:
        PadfreeError: the model does not run at that size, on meta or on real tensors.
    """
    if like is not None:
        return _run_on(model, like.input_size, like.example, like.meta)
    size = default_input_size(model) if input_size is None else check_input_size(input_size)
    skeleton = meta_copy(model)
    for channels in dict.fromkeys((size[0], *(image_channels(model) if input_size is None else ()))):
        try:
            return _run(skeleton, (channels, *size[1:]), meta=True)
        except Exception:  # whatever it was: real tensors either run, or say what is wrong
            continue
    try:
        return _run(bare_copy(model), size, meta=False)
    except Exception as error:
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        raise PadfreeError(
            f"{type(model).__name__} does not run on a {size_text(size)} input"
            f"{', without its hooks,' if hooked else ''}: "
            f"{first_line(error)}. Hint: pass input_size=(C, H, W) that the model takes"
            f"{', and let no hook make what the forward needs' if hooked else ''}"
        ) from error


def _run(model: nn.Module, size: tuple[int, ...], meta: bool) -> Recording:
    failure: Exception | None = None
    for example in example_inputs(model, size, meta):
        try:
            return _run_on(model, size, example, meta)
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _run_on(model: nn.Module, size: tuple[int, ...], example: tuple[Any, ...], meta: bool) -> Recording:
    names = {storage(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    recorder = Recorder(names)
    tensors: list[torch.Tensor] = []
    collect(example, tensors)
    inputs = tuple(recorder.enter(tensor) for tensor in tensors)
    tracker = CallTracker(model, recorder)
    try:
        with kept_generators(seed=0), recorder:  # two forwards of one network draw the same numbers
            result = model(*example)
    except Exception as error:
        where = tracker.calls[recorder.stack[-1]] if recorder.stack[-1] >= 0 else None
        shapes = [recorder.values[value].shape for value in where.inputs] if where is not None else []
        raise ForwardFailedError("" if where is None else where.path, shapes, error) from error
    try:
        found: list[torch.Tensor] = []
        collect((result,), found)
        outputs = tuple(recorder.value(tensor) for tensor in found)
    finally:
        tracker.remove()
    values, ops, calls = tuple(recorder.values), tuple(recorder.ops), tuple(tracker.calls)
    held, written = tuple(names_of(result)), frozenset(recorder.written)
    return Recording(model, size, example, meta, values, ops, calls, inputs, outputs, held, written)


def path_of(recording: Recording, op: Op) -> str:
    """Path of the module whose forward issued an operation."""
    return recording.calls[op.call].path if op.call >= 0 else ""


def shape_at(recording: Recording, path: str) -> str:
    """The shape that a module is given first, in words."""
    calls = recording.calls_of.get(path, [])
    shapes = [recording.values[value].shape for call in calls[:1] for value in call.inputs[:1]]
    return str(shapes[0]) if shapes else "not called"
