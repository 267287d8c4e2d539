"""One forward pass, written down: every operation, every module call, every value.

The pass runs on a weightless copy with meta tensors, so nothing is computed and the model's own
parameters, buffers, hooks and random state are untouched; where an operation has no meta kernel
the pass is repeated on a real copy. Operations are ATen calls seen by a `TorchDispatchMode`, so
functional code, scripted functions and modules look alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from padfree.errors import PadfreeError
from padfree.skeleton import bare_copy, meta_copy


class ForwardFailedError(Exception):
    """A recorded forward raised: the path of the module it was in, the shapes that module was given."""

    def __init__(self, path: str, shapes: list[tuple[int, ...]], cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {first_line(cause)}")
        self.path = path
        self.shapes = shapes
        self.cause = cause


class Ref(NamedTuple):
    """Stands for a tensor among an operation's recorded arguments."""

    value: int


@dataclass(frozen=True)
class Value:
    """A tensor as it flows: its shape, the operation that made it (-1: none), and what it is.

    `live` says that it depends on the network's input; `name` is its path if it is a parameter
    or buffer of the model.
    """

    index: int
    shape: tuple[int, ...]
    producer: int
    live: bool
    name: str


@dataclass(frozen=True)
class Op:
    """One ATen operation. `inputs` are its live inputs; `args` all arguments, tensors as `Ref`."""

    index: int
    kind: str
    args: tuple[Any, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    call: int
    grad: bool


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


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the operations run under it. Tensors are told apart by storage and geometry.

    Real tensors that meet meta ones (constants a model keeps outside its state) are moved to meta.
    """

    def __init__(self, names: Mapping[int, str] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self._names = names or {}
        self._index: dict[tuple[Any, ...], int] = {}
        self._alive: list[torch.Tensor] = []  # so that no storage address is used twice
        self.stack: list[int] = [-1]

    def value(self, tensor: torch.Tensor) -> int:
        """The index of the value `tensor` holds now."""
        found = self._index.get(_key(tensor))
        return self._new(tensor, -1, live=False) if found is None else found

    def enter(self, tensor: torch.Tensor) -> int:
        """Declare `tensor` an input of the network."""
        return self._new(tensor, -1, live=True)

    def _new(self, tensor: torch.Tensor, producer: int, live: bool) -> int:
        index = len(self.values)
        name = "" if producer >= 0 or live else self._names.get(_storage(tensor), "")
        self.values.append(Value(index, tuple(tensor.shape), producer, live, name))
        self._index[_key(tensor)] = index
        self._alive.append(tensor)
        return index

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[torch.Tensor] = []
        _collect(args, tensors)
        _collect(tuple(kwargs.values()), tensors)
        if any(t.is_meta for t in tensors) and not all(t.is_meta for t in tensors):
            args, kwargs = _to_meta(args), {key: _to_meta(item) for key, item in kwargs.items()}
            if isinstance(kwargs.get("device"), torch.device):
                kwargs["device"] = torch.device("meta")
        elif tensors and tensors[0].is_meta and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("meta")}
        refs = [self.value(tensor) for tensor in tensors]
        frozen = _freeze((args, kwargs), self.value)
        result = _quick_meta(func, args) if tensors and tensors[0].is_meta else None
        if result is None:
            result = func(*args, **kwargs)
        if (
            tensors
            and isinstance(result, torch.Tensor)
            and not func._schema.is_mutable
            and _key(result) == _key(tensors[0])
        ):
            return result  # a view of the same thing: the same value
        live = dict.fromkeys(ref for ref in refs if self.values[ref].live)
        outputs: list[torch.Tensor] = []
        _collect((result,), outputs)
        index = len(self.ops)
        made = tuple(self._new(out, index, bool(live)) for out in outputs)
        self.ops.append(Op(index, _kind(func), frozen, tuple(live), made, self.stack[-1], torch.is_grad_enabled()))
        return result


_UNARY = frozenset({"hardswish", "hardsigmoid", "silu", "hardtanh", "gelu", "sigmoid", "relu", "leaky_relu", "mish"})


def _quick_meta(func: Any, args: Any) -> Any:
    """The outputs of batch norms and activations on meta tensors, whose own kernels take up to 50 times as long.

    None for everything else.
    """
    kind = _kind(func)
    x = args[0]
    if kind == "native_batch_norm":
        count = x.shape[1] if args[5] else 0
        statistics = (x.new_empty(count, dtype=torch.float32) for _ in range(2))
        return (torch.empty_like(x), *statistics)
    if kind.rstrip("_") in _UNARY and isinstance(x, torch.Tensor) and x.is_floating_point():
        return x if kind.endswith("_") else torch.empty_like(x)
    return None


class CallTracker:
    """Hooks on every module of a copy that note when its calls begin and end."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self.calls: list[Call] = []
        self._recorder = recorder
        self._handles = []
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # a leaf: its operations are seen, its calls are not
            before = functools.partial(self._before, path)
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    def _before(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder, index = self._recorder, len(self.calls)
        inputs = self._values((args, kwargs))
        start = len(recorder.ops)
        parent = recorder.stack[-1]
        self.calls.append(Call(index, path, parent, inputs, (), range(start, start), (args, kwargs)))
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
        _collect((tree,), tensors)
        return tuple(self._recorder.value(tensor) for tensor in tensors)


def default_input_size(model: nn.Module) -> tuple[int, ...]:
    """(C, H, W) from the model's `pretrained_cfg` or `default_cfg`, else (3, 224, 224), or (3, 16, 224, 224) for video.

    The channel count of a model built with `in_chans=` is read from its first convolution.
    """
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
    if first is None or first.in_channels > 16 or len(size) != 3:
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
    except (TypeError, ValueError):
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
    try:
        return _run(skeleton, size, meta=True)
    except Exception:  # whatever it was: real tensors either run, or say what is wrong
        pass
    try:
        return _run(bare_copy(model), size, meta=False)
    except Exception as error:
        shape = "x".join(map(str, size))
        raise PadfreeError(
            f"{type(model).__name__} does not run on a {shape} input: {first_line(error)}. "
            "Hint: pass input_size=(C, H, W) that the model takes"
        ) from error


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
    names = {_storage(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    recorder = Recorder(names)
    tensors: list[torch.Tensor] = []
    _collect(example, tensors)
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
        _collect((result,), found)
        outputs = tuple(recorder.value(tensor) for tensor in found)
    finally:
        tracker.remove()
    values, ops, calls = tuple(recorder.values), tuple(recorder.ops), tuple(tracker.calls)
    return Recording(model, size, example, meta, values, ops, calls, inputs, outputs)


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_KINDS: dict[Any, str] = {}


def _kind(func: Any) -> str:
    kind = _KINDS.get(func)
    if kind is None:
        kind = _KINDS[func] = func.__name__.split(".")[0]
    return kind


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _key(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (_storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())


def _collect(tree: Any, into: list[torch.Tensor]) -> None:
    """Every tensor in nested tuples, lists and mappings (and dataclass-like outputs), in order."""
    if isinstance(tree, torch.Tensor):
        if tree.layout == torch.strided:
            into.append(tree)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            _collect(item, into)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            _collect(item, into)
    elif hasattr(tree, "tensors") and hasattr(tree, "image_sizes"):  # an ImageList-like holder
        _collect(tree.tensors, into)


def _freeze(tree: Any, index: Callable[[torch.Tensor], int]) -> Any:
    if isinstance(tree, torch.Tensor):
        return Ref(index(tree)) if tree.layout == torch.strided else "sparse"
    if isinstance(tree, (tuple, list)):
        return tuple(_freeze(item, index) for item in tree)
    if isinstance(tree, dict):
        return tuple((key, _freeze(item, index)) for key, item in tree.items())
    if isinstance(tree, float) and math.isnan(tree):
        return "nan"
    return tree


def _to_meta(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree if tree.is_meta else tree.to("meta")
    if isinstance(tree, (tuple, list)):
        return type(tree)(_to_meta(item) for item in tree)
    return tree
