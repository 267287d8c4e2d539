"""A recipe: what its file says, and the networks that are made of it."""

from __future__ import annotations

from pathlib import PurePosixPath

from torch import nn

from .schema import RecipeData
from .variants import build


class Recipe(RecipeData):
    """One experiment; `padfree.recipes.load` makes it from a file.

    Attributes:
        name: `<table>/<model>`, or the path of the file.
    """

    @property
    def table(self) -> str:
        """The first part of the name."""
        return PurePosixPath(self.name).parts[0]

    def build(self, variant: str = "padfree", *, seed: int = 0) -> nn.Module:
        """A freshly initialised network on the CPU in training mode.

        Args:
            variant: original, padfree, stem-only, downsampling-only, or efficientformerv2 where the
                recipe names the blocks.
            seed: of the initial values; torch's own random state is left as it was.

        Raises:
            PadfreeError: no such variant, or the source model cannot be had.
        """
        return build(self, variant, seed)
