"""One forward pass, written down: every operation, every module call, every value.

The pass runs on a weightless copy with meta tensors, so nothing is computed and the model's own
parameters, buffers, hooks and random state are untouched; where an operation has no meta kernel
the pass is repeated on a real copy. Operations are ATen calls seen by a `TorchDispatchMode`, so
functional code, scripted functions and modules look alike.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from padfree.errors import PadfreeError
from padfree.recorder import Op, Recorder, Value, collect, containers_copied, first_line, storage
from padfree.skeleton import bare_copy, meta_copy


class ForwardFailedError(Exception):
    """A recorded forward raised: the path of the module it was in, the shapes that module was given."""

    def __init__(self, path: str, shapes: list[tuple[int, ...]], cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {first_line(cause)}")
        self.path = path
        self.shapes = shapes
        self.cause = cause


_MOST_CHANNELS = 16  # of an image


@dataclass(frozen=True)
class Call:
    """One call of one module: the values that went in and out and the operations in between.

    `arguments` keeps the positional and keyword arguments as they were, tensors on meta.
    """

    index: int
    path: str
    parent: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ops: range
    arguments: tuple[tuple[Any, ...], dict[str, Any]] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Recording:
    """Everything one forward pass did.

    Attributes:
        model: the copy that was run (its modules are what `Call.path` names).
        example: the arguments it was run on.
        meta: whether it ran on meta tensors.
        outputs: live values that came out of the model.
    """

    model: nn.Module = field(repr=False)
    input_size: tuple[int, ...]
    example: tuple[Any, ...] = field(repr=False)
    meta: bool
    values: tuple[Value, ...] = field(repr=False)
    ops: tuple[Op, ...] = field(repr=False)
    calls: tuple[Call, ...] = field(repr=False)
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @functools.cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Modules by path, shared ones under their first."""
        return dict(self.model.named_modules())

    @functools.cached_property
    def consumers(self) -> dict[int, list[int]]:
        """Operations that read each live value."""
        table: dict[int, list[int]] = {}
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

    def ancestors(self, call: int) -> Iterator[Call]:
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
        recorder, index = self._recorder, len(self.calls)
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

    def _values(self, tree: Any) -> tuple[int, ...]:
        tensors: list[torch.Tensor] = []
        collect((tree,), tensors)
        return tuple(self._recorder.value(tensor) for tensor in tensors)


def default_input_size(model: nn.Module) -> tuple[int, ...]:
    """(C, H, W) from the model's `pretrained_cfg` or `default_cfg`, else (3, 224, 224), or (3, 16, 224, 224) for video.

    A converted model's is the size it was converted at. The channel count of a model built with `in_chans=` is read
    from its first convolution.
    """
    planned = getattr(getattr(model, "padfree_plan", None), "input_size", None)
    if planned is not None:
        return check_input_size(planned)
    size: tuple[int, ...] = (3, 224, 224)
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, name, None)
        found = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
        if found:
            size = tuple(int(side) for side in found)
            break
    convs = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))]
    first = next((conv for conv in convs if isinstance(conv, nn.Conv2d)), None)
    if convs and first is None and len(size) == 3:
        return (size[0], 16, *size[1:])  # a video network
    if first is None or first.in_channels > _MOST_CHANNELS or len(size) != 3:
        return size
    return (first.in_channels, *size[1:])


def check_input_size(size: Any) -> tuple[int, ...]:
    """`size` as a tuple of 3 positive integers (C, H, W), or 4 for video (C, T, H, W).

    Raises:
        PadfreeError: it is not.
    """
    try:
        checked = tuple(int(side) for side in size)
        if len(checked) not in (3, 4) or min(checked) < 1 or any(a != b for a, b in zip(checked, size, strict=True)):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise PadfreeError(f"input_size is {size!r}; it takes (C, H, W), three positive integers") from None
    return checked


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
    for channels in dict.fromkeys((size[0], *(_channels(model) if input_size is None else ()))):
        try:
            return _run(skeleton, (channels, *size[1:]), meta=True)
        except Exception:  # whatever it was: real tensors either run, or say what is wrong
            continue
    try:
        return _run(bare_copy(model), size, meta=False)
    except Exception as error:
        shape = "x".join(map(str, size))
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        raise PadfreeError(
            f"{type(model).__name__} does not run on a {shape} input{', without its hooks,' if hooked else ''}: "
            f"{first_line(error)}. Hint: pass input_size=(C, H, W) that the model takes"
            f"{', and let no hook make what the forward needs' if hooked else ''}"
        ) from error


def _channels(model: nn.Module) -> Iterator[int]:
    """Channels of an image that some convolution may read: the one registered first need not be the first to run."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.in_channels <= _MOST_CHANNELS:
            yield module.in_channels


def example_inputs(model: nn.Module, size: tuple[int, ...], meta: bool) -> Iterator[tuple[Any, ...]]:
    """Argument lists to try, in order: a batch, a list of images, two batches."""
    device = torch.device("meta") if meta else _device(model)
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = next(floating, torch.float32)
    batch = torch.rand((1, *size), device=device).to(dtype)
    yield (batch,)
    yield ([batch[0]],)
    yield (batch, batch.clone())


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


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
        with recorder:
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
    return Recording(model, size, example, meta, values, ops, calls, inputs, outputs)
