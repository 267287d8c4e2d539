"""The networks of a recipe: the original, and what is made of it."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import nn

import padfree
from padfree import PadfreeError

from .efficientformerv2 import replace_downsampling
from .figures import Variant
from .models import build_model
from .schema import RecipeData

DOWNSAMPLING = ("depthwise", "dense", "projection")
STEM = ("stem",)


def variants(recipe: RecipeData) -> tuple[str, ...]:
    """The variants that a recipe can build."""
    skip = () if recipe.efficientformerv2 else ("efficientformerv2",)
    return tuple(name for name in get_args(Variant) if name not in skip)


def build(recipe: RecipeData, variant: str, seed: int) -> nn.Module:
    """See `Recipe.build`."""
    if variant not in variants(recipe):
        raise PadfreeError(f"recipe {recipe.name} has no variant {variant!r}; it has {', '.join(variants(recipe))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(recipe.model)
        if variant == "original":
            return model
        if variant == "efficientformerv2" and recipe.efficientformerv2:
            return replace_downsampling(model, recipe.efficientformerv2, recipe.model.input_side)
        return padfree.convert(model, **conversion(recipe, variant))


def conversion(recipe: RecipeData, variant: str) -> dict[str, Any]:
    """The arguments of `padfree.convert` and `padfree.plan` for a variant.

    Args:
        recipe: whose options and input size.
        variant: padfree, stem-only or downsampling-only.
    """
    options = recipe.conversion
    downsampling = (*DOWNSAMPLING, *options.extra_rules)
    rules = {"padfree": downsampling + STEM, "stem-only": STEM, "downsampling-only": downsampling}[variant]
    if options.extra_rules:
        from .parc_rule import ensure_registered

        ensure_registered()
    side = recipe.model.input_side
    return {
        "init": "fresh",  # the paper's networks are trained from scratch
        "rules": rules,
        "options": padfree.Options(
            merge=options.merge,
            pool=options.pool,
            projection=options.projection,
            stem_residual=options.stem_residual,
        ),
        "input_size": (3, side, side),
    }
