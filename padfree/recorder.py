"""What a forward pass does, operation by operation: ATen calls seen by a `TorchDispatchMode`.

Values are told apart by storage and geometry, so views of the same thing are one value and in-place results
are new ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode


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
        found = self._index.get(geometry_key(tensor))
        return self._new(tensor, -1, live=False) if found is None else found

    def enter(self, tensor: torch.Tensor) -> int:
        """Declare `tensor` an input of the network."""
        return self._new(tensor, -1, live=True)

    def _new(self, tensor: torch.Tensor, producer: int, live: bool) -> int:
        index = len(self.values)
        name = "" if producer >= 0 or live else self._names.get(storage(tensor), "")
        self.values.append(Value(index, tuple(tensor.shape), producer, live, name))
        self._index[geometry_key(tensor)] = index
        self._alive.append(tensor)
        return index

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[torch.Tensor] = []
        collect(args, tensors)
        collect(tuple(kwargs.values()), tensors)
        if any(t.is_meta for t in tensors) and not all(t.is_meta for t in tensors):
            args, kwargs = _to_meta(args), {key: _to_meta(item) for key, item in kwargs.items()}
            if isinstance(kwargs.get("device"), torch.device):
                kwargs["device"] = torch.device("meta")
        elif tensors and tensors[0].is_meta and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("meta")}
        refs = [self.value(tensor) for tensor in tensors]
        frozen = freeze((args, kwargs), self.value)
        result = _quick_meta(func, args) if tensors and tensors[0].is_meta else None
        if result is None:
            result = func(*args, **kwargs)
        if (
            tensors
            and isinstance(result, torch.Tensor)
            and not func._schema.is_mutable
            and geometry_key(result) == geometry_key(tensors[0])
        ):
            return result  # a view of the same thing: the same value
        live = dict.fromkeys(ref for ref in refs if self.values[ref].live)
        outputs: list[torch.Tensor] = []
        collect((result,), outputs)
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


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_KINDS: dict[Any, str] = {}


def _kind(func: Any) -> str:
    kind = _KINDS.get(func)
    if kind is None:
        kind = _KINDS[func] = func.__name__.split(".")[0]
    return kind


def storage(tensor: torch.Tensor) -> int:
    """What tells storages apart while they live."""
    return int(tensor.untyped_storage()._cdata)


def geometry_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What tells values apart: storage, offset, shape and strides."""
    return (storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())


def collect(tree: Any, into: list[torch.Tensor]) -> None:
    """Every tensor in nested tuples, lists and mappings (and dataclass-like outputs), in order."""
    if isinstance(tree, torch.Tensor):
        if tree.layout == torch.strided:
            into.append(tree)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            collect(item, into)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            collect(item, into)
    elif hasattr(tree, "tensors") and hasattr(tree, "image_sizes"):  # an ImageList-like holder
        collect(tree.tensors, into)


def containers_copied(tree: Any) -> Any:
    """The same tensors in new lists, tuples and dictionaries, which nobody else can change."""
    if type(tree) in (list, tuple):
        return type(tree)(containers_copied(item) for item in tree)
    if type(tree) is dict:
        return {key: containers_copied(item) for key, item in tree.items()}
    return tree


def repeat_batch(tree: Any) -> Any:
    """The arguments with batches of one doubled: batch norms in train mode need two values a channel."""
    if isinstance(tree, torch.Tensor):
        alone = tree.dim() > 1 and tree.shape[0] == 1
        return tree.expand(2, *tree.shape[1:]).clone() if alone else tree
    if isinstance(tree, (tuple, list)):
        return type(tree)(repeat_batch(item) for item in tree)
    if isinstance(tree, dict):
        return {key: repeat_batch(item) for key, item in tree.items()}
    return tree


def freeze(tree: Any, index: Callable[[torch.Tensor], int]) -> Any:
    """Nested arguments as nested tuples, tensors as `Ref`."""
    if isinstance(tree, torch.Tensor):
        return Ref(index(tree)) if tree.layout == torch.strided else "sparse"
    if isinstance(tree, (tuple, list)):
        return tuple(freeze(item, index) for item in tree)
    if isinstance(tree, dict):
        return tuple((key, freeze(item, index)) for key, item in tree.items())
    if isinstance(tree, float) and math.isnan(tree):
        return "nan"
    if isinstance(tree, torch.ScriptObject):  # a profiler's record: nothing to compare
        return type(tree).__name__
    return tree


def _to_meta(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree if tree.is_meta else tree.to("meta")
    if isinstance(tree, (tuple, list)):
        return type(tree)(_to_meta(item) for item in tree)
    return tree
