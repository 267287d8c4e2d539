"""Children of a rewritten block, as they are handed out: the one that a shortcut ends at runs inside the block only.

Feature taps, perceptual losses and activation checkpointing call the children of a block one after another, past its
forward, where the shortcut is. So iterating, indexing and `children()` of a rewritten block give a *view* in the place
of such a child: an object of a subclass of its class, with the very same `__dict__` (parameters, hooks, mode), that
refuses to be called outside the block. What is registered stays the child itself, so the generated forward, compilers,
state dicts and `named_modules()` know nothing of views.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from padfree.errors import PadfreeError
from padfree.rewrite.classes import quiet_subclass

SEALED = "<sealed>"  # the entry of what is locked that names such children
GENERATED = "<padfree "  # what the file names of generated forwards begin with
_CHANGERS = ("torch.ao", "torch.nn", "torch.distributed", "torch.fx", "torch.jit", "torch.export", "padfree")

_views: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
_kinds: weakref.WeakKeyDictionary[type[nn.Module], weakref.ref[type[nn.Module]]] = weakref.WeakKeyDictionary()


def view(child: nn.Module) -> nn.Module:
    """What stands for `child` where it is handed out; itself where there can be no view of it."""
    kind = type(child)
    slots = any(vars(base).get("__slots__") for base in kind.__mro__)
    if isinstance(child, torch.jit.ScriptModule) or slots or getattr(kind, "_padfree_view", False):
        return child
    found = _views.get(child)
    if found is None or found.__dict__ is not child.__dict__ or kind not in type(found).__mro__:
        made = _kind(kind)
        found = made.__new__(made)
        object.__setattr__(found, "__dict__", child.__dict__)
        _views[child] = found
    return found


def child_members(sealed: tuple[str, ...]) -> dict[str, Any]:
    """`children` and `named_children` that hand out views of the children of these names.

    Parts of torch that take children to change them (quantization, wrapping, `train`, `to`) get the children.
    """

    def handing(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        pairs = nn.Module.named_children(block)
        return iter([(name, view(child) if name in sealed else child) for name, child in pairs])

    def named_children(self: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        return nn.Module.named_children(self) if _changes() else handing(self)

    def children(self: nn.Module) -> Iterator[nn.Module]:
        pairs = nn.Module.named_children(self) if _changes() else handing(self)
        return iter([child for _, child in pairs])

    return {"named_children": named_children, "children": children}


def _changes() -> bool:
    """Whether who calls the caller of this is a part of torch that changes modules."""
    frame = inspect.currentframe()
    caller = frame and frame.f_back and frame.f_back.f_back
    name = str(caller.f_globals.get("__name__")) if caller else ""
    return name.startswith(tuple(f"{package}." for package in _CHANGERS))


def _kind(base: type[nn.Module]) -> type[nn.Module]:
    reference = _kinds.get(base)
    found = reference() if reference is not None else None
    if found is None:
        members: dict[str, Any] = {
            "__call__": _call,
            "__reduce_ex__": _reduce,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_padfree_view": True,
        }
        source, _, locked = getattr(base, "_padfree_recipe", ("", (), ()))
        if issubclass(base, nn.Sequential) and not source and SEALED not in dict(locked):
            members |= _last_members()
        found = quiet_subclass(base, members)
        _kinds[base] = weakref.ref(found)
    return found


def _last_members() -> dict[str, Any]:
    """A view of a Sequential hands out a view of its last child, where what it makes is complete."""

    def parts(self: nn.Module) -> list[nn.Module]:
        found: list[nn.Module] = [*self._modules.values()]  # type: ignore[list-item]
        return [*found[:-1], *map(view, found[-1:])]

    def __iter__(self: nn.Module) -> Iterator[nn.Module]:
        return iter(parts(self))

    def __getitem__(self: nn.Module, index: Any) -> Any:
        return nn.Sequential(*parts(self)[index]) if isinstance(index, slice) else parts(self)[index]

    def named_children(self: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        return iter(list(zip(self._modules, parts(self), strict=True)))

    return {"__iter__": __iter__, "__getitem__": __getitem__, "named_children": named_children}


def _call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not _inside(self.__dict__):
        raise PadfreeError(
            f"this {type(self).__name__} ends the chain of a converted block, and called by itself it would lose the "
            "padding-free shortcut beside it; call the block (the Sequential that it is a child of) as a whole: tap, "
            "checkpoint or split it there, or cut the original model into parts and convert those"
        )
    kind = next(kind for kind in type(self).__mro__ if "_padfree_view" in vars(kind))
    above: Any = super(kind, self)
    return above.__call__(*args, **kwargs)


def _inside(state: dict[str, Any]) -> bool:
    """Whether a generated forward of a block that the child with this `__dict__` lies in is running."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith(GENERATED):
            block = frame.f_locals.get("self")
            if isinstance(block, nn.Module) and any(module.__dict__ is state for module in block.modules()):
                return True
        frame = frame.f_back
    return False


def _reduce(self: nn.Module, protocol: Any) -> Any:
    return (_rebuild, (type(self).__mro__[1],), self.__dict__)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    kind = _kind(base)
    return kind.__new__(kind)
