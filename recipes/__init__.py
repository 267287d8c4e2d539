"""The paper's experiments: every row built, counted and trainable.

>>> from padfree import recipes
>>> network = recipes.load("cifar100-first/resnet20").build("padfree", seed=0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .files import RecipeError, load, names
    from .recipe import Recipe

__all__ = ["Recipe", "RecipeError", "load", "names"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command can say in one line which package is missing."""
    if name in __all__:
        from . import files

        return getattr(files, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
