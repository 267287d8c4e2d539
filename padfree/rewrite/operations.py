"""The operations a conversion consists of, as data on module paths, and the only code that changes a model.

`perform` carries a list of them out on a model: all of them, or none.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from padfree.errors import PadfreeError
from padfree.layers.spec import Spec, StemTailSpec
from padfree.record.copies import HOOK_TABLES
from padfree.rewrite.forward import (
    Locked,
    Names,
    is_rewritten,
    original_class,
    rewritten_class,
    sealed_class,
    sealing_class,
    set_class,
)
from padfree.rewrite.keeping import common, keep
from padfree.rewrite.kept import LIKE, MOVED, PLACED
from padfree.rewrite.refusing import Refused, refusing_class
from padfree.rewrite.same_padding import shaped_like


@dataclass(frozen=True)
class SetAttributes:
    """Plain attributes of one module."""

    path: str
    values: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class AddChild:
    """A new child of a block."""

    path: str
    name: str
    spec: Spec


@dataclass(frozen=True)
class MoveChild:
    """A parameter-free child of another module, moved to a block; an identity stays in its place."""

    path: str
    origin: str
    name: str


@dataclass(frozen=True)
class ReplaceEnd:
    """A new layer in the place of a parameter-free module, which becomes its part."""

    path: str
    spec: StemTailSpec


@dataclass(frozen=True)
class Substitute:
    """A new layer in the place of a module, under all its names; it takes over that module's hooks."""

    path: str
    spec: Spec


@dataclass(frozen=True)
class Resize:
    """Another shape for a parameter."""

    path: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Reforward:
    """A generated forward for a module, whose fusing methods are sealed too."""

    path: str
    source: str
    names: Names
    locked: Locked


@dataclass(frozen=True)
class Seal:
    """A module keeps its forward, but its fusing methods raise: they would drop a shortcut below it.

    Of the children named in `ends` it hands out views: they end a chain in the forward of a module above.
    """

    path: str
    ends: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refuse:
    """Methods of a module raise, each for its reason, since they would not give what its forward gives."""

    path: str
    methods: Refused


@dataclass(frozen=True)
class Describe:
    """A module's descriptions of itself, mappings or dataclasses under these names, become copies with other values."""

    path: str
    names: tuple[str, ...]
    values: tuple[tuple[str, Any], ...]


Operation = (
    SetAttributes | AddChild | MoveChild | ReplaceEnd | Substitute | Resize | Reforward | Seal | Refuse | Describe
)


def perform(model: nn.Module, operations: Iterable[Operation]) -> nn.Module:
    """Carry the operations out on `model`, in place: all of them, or none.

    Raises:
        PadfreeError: one failed; the model is as it was before.
    """
    with _undoing() as undo:
        for operation in operations:
            _DO[type(operation)](model, operation, undo)
    return model


def preserve(model: nn.Module, operations: Iterable[Operation]) -> None:
    """Give new layers, once they are in place, values at which the network computes what it did (`Spec.preserve`)."""
    for operation in operations:
        if isinstance(operation, (AddChild, ReplaceEnd)):
            name = f".{operation.name}" if isinstance(operation, AddChild) else ""
            path = f"{operation.path}{name}".removeprefix(".")
            operation.spec.preserve(model.get_submodule(path), model)


Undo = list[Callable[[], Any]]


@contextmanager
def _undoing() -> Iterator[Undo]:
    undo: Undo = []
    try:
        yield undo
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _set_attributes(model: nn.Module, operation: SetAttributes, undo: Undo) -> None:
    module = model.get_submodule(operation.path)
    for name, value in operation.values:
        if name not in module.__dict__:
            raise PadfreeError(f"`{operation.path}` has no plain attribute `{name}` to set")
        undo.append(_restore(module.__dict__, name))
        module.__dict__[name] = shaped_like(value, module.__dict__[name])


def _restore(table: dict[str, Any], name: str) -> Callable[[], None]:
    old = dict(table)

    def restore() -> None:
        table.clear()
        table.update(old)

    return restore


def _add_child(model: nn.Module, operation: AddChild, undo: Undo) -> None:
    parent = model.get_submodule(operation.path)
    if operation.name in parent._modules:
        raise PadfreeError(f"`{operation.path}` has a child named `{operation.name}` already")
    undo.append(_restore(parent._modules, operation.name))
    parent._modules[operation.name] = operation.spec.build(model)
    _keep_copied(model, operation.spec, undo)


def _move_child(model: nn.Module, operation: MoveChild, undo: Undo) -> None:
    parent_path, _, name = operation.origin.rpartition(".")
    parent, block = model.get_submodule(parent_path), model.get_submodule(operation.path)
    for table in (parent._modules, block._modules):
        undo.append(_restore(table, name))
    block._modules[operation.name] = parent._modules[name]
    parent._modules[name] = nn.Identity().train(parent.training)
    undo += keep(
        model, operation.origin, MOVED, common(operation.origin, f"{operation.path}.{operation.name}".strip("."))
    )


def _replace_end(model: nn.Module, operation: ReplaceEnd, undo: Undo) -> None:
    parent_path, _, name = operation.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    end = parent._modules[name]
    assert end is not None
    kind, state = type(end), end.__dict__
    undo.append(_restore(parent._modules, name))
    undo.append(_restore(state, name))
    undo.append(lambda: set_class(end, kind))
    tail = operation.spec.build(model, end)
    _keep_copied(model, operation.spec, undo)
    parent._modules[name] = tail
    undo += keep(model, operation.path, PLACED, parent_path)
    for table in HOOK_TABLES:  # what was hooked there goes on to see what the next layer reads
        if table in state:
            tail.__dict__[table], state[table] = state[table], type(state[table])()


def _keep_copied(model: nn.Module, spec: Spec, undo: Undo) -> None:
    for path, copied in spec.copied(model):
        undo += keep(model, path, LIKE, copied.rpartition(".")[0])


def _substitute(model: nn.Module, operation: Substitute, undo: Undo) -> None:
    old = model.get_submodule(operation.path)
    new = operation.spec.build(model)
    undo.append(_restore(old.__dict__, ""))
    for table in HOOK_TABLES:
        new.__dict__[table], old.__dict__[table] = old.__dict__[table], type(old.__dict__[table])()
    for parent in model.modules():
        names = [name for name, child in parent._modules.items() if child is old]
        if names:
            undo.append(_restore(parent._modules, ""))
        for name in names:
            parent._modules[name] = new


def _resize(model: nn.Module, operation: Resize, undo: Undo) -> None:
    path, _, name = operation.path.rpartition(".")
    module = model.get_submodule(path)
    old = module._parameters[name]
    assert old is not None
    undo.append(_restore(module._parameters, name))
    with torch.no_grad():
        new = _interpolated(old.detach(), operation.shape)
    module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)


def _interpolated(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) == shape:
        return tensor.clone()
    if tensor.is_meta:
        return tensor.new_empty(shape)
    spatial = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return F.interpolate(spatial, size=shape[2:], mode="bilinear", align_corners=True).to(tensor.dtype)


def _reforward(model: nn.Module, operation: Reforward, undo: Undo) -> None:
    module = model.get_submodule(operation.path)
    kind = rewritten_class(original_class(module), operation.source, operation.names, operation.locked)
    _set_class(module, kind, undo)


def _seal(model: nn.Module, operation: Seal, undo: Undo) -> None:
    module = model.get_submodule(operation.path)
    base = original_class(module)
    if operation.ends:
        _set_class(module, sealing_class(module, operation.ends), undo)
    elif not is_rewritten(module):  # else it is sealed already, or rewritten and so sealed
        _set_class(module, sealed_class(base), undo)


def _set_class(module: nn.Module, kind: type[nn.Module], undo: Undo) -> None:
    old = type(module)
    undo.append(lambda: set_class(module, old))
    set_class(module, kind)


def _refuse(model: nn.Module, operation: Refuse, undo: Undo) -> None:
    module = model.get_submodule(operation.path)
    _set_class(module, refusing_class(type(module), operation.methods), undo)


def _describe(model: nn.Module, operation: Describe, undo: Undo) -> None:
    module = model.get_submodule(operation.path)
    undo.append(_restore(module.__dict__, ""))
    made: dict[int, Any] = {}  # what two names mean stays one
    for name in operation.names:
        old = getattr(module, name)
        if id(old) not in made:
            made[id(old)] = _described(old, dict(operation.values))
        module.__dict__[name] = made[id(old)]


def _described(old: Any, values: dict[str, Any]) -> Any:
    """A copy with these values; the object itself may be a registry's, which other models share."""
    if isinstance(old, MutableMapping):
        new = copy.copy(old)
        new.update(values)
        return new
    return dataclasses.replace(old, **values)


_DO: dict[type[Any], Callable[[nn.Module, Any, Undo], None]] = {
    SetAttributes: _set_attributes,
    AddChild: _add_child,
    MoveChild: _move_child,
    ReplaceEnd: _replace_end,
    Substitute: _substitute,
    Resize: _resize,
    Reforward: _reforward,
    Seal: _seal,
    Refuse: _refuse,
    Describe: _describe,
}
