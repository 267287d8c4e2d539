"""Members of generated classes that keep a shortcut from being lost unseen: locks, seals, guarded Sequentials."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from padfree.errors import LockedStateError, PadfreeError
from padfree.rewrite.containers import shown
from padfree.rewrite.kept import check_child

FUSERS = ("fuse", "reparameterize", "switch_to_deploy", "fuse_model", "repvgg_convert", "merge_bn")


def locking_members(base: type[nn.Module], locked: dict[str, Any]) -> dict[str, Any]:
    """Members that refuse to set, register or delete what a generated forward was traced with, and kept children."""

    def check(self: nn.Module, name: Any, value: Any) -> None:
        if name in locked and not _same(locked[name], value):
            raise LockedStateError(
                f"{base.__name__}.{name} is baked into the converted forward as {locked[name]!r}; "
                "set it on the original model and convert again"
            )
        check_child(self, name, value)

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        if name == "__class__":
            _check_class(self, value)
        check(self, name, value)
        base.__setattr__(self, name, value)

    def __delattr__(self: nn.Module, name: str) -> None:
        check(self, name, _GONE)
        base.__delattr__(self, name)

    def registering(method: str) -> Any:
        original = getattr(base, method)

        @functools.wraps(original)
        def register(self: nn.Module, name: str, *args: Any, **kwargs: Any) -> None:
            check(self, name, next(iter((*args, *kwargs.values())), None))
            original(self, name, *args, **kwargs)

        return register

    members: dict[str, Any] = {"__setattr__": __setattr__, "__delattr__": __delattr__}
    if issubclass(base, nn.ModuleDict):  # which deletes past __delattr__

        def __delitem__(self: nn.ModuleDict, key: str) -> None:
            check(self, key, _GONE)
            base.__delitem__(self, key)

        def clear(self: nn.ModuleDict) -> None:
            for key in self._modules:
                check(self, key, _GONE)
            base.clear(self)

        members |= {"__delitem__": __delitem__, "clear": clear}
    return members | {name: registering(name) for name in ("add_module", "register_parameter", "register_buffer")}


_GONE = object()


def _check_class(module: nn.Module, kind: Any) -> None:
    """Refuse a class without the generated forward; parametrizations and sharding make subclasses of it."""
    recipe = getattr(type(module), "_padfree_recipe", None)
    if recipe is not None and recipe[0] and getattr(kind, "_padfree_recipe", None) is not recipe:
        raise LockedStateError(
            f"this {type(module).__name__} has a converted forward, which its new class {kind.__name__} has not; "
            "set the class on the original model and convert again"
        )


def _same(locked: Any, value: Any) -> bool:
    return type(locked) is type(value) and bool(locked == value)


def sealed(name: str) -> Any:
    """A fusing method that refuses, since it would discard a shortcut."""

    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise PadfreeError(
            f"{type(self).__name__}.{name}() would discard the padding-free shortcut of a converted block; "
            f"call padfree.fuse(model), which keeps it, or {name}() on the original model before it is converted"
        )

    refuse.__name__ = name
    return refuse


def sequential_members(base: type[nn.Module], ends: tuple[str, ...] = ()) -> dict[str, Any]:
    """A rewritten Sequential refuses to be re-arranged or cut.

    Args:
        base: its original class.
        ends: names of the children that shortcuts end at, which it hands out views of.
    """

    def __getitem__(self: nn.Module, index: Any) -> nn.Module:
        if isinstance(index, slice):
            raise PadfreeError(
                "a slice of a converted Sequential would lose its padding-free shortcut; slice the original model, "
                "and convert the parts"
            )
        numbered = isinstance(index, int) or hasattr(index, "__index__")
        child: nn.Module = (
            list(shown(self, ends).values())[index] if numbered else base.__getitem__(self, index)  # type: ignore[index]
        )
        return child

    members: dict[str, Any] = {"__getitem__": __getitem__}
    for name in (
        "append",
        "insert",
        "extend",
        "pop",
        "__delitem__",
        "__add__",
        "__iadd__",
        "__mul__",
        "__imul__",
    ):
        if hasattr(base, name):
            members[name] = _fixed(name)
    return members


def _fixed(name: str) -> Any:
    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise PadfreeError(
            f"{name} on a converted Sequential would not change its generated forward; "
            "change the original and convert again"
        )

    refuse.__name__ = name
    return refuse
