"""Subclasses that no code of the user's hears of."""

from __future__ import annotations

import abc
from typing import Any

from torch import nn


def quiet_subclass(base: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    """A subclass of `base`, with its metaclass, made without running the user's class-creation code.

    An `__init_subclass__` or metaclass that registers classes by name would take it for a class of the
    user's, replace the original in the registry, or demand arguments.
    """
    maker = abc.ABCMeta if issubclass(type(base), abc.ABCMeta) else type
    made: type[nn.Module] = maker.__new__(type(base), base.__name__, (nn.Module,), members)
    try:
        made.__bases__ = (base,)  # unlike class creation, this calls no __init_subclass__
    except TypeError:  # a base with slots
        made = maker.__new__(type(base), base.__name__, (base,), members)
    return made
