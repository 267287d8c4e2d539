"""What a forward pass does, operation by operation: ATen calls seen by a `TorchDispatchMode`.

Values are told apart by storage and geometry, so views of the same thing are one value and in-place results
are new ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from padfree.indices import CallId, OpId, ValueId
from padfree.kernels import DECOMPOSITIONS, POOLS
from padfree.record.quick import TorchDispatchMode, kind_of, quick_meta
from padfree.record.trees import freeze, geometry_key, storage, tensors, to_meta

NO_OP = OpId(-1)


@dataclass(frozen=True)
class Value:
    """A tensor as it flows: its shape, the operation that made it (-1: none), and what it is.

    `live` says that it depends on the network's input; `name` is its path if it is a parameter
    or buffer of the model.
    """

    index: ValueId
    shape: tuple[int, ...]
    producer: OpId
    live: bool
    name: str


@dataclass(frozen=True)
class Op:
    """One operation. `inputs` are its live inputs; `args` all arguments, tensors as `Ref`.

    `foreign` says that it is none of torch's own: its fake kernel may compare no sizes.
    """

    index: OpId
    kind: str
    args: tuple[Any, ...]
    inputs: tuple[ValueId, ...]
    outputs: tuple[ValueId, ...]
    call: CallId
    grad: bool
    foreign: bool = False


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the operations run under it. Tensors are told apart by storage and geometry.

    Real tensors that meet meta ones (constants a model keeps outside its state) are moved to meta.
    """

    def __init__(self, names: Mapping[int, str] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.written: set[str] = set()  # parameters and buffers that an in-place operation met
        self.writes: list[tuple[Any, ...]] = []  # what in-place operations wrote into, by storage and geometry
        self._names = names or {}
        self._index: dict[tuple[Any, ...], ValueId] = {}
        self._alive: list[torch.Tensor] = []  # so that no storage address is used twice
        self.stack: list[CallId] = [CallId(-1)]

    def value(self, tensor: torch.Tensor) -> ValueId:
        """The index of the value `tensor` holds now."""
        found = self._index.get(geometry_key(tensor))
        return self._new(tensor, NO_OP, live=False) if found is None else found

    def enter(self, tensor: torch.Tensor) -> ValueId:
        """Declare `tensor` an input of the network."""
        return self._new(tensor, NO_OP, live=True)

    def _new(self, tensor: torch.Tensor, producer: OpId, live: bool) -> ValueId:
        index = ValueId(len(self.values))
        name = "" if producer >= 0 or live else self._names.get(storage(tensor), "")
        self.values.append(Value(index, tuple(tensor.shape), producer, live, name))
        self._index[geometry_key(tensor)] = index
        self._alive.append(tensor)
        return index

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DECOMPOSITIONS and func not in POOLS:  # rules know what our operators mean, and not the operators
            with self:
                return DECOMPOSITIONS[func](*args, **kwargs)
        given = tensors((args, kwargs))
        if any(t.is_meta for t in given) and not all(t.is_meta for t in given):
            args, kwargs = to_meta((args, kwargs))
            if isinstance(kwargs.get("device"), torch.device):
                kwargs["device"] = torch.device("meta")
        elif given and given[0].is_meta and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("meta")}
        if func._schema.is_mutable:
            self.written.update(self._names.get(storage(tensor), "") for tensor in given)
            by_name = {
                **{formal.name: arg for formal, arg in zip(func._schema.arguments, args, strict=False)},
                **kwargs,
            }
            writing = (formal for formal in func._schema.arguments if formal.alias_info and formal.alias_info.is_write)
            into = tuple(by_name.get(formal.name) for formal in writing)
            self.writes += [geometry_key(tensor) for tensor in tensors(into)]
        refs = [self.value(tensor) for tensor in given]
        kind, described = kind_of(func), (args, kwargs)
        if func in POOLS:  # torch's max-pool, by whichever operator
            kind, described = "max_pool2d_with_indices", ((args[0], *((side, side) for side in args[1:])), {})
        frozen = freeze(described, self.value)
        result = None if kwargs else quick_meta(func, args)
        if result is None:
            result = func(*args, **kwargs)
        if (
            given
            and isinstance(result, torch.Tensor)
            and not func._schema.is_mutable
            and geometry_key(result) == geometry_key(given[0])
        ):
            return result  # a view of the same thing: the same value
        live = dict.fromkeys(ref for ref in refs if self.values[ref].live)
        index = OpId(len(self.ops))
        made = tuple(self._new(out, index, bool(live)) for out in tensors(result))
        grad, foreign = torch.is_grad_enabled(), func.namespace not in _OWN
        self.ops.append(Op(index, kind, frozen, tuple(live), made, self.stack[-1], grad, foreign))
        return result


_OWN = ("aten", "prim", "prims", "padfree")  # namespaces of operators whose meaning is known
