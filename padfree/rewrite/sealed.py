"""Members of generated classes that keep a shortcut from being lost unseen: locks, seals, guarded Sequentials."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from padfree.errors import LockedStateError, PadfreeError
from padfree.rewrite.views import view
from padfree.types import NEW

FUSERS = ("fuse", "reparameterize", "switch_to_deploy", "fuse_model", "repvgg_convert", "merge_bn")


def locking_setattr(base: type[nn.Module], locked: dict[str, Any]) -> Any:
    """A `__setattr__` that refuses to change what a generated forward was traced with."""

    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        if name in locked and not _same(locked[name], value):
            raise LockedStateError(
                f"{base.__name__}.{name} is baked into the converted forward as {locked[name]!r}; "
                "set it on the original model and convert again"
            )
        base.__setattr__(self, name, value)

    return __setattr__


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
    """A rewritten Sequential shows only its old children, and refuses to be re-arranged.

    Args:
        base: its original class.
        ends: names of the children that shortcuts end at, which it hands out views of.
    """

    def shown(self: nn.Module) -> list[nn.Module]:
        children: dict[str, Any] = self._modules
        old = {name: child for name, child in children.items() if not name.startswith(NEW)}
        return [view(child) if name in ends else child for name, child in old.items()]

    def __len__(self: nn.Module) -> int:
        return len(shown(self))

    def __iter__(self: nn.Module) -> Iterator[nn.Module]:
        return iter(shown(self))

    def __getitem__(self: nn.Module, index: Any) -> nn.Module:
        if isinstance(index, slice):
            raise PadfreeError(
                "a slice of a converted Sequential would lose its padding-free shortcut; slice the original model, "
                "and convert the parts"
            )
        numbered = isinstance(index, int) or hasattr(index, "__index__")
        child: nn.Module = shown(self)[index] if numbered else base.__getitem__(self, index)  # type: ignore[index]
        return child

    members: dict[str, Any] = {"__getitem__": __getitem__}
    for member in (__len__, __iter__):
        if getattr(base, member.__name__) is getattr(nn.Sequential, member.__name__):  # else the user's own stays
            members[member.__name__] = member
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
