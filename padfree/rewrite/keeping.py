"""Marks children that must stay, and gives their parents classes that look after them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from padfree.rewrite.forward import guarded_class, set_class
from padfree.types import KEPT


def keep(model: nn.Module, path: str, why: str, within: str) -> list[Callable[[], Any]]:
    """From now on the module at `path` cannot be set anew, nor can those that it lies in, up to the one at `within`.

    Args:
        model: the network.
        path: of a module.
        why: `rewrite.kept` has the reasons; one that is there already stays.
        within: path of a module that `path` lies in, which itself may be set anew.

    Returns:
        what undoes it, if called from the last to the first.
    """
    undo: list[Callable[[], Any]] = []
    while path not in (within, ""):
        child, holder = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
        if KEPT not in child.__dict__:
            child.__dict__[KEPT] = why
            undo.append(functools.partial(child.__dict__.pop, KEPT))
        undo.append(functools.partial(set_class, holder, type(holder)))
        set_class(holder, guarded_class(holder))
        path = path.rpartition(".")[0]
    return undo


def keep_empty(model: nn.Module, path: str, why: str, within: str) -> None:
    """Keep a module (`keep`); where it only stands for what is elsewhere now, nothing can be set on it either."""
    keep(model, path, why, within)
    module = model.get_submodule(path)
    if isinstance(module, nn.Identity):
        set_class(module, guarded_class(module))


def common(*paths: str) -> str:
    """The path of the innermost module that all of these lie in."""
    holders: list[Any] = [path.split(".")[:-1] for path in paths]
    shortest = min(map(len, holders))
    depth = next((d for d in range(shortest) if len({holder[d] for holder in holders}) > 1), shortest)
    return ".".join(holders[0][:depth])
