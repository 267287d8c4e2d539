"""Members of generated classes that keep a shortcut from being lost unseen: locks, seals, guarded Sequentials."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from padfree.errors import LockedStateError, PadfreeError
from padfree.rewrite.containers import shown

FUSERS = ("fuse", "reparameterize", "switch_to_deploy", "fuse_model", "repvgg_convert", "merge_bn")


def locking_members(base: type[nn.Module], locked: dict[str, Any]) -> dict[str, Any]:
    """Members that refuse to change what a generated forward was traced with: to set, register or delete it."""

    def check(name: Any, value: Any) -> None:
        if name in locked and not _same(locked[name], value):
            raise LockedStateError(
                f"{base.__name__}.{name} is baked into the converted forward as {locked[name]!r}; "
                "set it on the original model and convert again"
            )

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        check(name, value)
        base.__setattr__(self, name, value)

    def __delattr__(self: nn.Module, name: str) -> None:
        check(name, _GONE)
        base.__delattr__(self, name)

    def registering(method: str) -> Any:
        original = getattr(base, method)

        @functools.wraps(original)
        def register(self: nn.Module, name: str, *args: Any, **kwargs: Any) -> None:
            check(name, next(iter((*args, *kwargs.values())), None))
            original(self, name, *args, **kwargs)

        return register

    members: dict[str, Any] = {"__setattr__": __setattr__, "__delattr__": __delattr__}
    return members | {name: registering(name) for name in ("add_module", "register_parameter", "register_buffer")}


_GONE = object()


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
