"""Containers of layers show a rewritten block's old children only, with views in the place of those that it seals.

A forward may take a container apart instead of calling it (`for layer in self.layers`). Others then do the same, past
the block's forward: so a `Sequential`, `ModuleList` or `ModuleDict` that holds the end of a shortcut hands out views as
the block itself does, whether the container is the block or a child of it.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

from torch import nn

from padfree.rewrite.views import view
from padfree.types import NEW

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def old_names(container: nn.Module) -> list[str]:
    """The names of a container's old children."""
    return [name for name in container._modules if not name.startswith(NEW)]


def shown(container: nn.Module, ends: tuple[str, ...]) -> dict[str, nn.Module]:
    """The old children of a container by name, views in the place of those at `ends`."""
    children: dict[str, Any] = container._modules
    return {name: view(children[name]) if name in ends else children[name] for name in old_names(container)}


def container_members(base: type[nn.Module], ends: tuple[str, ...]) -> dict[str, Any]:
    """Members of a generated class for a container; none for other modules.

    Args:
        base: its original class; what that defines itself stays.
        ends: names of the children that it hands out views of.
    """
    torchs = next((kind for kind in CONTAINERS if issubclass(base, kind)), None)
    if torchs is None:
        return {}

    def __len__(self: nn.Module) -> int:
        return len(old_names(self))  # a generated forward asks, also compiled, where no view may be made

    def in_order(self: nn.Module) -> Iterator[nn.Module]:
        return iter(shown(self, ends).values())

    def at(self: nn.Module, index: Any) -> nn.Module:
        layers: list[nn.Module] = list(shown(self, ends).values())
        if not isinstance(index, slice):
            found: nn.Module = layers[index]
            return found
        found = nn.Sequential(*layers[index]) if torchs is nn.Sequential else nn.ModuleList(layers[index])
        return found

    def names(self: nn.Module) -> Iterator[str]:
        return iter(old_names(self))

    def keys(self: nn.Module) -> KeysView[str]:
        return dict.fromkeys(old_names(self)).keys()

    def values(self: nn.Module) -> ValuesView[nn.Module]:
        return shown(self, ends).values()

    def items(self: nn.Module) -> ItemsView[str, nn.Module]:
        return shown(self, ends).items()

    def under(self: nn.Module, key: str) -> nn.Module:
        return shown(self, ends)[key]

    members: dict[str, Any] = {"__len__": __len__}
    if torchs is nn.ModuleDict:
        members |= {"__iter__": names, "__getitem__": under, "keys": keys, "values": values, "items": items}
    else:
        members |= {"__iter__": in_order, "__getitem__": at}
    return {name: member for name, member in members.items() if getattr(base, name) is getattr(torchs, name)}
