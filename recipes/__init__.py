"""The paper's experiments: every row built, counted and trainable.

>>> from padfree import recipes
>>> network = recipes.load("cifar100-first/resnet20").build("padfree", seed=0)
"""

from .files import RecipeError, load, names
from .recipe import Recipe

__all__ = ["Recipe", "RecipeError", "load", "names"]
